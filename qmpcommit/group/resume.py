"""A group commit that goes from one process to the next, for whoever journals its members."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.stale_layers import Barrier
from qmpcommit.group import machine
from qmpcommit.group.machine import Stage
from qmpcommit.group.outcome import GroupOutcome
from qmpcommit.group.run import GroupCommit
from qmpcommit.tasks import stop, to_the_end

HAND_OVER = 0.5
"""Seconds that disks which are held get to be let go before the group is cancelled."""

CANCELLING = 0.3
"""Seconds that cancelled jobs get to end."""

STAGES = (
    "copying", "ready",
    *(each.value for each in Stage if each not in (Stage.GATHERING, Stage.RECORDING)),
)  # fmt: skip
"""All that `ResumableGroup.stage` can be."""

Resume = Callable[[Barrier], Awaitable[CommitJob]]
"""Takes one member up, as `Session.resume` does."""


class ResumableGroup(GroupCommit):
    """A group that can be taken up by another process while none of its disks is decided."""

    def _check_options(self) -> None:
        """What a client asked was looked at when it was promised; it may be decided by now."""

    @property
    def stage(self) -> str:
        """``copying``, ``ready``, ``decided``, ``finalizing``, ``cancelling`` or ``over``."""
        if self.state.stage is Stage.RECORDING:
            return Stage.FINALIZING.value  # nobody can decide otherwise any more
        if self.state.stage is not Stage.GATHERING:
            return self.state.stage.value
        ready = self.jobs and all(job.state.phase.value == "ready" for job in self.jobs)
        return "ready" if ready else "copying"

    @property
    def quiesced(self) -> dict[str, float]:
        """For how many seconds the guests stood still that go on again, by their VMs' names."""
        return {vm.name: stood for vm, stood in self._stood_still.items()}

    @property
    def decided_by(self) -> str:
        """Who decided; empty before."""
        return self._by

    async def take_up(self, members: Sequence[Resume]) -> None:
        """As `start`, for jobs that a former process sent; each takes one of them up."""
        if self._timeout is not None:
            self._call_later(self._timeout, self._time_is_up)
        self._watch_links()
        jobs: list[CommitJob] = []
        try:
            for number, resume in enumerate(members):
                jobs.append(await resume(partial(self._meet, number)))
        except BaseException:
            for job in jobs:
                await to_the_end(job.detach())
            await self._clear()
            raise
        self.jobs = tuple(jobs)
        self._follow_all()
        if self.state.stage is Stage.CANCELLING:
            self._cancel(self.state.why)  # those too that were not there before

    async def go_on(self, members: Sequence[Resume]) -> GroupOutcome:
        """As `run`, for jobs that a former process sent."""
        await self.take_up(members)
        return await self._see_through()

    async def hand_over(self) -> None:
        """Within a second: no disk is held, so that all jobs can be left in QEMU as they are.

        What is decided is ended, or cancelled where that takes too long; then `leave`.
        """
        if self.state.stage in (Stage.GATHERING, Stage.OVER):
            return
        if await self._settled(HAND_OVER):
            return
        # Without effect where the jobs are being finalized.
        self._tell(machine.Stop("whoever held its disks had to stop"))
        await self._settled(CANCELLING)

    async def _settled(self, seconds: float) -> bool:
        settling = asyncio.create_task(self._all_settled())
        try:
            done, _ = await asyncio.wait({settling}, timeout=seconds)
        finally:
            await stop(settling)
        return bool(done)

    async def _all_settled(self) -> None:
        for job in self.jobs:
            await job.settled()

    async def leave(self) -> None:
        """Follow the jobs no longer, and leave them as they are in QEMU."""
        for timer in self._timers:
            timer.cancel()
        self._freezes.give_up()
        self._pauses.give_up()
        for task in (self._asking, self._recording, self._pausing, *self._following):
            if task is not None:
                await stop(task)
        await asyncio.gather(*(job.detach() for job in self.jobs))
        await self._clear()
