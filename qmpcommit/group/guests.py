"""The guests of a group commit that are held still, each for its own disks.

For the one instant of all disks each is quiesced when all are READY, before the first of them is
held, and goes on when its own have ended; or at once where the group has given up, or at its limit.

For recycles each is paused once: a recycle by itself pauses its guest, and lets it go on when its
fresh overlay lies, so that of several disks of one guest the first would let it write to the bases
of the others. It goes on when the last of its disks has its overlay, whatever that takes.

Rests on what `Hold` rests on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from qmpcommit.commit.job import CommitJob
from qmpcommit.errors import QmpCommitError, QuiesceFailed
from qmpcommit.guest.hold import Hold, Step
from qmpcommit.tasks import stop, to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM

OnQuiet = Callable[["VM"], object]
"""Called when the guest of a VM stands still."""

OnFailure = Callable[["VM", str, Exception | None], None]
"""Called when it can't, or does no longer, though its disks have not ended; with why."""


class Guests:
    """Holds guests still; `seconds` is for how long each was, `problems` are for people to read.

    For `limit` seconds, or without one until its jobs are settled.
    """

    def __init__(self, limit: float | None, on_quiet: OnQuiet, on_failure: OnFailure) -> None:
        self.seconds: dict[VM, float] = {}
        self.problems: list[str] = []
        self._limit, self._on_quiet, self._on_failure = limit, on_quiet, on_failure
        self._given_up = asyncio.Event()
        self._beginning: dict[VM, asyncio.Event] = {}
        self._holding: dict[VM, asyncio.Task[None]] = {}

    def begin(
        self,
        holds: Mapping[VM, Hold],
        jobs: Mapping[VM, Sequence[CommitJob]],
        until: Callable[[VM], Awaitable[object]] | None = None,
    ) -> None:
        """Hold these guests, all at once, each until its jobs are settled and `until` ends."""
        for vm, hold in holds.items():
            self._beginning[vm] = asyncio.Event()
            holding = self._hold(vm, hold, jobs[vm], until)
            self._holding[vm] = asyncio.create_task(holding, name=f"hold of {vm.name}")

    async def pause(self, recycles: Mapping[VM, Sequence[CommitJob]], owner: str) -> None:
        """Pause those that run, and wait until they stand still, or that has failed.

        In the ledgers of all jobs of a guest ``stop`` is noted before it is sent, and ``cont`` when
        it was: whoever takes them up in between has to have it paused as long. Raises what
        `Monitor.execute` and their ledgers raise, with nothing paused.
        """
        holds = {
            vm: Hold(vm, "pause", owner, note=partial(_note, jobs)) for vm, jobs in recycles.items()
        }
        try:
            for hold in holds.values():  # before the first, for the paused don't wait for a ledger
                await hold.begin()
        except BaseException:
            await to_the_end(self._leave(holds))
            raise
        self.begin(holds, recycles)
        for beginning in list(self._beginning.values()):
            await beginning.wait()

    async def _leave(self, holds: Mapping[VM, Hold]) -> None:
        """None of them is held yet: they go on where others had paused them."""
        for vm, hold in holds.items():
            try:
                await hold.release()
            except QmpCommitError as error:
                hold.leave()
                self._stays(vm, hold, error)

    def give_up(self) -> None:
        """Let go on who has a limit, or is about to be held: that is not waited for."""
        if self._given_up.is_set():
            return
        self._given_up.set()
        for vm in self._beginning:
            self._holding[vm].cancel()

    async def goes_on(self, vm: VM) -> None:
        """Wait until this guest goes on again, if it is held."""
        if vm in self._holding:
            await asyncio.wait({self._holding[vm]})

    async def over(self) -> None:
        """Wait until all go on again; their jobs have to have ended, or the group given up."""
        if self._holding:
            await to_the_end(self._wait())

    async def _wait(self) -> None:
        await asyncio.wait(self._holding.values())

    async def _hold(
        self,
        vm: VM,
        hold: Hold,
        jobs: Sequence[CommitJob],
        until: Callable[[VM], Awaitable[object]] | None,
    ) -> None:
        try:
            async with hold.within(self._limit):
                self._begun(vm)
                self._on_quiet(vm)
                try:
                    await self._disks_have_ended(jobs)
                    if until is not None:
                        await until(vm)
                except asyncio.CancelledError:
                    # Its limit: no base may be finalized that is written to from here on.
                    why = f"its guest stood still for {self._limit:g} s, its limit, and goes on"
                    self._on_failure(vm, why, None)
                    raise
                self._look_at(vm, hold, jobs)
        except asyncio.CancelledError as error:
            self.problems += getattr(error, "__notes__", ())
        except Exception as error:  # the notes' own too
            if isinstance(error, QuiesceFailed) and error.frozen:
                self._stays(vm, hold, error)
            why = error.message if isinstance(error, QmpCommitError) else repr(error)
            self._on_failure(vm, f"its guest could not be quiesced ({why})", error)
        finally:
            self._begun(vm)
        self.problems += [hold.remark] if hold.remark else []
        if hold.seconds is not None:
            self.seconds[vm] = hold.seconds

    def _begun(self, vm: VM) -> None:
        beginning = self._beginning.pop(vm, None)
        if beginning is not None:
            beginning.set()

    def _look_at(self, vm: VM, hold: Hold, jobs: Sequence[CommitJob]) -> None:
        if hold.disturbed and any(job.state.guest.overlaid for job in jobs):
            self.problems.append(
                f"somebody let the guest of {vm.name} go on before its fresh overlays lay, so"
                " that its bases may hold what it wrote after their instant"
            )

    def _stays(self, vm: VM, hold: Hold, error: QmpCommitError) -> None:
        if hold.how == "agent":
            self.problems.append(error.message)
            return
        cause = error.__cause__
        said = cause.message if isinstance(cause, QmpCommitError) else error.message
        self.problems.append(
            f"the guest of {vm.name} may be paused still ({said}): let it go on with 'cont'"
        )

    async def _disks_have_ended(self, jobs: Sequence[CommitJob]) -> None:
        """Wait until they have, or the group has given up what has a limit."""
        if self._limit is None:
            await _settled(jobs)
            return
        settling = asyncio.create_task(_settled(jobs))
        giving_up = asyncio.create_task(self._given_up.wait())
        try:
            await asyncio.wait({settling, giving_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await stop(settling)
            await stop(giving_up)


async def _settled(jobs: Sequence[CommitJob]) -> None:
    for job in jobs:
        await job.settled()


async def _note(jobs: Sequence[CommitJob], step: Step) -> None:
    """In the ledgers of these jobs."""
    if step != "release":
        for job in jobs:  # it does go on, and is continued once more at the worst
            await job.note("stop" if step == "hold" else "cont")
