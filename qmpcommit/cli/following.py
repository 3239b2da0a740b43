"""Jobs in the foreground: Ctrl-C, the deadline, and what is said of their end."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from qmpcommit.cli.options import Interrupted, Options
from qmpcommit.cli.running import Run
from qmpcommit.cli.show import outcome_text
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.errors import DeadlineExceeded, MonitorLost, QmpCommitError
from qmpcommit.session import Session

if TYPE_CHECKING:
    from qmpcommit.client.job import RemoteJob


def take_up(options: Options, qmp: str, job_id: str) -> str:
    """How to go on with a job, for a person to type."""
    return f"{options.program} pivot|keep|abort {shlex.quote(qmp)} {job_id}"


class Following:
    """Follows one job to its end, or leaves it; `name` is what a person calls the VM by.

    What a signal and the deadline do is for those to say who know where the job is.
    """

    def __init__(self, run: Run, name: str, *, adopted: bool) -> None:
        self._run, self._name, self._adopted = run, name, adopted
        self._left: str | None = None
        self._ended = False
        self._leaving: asyncio.Task[None] | None = None
        run.on_signal = self._signal
        run.on_deadline = self._deadline

    def _signal(self, times: int) -> None:
        raise NotImplementedError

    def _deadline(self) -> None:
        raise NotImplementedError

    def _goes_on(self, job_id: str) -> str:
        """Where a job is that goes on without us, and how to take it up."""
        raise NotImplementedError

    def _leave(self, job: CommitJob | RemoteJob, why: str) -> None:
        if self._leaving is None:
            self._left = why
            self._leaving = asyncio.get_running_loop().create_task(job.detach())

    async def _end(self, job: CommitJob | RemoteJob, disk: str) -> CommitOutcome:
        """Wait for the outcome; raises what waiting for it raises, and `Interrupted`."""
        try:
            outcome = await job.wait()
        except QmpCommitError as error:
            self._ended = True
            if self._left is not None and "outcome" not in error.facts:
                raise await self._has_left(job.id, disk) from None
            if self._run.signals:
                raise Interrupted(f"interrupted. {error}", **error.facts) from None
            raise
        self._ended = True
        if self._run.signals:
            raise self._interrupted(outcome)
        return outcome

    async def _has_left(self, job_id: str, disk: str) -> QmpCommitError:
        """The error of a job that goes on without us."""
        if self._leaving is not None:
            await self._leaving
        where = {"vm": self._name, "disk": disk, "job_id": job_id}
        on = self._goes_on(job_id)
        if self._left == "deadline":
            seconds = self._run.options.timeout
            return DeadlineExceeded(f"the job did not end within {seconds:g} s. {on}", **where)
        return Interrupted(f"interrupted twice. {on}", **where)

    def _interrupted(self, outcome: CommitOutcome) -> Interrupted:
        if outcome.action == "abort":
            said = "interrupted, and the job was cancelled"
        else:
            said = "interrupted, but the job had been decided already and has ended"
        return Interrupted(
            f"{said}. {outcome_text(outcome)}",
            vm=outcome.vm,
            disk=outcome.disk,
            job_id=outcome.job_id,
            outcome=outcome.model_dump(mode="json"),
        )


class Foreground(Following):
    """Follows the one job of a session.

    A first Ctrl-C cancels the job, or waits for its end where it was decided already; a second
    one leaves it in QEMU. The job of an own commit has the deadline as its own; for one that
    was adopted, only the waiting ends.
    """

    def __init__(self, run: Run, vm: Session, qmp: str, *, adopted: bool = False) -> None:
        super().__init__(run, vm.name, adopted=adopted)
        self._vm, self._qmp = vm, qmp
        self._ordered: str | None = None

    @property
    def _job(self) -> CommitJob | None:
        """The job, from the moment that it is about to be sent until it has ended."""
        return next(iter(self._vm.jobs), None)

    def _signal(self, times: int) -> None:
        job = self._job
        if job is None or (job.adopted and job.state.order.decision is None):
            if times == 1 and not self._ended:
                self._run.cancel()  # nothing was sent yet
        elif times == 1:
            if job.state.running and job.state.order.decision is None:
                job.abort()
            if sys.stderr.isatty() and not self._run.options.quiet:
                doing = "ending" if job.state.order.decision else "cancelling"
                sys.stderr.write(f"\r{doing} the job; Ctrl-C again leaves it in QEMU\n")
        elif times > 1:
            self._leave_in_qemu(job, "interrupted")

    def _deadline(self) -> None:
        job = self._job
        if job is None or (job.adopted and job.state.order.decision is None):
            if not self._ended:
                self._run.cancel()
        elif self._adopted:
            self._leave_in_qemu(job, "deadline")

    def _leave_in_qemu(self, job: CommitJob, why: str) -> None:
        if job.state.order.tries:  # a decision that was not sent is none
            self._ordered = str(job.state.order.decision)
        self._leave(job, why)

    async def start(self, **options: Any) -> CommitJob:
        """Start a commit; raises what `Session.commit` raises, and `Interrupted`."""
        try:
            return await self._vm.commit(**options)
        except MonitorLost as error:
            if self._left is not None:
                raise await self._has_left(str(error.job_id), error.disk or "") from None
            raise

    async def end(self, job: CommitJob) -> CommitOutcome:
        """Wait for the outcome; raises what `CommitJob.wait` raises, and `Interrupted`."""
        return await self._end(job, job.plan.disk.name)

    def _goes_on(self, job_id: str) -> str:
        state = f"Job {job_id} is left running in QEMU"
        told = f"was told to {self._ordered}: it ends by itself, unless that did not reach QEMU"
        if self._ordered == "abort":
            state = f"Job {job_id} {told}"
        elif self._ordered is not None:
            state += f", and {told}"
        return (
            f"{state}. Take it up again with"
            f" '{take_up(self._run.options, self._qmp, job_id)}', and see"
            f" 'qmpcommit jobs {shlex.quote(self._qmp)}'"
        )


class OwnCommits:
    """The commits that a command starts by itself, on these VMs.

    Ctrl-C and the deadline cancel the command, and so what it has under way.
    """

    def __init__(self, run: Run, vms: Collection[Session]) -> None:
        self._run, self._vms = run, vms
        self._jobs: list[CommitJob] | None = None
        run.on_signal = run.on_deadline = self._end

    def _end(self, times: int = 1) -> None:
        if self._jobs is None:
            self._jobs = [job for vm in self._vms for job in vm.jobs]
            self._run.cancel()

    @property
    def under_way(self) -> bool:
        """Whether a commit was, when all was cancelled."""
        return bool(self._jobs)

    def error(self, said: str, **facts: object) -> QmpCommitError:
        """The error of a command that was cancelled, once its jobs have ended."""
        for job in self._jobs or ():
            said += f". {outcome_text(job.outcome)}" if job.outcome else f". {job.error}"
            facts = {"vm": job.plan.vm, "disk": job.plan.disk.name, "job_id": job.id, **facts}
        if self._run.timed_out:
            return DeadlineExceeded(
                f"it was not done within {self._run.options.timeout:g} s: {said}", **facts
            )
        return Interrupted(f"interrupted: {said}", **facts)
