"""A commit with a ledger in a file, whose process is killed by SIGKILL at its n-th place.

There is a place before and after each QMP command that changes something, each note, and each file
that goes. Arguments: the monitor, the ledger's file, the policy as JSON, the place's number (0:
never), the file to which the places are written as they are passed, and "resume" to go on with the
commit instead of beginning it. What the commit comes to is written to ``outcome`` beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import qmpcommit as qc
from tests.ground.killing import places

QMP, LEDGER, POLICY, DIE_AT, PLACES, HOW = sys.argv[1:]

UNLINK, NOTE = os.unlink, qc.FileLedger.note
place = places(PLACES, int(DIE_AT))


def unlink(name: Any, **more: Any) -> None:
    """``os.unlink`` with places."""
    place("before unlink")
    UNLINK(name, **more)
    place("after unlink")


async def note(self: qc.FileLedger, step: str, *arguments: Any, **facts: Any) -> None:
    """A note with places."""
    place(f"before note {step}")
    await NOTE(self, step, *arguments, **facts)
    place(f"after note {step}")


async def main() -> None:
    """Begin it or go on with it, to its end."""
    ledger = qc.FileLedger(LEDGER)
    async with qc.Session.connect(QMP) as vm:
        if HOW == "resume":
            job = await vm.resume(ledger)
        else:
            delete = not {"keep", "abort"} & {json.loads(POLICY)["kind"]}
            (disk,) = await vm.disks()
            job = await vm.commit(disk.name, policy=POLICY, delete=delete, ledger=ledger)
        outcome = await job.wait()
    Path(PLACES).with_name("outcome").write_text(outcome.model_dump_json())


os.unlink = unlink  # type: ignore[assignment]
qc.FileLedger.note = note  # type: ignore[method-assign]
asyncio.run(main())
