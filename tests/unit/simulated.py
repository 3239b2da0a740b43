"""A simulated QEMU job for the state machine's tests: what is true, and what gets told of it.

It keeps one commit job as recorded QEMUs do: READY once, standby in drains, the two answers to
a pivot while paused, a concluded job that waits for dismissal. `World.link` may be down: then
events are lost, as on a real monitor.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from qmpcommit.commit import facts
from qmpcommit.commit.facts import Command, Fact, JobSeen, Use, Where


@dataclass
class World:
    """The truth about one VM: its job, its disk and its monitor; whether its `will` is `ours`.

    With `stale` the disk does not use what the job copies.
    """

    two_phase: bool = True
    auto_dismiss: bool = False
    auto_finalize: bool = True
    defers_paused_pivot: bool = True
    job: str | None = None
    disk: Where = Where.TOP
    error: str | None = None
    cancelled: bool = False
    will: str | None = None
    ours: bool = False
    unplugged: bool = False
    user_paused: bool = False
    drained: bool = False
    io_status: str = "ok"
    prepares: bool = False
    prepared: bool = False
    guest_paused: bool = False
    overlaid: bool = False
    link: bool = True
    alive: bool = True
    replaced: bool = False
    starts: int = 0
    stale: bool = False
    orders: list[Command] = field(default_factory=list)
    told: deque[Fact] = field(default_factory=deque)
    history: list[str] = field(default_factory=list)

    # -- events -----------------------------------------------------------------------------------

    def tell(self, fact: Fact) -> None:
        """An event: heard only over a link that is up."""
        if self.link:
            self.told.append(fact)

    def become(self, status: str) -> None:
        """The job changes its status, and says so."""
        self.job = status
        self.history.append(status)
        self.tell(facts.StatusChanged(status))

    # -- what the job does by itself --------------------------------------------------------------

    def progress(self) -> None:
        """One step of the job towards where it is bound."""
        if not self.alive or self.drained or self.user_paused:
            return
        if self.job == "running":
            if self.two_phase:
                self.become("ready")
                self.tell(facts.BecameReady(10, 10))
            else:
                self.will = "merge"
                self.become("waiting")
        elif self.job == "ready" and self.will in ("pivot", "keep"):
            self.become("waiting")
        elif self.job == "waiting":
            self.become("pending")
        elif self.job == "pending" and self.auto_finalize:
            self.finalize()
        elif self.job == "aborting":
            self.conclude(cancelled=True)

    def finalize(self) -> None:
        """The end of a job that succeeds."""
        if self.will == "pivot":
            assert self.prepared or not self.prepares, "final before what had to be done"
            self.disk = Where.BASE
        elif self.will == "merge":
            self.disk = Where.MERGED
        self.conclude(cancelled=False)

    def conclude(self, *, cancelled: bool, error: str | None = None) -> None:
        """COMPLETED or CANCELLED, then concluded, then (auto-dismiss) gone."""
        self.cancelled, self.error = cancelled, error
        self.tell(facts.Ended(cancelled, error, 10, 10))
        self.become("concluded")
        if self.auto_dismiss:
            self.dismiss()

    def dismiss(self) -> None:
        """The job's id is free again."""
        self.become("null")
        self.job = None

    def fail(self) -> None:
        """A write error that the job reports."""
        if self.job in ("running", "ready"):
            self.become("aborting")
            self.conclude(cancelled=False, error="Input/output error")

    def stall(self) -> None:
        """A write error that makes the job wait."""
        if self.job in ("running", "ready"):
            self.io_status = "nospace"
            self.pause(True)

    def drain(self, on: bool) -> None:
        """A graph change elsewhere: standby or paused for a moment."""
        if self.drained is on or self.job not in ("running", "ready", "paused", "standby"):
            return
        self.drained = on
        self._settle_pause()

    def pause(self, on: bool) -> None:
        """Another client pauses the job, or resumes it."""
        if self.user_paused is on or self.job not in ("running", "ready", "paused", "standby"):
            return
        self.user_paused = on
        self._settle_pause()

    def _settle_pause(self) -> None:
        pausing = {"running": "paused", "ready": "standby"}
        stopped = self.drained or self.user_paused
        if stopped and self.job in pausing:
            self.become(pausing[self.job])
        elif not stopped and self.job in pausing.values():
            self.become({"paused": "running", "standby": "ready"}[str(self.job)])

    # -- commands ---------------------------------------------------------------------------------

    def execute(self, command: Command) -> str | None:
        """Run a command; the error's text, or None for success."""
        if command is Command.START:
            self.starts += 1
            self.become("created")
            self.become("running")
            return None
        if self.job is None:
            return "Job not found"
        if command in (Command.PIVOT, Command.KEEP, Command.ABORT):
            return self._decide(command)
        if command is Command.RESUME:
            if not self.user_paused:
                return "Can't resume a job that was not paused"
            self.io_status = "ok"
            self.pause(False)
        elif command is Command.FINALIZE:
            if self.job != "pending":
                return "cannot accept command verb 'finalize'"
            self.finalize()
        elif command is Command.DISMISS:
            if self.job != "concluded":
                return "cannot accept command verb 'dismiss'"
            self.dismiss()
        return None

    def _decide(self, command: Command) -> str | None:
        job = self.job
        if command is Command.ABORT:
            if job == "concluded":
                return "cannot accept command verb 'cancel'"
            self.will = None
            self.drained = self.user_paused = False
            if job != "aborting":
                self.become("aborting")
            return None
        if command is Command.KEEP and job == "running":
            raise AssertionError("a soft cancel before READY is a hard one")
        if job == "standby":
            if command is Command.PIVOT and self.defers_paused_pivot:
                self.will = "pivot"
                return None
            return "The block job for device 'j' is currently paused"
        if job != "ready" or self.will is not None:
            return "cannot accept command verb"
        self.orders.append(command)
        self.will = "pivot" if command is Command.PIVOT else "keep"
        return None

    def query(self) -> JobSeen | None:
        """``query-jobs``."""
        if self.job is None:
            return None
        error = "Operation canceled" if self.cancelled else self.error
        return JobSeen(self.job, 10, 10, error, self.auto_finalize, self.io_status)

    def use(self) -> Use:
        """The block graph while the job is there."""
        if self.job in (None, "concluded"):
            return Use.UNKNOWN
        return Use.STALE if self.stale else Use.USED

    def where(self) -> Where:
        """The block graph: of a disk that nothing uses it shows nothing."""
        return Where.UNUSED if self.unplugged else self.disk

    def unplug(self) -> None:
        """The guest lets go of its disk; the job goes on."""
        self.unplugged = True
