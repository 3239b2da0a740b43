"""Idempotency keys and the stream of events, across restarts of the daemon."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qmpcommit.daemon.journal import Journal, Statement
from tests.daemon.daemons import Daemon, daemon
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import storage_daemon
from tests.ground.proxy import Strike, let_pass, proxy

HOLD = {"disk": "top", "policy": {"kind": "hold"}}


@asynccontextmanager
async def one_disk(folder: Path) -> AsyncIterator[tuple[Daemon, Chain]]:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        yield d, chain


async def test_a_decision_is_taken_again_while_the_vm_is_away(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        between.to_qemu = Strike("job-complete", "hold")
        async with daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{between.path}"\n') as d:
            await d.connected("web1")
            commit = await d.commit("web1", **HOLD)
            await d.until(commit, "ready")

            async def decide(action: str) -> Any:
                return await d.post(f"/v1/commits/{commit}/decision", {"action": action})

            assert (await decide("pivot")).status == 202
            async with asyncio.timeout(30):
                await between.held.wait()
            await between.refuse()
            await d.kill()
            await d.start()
            again = await decide("pivot")
            assert (again.status, again.json.get("decision")) == (202, "pivot")
            between.to_qemu = let_pass
            await between.open()
            ended = await d.end_of(commit)
            assert (ended["outcome"]["action"], ended["decision"]) == ("pivot", "pivot")
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_key_makes_one_commit_whatever_happens(folder: Path) -> None:
    async with one_disk(folder) as (d, chain):
        first = await d.post("/v1/vms/web1/commits", HOLD, Idempotency_Key="k1")
        assert first.status == 202
        commit = first.json["id"]
        assert first.headers["location"] == f"/v1/commits/{commit}"
        assert "idempotent-replay" not in first.headers

        async def again(body: Any, key: str = "k1") -> Any:
            return await d.post("/v1/vms/web1/commits", body, Idempotency_Key=key)

        for restart in (False, True, False):
            if restart:
                await d.kill()
                await d.start()
                await d.connected("web1")
            same = await again(HOLD)
            assert (same.status, same.json["id"]) == (202, commit)
            assert same.headers["idempotent-replay"] == "true"
            reordered = {"policy": {"kind": "hold", "timeout": None}, "disk": "top"}
            assert (await again(reordered)).json["id"] == commit, "the same, written otherwise"
            other = await again({**HOLD, "priority": 3})
            assert other.status == 422
            assert other.json["type"] == "urn:qmpcommit:KeyReused"
            elsewhere = await d.post("/v1/vms/none/commits", HOLD, Idempotency_Key="k1")
            assert elsewhere.status == 422
        await d.until(commit, "ready")
        await d.post(f"/v1/commits/{commit}/decision", {"action": "pivot"})
        await d.end_of(commit)
        late = await again(HOLD)
        assert (late.status, late.json["id"], late.json["state"]) == (202, commit, "done")
        refused = await again(HOLD, "k2")  # the disk has no backing file any more
        assert refused.status in (404, 409)
        assert len((await d.get("/v1/commits")).json) == 1
        assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])


async def test_one_key_at_once_is_one_commit(folder: Path) -> None:
    async with one_disk(folder) as (d, chain):
        asked = {"disk": "top", "policy": {"kind": "pivot"}, "job_id": "qmpcommit-mine"}
        answers = await asyncio.gather(
            *(d.post("/v1/vms/web1/commits", asked, Idempotency_Key="k") for _ in range(20))
        )
        assert {answer.status for answer in answers} == {202}
        (commit,) = {answer.json["id"] for answer in answers}
        assert sum("idempotent-replay" not in answer.headers for answer in answers) == 1
        assert (await d.end_of(commit))["outcome"]["action"] == "pivot"
        assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_key_of_what_was_refused_is_not_used_up(folder: Path) -> None:
    async with one_disk(folder) as (d, _):
        wrong = {**HOLD, "disk": "absent"}
        for _ in range(2):
            answer = await d.post("/v1/vms/web1/commits", wrong, Idempotency_Key="k")
            assert answer.status == 404
        right = await d.post("/v1/vms/web1/commits", HOLD, Idempotency_Key="k")
        assert right.status == 202
        await d.request("DELETE", f"/v1/commits/{right.json['id']}")
        await d.end_of(right.json["id"])


async def test_a_damaged_journal_is_told_of_and_its_jobs_are_not_hidden(folder: Path) -> None:
    async with one_disk(folder) as (d, chain):
        lost = await d.commit("web1", **HOLD)
        await d.until(lost, "ready")
        job = (await d.get(f"/v1/commits/{lost}")).json["job_id"]
        assert await d.stop() == 0
        journal = folder / "state" / "journal.db"
        damaged = b"\0" * 100 + journal.read_bytes()[100:]
        journal.write_bytes(damaged)
        await d.start()
        (warning,) = (await d.get("/readyz")).json["warnings"]
        assert "journal was set aside" in warning
        aside = journal.parent.glob("*.corrupt-*")
        (kept,) = (path for path in aside if not path.name.endswith(("-wal", "-shm")))
        assert str(kept) in warning
        assert kept.read_bytes() == damaged
        assert '"journal_corrupt"' in d.log
        await d.connected("web1")
        await d.until(lost, "ready")  # the roll names it, and QEMU has its job
        (found,) = (await d.get("/v1/vms/web1/jobs")).json
        assert (found["device"], found["commit"]) == (job, lost)
        assert '"orphan_job"' not in d.log
        (loss,) = (await d.get("/v1/losses")).json
        (named,) = loss["promises"]
        assert (named["id"], named["job_id"], named["how"]) == (lost, job, "gone")
        assert (loss["kept"], loss["all_named"]) == (str(kept), True)
        decided = await d.post(f"/v1/commits/{lost}/decision", {"action": "pivot"})
        assert decided.status == 202
        assert (await d.end_of(lost))["outcome"]["action"] == "pivot"
        assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])


# -- events ---------------------------------------------------------------------------------------


async def read_events(d: Daemon, query: str, last: int | None, count: int) -> list[dict[str, Any]]:
    """So many events, or those until a commit is done or the daemon hangs up."""
    found: list[dict[str, Any]] = []
    reader, writer = await asyncio.open_unix_connection(d.socket)
    try:
        resume = f"Last-Event-ID: {last}\r\n" if last is not None else ""
        writer.write(f"GET /v1/events{query} HTTP/1.1\r\nHost: x\r\n{resume}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head, head
        assert b"text/event-stream" in head
        event: dict[str, Any] = {}
        while len(found) < count:
            line = (await reader.readline()).decode().rstrip("\r\n")
            if reader.at_eof():
                break
            name, _, value = line.partition(": ")
            if name in ("id", "event"):
                event["number" if name == "id" else name] = value
            elif name == "data" and event["event"] != "following":
                found.append({**event, **json.loads(value)})
                if found[-1].get("state") == "done":
                    break
        return found
    finally:
        writer.close()
        await writer.wait_closed()


async def test_no_event_is_lost_or_doubled_over_restarts(folder: Path) -> None:
    async with one_disk(folder) as (d, chain):
        everything: list[int] = []

        async def follow() -> None:
            """A reader that is cut off now and then, as the daemon is."""
            chance, last, done = random.Random(3), 0, False
            while not done:
                try:
                    news = await read_events(d, "", last, chance.randrange(1, 5))
                except (OSError, asyncio.IncompleteReadError):
                    await asyncio.sleep(0.01)
                    continue
                for event in news:
                    everything.append(int(event["number"]))
                    last = everything[-1]
                    done = event.get("state") == "done"  # which is read last

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            tasks.create_task(follow())
            commit = await d.commit("web1", **HOLD)
            for _ in range(2):
                await d.until(commit, "ready")
                await d.kill()
                await d.start()
                await d.connected("web1")
            await d.until(commit, "ready")
            assert await d.stop() == 0
            await d.start()
            await d.until(commit, "ready")
            await d.post(f"/v1/commits/{commit}/decision", {"action": "keep"})
            await d.end_of(commit)
        told = await read_events(d, "?after=0", None, len(everything))
        assert len(told) == len(everything)
        assert everything == [int(event["number"]) for event in told], "as if read in one go"
        assert everything == sorted(set(everything))
        of_commit = [event for event in told if event["event"] == "commit"]
        states = [(event["state"], event["phase"]) for event in of_commit]
        assert states[0] == ("queued", "")
        assert states[-1] == ("done", "finished")
        assert ("running", "ready") in states
        assert of_commit[-1]["outcome"]["action"] == "keep"
        mine = await read_events(d, f"?after=0&commit={commit}", None, len(of_commit))
        assert [event["number"] for event in mine] == [event["number"] for event in of_commit]
        assert await d.stop() == 0
    assert_disk(chain.top, chain.pictures[-1])


async def test_whoever_was_told_more_than_there_is_begins_anew(folder: Path) -> None:
    """The journal was damaged and set aside: numbers begin again."""
    async with daemon(folder) as d:
        vm = {"name": "web1", "qmp": "/nowhere", "connect": "on-demand"}
        await d.post("/v1/vms", vm)
        events = await read_events(d, "", 10_000, 1)
        assert events[0]["vm"] == "web1"


async def test_followers_are_bounded_and_their_places_given_back(folder: Path) -> None:
    async with daemon(folder, "[limits]\nfollowers = 2\n") as d:
        async with asyncio.timeout(30):
            streams = []
            for _ in range(2):
                reader, writer = await asyncio.open_unix_connection(d.socket)
                writer.write(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
                await reader.readuntil(b"event: following\n")
                streams.append(writer)
            answer = await d.get("/v1/events")
            assert (answer.status, answer.json["type"]) == (503, "urn:qmpcommit:QueueFull")
            for writer in streams:
                writer.close()
                await writer.wait_closed()
            while True:  # the daemon hears of it in its own time
                reader, writer = await asyncio.open_unix_connection(d.socket)
                writer.write(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
                head = await reader.readline()
                writer.close()
                await writer.wait_closed()
                if b" 200 " in head:
                    return


async def test_what_another_version_has_written_hides_nothing_else(folder: Path) -> None:
    chain = make_chain(folder)
    cycle = '[[cycle]]\nvm = "web1"\ndisk = "top"\nevery = "1h"\nkeep_if = ["true"]\nguest = "stop"'
    asked = {"members": [{"vm": "web1", "disk": "top"}], "policy": {"kind": "abort"}}
    keep = {"disk": "top", "policy": {"kind": "keep"}}
    async with (
        storage_daemon(folder, chain) as vm,
        daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n{cycle}\n') as d,
    ):
        await d.connected("web1")

        async def ended(path: str, body: Any) -> str:
            made = (await d.post(path, body)).headers["location"]
            if path.endswith("windows"):
                await d.request("DELETE", made)
            async with asyncio.timeout(30):
                while (await d.get(f"{made}?wait=5")).json["ended"] is None:
                    pass
            return str(made)

        made = [
            await ended("/v1/vms/web1/commits", keep),
            await ended("/v1/groups", asked),
            await ended("/v1/vms/web1/windows", {"disks": ["top"], "lease": 600}),
            await ended("/v1/vms/web1/cycles", {"disk": "top"}),
        ]
        assert await d.stop() == 0
        journal = await Journal(d.folder / "state" / "journal.db").open()
        for table in ("commits", "undertakings"):
            sql = f"UPDATE {table} SET request = json_set(request, '$.newer', 1)"
            await journal.write(Statement(sql))
        await journal.close()
        await d.start()
        await d.connected("web1")
        for kind in ("commits", "groups", "windows"):
            assert (await d.get(f"/v1/{kind}")).json == []
        assert (await d.get("/v1/cycles")).json[0]["last"] is None
        for each in made:
            missing = await d.get(each)
            assert (missing.status, "another version" in missing.json["detail"]) == (404, True), (
                each
            )
        again = await ended("/v1/vms/web1/commits", keep)
        (seen,) = (await d.get("/v1/commits")).json
        assert again == f"/v1/commits/{seen['id']}"
        assert await d.stop() == 0
        assert '"bug"' not in d.log
    assert_disk(chain.base, chain.pictures[-1])
