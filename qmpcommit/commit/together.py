"""Jobs of one group, none of which is dismissed before all have ended.

Until then each shows whoever comes after this process was killed how all of them have to end.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

LIMIT = 5.0
"""Seconds for which a job that has ended waits for the others: a monitor may be away."""


class Together:
    """Those jobs of a group that are followed and have not ended."""

    def __init__(self) -> None:
        self._running: set[str] = set()
        self._none_runs = asyncio.Event()

    def began(self, job_id: str) -> None:
        """A job is about to be sent."""
        self._running.add(job_id)
        self._none_runs.clear()

    def ended(self, job_id: str) -> None:
        """A job has ended, or is not followed any more."""
        self._running.discard(job_id)
        if not self._running:
            self._none_runs.set()

    async def all_ended(self) -> None:
        """Wait for that, for `LIMIT` seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LIMIT):
                await self._none_runs.wait()
