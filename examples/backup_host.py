"""Back disks of several VMs up as they were at one instant, through the daemon.

    python examples/backup_host.py SOCKET FOLDER VM:DISK [VM:DISK ...]

SOCKET is where qmpcommitd listens. All guests are paused for the instant in which fresh overlays
are laid under them; then each disk is converted into FOLDER while they go on, and the overlays are
merged back. If this program is killed, the daemon closes the window when its lease ends.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import qmpcommit as qc


async def main(socket: str, folder: str, *words: str) -> None:
    """Open the window, copy, and let it close."""
    disks = [(vm, disk) for vm, _, disk in (word.partition(":") for word in words)]
    async with qc.Client(socket) as host, host.snapshot(disks, freeze="pause") as window:
        for vm, one in window.of.items():
            print(f"{vm}: stood still for {(one.quiesced or 0) * 1000:.0f} ms")
        for (vm, disk), frozen in window.items():
            backup = Path(folder, f"{vm}-{disk}.qcow2")
            convert = ["qemu-img", "convert", "-U", "-O", "qcow2", frozen.filename, str(backup)]
            process = await asyncio.create_subprocess_exec(*convert)
            if await process.wait():
                sys.exit(f"{vm}: {disk} could not be converted")  # the window closes nevertheless
            print(f"{vm}: {backup} holds {frozen.filename} as it was")
    for vm, one in window.of.items():
        for outcome in one.outcomes:
            assert outcome.active is not None
            print(f"{vm}: {outcome.active.filename} takes the guest's writes again")


if __name__ == "__main__":
    if len(sys.argv) < 4 or not all(":" in word for word in sys.argv[3:]):
        sys.exit(__doc__)
    try:
        asyncio.run(main(*sys.argv[1:]))
    except qc.QmpCommitError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
