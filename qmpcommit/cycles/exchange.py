"""What lies under an active layer is exchanged: the disk starts again from the overlay's base.

A device can't be moved to another image, but a fresh, empty overlay can be laid over the old one
and reopened with the base as its backing file. Nobody uses the old one then. The guest stands
still meanwhile, for what it has in memory belongs to a disk that is no more.

Each step is noted before it is taken, and all of it is safe to repeat by another process: what
was done is asked of the block graph. The fresh overlay names the base in its header from the
beginning, so that what is found there after a crash of QEMU is a disk that starts from the base.

Rests on ``stop``, ``blockdev-snapshot``, ``blockdev-reopen`` (``x-blockdev-reopen`` before QEMU
6.1), ``system_reset`` and ``cont``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qmpcommit.block.bitmaps import bitmaps_of
from qmpcommit.block.chain import Disk, Image, read_disks
from qmpcommit.block.graph import BlockGraph
from qmpcommit.block.identity import FileId, OpenFiles
from qmpcommit.commit.checks.replaced import check_named, nameless
from qmpcommit.commit.claim import number_of
from qmpcommit.commit.headers import wrong_headers
from qmpcommit.commit.migration import look_at_owner
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Abort, Pivot
from qmpcommit.commit.request import Request
from qmpcommit.commit.stale_layers import Around, close_layers, remove_file, users
from qmpcommit.errors import (
    ChainError,
    CommandRefused,
    CommitFailed,
    JobNotFound,
    MonitorLost,
    QmpCommitError,
    VMGone,
    VMStateError,
)
from qmpcommit.guest.hold import Hold
from qmpcommit.guest.marks import mark_of_discard, set_mark, unmark
from qmpcommit.guest.run_state import runs
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.claim import Claim
    from qmpcommit.commit.vm import VM

Guest = Literal["reset", "stop"]
"""What becomes of the guest: it is reset and goes on, if it ran, or it stays stopped."""

Note = Callable[..., Awaitable[None]]
"""Writes a step down, with what another process has to know: ``await note(step, **facts)``."""

OnDecision = Callable[[Literal["exchange", "back"]], Awaitable[object]]
"""Awaited when all overlays lie, before the first disk is exchanged; or before any is put back."""


class Stuck(NamedTuple):
    """What could not be put back, in words, and for which error."""

    text: str
    error: QmpCommitError


class Exchange:
    """Exchanges `plan.top`, the active layer, for the new file `filename` over `plan.base`.

    `file` is the old overlay's, to be deleted when nothing uses it any more; None to leave it.
    `noted` is what a former process has noted last, all facts together; empty where none has.
    `running` is whether the guest ran before it was stopped; None: it is not known yet. `claim` is
    what holds the disk meanwhile, `warnings` is what is to be said of it.
    """

    def __init__(
        self,
        vm: VM,
        plan: Plan,
        filename: str,
        *,
        guest: Guest,
        note: Note,
        file: FileId | None = None,
        noted: Mapping[str, Any] | None = None,
        asked: OverlayOptions | None = None,
    ) -> None:
        self.vm, self.plan, self.filename, self._guest = vm, plan, filename, guest
        self._note, self._file = note, file
        noted = noted or {}
        self.over = noted.get("step") == "exchanged"
        self._let_go_before = bool(noted.get("let_go"))
        self.running: bool | None = noted.get("running")
        self.warnings: list[str] = list(noted.get("warnings") or [])
        self.begun = self.running is not None
        self._again = self._marked = self.begun
        self._fresh = FreshOverlay(vm, plan, filename, vm.cwd, asked=asked)
        self.hold: Hold | None = None
        self.claim: Claim | None = None
        if self._again:
            self._fresh.restore(stopped=False)

    # -- the steps, each of which does nothing where it was done -----------------------------------

    async def lay(self) -> None:
        """The fresh overlay over the old one, under a guest that stands still."""
        self.begun = True
        graph = await self.vm.graph()
        if self._laid(graph):
            return
        await asyncio.to_thread(self._check, graph)
        await self._note("stop", running=self.running)
        await self._fresh.make(again=self._again)
        if await runs(self.vm):
            self._marked = True
            await set_mark(self.vm, self._mark, "pause", resets=self._guest == "reset")
            await self.held.stop()
        _, graph = await self.vm.look()  # others may have changed the chain, or migrate it
        await asyncio.to_thread(self._check, graph)
        await self._fresh.check_named()
        await self._note("lay")
        arguments = {"node": self.plan.top.node_name, "overlay": self._fresh.node}
        await self.vm.execute("blockdev-snapshot", arguments)

    async def swap(self) -> None:
        """The base below the fresh overlay, in the old one's place."""
        graph = await self.vm.graph()
        if self._below(graph) != self.plan.base.node_name:
            await self._check_still("Nothing was discarded")
            await look_at_owner(self.vm)
            await self._note("reopen")
            await self._reopen(graph, self.plan.base)
            await self._check_still("Nothing was discarded; but reset it, for it saw the base")
        self._confirm(await self.vm.graph())

    async def _check_still(self, state: str) -> None:
        """What a guest writes meanwhile is its former disk's: the empty overlay is not empty then.

        It may be let go on by another process of ours, or by a person.
        """
        if self.held.disturbed or await runs(self.vm):
            raise CommitFailed(
                f"somebody let the guest of {self.vm.name} go on while the overlay of"
                f" {self.plan.disk} was being discarded. {state}",
                vm=self.vm.name,
                disk=self.plan.disk.name,
            )

    async def close(self) -> None:
        """Nobody uses the old one any more."""
        await self._note("close")
        await self._fresh.look()
        graph = await self.vm.graph()
        gone = [*self._bitmaps_gone(graph), *await asyncio.to_thread(self._data_gone, graph)]
        warnings = await close_layers(self.vm, [self.plan.top])
        self.warnings = [*self._fresh.warnings, *gone, *warnings]

    def _data_gone(self, graph: BlockGraph) -> list[str]:
        """What is thrown away stays in its file, but if that has no name it ends with its node."""
        opened = OpenFiles.of(graph, self.vm.peer_pid, cwd=self.vm.cwd)
        why = nameless(graph, opened, self.plan.top.node_name)
        held = f"what {self.plan.top.filename} held is in no file that can be found"
        return [f"{held}: {why}"] if why else []

    def _bitmaps_gone(self, graph: BlockGraph) -> list[str]:
        """The old one's bitmaps don't mark what comes back from the base, so none goes on."""
        top = self.plan.top.node_name
        names = [each.name for each in bitmaps_of(graph, top)] if top in graph.nodes else []
        if not names:
            return []
        return [
            f"the dirty bitmaps {', '.join(names)} went with {self.plan.top.filename}, for they did"
            " not mark what is as in the base again: the next backup has to be a full one"
        ]

    async def let_go(self) -> None:
        """Reset the guest and have it go on, as asked; a second reset does no harm."""
        status = await _status(self.vm)
        if self._guest == "stop" or status is None:
            self.held.leave_stopped()
            return
        if self._let_go_before and status.get("running"):
            return  # a former process had come as far as this
        await self._note("guest", let_go=True)
        await self.vm.execute("system_reset")
        if self.running:
            await self.held.let_go()

    async def went_on(self) -> bool:
        """Whether somebody has let the guest go on since a former process held it for this.

        It writes what it has in memory, which belongs to what was thrown away.
        """
        return self._again and not self._let_go_before and await runs(self.vm)

    async def tidy(self) -> None:
        """Delete the old one, where that was asked for, and note the end with all warnings."""
        self.warnings += await self._wrong_headers()
        self.warnings += await self._delete(self._file) if self._file is not None else []
        await self._note("exchanged", warnings=self.warnings)

    async def _wrong_headers(self) -> list[str]:
        base = self.plan.base.node_name
        try:
            wrong = await wrong_headers(self.vm, self.vm.cwd, base, rewritten=True)
        except QmpCommitError as error:  # the guest has gone on, and may have ended since
            self.vm.log.warning("headers_not_seen", disk=self.plan.disk.name, why=error.message)
            return []
        return [str(each) for each in wrong]

    async def back(self) -> None:
        """Have the old overlay again, however far it was; the guest stands still still."""
        job_id = f"{self.plan.job_id}-back"
        if self._again:
            await self._end_former(job_id)
        graph = await self.vm.graph()
        if not self._laid(graph) or not users(graph, self._fresh.node):
            await self._fresh.undo()
            return
        if self._below(graph) != self.plan.top.node_name:
            await self._reopen(graph, self.plan.top)
        override = ["on-disk-backing"]  # the empty one names the base already
        request = Request(
            self._fresh.node, Pivot(), shallow=True, delete=True, override=override, job_id=job_id
        )
        # Also during a migration: its destination knows the disk as it will be then.
        around = Around(in_migration=True)
        seen = None, await self.vm.graph()
        job = await self.vm.prepare(request, around, seen=seen, claim=self.claim)
        job = await self.vm.launch(job, override=override)
        await job.wait()

    async def _end_former(self, job_id: str) -> None:
        """End what a killed process has begun of `back`: the empty overlay is committed anew."""
        with suppress(JobNotFound, CommitFailed):
            job = await self.vm.adopt(job_id, policy=Abort(), pending="cancel")
            await job.wait()
        with suppress(CommandRefused):  # which of both ends it came to, the graph tells
            await self.vm.execute("job-dismiss", {"id": job_id})

    async def go_on(self) -> None:
        """The guest goes on as before, after `back`."""
        if self.running:
            await self.held.let_go()

    async def unmark(self) -> None:
        """The guest does not stand still for this any more, or is to."""
        if self._marked:
            self._marked = False
            for resets in (False, True) if self._again else (self._guest == "reset",):
                await unmark(self.vm, self._mark, "pause", resets=resets)

    @property
    def _mark(self) -> str:
        return mark_of_discard(number_of(self.plan.disk))

    async def forget(self) -> None:
        """Note that all of it is as before, and nothing is known of the guest any more."""
        await self._note("back", running=None, let_go=False)

    # -- what they need ---------------------------------------------------------------------------

    @property
    def held(self) -> Hold:
        """The guest, which stands still for all exchanges of its disks."""
        if self.hold is None:
            self.hold = Hold(self.vm, paused=bool(self.running))
        return self.hold

    def _laid(self, graph: BlockGraph) -> bool:
        node = graph.nodes.get(self._fresh.node)
        return node is not None and "backing" in node.children

    def _disk(self, graph: BlockGraph) -> Disk | None:
        """The disk whose active layer is the old overlay."""
        for disk in read_disks(graph):
            if disk.active is not None and disk.active.node_name == self.plan.top.node_name:
                return disk
        return None

    def _below(self, graph: BlockGraph) -> str | None:
        return next(iter(graph.chain(self._fresh.node)[1:2]), None)

    def _check(self, graph: BlockGraph) -> None:
        disk = self._disk(graph)
        if disk is not None:
            opened = OpenFiles.of(graph, self.vm.peer_pid, cwd=self.vm.cwd)
            check_named(self.vm.name, graph, opened, disk, 1)
        below = [image.node_name for image in disk.chain[1:2]] if disk is not None else []
        if disk is None or below != [self.plan.base.node_name] or disk.jobs:
            why = f"it has a block job ({', '.join(disk.jobs)})" if disk and disk.jobs else (
                "its chain is another one by now"
            )  # fmt: skip
            raise ChainError(
                f"the overlay of {self.plan.disk} of {self.vm.name} can't be discarded: {why}."
                " Nothing was discarded",
                vm=self.vm.name,
                disk=self.plan.disk.name,
            )

    async def _reopen(self, graph: BlockGraph, below: Image) -> None:
        options = {  # all that it was opened with, or QEMU has its defaults again
            **await self._fresh.options(graph),
            "driver": "qcow2",
            "node-name": self._fresh.node,
            "file": graph.nodes[self._fresh.node].children["file"],
            "backing": below.over,
        }
        try:
            await self.vm.execute("blockdev-reopen", {"options": [options]})
        except CommandRefused as error:
            if error.error_class != "CommandNotFound":
                raise
            await self.vm.execute("x-blockdev-reopen", options)

    def _confirm(self, graph: BlockGraph) -> None:
        """What QEMU has now is believed, not what it answered."""
        wanted = [self._fresh.node, self.plan.base.node_name]
        for disk in read_disks(graph):
            if [image.node_name for image in disk.chain[:2]] == wanted:
                return
        raise CommitFailed(
            f"the fresh overlay {self.filename} is not what {self.plan.disk} of {self.vm.name}"
            " writes to, although QEMU took all commands; look at its chain before the guest goes"
            " on",
            vm=self.vm.name,
            disk=self.plan.disk.name,
        )

    async def _delete(self, file: FileId) -> list[str]:
        image, cwd = self.plan.top, self.vm.cwd
        path = os.path.join(cwd or os.getcwd(), image.filename)
        if not await asyncio.to_thread(os.path.lexists, path):
            return []  # a former process had come as far as this
        try:
            _, graph = await self.vm.look()
        except QmpCommitError as error:
            return [f"{image.filename} stays: {error.message}"]
        problem = await asyncio.to_thread(
            remove_file,
            image,
            file,
            graph=graph,
            base=self.plan.base,
            cwd=cwd,
            pid=self.vm.peer_pid,
        )
        if problem is None and image.data_file:
            problem = (
                f"{image.data_file} stays: it held the data of {image.filename}, which is gone"
            )
        return [problem] if problem is not None else []


async def exchange_all(exchanges: Sequence[Exchange], decide: OnDecision) -> None:
    """Carry them out, or what is left of them: all or none.

    No guest goes on before all its disks, and those of all others, are exchanged. What
    `decide` writes down tells a recovery which way each of them has to go: before
    "exchange" all can be put back (`put_back`), after it all can be exchanged (`complete`).

    Raises `ChainError` or `CommitFailed` where that can't be: the disks and the guests are then as
    they were, or the message names those that are not. What `Monitor.execute` raises where a VM is
    away: what is its own stays as it is until that is repeated, all else is as it was; or, where
    all were exchanged already, all else is done.
    """
    left = [each for each in exchanges if not each.over]
    ran = {each.vm: each.running for each in exchanges if each.running is not None}
    begun: list[Exchange] = []
    async with _standing_still(left):
        for each in left:  # before the first of a guest's disks has it stopped
            each.running = ran[each.vm] = ran[each.vm] if each.vm in ran else await each.held.ran()
            each.held.paused = each.running
        try:
            for at in left:
                begun.append(at)
                await at.lay()
            await decide("exchange")
            for at in left:
                await at.swap()
        except (CommandRefused, CommitFailed, ChainError, VMStateError) as error:
            await decide("back")
            stuck = await to_the_end(put_back(begun))
            raise _not_exchanged(at, error, stuck) from error
        except QmpCommitError:
            await decide("back")
            await to_the_end(put_back([each for each in begun if each.vm is not at.vm]))
            raise
        await _finish(left)


@asynccontextmanager
async def _standing_still(exchanges: Sequence[Exchange]) -> AsyncIterator[None]:
    """Their guests stand still for all of a guest's disks together, until it is let go on.

    One of which nothing was begun goes on for whoever has handed it over meanwhile.
    """
    missing = [each for each in exchanges if each.hold is None]
    held: dict[VM, Hold] = {}
    for each in missing:
        if each.vm not in held:
            held[each.vm] = Hold(each.vm, paused=bool(each.running))
        each.hold = held[each.vm]
    try:
        yield
    finally:
        begun = {each.vm for each in exchanges if each.begun}
        await to_the_end(_let_go({vm: hold for vm, hold in held.items() if vm not in begun}))
        for hold in held.values():
            hold.leave()
        for each in missing:
            each.hold = None


async def _let_go(held: Mapping[VM, Hold]) -> None:
    for hold in held.values():
        with suppress(QmpCommitError):
            await hold.give_up()


async def complete(exchanges: Sequence[Exchange]) -> None:
    """Carry out what is left after the decision.

    Raises `CommitFailed` where QEMU does not exchange one of them: all of these are then as they
    were, or the message names those that are not. What `Monitor.execute` raises.
    """
    left = [each for each in exchanges if not each.over]
    async with _standing_still(left):
        try:
            for at in left:
                await at.swap()
        except (CommandRefused, CommitFailed, VMStateError) as error:
            stuck = await to_the_end(put_back(left))
            raise _not_exchanged(at, error, stuck) from error
        await _finish(left)


async def _finish(exchanged: Sequence[Exchange]) -> None:
    """All are exchanged: the guests go on, also where another's VM is away by now."""
    done: list[Exchange] = []
    lost: list[QmpCommitError] = []
    by_vm: dict[VM, list[Exchange]] = {}
    for each in exchanged:
        by_vm.setdefault(each.vm, []).append(each)
    for mine in by_vm.values():
        try:
            for each in mine:
                await each.close()
            went_on = await mine[-1].went_on()
            await mine[-1].let_go()
            for each in mine:
                await each.unmark()
            if went_on or mine[-1].held.disturbed:
                for each in mine:
                    each.warnings.append(
                        f"somebody let the guest go on before it was reset: {each.filename} may"
                        " hold what it wrote then, which belongs to what was discarded. Discard"
                        " again"
                    )
        except (MonitorLost, VMGone) as error:
            lost.append(_discarded_before(mine, error))
        except QmpCommitError as error:
            lost.append(error)
        else:
            done += mine
    for each in done:
        await each.tidy()
    if lost:
        raise lost[0]


async def put_back(begun: Sequence[Exchange]) -> list[Stuck]:
    """What could not be put back, and why; a guest goes on when all its disks are back."""
    async with _standing_still(begun):
        return await _put_back(begun)


async def _put_back(begun: Sequence[Exchange]) -> list[Stuck]:
    stuck: dict[VM, Stuck] = {}
    for each in reversed(begun):
        try:
            await each.back()
        except QmpCommitError as error:
            text = (
                f"{each.plan.disk} of {each.vm.name} could not be put back ({error.message}): its"
                f" guest stands still, and {each.plan.top.filename} is whole; discard again, or"
                " boot that"
            )
            stuck[each.vm] = Stuck(text, error)
    for each in {each.vm: each for each in begun if each.vm not in stuck}.values():
        try:
            await each.go_on()
        except QmpCommitError as error:
            text = (
                f"the guest of {each.vm.name} may be stopped still ({error.message}): let it go on"
                " with 'cont'"
            )
            stuck[each.vm] = Stuck(text, error)
    for each in begun:
        if each.vm not in stuck:
            await each.unmark()
            await each.forget()
    return list(stuck.values())


def _discarded_before(mine: Sequence[Exchange], error: QmpCommitError) -> QmpCommitError:
    """QEMU went while its guest was let go on; with ``-no-reboot`` it ends at the reset."""
    files = " and ".join(f"{each.filename} ({each.plan.disk})" for each in mine)
    told = type(error)(
        f"{error.message}. What was to be discarded is: if QEMU has ended, boot {files}, and never"
        f" {' or '.join(each.plan.top.filename for each in mine)}",
        **error.facts,
    )
    told.__cause__ = error
    return told


def _not_exchanged(at: Exchange, error: QmpCommitError, stuck: Sequence[Stuck]) -> QmpCommitError:
    where: dict[str, object] = {"vm": at.vm.name, "disk": at.plan.disk.name}
    text = error.message
    if isinstance(error, CommandRefused):
        text = (
            f"QEMU does not exchange the overlay of {at.plan.disk} of {at.vm.name}: {error.desc}."
            " Nothing was discarded"
        )
    kind: type[QmpCommitError] = CommitFailed
    if isinstance(error, (ChainError, VMStateError)):
        kind, where = type(error), {**error.facts, **where}
    return kind(". But ".join([text, *(each.text for each in stuck)]), **where)


async def _status(vm: VM) -> dict[str, object] | None:
    """None for a storage daemon."""
    try:
        found: dict[str, object] = await vm.execute("query-status")
    except CommandRefused:
        return None
    return found
