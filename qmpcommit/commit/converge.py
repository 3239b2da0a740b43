"""Bringing a commit to READY although the guest writes faster than the storage copies.

QEMU's commit job copies in the background and has no write-blocking mode, so such a guest keeps
the job from READY for ever, and the last flush from ending. `converge` watches what is left,
slows the guest's writes to this one disk step by step while it does not shrink fast enough
(`qmpcommit.commit.pace` judges, `qmpcommit.block.throttle` holds), and puts the former limits
back exactly, whatever happens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, Literal

from qmpcommit.block.graph import read_graph
from qmpcommit.block.throttle import RESTORE_TRIES, Throttle, obstacle
from qmpcommit.callback import Noting
from qmpcommit.commit.claim import number_of
from qmpcommit.commit.facts import Choice
from qmpcommit.commit.pace import Controller, Converge, Pace, Sample
from qmpcommit.commit.phases import Phase
from qmpcommit.errors import (
    CommandRefused,
    DeadlineExceeded,
    JobNotFound,
    MonitorLost,
    QmpCommitError,
    VMGone,
)
from qmpcommit.guest.hold import Hold, Step
from qmpcommit.guest.marks import mark_of_flush
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import to_the_end
from qmpcommit.units import parse_size
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.ledger import Ledger

LINGER = 2.0
"""Seconds in READY for which a limit stays, waiting for a decision, before it is lifted."""


@record
class ConvergeReport(Record):
    """What was done to the guest, and what it was good for.

    `verdict` is ``ready``, ``ended`` (the job was over before READY, or after it where the end
    was waited for) or, of a job left before that, its pace: ``converging``, ``slow``, ``not
    converging``, ``stuck``. `through` says what held the writes (empty: nothing could). `steps`
    are (seconds since the begin, bytes per second), None for a limit that was lifted. `former`
    are the limits found before, in QEMU's names, `repair` the QMP command that puts them back;
    it is to be sent by hand where `restored` is False. `remark` says what was out of order.
    """

    verdict: str
    seconds: float
    ready_after: float | None = None
    through: str = ""
    steps: tuple[tuple[float, int | None], ...] = ()
    former: dict[str, Any] = field(default_factory=dict)
    restored: bool = True
    repair: dict[str, Any] | None = None
    paused: float | None = 0.0
    remaining_first: int = 0
    remaining_last: int = 0
    remark: str = ""


async def converge(
    job: CommitJob,
    monitor: Monitor,
    config: Converge,
    *,
    until: Literal["ready", "over"] = "ready",
    note: Callable[[ConvergeReport], object] | None = None,
    ledger: Ledger | Noting | None = None,
) -> ConvergeReport:
    """Slow the guest's writes as far as it takes until the job is READY, or over.

    With `until` "over" the guest is held during the last flush too, from the decision to the
    end; in between, in READY, it is let go when no decision comes within two seconds. `note` is
    called with the report so far before each change, and at the end: it has the command that
    repairs the limits should this process die. The former limits are put back on every way
    out, a cancellation included; where that can't be done the report says so. `ledger` is told
    of each limit, with its repair, before it is set, and when it is gone.
    """
    watch = _Watch(job, monitor, config, until=until, note=note, ledger=ledger)
    try:
        await watch.run()
    finally:
        await to_the_end(watch.restore())
    return watch.report


class _Watch:
    """The sampling loop of `converge`."""

    def __init__(
        self,
        job: CommitJob,
        monitor: Monitor,
        config: Converge,
        *,
        until: str,
        note: Callable[[ConvergeReport], object] | None,
        ledger: Ledger | Noting | None,
    ) -> None:
        self._job, self._monitor, self._config, self._until = job, monitor, config, until
        self._note = note
        self._clock = asyncio.get_running_loop().time
        self._begun = self._clock()
        self._controller = self._new_controller()
        self._throttle: Throttle | None = None
        self._sought = False
        self._limit: int | None = None
        self._touched = self._theirs = False
        self._pauses = False
        self._guest: Hold | None = None
        self._ready_at: float | None = None
        self._pid = monitor.peer_pid
        self._first: Sample | None = None
        self.report = ConvergeReport(verdict=Pace.CONVERGING.value, seconds=0.0)
        self._log = monitor.log.bind(disk=job.plan.disk.name, job=job.id)
        self._ledger = Noting.of(ledger, self._log)

    def _new_controller(self) -> Controller:
        speed = int(self._job.plan.arguments.get("speed") or 0)
        return Controller(self._config, self._clock(), speed=speed)

    # -- sampling ---------------------------------------------------------------------------------

    async def run(self) -> None:
        job = self._job
        while not self._over():
            phase = job.phase
            if self._monitor.connected:
                try:
                    await self._resume()  # where that failed at the end of a pause
                    await (self._in_ready() if phase is Phase.READY else self._look())
                except QmpCommitError as error:
                    self._controller.forget()
                    if not isinstance(error, (MonitorLost, DeadlineExceeded)):
                        self._remark(error.message)
                    if isinstance(error, VMGone):
                        return
            else:
                self._controller.forget()  # the job brings the monitor back, or ends
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.every):
                    await job._until(lambda phase=phase: job.phase is not phase)  # type: ignore[misc]
            if phase is Phase.READY and job.phase is Phase.DECIDED:
                self._controller = self._new_controller()

    def _over(self) -> bool:
        job = self._job
        state = job.state
        decided = state.order.decision not in (None, Choice.ABORT)  # which only a READY job can be
        if self._ready_at is None and (job.phase is Phase.READY or decided):
            self._ready_at = self._clock() - self._begun
            self._tell(ready_after=self._ready_at)
        if job.done or not state.running:
            return True
        return self._until == "ready" and job.phase not in (Phase.STARTING, Phase.COPYING)

    async def _in_ready(self) -> None:
        """Nobody has decided yet: the guest is not held for long."""
        assert self._ready_at is not None
        if self._touched and self._clock() - self._begun > self._ready_at + LINGER:
            await self._lift()

    async def _look(self) -> None:
        seen = await query_job(self._monitor, self._job.id)
        if seen is None or seen.get("status") not in ("running", "ready"):
            self._controller.forget()  # created, paused by somebody or by an error, ending
            return
        with self._monitor.sensible("query-jobs"):
            done, total = int(seen["current-progress"]), int(seen["total-progress"])
        sample = Sample(self._clock(), done, total)
        self._first = self._first or sample
        advice = self._controller.feed(sample, self._limit)
        self._tell(
            verdict=advice.pace.value,
            remaining_first=self._first.remaining,
            remaining_last=sample.remaining,
        )
        pause = self._config.pause
        if self._ready_at is not None and pause and not self._pauses and advice.alone <= pause:
            await self._pause()
        elif advice.do == "nothing":
            return
        elif advice.limit is None:
            await self._lift()
        else:
            await self._hold(advice.limit)

    # -- the last flush ---------------------------------------------------------------------------

    async def _pause(self) -> None:
        """Stop the guest until the job is over, for `pause` seconds at the most, and only once."""
        job, seconds = self._job, self._config.pause
        if job.phase is not Phase.DECIDED:
            return
        mark = mark_of_flush(number_of(job.plan.disk))
        guest = Hold(self._monitor, "pause", mark, note=self._guest_noted)
        if not await guest.ran():
            guest.leave()
            return
        self._pauses, self._guest = True, guest
        self._tell(paused=None)
        self._called()
        self._log.warning("guest_paused", seconds=seconds, repair='{"execute": "cont"}')
        try:
            await guest.take()
            async with asyncio.timeout(seconds):
                await job._until(lambda: job.phase is not Phase.DECIDED)
        except DeadlineExceeded:
            raise
        except TimeoutError:
            self._remark(f"the last flush did not end in the {seconds:g} s of the guest's pause")
        finally:  # also where only the reply to "stop" was lost
            await to_the_end(self._resume())

    async def _resume(self) -> None:
        """Let the guest run again, if it was stopped here and still is."""
        guest = self._guest
        if guest is not None:
            await guest.release()
            self._guest = None
            self._tell(paused=round(guest.seconds or 0.0, 3))
            self._log.info("guest_resumed", seconds=self.report.paused)

    async def _guest_noted(self, step: Step) -> None:
        if step != "release":
            await self._write_down("stop" if step == "hold" else "cont")

    # -- limits -----------------------------------------------------------------------------------

    async def _hold(self, limit: int) -> None:
        if not self._sought:
            graph = await read_graph(self._monitor)
            self._throttle = await Throttle.find(self._monitor, self._job.plan.disk, graph)
            self._sought = True
            if self._throttle is None:
                self._remark(obstacle(self._job.plan.disk))
        throttle = self._throttle
        if throttle is None or self._theirs:
            return
        self._touched = True
        self._step(
            limit,
            through=throttle.name,
            former=throttle.former,
            repair=throttle.repair(),
            restored=False,
        )
        self._log.warning("guest_throttled", limit=limit, repair=json.dumps(throttle.repair()))
        await self._write_down("throttle", repair=throttle.repair())
        await throttle.limit(limit)
        self._limit = limit

    async def _lift(self) -> None:
        assert self._throttle is not None  # there is a limit of ours
        problem = await self._throttle.restore()
        if problem:
            self._remark(problem)
            self._theirs = True  # `restore` looks once more
        else:
            self._touched = False
            self._step(None, restored=True)
        self._limit = None

    async def restore(self) -> None:
        """Put the former limits back, past losses of the monitor; never raises."""
        throttle, problem = self._throttle, ""
        if self._touched or self._guest is not None:
            for _ in range(RESTORE_TRIES):
                try:
                    problem = await self._put_back(throttle)
                except (MonitorLost, DeadlineExceeded) as error:
                    problem = error.message
                    if isinstance(error, DeadlineExceeded):
                        self._monitor.drop()
                except QmpCommitError as error:
                    problem = error.message
                    break
                else:
                    break
            self._touched = self._touched and bool(problem)
        if problem:
            self._remark(problem)
        repair = self.report.repair
        if self._touched:
            self._log.warning("limits_not_restored", why=problem, repair=json.dumps(repair))
        elif self.report.steps:
            self._log.info("limits_restored", steps=len(self.report.steps))
            await self._write_down("unthrottle")
        verdict = self.report.verdict
        state = self._job.state
        if self._job.done or not state.running or state.order.decision is Choice.ABORT:
            verdict = "ended" if self._until == "over" or self._ready_at is None else "ready"
        elif self._ready_at is not None:
            verdict = "ready"
        self._tell(verdict=verdict, restored=not self._touched)
        self._called()

    async def _put_back(self, throttle: Throttle | None) -> str:
        if not self._monitor.connected and await self._monitor.restore() is False:
            return self._other_vm()
        if self._pid is not None and self._monitor.peer_pid != self._pid:
            return self._other_vm()
        await self._resume()
        return await throttle.restore() if throttle is not None and self._touched else ""

    def _other_vm(self) -> str:
        return "another QEMU answers at the monitor now; its limits are its own"

    # -- the report -------------------------------------------------------------------------------

    def _step(self, limit: int | None, **changes: Any) -> None:
        at = round(self._clock() - self._begun, 3)
        self._tell(steps=(*self.report.steps, (at, limit)), **changes)
        self._called()

    def _called(self) -> None:
        if self._note is None:
            return
        try:
            self._note(self.report)
        except BaseException as error:  # the guest is not held for whoever is only told
            self._log.warning("converge_not_told", error=repr(error))

    async def _write_down(self, step: str, **facts: Any) -> None:
        if self._ledger is not None:
            over = step in ("cont", "unthrottle")
            await self._ledger.note(step, held=True, anyway=over, **facts)

    def _remark(self, remark: str) -> None:
        if remark not in self.report.remark:
            self._tell(remark="; ".join(filter(None, (self.report.remark, remark))))

    def _tell(self, **changes: Any) -> None:
        seconds = round(self._clock() - self._begun, 3)
        self.report = replace(self.report, seconds=seconds, **changes)


async def query_job(monitor: Monitor, job_id: str) -> Mapping[str, Any] | None:
    """The job as ``query-jobs`` shows it; None where there is none of that id."""
    jobs: list[Mapping[str, Any]] = await monitor.execute("query-jobs")
    return next((job for job in jobs if job.get("id") == job_id), None)


async def set_bandwidth(monitor: Monitor, job_id: str, rate: int | str) -> None:
    """Change how fast a running job may copy, in bytes per second (0: no limit).

    Raises `InvalidRequest` before anything is sent, `JobNotFound` where there is no such job.
    """
    speed = parse_size(rate, "bandwidth")
    try:
        await monitor.execute("block-job-set-speed", {"device": job_id, "speed": speed})
    except CommandRefused as error:
        if error.error_class != "DeviceNotActive":
            raise
        raise JobNotFound(
            f"QEMU of {monitor.name} has no block job '{job_id}' any more; its bandwidth was not"
            " changed",
            vm=monitor.name,
            job_id=job_id,
        ) from error
