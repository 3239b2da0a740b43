"""Keeps one promise: begins or resumes its job, waits for its VM, and journals its end."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from qmpcommit.block.chain import absolute
from qmpcommit.commit.claim import Claim, let_go, take_for
from qmpcommit.commit.hook import PivotCommand
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.objections import may_pivot
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.pace import Converge
from qmpcommit.commit.phases import Verdict
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Hold
from qmpcommit.commit.preconditions import ask_whether
from qmpcommit.commit.report import error_of
from qmpcommit.commit.request import what_of_stale
from qmpcommit.commit.resuming import repay
from qmpcommit.commit.stale_layers import Around, OnPivot, Stall
from qmpcommit.daemon.config import Config
from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.metrics import Metrics
from qmpcommit.daemon.promise import Prepared, Promise
from qmpcommit.daemon.registry import VM, Registry
from qmpcommit.daemon.steps import STEP_PREFIX, refuse_in_window
from qmpcommit.errors import (
    CommitFailed,
    ConnectError,
    DeadlineExceeded,
    JobConflict,
    JobNotFound,
    MonitorLost,
    QmpCommitError,
    VMGone,
)
from qmpcommit.qmp.process import is_alive, is_same
from qmpcommit.session import Session
from qmpcommit.window.remains import is_own_job, marking_closed
from qmpcommit.wire.commit import CommitRequest

HOOK_TIMEOUT = 60.0
STALL_PAUSE = 2.0
LOOK_AGAIN = 0.5
"""Seconds."""

MAX_BEGINS = 3
"""How often a commit is begun that QEMU turns out not to know."""

_AWAY = (ConnectError, MonitorLost, VMGone)


def _ended_by_others(promise: Promise) -> CommitFailed:
    return CommitFailed(
        f"the commit of {promise.disk} of {promise.vm} was READY, and its job {promise.job_id} is"
        " gone: somebody has ended it while no daemon followed it. It is not begun anew. If it was"
        " cancelled by force, its base is valid only under the overlay",
        vm=promise.vm,
        disk=promise.disk,
        job_id=promise.job_id,
    )


class Keeper:
    """Runs promises on the VMs of a registry.

    `rate` tells a promise's bytes per second when it begins, `begun` is called when it has;
    `allow` refuses a plan that who asked may not have;
    `claim_of` tells what holds its disk already, where it is a part of something else.
    """

    def __init__(
        self, config: Config, registry: Registry, journal: Journal, metrics: Metrics
    ) -> None:
        self.config, self._registry = config, registry
        self._journal, self._metrics = journal, metrics
        self.rate: Callable[[Promise], int] = lambda promise: promise.request.bandwidth or 0
        self.begun: Callable[[], object] = lambda: None
        self.allow: Callable[[Promise, Session, Plan], object] = lambda promise, session, plan: None
        self.claim_of: Callable[[Promise], Claim | None] = lambda promise: None

    async def keep(self, promise: Promise) -> None:
        """One promise that may run, to its end."""
        promise.decides = self._registry.clearing.decides
        if promise.state == "queued":
            promise.run()
        try:
            outcome = await self.outcome_of(promise)
        except QmpCommitError as error:
            await self._fail(promise, error)
        except Exception as error:  # a bug of ours must not leave a promise without an end
            promise.log.warning("bug", error=repr(error))
            await self._fail(promise, QmpCommitError(f"internal error: {error!r}"))
        else:
            await promise.end("done", outcome=outcome)
            self.count(promise, outcome)

    async def outcome_of(self, promise: Promise) -> CommitOutcome:
        """Begin it or go on with it, over losses of its VM; raises the error that it ends with."""
        begins = 0
        while True:
            try:
                return await self._attempt(promise)
            except _AWAY as error:
                await self.wait_for_vm(promise, error)
            except CommitFailed as error:
                begins += 1
                found = promise.lost or promise.adopted
                begun = error.facts.get("begun") is not False or found
                if begun or begins >= MAX_BEGINS:
                    raise
                if promise.ready is not None:
                    raise _ended_by_others(promise) from error
                promise.log.warning("begin_again", why=error.message)
                await promise.forget_begin()

    async def _attempt(self, promise: Promise) -> CommitOutcome:
        """Begin, or go on with, the job on a session, and see its end."""
        vm = self._registry.vms.get(promise.vm)
        if vm is None:
            raise ConnectError(f"no VM is called '{promise.vm}' at the moment", vm=promise.vm)
        async with self._registry.use(vm) as session:
            try:
                if promise.begun and not await _is_there(promise, vm, session):
                    job = await self._resume(promise, vm, session)
                elif promise.lost or promise.adopted:
                    job = await self._adopt(promise, vm, session)
                else:
                    job = await self._begin(promise, vm, session)
                promise.job = job
                promise.found.set()
                self.begun()
                if promise.decision == "abort":
                    with suppress(JobConflict):
                        job.abort()
                return await job.wait()
            finally:
                promise.job = None
                promise.found.clear()

    async def prepare(self, promise: Promise, session: Session) -> None:
        """Check a commit whose promise is asked for; raises what `Session.commit` would."""
        promise.prepared = await self._prepare(promise, session)
        plan = promise.prepared.job.plan
        promise.called(plan.job_id)
        promise.storage = await asyncio.to_thread(storage_of, plan, session.cwd)

    async def _prepare(self, promise: Promise, session: Session) -> Prepared:
        asked = promise.request.asked
        policy = None if asked.policy is None else promise.decided_policy()
        job = await session.prepare(
            replace(asked, policy=policy, job_id=promise.job_id or None),
            Around(**self._hooks(promise, session)),
            claim=self.claim_of(promise),
        )
        self.allow(promise, session, job.plan)
        return Prepared(job, session, time.monotonic())

    async def _begin(self, promise: Promise, vm: VM, session: Session) -> CommitJob:
        request = promise.request
        promise.identity = vm.identity
        left = _time_left(promise)
        prepared, promise.prepared = promise.prepared, None
        unasked = promise.job_id.startswith(STEP_PREFIX)
        if prepared is None or unasked or not prepared.serves(session):
            prepared = await self._prepare(promise, session)
        job = prepared.job
        if unasked:  # a window may have been opened while it waited
            refuse_in_window(job.plan)
        promise.rate = self.rate(promise)
        job.plan.arguments.pop("speed", None)
        if promise.rate:
            job.plan.arguments["speed"] = promise.rate
        await take_for(session, job, override=request.override)
        try:
            if request.only_if is not None:
                await ask_whether(request.only_if, job.plan)
        except BaseException:
            await let_go(job)
            raise
        job.timeout = left
        return await session.launch(job, override=request.override)

    async def _resume(self, promise: Promise, vm: VM, session: Session) -> CommitJob:
        plan, noted, files = promise.resumed(vm.identity)
        if noted.same_vm is not False:
            await self.repay(promise, session)
        promise.log.info("resuming", step=promise.noted.get("step"), same_vm=noted.same_vm)
        return await session.resume(
            plan,
            noted,
            files=files,
            timeout=max(0.0, left) if (left := seconds_left(promise)) is not None else None,
            claim=self.claim_of(promise),
            **self._hooks(promise, session),
        )

    async def _adopt(self, promise: Promise, vm: VM, session: Session) -> CommitJob:
        """What QEMU shows of one that it has, by the name of its job, whoever began that."""
        if promise.adopted and is_same(promise.identity, vm.identity) is False:
            raise self._gone(promise, "another process answers now")
        promise.identity = vm.identity
        alone = "group" not in promise.noted  # a member is not decided without the others
        policy = promise.decided_policy() if alone else Hold()
        left = seconds_left(promise)
        pivots = may_pivot(policy)
        undoes = promise.lost or getattr(policy, "kind", "") == "abort"
        try:
            job = await session.adopt(
                promise.job_id,
                policy=policy,
                pending="cancel" if undoes else "finalize",
                stale=what_of_stale(promise.request.delete, promise.request.stale)
                if pivots
                else None,
                on_pivot=self._on_pivot(promise) if pivots else None,
                carry_bitmaps=promise.request.carry_bitmaps,
                timeout=max(0.0, left) if left is not None else None,
                ledger=promise,
            )
        except JobNotFound:
            if promise.adopted:
                raise
            raise CommitFailed(
                f"the daemon's journal was damaged, and what became of the commit of {promise.disk}"
                f" of {promise.vm} is lost with it: QEMU has no job {promise.job_id}. It was never"
                " begun, or has ended: see what the guest writes to with `qmpcommit chain` before"
                " you ask for it again",
                job_id=promise.job_id,
            ) from None
        promise.log.warning("adopted", policy=getattr(policy, "kind", ""))
        return job

    def _hooks(self, promise: Promise, session: Session) -> dict[str, Any]:
        """The same; of one that closes a window its overlay itself says that it is stale then."""
        hooks = self.around(promise)
        if is_own_job(promise.job_id, promise.disk):
            hooks["on_pivot"] = marking_closed(session)
        return hooks

    def around(self, promise: Promise) -> dict[str, Any]:
        """What goes around a commit, as `Session.commit` and `Session.resume` take it."""
        return {
            "on_pivot": self._on_pivot(promise),
            "on_stall": partial(self._on_stall, promise),
            "converge": _converge(promise.request),
            "ledger": promise,
        }

    async def repay(self, promise: Promise, session: Session) -> None:
        """What a former process did to the guest and could not undo any more."""
        await repay(session, promise.noted, promise)

    async def wait_for_vm(self, promise: Promise, error: QmpCommitError) -> None:
        """Until the VM answers again; raises the promise's end where it is gone for good."""
        if isinstance(error, VMGone) and not is_alive(promise.identity):
            raise error  # else no more than its monitor's socket is gone
        promise.log.info("vm_away", why=error.message)
        limit = self.config.limits.gone_after
        begun = time.monotonic()
        while True:
            vm = self._registry.vms.get(promise.vm)
            if vm is not None and vm.connect == "on-demand":
                with suppress(ConnectError):
                    await asyncio.sleep(LOOK_AGAIN)
                    async with self._registry.use(vm):
                        if not is_another(vm, promise):
                            return
            elif vm is not None and vm.up.is_set() and not is_another(vm, promise):
                return
            else:
                away = vm is not None and not vm.up.is_set()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN):
                        await (vm.up.wait() if vm is not None and away else asyncio.sleep(1))
            alive = is_alive(promise.identity)
            waited = time.monotonic() - begun
            if promise.identity and not alive and waited > min(2.0, limit):
                raise self._gone(promise, f"its QEMU (process {promise.identity}) ended")
            if not alive and waited > limit:
                raise self._gone(promise, f"it did not answer for {limit:g} s")

    def _gone(self, promise: Promise, why: str) -> QmpCommitError:
        """The error of a VM that does not come back, with what is known of its disk."""
        where = {"vm": promise.vm, "disk": promise.disk, "job_id": promise.job_id}
        if not promise.begun:
            return VMGone(f"{promise.vm} is gone: {why}. Nothing was sent", **where)
        plan, noted, _ = promise.resumed("")
        state = noted.state._replace(verdict=Verdict.VM_GONE)
        if noted.outcome is not None:
            state = noted.state
        lost = VMGone(f"{promise.vm} is gone: {why}")
        return error_of(plan, state, None, lost, None, left=noted.left) or lost

    def _on_pivot(self, promise: Promise) -> OnPivot | None:
        command = promise.request.on_pivot
        if command is None:
            return None
        return PivotCommand(command, HOOK_TIMEOUT)

    async def _on_stall(self, promise: Promise, stall: Stall) -> None:
        self._journal.write_soon(events=[promise.event(stalled=stall.base.filename)])
        await asyncio.sleep(STALL_PAUSE)

    # -- ends -------------------------------------------------------------------------------------

    async def _fail(self, promise: Promise, error: QmpCommitError) -> None:
        self.count_failure(promise, error)
        await promise.end("failed", error=error_dict(error))

    def count_failure(self, promise: Promise, error: QmpCommitError) -> None:
        """For the metrics and the log: one has failed so."""
        error.add(vm=promise.vm, disk=promise.disk, job_id=promise.job_id)
        promise.log.warning("failed", error=type(error).__name__, why=error.message)
        self._metrics.failures.labels(type(error).__name__).inc()
        self._metrics.commits.labels("failed", promise.policy_kind).inc()

    def count(self, promise: Promise, outcome: CommitOutcome) -> None:
        """For the metrics: one has ended so."""
        self._metrics.commits.labels(outcome.action, promise.policy_kind).inc()
        self._metrics.bytes.inc(outcome.bytes_committed)
        if outcome.guest_paused is not None:
            self._metrics.guest_paused.observe(outcome.guest_paused)
        times = outcome.timings
        if times.started and times.ready:
            seconds = (times.ready - times.started).total_seconds()
            self._metrics.phase_seconds.labels("copying").observe(max(0.0, seconds))
        if times.ready and times.ended:
            seconds = (times.ended - times.ready).total_seconds()
            self._metrics.phase_seconds.labels("ready").observe(max(0.0, seconds))


async def _is_there(promise: Promise, vm: VM, session: Session) -> bool:
    """Whether the job that one was adopted as has not ended: it is adopted again then."""
    if not promise.adopted or is_same(promise.identity, vm.identity) is False:
        return False
    listed = await session.execute("query-jobs")
    ended = ("concluded", "null")
    return any(job["id"] == promise.job_id and job["status"] not in ended for job in listed)


def is_another(vm: VM, promise: Promise) -> bool:
    """Whether another process answers for the VM while the one that has the job lives on."""
    if not promise.identity or vm.identity in ("", promise.identity):
        return False
    return is_alive(promise.identity)


def error_dict(error: QmpCommitError) -> dict[str, Any]:
    """An error as the journal and the API have it."""
    described: dict[str, Any] = json.loads(json.dumps(error.to_dict(), default=str))
    return described


def _converge(request: CommitRequest) -> Converge | None:
    return None if request.converge is None else Converge(deadline=request.converge, pause=0.5)


def seconds_left(promise: Promise) -> float | None:
    """Until its deadline; None where it has none."""
    if promise.request.timeout is None:
        return None
    return promise.born + promise.request.timeout - time.monotonic()


def _time_left(promise: Promise) -> float | None:
    left = seconds_left(promise)
    if left is not None and left <= 0:
        raise DeadlineExceeded(
            f"the commit of {promise.disk} of {promise.vm} could not begin within"
            f" {promise.request.timeout:g} s. Nothing was sent",
            vm=promise.vm,
            disk=promise.disk,
        )
    return left


def storage_of(plan: Plan, cwd: str | None) -> str:
    """The device or mount behind the base; empty where it can't be told."""
    try:
        device = os.stat(absolute(plan.base, cwd)).st_dev
    except (OSError, ValueError):
        return ""
    return f"{os.major(device)}:{os.minor(device)}"
