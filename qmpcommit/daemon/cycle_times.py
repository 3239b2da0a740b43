"""When a cycle's rounds come."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta

from qmpcommit.wire.cycle import Cycle

STEP = 30.0
"""Seconds after which the host's clock, which may be set, is looked at again."""


async def reached(cycle: Cycle, due: float) -> None:
    """Until it is time for the round that was due then, whatever is done to the clock meanwhile."""
    if cycle.every is not None:
        await asyncio.sleep(cycle.every)
        return
    while (left := due - time.time()) > 0:  # noqa: ASYNC110  (the clock tells nobody)
        await asyncio.sleep(min(left, STEP))


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
