"""Judging how a job moves: samples in, advice out, without clock or I/O.

A guest that writes as fast as the storage copies keeps a commit from READY. What is left
(``total - current`` of ``query-jobs``) is the figure to watch; per cent mean nothing then.
"""

from __future__ import annotations

import math
from collections import deque
from enum import StrEnum
from typing import Literal, NamedTuple

from qmpcommit.commit.outcome import JobProgress
from qmpcommit.commit.phases import Phase
from qmpcommit.errors import (
    InvalidRequest,
)
from qmpcommit.values import Record, record

MIB = 1 << 20

SLICE = 16 * MIB
"""What a job with a speed limit copies at once before it rests (QEMU's buffer)."""


@record
class Converge(Record):
    """How far the guest may be slowed so that the job gets READY.

    `deadline` is in how many seconds READY should be reached: it is what is aimed at, nothing
    is cancelled when it has passed. `floor` is the rate in bytes per second under which the
    guest's writes are never held, `step` the factor of each step, `every` the seconds between
    two looks at the job. `pause` is for how many seconds the guest may be stopped for the last
    flush (``converge(..., until="over")``); 0, the default: never.

    A throttle alone does not end the last flush of a guest that always has a write waiting:
    QEMU drains the disk to see whether it is done, and a drain lets all throttled writes through.
    """

    deadline: float
    floor: int = MIB
    step: float = 0.5
    every: float = 1.0
    pause: float = 0.0

    def __post_init__(self) -> None:
        _check_number(self.deadline, "deadline", 0, math.inf, "seconds above 0")
        _check_number(self.step, "step", 0, 1, "a factor between 0 and 1")
        _check_number(self.every, "every", 0, math.inf, "seconds above 0")
        if self.pause:
            _check_number(self.pause, "pause", 0, math.inf, "seconds, at least 0")
        if isinstance(self.floor, bool) or not isinstance(self.floor, int) or self.floor < 1:
            raise InvalidRequest(f"floor is in bytes per second, at least 1, not {self.floor!r}")


def _check_number(value: object, name: str, above: float, below: float, what: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value < below:  # type: ignore[operator]  # also not NaN
        raise InvalidRequest(f"{name} of converge is {what}, not {value!r}")


class Pace(StrEnum):
    """How a job moves towards READY."""

    CONVERGING = "converging"
    SLOW = "slow"  # what is left shrinks, but not in time
    NOT_CONVERGING = "not converging"  # it copies, and what is left does not shrink
    STUCK = "stuck"  # it copies nothing: the storage is at fault, not the guest


class Sample(NamedTuple):
    """What ``query-jobs`` said at a moment, in seconds of any steady clock, and in bytes."""

    at: float
    current: int
    total: int

    @property
    def remaining(self) -> int:
        """What is left to copy."""
        return max(0, self.total - self.current)


class StallWatch:
    """Tells a job that is slow from one that is stuck.

    ``moving``: it copies; ``slow``: at less than a tenth of the best rate that it had;
    ``stuck``: nothing was copied for `patience` seconds although something is left. A job with a
    `speed` limit (bytes per second) rests after each slice of 16 MiB; that is no stall.
    """

    def __init__(self, patience: float = 10.0, *, speed: int = 0, window: float = 5.0) -> None:
        self.patience = max(patience, 2 * SLICE / speed) if speed else patience
        self._window = max(window, 2 * SLICE / speed) if speed else window
        self._samples: deque[Sample] = deque()
        self._moved: Sample | None = None
        self._best = 0.0

    def forget(self) -> None:
        """The time till now does not count: the job was paused, or could not be asked."""
        self._samples.clear()
        self._moved = None

    def feed(self, sample: Sample) -> Literal["moving", "slow", "stuck"]:
        """The judgement after one more sample."""
        if self._moved is None or sample.current != self._moved.current or not sample.remaining:
            self._moved = sample
        _slide(self._samples, sample, self._window)
        if sample.at - self._moved.at >= self.patience:
            return "stuck"
        first = self._samples[0]
        if sample.at - first.at < self._window or not sample.remaining:
            return "moving"
        rate = (sample.current - first.current) / (sample.at - first.at)
        self._best = max(self._best, rate)
        return "slow" if rate < self._best / 10 else "moving"


class Meter:
    """Makes `JobProgress` of looks at a job: the rate between two of them, and the pace."""

    def __init__(self, *, speed: int = 0) -> None:
        self._watch = StallWatch(speed=speed)
        self._before: Sample | None = None
        self._rate = 0.0

    def read(self, at: float, current: int, total: int, phase: Phase, status: str) -> JobProgress:
        """One more look, at a moment of any steady clock."""
        now, before = Sample(at, current, total), self._before
        if before is not None and at > before.at:
            self._rate = max(0, current - before.current) / (at - before.at)
        self._before = now
        pace = self._watch.feed(now) if phase is Phase.COPYING else "moving"
        return JobProgress(current, total, self._rate, phase, status, pace)

    def last(self, current: int, total: int, phase: Phase, status: str) -> JobProgress:
        """The end, at the rate that it had."""
        return JobProgress(current, total, self._rate, phase, status)


def _slide(samples: deque[Sample], sample: Sample, window: float) -> None:
    """Append; keep as little as spans the window."""
    samples.append(sample)
    while len(samples) > 2 and sample.at - samples[1].at >= window:
        samples.popleft()


class Advice(NamedTuple):
    """What to do: ``nothing``, ``throttle`` to `limit` bytes per second, or ``relax`` to it.

    With None as its limit ``relax`` means the former limits. `eta` is in how many seconds
    nothing is left at the present pace, `alone` in how many if the guest did not write.
    """

    do: Literal["nothing", "throttle", "relax"]
    limit: int | None
    pace: Pace
    eta: float
    alone: float = math.inf


class Controller:
    """Judges samples of one job and says how the guest's writes should be limited.

    Each judgement rests on samples under one limit, over two `every` at least. The first limit
    is `step` times what the storage copies (a higher one would change nothing), each following
    one `step` times the last, or several steps where one would foreseeably be too late, never
    under `floor`. A limit is raised again when the guest would
    let the job come home at half the time that is left, and taken back when the guest does not
    use it, or when the storage is stuck, since then it is good for nothing.
    """

    def __init__(self, config: Converge, begun: float, *, speed: int = 0) -> None:
        self._config = config
        self._end = begun + config.deadline
        self._stall = StallWatch(max(10.0, 5 * config.every), speed=speed)
        self._samples: deque[Sample] = deque()
        self._limit: int | None = None
        self._pace = Pace.CONVERGING
        self._alone = math.inf
        self._calm, self._calm_for = 5, 0
        self._eased = False

    @property
    def pace(self) -> Pace:
        """The last judgement."""
        return self._pace

    def forget(self) -> None:
        """The samples till now do not count: the job was paused, or could not be asked."""
        self._samples.clear()
        self._stall.forget()

    def feed(self, sample: Sample, limit: int | None) -> Advice:
        """One more sample, taken under this limit (None: under none of ours)."""
        if limit != self._limit:
            self._limit = limit
            self._samples.clear()
        stuck = self._stall.feed(sample) == "stuck"
        _slide(self._samples, sample, 5 * self._config.every)
        if stuck:
            self._pace = Pace.STUCK
            return self._answer("nothing" if limit is None else "relax", None, math.inf)
        first = self._samples[0]
        span = sample.at - first.at
        if not sample.remaining:
            self._pace = Pace.CONVERGING
            return self._answer("nothing", limit, 0.0)
        if span < 1.9 * self._config.every:
            return self._answer("nothing", limit, math.inf)
        copied = (sample.current - first.current) / span
        self._alone = sample.remaining / copied if copied > 0 else math.inf
        shrinks = (first.remaining - sample.remaining) / span
        eta = sample.remaining / shrinks if shrinks > 0 else math.inf
        left = self._end - sample.at
        if eta <= left:
            self._pace = Pace.CONVERGING
            return self._ease(sample, copied, shrinks, eta, left)
        self._pace = Pace.SLOW if shrinks > copied / 50 else Pace.NOT_CONVERGING
        needed = sample.remaining / left if left > 0 else math.inf
        return self._tighten(copied, shrinks, needed, eta)

    def _tighten(self, copied: float, shrinks: float, needed: float, eta: float) -> Advice:
        dirtied = copied - shrinks
        if dirtied < copied / 20:
            return self._answer("nothing", self._limit, eta)  # it is not the guest
        floor, step = self._config.floor, self._config.step
        start = min(copied, dirtied) if self._limit is None else self._limit
        share = 1.0 if self._limit is None else dirtied / self._limit  # dirtied a byte allowed
        limit = max(floor, int(start * step))
        while limit > floor and copied > needed > copied - limit * share:
            limit = max(floor, int(limit * step))
        if self._limit is not None and limit >= self._limit:
            return self._answer("nothing", self._limit, eta)
        if self._eased:
            self._calm, self._eased = self._calm * 2, False  # it was eased too soon
        return self._answer("throttle", limit, eta)

    def _ease(
        self, sample: Sample, copied: float, shrinks: float, eta: float, left: float
    ) -> Advice:
        """Give the guest back what the job does not need, unless it is nearly home."""
        every, limit = self._config.every, self._limit
        nothing = self._answer("nothing", limit, eta)
        calm = sample.at - self._samples[0].at >= 4.9 * every and eta > 10 * every
        self._calm_for = self._calm_for + 1 if calm and limit is not None else 0
        if limit is None or self._calm_for < self._calm:
            return nothing
        dirtied = max(0.0, copied - shrinks)
        raised = int(limit / self._config.step)
        if dirtied < limit / 4 and sample.remaining / copied <= left / 2:
            self._eased, self._calm_for = True, 0
            return self._answer("relax", None, eta)
        then = copied - dirtied * raised / limit
        if then > 0 and sample.remaining / then <= left / 2:
            self._eased, self._calm_for = True, 0
            return self._answer("relax", raised, eta)
        return nothing

    def _answer(
        self, do: Literal["nothing", "throttle", "relax"], limit: int | None, eta: float
    ) -> Advice:
        return Advice(do, limit, self._pace, eta, self._alone if eta else 0.0)
