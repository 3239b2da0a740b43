"""What the VMs of a host are at: one row a VM, asked at the same time, and nothing is changed.

Rests on ``query-version``, ``query-name``, and what `recover` looks at.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qmpcommit.commit.claim import lives, owner_in, told
from qmpcommit.errors import CommandRefused, QmpCommitError
from qmpcommit.guest.marks import marks_among
from qmpcommit.recovery.lookup import look_up
from qmpcommit.recovery.monitors import WITHIN, Place, ask
from qmpcommit.recovery.seen import Seen, see
from qmpcommit.values import Record, record
from qmpcommit.window.records import OpenWindow
from qmpcommit.window.run import windows_of

if TYPE_CHECKING:
    from qmpcommit.block.chain import Disk
    from qmpcommit.commit.vm import VM


@record
class DiskState(Record):
    """One disk: `depth` are its layers, `overlay` the active one where there is one below it.

    `overlay_size` is what that takes on the host, in bytes, None where it is not known. `held`
    says who works on it, "" where nobody does.
    """

    name: str
    depth: int
    overlay: str = ""
    overlay_size: int | None = None
    held: str = ""


@record
class JobState(Record):
    """One job: its phase (``status``), its bytes, and its limit in bytes per second (0: none).

    `begun_for` is for how many seconds its disk is held, where somebody holds it, `ready_for` for
    how many it is READY, where a daemon knows that.
    """

    id: str
    type: str
    status: str
    disk: str = ""
    current: int = 0
    total: int = 0
    speed: int = 0
    begun_for: float | None = None
    ready_for: float | None = None


@record
class VMState(Record):
    """One VM: the monitor that was asked, and the `others` that it has.

    `name` is QEMU's own (``-name``), `status` the guest's run state, "" where there is no guest.
    `windows` are open, `frozen` says why the guest stands still, and `wrong` what somebody should
    look at. Where it could not be asked, `asked` is false and `wrong` says why.
    """

    address: str
    others: tuple[str, ...] = ()
    asked: bool = True
    name: str = ""
    qemu: str = ""
    status: str = ""
    disks: tuple[DiskState, ...] = ()
    jobs: tuple[JobState, ...] = ()
    windows: tuple[OpenWindow, ...] = ()
    frozen: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


async def states(places: Sequence[Place], *, within: float = WITHIN) -> list[VMState]:
    """The VMs as they are now, asked at the same time; `within` bounds each, in seconds."""
    return list(await asyncio.gather(*(_state(place, within) for place in places)))


async def _state(place: Place, within: float) -> VMState:
    try:
        address, state = await ask(place, look, within=within)
    except QmpCommitError as error:
        address, *others = place.addresses
        return VMState(address, tuple(others), asked=False, wrong=(error.message,))
    return VMState(
        **{**state.__dict__, "others": tuple(one for one in place.addresses if one != address)}
    )


async def look(vm: VM) -> VMState:
    """One VM as it is now. Raises what `Monitor.execute` raises."""
    name, version = await name_of(vm), await vm.query_version()
    seen = await see(vm)
    speeds: dict[str, int] = {}
    if seen.jobs:
        block = await vm.execute("query-block-jobs")
        speeds = {str(job["device"]): int(job["speed"]) for job in block}
    windows = await asyncio.to_thread(windows_of, seen.disks, vm.cwd)
    on = {job: disk for disk in seen.disks for job in disk.jobs}
    return VMState(
        address=str(vm.address),
        name=name,
        qemu=str(version.qemu),
        status=seen.status or "",
        disks=tuple(_disk(seen, disk) for disk in seen.disks if disk.chain),
        jobs=tuple(
            _job(seen, job, on.get(each), speeds.get(each, 0)) for each, job in seen.jobs.items()
        ),
        windows=tuple(windows),
        frozen=tuple(mark.message for mark in marks_among(seen.graph.nodes)),
        wrong=(*stopped(seen), *(each.message for each in look_up([seen]))),
    )


def _job(seen: Seen, job: Mapping[str, Any], disk: Disk | None, speed: int) -> JobState:
    owner = owner_in(seen.graph, disk) if disk is not None else None
    return JobState(
        id=str(job["id"]),
        type=str(job.get("type")),
        status=str(job.get("status")),
        disk=disk.name if disk is not None else "",
        current=int(job.get("current-progress") or 0),
        total=int(job.get("total-progress") or 0),
        speed=speed,
        begun_for=max(0.0, time.time() - owner.since) if owner and owner.since else None,
    )


def _disk(seen: Seen, disk: Disk) -> DiskState:
    owner = owner_in(seen.graph, disk)
    over = disk.chain[0] if len(disk.chain) > 1 else None
    return DiskState(
        name=disk.name,
        depth=len(disk.chain),
        overlay=over.filename if over else "",
        overlay_size=over.allocated_size if over else None,
        held=told(owner) if owner is not None and lives(owner) is not False else "",
    )


STOPS = {
    "io-error": "the guest stands still after an I/O error",
    "internal-error": "the guest stands still after an internal error of QEMU's",
    "guest-panicked": "the guest has panicked",
}
"""The run states in which no guest should be."""


def stopped(seen: Seen) -> list[str]:
    """What stands still by a fault."""
    found = [STOPS[seen.status]] if seen.status in STOPS else []
    for disk in seen.disks:
        if disk.io_status not in ("", "ok"):
            found.append(f"the guest's requests on {disk} fail: {disk.io_status}")
    return found


async def name_of(vm: VM) -> str:
    """What QEMU was called (``-name``); "" where it was not, or is a storage daemon."""
    with suppress(CommandRefused):
        return str((await vm.execute("query-name")).get("name") or "")
    return ""
