"""The golden cycle: an overlay's changes go into the base, or are thrown away, and it starts anew.

A test says whether the changes deserve it. If so the overlay is recycled: the base takes its
data, and an empty overlay begins. If not it is discarded: an empty one is laid over the base as
it is, and the guest, whose memory belongs to a disk that is no more, is reset or stopped.

Rests on what a `Recycle` rests on, and on what `exchange` does.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from qmpcommit.block.chain import Disk, Image, absolute
from qmpcommit.block.files import read_header
from qmpcommit.commit.aftermath import identify
from qmpcommit.commit.exchange import Exchange, Guest
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.plan import JOB_PREFIX, Plan
from qmpcommit.commit.policy import Pivot, Ready, Recycle, check_command, run_command
from qmpcommit.errors import ChainError, CommitFailed, InvalidRequest, JobConflict, VMStateError
from qmpcommit.tasks import to_the_end
from qmpcommit.units import parse_seconds
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from qmpcommit.session import Session

KeepIf = Sequence[str] | Callable[[Ready], Awaitable[bool]]
"""A command, whose exit status 0 says keep and 1 to 125 discard, or a callable that says it."""

TIMEOUT = 3600.0
"""Seconds that a command gets to say it."""

CANNOT_TELL = 126
"""From this exit status on a command has not answered: it was not found, or a signal ended it."""

_FORMER = re.compile(r"\.cycle-\d{8}T\d{6}Z-[0-9a-f]{8}$")
_INTERRUPTED = re.compile(rf"{JOB_PREFIX}[cd][0-9a-f]{{8}}-top$")
"""The node-name of the fresh overlay of a discard, the daemon's included."""


@record
class Discarded(Record):
    """An overlay that was thrown away.

    `former` must never be booted again, and `deleted` tells that it is gone; `overlay` is the
    empty one that the disk writes to now, over `base`. `guest` is what became of the guest.
    """

    disk: str
    former: str
    overlay: str
    base: Image
    guest: Guest
    deleted: bool = False
    vm: str = ""
    warnings: tuple[str, ...] = ()


@record
class Round(Record):
    """One round of a cycle: `result` says which of `kept` and `discarded` tells how."""

    result: Literal["kept", "discarded"]
    disk: str
    overlay: str
    kept: CommitOutcome | None = None
    discarded: Discarded | None = None


async def discard(
    vm: Session,
    name: str,
    *,
    guest: Guest | None = None,
    overlay: str | os.PathLike[str] | None = None,
    delete: bool = False,
) -> Discarded:
    """Throw the active overlay of a disk away; see `Session.discard`."""
    disk = await vm.disk(name)
    if _was_interrupted(vm, disk):
        return await _finish(vm, disk, guest, delete)
    plan = _plan(vm, disk)
    guest = await _agreed(vm, disk, guest)
    fresh = _overlay(vm, plan, overlay)
    return await to_the_end(_exchange(vm, plan, fresh, guest, delete, {}))


async def cycle(
    vm: Session,
    name: str,
    *,
    keep_if: KeepIf,
    guest: Guest | None = None,
    overlay: str | os.PathLike[str] | None = None,
    delete: bool = False,
    timeout: float = TIMEOUT,
) -> Round:
    """One round; see `Session.cycle`."""
    timeout = parse_seconds(timeout, "timeout")
    if not callable(keep_if):
        keep_if = check_command(keep_if, "keep_if")
    disk = await vm.disk(name)
    if _was_interrupted(vm, disk):
        done = await _finish(vm, disk, guest, delete)
        return Round("discarded", done.disk, done.overlay, discarded=done)
    plan = _plan(vm, disk)
    guest = await _agreed(vm, disk, guest)
    keep = await deserves(plan, keep_if, timeout)
    plan = _plan(vm, await vm.disk(name))  # it may have taken its time
    fresh = _overlay(vm, plan, overlay)
    if keep:
        job = await vm.commit(name, policy=Recycle(fresh), shallow=True, delete=delete)
        kept = await job.wait()
        return Round("kept", kept.disk, fresh, kept=kept)
    done = await to_the_end(_exchange(vm, plan, fresh, guest, delete, {}))
    return Round("discarded", done.disk, done.overlay, discarded=done)


async def cycles(vm: Session, name: str, *, every: float, **options: Any) -> AsyncIterator[Round]:
    """Rounds, one every so many seconds; see `Session.cycles`."""
    every = parse_seconds(every, "every")
    loop = asyncio.get_running_loop()
    while True:
        begun = loop.time()
        made = await cycle(vm, name, **options)
        name = made.overlay  # a node-name or file of the former overlay means nothing any more
        yield made
        await asyncio.sleep(max(0.0, begun + every - loop.time()))


# -- what a round needs -------------------------------------------------------------------------


def _plan(vm: Session, disk: Disk) -> Plan:
    if disk.jobs:
        raise JobConflict(
            f"{disk} of {vm.name} has a block job ({', '.join(disk.jobs)}); wait for its end."
            " Nothing was changed",
            vm=vm.name,
            disk=disk.name,
        )
    return plan_round(vm.name, disk, f"{JOB_PREFIX}d{os.urandom(4).hex()}")


def plan_round(vm: str, disk: Disk, job_id: str) -> Plan:
    """What there is to be carried or discarded; raises `ChainError` where that can't be."""
    where = {"vm": vm, "disk": disk.name}
    if len(disk.chain) < 2:
        raise ChainError(
            f"{disk} of {vm} has no overlay: its chain needs a base and an overlay over it."
            " Nothing was changed",
            **where,
        )
    if disk.exports:
        raise ChainError(
            f"{disk} of {vm} is exported ({', '.join(disk.exports)}), and nothing could hold"
            " its clients back while its overlay is exchanged. Nothing was changed",
            **where,
        )
    return Plan(
        vm=vm,
        disk=disk,
        top=disk.chain[0],
        base=disk.chain[1],
        job_id=job_id,
        two_phase=True,
        policy=Pivot(),
    )


async def _agreed(vm: Session, disk: Disk, guest: Guest | None) -> Guest:
    """What becomes of the guest; raises `VMStateError` where one runs and nothing was said."""
    if guest not in ("reset", "stop", None):
        raise InvalidRequest(f"a guest is 'reset' or left to 'stop', not {guest!r}")
    status, _ = await vm.look()
    if guest is None and status == "running":
        raise VMStateError(
            f"the guest of {vm.name} runs on {disk}, and what it has in memory belongs to the"
            " overlay that would be discarded: say whether it is to be reset or to be left stopped"
            " (guest='reset' or 'stop'; --reset or --stop). Nothing was changed",
            vm=vm.name,
            disk=disk.name,
        )
    return guest or "stop"


def _overlay(vm: Session, plan: Plan, given: str | os.PathLike[str] | None) -> str:
    """The next overlay's file: as given, in the folder given, or beside the former one."""
    path = absolute(plan.top, vm.cwd)
    place = os.path.dirname(path) if given is None else os.fspath(given)
    if given is not None and not os.path.isdir(os.path.join(vm.cwd or os.getcwd(), place)):
        return place
    return new_overlay(place, path)


def new_overlay(folder: str, former: str) -> str:
    """The file of the next overlay: called as the former one, with the time and a number."""
    stem = _FORMER.sub("", os.path.basename(former).removesuffix(".qcow2"))
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return os.path.join(folder, f"{stem}.cycle-{stamp}-{os.urandom(4).hex()}.qcow2")


async def deserves(plan: Plan, keep_if: KeepIf, timeout: float) -> bool:
    """Ask whether the changes are kept; raises `CommitFailed` where there is no answer."""
    ready = Ready(plan.vm, plan.disk.name, plan.job_id, plan.base, plan.top)
    if callable(keep_if):
        return bool(await keep_if(ready))
    try:
        status = await run_command(keep_if, ready.environment(), timeout)
    except OSError as error:
        how = f"could not be run: {error.strerror}"
    else:
        if status is not None and 0 <= status < CANNOT_TELL:
            return status == 0
        how = f"took longer than {timeout:g} s"
        if status is not None:
            how = f"ended with status {status}, which is no answer"
    raise CommitFailed(
        f"whether the overlay {plan.top.filename} of {plan.disk} of {plan.vm} is to be kept is not"
        f" known: {' '.join(keep_if)} {how}. Nothing was changed",
        vm=plan.vm,
        disk=plan.disk.name,
        command=list(keep_if),
    )


async def _exchange(  # noqa: PLR0917
    vm: Session, plan: Plan, fresh: str, guest: Guest, delete: bool, noted: dict[str, Any]
) -> Discarded:
    path = absolute(plan.top, vm.cwd)
    file = await asyncio.to_thread(identify, path, vm.peer_pid) if delete else None
    exchange = Exchange(vm, plan, fresh, guest=guest, note=_no_note, file=file, noted=noted)
    warnings = await exchange.run()
    deleted = file is not None and not await asyncio.to_thread(os.path.lexists, path)
    vm.log.info("discarded", disk=plan.disk.name, former=plan.top.filename, overlay=fresh)
    return Discarded(
        disk=plan.disk.name,
        former=plan.top.filename,
        overlay=fresh,
        base=plan.base,
        guest=guest,
        deleted=deleted,
        vm=vm.name,
        warnings=tuple(warnings),
    )


async def _no_note(step: str, **facts: Any) -> None:
    """Without a journal the node-names and the files' headers tell how far it was."""


# -- after a crash --------------------------------------------------------------------------------


def _was_interrupted(vm: Session, disk: Disk) -> bool:
    """Whether a killed discard has laid its empty overlay, and not yet exchanged what is below."""
    if len(disk.chain) < 3 or not _INTERRUPTED.match(disk.chain[0].node_name):
        return False
    fresh, _, base = disk.chain[:3]
    try:
        header = read_header(absolute(fresh, vm.cwd))
    except OSError:
        return False
    folder = os.path.dirname(absolute(fresh, vm.cwd))
    named = os.path.join(folder, header.backing) if header is not None else ""
    return os.path.normpath(named) == os.path.normpath(absolute(base, vm.cwd))


async def _finish(vm: Session, disk: Disk, guest: Guest | None, delete: bool) -> Discarded:
    """Go on with a discard that was killed: its guest stands still since then."""
    fresh, top, base = disk.chain[:3]
    plan = Plan(
        vm=vm.name,
        disk=disk,
        top=top,
        base=base,
        job_id=fresh.node_name.removesuffix("-top"),
        two_phase=True,
        policy=Pivot(),
    )
    noted = {"step": "lay", "running": guest == "reset"}
    return await to_the_end(_exchange(vm, plan, fresh.filename, guest or "stop", delete, noted))
