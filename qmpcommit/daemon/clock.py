"""Time that goes on over a restart of the daemon, however the host's clock is set meanwhile.

Linux counts from the boot of the host (``CLOCK_MONOTONIC``), in all processes alike: what was noted
of it counts until the host is booted again. Else the host's clock has to tell, and then a moment is
never taken for later than now.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def noted(at: float) -> list[Any]:
    """A moment of `time.monotonic`, to be written down (JSON)."""
    return [boot(), round(at, 3)]


def moment(told: Sequence[Any] | None, wall: float) -> float:
    """When that was, as `time.monotonic` counts; `wall` is the same in seconds since 1970."""
    now = time.monotonic()
    if told is not None and len(told) == 2 and told[0] == boot() and told[0]:
        return min(now, float(told[1]))
    return now - max(0.0, time.time() - wall)


@lru_cache(maxsize=1)
def boot() -> str:
    """What stands for this boot of the host, and its count of time; "" where that is hidden."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            booted = file.read().strip()[:13]
    except OSError:
        return ""
    try:
        return f"{booted} {os.readlink('/proc/self/ns/time')}"
    except OSError:  # a kernel before 5.6 has one count for all
        return booted
