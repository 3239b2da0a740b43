"""Clearing up after ended commits while others become READY: those that are decided go first."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Literal

AT_ONCE = 2
"""How many ended commits are cleared up after at once."""

CROWD = 4
QUIET = 0.01
"""Seconds: where `CROWD` commits were being decided within them, clearing up waits."""

PATIENCE = 0.25
"""Seconds that one waits at most when its turn has come, so that none waits for ever."""


class Clearing(asyncio.Semaphore):
    """The gate before the clearing up, which a guest does not wait for; `decides` keeps it shut."""

    def __init__(self) -> None:
        super().__init__(AT_ONCE)
        self._decisions: deque[float] = deque(maxlen=CROWD)

    def decides(self) -> None:
        """A commit has become READY, or its decision goes out."""
        self._decisions.append(asyncio.get_running_loop().time())

    def _crowded(self) -> bool:
        known, now = self._decisions, asyncio.get_running_loop().time()
        return len(known) == CROWD and now - known[0] < QUIET

    async def acquire(self) -> Literal[True]:
        """Take a turn, when not many decisions are under way."""
        await super().acquire()
        try:
            waited = 0.0
            while self._crowded() and waited < PATIENCE:
                await asyncio.sleep(QUIET)
                waited += QUIET
        except BaseException:
            self.release()
            raise
        return True
