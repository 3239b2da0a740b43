"""For how long a group commit holds its disks' I/O, and what a writer feels of it.

    python -m tests.bench.group_hold [--rounds 100]

Group keeps of 2, 10 and 50 disks of one real storage daemon and of 50 disks of 50 daemons, each
round in turn (A B A B) by the library and by a bare ``qemu.qmp`` script. The hold is the longest
of the group's, on QEMU's own clock. Then writes of 4 KiB over NBD, one after the other from a
process of its own, without and during group keeps of two disks. Nothing here asserts.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import qmpcommit as qc
from tests.bench.contestants.bare_group import BareGroup
from tests.ground.daemons import many_disks
from tests.ground.images import MIB, Chain, Write, create, write
from tests.ground.machines import Machine
from tests.ground.nbd import Nbd


def chain_of(folder: Path, number: int) -> Chain:
    """2 MiB of which half is in the overlay."""
    folder.mkdir(exist_ok=True)
    base, top = folder / f"base{number}.qcow2", folder / f"top{number}.qcow2"
    create(base, 2 * MIB)
    create(top, 2 * MIB, backing=base)
    write(top, [Write(0, MIB, number + 1)])
    return Chain([base, top], [])


@asynccontextmanager
async def daemons(count: int, disks: int) -> AsyncIterator[list[tuple[Machine, list[str]]]]:
    """So many storage daemons with so many disks each."""
    async with AsyncExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="qc-"))
        made = []
        for number in range(count):
            folder = Path(name) / str(number)
            chains = [chain_of(folder, disk) for disk in range(disks)]
            qemu = await stack.enter_async_context(many_disks(folder, *chains))
            made.append((qemu, [chain.top.stem for chain in chains]))
        yield made


async def keep(named: list[tuple[qc.Session, str]]) -> float:
    """One group keep by the library: its longest hold, in seconds."""
    outcome = await qc.commit_group(named, policy=qc.Keep(), hold_limit=10)
    assert outcome.held is not None
    return outcome.held


async def compare(count: int, disks: int, rounds: int) -> None:
    """Take turns and print a line for each; each contestant has its own monitor."""
    ours: list[float] = []
    theirs: list[float] = []
    async with daemons(count, disks) as made, AsyncExitStack() as stack:
        named = []
        for qemu, nodes in made:
            vm = await stack.enter_async_context(qc.Session.connect(qemu.qmp))
            named += [(vm, node) for node in nodes]
        bare = BareGroup({qemu.qmp2: nodes for qemu, nodes in made})
        await bare.open()
        for _ in range(rounds):
            ours.append(await keep(named))
            theirs.append(await bare.keep())
        await bare.close()
    what = f"{disks} disks of one process" if count == 1 else f"{count} disks of {count} processes"
    line(f"{what}, qmpcommit", ours)
    line(f"{what}, bare qemu.qmp", theirs)
    print(f"{what}: {statistics.median(ours) / statistics.median(theirs):.2f} times as long")


def line(what: str, seconds: list[float]) -> None:
    """Median, 99th percentile and the longest, in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[math.ceil(len(ordered) * 0.99) - 1]
    figures = (ordered[len(ordered) // 2], p99, ordered[-1])
    print(f"{what:44}" + "".join(f"{figure * 1e3:10.2f}" for figure in figures), flush=True)


def write_on(path: str, export: str, stop: Event, tell: Callable[[list[float]], None]) -> None:
    """A process that writes until it is told to stop, and tells each write's latency."""

    async def work() -> list[float]:
        took: list[float] = []
        async with await Nbd.connect(path, export) as nbd:
            while not stop.is_set():
                begun = time.perf_counter()
                await nbd.write(len(took) % 256 * 4096, b"x" * 4096)
                took.append(time.perf_counter() - begun)
        return took

    tell(asyncio.run(work()))


async def latency(rounds: int) -> None:
    """What a writer feels: alone, and while groups of two are kept one after the other."""
    context = multiprocessing.get_context("spawn")
    async with daemons(1, 2) as ((qemu, nodes),), qc.Session.connect(qemu.qmp) as vm:
        for what in ("writes, no commit", "writes during group keeps"):
            stop, told = context.Event(), context.SimpleQueue()
            arguments = (qemu.nbd, nodes[0], stop, told.put)
            writer = context.Process(target=write_on, args=arguments)
            writer.start()
            await asyncio.sleep(1.0)
            for _ in range(rounds if "during" in what else 0):
                await keep([(vm, node) for node in nodes])
            await asyncio.sleep(0.5)
            stop.set()
            line(what, await asyncio.to_thread(told.get))
            writer.join()


async def measure(rounds: int) -> None:
    """All of it."""
    print(f"{'the longest hold of a group, ms':44}{'median':>10}{'p99':>10}{'max':>10}")
    for count, disks in ((1, 2), (1, 10), (1, 50), (50, 1)):
        await compare(count, disks, rounds)
    print(f"{'latency of a write, ms':44}{'median':>10}{'p99':>10}{'max':>10}")
    await latency(rounds)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
