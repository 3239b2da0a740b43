"""Overlays that stay: laid over disks of one VM at one instant, they begin both stories.

From then on the layers below stand still. A pivot or a keep ends what they begin.

Rests on what a window's opening rests on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qmpcommit.block.chain import Disk, check_nameable, find_disk, read_disks
from qmpcommit.block.graph import BlockGraph
from qmpcommit.block.identity import OpenFiles
from qmpcommit.commit.checks import check_override
from qmpcommit.commit.checks.replaced import check_named
from qmpcommit.commit.claim import Claim, release_all, take
from qmpcommit.commit.in_use import check_idle
from qmpcommit.commit.migration import objection
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.commit.overlay.like import each_asked, is_encrypted
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.overlay.place import overlay_files
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Pivot
from qmpcommit.commit.preconditions import check_follows
from qmpcommit.errors import (
    ChainError,
    CommandRefused,
    InvalidRequest,
    QmpCommitError,
    WindowError,
)
from qmpcommit.guest.hold import check_sockets
from qmpcommit.guest.marks import mark_of_snapshot, thaw_abandoned
from qmpcommit.guest.run_state import How
from qmpcommit.names import JOB_PREFIX, WINDOW_MARK
from qmpcommit.tasks import to_the_end
from qmpcommit.values import Record, record
from qmpcommit.window.laying import READ_ONLY, lay_all

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM


@record
class LaidOverlay(Record):
    """A disk that writes to a fresh overlay now.

    `filename` holds the disk up to that instant and does not change any more, nor does what lies
    below it; `overlay` is the file that the guest writes to, `node_name` its node.
    """

    disk: str
    filename: str
    overlay: str
    node_name: str
    warnings: tuple[str, ...] = ()


@record
class Snapshot(Record):
    """The overlays of one instant; `quiesced` is for how many seconds the guest stood still."""

    vm: str
    disks: tuple[LaidOverlay, ...]
    quiesced: float | None = None


async def lay_overlays(
    vm: VM,
    disks: Iterable[str],
    *,
    overlay: str | os.PathLike[str] | None = None,
    overlay_options: Mapping[str, Any] | None = None,
    overlay_secret: str | None = None,
    freeze: How | None = None,
    agent: str | os.PathLike[str] | None = None,
    override: Collection[str] = (),
) -> Snapshot:
    """Lay fresh overlays over these disks, which stay; see `Session.overlay`."""
    asks = OverlayOptions.of(overlay_options, overlay_secret)
    names = [] if isinstance(disks, str) else [str(disk) for disk in disks]
    if not names:
        raise InvalidRequest("name the disks as a list, at least one, as in ['vda']")
    check_override(override)
    check_sockets(freeze, [vm], {} if agent is None else {vm: agent})
    if freeze is not None:
        await thaw_abandoned(vm, agent)
    found = await _find(vm, names)
    number = os.urandom(4).hex()
    claims: list[Claim] = []
    try:
        for disk in found:
            state = "Nothing was changed"
            claims.append(await take(vm, disk, "snap", tag=number, override=override, state=state))
        return await _laid(
            vm, await _find(vm, names), number, asks, overlay, freeze=freeze, agent=agent
        )
    finally:
        await release_all(claims)


async def _find(vm: VM, names: Sequence[str]) -> list[Disk]:
    _, graph = await vm.look()
    found = [find_disk(read_disks(graph), name, vm=vm.name, cwd=vm.cwd) for name in names]
    if len({disk.root for disk in found}) < len(found):
        raise InvalidRequest(f"a disk of {vm.name} is named twice; name it once")
    return found


async def _laid(
    vm: VM,
    found: Sequence[Disk],
    number: str,
    asks: OverlayOptions,
    overlay: str | os.PathLike[str] | None,
    *,
    freeze: How | None,
    agent: str | os.PathLike[str] | None,
) -> Snapshot:
    """The overlays over disks that are claimed."""
    graph = await vm.graph()
    plans = [_plan(vm, disk, f"{JOB_PREFIX}s{number}-{place}") for place, disk in enumerate(found)]
    await asyncio.to_thread(_check_named, vm, graph, found)
    where = [(vm.name, vm.cwd, plan) for plan in plans]
    files = await asyncio.to_thread(overlay_files, where, overlay, "snapshot")
    own = each_asked(asks, [is_encrypted(graph, plan.base.node_name) for plan in plans])
    for plan, asked in zip(plans, own, strict=True):
        await check_follows(vm, plan, graph, asked)
    overlays = [
        FreshOverlay(vm, plan, file, vm.cwd, asked=asked)
        for plan, file, asked in zip(plans, files, own, strict=True)
    ]
    begun, pid = False, vm.peer_pid

    async def begin() -> None:
        nonlocal begun
        begun = True

    try:
        quiet = await lay_all(
            vm, list(zip(found, overlays, strict=True)), mark_of_snapshot(number),
            freeze=freeze, agent=agent, what="its overlay was being laid",
            again="take the snapshot again", bitmaps=True, meet=begin,
        )  # fmt: skip
    except BaseException as error:
        stay = await to_the_end(_undo(vm, overlays, pid))
        if stay is None and begun:
            unknown = _unknown(vm, error, plans, files)
            if isinstance(error, QmpCommitError):
                raise unknown from error
            error.add_note(str(unknown))
        stay = stay or []
        text = (
            f"The overlays {' and '.join(stay)} are laid nevertheless, and the guest writes to them"
        )
        if stay and not isinstance(error, QmpCommitError):
            error.add_note(text)
        elif stay:
            raise WindowError(
                f"{error}. {text}: 'chain' shows them, and a commit merges them away",
                vm=vm.name,
                overlays=stay,
            ) from error
        if isinstance(error, QmpCommitError):
            error.add(vm=vm.name)
        raise
    why = ""
    with suppress(QmpCommitError):  # they lie, whatever becomes of the monitor
        why = await objection(vm)  # by a migration that has begun since it was looked at
    for each in overlays:
        await each.look()
        if why:
            each.warnings.append(f"{why}. The other host does not know {each.filename}")
    laid = tuple(
        LaidOverlay(plan.disk.name, plan.top.handed_out, each.filename, each.node,
                    tuple(each.warnings))
        for plan, each in zip(plans, overlays, strict=True)
    )  # fmt: skip
    vm.log.info("overlays_laid", disks=[each.disk for each in laid])
    return Snapshot(vm.name, laid, quiet.seconds)


def _check_named(vm: VM, graph: BlockGraph, found: Iterable[Disk]) -> None:
    """A header that names the layer below has to lead to the very file that QEMU has open."""
    opened = OpenFiles.of(graph, vm.peer_pid, cwd=graph.cwd)
    for disk in found:
        check_named(vm.name, graph, opened, disk, 0)


def _plan(vm: VM, disk: Disk, name: str) -> Plan:
    """What the overlay of one disk follows; raises where the disk is not fit."""
    where = {"vm": vm.name, "disk": disk.name}
    active = disk.active
    if active is None:
        raise ChainError(f"{disk} of {vm.name} has no medium. Nothing was changed", **where)
    if WINDOW_MARK in active.filename:
        raise ChainError(
            f"{disk} of {vm.name} is in a window, and writes to {active.filename}, which is merged"
            " back when that closes: close it first. Nothing was changed",
            hint="'qmpcommit window --close' does that",
            **where,
        )
    if active.read_only:
        raise ChainError(f"{disk} of {vm.name} {READ_ONLY}. Nothing was changed", **where)
    check_idle(vm.name, disk)
    check_nameable(active, vm.name, disk.name)
    return Plan(
        vm=vm.name,
        disk=disk,
        top=active,
        base=active,
        job_id=name,
        two_phase=True,
        policy=Pivot(),
    )


def _unknown(
    vm: VM, error: BaseException, plans: Sequence[Plan], files: Sequence[str]
) -> WindowError:
    """Whether the guest wrote to them nobody knows; to start from them is right in either case."""
    pairs = " and ".join(
        f"{file}, not from {plan.top.filename}" for plan, file in zip(plans, files, strict=True)
    )
    why = error.message if isinstance(error, QmpCommitError) else "it was interrupted"
    return WindowError(
        f"{why}. The overlays {' and '.join(files)} were made, and may have been laid:"
        f" then they hold what the guest wrote since. If its QEMU has ended, start the VM from"
        f" {pairs}. If it runs, look at what it writes to",
        hint=f"'qmpcommit chain {vm.address or 'QMP'}' shows that",
        vm=vm.name,
        overlays=list(files),
    )


async def _undo(vm: VM, overlays: Sequence[FreshOverlay], pid: int | None) -> list[str] | None:
    """Remove what was made and does not lie; the files of those that lie (a reply was lost).

    None where the VM is away, or another QEMU than that of `pid` answers: what lay in that one may
    hold what its guest wrote.
    """
    try:
        nodes = (await vm.graph()).nodes
        if None not in (pid, vm.peer_pid) and vm.peer_pid != pid:
            return None
        laid = [
            each
            for each in overlays
            if each.node in nodes and "backing" in nodes[each.node].children
        ]
        for each in overlays:
            if each not in laid:
                with suppress(CommandRefused):  # `recover` finds it, and the others are undone
                    await each.undo()
    except QmpCommitError as error:  # the VM is away: why is the news, and `recover` finds the rest
        vm.log.warning("overlays_remain", message=error.message)
        return None
    return [each.filename for each in laid]
