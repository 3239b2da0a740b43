"""The model for as long as one likes: ``python -m tests.model.soak MINUTES [SEED]``.

Random examples in one process, so that what grows is seen: at the end the memory and the open
files of the last quarter are compared with those of the first.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.model.operations import run, seeded
from tests.model.world import PATIENCE

LENGTH = 30
"""Operations an example."""

REPORT = 120.0
"""Seconds between two lines."""

GROWTH = 1.1, 2048
"""How much more memory may be used in the end: times, and KiB beside."""


class Figures(NamedTuple):
    """What this process uses: KiB, open files, tasks."""

    memory: int
    files: int
    tasks: int


LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""Of mallopt(3)."""


def give_back() -> None:
    """Have whole images that were read be given back, instead of one kept for each thread."""
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    LIBC.mallopt(M_ARENA_MAX, 1)


def figures() -> Figures:
    gc.collect()
    LIBC.malloc_trim(0)  # what is free in the C library's heap is not ours
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+)", status, re.M)
    assert found
    return Figures(int(found[1]), len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks()))


def quarter(seen: list[Figures]) -> Figures:
    """The medians of some."""
    return Figures(*(int(statistics.median(each)) for each in zip(*seen, strict=True)))


async def soak(minutes: float, seed: int) -> bool:
    """Whether all held, and nothing grew."""
    ends = time.monotonic() + 60 * minutes
    told = time.monotonic()
    done: Counter[str] = Counter()
    seen: list[Figures] = []
    example = 0
    while time.monotonic() < ends:
        try:
            async with asyncio.timeout(LENGTH * PATIENCE):
                world = await run(seeded(seed + example), LENGTH)
        except BaseException:
            print(f"failed at seed {seed + example}", flush=True)
            raise
        done += world.done
        example += 1
        seen.append(figures())
        if time.monotonic() - told > REPORT:
            told = time.monotonic()
            print(f"{example} examples, {done.total()} operations, {seen[-1]}", flush=True)
    kinds = ", ".join(f"{count} {kind}" for kind, count in done.most_common())
    print(f"{example} examples from seed {seed} on, all held: {kinds}")
    length = max(1, len(seen) // 4)
    first, last = quarter(seen[:length]), quarter(seen[-length:])
    print(f"first quarter {first}\nlast quarter  {last}")
    times, more = GROWTH
    return (
        last.memory <= first.memory * times + more
        and last.files <= first.files
        and last.tasks <= first.tasks
    )


def main() -> None:
    give_back()
    logging.getLogger("qmpcommit").setLevel(logging.ERROR)  # commits that fail are meant to
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**9)
    if not asyncio.run(soak(minutes, seed)):
        sys.exit("memory, open files or tasks grew")


if __name__ == "__main__":
    main()
