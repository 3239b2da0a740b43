"""A window or a cycle with a ledger in a file, whose process is killed at its n-th place.

There is a place before and after each QMP command that changes something, each note, and each file
that goes. Arguments: the monitors, with commas between; which work, or "resume" to go on with it;
the ledger's file; the place's number (0: never); the file to which the places are written as they
are passed. What the last process comes to is written to ``outcome`` beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import qmpcommit as qc
from qmpcommit.session import Session
from tests.ground.killing import places

EXECUTE, UNLINK, NOTE = Session.execute, os.unlink, qc.FileLedger.note
DEVICE = "/machine/peripheral/{}/virtio-backend"


async def _write(vm: Session, disk: str) -> None:
    """The guest writes to its disk."""
    line = f'qemu-io -d {DEVICE.format(disk)} "write -P 85 0 64k"'
    said = await EXECUTE(vm, "human-monitor-command", {"command-line": line})
    assert not said, said


async def window(ledger: qc.FileLedger, vm: Session) -> list[qc.CommitOutcome]:
    """Of one VM."""
    async with vm.snapshot(["vda", "vdb"], freeze="pause", ledger=ledger) as made:
        for disk in ("vda", "vdb"):
            await _write(vm, disk)
            PLACE(f"wrote {disk}")
    return made.outcomes


async def windows(ledger: qc.FileLedger, *vms: Session) -> list[qc.CommitOutcome]:
    """Of two VMs at one instant."""
    async with qc.snapshot([(vm, "vda") for vm in vms], ledger=ledger) as made:
        for number, vm in enumerate(vms):
            await _write(vm, "vda")
            PLACE(f"wrote {number}")
    return [outcome for each in made.of.values() for outcome in each.outcomes]


def round_of(answer: str) -> Any:
    """Of a disk of each VM, of which the command says whether it is kept."""

    async def work(ledger: qc.FileLedger, *vms: Session) -> Sequence[Any]:
        disks = [(vm, "vda") for vm in vms]
        return await qc.cycle(disks, keep_if=[answer], guest="reset", delete=True, ledger=ledger)

    return work


async def discard(ledger: qc.FileLedger, *vms: Session) -> Sequence[Any]:
    """Of both disks of the first VM."""
    return await vms[0].discard(["vda", "vdb"], guest="reset", ledger=ledger)


WORK: dict[str, Any] = {
    "window": window,
    "windows": windows,
    "keep one": round_of("true"),
    "keep": round_of("true"),
    "discard": round_of("false"),
    "discard two": discard,
}


async def main(qmps: str, work: str, ledger: qc.FileLedger) -> Sequence[Any]:
    """From start to end."""
    async with AsyncExitStack() as stack:
        vms = [await stack.enter_async_context(Session.connect(qmp)) for qmp in qmps.split(",")]
        if work == "resume":
            ends = await qc.resume(ledger, vms)
            assert isinstance(ends, tuple)
            return ends
        return await WORK[work](ledger, *vms)  # type: ignore[no-any-return]


def unlink(name: Any, **more: Any) -> None:
    """``os.unlink`` with places."""
    PLACE("before unlink")
    UNLINK(name, **more)
    PLACE("after unlink")


async def note(self: qc.FileLedger, step: str, *arguments: Any, **facts: Any) -> None:
    """A note with places."""
    PLACE(f"before note {step}")
    await NOTE(self, step, *arguments, **facts)
    PLACE(f"after note {step}")


if __name__ == "__main__":
    QMPS, NAME, LEDGER, DIE_AT, PLACES = sys.argv[1:]
    PLACE = places(PLACES, int(DIE_AT))
    (qc.GroupCommit.__init__.__kwdefaults__ or {})["hold_limit"] = 60.0  # for a busy machine
    os.unlink = unlink  # type: ignore[assignment]
    qc.FileLedger.note = note  # type: ignore[method-assign]
    ends = asyncio.run(main(QMPS, NAME, qc.FileLedger(LEDGER)))
    told = [each.model_dump(mode="json") for each in ends]
    Path(PLACES).with_name("outcome").write_text(json.dumps(told))
