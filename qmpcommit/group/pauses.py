"""The guests of a group's recycles: each is paused once, for all of its disks.

A recycle pauses its own guest, and lets it go on when its fresh overlay lies. With several disks
of one guest the first would let it write to the bases of the others. So the group pauses each
guest, and lets it go on when the last of its disks has its overlay.

Rests on ``query-status``, ``stop`` and ``cont``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qmpcommit.commit.job import CommitJob
from qmpcommit.errors import QmpCommitError
from qmpcommit.guest.marks import set_mark, unmark
from qmpcommit.guest.run_state import Still
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM


class Pauses:
    """Pauses guests; `seconds` is for how long each was, `problems` are for people to read.

    In the ledgers of all jobs of a guest ``stop`` is noted before it is sent, and ``cont`` when
    it was: between the two the guest stays paused until the last of them has settled, and whoever
    takes them up has to do the same. A mark in QEMU, of the `owner`, tells of it.
    """

    def __init__(self, recycles: Mapping[VM, Sequence[CommitJob]], owner: str) -> None:
        self.seconds: dict[VM, float] = {}
        self.problems: list[str] = []
        self._recycles, self._owner = recycles, owner
        self._unmarked: set[VM] = set()
        self._still: dict[VM, Still] = {}
        self._thawing: dict[VM, asyncio.Task[None]] = {}

    async def pause(self) -> None:
        """Pause those that run; raises what `Monitor.execute` and their ledgers raise."""
        self._still = {vm: Still(vm) for vm in self._recycles}
        try:
            await self._pause()
        finally:
            await to_the_end(self._give_up())

    async def _give_up(self) -> None:
        """Those that are not paused here go on where others had paused them."""
        for vm, still in self._still.items():
            if vm not in self._thawing:
                try:
                    await still.give_up()
                except QmpCommitError as error:
                    self._stays(vm, error)

    async def _pause(self) -> None:
        running = [vm for vm, still in self._still.items() if await still.ran()]
        for vm in running:  # all of it before the first, for the paused don't wait for a ledger
            for job in self._recycles[vm]:
                await job.note("stop")
        for vm in running:
            # It is let go on even if the reply to the command is lost.
            self._thawing[vm] = asyncio.create_task(self._thaw(vm, self._recycles[vm]))
        await asyncio.gather(*(self._mark(vm) for vm in running))
        await asyncio.gather(*(self._still[vm].stop() for vm in running))

    async def _mark(self, vm: VM) -> None:
        if not await set_mark(vm, self._owner, "pause"):
            self._unmarked.add(vm)

    async def goes_on(self, vm: VM) -> None:
        """Wait until this guest goes on again, if it was paused."""
        if vm in self._thawing:
            await asyncio.wait({self._thawing[vm]})

    async def over(self) -> None:
        """Wait until all go on again; their jobs have to have ended."""
        if self._thawing:
            await to_the_end(self._wait())

    async def _wait(self) -> None:
        await asyncio.wait(self._thawing.values())

    async def _thaw(self, vm: VM, jobs: Sequence[CommitJob]) -> None:
        clock = asyncio.get_running_loop().time
        since = clock()
        for job in jobs:
            await job.settled()
        try:
            if self._still[vm].disturbed and any(job.state.guest.overlaid for job in jobs):
                self.problems.append(
                    f"somebody let the guest of {vm.name} go on before its fresh overlays lay, so"
                    " that its bases may hold what it wrote after their instant"
                )
            remark = await self._still[vm].go_on()
        except QmpCommitError as error:
            self._stays(vm, error)
        else:
            self.seconds[vm] = clock() - since
            self.problems += [remark] if remark else []
            await self._note_that_it_goes_on(jobs)
            if vm not in self._unmarked:
                await unmark(vm, self._owner, "pause")

    def _stays(self, vm: VM, error: QmpCommitError) -> None:
        self._still[vm].leave()
        self.problems.append(
            f"the guest of {vm.name} may be paused still ({error.message}): let it go on"
            " with 'cont'"
        )

    async def _note_that_it_goes_on(self, jobs: Sequence[CommitJob]) -> None:
        for job in jobs:  # it does go on, and is continued once more at the worst
            await job.note("cont")
