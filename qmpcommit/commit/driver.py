"""Drives the phases of one commit over a monitor.

The driver feeds `phases.step` with facts, one at a time and in the order in which they came, and
carries out the actions that come back; their answers are facts again. It decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, assert_never

from qmpcommit.block.chain import Image
from qmpcommit.callback import Failed, Noting, ask
from qmpcommit.commit import facts, phases, report
from qmpcommit.commit.facts import Choice, Command, Fact
from qmpcommit.commit.in_pending import Care
from qmpcommit.commit.in_use import PlanCheck
from qmpcommit.commit.job_events import Hearing
from qmpcommit.commit.job_seen import Seeing
from qmpcommit.commit.outcome import CommitOutcome, Timings
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Decision, Ready, Recycle, Settled, fresh_of, immediate, settle
from qmpcommit.commit.recycle import Left
from qmpcommit.commit.stale_layers import Around, OnStall, Stall, clear_away
from qmpcommit.errors import (
    CommandRefused,
    CommitFailed,
    DeadlineExceeded,
    MonitorLost,
    QmpCommitError,
    VMGone,
)
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.qmp.process import process_identity
from qmpcommit.tasks import stop, to_the_end

HEARTBEAT = 10.0
"""Seconds of silence after which QEMU is asked about the job."""

RETRY = 0.25
"""The same, after QEMU has refused what it was asked."""

WAITING = 100
"""Events of one job that wait to be taken; of more, none is kept, and QEMU is asked instead."""

_FOREVER_REFUSED = {"CommandNotFound"}
_LAYS = (phases.Verdict.PIVOTED, phases.Verdict.RECYCLED)
_NO_UNDOING = (phases.Verdict.RECYCLED, phases.Verdict.VM_GONE, phases.Verdict.MONITOR_LOST)


class Resumed(NamedTuple):
    """What a former process noted of a commit: where it was.

    `same_vm` is False when another QEMU answers now, `recycle` the recycle that was decided,
    `stopped` whether the guest was paused for it, `outcome` the outcome where all but the
    clearing away was done, `times` when what happened. `undoes` and `finalizes` are as for
    `phases.resume`.
    """

    state: phases.State
    same_vm: bool | None = None
    recycle: Recycle | None = None
    stopped: bool = False
    outcome: CommitOutcome | None = None
    times: Mapping[str, datetime] = {}
    undoes: bool = False
    finalizes: bool = False

    @property
    def left(self) -> Left | None:
        """What may be left of its fresh overlay if its QEMU has ended."""
        if self.recycle is None:
            return None
        return Left(self.recycle.overlay, laid=self.state.verdict in _LAYS)


class Adopted(NamedTuple):
    """What is known of a commit that somebody else has begun.

    `stale` and `undoes` are as for `phases.adopt`. `owned` tells that whoever began it follows it
    still, or may: what comes after its end is for them, unless more was `asked`. `ours` tells that
    it was begun by this package, `spares` that it is not dismissed, `remark` what else is to be
    known of how it was found: then nothing of it is certain enough to clear anything away.
    `unheld` tells that QEMU ends it by itself, `followed` that its owner lives, who finalizes it.
    """

    undoes: bool = False
    stale: str = ""
    owned: bool = False
    ours: bool = False
    asked: bool = False
    spares: bool = False
    remark: str = ""
    unheld: bool = False
    followed: bool = False

    def clears(self, ended_here: bool) -> bool:
        """Whether what it has left stale is cleared away here."""
        if self.remark:
            return False
        return self.asked or (not self.owned and (ended_here or self.ours))


class Driver:
    """One commit's machine, its facts and its duties.

    `moved` is called when the phase changes, or QEMU's status is first known. `error` and
    `outcome` are there when `drive` has ended.
    """

    def __init__(
        self,
        monitor: Monitor,
        plan: Plan,
        around: Around,
        moved: Callable[[], None],
        *,
        adopted: Adopted | None,
        auto_finalize: bool,
        resumed: Resumed | None = None,
    ) -> None:
        self.plan = plan
        self.id = plan.job_id
        self.adopted = adopted
        self.timeout: float | None = None
        self.outcome: CommitOutcome | None = None
        self.error: BaseException | None = None
        self.log = monitor.log.bind(disk=plan.disk.name, job=plan.job_id)
        self.recycle: Recycle | None = None
        self._ledger = Noting.of(around.ledger, self.log)
        around = around._replace(ledger=self._ledger)
        self._monitor, self._around, self._moved = monitor, around, moved
        self._care = Care(monitor, plan, around, adopted=adopted is not None)
        self._check = PlanCheck(monitor, plan, in_migration=around.in_migration)
        prepares = around.prepares(plan)
        if adopted is not None and not auto_finalize and plan.closed_by_qemu:
            prepares = True  # somebody may use bitmaps by now that nobody may use then
        self._hearing = Hearing(plan.job_id, self._hear)
        self._frozen_before = self._stopped_before = self._inside = self._finalized = False
        self._left: Left | None = None
        self._follow: Callable[..., phases.Step] | None = None
        if resumed is not None:
            prepares = resumed.state.barrier.prepares
            self._follow = partial(
                phases.resume,
                resumed.state,
                same_vm=resumed.same_vm,
                undoes=resumed.undoes,
                finalizes=resumed.finalizes,
            )
        elif adopted is not None:
            self._follow = partial(
                phases.adopt,
                two_phase=plan.two_phase,
                prepares=prepares,
                undoes=adopted.undoes,
                stale=adopted.stale,
                spares=adopted.spares,
            )
        if self._follow is not None:
            self.state, self._owed = self._follow()
        else:
            self.state, self._owed = phases.begin(
                two_phase=plan.two_phase,
                prepares=prepares,
                stalls=plan.stalls,
                meets=around.barrier is not None,
            )
        by_us = adopted is None and (prepares or self.state.barrier.prepares)
        self._seeing = Seeing(
            monitor,
            plan,
            auto_finalize=auto_finalize and not by_us,
            followed=adopted is not None and adopted.followed,
        )
        self._facts: asyncio.Queue[Fact] = asyncio.Queue()
        self._consulting: asyncio.Task[Settled] | None = None
        self._stalling: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._policy_error: BaseException | None = None
        self._cause: BaseException | None = None
        self._lost: QmpCommitError | None = None
        self._refused = 0
        self._missed = False
        self._identity = process_identity(monitor.peer_pid) if self._follow is not None else ""
        self._pid = None if self._follow is None else monitor.peer_pid  # whose job it is
        if resumed is not None:
            self._take_up(resumed)

    def _take_up(self, resumed: Resumed) -> None:
        """Go on where a former process stopped."""
        self.recycle = resumed.recycle
        self.outcome = resumed.outcome
        self._hearing.times.update(resumed.times)
        if self.recycle is not None:
            self._frozen_before = phases.freezes_again(self.state)
            self._stopped_before = resumed.stopped
            if resumed.same_vm is False or self._frozen_before:
                self._left = resumed.left
            else:
                # Although the guest goes on, the overlay may be there to be told of, or undone.
                stopped = resumed.stopped and self.state.guest.frozen
                laid = self.state.verdict in _LAYS
                self._care.restore(self.recycle, stopped=stopped, laid=laid)

    async def note(self, step: str, *, anyway: bool = False, **more: Any) -> None:
        """A step is written down before it is taken, where somebody wants that.

        Raises `CommitFailed` where it can't be, and is not taken `anyway`.
        """
        if self._ledger is None:
            return
        state = self.state
        held = state.status == "pending" or state.guest.frozen
        more |= {"times": dict(self._hearing.times), "identity": self._identity}
        try:
            await self._ledger.note(step, state, held=held, anyway=anyway, **more)
        except CommitFailed as error:
            self._cause = error.__cause__
            raise

    async def note_around(self, step: str) -> None:
        """The same of what is done around it; a guest that goes on does not wait for it."""
        if self._ledger is not None:
            await self._ledger.note(step, held=step == "cont", anyway=step == "cont")

    @property
    def ledger(self) -> Noting | None:
        """Its ledger, as it is called."""
        return self._ledger

    def hurry(self) -> None:
        """The deadline has come, or who wanted the commit goes away: no note takes long now."""
        if self._ledger is not None:
            self._ledger.hurry()

    def tell(self, fact: Fact) -> None:
        """A fact, from whoever knows one."""
        self._facts.put_nowait(fact)

    def _hear(self, fact: Fact) -> None:
        """What is heard; `News` is told once for each connection, and always."""
        if isinstance(fact, facts.News) or self._facts.qsize() < WAITING:
            self.tell(fact)
        else:
            self._missed = True

    @property
    def timings(self) -> Timings:
        """When what happened, as far as it has."""
        times = dict(self._hearing.times)
        if not self.plan.two_phase:
            times.pop("decided", None)  # it has no second phase
        return Timings(**times)

    async def drive(self) -> None:
        """From the first action to the outcome or the error."""
        hearing, together = self._hearing, self._around.together
        if together is not None:
            together.began(self.id)
        try:
            with self._monitor.subscribers.while_in(hearing.message, hearing.link, job=self.id):
                if not self._monitor.connected:
                    self._begin_away()
                await self._drive()
                await self._conclude()
        except BaseException:
            await to_the_end(self._let_go())
            raise
        finally:
            if together is not None:
                together.ended(self.id)
            self._care.leave()
            if self._inside and self._around.gate is not None:
                self._around.gate.release()
            if self._consulting is not None:  # it is stopped, and has not failed
                self._consulting.remove_done_callback(self._settled)
            for task in (self._consulting, self._stalling, self._preparing):
                if task is not None:
                    await stop(task)

    def _begin_away(self) -> None:
        if self._follow is None:
            self.tell(facts.News.LINK_LOST)  # what is sent first brings it back
        else:
            self.state, self._owed = self._follow(linked=False)

    async def _let_go(self) -> None:
        """Nobody follows the job any more: whatever it holds still is let go."""
        await self._stop_preparing()
        with suppress(QmpCommitError):
            if self.state.status == "pending" and self.state.barrier.prepares:
                order = "job-finalize" if self.state.barrier.prepared else "job-cancel"
                await self._monitor.execute(order, {"id": self.id})
            await self._care.close_above()
            if self.state.guest.frozen:
                await self._care.thaw()

    async def ask(self) -> facts.JobSeen | None:
        """The job as QEMU lists it now."""
        return await self._seeing.job()

    async def _drive(self) -> None:
        while True:
            owed, self._owed = self._owed, []
            if self.state.end is not None and not self.state.guest.frozen:
                await self._pass_gate()
            for action in owed:
                await self._carry_out(action)
            if self.state.finished:
                break
            try:
                fact = self._facts.get_nowait()
            except asyncio.QueueEmpty:
                fact = await self._next_fact()
            self._take(fact)

    async def _pass_gate(self) -> None:
        """What is left has time: the guest does not wait for it."""
        gate = self._around.gate
        if gate is not None and not self._inside:
            await gate.acquire()
            self._inside = True

    async def _next_fact(self) -> Fact:
        if self._missed:
            self._missed = False
            return facts.News.TICK
        try:
            followed = self.adopted is not None and self.adopted.followed
            hurries = self._refused or (followed and self.state.status == "pending")
            async with asyncio.timeout(min(RETRY, HEARTBEAT) if hurries else HEARTBEAT):
                return await self._facts.get()
        except TimeoutError:
            return facts.News.TICK

    def _take(self, fact: Fact) -> None:
        before = self.state
        self.state, self._owed = phases.step(before, fact)
        if bool(self.state.status) is not bool(before.status):
            self._moved()
        checked = self.state.unchecked is not before.unchecked
        if self._around.together is not None and not self.state.running:
            self._around.together.ended(self.id)
        if self.state.phase is not before.phase or self.state.finished or checked:
            self._moved()
            if self._ledger is not None:
                self._ledger.moved(self.state)
            self.log.debug("phase", phase=self.state.phase.value, was=before.phase.value)

    async def _carry_out(self, action: facts.Action) -> None:
        match action:
            case Command():
                await self._send(action)
            case facts.Duty.LOOK:
                await self._try(self._check.look())
            case facts.Duty.CHECK:
                await self._try(self._check.check())
            case facts.Duty.ASK:
                await self._try(self._seeing.answer())
            case facts.Duty.READ_GRAPH:
                await self._try(self._seeing.read_back())
            case facts.Duty.CONSULT:
                self._consult()
            case facts.Duty.RELINK:
                await self._relink()
            case facts.Duty.PREPARE:
                await self._prepare()
            case facts.Duty.STALL:
                self._stall()
            case facts.Duty.FREEZE:
                assert self.recycle is not None
                await self._freeze(self.recycle)
            case facts.Duty.OVERLAY:
                await self.note("overlay", anyway=True)
                await self._try(self._care.lay())
            case facts.Duty.THAW:
                await self.note("thaw", anyway=True)
                await self._try(self._care.thaw())
            case facts.Duty.FINISH:
                pass
            case _:
                assert_never(action)

    async def _freeze(self, recycle: Recycle) -> None:
        again = self._frozen_before
        obstacle = None if again else await self._care.obstacle(recycle)
        if obstacle is not None:  # once noted it would be ours, for the next process to unlink
            self.tell(facts.Frozen(obstacle))
            return
        try:
            await self.note("freeze", overlay=recycle.overlay, recycle=recycle)
        except CommitFailed as error:
            self.tell(facts.Frozen(error.message))
            return
        freezing = self._care.freeze(recycle, again=again, stopped=self._stopped_before)
        await self._try(freezing, facts.Frozen("the monitor was lost meanwhile"))

    async def _prepare(self) -> None:
        if self._around.barrier is None and self.plan.two_phase:
            await self._try(self._care.prepare(keeps=self.state.keeps))
            return
        # Others are waited for, and one of them may be why this one must not be finalized; and
        # a flush may take long, while no guest waits for it.
        await self._stop_preparing()
        preparing = self._try(self._care.prepare(keeps=self.state.keeps))
        self._preparing = asyncio.create_task(preparing, name=f"barrier {self.id}")

    async def _stop_preparing(self) -> None:
        if self._preparing is not None:
            await stop(self._preparing)

    async def _send(self, command: Command) -> None:
        arguments: Mapping[str, Any] = {"id": self.id}
        if command is Command.START:
            arguments = self.plan.arguments
        elif command is Command.KEEP:
            arguments = {"device": self.id, "force": False}
        try:
            why = await self._check.no_pivot() if command is Command.PIVOT else None
            if why is not None:
                self.tell(facts.Looked(why))
                return
            if command is Command.PIVOT and self.adopted is not None and self.adopted.unheld:
                await self._care.carry_unheld()
            if command is Command.DISMISS and self._around.together is not None:
                await self._around.together.all_ended()
            if not await self._is_noted(command):
                return
            await self._monitor.execute(command.value, arguments)
        except CommandRefused as error:
            final = error.error_class in _FOREVER_REFUSED
            self.tell(facts.Refused(command, error.desc, final))
            self.log.info("refused", command=command.value, desc=error.desc)
        except DeadlineExceeded:
            self._unanswered(command)
        except (MonitorLost, VMGone) as error:
            self._lost = error
            self.tell(facts.Unanswered(command))
        else:
            if command is Command.START:
                self._pid = self._monitor.peer_pid
            self._finalized = self._finalized or command is Command.FINALIZE
            self.tell(facts.Accepted(command))
            self.log.info("accepted", command=command.value)

    async def _is_noted(self, command: Command) -> bool:
        """Have a command written down; one that can't be is not sent, and the job cancelled.

        Of a group, whose decision is written down elsewhere, none is cancelled alone.
        """
        anyway = command in (Command.ABORT, Command.DISMISS)
        anyway = anyway or (command is Command.FINALIZE and self.state.barrier.meets)
        more: dict[str, Any] = {}
        if command is Command.START:
            self._identity = process_identity(self._monitor.peer_pid)
            more = self.first_note()
        try:
            await self.note(command.value, anyway=anyway, **more)
        except CommitFailed as error:
            if command is Command.START:
                raise report.not_noted(self.plan, error) from error.__cause__
            self.tell(facts.Unnoted(command, error.message))
            return False
        return True

    def first_note(self) -> dict[str, Any]:
        """What is noted with ``block-commit``, beside the state."""
        return {
            "plan": self.plan,
            "files": self._around.files,
            "timeout": self.timeout,
            "hooked": self._around.on_pivot is not None,
        }

    async def _try(self, asking: Awaitable[Fact], lost: Fact | None = None) -> None:
        """Ask QEMU something; losing the link meanwhile is a fact of its own, `lost` another.

        What it refuses is asked again with the next tick, and raises when that does not help.
        """
        try:
            self.tell(await asking)
            self._refused = 0
            return
        except CommandRefused as error:
            self._refused += 1
            self.log.warning("refused", command=error.command, desc=error.desc)
            if self._refused > phases.MAX_TRIES:
                raise
        except DeadlineExceeded:
            self._unanswered(None)
        except (MonitorLost, VMGone) as error:
            self._lost = error
            self.tell(facts.News.LINK_LOST)
        if lost is not None:
            self.tell(lost)

    def _unanswered(self, command: Command | None) -> None:
        """QEMU is silent: this connection is not believed any more."""
        self.log.warning("no_answer", command=command and command.value)
        self._monitor.drop()
        self.tell(facts.Unanswered(command) if command else facts.News.LINK_LOST)

    async def _relink(self) -> None:
        self.log.info("relinking")
        try:
            same = await self._monitor.restore(self._pid)
        except (VMGone, MonitorLost) as error:
            self._lost = error
            self.tell(facts.LinkDead(vm_gone=isinstance(error, VMGone)))
        else:
            self.tell(facts.LinkBack(same))

    def _consult(self) -> None:
        plan = self.plan
        ready = Ready(
            vm=plan.vm,
            disk=plan.disk.name,
            job_id=self.id,
            base=plan.base,
            top=plan.top,
        )
        settled = immediate(plan.policy)
        if settled is not None:
            self.decide(settled.decision, settled.by)
            return
        self.log.info("ready", policy=getattr(plan.policy, "kind", "callable"))
        self._consulting = asyncio.create_task(self._settle(ready), name=f"policy {self.id}")
        self._consulting.add_done_callback(self._settled)

    async def _settle(self, ready: Ready) -> Settled:
        with suppress(QmpCommitError):  # without it the policy is only told less
            job = await self.ask()
            ready = replace(ready, bytes_committed=job.done if job else 0)
        return await settle(self.plan.policy, ready)

    def _settled(self, consulting: asyncio.Task[Settled]) -> None:
        if not self.state.running or self.state.order.decision is not None:
            if not consulting.cancelled():
                consulting.exception()
            return
        if consulting.cancelled():
            self._policy_error = asyncio.CancelledError("the policy was cancelled")
        else:
            error = consulting.exception()
            self._policy_error = error.cause if isinstance(error, Failed) else error
        if self._policy_error is not None:
            self.log.warning("policy_failed", error=repr(self._policy_error))
            self.tell(facts.Decided(Choice.ABORT, "failed policy"))
        else:
            settled = consulting.result()
            self.decide(settled.decision, settled.by)

    def decide(self, decision: Decision, by: str) -> None:
        """What is to become of it at READY; what comes too late does nothing."""
        for recycle in fresh_of(decision):
            if self.state.order.decision is None:
                self.recycle = recycle
        self.tell(facts.Decided(Choice(decision.kind), by))

    def _stall(self) -> None:
        """A storage error makes the job wait: tell its owner, who says when to go on."""
        stall = Stall(self.plan.vm, self.plan.disk.name, self.id, self.plan.base)
        self.log.warning("stalled", base=self.plan.base.filename)
        on_stall = self._around.on_stall
        if on_stall is not None:
            self._stalling = asyncio.create_task(self._relieve(on_stall, stall))

    async def _relieve(self, on_stall: OnStall, stall: Stall) -> None:
        try:
            await ask(on_stall, stall)
        except Failed as failed:  # the job must not wait on for it
            self._policy_error = failed.cause
            self.tell(facts.Decided(Choice.ABORT, "failed policy"))
        else:
            self.tell(facts.News.RELIEVED)

    async def _conclude(self) -> None:
        state, plan = self.state, self.plan
        await self._stop_preparing()  # a job that somebody else has ended
        await self._care.close_above()
        if state.verdict not in _NO_UNDOING:
            await self._care.undo()
        left = None
        if state.verdict is phases.Verdict.VM_GONE:
            left = await self._care.left() or self._left
        error: BaseException | None = self._check.objection
        if state.verdict is not phases.Verdict.CHANGED or error is None:
            error = report.error_of(
                plan,
                state,
                self.timeout,
                self._lost,
                self._policy_error,
                left=left,
                cause=self._cause or self._care.cause,
            )
        if error is not None:
            self.error = error
            self.log.warning("failed", verdict=state.verdict and state.verdict.value)
            return
        outcome = self.outcome or await self._outcome()
        self.outcome = outcome  # it is true, whatever becomes of the files
        if outcome.invalidated and self._clears(outcome):
            keep_files = self._care.unflushed is not None
            try:
                await self.note("clear-away", outcome=outcome)
            except CommitFailed as failed:
                keep_files = True  # whoever goes on from what is noted looks for them
                outcome.warnings.append(f"{failed.message}, so no file was deleted or renamed")
            self.outcome = await clear_away(
                self._monitor,
                plan,
                outcome,
                self._around,
                keep_files=keep_files,
                again=state.taken_up or self.adopted is not None,
                graph=None if self._around.on_pivot is not None else self._seeing.graph_of_now,
            )
        found = report.found_before(plan)
        if self._ledger is not None:
            found = [*self._ledger.problems, *found]
        self.outcome = replace(self.outcome, warnings=[*self.outcome.warnings, *found])
        self.log.info("ended", action=outcome.action, by=outcome.decided_by)

    def _clears(self, outcome: CommitOutcome) -> bool:
        if self.adopted is None:
            return True
        ended_here = self._finalized or outcome.decided_by not in ("", "another client")
        return self.adopted.clears(ended_here)

    async def _outcome(self) -> CommitOutcome:
        state, plan = self.state, self.plan
        active = self._active_now()
        if state.verdict is phases.Verdict.RECYCLED:
            with suppress(QmpCommitError):
                active = await self._care.fresh()
        outcome = report.outcome_of(plan, state, active, self.timings)
        held = self.timings.held if state.barrier.prepares and plan.two_phase else None
        outcome = replace(
            outcome, guest_paused=self._care.paused, held=held, used_by=self._seeing.used_by
        )
        if self._around.carrying is not None:
            outcome.warnings.extend(self._around.carrying.problems)
        if self.adopted is not None and outcome.invalidated:
            outcome.warnings.extend(self._care.bitmaps_left())
            outcome.warnings.extend(filter(None, [self.adopted.remark]))
        outcome.warnings.extend(self._care.remarks)
        outcome.warnings.extend(filter(None, [self._check.lost_base]))
        if self._care.unflushed is not None:
            outcome.warnings.append(
                f"QEMU could not be made to flush {plan.base.filename} ({self._care.unflushed}):"
                f" keep {', '.join(image.filename for image in (plan.top, *plan.between))} until"
                " QEMU has ended well, for if it is killed before, what was committed is only there"
            )
        return outcome

    def _active_now(self) -> Image | None:
        if self._seeing.disk is not None:
            return self._seeing.disk.active
        return {
            phases.Verdict.PIVOTED: self.plan.base,
            phases.Verdict.MERGED: self.plan.disk.active,
        }.get(self.state.verdict or phases.Verdict.FAILED, self.plan.top)
