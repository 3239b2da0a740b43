"""Which rows of the journal are forgotten."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
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


BIG = "x" * 2000


async def fill(journal: Journal, count: int) -> None:
    """So many old events, and one of now."""
    old = [Event(0, 5.0, "vm", "web1", None, BIG)] * count
    await journal.write(events=[*old, Event(0, time.time(), "vm", "web1", None, "{}")])


async def test_the_file_shrinks_when_much_was_forgotten(folder: Path) -> None:
    path = folder / "j.db"
    journal = await Journal(path).open()
    try:
        await fill(journal, 4000)
        await journal.read("PRAGMA wal_checkpoint(TRUNCATE)")
        full = path.stat().st_size
        assert full > 4000 * len(BIG)
        forgetting = asyncio.create_task(forget_old(Config(), journal))
        async with asyncio.timeout(30):
            while path.stat().st_size > full // 8 or journal.shrinks:
                await asyncio.sleep(0.01)
        await stop(forgetting)
        assert len(await journal.read("SELECT id FROM events")) == 1
    finally:
        await journal.close()
    again = await Journal(path).open()
    assert again.loss is None
    await again.close()


async def test_one_of_a_former_version_shrinks_too(folder: Path) -> None:
    path = folder / "j.db"
    journal = await Journal(path).open()
    await fill(journal, 1000)
    await journal.close()
    with closing(sqlite3.connect(path)) as former:
        former.execute("PRAGMA journal_mode = DELETE")
        former.execute("PRAGMA auto_vacuum = NONE")
        former.execute("VACUUM")
        former.execute("DELETE FROM events")
        former.commit()
    size = path.stat().st_size
    journal = await Journal(path).open()
    try:
        assert journal.loss is None
        assert path.stat().st_size < size // 8
        assert await journal.read("PRAGMA auto_vacuum") == [{"auto_vacuum": 2}]
    finally:
        await journal.close()
