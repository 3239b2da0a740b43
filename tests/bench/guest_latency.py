"""What a real guest sees of a commit: how long its synced writes wait.

    python -m tests.bench.guest_latency [--rounds 10]

A guest (Debian's kernel; see tests/guest) writes one file after the other and syncs each. The
time between two acknowledgements, which holds the writing program's own work too, is taken while
nothing is committed and while a keep, a recycle and a pivot run, in turn. Nothing here asserts.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

import qmpcommit as qc
from tests.ground.images import create
from tests.guest.guest import MISSING, Guest, file_system, guest


def gaps(made: Guest, since: float, until: float) -> list[float]:
    """Milliseconds between acknowledgements, of all gaps that touch that time."""
    pairs = zip(made.times, made.times[1:], strict=False)
    return [(later - one) * 1e3 for one, later in pairs if later > since and one < until]


async def overlay(vm: qc.Session, path: Path) -> None:
    """A fresh overlay over the running disk."""
    active = (await vm.disk("vda")).chain[0]
    create(path, None, backing=active.filename)
    file = {"driver": "file", "filename": str(path)}
    await vm.execute("blockdev-add", driver="qcow2", node_name=path.stem, backing=None, file=file)
    await vm.execute("blockdev-snapshot", node=active.node_name, overlay=path.stem)


async def measure(rounds: int) -> None:
    """One guest, so many rounds; print medians and the worst."""
    loop = asyncio.get_running_loop()
    seen: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="qc-") as name:
        folder = Path(name)
        async with (
            guest(folder, file_system(folder)) as made,
            qc.Session.connect(made.qemu.qmp) as vm,
        ):
            for number in range(rounds):
                if number:
                    await overlay(vm, folder / f"over{number}.qcow2")
                fresh = str(folder / f"new{number}.qcow2")
                policies = (None, qc.Keep(), qc.Recycle(overlay=fresh), qc.Pivot())
                for policy in policies:
                    await made.more()
                    begun = loop.time()
                    if policy is None:
                        await made.more(20)
                    else:
                        await (await vm.commit("vda", policy=policy)).wait()
                    ended = loop.time()
                    await made.more(2)
                    kind: str = policy.kind if policy else "none"
                    seen.setdefault(kind, []).append(gaps(made, begun, ended))
            await made.power_off()
    print("ms between two synced writes   median   median of the worst   worst")
    for kind, runs in seen.items():
        every = [gap for run in runs for gap in run]
        worst = [max(run) for run in runs]
        middle, most = statistics.median(every), statistics.median(worst)
        print(f"commit: {kind:22}{middle:8.1f}{most:22.1f}{max(worst):8.1f}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    if MISSING:
        sys.exit(MISSING)
    asyncio.run(measure(rounds))


if __name__ == "__main__":
    main()
