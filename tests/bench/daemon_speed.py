"""What asking the daemon costs: one small commit over HTTP, and fifty real ones at once.

    python -m tests.bench.daemon_speed [RUNS]

One: from the request on the wire to the outcome in the client's hands, less QEMU's own job time
(started to ended, by its event clock). Fifty: from the first request to the last outcome, beside
a bare `qemu.qmp` script that does the same to the same number of storage daemons and writes
nothing down. The contestants take turns.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

from tests.daemon.daemons import Daemon
from tests.ground.images import MIB, Chain, Picture, Write, create, write
from tests.ground.machines import Machine, storage_daemon

COUNT = 50


def small_chain(folder: Path, megabytes: int = 1) -> Chain:
    """An overlay with so much data over an empty base."""
    base = create(folder / "base.qcow2", 64 * MIB)
    top = create(folder / "top.qcow2", None, backing=base)
    write(top, [Write(0, megabytes * MIB, 0x55)])
    return Chain([base, top], [Picture(64 * MIB)] * 2)


def job_time(outcome: Any) -> float:
    """Seconds between QEMU's own events."""
    times = outcome["timings"]
    begun, ended = (datetime.fromisoformat(times[name]) for name in ("started", "ended"))
    return (ended - begun).total_seconds()


async def over_http(d: Daemon, folder: Path, runs: int) -> None:
    loop = asyncio.get_running_loop()
    over, jobs = [], []
    for number in range(runs):
        place = folder / f"one{number}"
        place.mkdir()
        async with storage_daemon(place, small_chain(place)) as vm:
            name = f"one{number}"
            await d.post("/v1/vms", {"name": name, "qmp": vm.qmp})
            await d.connected(name)
            begun = loop.time()
            commit = await d.commit(name, disk="top", policy={"kind": "pivot"})
            end = (await d.get(f"/v1/commits/{commit}?wait=10")).json
            took = loop.time() - begun
            jobs.append(1000 * job_time(end["outcome"]))
            over.append(1000 * took - jobs[-1])
            await d.request("DELETE", f"/v1/vms/{name}")
    print(
        f"one commit of 1 MiB over HTTP, {runs} runs: QEMU's job {statistics.median(jobs):.1f} ms,"
        f" everything else {statistics.median(over):.1f} ms (least {min(over):.1f},"
        f" most {max(over):.1f})"
    )


async def by_daemon(d: Daemon, vms: list[Machine], turn: int) -> float:
    names = [f"t{turn}n{number}" for number in range(len(vms))]
    for name, vm in zip(names, vms, strict=True):
        await d.post("/v1/vms", {"name": name, "qmp": vm.qmp})
        await d.connected(name)
    loop = asyncio.get_running_loop()
    begun = loop.time()

    async def one(name: str) -> None:
        commit = await d.commit(name, disk="top", policy={"kind": "pivot"})
        end = (await d.get(f"/v1/commits/{commit}?wait=20")).json
        assert end["outcome"]["action"] == "pivot"

    await asyncio.gather(*(one(name) for name in names))
    took = loop.time() - begun
    for name in names:
        await d.request("DELETE", f"/v1/vms/{name}")
    return took


async def by_script(vms: list[Machine]) -> float:
    loop = asyncio.get_running_loop()
    clients = [QMPClient() for _ in vms]
    for client, vm in zip(clients, vms, strict=True):
        await client.connect(vm.qmp)
    begun = loop.time()

    async def one(client: QMPClient) -> None:
        with client.listener(("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED")) as heard:
            await client.execute(
                "block-commit", {"job-id": "j", "device": "top", "auto-dismiss": False}
            )
            while (await heard.get())["event"] != "BLOCK_JOB_READY":
                pass
            await client.execute("job-complete", {"id": "j"})
            while (await heard.get())["event"] != "BLOCK_JOB_COMPLETED":
                pass
        await client.execute("job-dismiss", {"id": "j"})

    await asyncio.gather(*map(one, clients))
    took = loop.time() - begun
    for client in clients:
        await client.disconnect()
    return took


async def fifty(d: Daemon, folder: Path, turns: int) -> None:
    took: dict[str, list[float]] = {"daemon": [], "bare qemu.qmp": []}
    for turn in range(turns):
        for who, figures in took.items():
            async with AsyncExitStack() as stack:
                vms = []
                for number in range(COUNT):
                    place = folder / f"{turn}{who[0]}{number}"
                    place.mkdir()
                    made = storage_daemon(place, small_chain(place, 8))
                    vms.append(await stack.enter_async_context(made))
                done = by_daemon(d, vms, turn) if who == "daemon" else by_script(vms)
                figures.append(1000 * await done)
    for who, figures in took.items():
        print(
            f"{COUNT} commits of 8 MiB at once, {who}: {statistics.median(figures):.0f} ms"
            f" (of {turns}: {', '.join(f'{one:.0f}' for one in figures)})"
        )


async def measure(runs: int) -> None:
    with tempfile.TemporaryDirectory(prefix="qc-", dir="/dev/shm") as name:
        folder = Path(name)
        state = Path(tempfile.mkdtemp(prefix="qc-daemon-"))
        limits = "[limits]\ncommits = 100\nper_storage = 100\n"
        d = Daemon(state, limits, log_level="warning")
        await d.start()
        try:
            await over_http(d, folder, runs)
            await fifty(d, folder, 3)
        finally:
            await d.kill()


def main() -> None:
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 20))


if __name__ == "__main__":
    main()
