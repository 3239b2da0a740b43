"""Monitors that lie, flood and never end: the daemon serves all others, and its log stays short."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemons import Daemon, daemon
from tests.ground.fake_monitor import GREETING, fake_monitor
from tests.ground.images import make_chain
from tests.ground.machines import storage_daemon

MB = 1 << 20
GREETS = json.dumps(GREETING).encode() + b"\n"
STAMP = '"timestamp": {"seconds": 1, "microseconds": 0}'
LONG = json.dumps({"QMP": {**GREETING["QMP"], "x": "A" * 70_000}}).encode() + b"\n"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def good(folder: Path, config: str = "") -> AsyncIterator[Daemon]:
    """A daemon that has a good VM, which is asked for beside what a test does."""
    (folder / "good").mkdir()
    async with storage_daemon(folder / "good", make_chain(folder / "good")) as qemu:
        text = f'{config}\n[[vm]]\nname = "good"\nqmp = "{qemu.qmp}"\n'
        async with daemon(folder, text) as d:
            await d.connected("good")
            yield d


@asynccontextmanager
async def listening(path: Path, serve: Serve) -> AsyncIterator[list[float]]:
    """Something that listens there; when it was connected to."""
    came: list[float] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(time.monotonic())
        with suppress(OSError, asyncio.CancelledError):
            await serve(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_unix_server(one, path)
    try:
        yield came
    finally:
        server.close()


def memory(d: Daemon) -> int:
    """The most that it ever had, in MB."""
    assert d.process is not None
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{d.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


async def put_off(d: Daemon, vm: str) -> str:
    """Wait until a VM is put off; why."""
    async with asyncio.timeout(30):
        while True:
            told = (await d.get(f"/v1/vms/{vm}")).json["error"] or ""
            if "is not asked for" in told:
                return str(told)
            await asyncio.sleep(0.02)


def replying(command: str, reply: bytes) -> Serve:
    """A monitor that answers that one with these bytes, and all else with nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETS)
        async for asked in messages_of(reader):
            head = json.dumps({"id": asked.get("id")}).encode()[:-1]
            if asked["execute"] == command:
                writer.write(head + b', "return": ' + reply + b"}\n")
            else:
                writer.write(head + b', "return": {}}\n')
            await writer.drain()

    return serve


async def messages_of(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    decoder, waiting = json.JSONDecoder(), ""
    while data := await reader.read(1 << 16):
        waiting += data.decode()
        while waiting.strip():
            try:
                message, end = decoder.raw_decode(waiting.strip())
            except ValueError:
                break
            waiting = waiting.strip()[end:]
            yield message


HOSTILE: dict[str, Serve] = {
    "a reply of 27 MB": replying("query-jobs", b"[" + b"1," * (13 * MB) + b"1]"),
    "a reply of 2 MB": replying("query-jobs", b'["' + b"x" * (2 * MB) + b'"]'),
    "a reply deep as a well": replying("query-jobs", b"[" * MB),
}


def saying(after: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETS)
        async for asked in messages_of(reader):
            head = json.dumps({"id": asked.get("id")}).encode()[:-1]
            empty = b"{}" if asked["execute"] == "qmp_capabilities" else b"[]"
            writer.write(head + b', "return": ' + empty + b"}\n" + after)

    return serve


HOSTILE["a long event"] = saying(b'{"event": "X", "data": "' + b"x" * 70_000 + b'"}\n')
HOSTILE["garbage"] = saying(b"\x00\xffSECRET" * 1000 + b"\n")


@pytest.mark.parametrize("what", HOSTILE)
async def test_one_that_breaks_the_bounds_is_put_off(folder: Path, what: str) -> None:
    async with good(folder) as d, listening(folder / "evil", HOSTILE[what]) as came:
        before = memory(d)
        await d.post("/v1/vms", {"name": "evil", "qmp": str(folder / "evil")})
        told = await put_off(d, "evil")
        assert "SECRET" not in told
        async with asyncio.timeout(30):
            while len(came) < 3:  # pauses grow, from half a second on
                assert (await d.get("/v1/vms/good/disks")).status == 200
                await asyncio.sleep(0.05)
        pauses = [after - then for then, after in itertools.pairwise(came)]
        assert pauses[-1] > 0.9, pauses
        assert memory(d) - before < 100
    lines = [json.loads(line) for line in d.log.splitlines()]
    assert [x["event"] for x in lines].count("monitor_put_off") == 1
    assert all(len(str(value)) < 600 for x in lines for value in x.values())
    assert "SECRET" not in d.log


@pytest.mark.parametrize(
    "greeting", [LONG, b"SECRET" * 100_000 + b"\n", b'{"SECRET": 1}\n'], ids=["long", "line", "no"]
)
async def test_what_another_service_says_is_not_told(folder: Path, greeting: bytes) -> None:
    async with good(folder) as d, fake_monitor(folder, greeting=greeting) as fake:
        await d.post("/v1/vms", {"name": "evil", "qmp": fake.path})
        async with asyncio.timeout(30):
            while not (seen := (await d.get("/v1/vms/evil")).json)["error"]:
                await asyncio.sleep(0.02)
        assert "not a QMP monitor" in seen["error"]
        assert "SECRET" not in seen["error"] + d.log
        assert "AAAA" not in seen["error"] + d.log


async def test_large_replies_within_the_bounds_are_read(folder: Path) -> None:
    """A QEMU with very many nodes is none that breaks the bounds."""
    node = {"node-name": "n" * 30, "drv": "qcow2", "file": "/" + "f" * 1000}
    nodes = json.dumps([{**node, "number": each} for each in range(8000)]).encode()
    assert 8 * MB < len(nodes) < 16 * MB
    serve = replying("query-named-block-nodes", nodes)
    async with good(folder) as d, listening(folder / "large", serve):
        await d.post("/v1/vms", {"name": "large", "qmp": str(folder / "large")})
        said = (await d.get("/v1/vms/large/disks")).json
        assert "is not asked" not in json.dumps(said)
