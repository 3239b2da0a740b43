"""A thousand VMs in one daemon: what they cost idle, and how fast each READY is answered.

    python -m tests.bench.daemon_scale [VMS]

Idle: memory for each VM, and CPU. Then as many commits as there are VMs become READY within one
second, and again all in one instant: from the event on the wire to the decision on the wire, its
record durable before it. The monitors are scripted (`tests.bench.fake_host`), with the replies
of a real storage daemon; what a bare `qemu.qmp` script does with the same monitors is measured
beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

import qmpcommit as qc
from tests.cli.command import ENVIRONMENT
from tests.daemon.daemons import Daemon
from tests.ground.images import make_chain
from tests.ground.machines import storage_daemon

HOSTS = 20
"""Processes that the scripted monitors are parted among."""

IDLE = 10.0
"""Seconds for which idle CPU is measured."""


class Recording(qc.Session):
    """A session that remembers what QEMU answered, before the pivot and after it."""

    replies: dict[str, dict[str, Any]] = {"before": {}, "after": {}}  # noqa: RUF012
    phase = "before"

    async def execute(self, command: str, *arguments: Any, **more: Any) -> Any:
        answer = await super().execute(command, *arguments, **more)
        if command == "job-complete":
            Recording.phase = "after"
        self.replies[self.phase].setdefault(command, answer)
        return answer


async def record(folder: Path) -> None:
    """A real commit's replies, for the scripted monitors."""
    place = folder / "real"
    place.mkdir()
    async with (
        storage_daemon(place, make_chain(place)) as qemu,
        Recording.connect(qemu.qmp) as vm,
    ):
        await (await vm.commit("top", policy=qc.Pivot())).wait()
    (folder / "replies.json").write_text(json.dumps(Recording.replies))


class Host:
    """The processes of the scripted monitors."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self.processes = processes

    async def say(self, line: str) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n".encode())
        for process in self.processes:
            assert process.stdin is not None
            await process.stdin.drain()

    async def report(self) -> Any:
        await self.say("report")
        reports = []
        for process in self.processes:
            assert process.stdout is not None
            reports.append(json.loads(await process.stdout.readline()))
        return {
            "copying": sum(report["copying"] for report in reports),
            "ended": sum(report["ended"] for report in reports),
            "reactions": [one for report in reports for one in report["reactions"]],
            "span": max(r["last"] for r in reports) - min(r["first"] for r in reports),
        }

    async def until(self, name: str, count: int) -> Any:
        async with asyncio.timeout(180):
            while True:
                figures = await self.report()
                if figures[name] >= count:
                    return figures
                await asyncio.sleep(0.2)


@asynccontextmanager
async def host(folder: Path, count: int, parts: int = HOSTS) -> AsyncIterator[Host]:
    """Monitors in so many processes, as QEMUs have few open files each."""
    processes = []
    for first in range(0, count, count // parts):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.fake_host", str(folder), str(first),
            str(min(count, first + count // parts)),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT,
            limit=1 << 24,
        )  # fmt: skip
        processes.append(process)
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"listening\n"
    try:
        yield Host(processes)
    finally:
        for process in processes:
            process.kill()
            await process.wait()


def memory(pid: int) -> int:
    """The private memory of a process, in KiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])  # type: ignore[index]


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def row(name: str, reactions: list[float], span: float) -> None:
    milliseconds = sorted(1000 * seconds for seconds in reactions)
    p99 = milliseconds[int(len(milliseconds) * 0.99) - 1]
    print(
        f"| {name} | {len(milliseconds)} | {statistics.median(milliseconds):.2f} | {p99:.1f} |"
        f" {milliseconds[-1]:.1f} | {1000 * span:.0f} |"
    )


def config(folder: Path, count: int) -> str:
    limits = f"[limits]\ncommits = {count}\nper_storage = {count}\n"
    return f'{limits}[[discover]]\nglob = "{folder}/*.sock"\n'


async def commits(d: Daemon, count: int) -> None:
    """One commit on each VM, a few asked for at once."""
    gate = asyncio.Semaphore(8)

    async def one(number: int) -> None:
        async with gate:
            await d.commit(str(number), disk="top", policy={"kind": "pivot"})

    await asyncio.gather(*(one(number) for number in range(count)))


async def all_connected(d: Daemon, count: int) -> None:
    async with asyncio.timeout(120):
        while True:
            vms = (await d.get("/v1/vms")).json
            if sum(vm["state"] == "connected" for vm in vms) == count:
                return
            await asyncio.sleep(0.2)


async def measure(count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="qc-", dir="/dev/shm") as name:
        folder = Path(name)
        vms = folder / "vms"
        vms.mkdir()
        await record(folder)
        (vms / "replies.json").write_text((folder / "replies.json").read_text())
        async with host(vms, count) as fake:
            await measure_daemon_on(folder, fake, count)
        async with host(vms, count) as fake:
            await measure_bare(vms, fake, count)


async def measure_daemon_on(folder: Path, fake: Host, count: int) -> None:
    state = Path(tempfile.mkdtemp(prefix="qc-daemon-"))
    d = Daemon(state, "", log_level="warning")
    try:
        await d.start()
        assert d.process is not None
        await d.get("/v1/vms")
        empty = memory(d.process.pid)
        await d.stop()
        d.config = config(folder / "vms", count)
        await d.start()
        await idle(d, count, empty)
        for what, spread in (("spread over 1 s", 1.0), ("all in one instant", 0.0)):
            await fake.say("reset")
            begun = time.monotonic()
            await commits(d, count)
            await fake.until("copying", count)
            asked = time.monotonic() - begun
            await asyncio.sleep(1)
            await fake.say(f"ready {spread}")
            figures = await fake.until("ended", count)
            ended = time.monotonic() - begun
            print(f"(asked for in {asked:.1f} s, ended after {ended:.1f} s)", file=sys.stderr)
            row(f"daemon, {what}", figures["reactions"], figures["span"])
            await asyncio.sleep(1)
        text = (await d.get("/metrics")).body.decode()
        total = re.search(r"journal_write_seconds_sum ([\d.e-]+)", text)
        number = re.search(r"journal_write_seconds_count ([\d.e-]+)", text)
        records = re.search(r"journal_records_total ([\d.e+]+)", text)
        assert total
        assert number
        assert records
        print(
            f"\njournal: {float(records[1]):.0f} records in {float(number[1]):.0f} transactions,"
            f" {1000 * float(total[1]) / float(number[1]):.1f} ms each from hand-over to durable;"
            f" {memory(d.process.pid) / 1024:.0f} MiB afterwards"
        )
    finally:
        if d.process is not None and d.process.returncode is None:
            await d.kill()


async def idle(d: Daemon, count: int, empty: int) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await all_connected(d, count)
    connected = loop.time() - begun
    assert d.process is not None
    pid = d.process.pid
    await asyncio.sleep(2)
    full = memory(pid)
    before, then = cpu(pid), loop.time()
    await asyncio.sleep(IDLE)
    busy = 100 * (cpu(pid) - before) / (loop.time() - then)
    print(
        f"{count} idle VMs: {full / 1024:.0f} MiB in all, {empty / 1024:.0f} MiB without VMs,"
        f" {(full - empty) / count:.1f} KiB a VM; {busy:.2f} % CPU; all connected"
        f" {connected:.1f} s after the daemon served"
    )
    print("\n| READY | commits | p50 ms | p99 ms | last ms | first READY to last decision, ms |")
    print("|---|---|---|---|---|---|")


async def measure_bare(vms: Path, fake: Host, count: int) -> None:
    """The same by a script with bare `qemu.qmp`, which writes nothing down."""

    async def one(number: int) -> None:
        client = QMPClient()
        with client.listener("BLOCK_JOB_READY") as ready:
            await client.connect(str(vms / f"{number}.sock"))
            await client.execute("block-commit", {"job-id": "j", "device": "top"})
            await ready.get()
            await client.execute("job-complete", {"id": "j"})
        await client.execute("job-dismiss", {"id": "j"})
        await client.disconnect()

    for what, spread in (("spread over 1 s", 1.0), ("all in one instant", 0.0)):
        await fake.say("reset")
        running = [asyncio.create_task(one(number)) for number in range(count)]
        await fake.until("copying", count)
        await asyncio.sleep(1)
        await fake.say(f"ready {spread}")
        figures = await fake.until("ended", count)
        row(f"bare qemu.qmp, {what}", figures["reactions"], figures["span"])
        await asyncio.gather(*running)


def main() -> None:
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))


if __name__ == "__main__":
    main()
