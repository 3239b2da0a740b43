"""A daemon's client whose daemon says anything: it ends, with an error of ours, and keeps little.

Answers are the examples of the daemon's own document with one member changed, or any JSON, or no
JSON at all, under any status; streams of events likewise. Bodies and lines without an end are left
at a limit.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qmpcommit as qc
from qmpcommit.client import events as streams
from qmpcommit.client.http import _LARGEST
from qmpcommit.wire.commit import COMMIT_VIEW_EXAMPLE
from qmpcommit.wire.cycle import CYCLE_EXAMPLE, ROUND_EXAMPLE
from qmpcommit.wire.group import GROUP_VIEW_EXAMPLE
from qmpcommit.wire.rules import RULE_EXAMPLE
from qmpcommit.wire.window import WINDOW_EXAMPLE
from tests.fuzz.test_lies import GONE, tell_otherwise
from tests.fuzz.test_reader import LIMIT, server, some, to_its_end
from tests.unit.test_hostile import anything

IMAGE = {"node_name": "n", "filename": "/d/a.qcow2", "driver": "qcow2"}
DISK = {"name": "vda", "chain": [IMAGE], "node_name": "n"}
PLAN = {"vm": "web1", "disk": DISK, "base": IMAGE, "top": IMAGE, "findings": [{}], "policy": {}}
PROBLEM = {
    "type": "urn:qmpcommit:CommitFailed",
    "title": "Failed",
    "detail": "it failed",
    "error": {"type": "CommitFailed", "message": "it failed", "vm": "web1"},
}
VM = {"name": "web1", "qmp": "/q", "state": "connected", "connect": "keep", "source": "api"}
KNOWN: list[Any] = [
    COMMIT_VIEW_EXAMPLE, [COMMIT_VIEW_EXAMPLE], GROUP_VIEW_EXAMPLE, [GROUP_VIEW_EXAMPLE],
    WINDOW_EXAMPLE, [CYCLE_EXAMPLE], ROUND_EXAMPLE, [RULE_EXAMPLE], VM, [VM], [DISK], PLAN, PROBLEM,
]  # fmt: skip


async def _begins(vm: qc.RemoteVM) -> None:
    job = await vm.commit("vda", policy=qc.Hold())
    with suppress(qc.QmpCommitError):
        await job.ready()
    with suppress(qc.QmpCommitError):
        async for _ in job.progress(every=0.01):
            break
    with suppress(qc.QmpCommitError):
        await job.keep()
    await job.wait()


async def _begins_a_group(vm: qc.RemoteVM) -> None:
    group = await vm.client.commit_group([("web1", "vda"), ("web2", "vda")], policy=qc.Keep())
    with suppress(qc.QmpCommitError):
        await group.keep()
    await group.wait()


async def _opens(vm: qc.RemoteVM) -> None:
    async with vm.snapshot(["vda"]) as window:
        assert list(window) is not None


async def _opens_two(vm: qc.RemoteVM) -> None:
    async with vm.client.snapshot([("web1", "vda"), ("web2", "vda")]):
        pass


async def _follows(vm: qc.RemoteVM) -> None:
    async with vm.client.events(after=0) as events:
        await anext(events)


DEEDS: list[Callable[[qc.RemoteVM], Awaitable[Any]]] = [
    lambda vm: vm.client.open(), lambda vm: vm.client.vms(), lambda vm: vm.client.commits(),
    lambda vm: vm.client.commit("0" * 32), lambda vm: vm.client.groups(),
    lambda vm: vm.client.group("0" * 32), lambda vm: vm.client.cycles(),
    lambda vm: vm.client.rules(), lambda vm: vm.client.add_vm("web1", "/q"),
    lambda vm: vm.client.remove_vm("web1"), lambda vm: vm.info(), lambda vm: vm.disks(),
    lambda vm: vm.disk("vda"), lambda vm: vm.jobs(), lambda vm: vm.job("j"),
    lambda vm: vm.job("0" * 32), lambda vm: vm.recycles(), lambda vm: vm.owners(),
    lambda vm: vm.plan("vda"),
    lambda vm: vm.cycle("vda"), _begins, _begins_a_group, _opens, _opens_two, _follows,
]  # fmt: skip


async def asked(reader: asyncio.StreamReader) -> bool:
    """Read one request; whether there was one."""
    with suppress(asyncio.IncompleteReadError):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        for line in head.split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line.split(b":")[1]))
        return True
    return False


def answers(folder: Path, replies: list[bytes], deed: Callable[[qc.RemoteVM], Any]) -> None:
    """Do it with a daemon that says this, one answer after the other, the last for ever."""
    left = list(replies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await asked(reader):
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()

    async def it() -> None:
        async with server(folder, serve) as path:
            host = qc.Client(path, timeout=0.3, patience=0)
            try:
                with suppress(qc.QmpCommitError, TimeoutError):
                    async with asyncio.timeout(1):  # what goes on for ever is no fault
                        await deed(host.vm("web1"))
            finally:
                await host.close()

    to_its_end(it())


def changed(value: Any, way: list[int], to: Any) -> Any:
    """With one member of another value, or gone."""
    holder = {"return": json.loads(json.dumps(value))}
    tell_otherwise(holder, way, to)
    return holder.get("return")


nearly = st.builds(
    changed, st.sampled_from(KNOWN), st.lists(st.integers(0, 99), max_size=6),
    st.just(GONE) | anything,
)  # fmt: skip
body = st.one_of(
    nearly.map(lambda value: json.dumps(value).encode()),
    anything.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=50),
    st.integers(1, 5000).map(lambda depth: b"[" * depth),
)
event = st.one_of(
    body.map(lambda data: b"id: 7\nevent: commit\ndata: " + data + b"\n\n"),
    st.builds(lambda number, data: b"id: " + b"9" * number + b"\ndata:" + data + b"\n\n",
              st.integers(0, 5000), body),
    st.binary(max_size=60),
)  # fmt: skip


def answer(status: int, kind: str, data: bytes, cut: int) -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n"
    whole = head.encode() + data
    return whole if cut > 50 else whole[: len(whole) * cut // 50]


reply = st.builds(
    answer,
    st.sampled_from([200, 200, 200, 201, 202, 204, 302, 400, 404, 409, 422, 500, 503, 507]),
    st.sampled_from(["application/json", "text/html", "text/event-stream"]),
    body | event,
    st.integers(0, 400),
) | st.binary(max_size=100)


@pytest.mark.timeout(600)
@some(150)
@given(replies=st.lists(reply, min_size=1, max_size=4), number=st.integers(0, len(DEEDS) - 1))
def test_a_client_whose_daemon_says_anything(
    folder: Path, replies: list[bytes], number: int
) -> None:
    answers(folder, replies, DEEDS[number])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(DEEDS)))
@pytest.mark.parametrize("said", [None, True, 7, "x", [], [None], {}, [{}], {"id": 1}, PROBLEM])
def test_an_answer_of_another_shape(folder: Path, number: int, said: Any) -> None:
    answers(folder, [answer(200, "application/json", json.dumps(said).encode(), 99)], DEEDS[number])


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("deed", [lambda vm: vm.client.vms(), _follows], ids=["list", "events"])
async def test_what_has_no_end_is_not_kept(deed: Any, status: int, folder: Path) -> None:
    """A body, a line of an event, or an event that goes on is left at a limit, not when memory is
    full."""
    sent: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        sent.append(0)
        head = f"HTTP/1.1 {status} X\r\ncontent-type: text/event-stream\r\n"
        writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        line = b"data: " + b"x" * (1 << 20) + (b"\n" if len(sent) % 2 else b"")
        while True:
            writer.write(b"%x\r\n%s\r\n" % (len(line), line))
            await writer.drain()
            sent[-1] += len(line)

    async with asyncio.timeout(LIMIT), server(folder, serve) as path:
        host = qc.Client(path, timeout=LIMIT, patience=0)
        for _ in range(2):
            with pytest.raises(qc.QmpCommitError):
                await deed(host.vm("web1"))
        await host.close()
    limit = streams.LONGEST if deed is _follows and status == 200 else _LARGEST
    assert len(sent) == 2
    assert max(sent) <= limit + (8 << 20)
