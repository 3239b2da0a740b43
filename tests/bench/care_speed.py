"""What the care around a commit costs: a recycle's pause, and carrying bitmaps.

    python -m tests.bench.care_speed [--runs 20]

On a real QEMU with a running (idle) guest, in turn (A B A B): recycles, whose pause of the guest
is measured by us and on QEMU's own clock (STOP to RESUME); and pivots without and with eight
dirty bitmaps, on QEMU's own clock from the decision to the end, in which PENDING holds the
disk's I/O. Nothing here asserts.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path

import qmpcommit as qc
from tests.ground.images import make_chain
from tests.ground.machines import machine


async def recycle(folder: Path) -> tuple[float, float]:
    """One recycle of a running guest: milliseconds of its pause, ours and QEMU's."""
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await vm.execute("cont")
        with vm.events("STOP", "RESUME") as stops:
            job = await vm.commit("vda", policy=qc.Recycle(str(folder / "fresh.qcow2")))
            outcome = await job.wait()
        stopped, resumed = [event.timestamp async for event in stops]
        assert outcome.guest_paused is not None
        assert stopped is not None
        assert resumed is not None
        return outcome.guest_paused * 1e3, (resumed - stopped).total_seconds() * 1e3


async def pivot(folder: Path, bitmaps: int) -> float:
    """One pivot: milliseconds from the decision to the end."""
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        for number in range(bitmaps):
            arguments = {"node": "top", "name": f"b{number}", "persistent": True}
            await vm.execute("block-dirty-bitmap-add", arguments)
        times = (await (await vm.commit("vda", policy=qc.Pivot())).wait()).timings
        assert times.ended is not None
        assert times.decided is not None
        return (times.ended - times.decided).total_seconds() * 1e3


async def measure(runs: int) -> None:
    """Take turns, print medians."""
    ours: list[float] = []
    theirs: list[float] = []
    without: list[float] = []
    having: list[float] = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="qc-") as name:
            one, other = await recycle(Path(name))
            ours.append(one)
            theirs.append(other)
        for bitmaps, into in ((0, without), (8, having)):
            with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="qc-") as name:
                into.append(await pivot(Path(name), bitmaps))
    print(f"medians of {runs} runs, ms")
    for what, figures in (
        ("recycle: guest paused, our clock", ours),
        ("recycle: guest paused, QEMU's clock", theirs),
        ("pivot, decision to end, no bitmaps", without),
        ("pivot, decision to end, 8 bitmaps", having),
    ):
        print(f"{what:38}{statistics.median(figures):8.2f}  (max {max(figures):.2f})")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    asyncio.run(measure(parser.parse_args().runs))


if __name__ == "__main__":
    main()
