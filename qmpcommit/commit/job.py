"""A commit under way, as its caller sees it.

A `CommitJob` is a task of its own from the moment ``block-commit`` is sent, so that READY is
answered whether or not anybody awaits the job. Its `Driver` does the work.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qmpcommit.callback import going_up
from qmpcommit.commit import facts, phases, report
from qmpcommit.commit.driver import Adopted, Driver, Resumed
from qmpcommit.commit.facts import Choice
from qmpcommit.commit.outcome import CommitOutcome, JobProgress, Timings
from qmpcommit.commit.phases import Phase
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Decision, Recycle
from qmpcommit.commit.stale_layers import Around
from qmpcommit.errors import JobConflict, JobDetached, NotReady, QmpCommitError
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import Awaited, stop, to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.claim import Claim
    from qmpcommit.commit.converge import ConvergeReport

GRACE = 10.0
"""Seconds that a job gets to end after it was cancelled for a deadline or a closing session."""

CLAIMING = 2.0
"""Seconds that a disk which is claimed beside a job gets for it when the job has ended."""


class CommitJob:
    """One commit under way.

    Made by `Session.commit` and `Session.adopt`. Nothing has to be awaited for the policy to be
    carried out; `wait` gives the outcome, `progress` the way there. `claim` is what holds its disk
    in QEMU while it is followed, `own_claim` the same where it is for this job alone.
    """

    def __init__(
        self,
        monitor: Monitor,
        plan: Plan,
        *,
        timeout: float | None = None,
        adopted: Adopted | None = None,
        auto_finalize: bool = True,
        resumed: Resumed | None = None,
        around: Around = Around(),  # noqa: B008  (frozen)
    ) -> None:
        self.plan = plan
        self.id = plan.job_id
        self.adopted = adopted is not None
        self.log = monitor.log.bind(disk=plan.disk.name, job=plan.job_id)
        self._monitor = monitor
        self._driver = Driver(
            monitor,
            plan,
            around,
            self._wake,
            adopted=adopted,
            auto_finalize=auto_finalize,
            resumed=resumed,
        )
        self._driver.timeout = timeout
        self.spent = 0.0
        self._waiters: set[asyncio.Future[None]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._converging: asyncio.Task[ConvergeReport] | None = None
        self._around = around
        self._task: asyncio.Task[None] | None = None
        self.claim: Claim | None = None
        self.own_claim: Claim | None = None
        self._claiming: asyncio.Task[None] | None = None
        self._told: Choice | None = None  # a decision that the machine may not have taken yet

    def __repr__(self) -> str:
        plan = self.plan
        return f"<CommitJob {self.id} on {plan.disk.name!r} of {plan.vm!r}, {self.phase.value}>"

    # -- what a caller sees -----------------------------------------------------------------------

    @property
    def state(self) -> phases.State:
        """The state of the machine; a frozen value."""
        return self._driver.state

    def first_note(self) -> tuple[phases.State, dict[str, Any]]:
        """What will be noted right before it is begun, of one that was not launched yet."""
        return self.state._replace(unsent=False), self._driver.first_note()

    @property
    def job_id(self) -> str:
        """Its id in QEMU, as outcomes and errors call it."""
        return self.id

    @property
    def timeout(self) -> float | None:
        """Seconds after which the job is cancelled, less those `spent` before it starts.

        Set later it is only what a `DeadlineExceeded` names.
        """
        return self._driver.timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._driver.timeout = seconds

    @property
    def phase(self) -> Phase:
        """Where the commit is."""
        return self.state.phase

    @property
    def done(self) -> bool:
        """Whether the outcome, or the error, is there."""
        return self._task is None or self._task.done()

    @property
    def timings(self) -> Timings:
        """When what happened, as far as it has."""
        return self._driver.timings

    @property
    def outcome(self) -> CommitOutcome | None:
        """The outcome, once there is one; `wait` waits for it."""
        return self._driver.outcome if self.done and self._driver.error is None else None

    @property
    def error(self) -> BaseException | None:
        """What `wait` raises, once that is known."""
        return self._failure if self.done else None

    @property
    def _failure(self) -> BaseException | None:
        """What it ended with; a task that is stopped before its first step can't note it itself."""
        driver = self._driver
        if self._task is not None and self.done and driver.error is None and driver.outcome is None:
            driver.error = JobDetached(
                f"job {self.id} on {self.plan.disk} of {self.plan.vm} was given up before it began."
                " Nothing was sent",
                **self._where(),
            )
        return driver.error

    async def started(self) -> None:
        """Wait until QEMU has taken the job; raises what `wait` would if it did not."""
        await self._until(lambda: self.state.phase is not Phase.STARTING)
        if self._failure is not None and not self.state.began:
            raise going_up(self._failure)

    async def seen(self) -> None:
        """Wait until an adopted job's status is known."""
        await self._until(lambda: bool(self.state.status))

    async def ready(self) -> None:
        """Wait until the second phase has begun (``BLOCK_JOB_READY``).

        Raises what `wait` raises if the job ends without it; returns at once for an
        intermediate layer that has ended, since that has no second phase.
        """
        await self._until(lambda: self.state.phase in (Phase.READY, Phase.DECIDED))
        if self.done and self._failure is not None:
            raise going_up(self._failure)

    async def wait(self) -> CommitOutcome:
        """The outcome, or the `QmpCommitError` that the commit ended with.

        Cancelling the wait does not cancel the commit: see `cancel`.
        """
        await self._until(lambda: False)
        if self._failure is not None:
            raise going_up(self._failure)
        assert self._driver.outcome is not None
        return self._driver.outcome

    async def ended(self) -> BaseException | None:
        """Wait for its end, for whoever has others to see to; what `wait` raises of it, or None."""
        await self._until(lambda: False)
        return self._failure

    async def reached(self) -> bool:
        """Wait as `ready` does; whether it got there, for whoever has others to see to."""
        await self._until(lambda: self.state.phase in (Phase.READY, Phase.DECIDED))
        return not (self.done and self._failure is not None)

    async def note(self, step: str) -> None:
        """Have its ledger note what is done around it, as for a whole group.

        Where the job is goes without saying: what is written of that stays as it is.
        """
        await self._driver.note_around(step)

    async def settled(self) -> None:
        """Wait until QEMU has done its part; stale files may not have been cleared away yet."""
        await self._until(lambda: self.state.finished)

    async def progress(self, every: float = 0.5) -> AsyncIterator[JobProgress]:
        """How far it is, now, `every` so many seconds, and once at the end (``query-jobs``).

        Its end, with an error or without, is the end of these; `wait` tells which.
        """
        from qmpcommit.commit.pace import Meter

        meter = Meter(speed=int(self.plan.arguments.get("speed") or 0))
        clock = asyncio.get_running_loop().time
        seen = facts.JobSeen("")
        while not self.done and self.phase is not Phase.FINISHED:
            if self._monitor.connected and self.state.running and self.state.began:
                with suppress(QmpCommitError):
                    seen = await self._driver.ask() or seen
            yield meter.read(clock(), seen.done, seen.total, self.phase, seen.status)
            with suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await self._until(partial(self._has_left, self.phase))
        await self._until(lambda: False)  # what is stale is cleared away
        state = self.state
        yield meter.last(state.done, state.total, state.phase, state.status)

    async def set_bandwidth(self, bandwidth: int | str) -> None:
        """Change the rate at which the job copies, in bytes per second; 0 is no limit.

        Raises `InvalidRequest` for what is no rate, `JobNotFound` where the job is over
        (``block-job-set-speed``).
        """
        from qmpcommit.commit.converge import set_bandwidth

        await set_bandwidth(self._monitor, self.id, bandwidth)

    def pivot(self) -> Awaited[None]:
        """Decide for the base, at once; awaiting it, as a task may, waits until the job has ended.

        Raises `NotReady` before READY (the job goes on unharmed), `JobConflict` when the
        opposite is decided already or the job has ended.
        """
        return self._order(Choice.PIVOT)

    def recycle(self, overlay: str | os.PathLike[str]) -> Awaited[None]:
        """Pivot, with a fresh `overlay` over the base before the guest can write; as `pivot`."""
        recycle, before = Recycle(os.fspath(overlay)), self._driver.recycle
        if self._decided.order.decision is Choice.RECYCLE:
            if before is not None and before.overlay != recycle.overlay:
                raise self._conflict(f"is decided already: recycle with {before.overlay}")
        elif phases.objection(self._decided, Choice.RECYCLE) is None:
            self._driver.recycle = recycle
        return self._order(Choice.RECYCLE)

    def keep(self) -> Awaited[None]:
        """Decide for the overlay; as `pivot`."""
        return self._order(Choice.KEEP)

    def abort(self) -> Awaited[None]:
        """Cancel the job by force, in either phase; the overlay stays active."""
        return self._order(Choice.ABORT)

    cancel = abort

    def decide(self, decision: Decision, by: str) -> None:
        """Decide as a policy does, in the name of `by`; what comes too late does nothing."""
        self._driver.decide(decision, by)

    # -- what a session does with it --------------------------------------------------------------

    def inherit(self, claim: Claim) -> None:
        """Have it release this claim when it is no longer followed."""
        self.claim = self.own_claim = claim

    async def _unclaim(self) -> None:
        if self._claiming is not None:
            # One that ended at once has the claim of its dead process still to be cleared.
            await asyncio.wait({self._claiming}, timeout=CLAIMING)
            await stop(self._claiming)
        if self.own_claim is not None:
            if self.adopted and not self.state.finished:
                self.own_claim.abandon()  # it tells the next one of the job that goes on
            await self.own_claim.release()

    def start(
        self, ended: Callable[[], None], *, claiming: Coroutine[Any, Any, None] | None = None
    ) -> None:
        """Begin, in a task of the running loop; `ended` is called when that is over.

        `claiming` claims the disk beside it: what the job holds still does not wait for that.
        """
        self._task = asyncio.create_task(self._run(), name=f"commit {self.id}")
        if claiming is not None:
            self._claiming = asyncio.create_task(claiming, name=f"claim for {self.id}")

        def over(task: asyncio.Task[None]) -> None:
            ended()
            self._wake()

        self._task.add_done_callback(over)

    async def let_go(self) -> None:
        """Wait until the job does not hold the guest (any more), for whoever then detaches it."""
        await self._until(lambda: not (self.state.guest.frozen or self.state.status == "pending"))

    async def abandon(self) -> None:
        """Cancel the job and see it end, within `GRACE` seconds; for a caller that goes away.

        A job that somebody else started, and for which nothing was decided here, is left alone.
        """
        if self._task is None or self.done:
            return
        if self.adopted and self.state.order.decision is None:
            await self.detach()
            return
        if self.state.order.decision is None or self.state.order.decision is Choice.ABORT:
            self.log.warning("session_ends_with_job_running", doing="cancelling the job")
            self._driver.tell(facts.Decided(Choice.ABORT, "session end"))
            self._driver.hurry()
        await asyncio.wait({self._task}, timeout=GRACE)
        await self.detach()

    async def detach(self, *, claimed: bool = False) -> None:
        """Stop following the job and leave it as it is in QEMU; `Session.adopt` takes it up.

        With `claimed` what it claimed stays in QEMU as well, and tells whoever takes it up what it
        works on, even where it has ended by then; the claim is anybody's once this process ends.
        """
        if claimed and self.own_claim is not None:
            self.own_claim.abandon()
        if self._task is not None:
            await stop(self._task)
            await self._unclaim()  # it may have been stopped before its first step

    # -- the task ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        driver = self._driver
        try:
            if driver.timeout is not None:
                left = max(0.0, driver.timeout - self.spent)
                self._call_later(left, self._time_is_up)
            if self._around.converge is not None:
                from qmpcommit.commit.converge import converge

                watching = converge(
                    self,
                    self._monitor,
                    self._around.converge,
                    until="over",
                    ledger=driver.ledger,
                )
                self._converging = asyncio.create_task(watching, name=f"converge {self.id}")
            await driver.drive()
            await self._converged()
            for warning in driver.outcome.warnings if driver.outcome is not None else ():
                self.log.warning("outcome_warning", warning=warning)
        except asyncio.CancelledError:
            goes_on = "it goes on in QEMU, for whoever takes it up"
            hint: str | None = f"Take it up with 'qmpcommit pivot|keep|abort QMP {self.id}'"
            ended: dict[str, object] = {}
            if driver.outcome is not None:
                goes_on, hint = report.ended_before(driver.outcome), None
                ended["outcome"] = driver.outcome.model_dump(mode="json")
            driver.error = driver.error or JobDetached(
                f"job {self.id} on {self.plan.disk} of {self.plan.vm} is no longer followed from"
                f" here; {goes_on}",
                hint=hint,
                **self._where(),
                **ended,
            )
            raise
        except BaseException as error:
            driver.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            for timer in self._timers:
                timer.cancel()
            if self._converging is not None:
                await stop(self._converging)  # which puts the limits back
            await self._unclaim()

    async def _converged(self) -> None:
        """The job is over: the guest's limits are back, or the outcome tells how to repair them."""
        if self._converging is None:
            return
        self._wake()
        report = await self._converging
        if self._driver.outcome is not None:
            warnings = list(self._driver.outcome.warnings)
            if not report.restored:
                warnings.append(f"the disk's former I/O limits are not back: {report.remark}")
            self._driver.outcome = replace(
                self._driver.outcome, converge=report.model_dump(), warnings=warnings
            )

    @property
    def _decided(self) -> phases.State:
        """Its state, with what was decided in this very moment."""
        state, told = self.state, self._told
        if told is None or state.phase is not Phase.READY or state.order.decision is not None:
            return state
        return state._replace(phase=Phase.DECIDED, order=state.order.changed(told, "caller"))

    def _conflict(self, why: str) -> JobConflict:
        plan = self.plan
        return JobConflict(f"job {self.id} on {plan.disk} of {plan.vm} {why}", **self._where())

    def _order(self, choice: Choice) -> Awaited[None]:
        state = self._decided
        match phases.objection(state, choice):
            case "not ready" if not self.plan.two_phase:
                raise NotReady(
                    f"job {self.id} on {self.plan.disk} of {self.plan.vm} commits a layer below the"
                    f" active one: it has no second phase, and nothing to {choice.value}. It goes"
                    " on, and ends by itself",
                    **self._where(),
                )
            case "not ready":
                raise NotReady(
                    f"job {self.id} on {self.plan.disk} of {self.plan.vm} is not READY: it is still"
                    f" copying ({self.state.done} of {self.state.total} bytes). The job goes on;"
                    f" {choice.value} again when it is READY",
                    **self._where(),
                )
            case "decided":
                raise self._conflict(f"is decided already: {state.order.decision}")
            case "ended":
                if state.order.decision is not choice:
                    raise self._conflict("has ended already; its outcome tells how")
            case _:
                self._told = choice
                self._driver.tell(facts.Decided(choice, "caller"))
        return Awaited(lambda: self._until(lambda: False))

    def _time_is_up(self) -> None:
        self.log.warning("deadline", seconds=self._driver.timeout)
        self._driver.tell(facts.Decided(Choice.ABORT, "deadline"))
        self._driver.hurry()
        self._call_later(GRACE, self._hard_stop)

    def _call_later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, call))

    def _hard_stop(self) -> None:
        assert self._task is not None
        driver = self._driver
        driver.error = report.deadline_error(
            self.plan, self.state, driver.timeout or 0, driver.outcome
        )
        self._task.cancel()

    def _where(self) -> dict[str, object]:
        return {"vm": self.plan.vm, "disk": self.plan.disk.name, "job_id": self.id}

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for a phase that fulfils the condition, or for the end."""
        while not self.done and not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _has_left(self, phase: Phase) -> bool:
        return self.phase is not phase

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


async def see_through(job: CommitJob) -> CommitOutcome:
    """Its outcome, as `CommitJob.wait`; a cancellation cancels the job first."""
    try:
        return await job.wait()
    except asyncio.CancelledError:
        await to_the_end(job.abandon())
        raise
