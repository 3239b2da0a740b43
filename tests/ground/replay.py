"""What a real monitor said in a commit, written down, and said again by a scripted one."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import qmpcommit as qc
from tests.ground.fake_monitor import FakeMonitor, Refusal, fake_monitor
from tests.ground.images import make_chain
from tests.ground.machines import storage_daemon
from tests.ground.proxy import proxy

JOB = "qmpcommit-replayed"


class Said(NamedTuple):
    """One message to the client: an event, or a reply to the `number`-th of its command."""

    command: str
    number: int
    message: dict[str, Any]


async def record(folder: Path) -> list[Said]:
    """All that a real QEMU says to a session that commits and pivots a disk."""
    said: list[Said] = []
    asked: dict[Any, str] = {}
    counts: dict[str, int] = defaultdict(int)

    def to_qemu(message: dict[str, Any]) -> str:
        asked[message.get("id")] = message["execute"]
        return "pass"

    def to_client(message: dict[str, Any]) -> str:
        if "event" in message:
            said.append(Said("", len(said), message))
        elif (command := asked.get(message.get("id"), "qmp_capabilities")) != "qmp_capabilities":
            said.append(Said(command, counts[command], message))
            counts[command] += 1
        return "pass"

    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        between.to_qemu, between.to_client = to_qemu, to_client
        async with qc.Session.connect(between.path) as vm:
            await commit(vm)
    return said


async def commit(vm: qc.Session, **options: Any) -> qc.CommitOutcome:
    """The commit that is recorded, and replayed."""
    await vm.disks()
    await vm.query_named_block_nodes()
    job = await vm.commit("top", policy=qc.Pivot(), job_id=JOB, **options)
    return await job.wait()


@asynccontextmanager
async def replay(folder: Path, said: list[Said]) -> AsyncIterator[FakeMonitor]:
    """A monitor that says it again, whatever it is asked with."""
    replies = {(each.command, each.number): place for place, each in enumerate(said)}
    counts: dict[str, int] = defaultdict(int)

    async def answer(command: str, arguments: dict[str, Any]) -> Any:
        number, counts[command] = counts[command], counts[command] + 1
        while number >= 0 and (command, number) not in replies:
            number -= 1
        if number < 0:
            raise Refusal(f"nobody asked for {command} before")
        place = replies[command, number]
        asyncio.get_running_loop().call_soon(tell, place + 1)
        reply = said[place].message
        if isinstance(error := reply.get("error"), dict):
            raise Refusal(error.get("desc", ""), error.get("class", ""))
        return reply.get("return")

    def tell(place: int) -> None:
        while place < len(said) and not said[place].command:
            fake.send(json.dumps(said[place].message).encode() + b"\r\n")
            place += 1

    async with fake_monitor(folder, answer) as fake:
        yield fake
