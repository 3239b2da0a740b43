"""What was promised and what was done, on disk before it is done: SQLite, one writer thread.

Units of statements that wait while the thread syncs are written together in one transaction
(group commit), so that a thousand steps in one second cost a few dozen syncs. WAL with
``synchronous=FULL``: what `Journal.write` returned for survives a power cut, and a torn write
loses at most what nobody was told of yet.

Rows have seals (`schema`), and which promises are open is in a second file too (`roll`), so that
damage and loss are seen when it is opened. It is set aside then under another name, never emptied;
what can be trusted of it is taken over, and `Journal.loss` tells of the rest (`salvage`).
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from qmpcommit.daemon import roll, salvage, schema
from qmpcommit.daemon.roll import Roll
from qmpcommit.daemon.salvage import Loss
from qmpcommit.daemon.schema import Touched
from qmpcommit.errors import OperationError
from qmpcommit.log import Log

_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}
_UNIT_AT_FAULT = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError)
_BATCH = 512
IDLE = 0.05
"""Seconds without anything to write after which the roll is synced."""

LAZY = 0.02
"""Seconds that a unit which nobody waits for may wait for company."""

COMPANY = 8
"""Units that nobody waits for with which a step is written, as it would else wait for them."""

PIECE = 128
"""Pages that are given back at once, where nothing waits to be written."""

SPARE = 64
"""Free pages that it keeps, and writes to again."""

QUICKLY = 64 << 20
"""Bytes of rows up to which a journal of a former version is written anew when it is opened."""

LOG = 4 << 20
"""Bytes that SQLite's log keeps of its disk when all of it is in the journal."""


class JournalError(OperationError):
    """The journal can't be used; the message says what to do about it."""


class JournalFull(JournalError):
    """Nothing can be written: the disk under the journal is full, or fails."""


class Event(NamedTuple):
    """One line of what happened, as it is told to whoever follows; `at` in seconds since 1970."""

    id: int
    at: float
    kind: str
    vm: str
    commit_id: str | None
    data: str


class Statement(NamedTuple):
    """One SQL statement with its values."""

    sql: str
    values: Sequence[Any] = ()


class _Unit(NamedTuple):
    """`done` is when it is durable, and, where it is `told`, may be told of; `begin` is earlier."""

    statements: Sequence[Statement]
    events: Sequence[Event]
    done: asyncio.Future[None] | None
    queued: float
    told: bool = True
    begin: Callable[[], object] | None = None


NOTE = "UPDATE commits SET noted = ? WHERE id = ?"
"""The statement that each step of a commit costs; all of a transaction are written as one."""

_NOTES = """
    UPDATE commits SET noted = json_extract(note.value, '$[0]') FROM json_each(?) AS note
    WHERE commits.id = json_extract(note.value, '$[1]')
"""
_EVENTS = """
    INSERT INTO events (at, kind, vm, commit_id, data)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
           json_extract(value, '$[3]'), json_extract(value, '$[4]')
    FROM json_each(?) ORDER BY key
"""


def _calls(batch: Sequence[_Unit]) -> tuple[list[Statement], list[Event]]:
    """What has to be executed, in as few calls as can be.

    sqlite3 lets go of the interpreter at each call and then waits for it, behind a busy loop.
    """
    events = [event for unit in batch for event in unit.events]
    calls, notes = [], dict[Any, Sequence[Any]]()
    for unit in batch:
        for statement in unit.statements:
            if statement.sql is NOTE:
                notes[statement.values[1]] = statement.values  # the last of each commit counts
            else:
                calls.append(statement)
    if notes:
        calls.append(Statement(_NOTES, (json.dumps([*notes.values()]),)))
    if events:
        calls.append(Statement(_EVENTS, (json.dumps([event[1:] for event in events]),)))
    return calls, events


def event(kind: str, vm: str, commit_id: str | None, data: str) -> Event:
    """An event of now, which gets its number when it is written."""
    return Event(0, time.time(), kind, vm, commit_id, data)


class Journal:
    """The journal of one daemon.

    `on_event` is called in the loop with each event once it is durable, in their order;
    `on_batch` with the number of units and the seconds of each transaction. `full` tells that
    the last write found no room. Set `shrinks` to have it give its free pages back, a few at a
    time, while there is nothing to write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.full = False
        self.shrinks = False
        self.set_aside: Path | None = None
        self.loss: Loss | None = None
        self._roll: Roll | None = None
        self._seq = 0
        self._touched: list[Touched] = []
        self.on_event: Callable[[Event], object] = lambda event: None
        self.on_batch: Callable[[int, float], object] = lambda units, seconds: None
        self._log = Log(journal=str(self.path))
        self._units: queue.SimpleQueue[_Unit | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._lazy: list[_Unit] = []
        self._timer: asyncio.TimerHandle | None = None
        self._reading = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        # Of its own: the loop's threads may all wait for a file on a storage that hangs.
        self._readers = ThreadPoolExecutor(1, "journal reads")

    @property
    def size(self) -> int:
        """The bytes that it has on its disk."""
        found = 0
        for path in (self.path, f"{self.path}-wal", roll.path_of(self.path)):
            with suppress(OSError):
                found += os.stat(path).st_size
        return found

    # -- life -------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Open or make it; raises `JournalError` where that can't be done."""
        self._loop = asyncio.get_running_loop()
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, args=(opened,), name="journal")
        self._thread.start()
        try:
            await asyncio.wrap_future(opened)
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Write what waits, let reads that are under way end, and close; safe to repeat.

        The thread goes on to its end where this is cancelled.
        """
        if self._thread is None:
            return
        if not self._closing:
            self._closing = True
            self._flush()
            self._units.put(None)
        await asyncio.get_running_loop().run_in_executor(self._readers, self._thread.join)

    def _live(self, opened: Future[None]) -> None:
        """The thread: it alone opens and closes what it works on."""
        if not opened.set_running_or_notify_cancel():
            return
        try:
            writer = self._prepare()
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        self._write_all(writer)
        assert self._roll is not None
        self._roll.close()
        writer.close()
        with self._reading:  # SQLite crashes where it is closed under a read, also a cancelled one
            assert self._reader is not None
            self._reader.close()
            self._reader = None

    def _prepare(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._examine()
            self._keep_private()
            writer = self._connect()
            try:
                self._reader = self._connection()
                self._reader.text_factory = lambda text: text.decode(errors="replace")
            except BaseException:
                writer.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise JournalError(
                f"the journal {self.path} can't be opened: {error}. Give the daemon a state folder"
                " that it can write to, with room in it"
            ) from error
        return writer

    def _examine(self) -> None:
        """Set it aside where it is damaged, or has lost something, and take over what is good."""
        beside = self.path.with_name(f"{self.path.name}.new")
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        kept = self.path.with_name(f"{self.path.name}.corrupt-{stamp}-{os.getpid()}")
        if beside.exists() and not self.path.exists():  # killed while it was put in its place
            salvage.take_place(self.path, kept, beside)
        called = roll.call(roll.path_of(self.path))
        why = salvage.trouble(self.path, called)
        if not why:
            beside.unlink(missing_ok=True)
            if called is not None and not called.whole:
                self._log.warning("journal_roll_damaged", path=str(roll.path_of(self.path)))
            return
        self.loss = salvage.save(self.path, beside, why, kept, called)
        salvage.put_aside(self.path, kept, beside)
        self.set_aside = kept
        self._log.error(
            "journal_corrupt",
            why=why,
            kept_as=str(kept),
            perhaps_lost=[lost._asdict() for lost in self.loss.promises],
            all_are_named=self.loss.all_named,
        )

    def _keep_private(self) -> None:
        """Nobody else reads who asked for what; SQLite's other files are as this one."""
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        for each in self.path.parent.glob(f"{self.path.stem}.*"):
            try:
                private = stat.S_IMODE(each.lstat().st_mode) == 0o600
                if not private and each.is_file() and not each.is_symlink():
                    each.chmod(0o600)
            except OSError as error:  # another user's
                self._log.warning("journal_not_private", path=str(each), why=error.strerror)

    def _connection(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA busy_timeout = 5000")
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = self._connection()
        try:
            if not connection.execute("PRAGMA page_count").fetchone()[0]:
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA journal_size_limit = {LOG}")
            connection.execute("PRAGMA synchronous = FULL")
            self._migrate(connection)
            self._make_shrinkable(connection)
            self._begin_roll(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        known = len(schema.VERSIONS)
        if version > known:
            raise JournalError(
                f"the journal {self.path} was written by a newer qmpcommitd (schema {version}, this"
                f" one knows {known}): run that one, or give this one another state folder"
            )
        for number, script in enumerate(schema.VERSIONS[version:], version + 1):
            noted = f"UPDATE whole SET version = {number};" if number > schema.SEALED else ""
            connection.executescript(
                f"BEGIN; {script}; {noted} PRAGMA user_version = {number}; COMMIT"
            )

    def _make_shrinkable(self, connection: sqlite3.Connection) -> None:
        """One of a former version is written anew, once, where that does not take long."""
        pages, free, size, kind = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size", "auto_vacuum")
        )
        if kind != 0 or (pages - free) * size > QUICKLY:
            return
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        with suppress(sqlite3.OperationalError):  # there is no room for it: another time
            connection.execute("VACUUM")

    def _begin_roll(self, connection: sqlite3.Connection) -> None:
        """Seal what has no seals, and call the roll of all that is open."""
        identity, seq = connection.execute("SELECT identity, seq FROM whole").fetchone()
        schema.watch(connection, identity, self._touched.append)
        if seq == 0:
            connection.execute("BEGIN IMMEDIATE")
            schema.touch_all(connection)
            connection.execute(schema.SEALING)
            connection.execute("COMMIT")
            self._touched.clear()
            seq = 1
        self._seq = seq
        self._roll = Roll(roll.path_of(self.path), identity)
        self._roll.begin(seq, schema.all_open(connection))
        # From now on the file alone tells that it has a roll, and is as new as this start.
        self._transact(connection, [])
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # -- writing ----------------------------------------------------------------------------------

    async def write(
        self,
        *statements: Statement,
        events: Sequence[Event] = (),
        told: bool = True,
        begin: Callable[[], object] | None = None,
    ) -> None:
        """Write one unit, all of it or nothing; it is durable when this returns.

        Of what is promised somebody may be told then; where nobody is `told` of anything, nothing
        more is waited for. `begin` is called as soon as it is durable, while the roll is synced.
        Raises `JournalFull` where there is no room, `JournalError` once it is closed, and
        sqlite3.IntegrityError for what the schema forbids (a key that exists already). A unit at
        fault takes no other with it.
        """
        assert self._loop is not None
        if self._closing:
            raise self._closed()
        done: asyncio.Future[None] = self._loop.create_future()
        is_step = not events and all(statement.sql is NOTE for statement in statements)
        if not is_step or len(self._lazy) <= COMPANY:
            self._flush()  # what came before is written before; a step waits for no crowd
        self._units.put(_Unit(statements, events, done, time.monotonic(), told, begin))
        await done

    def write_soon(self, *statements: Statement, events: Sequence[Event] = ()) -> None:
        """Write one unit that nobody waits for, within `LAZY` seconds.

        Where there is no room it is dropped.
        """
        assert self._loop is not None
        if not self._lazy:
            self._timer = self._loop.call_later(LAZY, self._flush)
        self._lazy.append(_Unit(statements, events, None, time.monotonic()))

    def _flush(self) -> None:
        """Hand over what nobody waits for: a transaction of its own would keep others waiting."""
        if self._lazy:
            assert self._timer is not None
            self._timer.cancel()
            for unit in self._lazy:
                self._units.put(unit)
            self._lazy.clear()

    def _write_all(self, writer: sqlite3.Connection) -> None:
        ending = False
        while not ending:
            units = [self._next(writer)]
            while len(units) < _BATCH and not self._units.empty():
                units.append(self._units.get())
            ending = None in units
            batch = [unit for unit in units if unit is not None]
            if batch:
                self._write_batch(writer, batch)

    def _next(self, writer: sqlite3.Connection) -> _Unit | None:
        assert self._roll is not None
        with suppress(queue.Empty):
            if self._roll.unsynced:
                return self._units.get(timeout=IDLE)
        self._roll.sync()
        while self.shrinks:
            with suppress(queue.Empty):
                return self._units.get(timeout=IDLE)
            self._shrink(writer)
        return self._units.get()

    def _shrink(self, writer: sqlite3.Connection) -> None:
        """Give some pages back; it moves no row, and what comes meanwhile waits a moment."""
        try:
            (free,) = writer.execute("PRAGMA freelist_count").fetchone()
            (kind,) = writer.execute("PRAGMA auto_vacuum").fetchone()
            if free > SPARE and kind != 0:
                piece = min(PIECE, free - SPARE)
                writer.executescript(f"PRAGMA incremental_vacuum({piece})")  # to its last step
                return
            writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()  # which cuts the file off
        except sqlite3.Error as error:  # no room, or a read that does not end: another time
            self._log.debug("journal_not_shrunk", why=str(error))
        self.shrinks = False

    def _write_batch(self, writer: sqlite3.Connection, batch: list[_Unit]) -> None:
        """One transaction; where one unit is at fault the others are written without it."""
        assert self._roll is not None
        failed: list[tuple[_Unit, Exception]] = []
        written: list[Event] = []
        promises = False
        try:
            written, promises = self._transact(writer, batch)
            self.full = False
        except Exception as error:  # also what sqlite3 can't bind: the thread must live on
            if len(batch) > 1 and not _no_room(error):
                for unit in batch:
                    self._write_batch(writer, [unit])
                return
            failed = [(unit, self._failure(error)) for unit in batch]
        seconds = time.monotonic() - batch[0].queued
        if promises:
            self._call(self._begin, batch)
            self._roll.sync()
        self._call(self._tell, batch, failed, written, seconds, promises)

    def _call(self, what: Callable[..., object], *arguments: object) -> None:
        """In the loop."""
        assert self._loop is not None
        with suppress(RuntimeError):  # it has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(what, *arguments)

    def _transact(self, writer: sqlite3.Connection, batch: list[_Unit]) -> tuple[list[Event], bool]:
        """One transaction; its events, and whether the roll has to be synced before it is told."""
        calls, events = _calls(batch)
        last: int | None = None
        self._touched.clear()
        try:
            writer.execute("BEGIN IMMEDIATE")
            for call in calls:
                last = writer.execute(call.sql, call.values).lastrowid
            writer.execute(schema.SEALING)
            writer.execute("COMMIT")
        except BaseException:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            raise
        assert self._roll is not None
        self._seq += 1
        promises = self._roll.add(self._seq, self._touched)
        first = (last or 0) - len(events) + 1
        return [event._replace(id=first + n) for n, event in enumerate(events)], promises

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, _UNIT_AT_FAULT) or not isinstance(error, sqlite3.Error):
            return error
        self.full = True
        return JournalFull(
            f"nothing can be written to the journal {self.path}: {error}. Make room on its disk;"
            " running commits go on, new ones are refused until then"
        )

    def _begin(self, batch: list[_Unit]) -> None:
        """These are durable."""
        for unit in batch:
            if unit.begin is not None:
                unit.begin()
            if not unit.told and unit.done is not None and not unit.done.done():
                unit.done.set_result(None)

    def _tell(
        self,
        batch: list[_Unit],
        failed: list[tuple[_Unit, Exception]],
        written: list[Event],
        seconds: float,
        begun: bool,
    ) -> None:
        if not failed and not begun:
            self._begin(batch)
        for unit, error in failed:
            if unit.done is not None and not unit.done.done():
                unit.done.set_exception(error)
        for unit in batch:
            if unit.done is not None and not unit.done.done():
                unit.done.set_result(None)
        for event in written:
            self.on_event(event)
        self.on_batch(len(batch), seconds)

    # -- reading ----------------------------------------------------------------------------------

    async def read(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """The rows of a SELECT, as dicts; sees all that was written before."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._read, sql, values)

    def _read(self, sql: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        with self._reading:
            if self._reader is None:
                raise self._closed()
            cursor = self._reader.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

    def _closed(self) -> JournalError:
        return JournalError(f"the journal {self.path} is closed")


def _no_room(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _FULL
