"""The journal: durable when it says so, and honest about what it can't read or write."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from qmpcommit.daemon import schema
from qmpcommit.daemon.journal import (
    COMPANY,
    NOTE,
    Event,
    Journal,
    JournalError,
    JournalFull,
    Statement,
    event,
)
from tests.ground.small_disk import fill, needs_mounts, small_disk

DEADLINE = 30.0


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Journal]:
    journal = await Journal(path).open()
    try:
        yield journal
    finally:
        await journal.close()


def key(number: int, size: int = 10) -> Statement:
    sql = "INSERT INTO keys (key, fingerprint, commit_id, created) VALUES (?, ?, '', ?)"
    return Statement(sql, (f"key{number}", "x" * size, number))


async def keys(journal: Journal) -> list[int]:
    rows = await journal.read("SELECT created FROM keys ORDER BY created")
    return [int(row["created"]) for row in rows]


def on_disk(path: Path) -> int:
    """How many keys another process would find."""
    with closing(sqlite3.connect(path)) as other:
        return int(other.execute("SELECT count(*) FROM keys").fetchone()[0])


# -- writing --------------------------------------------------------------------------------------


async def test_what_write_returned_for_is_there_for_others(folder: Path) -> None:
    async with opened(folder / "state" / "j.db") as journal:
        for number in range(5):
            await journal.write(key(number))
            assert on_disk(journal.path) == number + 1
        with closing(sqlite3.connect(journal.path)) as other:
            assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_what_waits_is_written_together_and_told_in_order(folder: Path) -> None:
    batches: list[int] = []
    told: list[Event] = []
    async with opened(folder / "j.db") as journal:
        journal.on_batch = lambda units, seconds: batches.append(units)
        journal.on_event = told.append
        news = [event("commit", "web1", str(number), "{}") for number in range(1000)]
        await asyncio.gather(
            *(journal.write(key(number), events=[news[number]]) for number in range(1000))
        )
        assert sum(batches) == 1000
        assert len(batches) < 100, "each record has a transaction of its own"
        assert await keys(journal) == list(range(1000))
    assert [seen.commit_id for seen in told] == [str(number) for number in range(1000)]
    assert [seen.id for seen in told] == list(range(1, 1001))


async def test_a_unit_at_fault_takes_no_other_with_it(folder: Path) -> None:
    async with opened(folder / "j.db") as journal:
        await journal.write(key(3))
        bad = Statement("INSERT INTO commits (id) VALUES (?)", ("\ud800",))
        asked = [journal.write(key(number)) for number in range(6)]
        asked += [journal.write(bad), journal.write(key(7), key(7)), journal.write(key(8))]
        said = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each).__name__ for each in said] == [
            "NoneType", "NoneType", "NoneType", "IntegrityError", "NoneType", "NoneType",
            "UnicodeEncodeError", "IntegrityError", "NoneType",
        ]  # fmt: skip
        assert await keys(journal) == [0, 1, 2, 3, 4, 5, 8]
        assert not journal.full


async def test_what_waits_is_written_when_the_journal_closes(folder: Path) -> None:
    path = folder / "j.db"
    async with opened(path) as journal:
        for number in range(100):
            journal.write_soon(key(number))
    assert on_disk(path) == 100
    await journal.close()  # safe to repeat


class Contended:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waited_for = threading.Event()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.waited_for.set()
            self.lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self.lock.release()


async def test_closing_waits_for_a_read_even_if_nobody_else_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SQLite crashes the process otherwise
    reading, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def stay() -> int:
        reading.set()
        go_on.wait(DEADLINE)
        ended.set()
        return 1

    async with opened(folder / "j.db") as journal:
        assert journal._reader is not None
        journal._reader.create_function("stay", 0, stay)
        lock = Contended()
        monkeypatch.setattr(journal, "_reading", lock)
        read = asyncio.create_task(journal.read("SELECT stay()"))
        assert await asyncio.to_thread(reading.wait, DEADLINE)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        ending = asyncio.create_task(journal.close())
        assert await asyncio.to_thread(lock.waited_for.wait, DEADLINE)
        assert not ending.done()
        go_on.set()
        await ending
        assert ended.is_set()


async def test_threads_that_hang_elsewhere_keep_no_read_and_no_close_waiting(folder: Path) -> None:
    loop, go_on = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    async with opened(folder / "j.db") as journal:
        hung = loop.run_in_executor(None, go_on.wait)  # as for a file on a storage that is away
        try:
            async with asyncio.timeout(DEADLINE):
                assert await journal.read("SELECT 1 AS one") == [{"one": 1}]
                await journal.close()
        finally:
            go_on.set()
        await hung


async def test_a_close_that_is_cancelled_closes_all_the_same(folder: Path) -> None:
    async with opened(folder / "j.db") as journal:
        journal.write_soon(key(0))
        with journal._reading:  # which it has to wait for
            ending = asyncio.create_task(journal.close())
            await asyncio.sleep(0)
            ending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await ending
        await journal.close()
        assert on_disk(journal.path) == 1
        with pytest.raises(JournalError, match="is closed"):
            await journal.read("SELECT 1")
        with pytest.raises(JournalError, match="is closed"):
            await journal.write(key(1))


async def test_an_opening_that_is_cancelled_leaves_nothing_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    prepare = Journal._prepare

    def slow(journal: Journal) -> sqlite3.Connection:
        begun.set()
        assert go_on.wait(DEADLINE)
        return prepare(journal)

    monkeypatch.setattr(Journal, "_prepare", slow)
    journal = Journal(folder / "j.db")
    opening = asyncio.create_task(journal.open())
    assert await asyncio.to_thread(begun.wait, DEADLINE)
    opening.cancel()
    go_on.set()
    try:
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert journal._thread is not None
        assert not journal._thread.is_alive()
        assert not [path for path in os.listdir("/proc/self/fd") if leads_to(path, folder)]
    finally:
        await journal.close()  # or its thread would keep the tests from ending


def leads_to(descriptor: str, folder: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder))
    except FileNotFoundError:
        return False


# -- power cuts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["cut", "zeros", "noise"])
async def test_a_torn_write_loses_only_what_nobody_was_told_of(folder: Path, tail: str) -> None:
    """Whatever of the last writes the disk has got: what was acknowledged before is there."""
    path, copy = folder / "j.db", folder / "copy.db"
    sizes = [0]
    chance = random.Random(7)
    async with opened(path) as journal:
        wal = Path(f"{path}-wal")
        begun = wal.stat().st_size
        rolls = [path.with_suffix(".roll").read_bytes()]
        for number in range(60):
            await journal.write(key(number, chance.randrange(6000)))
            sizes.append(wal.stat().st_size)
            rolls.append(path.with_suffix(".roll").read_bytes())
        main, log = path.read_bytes(), wal.read_bytes()
    assert sizes[-1] == len(log), "the log was started anew: make the test smaller"
    cuts = {begun, len(log), *sizes[1:], *(size - 1 for size in sizes[1:])}
    cuts |= {chance.randrange(begun, len(log)) for _ in range(60)}
    for cut in sorted(cuts):
        rest = b""
        if tail != "cut":
            length = min(len(log) - cut, 9000)
            rest = bytes(length) if tail == "zeros" else chance.randbytes(length)
        copy.write_bytes(main)
        Path(f"{copy}-wal").write_bytes(log[:cut] + rest)
        # Nothing is in the roll before it is on the disk in the log.
        copy.with_suffix(".roll").write_bytes(rolls[sum(size <= cut for size in sizes[1:])])
        async with opened(copy) as journal:
            assert journal.set_aside is None
            found = await keys(journal)
            assert found == list(range(len(found))), "not a prefix"
            assert len(found) >= sum(size <= cut for size in sizes[1:]), cut
            await journal.write(key(99))  # and it goes on


# -- damage and versions --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["head", "pages", "text", "short"])
async def test_a_damaged_journal_is_set_aside_and_kept(folder: Path, where: str) -> None:
    path = folder / "j.db"
    async with opened(path) as journal:
        for number in range(200):
            await journal.write(key(number, 500))
    whole = path.read_bytes()
    damaged = {
        "head": b"\0" * 100 + whole[100:],
        "pages": whole[:4096] + random.Random(1).randbytes(len(whole) - 4096),
        "text": b"this is no database, whatever it may be called\n" * 100,
        "short": whole[: len(whole) // 2],
    }[where]
    path.write_bytes(damaged)
    async with opened(path) as journal:
        assert journal.set_aside is not None
        assert journal.set_aside.read_bytes() == damaged
        assert ".corrupt-" in journal.set_aside.name
        assert await keys(journal) == []
        await journal.write(key(1))
    async with opened(path) as journal:  # said once, and not lost again
        assert journal.set_aside is None
        assert await keys(journal) == [1]


async def test_a_journal_of_a_newer_daemon_is_refused_and_left_alone(folder: Path) -> None:
    path = folder / "j.db"
    async with opened(path) as journal:
        await journal.write(key(1))
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"newer qmpcommitd \(schema 99"):
        await Journal(path).open()
    assert path.read_bytes() == before
    assert not list(folder.glob("*corrupt*"))


async def test_an_older_schema_is_migrated_whole_or_not_at_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "j.db"
    path.touch()  # version 0: empty, as after a crash before the first migration
    async with opened(path) as journal:
        await journal.write(key(1))
    now = schema.VERSIONS
    wrong = "ALTER TABLE keys ADD COLUMN more TEXT; ALTER TABLE absent ADD COLUMN x TEXT"
    monkeypatch.setattr(schema, "VERSIONS", (*now, wrong))
    with pytest.raises(JournalError, match="no such table"):
        await Journal(path).open()
    right = "ALTER TABLE keys ADD COLUMN more TEXT; CREATE TABLE extra (x TEXT)"
    monkeypatch.setattr(schema, "VERSIONS", (*now, right))
    for _ in range(2):
        async with opened(path) as journal:
            assert (await journal.read("PRAGMA user_version"))[0]["user_version"] == len(now) + 1
            assert (await journal.read("SELECT more FROM keys")) == [{"more": None}]
            assert await keys(journal) == [1]


async def test_a_journal_that_can_not_be_made_says_what_to_do(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(JournalError, match="Give the daemon a state folder"):
        await Journal(folder / "file" / "j.db").open()
    (folder / "j.db").mkdir()
    with pytest.raises(JournalError, match="can't be opened"):
        await Journal(folder / "j.db").open()


# -- a full disk ----------------------------------------------------------------------------------


@needs_mounts
async def test_a_full_disk_refuses_and_goes_on_when_there_is_room(folder: Path) -> None:
    with small_disk(folder / "disk", 512 << 10) as disk:
        ballast = disk / "ballast"
        async with opened(disk / "j.db") as journal:
            await journal.write(key(0))
            fill(ballast)
            acknowledged = [0]
            refused: Exception | None = None
            for number in range(1, 400):
                try:
                    await journal.write(key(number, 4000))
                except JournalFull as error:
                    refused = error
                    break
                acknowledged.append(number)
            assert "Make room on its disk" in str(refused)
            assert journal.full
            assert await keys(journal) == acknowledged
            with pytest.raises(JournalFull):
                await journal.write(key(500, 4000))
            journal.write_soon(key(501, 4000))  # nobody waits: dropped
            with pytest.raises(JournalFull):
                await journal.write(key(502, 4000))
            ballast.unlink()
            await journal.write(key(600))
            assert not journal.full
            assert await keys(journal) == [*acknowledged, 600]
        async with opened(disk / "j.db") as journal:
            assert journal.set_aside is None
            assert await keys(journal) == [*acknowledged, 600]


@needs_mounts
async def test_no_room_for_a_new_journal_is_said(folder: Path) -> None:
    with small_disk(folder / "disk", 64 << 10) as disk:
        fill(disk / "ballast")
        with pytest.raises(JournalError, match="with room in it"):
            await Journal(disk / "j.db").open()


# -- who waits for what ---------------------------------------------------------------------------


def promise(number: int) -> Statement:
    sql = (
        "INSERT INTO commits (id, vm, disk, job_id, state, priority, created, request, storage,"
        " in_group) VALUES (?, 'web1', 'vda', 'j', 'running', 0, 1.0, '{}', '', '')"
    )
    return Statement(sql, (f"{number:032x}",))


def note(number: int, step: str) -> Statement:
    return Statement(NOTE, (json.dumps({"step": step}), f"{number:032x}"))


async def test_what_is_promised_begins_while_the_roll_is_synced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(folder / "j.db") as journal:
        syncs, let, events = threading.Event(), threading.Event(), list[int]()
        sync = os.fdatasync

        def slow(file: int) -> None:
            syncs.set()
            assert let.wait(DEADLINE)
            sync(file)

        monkeypatch.setattr(os, "fdatasync", slow)
        journal.on_event = lambda event: events.append(event.id)
        begun = asyncio.Event()
        told = asyncio.create_task(
            journal.write(promise(1), events=[event("commit", "web1", "1", "")], begin=begun.set)
        )
        try:
            async with asyncio.timeout(DEADLINE):
                await begun.wait()
                assert await asyncio.to_thread(syncs.wait, DEADLINE)
                assert (await journal.read("SELECT count(*) AS n FROM commits"))[0]["n"] == 1
            assert not told.done()
            assert events == [], "nobody is told before"
        finally:
            let.set()
        await told
        assert events == [1]


async def test_a_step_waits_for_no_promise_of_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(folder / "j.db") as journal:
        await journal.write(promise(1))
        let, sync = threading.Event(), os.fdatasync

        def slow(file: int) -> None:
            assert let.wait(DEADLINE)
            sync(file)

        with closing(sqlite3.connect(journal.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # so that the step is of the promise's transaction
            first = asyncio.create_task(journal.write(key(0), told=False))  # or of it, too
            await asyncio.sleep(0)
            while not journal._units.empty():
                await asyncio.sleep(0.001)
            monkeypatch.setattr(os, "fdatasync", slow)
            step = asyncio.create_task(journal.write(note(1, "job-complete"), told=False))
            told = asyncio.create_task(journal.write(promise(2)))
            await asyncio.sleep(0)
            other.execute("ROLLBACK")
        try:
            async with asyncio.timeout(DEADLINE):
                await first
                await step
            assert not told.done()
        finally:
            let.set()
        await told


async def test_of_two_steps_in_one_transaction_the_last_counts(folder: Path) -> None:
    async with opened(folder / "j.db") as journal:
        await journal.write(promise(1))
        for count in (2, 20):  # it takes the others with it, whatever they are
            for number in range(count):
                journal.write_soon(note(1, f"step {number}"))
            await journal.write(note(1, "last"), key(count))
            (row,) = await journal.read("SELECT noted FROM commits")
            assert json.loads(row["noted"]) == {"step": "last"}


async def test_a_step_takes_a_few_others_with_it_and_waits_for_no_crowd(folder: Path) -> None:
    async with opened(folder / "j.db") as journal:
        await journal.write(promise(1))
        for many in (COMPANY, COMPANY + 1):
            units = list[int]()
            journal.on_batch = lambda count, seconds, units=units: units.append(count)  # type: ignore[misc]
            for number in range(many):
                journal.write_soon(key(100 * many + number))
            await journal.write(note(1, "job-complete"), told=False)
            await asyncio.sleep(0)
            assert units == [1 if many > COMPANY else many + 1]
