"""The API: each route, each refusal, and what bad input does to it (nothing)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.daemon.daemons import Answer, Daemon, daemon
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import Machine, storage_daemon

OFF = '[[vm]]\nname = "off"\nqmp = "/nowhere/qmp"\nconnect = "on-demand"\n'
PIVOT = {"disk": "top", "policy": {"kind": "pivot"}}
POST = (
    b"POST /v1/vms/off/commits HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\n"
)


@asynccontextmanager
async def served(folder: Path, more: str = "") -> AsyncIterator[Daemon]:
    """A daemon with one VM, which is off; it must be well in the end."""
    async with daemon(folder, more + OFF) as d:
        yield d
        assert (await d.get("/readyz")).status == 200
        assert (await d.get("/v1/commits")).json == []
        assert '"bug"' not in d.log
        assert await d.stop() == 0


def assert_problem(answer: Answer, status: int, kind: str | None = None) -> Any:
    """A problem document, with all that RFC 9457 asks for."""
    assert answer.status == status, answer.body
    headers = {name.lower(): value for name, value in answer.headers.items()}
    assert headers["content-type"] == "application/problem+json"
    found = answer.json
    assert found["status"] == status
    assert found["title"]
    assert found["detail"]
    assert found["type"].startswith("urn:qmpcommit:")
    if kind is not None:
        assert found["type"] == f"urn:qmpcommit:{kind}"
    assert ("retry-after" in headers) is (status == 503)
    return found


async def test_vms_come_and_go_and_are_remembered(folder: Path) -> None:
    async with served(folder) as d:
        assert [vm["name"] for vm in (await d.get("/v1/vms")).json] == ["off"]
        new = {"name": "web1", "qmp": f"{folder}/qmp", "connect": "on-demand"}
        made = await d.post("/v1/vms", new)
        assert (made.status, made.json["state"], made.json["origin"]) == (201, "idle", "api")
        assert (await d.post("/v1/vms", new)).status == 201, "the same once more is no conflict"
        other = {**new, "qmp": "/else"}
        assert_problem(await d.post("/v1/vms", other), 409, "JobConflict")
        assert_problem(await d.post("/v1/vms", {**new, "name": "off"}), 409)
        assert_problem(await d.request("DELETE", "/v1/vms/off"), 409, "JobConflict")
        await d.kill()
        await d.start()
        assert [vm["name"] for vm in (await d.get("/v1/vms")).json] == ["off", "web1"]
        assert (await d.get("/v1/vms/web1")).json["connect"] == "on-demand"
        assert (await d.request("DELETE", "/v1/vms/web1")).status == 204
        assert_problem(await d.request("DELETE", "/v1/vms/web1"), 404, "VMNotFound")
        await d.kill()
        await d.start()
        assert [vm["name"] for vm in (await d.get("/v1/vms")).json] == ["off"]


async def test_what_is_not_there(folder: Path) -> None:
    async with served(folder) as d:
        for path in ("/v1/vms/web9", "/v1/vms/web9/disks", "/v1/vms/web9/jobs"):
            assert_problem(await d.get(path), 404, "VMNotFound")
        for path in ("/", "/v1", "/v1/vms/", "/v1/vms/a%2Fb", "/v1/vms/a/b", "/docs", "/redoc"):
            assert_problem(await d.get(path), 404, "http:404")
        assert_problem(await d.get("/v1/vms/a%00b"), 404, "VMNotFound")
        assert_problem(await d.get("/v1/vms/..%2f..%2fetc"), 404)
        assert_problem(await d.get(f"/v1/vms/{'x' * 65}"), 404, "VMNotFound")
        assert_problem(await d.get("/v1/commits/0123abcd"), 404, "CommitNotFound")
        assert_problem(await d.get("/v1/commits/../etc"), 404)
        for name in ("no-such-id", "a%00b", "x" * 1000, "%ff"):
            for kind in ("commits", "groups", "windows", "cycles"):
                assert_problem(await d.get(f"/v1/{kind}/{name}"), 404)
            for kind in ("commits", "groups"):
                decision = await d.post(f"/v1/{kind}/{name}/decision", {"action": "pivot"})
                assert_problem(decision, 404, "CommitNotFound")
            assert_problem(await d.post(f"/v1/windows/{name}/lease", {}), 404, "WindowNotFound")
            assert_problem(await d.request("DELETE", f"/v1/windows/{name}"), 404)
        for method, path, allow in (
            ("PUT", "/v1/vms", "GET, HEAD, OPTIONS, POST"),
            ("DELETE", "/v1/commits", "GET, HEAD, OPTIONS"),
            ("PATCH", "/healthz", "GET, HEAD, OPTIONS"),
            ("POST", "/v1/vms/web9", "DELETE, GET, HEAD, OPTIONS"),
            ("PUT", "/v1/windows/zz", "DELETE, GET, HEAD, OPTIONS"),
        ):  # fmt: skip
            answer = await d.request(method, path)
            assert_problem(answer, 405)
            assert answer.headers["allow"] == allow
        assert_problem(await d.request("DELETE", "/v1/commits/0123abcd"), 404)
        decision = await d.post("/v1/commits/0123abcd/decision", {"action": "pivot"})
        assert_problem(decision, 404, "CommitNotFound")
        assert_problem(await d.post("/v1/vms/web9/commits", PIVOT), 404, "VMNotFound")
        away = assert_problem(await d.post("/v1/vms/off/commits", PIVOT), 503, "ConnectError")
        assert away["error"]["vm"] == "off"
        assert_problem(await d.get("/v1/vms/off/disks"), 503, "ConnectError")
        assert_problem(await d.get("/v1/vms/off/jobs"), 503, "ConnectError")
        assert_problem(await d.post("/v1/vms/off/plans", PIVOT), 503, "ConnectError")


WRONG_COMMITS: dict[str, Any] = {
    "unknown member": {**PIVOT, "polcy": 1},
    "unknown member of a policy": {"disk": "a", "policy": {"kind": "pivot", "x": 1}},
    "no such policy": {"disk": "a", "policy": {"kind": "maybe"}},
    "a policy that is text": {"disk": "a", "policy": "pivot"},
    "no disk": {"policy": {"kind": "pivot"}},
    "an empty disk": {**PIVOT, "disk": ""},
    "a NUL in the disk": {**PIVOT, "disk": "a\0b"},
    "a NUL in the base": {**PIVOT, "base": "/x\0"},
    "a NUL in a command": {**PIVOT, "only_if": ["/bin/true", "\0"]},
    "half a character": {**PIVOT, "disk": "\ud800"},
    "a long disk": {**PIVOT, "disk": "x" * 5000},
    "a number for the disk": {**PIVOT, "disk": 7},
    "text for a flag": {**PIVOT, "delete": "perhaps"},
    "a negative base": {**PIVOT, "base": -1},
    "a fraction for the base": {**PIVOT, "base": 0.5},
    "a negative rate": {**PIVOT, "bandwidth": -5},
    "a rate beyond 63 bits": {**PIVOT, "bandwidth": 2**63},
    "a rate that is no rate": {**PIVOT, "bandwidth": "fast"},
    "a timeout that is none": {**PIVOT, "timeout": "soon"},
    "an infinite timeout": {**PIVOT, "timeout": float("inf")},
    "a priority too high": {**PIVOT, "priority": 1001},
    "both of delete and rename": {**PIVOT, "delete": True, "stale": "rename"},
    "both of shallow and base": {**PIVOT, "shallow": True, "base": "b"},
    "a bad job id": {**PIVOT, "job_id": "-;\n"},
    "commands, which are not allowed": {**PIVOT, "only_if": ["true"]},
    "a check, which is not allowed": {"disk": "a", "policy": {"kind": "check", "command": ["x"]}},
    "a hold that never ends wrongly": {"disk": "a", "policy": {"kind": "hold", "timeout": -1}},
    "a list": [PIVOT],
    "null": None,
    "text": "pivot",
}


async def test_commits_that_are_wrong(folder: Path) -> None:
    async with served(folder) as d:
        for what, body in WRONG_COMMITS.items():
            answer = await d.request("POST", "/v1/vms/off/commits", json.dumps(body).encode())
            found = assert_problem(answer, 422)
            assert found["type"] == "urn:qmpcommit:InvalidRequest", what
        missing = await d.post("/v1/vms/off/commits", {"disk": "a"})
        assert missing.status in (422, 503)  # a VM that is off can't tell that top is active
        for body in ({"action": "maybe"}, {}, {"action": "pivot", "x": 1}, [], 3):
            answer = await d.post("/v1/commits/0123abcd/decision", body)
            assert_problem(answer, 422, "InvalidRequest")
        for new in (
            {"name": "a/b", "qmp": "/q"}, {"name": "", "qmp": "/q"}, {"name": "a", "qmp": ""},
            {"name": "a", "qmp": "/q\0"}, {"name": "a", "qmp": "/" + "x" * 200},
            {"name": "a", "qmp": "tcp:x"}, {"name": "a"}, {"name": "a", "qmp": "/q", "pid": 1},
            {"name": "a", "qmp": "/q", "connect": "sometimes"}, {"name": ["a"], "qmp": "/q"},
        ):  # fmt: skip
            assert_problem(await d.post("/v1/vms", new), 422, "InvalidRequest")
        for query in ("state=odd", "limit=0", "limit=1001", "limit=x", f"vm={'x' * 65}"):
            assert_problem(await d.get(f"/v1/commits?{query}"), 422)
        for query in ("after=-1", "after=x", f"after={2**64}"):
            assert_problem(await d.get(f"/v1/events?{query}"), 422)
        assert_problem(await d.get("/v1/commits/0123abcd?wait=26"), 422)
        for key in ("", "x" * 256):
            headers = {"Idempotency-Key": key}
            answer = await d.request("POST", "/v1/vms/off/commits", PIVOT, headers)
            assert_problem(answer, 422)


async def test_what_is_no_json(folder: Path) -> None:
    bodies = {
        "nothing": b"", "half": b'{"disk": "a"', "text": b"disk=vda", "zero": b"\0",
        "not utf-8": b'{"disk": "\xff"}', "deep": b"[" * 60_000,
        "deep and closed": b'{"disk":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        "a long number": b'{"disk": "a", "priority": ' + b"9" * 50_000 + b"}",
        "many members": json.dumps({f"m{n}": 0 for n in range(5000)}).encode(),
    }  # fmt: skip
    async with served(folder) as d:
        for what, body in bodies.items():
            answer = await d.request("POST", "/v1/vms/off/commits", body)
            expected = [422 if what in ("nothing", "many members") else 400]
            if what == "deep and closed":
                expected.append(422)  # newer Pythons read so deep, and find no disk's name there
            assert answer.status in expected, answer.body
            assert_problem(answer, answer.status)
            assert len(answer.body) < 8192, what
        for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
            headers = {"Content-Type": kind}
            answer = await d.request("POST", "/v1/vms/off/commits", PIVOT, headers)
            told = assert_problem(answer, 422, "InvalidRequest")["detail"]
            assert told.startswith("send it with Content-Type: application/json"), told


async def test_a_body_that_is_too_large(folder: Path) -> None:
    """10 MB of JSON, announced and in chunks; the daemon does not read on."""
    async with served(folder) as d:
        megabyte = b'"' + b"x" * (1 << 20) + b'",'
        length = b"Content-Length: %d\r\n\r\n" % (10 * len(megabyte))
        assert_problem(await d.raw(POST + length, *[megabyte] * 10), 413)
        chunk = b"%x\r\n%s\r\n" % (len(megabyte), megabyte)
        chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
        assert_problem(await d.raw(chunked, *[chunk] * 10), 413)
        small = b"10\r\n" + b" " * 16 + b"\r\n"
        assert_problem(await d.raw(chunked, *[small * 100] * 100), 413)
        assert_problem(await d.raw(POST + b"X: ", *[b"x" * 50_000] * 10), 400)
        metrics = (await d.get("/metrics")).body.decode()
        assert 'qmpcommit_http_requests_total{method="POST",status="413"} 3.0' in metrics


async def test_what_is_no_http(folder: Path) -> None:
    requests = {
        "TLS": b"\x16\x03\x01 this is no HTTP\r\n\r\n",
        "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
        "a length that is none": POST + b"Content-Length: many\r\n\r\n",
        "a chunk that is none": POST + b"Transfer-Encoding: chunked\r\n\r\nmany\r\n",
    }
    async with served(folder) as d:
        for what, request in requests.items():
            found = assert_problem(await d.raw(request), 400, "http:400")
            assert found["title"] == "Malformed", what
        begun = await d.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"and no more\r\n\r\n")
        assert begun.status == 200
        assert b"urn:qmpcommit:http:400" in begun.body


async def test_slow_requests_are_ended_and_others_go_on(folder: Path) -> None:
    async with served(folder, '[limits]\nrequest_time = "500ms"\n') as d:
        body = POST + b"Content-Length: 50\r\n\r\n" + b'{"disk": '
        slow = [asyncio.create_task(d.raw(body)) for _ in range(20)]
        assert (await d.get("/healthz")).status == 200
        for each in slow:
            assert_problem(await each, 408)


async def test_too_many_requests_at_once(folder: Path) -> None:
    async with served(folder, "[limits]\nrequests = 4\nrequest_time = 5\n") as d:
        body = POST + b"Content-Length: 50\r\n\r\n" + b'{"disk": '
        slow = [asyncio.create_task(d.raw(body)) for _ in range(4)]
        async with asyncio.timeout(30):
            while (busy := await d.get("/healthz")).status == 200:
                await asyncio.sleep(0.01)
        assert "4 requests are being answered" in assert_problem(busy, 503)["detail"]
        for each in slow:
            assert_problem(await each, 408)
        assert (await d.get("/healthz")).status == 200


async def test_connections_that_say_nothing_do_no_harm(folder: Path) -> None:
    async with served(folder) as d:
        silent = [await asyncio.open_unix_connection(d.socket) for _ in range(200)]
        try:
            assert (await d.get("/healthz")).status == 200
        finally:
            for _, writer in silent:
                writer.close()
                await writer.wait_closed()


@asynccontextmanager
async def one_disk(folder: Path, more: str = "") -> AsyncIterator[tuple[Daemon, Machine]]:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'{more}\n[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        yield d, qemu
        assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])


async def test_disks_jobs_and_commits_are_listed(folder: Path) -> None:
    async with one_disk(folder) as (d, _):
        vm = (await d.get("/v1/vms/web1")).json
        assert (vm["state"], vm["error"]) == ("connected", None)
        assert vm["pid"] > 0
        disks = (await d.get("/v1/vms/web1/disks")).json
        assert disks[0]["chain"][0]["node_name"] == "top"
        assert (await d.get("/v1/vms/web1/jobs")).json == []
        first = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await d.until(first, "ready")
        job = (await d.get("/v1/vms/web1/jobs")).json[0]
        seen = (await d.get(f"/v1/commits/{first}")).json
        assert (job["commit"], job["device"]) == (first, seen["job_id"])
        assert (seen["state"], seen["phase"], seen["position"]) == ("running", "ready", None)
        assert seen["ready"] >= seen["created"]
        assert seen["progress"]["current"] == seen["progress"]["total"]
        assert_problem(await d.request("DELETE", "/v1/vms/web1"), 409, "JobConflict")
        again = await d.post("/v1/vms/web1/commits", PIVOT)
        assert_problem(again, 409, "JobConflict")
        assert (await d.get("/v1/commits?state=running&vm=web1")).json[0]["id"] == first
        assert (await d.get("/v1/commits?state=done")).json == []
        decided = await d.post(f"/v1/commits/{first}/decision", {"action": "pivot"})
        assert decided.status == 202
        ended = await d.end_of(first)
        assert (ended["outcome"]["action"], ended["decision"]) == ("pivot", "pivot")
        late = await d.post(f"/v1/commits/{first}/decision", {"action": "keep"})
        assert_problem(late, 409, "JobConflict")
        assert_problem(await d.request("DELETE", f"/v1/commits/{first}"), 409)
        assert (await d.get("/v1/commits?state=done")).json[0]["outcome"] == ended["outcome"]
        assert (await d.get("/v1/commits?vm=other")).json == []


async def test_a_decision_before_ready_is_refused_and_harms_nothing(folder: Path) -> None:
    async with one_disk(folder) as (d, _):
        commit = await d.commit(
            "web1", disk="top", policy={"kind": "pivot"}, bandwidth="64K", timeout="5min"
        )
        await d.until(commit, "copying")
        for action in ("pivot", "keep"):
            answer = await d.post(f"/v1/commits/{commit}/decision", {"action": action})
            assert_problem(answer, 409, "NotReady")
        assert (await d.get(f"/v1/commits/{commit}")).json["state"] == "running"
        assert (await d.request("DELETE", f"/v1/commits/{commit}")).status == 202
        ended = await d.end_of(commit)
        assert (ended["state"], ended["outcome"]["action"]) == ("done", "abort")
        done = await d.end_of(await d.commit("web1", **PIVOT))
        assert done["outcome"]["action"] == "pivot"


# -- the document ---------------------------------------------------------------------------------


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if "$ref" in value else set()
        return found.union(*map(_references, value.values()))
    if isinstance(value, list):
        return set().union(*map(_references, value))
    return set()


async def test_the_openapi_document_is_complete(folder: Path) -> None:
    async with served(folder) as d:
        document = (await d.get("/openapi.json")).json
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    for reference in _references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference
    assert "HTTPValidationError" not in schemas
    for name in ("NewVM", "VMView", "CommitRequest", "CommitView", "Decision", "JobView"):
        assert schemas[name]["examples"], name
    ids = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            ids.append(operation["operationId"])
            assert operation["summary"]
            assert operation["description"], path
            answers = operation["responses"]
            errors = {status for status in answers if int(status) >= 400}
            assert errors >= {"401", "403", "500", "503"}, path
            assert errors < set(answers), path
            if "{" in path:
                assert errors >= {"404", "422"}
            if method == "post":
                assert errors >= {"400", "408", "413", "422"}
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                assert schemas[body["$ref"].rpartition("/")[2]]["examples"]
            for status in errors:
                ((kind, content),) = answers[status]["content"].items()
                assert kind == "application/problem+json"
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
                assert content["example"]["status"] == int(status)
            for status in set(answers) - errors - {"204"}:
                assert answers[status]["content"], (path, status)
    assert len(set(ids)) == len(ids)
    assert {
        "/v1/vms", "/v1/vms/{vm}", "/v1/vms/{vm}/disks", "/v1/vms/{vm}/jobs",
        "/v1/vms/{vm}/commits", "/v1/vms/{vm}/plans", "/v1/commits", "/v1/commits/{commit_id}",
        "/v1/commits/{commit_id}/decision", "/v1/events", "/metrics", "/healthz", "/readyz",
    } <= set(document["paths"])  # fmt: skip


def test_the_examples_are_what_the_models_take() -> None:
    from qmpcommit.wire import commit as models

    for name in ("NewVM", "VMView", "CommitRequest", "CommitView", "Decision", "JobView"):
        model = getattr(models, name)
        for example in model.model_json_schema()["examples"]:
            assert model.model_validate(example)
