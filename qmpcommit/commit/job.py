"""Drives the phases of one commit over a monitor.

A `CommitJob` is a task of its own from the moment ``block-commit`` is sent, so that READY is
answered whether or not anybody awaits the job. It feeds `phases.step` with facts, one at a
time, and carries out the actions that come back.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from qmpcommit.block.bitmaps import carry
from qmpcommit.block.chain import Disk, Image, find_again, read_disks
from qmpcommit.block.graph import read_graph
from qmpcommit.commit import facts, phases, report
from qmpcommit.commit.aftermath import Around, OnStall, Stall, clear_away
from qmpcommit.commit.facts import Choice, Command, Fact, Where
from qmpcommit.commit.hearing import Hearing
from qmpcommit.commit.outcome import CommitOutcome, JobProgress, Timings
from qmpcommit.commit.phases import Phase
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Ready, Recycle, Settled, immediate, settle
from qmpcommit.commit.recycle import FreshOverlay
from qmpcommit.errors import (
    CommandRefused,
    CommitFailed,
    DeadlineExceeded,
    JobConflict,
    MonitorLost,
    NotReady,
    QmpCommitError,
    VMGone,
)
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import stop

HOLD_LIMIT = 2.0
"""Seconds that the disk's I/O may be held while the job is PENDING."""

HEARTBEAT = 10.0
"""Seconds of silence after which QEMU is asked about the job."""

GRACE = 10.0
"""Seconds that a job gets to end after it was cancelled for a deadline or a closing session."""

_FOREVER_REFUSED = {"CommandNotFound"}


class CommitJob:
    """One commit under way.

    Made by `Session.commit` and `Session.adopt`. Nothing has to be awaited for the policy to be
    carried out; `wait` gives the outcome, `progress` the way there.
    """

    def __init__(
        self,
        monitor: Monitor,
        plan: Plan,
        *,
        timeout: float | None = None,
        adopted: bool = False,
        auto_finalize: bool = True,
        around: Around = Around(),  # noqa: B008  (frozen)
    ) -> None:
        self.plan = plan
        self.id = plan.job_id
        self.adopted = adopted
        self.log = monitor.log.bind(disk=plan.disk.name, job=plan.job_id)
        self._monitor = monitor
        self._timeout = timeout
        self._around = around
        prepares = around.carrying is not None and bool(around.carrying.names)
        if adopted:
            self._state, self._owed = phases.adopt(two_phase=plan.two_phase)
        else:
            self._state, self._owed = phases.begin(
                two_phase=plan.two_phase, prepares=prepares, stalls=plan.stalls
            )
        self._auto_finalize = auto_finalize and not prepares
        self._facts: asyncio.Queue[Fact] = asyncio.Queue()
        self._hearing = Hearing(plan.job_id, self._facts.put_nowait)
        self._consulting: asyncio.Task[Settled] | None = None
        self._stalling: asyncio.Task[None] | None = None
        self._recycle: Recycle | None = None
        self._fresh: FreshOverlay | None = None
        self._active: Image | None = None
        self._policy_error: BaseException | None = None
        self._lost: QmpCommitError | None = None
        self._outcome: CommitOutcome | None = None
        self._error: BaseException | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._disk_now: Disk | None = None
        self._task: asyncio.Task[None] | None = None

    # -- what a caller sees -----------------------------------------------------------------------

    @property
    def state(self) -> phases.State:
        """The state of the machine; a frozen value."""
        return self._state

    @property
    def phase(self) -> Phase:
        """Where the commit is."""
        return self._state.phase

    @property
    def done(self) -> bool:
        """Whether the outcome, or the error, is there."""
        return self._task is None or self._task.done()

    async def started(self) -> None:
        """Wait until QEMU has taken the job; raises what `wait` would if it did not."""
        await self._until(lambda: self._state.phase is not Phase.STARTING)
        if self._error is not None and not self._state.began:
            raise self._error

    async def seen(self) -> None:
        """Wait until an adopted job's status is known."""
        await self._until(lambda: bool(self._state.status))

    async def ready(self) -> None:
        """Wait until the second phase has begun (``BLOCK_JOB_READY``).

        Raises what `wait` raises if the job ends without it; returns at once for an
        intermediate layer that has ended, since that has no second phase.
        """
        before = (Phase.STARTING, Phase.COPYING)
        await self._until(lambda: self._state.phase not in before)
        if self.done and self._error is not None:
            raise self._error

    async def wait(self) -> CommitOutcome:
        """The outcome, or the `QmpCommitError` that the commit ended with.

        Cancelling the wait does not cancel the commit: see `cancel`.
        """
        await self._until(lambda: False)
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    async def progress(self, every: float = 0.5) -> AsyncIterator[JobProgress]:
        """How far it is, now and `every` so many seconds until the end (``query-jobs``)."""
        clock = asyncio.get_running_loop().time
        then, before, rate = clock(), None, 0.0
        seen = facts.JobSeen("")
        while not self.done:
            if self._monitor.connected and self._state.running and self._state.began:
                with suppress(QmpCommitError):
                    seen = await self._ask() or seen
            now = clock()
            if before is not None and now > then:
                rate = max(0, seen.done - before) / (now - then)
            then, before = now, seen.done
            yield JobProgress(seen.done, seen.total, rate, self.phase.value, seen.status)
            with suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await self._until(partial(self._has_left, self.phase))
        state = self._state
        yield JobProgress(state.done, state.total, rate, state.phase.value, state.status)

    def pivot(self) -> Awaitable[None]:
        """Decide for the base, at once; awaiting it waits until the job has ended.

        Raises `NotReady` before READY (the job goes on unharmed), `JobConflict` when the
        opposite is decided already or the job has ended.
        """
        return self._order(Choice.PIVOT)

    def recycle(self, overlay: str | os.PathLike[str]) -> Awaitable[None]:
        """Pivot, with a fresh `overlay` over the base before the guest can write; as `pivot`."""
        recycle = Recycle(os.fspath(overlay))
        if phases.objection(self._state, Choice.RECYCLE) is None:
            self._recycle = recycle
        return self._order(Choice.RECYCLE)

    def keep(self) -> Awaitable[None]:
        """Decide for the overlay; as `pivot`."""
        return self._order(Choice.KEEP)

    def abort(self) -> Awaitable[None]:
        """Cancel the job by force, in either phase; the overlay stays active."""
        return self._order(Choice.ABORT)

    cancel = abort

    # -- what a session does with it --------------------------------------------------------------

    def start(self, ended: Callable[[], None]) -> None:
        """Begin, in a task of the running loop; `ended` is called when that is over."""
        self._task = asyncio.create_task(self._run(), name=f"commit {self.id}")

        def over(task: asyncio.Task[None]) -> None:
            ended()
            self._wake()

        self._task.add_done_callback(over)

    async def abandon(self) -> None:
        """Cancel the job and see it end, within `GRACE` seconds; for a caller that goes away.

        A job that somebody else started, and for which nothing was decided here, is left alone.
        """
        if self._task is None or self.done:
            return
        if self.adopted and self._state.decision is None:
            await self.detach()
            return
        if self._state.decision is None or self._state.decision is Choice.ABORT:
            self.log.warning("session_ends_with_job_running", doing="cancelling the job")
            self._facts.put_nowait(facts.Decided(Choice.ABORT, "session end"))
        await asyncio.wait({self._task}, timeout=GRACE)
        await self.detach()

    async def detach(self) -> None:
        """Stop following the job and leave it as it is in QEMU; `Session.adopt` takes it up."""
        if self._task is not None:
            await stop(self._task)

    # -- the loop ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        hearing = self._hearing
        try:
            with self._monitor.subscribers.while_in(hearing.message, hearing.link):
                if not self._monitor.connected:
                    self._facts.put_nowait(facts.News.LINK_LOST)
                if self._timeout is not None:
                    self._call_later(self._timeout, self._time_is_up)
                await self._drive()
                await self._conclude()
        except asyncio.CancelledError:
            self._error = self._error or MonitorLost(
                f"job {self.id} on {self.plan.disk} of {self.plan.vm} is no longer followed from"
                " here; it goes on in QEMU. Take it up with"
                f" 'qmpcommit pivot|keep|abort QMP {self.id}'",
                **self._where(),
            )
            raise
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise
        finally:
            for timer in self._timers:
                timer.cancel()
            for task in (self._consulting, self._stalling):
                if task is not None:
                    await stop(task)

    async def _drive(self) -> None:
        while True:
            owed, self._owed = self._owed, []
            for action in owed:
                await self._carry_out(action)
            if self._state.finished:
                break
            try:
                fact = self._facts.get_nowait()
            except asyncio.QueueEmpty:
                fact = await self._next_fact()
            self._take(fact)

    async def _next_fact(self) -> Fact:
        try:
            async with asyncio.timeout(HEARTBEAT):
                return await self._facts.get()
        except TimeoutError:
            return facts.News.TICK

    def _take(self, fact: Fact) -> None:
        before = self._state
        self._state, self._owed = phases.step(before, fact)
        if bool(self._state.status) is not bool(before.status):
            self._wake()
        if self._state.phase is not before.phase or self._state.finished:
            self._wake()
            self.log.debug("phase", phase=self._state.phase.value, was=before.phase.value)

    async def _carry_out(self, action: facts.Action) -> None:
        match action:
            case Command():
                await self._send(action)
            case facts.Duty.ASK:
                await self._try(self._answer())
            case facts.Duty.READ_GRAPH:
                await self._try(self._read_back())
            case facts.Duty.CONSULT:
                self._consult()
            case facts.Duty.RELINK:
                await self._relink()
            case facts.Duty.PREPARE:
                await self._try(self._prepare())
            case facts.Duty.STALL:
                self._stall()
            case facts.Duty.FREEZE:
                await self._try(self._freeze(), facts.Frozen("the monitor was lost meanwhile"))
            case facts.Duty.OVERLAY:
                await self._try(self._overlay())
            case facts.Duty.THAW:
                await self._try(self._thaw())
            case facts.Duty.FINISH:
                pass

    async def _send(self, command: Command) -> None:
        arguments: Mapping[str, Any] = {"id": self.id}
        if command is Command.START:
            arguments = self.plan.arguments
        elif command is Command.KEEP:
            arguments = {"device": self.id, "force": False}
        try:
            await self._monitor.execute(command.value, arguments)
        except CommandRefused as error:
            final = error.error_class in _FOREVER_REFUSED
            self._facts.put_nowait(facts.Refused(command, error.desc, final))
            self.log.info("refused", command=command.value, desc=error.desc)
        except DeadlineExceeded:
            self._unanswered(command)
        except (MonitorLost, VMGone) as error:
            self._lost = error
            self._facts.put_nowait(facts.Unanswered(command))
        else:
            self._facts.put_nowait(facts.Accepted(command))
            self.log.info("accepted", command=command.value)

    async def _try(self, asking: Awaitable[Fact], lost: Fact | None = None) -> None:
        """Ask QEMU something; losing the link meanwhile is a fact of its own, `lost` another."""
        try:
            self._facts.put_nowait(await asking)
            return
        except DeadlineExceeded:
            self._unanswered(None)
        except (MonitorLost, VMGone) as error:
            self._lost = error
            self._facts.put_nowait(facts.News.LINK_LOST)
        if lost is not None:
            self._facts.put_nowait(lost)

    def _unanswered(self, command: Command | None) -> None:
        """QEMU is silent: this connection is not believed any more."""
        self.log.warning("no_answer", command=command and command.value)
        self._monitor.drop()
        self._facts.put_nowait(facts.Unanswered(command) if command else facts.News.LINK_LOST)

    async def _prepare(self) -> Fact:
        """The disk's I/O waits: carry the bitmaps, and let go."""
        carrying = self._around.carrying
        if carrying is None:
            return facts.Prepared()
        try:
            async with asyncio.timeout(HOLD_LIMIT):
                await carry(self._monitor, carrying)
        except CommandRefused as error:
            return facts.Prepared(f"the bitmaps could not be carried into the base: {error.desc}")
        except DeadlineExceeded:
            raise
        except TimeoutError:
            return facts.Prepared(f"carrying the bitmaps took longer than {HOLD_LIMIT:g} s")
        self.log.info("bitmaps_carried", names=list(carrying.names))
        return facts.Prepared()

    def _stall(self) -> None:
        """A storage error makes the job wait: tell its owner, who says when to go on."""
        stall = Stall(self.plan.vm, self.plan.disk.name, self.id, self.plan.base)
        self.log.warning("stalled", base=self.plan.base.filename)
        on_stall = self._around.on_stall
        if on_stall is not None:
            self._stalling = asyncio.create_task(self._relieve(on_stall, stall))

    async def _relieve(self, on_stall: OnStall, stall: Stall) -> None:
        try:
            await on_stall(stall)
        except Exception as error:  # the owner's own; the job must not hang for it
            self._policy_error = error
            self._facts.put_nowait(facts.Decided(Choice.ABORT, "failed policy"))
        else:
            self._facts.put_nowait(facts.News.RELIEVED)

    async def _freeze(self) -> Fact:
        assert self._recycle is not None
        self._fresh = FreshOverlay(
            self._monitor, self.plan, self._recycle.overlay, self._around.cwd
        )
        try:
            await self._fresh.freeze()
        except (CommandRefused, CommitFailed) as error:
            return facts.Frozen(getattr(error, "desc", error.message))
        return facts.Frozen()

    async def _overlay(self) -> Fact:
        assert self._fresh is not None
        try:
            await self._fresh.lay()
            self._active = await self._fresh.image()
        except CommandRefused as error:
            return facts.Overlaid(error.desc)
        return facts.Overlaid()

    async def _thaw(self) -> Fact:
        if self._fresh is not None:
            await self._fresh.thaw()
        return facts.News.THAWED

    async def _ask(self) -> facts.JobSeen | None:
        if self.plan.stalls:
            return await self._ask_with_io_status()
        for job in await self._monitor.execute("query-jobs"):
            if job.get("id") == self.id:
                return facts.JobSeen(
                    status=str(job.get("status")),
                    done=int(job.get("current-progress", 0)),
                    total=int(job.get("total-progress", 0)),
                    error=job.get("error"),
                    auto_finalize=self._auto_finalize,
                )
        return None

    async def _ask_with_io_status(self) -> facts.JobSeen | None:
        for job in await self._monitor.execute("query-block-jobs"):
            if job.get("device") == self.id:
                return facts.JobSeen(
                    status=str(job.get("status")),
                    done=int(job.get("offset", 0)),
                    total=int(job.get("len", 0)),
                    error=job.get("error"),
                    auto_finalize=self._auto_finalize,
                    io_status=str(job.get("io-status", "ok")),
                )
        return None

    async def _answer(self) -> Fact:
        return facts.Answered(await self._ask())

    async def _read_back(self) -> Fact:
        disks = read_disks(await read_graph(self._monitor))
        self._disk_now = find_again(disks, self.plan.disk)
        return facts.GraphRead(self._locate())

    def _locate(self) -> Where:
        """Where the disk stands now, compared with the plan."""
        now = self._disk_now
        if now is None or now.active is None:
            return Where.UNUSED
        layers = [image.node_name for image in now.chain]
        if not self.plan.two_phase:
            if self.plan.base.node_name not in layers:
                return Where.OTHER
            return Where.OTHER if self.plan.top.node_name in layers else Where.MERGED
        if layers[0] == self.plan.base.node_name:
            return Where.BASE
        return Where.TOP if layers[0] == self.plan.top.node_name else Where.OTHER

    async def _relink(self) -> None:
        self.log.info("relinking")
        try:
            same = await self._monitor.restore()
        except (VMGone, MonitorLost) as error:
            self._lost = error
            self._facts.put_nowait(facts.LinkDead(vm_gone=isinstance(error, VMGone)))
        else:
            self._facts.put_nowait(facts.LinkBack(same))

    # -- decisions --------------------------------------------------------------------------------

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
            self._facts.put_nowait(self._decision(settled))
            return
        self.log.info("ready", policy=getattr(plan.policy, "kind", "callable"))
        self._consulting = asyncio.create_task(self._settle(ready), name=f"policy {self.id}")
        self._consulting.add_done_callback(self._settled)

    async def _settle(self, ready: Ready) -> Settled:
        with suppress(QmpCommitError):  # without it the policy is only told less
            job = await self._ask()
            ready = replace(ready, bytes_committed=job.done if job else 0)
        return await settle(self.plan.policy, ready)

    def _settled(self, consulting: asyncio.Task[Settled]) -> None:
        if not self._state.running or self._state.decision is not None:
            if not consulting.cancelled():
                consulting.exception()
            return
        if consulting.cancelled():
            self._policy_error = asyncio.CancelledError("the policy was cancelled")
        else:
            self._policy_error = consulting.exception()
        if self._policy_error is not None:
            self.log.warning("policy_failed", error=repr(self._policy_error))
            self._facts.put_nowait(facts.Decided(Choice.ABORT, "failed policy"))
        else:
            self._facts.put_nowait(self._decision(consulting.result()))

    def _decision(self, settled: Settled) -> facts.Decided:
        if isinstance(settled.decision, Recycle):
            self._recycle = settled.decision
        return facts.Decided(Choice(settled.decision.kind), settled.by)

    def _order(self, choice: Choice) -> Awaitable[None]:
        match phases.objection(self._state, choice):
            case "not ready":
                raise NotReady(
                    f"job {self.id} on {self.plan.disk} of {self.plan.vm} is not READY: it is still"
                    f" copying ({self._state.done} of {self._state.total} bytes). The job goes on;"
                    f" {choice.value} again when it is READY",
                    **self._where(),
                )
            case "decided":
                raise JobConflict(
                    f"job {self.id} on {self.plan.disk} of {self.plan.vm} is decided already:"
                    f" {self._state.decision}",
                    **self._where(),
                )
            case "ended":
                if self._state.decision is not choice:
                    raise JobConflict(
                        f"job {self.id} on {self.plan.disk} of {self.plan.vm} has ended already;"
                        " its outcome tells how",
                        **self._where(),
                    )
            case None:
                self._facts.put_nowait(facts.Decided(choice, "caller"))
        return _Ending(self)

    def _time_is_up(self) -> None:
        self.log.warning("deadline", seconds=self._timeout)
        self._facts.put_nowait(facts.Decided(Choice.ABORT, "deadline"))
        self._call_later(GRACE, self._hard_stop)

    def _call_later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, call))

    def _hard_stop(self) -> None:
        if self._task is not None and not self._task.done():
            self._error = report.deadline_error(self.plan, self._state, self._timeout or 0)
            self._task.cancel()

    # -- the end ----------------------------------------------------------------------------------

    async def _conclude(self) -> None:
        state, plan = self._state, self.plan
        error = report.error_of(plan, state, self._timeout, self._lost, self._policy_error)
        if error is not None:
            self._error = error
            self.log.warning("failed", verdict=state.verdict and state.verdict.value)
            return
        times = dict(self._hearing.times)
        if not plan.two_phase:
            times.pop("decided", None)  # it has no second phase
        outcome = report.outcome_of(plan, state, self._active_now(), Timings(**times))
        if self._fresh is not None:
            outcome = replace(outcome, guest_paused=self._fresh.paused)
        if self._around.carrying is not None:
            outcome.warnings.extend(self._around.carrying.problems)
        self._outcome = outcome  # it is true, whatever becomes of the files
        if outcome.invalidated and not self.adopted:
            self._outcome = await clear_away(self._monitor, plan, outcome, self._around)
        self.log.info("ended", action=outcome.action, by=outcome.decided_by)

    def _active_now(self) -> Image | None:
        if self._active is not None:
            return self._active
        if self._disk_now is not None:
            return self._disk_now.active
        return {
            phases.Verdict.PIVOTED: self.plan.base,
            phases.Verdict.MERGED: self.plan.disk.active,
        }.get(self._state.verdict or phases.Verdict.FAILED, self.plan.top)

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


class _Ending:
    """Awaitable that ends with the job; a decision needs nobody to await it."""

    def __init__(self, job: CommitJob) -> None:
        self._job = job

    def __await__(self) -> Any:
        return self._job._until(lambda: False).__await__()
