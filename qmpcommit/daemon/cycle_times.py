"""When a cycle's rounds come."""

from __future__ import annotations

from datetime import datetime, timedelta

from qmpcommit.daemon.config import Cycle


def until_next(cycle: Cycle, now: float) -> float:
    """Seconds until the next round of a cycle whose last one is just over."""
    if cycle.every is not None:
        return cycle.every
    assert cycle.at is not None
    hour, minute = map(int, cycle.at.split(":"))
    today = datetime.fromtimestamp(now).astimezone()
    due = datetime(today.year, today.month, today.day, hour, minute)
    if due.astimezone().timestamp() <= now:
        due += timedelta(days=1)  # the wall clock's, whatever it does to summer time
    return due.astimezone().timestamp() - now
