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
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from qmpcommit.block.chain import Disk, absolute, find_disk, read_disks
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.plan import JOB_PREFIX, Plan
from qmpcommit.commit.policy import Pivot
from qmpcommit.commit.quiesce import How, quiesced
from qmpcommit.commit.recycle import FreshOverlay
from qmpcommit.errors import JobConflict, QmpCommitError, WindowError
from qmpcommit.tasks import to_the_end
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from qmpcommit.session import Session

MARK = ".qmpcommit-window-"
"""In the name of each overlay of a window, before the window's own number."""

STAMP = "%Y%m%dT%H%M%SZ"

LIMIT = 10.0
"""Seconds for which a guest may be quiesced while the overlays are laid."""


@record
class Frozen(Record):
    """One disk in a window: `filename` stands still, and so does all below it.

    `overlay` is the file that the guest writes to meanwhile, `node_name` its node.
    """

    disk: str
    filename: str
    overlay: str
    node_name: str


@record
class OpenWindow(Record):
    """An overlay of a window that is open: its age in seconds, and its size in bytes.

    Both are None where its file can't be looked at from here.
    """

    disk: str
    window: str
    filename: str
    overlay: str
    age: float | None = None
    size: int | None = None


class Window(Mapping[str, Frozen]):
    """The frozen disks of an open window, by the names that they were asked for by.

    `quiesced` is for how many seconds the guest was frozen or paused; `outcomes` are the commits
    that closed the window.
    """

    def __init__(self, name: str, frozen: Mapping[str, Frozen]) -> None:
        self.name = name
        self.quiesced: float | None = None
        self.outcomes: list[CommitOutcome] = []
        self._frozen = dict(frozen)

    def __getitem__(self, disk: str) -> Frozen:
        return self._frozen[disk]

    def __iter__(self) -> Iterator[str]:
        return iter(self._frozen)

    def __len__(self) -> int:
        return len(self._frozen)


@asynccontextmanager
async def snapshot(
    vm: Session,
    disks: Sequence[str],
    *,
    overlay_dir: str | os.PathLike[str] | None = None,
    freeze: How | None = None,
    agent: str | os.PathLike[str] | None = None,
    bandwidth: int | str | None = None,
) -> AsyncIterator[Window]:
    """A window over these disks for the length of the block; see `Session.snapshot`."""
    window = await _open(vm, disks, overlay_dir, freeze, agent)
    try:
        yield window
    finally:
        window.outcomes = await to_the_end(_close(vm, list(window.values()), bandwidth))


async def windows(vm: Session) -> list[OpenWindow]:
    """The overlays of windows that are open on this VM, whoever opened them."""
    return [
        await asyncio.to_thread(_seen, disk, vm.cwd)
        for disk in await vm.disks()
        if disk.active is not None and MARK in disk.active.filename
    ]


async def close_windows(vm: Session, *, bandwidth: int | str | None = None) -> list[CommitOutcome]:
    """Close the windows that somebody left open; raises `WindowError` for those that stay."""
    left = [Frozen(w.disk, w.filename, w.overlay, "") for w in await windows(vm)]
    return await to_the_end(_close(vm, left, bandwidth))


def _seen(disk: Disk, cwd: str | None) -> OpenWindow:
    active = disk.active
    assert active is not None
    window = active.filename.rpartition(MARK)[2].partition(".")[0]
    below = disk.chain[1].filename if len(disk.chain) > 1 else ""
    try:
        found = os.stat(absolute(active, cwd))
    except OSError:
        return OpenWindow(disk.name, window, below, active.filename)
    size = found.st_blocks * 512
    return OpenWindow(disk.name, window, below, active.filename, _age(window), size)


def _age(window: str) -> float | None:
    """Seconds since a window was opened, which its name tells."""
    try:
        opened = datetime.strptime(window.partition("-")[0], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None
    return max(0.0, (datetime.now(UTC) - opened).total_seconds())


async def _open(
    vm: Session,
    names: Sequence[str],
    overlay_dir: str | os.PathLike[str] | None,
    freeze: How | None,
    agent: str | os.PathLike[str] | None,
) -> Window:
    if isinstance(names, str) or not names:
        raise WindowError("name the disks of the window as a list, at least one", vm=vm.name)
    _, graph = await vm.look()
    found = {name: find_disk(read_disks(graph), name, vm=vm.name, cwd=vm.cwd) for name in names}
    if len({disk.root for disk in found.values()}) < len(names):
        raise WindowError("a disk is named twice", vm=vm.name)
    window = f"{datetime.now(UTC).strftime(STAMP)}-{os.urandom(4).hex()}"
    overlays: dict[str, FreshOverlay] = {}
    for number, (name, disk) in enumerate(found.items()):
        overlays[name] = _fresh(vm, disk, window, number, overlay_dir)
    try:
        for overlay in overlays.values():
            await overlay.open()
        async with quiesced(vm, freeze, agent=agent, limit=LIMIT) as quiet:
            await _lay(vm, [(found[name], overlays[name]) for name in names])
    except BaseException as error:
        await to_the_end(_undo(vm, list(overlays.values())))
        if isinstance(error, QmpCommitError):
            error.add(vm=vm.name)
        raise
    made = Window(
        window,
        {
            name: Frozen(disk.name, _active(disk), overlays[name].filename, overlays[name].node)
            for name, disk in found.items()
        },
    )
    made.quiesced = quiet.seconds
    vm.log.info("window_open", window=window, disks=list(names))
    return made


def _active(disk: Disk) -> str:
    assert disk.active is not None
    return disk.active.filename


def _fresh(
    vm: Session,
    disk: Disk,
    window: str,
    number: int,
    overlay_dir: str | os.PathLike[str] | None,
) -> FreshOverlay:
    """The overlay of one disk, not made yet; raises where the disk is not fit for it."""
    active = disk.active
    if active is None:
        raise WindowError(f"{disk} of {vm.name} has no medium", vm=vm.name, disk=disk.name)
    if MARK in active.filename:
        raise WindowError(
            f"{disk} of {vm.name} is in a window already, and writes to {active.filename}: close"
            " it first (qmpcommit window --close). Nothing was changed",
            vm=vm.name,
            disk=disk.name,
        )
    if disk.jobs:
        raise JobConflict(
            f"{disk} of {vm.name} has a block job ({', '.join(disk.jobs)}); wait for its end."
            " Nothing was changed",
            vm=vm.name,
            disk=disk.name,
        )
    path = absolute(active, vm.cwd)
    folder = os.fspath(overlay_dir) if overlay_dir is not None else os.path.dirname(path)
    stem = os.path.basename(path).removesuffix(".qcow2")
    filename = os.path.join(folder, f"{stem}{MARK}{window}.qcow2")
    plan = Plan(
        vm=vm.name,
        disk=disk,
        top=active,
        base=active,
        job_id=f"{JOB_PREFIX}w{window[-8:]}-{number}",
        two_phase=True,
        policy=Pivot(),
    )
    return FreshOverlay(vm, plan, filename, vm.cwd)


async def _lay(vm: Session, pairs: Sequence[tuple[Disk, FreshOverlay]]) -> None:
    """All overlays at one instant, or none."""
    actions = [
        {
            "type": "blockdev-snapshot",
            "data": {"node": disk.active.node_name, "overlay": overlay.node},
        }
        for disk, overlay in pairs
        if disk.active is not None
    ]
    await vm.execute("transaction", {"actions": actions})


async def _undo(vm: Session, overlays: Sequence[FreshOverlay]) -> None:
    """What was laid nevertheless (its reply was lost) is committed back; the rest is removed."""
    try:
        laid = {w.overlay for w in await windows(vm)}
    except QmpCommitError:
        return  # the VM is away: `windows` finds them when it is back
    left = [Frozen("", "", o.filename, o.node) for o in overlays if o.filename in laid]
    for overlay in overlays:
        if overlay.filename not in laid:
            await overlay.undo()
    if left:
        await _close(vm, left, None)


async def _close(
    vm: Session, frozen: Sequence[Frozen], bandwidth: int | str | None
) -> list[CommitOutcome]:
    """Commit all overlays back; raises `WindowError` that names those which stay."""

    async def one(each: Frozen) -> CommitOutcome:
        job = await vm.commit(
            each.overlay, policy=Pivot(), shallow=True, delete=True, bandwidth=bandwidth
        )
        return await job.wait()

    ends = await asyncio.gather(*(one(each) for each in frozen), return_exceptions=True)
    outcomes = [end for end in ends if isinstance(end, CommitOutcome)]
    failed = [(each, end) for each, end in zip(frozen, ends, strict=True) if end not in outcomes]
    for _, error in failed:
        if not isinstance(error, QmpCommitError):
            assert isinstance(error, BaseException)
            raise error
    if failed:
        what = "; ".join(f"{each.overlay}: {error}" for each, error in failed)
        raise WindowError(
            f"the window on {vm.name} could not be closed. The guest still writes to: {what}."
            f" Nothing is lost; close it with 'qmpcommit window --close {vm.address}'",
            vm=vm.name,
            overlays=[each.overlay for each, _ in failed],
            outcomes=[outcome.model_dump(mode="json") for outcome in outcomes],
        )
    vm.log.info("window_closed", disks=[each.disk for each in frozen])
    return outcomes
