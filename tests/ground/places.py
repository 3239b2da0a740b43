"""Which of the places where a process can be killed, or its line broken, are tried in one run.

All of them, unless ``QMPCOMMIT_TEST_STRIDE=N`` asks for every N-th: as long runs want it, each
begins with another one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

STRIDE = int(os.environ.get("QMPCOMMIT_TEST_STRIDE", "1"))


def first() -> int:
    """The number of the first place that is tried."""
    return random.randint(1, STRIDE)


def chosen(count: int) -> range:
    """The numbers of the places that are tried, of `count` that are counted from 1."""
    return range(min(first(), count), count + 1, STRIDE)


def some(cases: Sequence[T]) -> list[T]:
    """As many of these cases, at random, where they are of several kinds in turn."""
    return random.sample(cases, -(-len(cases) // STRIDE))


def told(count: int, tried: int) -> str:
    """What is printed when all survived."""
    return f"{count} places to die, {tried} tried, {tried} survived"
