"""A snapshot window: the disks' files stand still and can be read while the guest goes on.

Fresh overlays are laid over all named disks in one ``transaction``, so what lies below is one
instant of all of them. When the window closes, each overlay is committed back into the file that
stood still, pivoted away, closed and deleted. An overlay tells by its name that it is a window's:
whoever comes after a crash finds it and closes it.

Rests on ``blockdev-create``, ``blockdev-add``, ``transaction`` of ``blockdev-snapshot``, and on
what a commit rests on.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypedDict

from qmpcommit.block.chain import (
    Disk,
    absolute,
    check_nameable,
    find_disk,
    read_disks,
)
from qmpcommit.block.graph import BlockGraph
from qmpcommit.block.identity import OpenFiles, astray
from qmpcommit.callback import Notes, Noting
from qmpcommit.commit.checks import CLAIM, check_override
from qmpcommit.commit.checks.closing import closing_objections
from qmpcommit.commit.checks.replaced import check_named
from qmpcommit.commit.claim import Claim, clear_dead, owners_of, release_all
from qmpcommit.commit.in_use import check_idle
from qmpcommit.commit.migration import look_at_owner, objection
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.overlay.file import is_device
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.commit.overlay.like import each_asked, is_encrypted
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Pivot
from qmpcommit.commit.preconditions import check_follows
from qmpcommit.errors import (
    InvalidRequest,
    JobConflict,
    MonitorLost,
    QmpCommitError,
    VMGone,
    WindowError,
)
from qmpcommit.guest.marks import (
    Mark,
    mark_of_group,
    mark_of_snapshot,
    mark_of_window,
    marks_among,
    thaw_abandoned,
    thaw_marked,
    what_to_do,
)
from qmpcommit.guest.run_state import STOPPED_HERE, How, thaw
from qmpcommit.names import JOB_PREFIX
from qmpcommit.tasks import all_ended, to_the_end
from qmpcommit.units import parse_size
from qmpcommit.window.book import end, notes_again, notes_of
from qmpcommit.window.claims import (
    claim_all_again,
    claim_disks,
    claim_named,
    clear_named,
    closable,
    disturbances,
    held_windows,
)
from qmpcommit.window.laying import READ_ONLY, lay_all
from qmpcommit.window.records import (
    MARK,
    NAME,
    STAMP,
    Frozen,
    NotedWindow,
    OpenWindow,
    Window,
)
from qmpcommit.window.remains import (
    Remains,
    clear,
    disk_over,
    end_jobs,
    merge_back,
)

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM

_SAY_THE_SOCKET = "close the window with the agent's socket"


def _left_still(vm: VM, mark: Mark) -> tuple[str, str]:
    """What is to be done about it, and what a person types for that."""
    if mark.how == "agent":
        return _SAY_THE_SOCKET, "--agent SOCKET names it"
    return "recover what is left", what_to_do(mark, str(vm.address or "QMP"))


def new_window_name() -> str:
    """A name for a window: when it was opened, to the second, and what differs each time."""
    return f"{datetime.now(UTC).strftime(STAMP)}-{os.urandom(4).hex()}"


@asynccontextmanager
async def snapshot(
    vm: VM,
    disks: Iterable[str],
    *,
    overlay_dir: str | os.PathLike[str] | None = None,
    overlay_options: Mapping[str, Any] | None = None,
    overlay_secret: str | None = None,
    freeze: How | None = None,
    agent: str | os.PathLike[str] | None = None,
    bandwidth: int | str | None = None,
    ledger: Notes | None = None,
    override: Collection[str] = (),
) -> AsyncIterator[Window]:
    """A window over these disks for the length of the block; see `Session.snapshot`."""
    parse_size(bandwidth or 0, "bandwidth")  # now, not when the window has to be closed
    name = new_window_name()
    ledger = notes_of(ledger, vm, name, bandwidth=bandwidth)
    window = await open_window(
        vm, disks, overlay_dir=overlay_dir, overlay_options=overlay_options,
        overlay_secret=overlay_secret, freeze=freeze, agent=agent, name=name, ledger=ledger,
        override=override,
    )  # fmt: skip
    try:
        yield window
    finally:
        await close_window(vm, window, bandwidth=bandwidth, ledger=ledger)


class OpenOptions(TypedDict, total=False):
    """What `open_window` takes beside the disks, their folder and the agent."""

    overlay_options: Mapping[str, Any] | None
    overlay_secret: str | None
    freeze: How | None
    name: str | None
    ledger: Notes | None
    meet: Callable[[], Awaitable[object]] | None
    override: Collection[str]


async def open_window(
    vm: VM,
    disks: Iterable[str],
    *,
    overlay_dir: str | os.PathLike[str] | None = None,
    overlay_options: Mapping[str, Any] | None = None,
    overlay_secret: str | None = None,
    freeze: How | None = None,
    agent: str | os.PathLike[str] | None = None,
    name: str | None = None,
    ledger: Notes | None = None,
    meet: Callable[[], Awaitable[object]] | None = None,
    override: Collection[str] = (),
) -> Window:
    """Open a window that stays open until it is closed; see `Session.open_window`."""
    asks = OverlayOptions.of(overlay_options, overlay_secret)
    disks = [] if isinstance(disks, str) else [str(disk) for disk in disks]
    if not disks:
        raise WindowError("name the disks of the window as a list, at least one", vm=vm.name)
    window = new_window_name() if name is None else name
    check_override(override)
    if not NAME.fullmatch(window):
        raise InvalidRequest(f"'{window}' is no name of a window: new_window_name() makes one")
    if freeze is not None:
        await thaw_abandoned(vm, agent)
    status, graph = await vm.look()
    if freeze is None and _is_left_still(graph, status):
        await thaw_abandoned(vm, agent)
    found = {disk: find_disk(read_disks(graph), disk, vm=vm.name, cwd=vm.cwd) for disk in disks}
    if len({disk.root for disk in found.values()}) < len(disks):
        raise WindowError("a disk is named twice", vm=vm.name)
    claims = await claim_disks(vm, found, window, override)
    notes = notes_of(ledger, vm, window)
    noting = Noting.of(notes, vm.log)
    try:
        made = await _open(
            vm, graph, found, window, asks, overlay_dir=overlay_dir, freeze=freeze, agent=agent,
            ledger=noting, meet=meet, claims=claims,
        )  # fmt: skip
    except BaseException as error:
        await release_all(claims.values())
        if not isinstance(error, WindowError) or error.overlays is None:  # nothing is left of it
            await to_the_end(end(noting, notes, outcomes=[]))
        raise
    vm.log.info("window_open", window=window, disks=list(disks))
    return made


async def _open(
    vm: VM,
    graph: BlockGraph,
    found: Mapping[str, Disk],
    window: str,
    asks: OverlayOptions,
    *,
    overlay_dir: str | os.PathLike[str] | None,
    freeze: How | None,
    agent: str | os.PathLike[str] | None,
    ledger: Noting | None,
    meet: Callable[[], Awaitable[object]] | None,
    claims: dict[str, Claim],
) -> Window:
    """The window over disks that are claimed."""
    overlays: dict[str, FreshOverlay] = {}
    layers = [disk.chain[0].node_name for disk in found.values() if disk.chain]
    encrypted = any(is_encrypted(graph, name) for name in layers)
    for number, (asked, disk) in enumerate(found.items()):
        others = [each.filename for each in overlays.values()]
        plan, filename = await asyncio.to_thread(
            _place, vm, disk, window, number, overlay_dir, others=others
        )
        own = each_asked(asks, [is_encrypted(graph, plan.base.node_name), encrypted])[0]
        await check_follows(vm, plan, graph, own, lasting=False)
        await _check_closing(vm, plan, graph)
        overlays[asked] = FreshOverlay(vm, plan, filename, vm.cwd, asked=own, lasting=False)
    lost = await asyncio.to_thread(_astray, vm, graph, found)
    made = Window(
        window,
        {
            asked: Frozen(disk.name, _active(disk), over.filename, over.node, lost[asked])
            for (asked, disk), over in zip(found.items(), overlays.values(), strict=True)
        },
        {asked: [image.filename for image in disk.chain] for asked, disk in found.items()},
    )
    made.claims = claims
    if ledger is not None:
        socket = None if agent is None else os.fspath(agent)
        await ledger.note(
            "create", window=NotedWindow(window, dict(made), freeze, socket, made.below)
        )
    try:
        pairs = [(found[asked], overlays[asked]) for asked in found]
        quiet = await lay_all(
            vm, pairs, mark_of_window(window), name=window, freeze=freeze, agent=agent,
            ledger=ledger, meet=meet, what="its window was being opened",
            again="open the window again",
        )  # fmt: skip
        made.quiesced = quiet.seconds
        if ledger is not None:
            await ledger.note("open", name=window, quiesced=quiet.seconds)
    except BaseException as error:
        try:
            await to_the_end(_undo(vm, list(overlays.values()), claims))
        except WindowError as stays:
            if not isinstance(error, asyncio.CancelledError):
                raise
            error.add_note(str(stays))
        if isinstance(error, QmpCommitError):
            error.add(vm=vm.name)
        raise
    return made


async def close_window(
    vm: VM,
    window: Window | Iterable[Frozen],
    *,
    bandwidth: int | str | None = None,
    ledger: Notes | None = None,
) -> list[CommitOutcome]:
    """Close a window, whose overlays are merged back; see `Session.close_window`."""
    disks = list(window.values() if isinstance(window, Window) else window)
    notes = await notes_again(ledger, vm, window if isinstance(window, Window) else disks)
    noting = Noting.of(notes, vm.log)
    if noting is not None:  # nobody wants it to stay open for that
        await noting.note("close", overlays=[each.overlay for each in disks], anyway=True)

    async def close() -> list[CommitOutcome]:
        try:
            if isinstance(window, Window):
                outcomes = await _close_own(vm, window, bandwidth)
            else:
                outcomes = await _close_named(vm, disks, bandwidth, {})
        except WindowError as error:
            if error.overlays is None:  # it is closed
                told = {"message": str(error), "facts": error.facts}
                await end(noting, notes, error=told)
            raise
        await end(noting, notes, outcomes=outcomes)
        return outcomes

    return await to_the_end(close())


async def _close_own(vm: VM, window: Window, bandwidth: int | str | None) -> list[CommitOutcome]:
    """Close it, and say where it did not stand still."""
    with suppress(QmpCommitError):  # which closing it says better
        window.disturbed = window.disturbed or await disturbances(vm, window)
    claims = {each.overlay: window.claims[asked] for asked, each in window.items()
              if asked in window.claims}  # fmt: skip
    why = "; ".join(window.disturbed)
    text = (
        f"what was read in the window {window.name} on {vm.name} is no instant's image: {why}. Read"
        " it again"
    )
    try:
        outcomes = window.outcomes = await _close_named(
            vm, list(window.values()), bandwidth, claims
        )
    except WindowError as error:
        if not why:
            raise
        raise WindowError(f"{error}. And {text}", **error.facts) from None
    if why:
        raise WindowError(
            f"{text}. The window is closed",
            vm=vm.name,
            outcomes=[outcome.model_dump(mode="json") for outcome in outcomes],
        )
    return outcomes


async def _close_named(
    vm: VM,
    disks: Sequence[Frozen],
    bandwidth: int | str | None,
    claims: dict[str, Claim],
    override: Collection[str] = (),
) -> list[CommitOutcome]:
    """Close what is named; their disks are let go, however that ends."""
    try:
        return await _close(vm, disks, bandwidth, claims, override)
    finally:
        await release_all(claims.values())


async def windows(vm: VM) -> list[OpenWindow]:
    """The overlays of windows that are open on this VM, whoever opened them."""
    return await asyncio.to_thread(windows_of, await vm.disks(), vm.cwd)


def windows_of(disks: Iterable[Disk], cwd: str | None) -> list[OpenWindow]:
    """The overlays of windows that these disks write to; looks at their files."""
    return [
        _seen(disk, cwd)
        for disk in disks
        if disk.active is not None and MARK in disk.active.filename and len(disk.chain) > 1
    ]


async def close_windows(
    vm: VM,
    *,
    bandwidth: int | str | None = None,
    agent: str | os.PathLike[str] | None = None,
    overlay_dir: str | os.PathLike[str] | None = None,
    override: Collection[str] = (),
    only: Collection[str] | None = None,
) -> list[CommitOutcome]:
    """Close the windows that somebody left open; see `Session.close_windows`.

    With `only` those of these overlays.
    """
    check_override(override)
    await end_jobs(vm)
    owners = await owners_of(vm)
    held = frozenset() if CLAIM in override else held_windows(owners)
    marking = (mark_of_window, mark_of_snapshot, mark_of_group)
    living = {mark_of(tag) for tag in held for mark_of in marking}
    stuck = [
        (mark, *_left_still(vm, mark))
        for mark in await thaw_marked(vm, agent, but=living)
        if not mark.with_disks  # whoever recycles or discards lets it go on
    ]
    remains = [
        Remains(mark.node, f"{mark.message}, so that its writes hang: {todo}")
        for mark, todo, _ in stuck
    ]
    await look_at_owner(vm)  # a guest that was left quiesced goes on also while it migrates
    left = [Frozen(w.disk, w.filename, w.overlay, w.node_name) for w in await windows(vm)]
    if only is not None:
        left = [each for each in left if each.overlay in only]
    free, conflicts = await closable(vm, left, override)
    outcomes = await to_the_end(_close_named(vm, free, bandwidth, {}, override))
    folders = () if overlay_dir is None else (os.fspath(overlay_dir),)
    remains += await to_the_end(clear(vm, folders=folders, but=held))
    await clear_dead(vm, owners)
    facts = {"vm": vm.name, "outcomes": [each.model_dump(mode="json") for each in outcomes]}
    if remains:
        raise WindowError(
            f"on {vm.name} this is left of windows: {'; '.join(each.message for each in remains)}",
            hint=next((typed for _, _, typed in stuck), None),
            remains=[each.what for each in remains],
            **facts,
        )
    if conflicts:
        closed = f" ({len(outcomes)} others were closed)" if outcomes else ""
        told = ". ".join(str(each) for each in conflicts)
        raise JobConflict(f"{told}{closed}", **{**conflicts[0].facts, **facts})
    return outcomes


async def recover_window(vm: VM, noted: NotedWindow, *, held: bool = True) -> Window | None:
    """Take up a window whose process was killed; see `Session.recover_window`."""
    if noted.freeze is not None and held:
        await thaw(vm, noted.freeze, noted.agent)
    await end_jobs(vm, [each.overlay for each in noted.disks.values()])
    if noted.freeze is not None:
        await thaw_marked(vm, noted.agent, owner=mark_of_window(noted.name))
    graph = await vm.graph()
    laid = {asked: each for asked, each in noted.disks.items() if disk_over(graph, each.overlay)}
    rest = [each.overlay for each in noted.disks.values() if each not in laid.values()]
    if rest and not await objection(vm):
        await to_the_end(clear(vm, rest))
    vm.log.info("window_recovered", window=noted.name, disks=list(laid))
    await clear_named(vm, noted.name)  # also of those that were closed already
    if not laid:
        return None
    window = Window(noted.name, laid, noted.below)
    window.claims = await claim_all_again(vm, laid)
    return window


def _seen(disk: Disk, cwd: str | None) -> OpenWindow:
    active = disk.active
    assert active is not None
    window = active.filename.rpartition(MARK)[2].partition(".")[0]
    below = disk.chain[1].filename if len(disk.chain) > 1 else ""
    try:
        found = os.stat(absolute(active, cwd))
    except OSError:
        return OpenWindow(disk.name, window, below, active.filename, node_name=active.node_name)
    size = found.st_blocks * 512
    return OpenWindow(
        disk.name, window, below, active.filename, age_of(window), size, active.node_name
    )


def age_of(window: str) -> float | None:
    """Seconds since a window was opened, which its name tells."""
    try:
        opened = datetime.strptime(window.partition("-")[0], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None
    return max(0.0, (datetime.now(UTC) - opened).total_seconds())


def _is_left_still(graph: BlockGraph, status: str | None) -> bool:
    """Whether a guest stands still that somebody, perhaps killed, has quiesced for a while."""
    marks = marks_among(graph.nodes)
    return any(mark.how == "agent" or status in STOPPED_HERE for mark in marks)


def _active(disk: Disk) -> str:
    assert disk.active is not None
    return disk.active.handed_out


def _astray(vm: VM, graph: BlockGraph, disks: Mapping[str, Disk]) -> dict[str, str]:
    """Why a disk's names do not lead to its files from here; raises where they lead nowhere."""
    opened = OpenFiles.of(graph, vm.peer_pid, cwd=graph.cwd)
    found = {}
    for asked, disk in disks.items():
        check_named(vm.name, graph, opened, disk, 0)
        layers = (astray(graph, opened, image.node_name) for image in disk.chain)
        found[asked] = next(filter(None, layers), "")
    return found


def _place(
    vm: VM,
    disk: Disk,
    window: str,
    number: int,
    overlay_dir: str | os.PathLike[str] | None,
    *,
    others: Collection[str],
) -> tuple[Plan, str]:
    """What the overlay of one disk follows, and its file; raises where the disk is not fit.

    It is called as no one of `others`, whose disks' files may have the same name elsewhere.
    """
    active = disk.active
    if active is None:
        raise WindowError(f"{disk} of {vm.name} has no medium", vm=vm.name, disk=disk.name)
    if MARK in active.filename:
        raise WindowError(
            f"{disk} of {vm.name} is in a window already, and writes to {active.filename}: close"
            " it first. Nothing was changed",
            hint="'qmpcommit window --close' does that",
            vm=vm.name,
            disk=disk.name,
        )
    if active.read_only:
        raise WindowError(
            f"{disk} of {vm.name} {READ_ONLY}. {active.filename} stands still already, and can be"
            " read without a window. Nothing was changed",
            vm=vm.name,
            disk=disk.name,
        )
    check_idle(vm.name, disk)
    check_nameable(active, vm.name, disk.name)
    path = absolute(active, vm.cwd)
    if overlay_dir is None and is_device(path):
        raise WindowError(
            f"{disk} of {vm.name} is the block device {path}, and its overlay would be laid beside"
            " it, into the host's memory: name a folder for it. Nothing was changed",
            hint="--overlay-dir DIR names it",
            vm=vm.name,
            disk=disk.name,
        )
    folder = os.path.join(vm.cwd or "", overlay_dir or os.path.dirname(path))
    stem = os.path.basename(path).removesuffix(".qcow2")
    filename = os.path.join(folder, f"{stem}{MARK}{window}.qcow2")
    if filename in others:
        filename = os.path.join(folder, f"{stem}{MARK}{window}.{number}.qcow2")
    plan = Plan(
        vm=vm.name,
        disk=disk,
        top=active,
        base=active,
        job_id=f"{JOB_PREFIX}w{window[-8:]}-{number}",
        two_phase=True,
        policy=Pivot(),
    )
    return plan, filename


async def _check_closing(vm: VM, plan: Plan, graph: BlockGraph) -> None:
    """Raise `WindowError` where the window could be opened, and not be closed again."""
    told = await asyncio.to_thread(
        lambda: list(closing_objections(graph, plan, pid=vm.peer_pid, cwd=vm.cwd))
    )
    if told:
        raise WindowError(
            f"a window over {plan.disk} of {vm.name} could not be closed again: {'; '.join(told)}."
            " Nothing was changed",
            vm=vm.name,
            disk=plan.disk.name,
        )


async def _undo(vm: VM, overlays: Sequence[FreshOverlay], claims: Mapping[str, Claim]) -> None:
    """What was laid nevertheless (its reply was lost) is committed back; the rest is removed."""
    try:
        laid = {w.node_name for w in await windows(vm)}
    except QmpCommitError:
        return  # the VM is away: `windows` finds them when it is back
    left = [Frozen("", "", o.filename, o.node) for o in overlays if o.node in laid]
    for overlay in overlays:
        if overlay.node not in laid:
            try:
                await overlay.undo()
            except QmpCommitError as error:  # why there is no window is the news
                vm.log.warning("window_remains", what=overlay.filename, message=str(error))
    if left:
        held = dict(zip((each.filename for each in overlays), claims.values(), strict=True))
        await _close(vm, left, None, held)


async def _close(
    vm: VM,
    frozen: Collection[Frozen],
    bandwidth: int | str | None,
    claims: dict[str, Claim],
    override: Collection[str] = (),
) -> list[CommitOutcome]:
    """Commit all overlays back; raises `WindowError` that names those which stay.

    `claims` are those of their disks, by the overlays; those that are missing are added.
    """

    async def merge(each: Frozen) -> CommitOutcome | None:
        if each.overlay not in claims:
            claim = await claim_named(vm, each, override)
            if claim is not None:
                claims[each.overlay] = claim
        return await merge_back(vm, each, bandwidth, claim=claims.get(each.overlay))

    ends = await all_ended(map(merge, frozen), QmpCommitError)
    outcomes = [end for end in ends if isinstance(end, CommitOutcome)]
    failed = [
        (each, end)
        for each, end in zip(frozen, ends, strict=True)
        if isinstance(end, QmpCommitError)
    ]
    if failed:
        hints = [error.hint for _, error in failed if isinstance(error, QmpCommitError)]
        what = "; ".join(
            f"{each.overlay}: {error.message}"
            for each, error in failed
            if isinstance(error, QmpCommitError)
        )
        text = (
            f"the window on {vm.name} could not be closed. These overlays stay, for they hold what"
            f" was written since it was opened: {what}. Nothing is lost; close it again"
        )
        hint = f"'qmpcommit window --close {vm.address}' does that"
        hint = ". ".join([*dict.fromkeys(filter(None, hints)), hint])
        if any(isinstance(error, (MonitorLost, VMGone)) for _, error in failed):
            text += (
                ". If its QEMU has ended, start the VM from that file, never from the one below,"
                " before you close it; or merge it while the VM is off"
            )
            hint += (
                ", and where the VM is off 'qmpcommit commit --offline"
                f" {shlex.quote(failed[0][0].overlay)} --shallow --pivot --delete' merges it"
            )
        raise WindowError(
            text,
            hint=hint,
            vm=vm.name,
            overlays=[each.overlay for each, _ in failed],
            outcomes=[outcome.model_dump(mode="json") for outcome in outcomes],
        )
    vm.log.info("window_closed", disks=[each.disk for each in frozen])
    return outcomes
