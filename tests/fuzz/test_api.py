"""The daemon's API, asked for whatever its own OpenAPI document allows and forbids.

Every operation of the document is taken up by itself. What is asked with is made by schemathesis
of the document; what is answered is compared with the document. `QMPCOMMIT_TEST_EXAMPLES` asks
for more requests an operation than continuous integration has time for, and for other ones.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode, openapi
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.daemon.daemons import Daemon, daemon
from tests.ground.images import make_chain
from tests.ground.machines import Machine, storage_daemon

EXAMPLES = int(os.environ.get("QMPCOMMIT_TEST_EXAMPLES", "0"))
IN_CI = 14
"""Requests an operation, kind of data and round."""

ROUNDS = 2
"""In the second, there is what the first has made."""

THERE = {"disk": "export0", "disks": "export0", "vm": "web1"}
"""What a body may name, by its member."""

ROOM = 64 << 20
"""Bytes by which the daemon may grow."""

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
NO_FAILURES = {502, 503, 504, 507}
"""The answers from 500 on that are none of the daemon's own: QEMU or the host is at fault."""


@dataclass
class Asker:
    """Asks a daemon over TCP; knows what there is to be asked for."""

    url: str
    token: str
    session: requests.Session = field(default_factory=requests.Session)
    known: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    promised: set[str] = field(default_factory=set)

    def document(self) -> Any:
        """The OpenAPI document."""
        return self.get("/openapi.json")

    def get(self, path: str) -> Any:
        """What is there now."""
        answer = self.session.get(self.url + path, headers=self.headers, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def headers(self) -> dict[str, str]:
        """Those of whoever may ask; a connection each, for some answers have no end."""
        return {"Authorization": f"Bearer {self.token}", "Connection": "close"}

    def ask(self, case: Case[Any], mode: GenerationMode) -> None:
        """One request; its answer is as documented."""
        target(case)
        given = case.as_transport_kwargs(self.url, headers=self.headers)
        with self.session.request(**given, stream=True, timeout=30, allow_redirects=False) as got:
            if got.headers.get("Content-Type", "").startswith("text/event-stream"):
                got._content = b""  # it has no end
            kind = got.json().get("type", "") if got.status_code >= 400 else ""
            self.answers[case.operation.label][f"{got.status_code} {kind}".strip()] += 1
            assert got.status_code < 500 or got.status_code in NO_FAILURES, got.text
            if case.method == "GET" and mode is GenerationMode.POSITIVE:
                unknown = "begin with the first page" in got.text  # a cursor of nothing
                assert unknown or got.status_code not in (400, 422), got.text
            # Too large is a refusal too, which schemathesis does not count as one.
            wrong = mode is GenerationMode.NEGATIVE and got.status_code != 413
            checks = CHECKS + [negative_data_rejection] * wrong
            case.validate_response(got, checks=checks)
            self.learn(case, got)

    def learn(self, case: Case[Any], answer: requests.Response) -> None:
        """What was made has a place, whose parts are asked for from then on."""
        where = answer.headers.get("Location")
        if where is None or "Idempotent-Replay" in answer.headers:
            return
        self.promised.add(where)
        for path in case.operation.schema.raw_schema["paths"]:
            if (found := parts(path, where)) is not None:
                self.known.setdefault(path, []).append(found)

    def hold(self, number: int) -> None:
        """Have a commit that waits for its decision."""
        body: dict[str, Any] = {"disk": "export0", "policy": {"kind": "hold"}}
        url = f"{self.url}/v1/vms/web{number + 2}/commits"
        made = self.session.post(url, json=body, headers=self.headers, timeout=30)
        assert made.status_code == 202, made.text
        where = made.headers["Location"]
        self.promised.add(where)
        self.known.setdefault("/v1/commits/{commit_id}", []).append(
            {"commit_id": made.json()["id"]}
        )

    def places(self, path: str) -> Iterator[dict[str, str]]:
        """What to put into a path: what is known of it, the newest first, or of its beginning."""
        mine = [one for prefix, found in self.known.items() if path.startswith(prefix)
                for one in found]  # fmt: skip
        yield from mine[-1:-4:-1]


def parts(path: str, place: str) -> dict[str, str] | None:
    """The parameters with which a path of the document is this place."""
    names, values = path.split("/"), place.split("/")
    if len(names) != len(values):
        return None
    pairs = list(zip(names, values, strict=True))
    if any(name != value and not name.startswith("{") for name, value in pairs):
        return None
    return {name.strip("{}"): value for name, value in pairs if name.startswith("{")}


def at_what_there_is(value: Any, member: str = "") -> Any:
    """A body about the disk and the VM that there are, where it names any; else as it was."""
    if isinstance(value, dict):
        return {name: at_what_there_is(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [at_what_there_is(inner, member) for inner in value]
    if isinstance(value, str) and 0 < len(value) <= 64 and "\0" not in value and member in THERE:
        return THERE[member]
    return value


def target(case: Case[Any]) -> None:
    """Let it be about what there is, and wait for no end; what is invalid stays so."""
    if isinstance(case.body, dict):
        case.body = at_what_there_is(case.body)
    with suppress(KeyError, TypeError, ValueError):
        if 0 <= float(case.query["wait"]) <= 25:
            case.query = {**case.query, "wait": 0.01}


def example(operation: Any) -> Any:
    """The document's own example of what an operation takes."""
    document = operation.schema.raw_schema
    with suppress(KeyError):
        given = document["paths"][operation.path][operation.method]["requestBody"]
        name = given["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        return document["components"]["schemas"][name]["examples"][0]
    return None


@st.composite
def cases(draw: st.DrawFn, operation: Any, mode: GenerationMode, place: Any) -> Case[Any]:
    """A request; what is allowed is often the example, with one member of what was made."""
    case: Case[Any] = draw(operation.as_strategy(mode, path_parameters=place))
    known = example(operation)
    if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and draw(st.booleans()):
        more = draw(st.sampled_from([{}, *({name: case.body[name]} for name in case.body)]))
        case.body = {**known, **more}
    return case


def order(operation: Any) -> tuple[bool, str]:
    """What makes something comes first."""
    return operation.method != "post", operation.label


def ask_all(asker: Asker, mode: GenerationMode) -> None:
    """Every operation of the document, with data of that kind."""
    schema = openapi.from_dict(asker.document())
    results = list(schema.get_all_operations())
    found = [each.ok() for each in results if isinstance(each, Ok)]
    assert len(found) == len(results)
    assert len(found) > 10
    for number in range(ROUNDS):
        if mode is GenerationMode.POSITIVE:
            asker.hold(number)
        for operation in sorted(found, key=order):
            places: list[dict[str, str] | None] = [None, *asker.places(operation.path)]
            for place in places:
                with suppress(Unsatisfiable):  # nothing of it can be wrong
                    ask_some(asker, operation, mode, place, (EXAMPLES or IN_CI) // len(places) + 1)


def ask_some(asker: Asker, operation: Any, mode: GenerationMode, place: Any, number: int) -> None:
    """Some requests of one operation, at a place or anywhere."""

    @settings(
        max_examples=number,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(operation, mode, place))
    def ask(case: Case[Any]) -> None:
        asker.ask(case, mode)

    ask()


@asynccontextmanager
async def served(folder: Path, port: int) -> AsyncIterator[tuple[list[Machine], Asker]]:
    """A daemon with a VM that is on and one that is off; well in the end, and not much larger."""
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    async with AsyncExitStack() as stack:
        vms, qemus = '[[vm]]\nname = "off"\nqmp = "/nowhere/qmp"\nconnect = "on-demand"\n', []
        for name in ("web1", "web2", "web3"):
            (folder / name).mkdir()
            chain = make_chain(folder / name, 3)
            qemus.append(await stack.enter_async_context(storage_daemon(folder / name, chain)))
            vms += f'[[vm]]\nname = "{name}"\nqmp = "{qemus[-1].qmp}"\n'
        listen = f'[listen]\ntcp = "127.0.0.1:{port}"\ntoken_file = "{token}"\n'
        async with daemon(folder, vms + listen) as d:
            for name in ("web1", "web2", "web3"):
                await d.connected(name)
            asker = Asker(f"http://127.0.0.1:{port}", token.read_text())
            asker.known["/v1/vms/{vm}"] = [{"vm": "off"}, {"vm": "web1"}]
            before = resident(d)
            with asker.session:
                yield qemus, asker
            assert (await d.get("/healthz")).status == 200
            assert resident(d) - before < ROOM
            assert '"bug"' not in d.log
            assert "never retrieved" not in d.log
            assert await d.stop() == 0


def resident(d: Daemon) -> int:
    """Bytes of memory that it has."""
    assert d.process is not None
    text = Path(f"/proc/{d.process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) << 10


def report(asker: Asker, mode: GenerationMode) -> str:
    """What was asked and answered."""
    lines = [f"\n{mode.value} data: {sum(map(Counter.total, asker.answers.values()))} requests"]
    for label, found in sorted(asker.answers.items()):
        lines.append(f"    {label}: " + ", ".join(f"{n} x {s}" for s, n in found.most_common()))
    return "\n".join(lines)


def assert_all_reached(asker: Asker, mode: GenerationMode) -> None:
    """No operation whose requests all ended before they came to it."""
    lost = {"404 urn:qmpcommit:http:404", "405 urn:qmpcommit:http:405"}
    wanted = {
        f"{method.upper()} {path}"
        for path, operations in asker.document()["paths"].items()
        for method, operation in operations.items()
        if mode is GenerationMode.POSITIVE or {"parameters", "requestBody"} & set(operation)
    }
    reached = {label for label, found in asker.answers.items() if set(found) - lost}
    assert wanted == reached


async def jobs(qemus: list[Machine]) -> list[dict[str, Any]]:
    """All that they list."""
    return [job for qemu in qemus for job in await qemu.execute("query-jobs")]


async def names_of_nodes(qemus: list[Machine]) -> list[set[str]]:
    """Their block nodes, each one's."""
    return [
        {node["node-name"] for node in await qemu.execute("query-named-block-nodes", flat=True)}
        for qemu in qemus
    ]


@pytest.mark.timeout(1200)
async def test_requests_that_the_document_allows(
    folder: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    mode = GenerationMode.POSITIVE
    async with served(folder, free_port) as (qemus, asker):
        await asyncio.to_thread(ask_all, asker, mode)
        with capsys.disabled():
            print(report(asker, mode))
        assert_all_reached(asker, mode)
        assert asker.promised, "nothing was ever promised"
        commits = asker.get("/v1/commits?limit=1000")
        begun = {f"/v1/commits/{each['id']}" for each in commits}
        alone = {place for place in asker.promised if place.startswith("/v1/commits/")}
        assert alone <= begun
        assert begun == alone or asker.promised != alone, "others are of promised windows or groups"
        ours = {each["job_id"] for each in commits if not each["ended"]}
        assert {job["id"] for job in await jobs(qemus)} <= ours


@pytest.mark.timeout(1200)
async def test_requests_that_the_document_forbids(
    folder: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of them begins anything."""
    mode = GenerationMode.NEGATIVE
    async with served(folder, free_port) as (qemus, asker):
        nodes = await names_of_nodes(qemus)
        await asyncio.to_thread(ask_all, asker, mode)
        with capsys.disabled():
            print(report(asker, mode))
        assert_all_reached(asker, mode)
        assert asker.promised == set()
        assert asker.get("/v1/commits") == []
        assert await jobs(qemus) == []
        assert await names_of_nodes(qemus) == nodes
