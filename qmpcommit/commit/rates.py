"""How fast jobs copy and how long that takes yet, from one look at them to the next; pure.

QEMU tells the bytes of a job and its limit, and no rate, no time and not since when it is READY.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from qmpcommit.values import Record, record

READY = ("ready", "standby")

Bound = Literal["", "exactly", "at least", "at most"]

WINDOW = 10.0
"""Seconds over which a rate is told at least, where they were seen: QEMU copies in bursts."""


@record
class JobPace(Record):
    """Of one job: `rate` in bytes per second, `eta` the seconds that it copies yet.

    `ready_for` is for how many seconds it is READY, and `ready_bound` how well that is known: who
    has seen it become READY knows it exactly, who has found it so knows how long at least, and a
    claim tells how long at most. What is not known is None.
    """

    rate: float | None = None
    eta: float | None = None
    ready_for: float | None = None
    ready_bound: Bound = ""


@dataclass
class _Before:
    speed: int
    looks: deque[tuple[float, int]]
    copying: bool = False
    ready: float | None = None
    saw_it_come: bool = False


class Rates:
    """Remembers what was seen of each job, by any `key`."""

    def __init__(self) -> None:
        self._seen: dict[object, _Before] = {}

    def look(
        self,
        key: object,
        at: float,
        *,
        status: str,
        current: int,
        total: int,
        speed: int = 0,
        ready_for: float | None = None,
        begun_for: float | None = None,
    ) -> JobPace:
        """One more look, `at` a moment of any steady clock.

        `speed` is the job's limit (0: none). `ready_for` is for how long it is known to be READY
        from elsewhere, `begun_for` since when it may be so at the earliest.
        """
        now = self._seen.setdefault(key, _Before(speed, deque()))
        copied = now.copying
        now.copying = status == "running"
        if not now.copying or now.speed != speed or (now.looks and now.looks[-1][1] > current):
            now.looks.clear()  # what was copied under another limit does not count any more
        now.speed = speed
        if status in READY:
            if now.ready is None:
                now.ready, now.saw_it_come = at, copied
            return JobPace(0.0, 0.0, *self._age(now, at, ready_for, begun_for))
        now.ready = None
        if not now.copying:
            return JobPace(0.0 if status == "paused" else None)
        now.looks.append((at, current))
        while len(now.looks) > 2 and at - now.looks[1][0] >= WINDOW:
            now.looks.popleft()
        since, before = now.looks[0]
        rate = (current - before) / (at - since) if at > since else None
        if speed and not rate and at - since < WINDOW:
            rate = None  # it copies no faster than that, in bursts, and none was seen yet
        at_most = float(speed) if speed and (rate is None or rate > speed) else rate
        left = max(0, total - current)
        return JobPace(rate, left / at_most if at_most else None)

    def forget(self, but: set[object]) -> None:
        """Jobs that are no more."""
        self._seen = {key: seen for key, seen in self._seen.items() if key in but}

    @staticmethod
    def _age(
        now: _Before, at: float, known: float | None, begun: float | None
    ) -> tuple[float | None, Bound]:
        assert now.ready is not None
        watched = at - now.ready
        if known is not None:
            return known, "exactly"
        if now.saw_it_come:
            return watched, "exactly"
        if watched > 0:
            return watched, "at least"
        return (None, "") if begun is None else (begun, "at most")


def percent(current: int, total: int, status: str) -> float | None:
    """How much of a job is done, never 100 before it is READY; None where nothing is known."""
    if status in (*READY, "pending", "concluded"):
        return 100.0
    if total <= 0:
        return None
    return min(99.9, int(1000 * current / total) / 10)
