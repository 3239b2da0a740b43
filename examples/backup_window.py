"""Back several disks of a running VM up as they were at one instant.

    python examples/backup_window.py QMP FOLDER DISK [DISK ...]

Fresh overlays take the guest's writes while each disk is converted into FOLDER; then they are
merged back and deleted. What a crash leaves open, 'qmpcommit window --close QMP' closes.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import qmpcommit as qc


async def main(qmp: str, folder: str, *disks: str) -> None:
    """Open the window, copy, and let it close."""
    async with qc.Session.connect(qmp) as vm:
        for left in await vm.windows():
            age = f"{left.age:.0f} s old" if left.age is not None else "of unknown age"
            print(f"{left.disk}: closing a window that was left open, {age}")
        await vm.close_windows()
        async with vm.snapshot(disks) as window:
            for disk, frozen in window.items():
                if frozen.astray:  # that name is another file here
                    sys.exit(f"{disk}: can't be read from here: {frozen.astray}")
                backup = Path(folder, f"{disk}.qcow2")
                convert = ["qemu-img", "convert", "-U", "-O", "qcow2", frozen.filename, str(backup)]
                process = await asyncio.create_subprocess_exec(*convert)
                if await process.wait():
                    sys.exit(f"{disk}: could not be converted")  # the window closes nevertheless
                print(f"{disk}: {backup} holds {frozen.filename} as it was")
        for outcome in window.outcomes:
            assert outcome.active is not None
            print(f"{outcome.active.filename} takes the guest's writes again")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        asyncio.run(main(*sys.argv[1:]))
    except qc.QmpCommitError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
