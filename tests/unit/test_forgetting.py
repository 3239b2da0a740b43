"""Which rows of the journal are forgotten."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from qmpcommit.daemon.config import Config
from qmpcommit.daemon.forgetting import forget_old
from qmpcommit.daemon.journal import Event, Journal, Statement
from qmpcommit.tasks import stop


async def test_events_are_forgotten_but_the_last_ones(folder: Path) -> None:
    """The last one's number has to be known: who has seen it is to miss nothing."""
    journal = await Journal(folder / "j.db").open()
    try:
        old = [Event(0, 5.0, "vm", "web1", None, "{}"), Event(0, 6.0, "vm", "web1", None, "{}")]
        await journal.write(events=old)
        forgetting = asyncio.create_task(forget_old(Config(), journal))
        await asyncio.sleep(0)
        await journal.write(Statement("DELETE FROM vms"))  # which is written after that
        assert len(await journal.read("SELECT id FROM events")) == 2, "there is none after them"
        await stop(forgetting)
        await journal.write(events=[Event(0, time.time(), "vm", "web1", None, "{}")])
        forgetting = asyncio.create_task(forget_old(Config(), journal))
        async with asyncio.timeout(30):
            while await journal.read("SELECT id FROM events") != [{"id": 3}]:
                await asyncio.sleep(0.01)
        await stop(forgetting)
    finally:
        await journal.close()
