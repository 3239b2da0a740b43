"""What has to be done around the two phases, at the moments that the machine names.

While the job is PENDING the bitmaps are carried. An intermediate layer's base is flushed before
the chain names it, and the overlays above are opened, whose headers will name it. For a recycle
the guest is paused, a fresh overlay laid over the base, and the guest continued. Each step answers
with the fact that the machine waits for; losing the monitor is raised, for the driver to tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from qmpcommit.block.bitmaps import carry, lethal_bitmaps
from qmpcommit.block.chain import Image, absolute
from qmpcommit.block.flush import flush, sync_file
from qmpcommit.callback import Failed, ask
from qmpcommit.commit import facts
from qmpcommit.commit.facts import Fact
from qmpcommit.commit.migration import look_at_owner
from qmpcommit.commit.overlays_above import OverlaysAbove
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Recycle
from qmpcommit.commit.recycle import Left
from qmpcommit.commit.stale_layers import Around
from qmpcommit.errors import (
    CommandRefused,
    CommitFailed,
    DeadlineExceeded,
    QmpCommitError,
    VMStateError,
)
from qmpcommit.qmp.monitor import Monitor

if TYPE_CHECKING:
    from qmpcommit.commit.overlay.fresh import FreshOverlay

HOLD_LIMIT = 2.0
"""Seconds that the disk's I/O may be held while the job is PENDING."""


class Care:
    """The duties of one commit beside its commands.

    `paused` is for how many seconds a recycle paused the guest; `unflushed` is why the base of an
    intermediate layer could not be flushed. `carried` are the bitmaps that the base has by now,
    `uncarried` is why it has not got them: a commit that was `adopted` goes on all the same.
    `cause` is what a barrier or a ledger failed with.
    """

    unflushed: str | None = None
    cause: BaseException | None = None
    carried: tuple[str, ...] = ()
    uncarried: str = ""
    _unheld = False

    def __init__(
        self, monitor: Monitor, plan: Plan, around: Around, *, adopted: bool = False
    ) -> None:
        self._adopted = adopted
        self._monitor, self._plan, self._around = monitor, plan, around
        self._log = monitor.log.bind(disk=plan.disk.name, job=plan.job_id)
        self._overlay: FreshOverlay | None = None
        self._above = OverlaysAbove(monitor, plan, around.cwd)

    @property
    def paused(self) -> float | None:
        """Seconds; None where no guest was paused."""
        return self._overlay.paused if self._overlay is not None else None

    @property
    def remarks(self) -> list[str]:
        """That a paused guest was let go on too early, or not at all; what the overlay lacks."""
        if self._overlay is None:
            return []
        told = (self._overlay.disturbed, self._overlay.remark, *self._overlay.warnings)
        return [text for text in told if text]

    async def prepare(self, *, keeps: bool) -> Fact:
        """Carry the bitmaps, flush the base, and meet the others at the barrier, in PENDING.

        An active layer's I/O waits meanwhile, and its base was flushed by QEMU itself: what QEMU
        refuses now is not asked again.
        """
        try:
            return await self._prepare(keeps=keeps)
        except CommandRefused as error:
            return facts.Prepared(f"its end could not be prepared: {error.message}")

    async def _prepare(self, *, keeps: bool) -> Fact:
        if not self._plan.two_phase:
            await self._flush()
            why = await self._above.open()
            if why is not None:
                return facts.Prepared(f"{why}. So it was cancelled before: no header was rewritten")
        if self._adopted and not keeps:
            why = await lethal_bitmaps(self._monitor, self._plan.closed_by_qemu)
            if why:
                return facts.Prepared(why)
        prepared = facts.Prepared() if keeps else await self._carry()
        barrier = self._around.barrier
        if barrier is None or prepared.error is not None:
            return prepared
        try:
            return facts.Prepared(await ask(barrier))
        except Failed as failed:  # the disk must not be held for it
            self.cause = failed.cause
            return facts.Prepared(f"the barrier failed: {failed}")

    async def close_above(self) -> None:
        """The job has ended: the overlays above are read-only again."""
        await self._above.close()

    async def _flush(self) -> None:
        base = self._plan.base
        await asyncio.to_thread(sync_file, absolute(base, self._around.cwd))
        try:
            await flush(self._monitor, base.node_name)
            self.unflushed = None
        except CommandRefused as error:
            if not base.read_only:  # else QEMU flushes it when it closes it for writing
                self._log.warning("not_flushed", base=base.filename, why=error.desc)
                self.unflushed = str(error.desc)

    async def _carry(self) -> facts.Prepared:
        why = await self._carry_all()
        if why and self._adopted:  # others decided it, perhaps for several disks
            self.uncarried = why
            why = ""
        if why:
            return facts.Prepared(f"the bitmaps could not be carried into the base: {why}")
        return facts.Prepared()

    async def _carry_all(self) -> str:
        """Why the bitmaps could not be carried, or ""; raises what `Monitor.execute` raises."""
        carrying = self._around.carrying
        if carrying is None or not carrying.names:
            return ""
        try:
            async with asyncio.timeout(HOLD_LIMIT):
                fresh = self._overlay.node if self._overlay is not None else None
                self.carried = await carry(self._monitor, carrying, fresh=fresh)
        except CommandRefused as error:
            return str(error.desc)
        except DeadlineExceeded:
            raise
        except TimeoutError:
            return f"it took longer than {HOLD_LIMIT:g} s"
        self._log.info("bitmaps_carried", names=list(self.carried))
        return ""

    async def carry_unheld(self) -> None:
        """Carry the bitmaps of a job that QEMU makes final by itself, right before its pivot.

        The base's record from then on what the job still writes, so that they miss nothing.
        """
        self.uncarried = await self._carry_all()
        self._unheld = not self.uncarried

    def bitmaps_left(self) -> list[str]:
        """What is to be known of the bitmaps of an adopted commit that has pivoted."""
        carrying = self._around.carrying
        if carrying is None:
            return []
        if self._unheld and self.carried:
            return [
                "QEMU was to end the job by itself (auto-finalize), so it could not be held at its"
                f" end: dirty bitmaps {_quoted(self.carried)} were carried into the base while it"
                " was READY. They mark all that has changed, and perhaps a little more"
            ]
        left = [name for name in carrying.names if name not in self.carried]
        if not left:
            return []
        why = f"QEMU did not: {self.uncarried}" if self.uncarried else "it had been ended before"
        return [
            f"dirty bitmaps {_quoted(left)} were not carried into the base ({why}): they stay in"
            " the stale layers, and the next backup that rests on them has to be a full one"
        ]

    def restore(self, recycle: Recycle, *, stopped: bool, laid: bool) -> None:
        """Take up the fresh overlay of a former process, which paused the guest if `stopped`.

        It may have put it over the base if `laid`.
        """
        self._overlay = self._fresh(recycle)
        self._overlay.restore(stopped=stopped, laid=laid)

    def _fresh(self, recycle: Recycle) -> FreshOverlay:
        around = self._around
        from qmpcommit.commit.overlay.fresh import FreshOverlay  # which most commits do not need

        return FreshOverlay(
            self._monitor, self._plan, recycle.overlay, around.cwd, around.ledger,
            asked=recycle.asked, alone=around.barrier is None,
        )  # fmt: skip

    async def obstacle(self, recycle: Recycle) -> str | None:
        """What stands where the fresh overlay is to be, seen before it is noted as ours."""
        return await self._fresh(recycle).obstacle()

    async def freeze(self, recycle: Recycle, *, again: bool = False, stopped: bool = False) -> Fact:
        """Open the fresh overlay and pause the guest, if it runs.

        With `again`, a former process may have done a part of it, and paused the guest if
        `stopped`.
        """
        if self._overlay is None:  # else it was done here before the line broke
            self._overlay = self._fresh(recycle)
        try:
            await self._overlay.freeze(again=again, stopped=stopped)
            await look_at_owner(self._monitor)  # after the pivot it would be too late
        except VMStateError as error:
            return facts.Frozen(error.message.removesuffix(". Nothing was sent"))
        except (CommandRefused, CommitFailed) as error:
            self.cause = error.__cause__
            return facts.Frozen(getattr(error, "desc", error.message))
        return facts.Frozen()

    async def lay(self) -> Fact:
        """Put the fresh overlay over the base."""
        assert self._overlay is not None
        try:
            await self._overlay.lay()
        except (CommandRefused, CommitFailed) as error:
            return facts.Overlaid(getattr(error, "desc", error.message))
        return facts.Overlaid()

    async def thaw(self) -> Fact:
        """Let the guest go on, if it was paused here."""
        if self._overlay is not None:
            await self._overlay.thaw()
        return facts.News.THAWED

    def leave(self) -> None:
        """Nobody sees to the guest any more: it is as it is."""
        if self._overlay is not None:
            self._overlay.leave()

    async def undo(self) -> None:
        """The fresh overlay is not used: nothing is left of it, as far as QEMU can be asked."""
        if self._overlay is not None:
            with suppress(QmpCommitError):
                await self._overlay.undo()

    async def left(self) -> Left | None:
        """The fresh overlay's file that a QEMU which has ended left behind, if one is there."""
        return await self._overlay.left() if self._overlay is not None else None

    async def fresh(self) -> Image | None:
        """The fresh overlay as QEMU has it; None where there is none."""
        return await self._overlay.image() if self._overlay is not None else None


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
