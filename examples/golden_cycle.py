"""Keep a golden base: each day's changes go into it if a test passes, and are thrown away if not.

    python examples/golden_cycle.py QMP DISK SECONDS ROUNDS TEST [ARGUMENT ...]

TEST is run for each round, and learns the VM and its images from QMPCOMMIT_* variables; its exit
status 0 says that the overlay's changes are good. Either way DISK goes on with an empty overlay.
"""

from __future__ import annotations

import asyncio
import sys

import qmpcommit as qc


async def main(qmp: str, disk: str, seconds: str, rounds: str, *test: str) -> None:
    """So many rounds, one every so many seconds."""
    left = int(rounds)
    async with qc.Session.connect(qmp) as vm:
        async for done in vm.cycles(
            disk, every=float(seconds), keep_if=test, guest="reset", delete=True
        ):
            if done.kept is not None:
                print(f"kept: {done.kept.base.filename} has {done.kept.bytes_committed} bytes more")
            elif done.discarded is not None:
                print(f"discarded: {done.discarded.former}; the guest was reset")
            left -= 1
            if not left:
                print(f"{disk} goes on with {done.overlay}")
                return


if __name__ == "__main__":
    if len(sys.argv) < 6:
        sys.exit(__doc__)
    try:
        asyncio.run(main(*sys.argv[1:]))
    except qc.QmpCommitError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
