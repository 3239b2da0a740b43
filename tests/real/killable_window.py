"""A window over two disks, whose process is killed by SIGKILL at its n-th place.

There is a place before and after each QMP command that changes something, each note, and each
file that goes. Arguments: the monitor, how to freeze ("none", "pause" or the agent's socket), the
place's number (0: never), the file to which the places are written as they are passed, and
what the guest writes meanwhile: 64 KiB of which byte, and where. Last the folder of the overlays,
or "" for beside the files. The window is noted in the file ``noted`` beside the places.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from qmpcommit.session import Session
from tests.ground.killing import places

QMP, FREEZE, DIE_AT, PLACES, PATTERN, OFFSET, OVERLAY_DIR = sys.argv[1:]
DEVICE = "/machine/peripheral/vd{}/virtio-backend"

EXECUTE, UNLINK = Session.execute, os.unlink
place = places(PLACES, int(DIE_AT))


def unlink(*args: Any, **more: Any) -> None:
    """``os.unlink`` with places."""
    place("before unlink")
    UNLINK(*args, **more)
    place("after unlink")


class Notes:
    """A ledger with places."""

    async def note(self, step: str, **facts: Any) -> None:
        """Write down what `qmpcommit.recover_window` needs."""
        place(f"before note {step}")
        if step == "create":
            Path(PLACES).with_name("noted").write_text(facts["window"].model_dump_json())
        place(f"after note {step}")


async def main() -> None:
    """Open, have the guest write, and close."""
    how: Any = {"none": None, "pause": "pause"}.get(FREEZE, "agent")
    agent = FREEZE if how == "agent" else None
    async with Session.connect(QMP) as vm:
        window = await vm.open_window(
            ["vda", "vdb"],
            freeze=how,
            agents=agent,
            overlay=OVERLAY_DIR or None,
            ledger=Notes(),
        )
        for number, disk in enumerate(window.values()):
            bitmap = {"node": disk.node_name, "name": "kept"}
            if number == 0:  # its commit is held in PENDING, to carry this
                await EXECUTE(vm, "block-dirty-bitmap-add", bitmap)
            line = f'qemu-io -d {DEVICE.format("ab"[number])} "write -P {PATTERN} {OFFSET} 64k"'
            said = await EXECUTE(vm, "human-monitor-command", {"command-line": line})
            assert not said, said
            place(f"wrote {number}")
        await vm.close_window(window, ledger=Notes())


os.unlink = unlink
asyncio.run(main())
