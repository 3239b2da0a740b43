"""A journal that is damaged, or has lost something: found out before it is used, and saved from.

Nothing is written to it here. What can be trusted goes into a new journal; what can't is named.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from qmpcommit.daemon import roll, schema
from qmpcommit.daemon.roll import Called
from qmpcommit.daemon.schema import COLUMNS, Entry

NOT_THE_JOURNAL = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM,
}  # fmt: skip
"""Errors of SQLite that tell nothing of what is in the journal."""

_DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What reading it raises; the latter where SQLite's own message has damaged text in it."""

_SMALLEST = 512
"""Bytes of the smallest database that is not empty."""

_OURS = {"commits": "commit", "undertakings": "", "keys": "key", "vms": "vm"}


class Lost(NamedTuple):
    """A promise that can't be kept as it was: which one, and why.

    `how` is "gone" (nothing of it can be read), "old" (its last steps are lost), "over" (its end
    is lost) or "perhaps" (whether something of it is lost can't be known).
    """

    kind: str
    id: str
    vm: str
    disk: str
    job_id: str
    how: str


class Loss(NamedTuple):
    """What was found: `all_named` tells that no other promise can have been lost."""

    why: str
    kept: str
    promises: tuple[Lost, ...]
    all_named: bool


class _Row(NamedTuple):
    """A row as it was read: `seq` is -1 where its seal is wrong, and 0 where it never had one."""

    seq: int
    values: dict[str, Any]


# -- what is wrong --------------------------------------------------------------------------------


def trouble(path: Path, called: Called | None) -> str:
    """Why this journal can't be trusted; empty where it can. Raises sqlite3.Error, OSError."""
    log = _size(Path(f"{path}-wal"))
    size = _size(path)
    promised = called is not None and (called.seq > 1 or bool(called.open))
    if size <= 0:
        if promised or log > 0:
            return "the journal is empty" if size == 0 else "the journal is gone"
        return "the journal is empty" if size == 0 else ""
    if size < _SMALLEST:
        return f"the journal is cut off after {size} bytes"
    with path.open("rb") as file:
        head = file.read(_SMALLEST)
    if not {head[18], head[19]} <= {1, 2}:  # which SQLite takes for a file not to be written
        return "its header is damaged"
    try:
        with closing(_reading(f"{path.absolute().as_uri()}?mode=ro")) as connection:
            return _trouble_in(connection, called)
    except _DAMAGE as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in NOT_THE_JOURNAL:
            raise
        return str(error)


def _trouble_in(connection: sqlite3.Connection, called: Called | None) -> str:
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != b"ok":
        return _text(found).replace("\n", " ")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = {_text(name) for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "whole" not in tables:
        if version >= schema.SEALED or (version and "commits" not in tables):
            return "its tables are gone"
        if called is not None and called.seq > 1:
            return "it is older than its roll"
        return ""
    whole = connection.execute("SELECT identity, seq, version FROM whole").fetchone()
    if whole is None:
        return "its identity is gone"
    identity, seq, noted = _text(whole[0]), whole[1], whole[2]
    if version != noted and (
        version < noted or version > 999 or (version ^ noted).bit_count() == 1
    ):
        return f"it says that its schema is {version}, and that it is {noted}"
    if version > len(schema.VERSIONS):
        return ""  # a newer daemon's; it is refused
    return _trouble_with(connection, called, identity, seq)


def _trouble_with(
    connection: sqlite3.Connection, called: Called | None, identity: str, seq: int
) -> str:
    if called is None:
        if seq > 1:
            return "its roll is gone, and so it can't be known what came after it was copied"
        return _damaged_rows(connection, identity, seq, {})
    if called.identity and called.identity != identity:
        return "it, or its log, is another journal's than its roll"
    if seq < called.seq:
        return f"its last {called.seq - seq} transactions are lost"
    return _damaged_rows(connection, identity, seq, called.open)


def _damaged_rows(
    connection: sqlite3.Connection, identity: str, seq: int, known: dict[str, Entry]
) -> str:
    if seq == 0:
        return ""  # it is about to be sealed
    missing = dict(known)
    for table in COLUMNS:
        for key, row in _rows(connection, table, identity):
            entry = missing.pop(f"{table}/{key}", None)
            if row.seq < 0:
                return f"the row {key!r} of {table} is damaged"
            if entry is not None and row.seq < entry.seq:
                return f"the row {key!r} of {table} is older than it was"
    return f"the row of {next(iter(missing))} is gone" if missing else ""


# -- reading --------------------------------------------------------------------------------------


def _reading(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    connection.text_factory = bytes
    connection.execute("PRAGMA busy_timeout = 5000")
    return connection


def _rows(connection: sqlite3.Connection, table: str, identity: str) -> Iterator[tuple[str, _Row]]:
    """All rows of a table that can be read; those behind a damaged page are read from the end."""
    columns = COLUMNS[table]
    there = {_text(row[1]) for row in connection.execute(f"PRAGMA table_info({table})")}
    sealed = "seal" in there
    chosen = ", ".join(name if name in there else f"'' AS {name}" for name in columns)
    more = f"seal, CAST({schema.text_of(table)} AS BLOB)" if sealed else "NULL, NULL"
    seen: set[int] = set()
    for order in ("ASC", "DESC"):
        sql = f"SELECT rowid, {more}, {chosen} FROM {table} NOT INDEXED ORDER BY rowid {order}"
        try:
            for number, said, text, *values in connection.execute(sql):
                if number in seen:
                    continue
                seen.add(number)
                named = dict(zip(columns, map(_value, values), strict=True))
                yield str(named[columns[0]]), _Row(_checked(identity, table, said, text), named)
            return
        except _DAMAGE:
            if order == "DESC":
                raise


def _checked(identity: str, table: str, said: bytes | None, text: bytes) -> int:
    if said is None:
        return 0
    told = _text(said)
    seq = schema.seq_of(told)
    return seq if seq >= 0 and schema.seal(identity, table, seq, text) == told else -1


def _value(value: Any) -> Any:
    return _text(value) if isinstance(value, bytes) else value


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _size(path: Path) -> int:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


# -- saving ---------------------------------------------------------------------------------------


def save(path: Path, beside: Path, why: str, kept: Path, called: Called | None) -> Loss:
    """Write what can be trusted of a journal into a new one; what was lost. Raises as `trouble`.

    The new one is complete when this returns: one transaction, of which its rows' seals are part.
    """
    rows = {table: dict[str, _Row]() for table in COLUMNS}
    events: dict[int, Sequence[Any]] = {}
    where = path.absolute().as_uri()
    for uri in (f"{where}?mode=ro", f"{where}?immutable=1"):  # with its log, and without
        with suppress(*_DAMAGE), closing(_reading(uri)) as connection:
            identity = called.identity if called is not None else ""
            if not identity:
                with suppress(*_DAMAGE):
                    identity = _text(*connection.execute("SELECT identity FROM whole").fetchone())
            for table, found in rows.items():
                with suppress(*_DAMAGE):
                    for key, row in _rows(connection, table, identity):
                        if key not in found or row.seq > found[key].seq:
                            found[key] = row
            for number, told in _events(connection):
                events.setdefault(number, told)
    with _new(beside) as connection:
        chosen = _Choice(called, rows)
        for table, columns in COLUMNS.items():
            places = ", ".join("?" * len(columns))
            connection.executemany(
                f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({places})",
                [[row[name] for name in columns] for row in chosen.kept[table]],
            )
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", events.values())
        all_named = called is not None and called.whole
        loss = Loss(why, str(kept), tuple(chosen.lost), all_named)
        connection.execute(
            "INSERT INTO losses (at, why, kept, all_named, promises) VALUES (?, ?, ?, ?, ?)",
            (time.time(), why, str(kept), all_named,
             json.dumps([lost._asdict() for lost in chosen.lost])),
        )  # fmt: skip
    return loss


def _events(connection: sqlite3.Connection) -> Iterator[tuple[int, Sequence[Any]]]:
    for order in ("ASC", "DESC"):
        sql = f"SELECT id, at, kind, vm, commit_id, data FROM events ORDER BY id {order}"
        with suppress(*_DAMAGE):
            for row in connection.execute(sql):
                with suppress(ValueError):
                    number, at, kind, vm, about, data = row
                    json.loads(data)
                    strict = [each.decode() if each is not None else None
                              for each in (kind, vm, about, data)]  # fmt: skip
                    if isinstance(at, float) and 0 < number < 2**62:
                        yield number, (number, at, *strict)
            return


@contextmanager
def _new(path: Path) -> Iterator[sqlite3.Connection]:
    for each in (path, Path(f"{path}-journal")):
        each.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = EXTRA")
        for number, script in enumerate(schema.VERSIONS, 1):
            connection.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT")
        (identity,) = connection.execute("SELECT identity FROM whole").fetchone()
        schema.watch(connection, identity, lambda touched: None)
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute(schema.SEALING)
        connection.execute("COMMIT")


class _Choice:
    """What is kept of the rows that were read, and which promises are lost."""

    def __init__(self, called: Called | None, rows: dict[str, dict[str, _Row]]) -> None:
        self._called, self._rows = called, rows
        self._open = called.open if called is not None else {}
        self.kept: dict[str, list[dict[str, Any]]] = {table: [] for table in COLUMNS}
        self.lost: list[Lost] = []
        self._groups = self._lost_groups()
        for table in ("vms", "keys"):
            self._take_plain(table)
        self._take_commits()
        self._take_undertakings()

    def _names(self, table: str) -> list[str]:
        """The keys of all of a table's rows, those that only the roll knows of among them."""
        start = f"{table}/"
        told = [name.removeprefix(start) for name in self._open if name.startswith(start)]
        return list(dict.fromkeys([*self._rows[table], *told]))

    def _how(self, table: str, key: str) -> str:
        """How a row is lost; empty where it is as it was."""
        row, entry = self._rows[table].get(key), self._open.get(f"{table}/{key}")
        if row is None or row.seq < 0:
            return "gone"
        ended = table in ("keys", "vms") or row.values["ended"] is not None
        if entry is not None:
            return "old" if row.seq < entry.seq or row.seq == 0 else ""
        if ended:
            return ""
        return "over" if self._called is not None and self._called.whole else "perhaps"

    def _lost_groups(self) -> set[str]:
        lost = {key for key in self._names("undertakings") if self._how("undertakings", key)}
        for key in self._names("commits"):
            if self._how("commits", key) and self._of("commits", key)["ended"] is None:
                lost.add(self._of("commits", key)["in_group"])
        return lost - {""}

    def _of(self, table: str, key: str) -> dict[str, Any]:
        """All that is known of a row: what it said when it was good, else what the roll says."""
        row, entry = self._rows[table].get(key), self._open.get(f"{table}/{key}")
        blank = dict.fromkeys(COLUMNS[table])
        plain = {"state": "running", "priority": 0, "storage": "", "phase": "", "in_group": ""}
        made = {**blank, **{name: plain[name] for name in plain if name in blank}}
        if row is not None and (row.seq >= 0 or entry is None):
            made.update(row.values)
        if entry is not None:
            made.update({n: v for n, v in entry.facts.items() if n in made and v is not None})
        return {**made, COLUMNS[table][0]: key}

    def _take_plain(self, table: str) -> None:
        for key in self._names(table):
            how = self._how(table, key)
            entry = self._open.get(f"{table}/{key}")
            if how != "gone" or (entry is not None and table == "vms"):
                self.kept[table].append(self._of(table, key))
            else:
                self.lost.append(
                    Lost(_OURS[table], key, key if table == "vms" else "", "", "", how)
                )

    def _take_commits(self) -> None:
        for key in self._names("commits"):
            how, row = self._how("commits", key), self._of("commits", key)
            in_lost_group = row["in_group"] in self._groups and row["ended"] is None
            if not how and not in_lost_group:
                self.kept["commits"].append(row)
                continue
            how = how or "old"
            vm, disk, job_id = (str(row[name] or "") for name in ("vm", "disk", "job_id"))
            self.lost.append(Lost("commit", key, vm, disk, job_id, how))
            if _readable(row, how) and not self._strange("commits", key):
                self.kept["commits"].append(_taken_up(row, how))

    def _strange(self, table: str, key: str) -> bool:
        """Whether this is a damaged row whose name may be damaged too, and another one's."""
        damaged = self._rows[table][key].seq < 0 if key in self._rows[table] else False
        unknown = self._called is not None and self._called.whole
        return damaged and unknown and f"{table}/{key}" not in self._open

    def _take_undertakings(self) -> None:
        for key in self._names("undertakings"):
            how, row = self._how("undertakings", key), self._of("undertakings", key)
            kind = str(row["kind"] or "")
            if not how and key not in self._groups:
                self.kept["undertakings"].append(row)
                continue
            how = how or "old"
            self.lost.append(Lost(kind, key, str(row["vm"] or ""), "", "", how))
            if how in ("old", "perhaps") and kind not in ("group",):
                self.kept["undertakings"].append(row)  # each step of it asks QEMU first
            elif row["ended"] is None and kind and row["request"] and row["created"]:
                said = f"the journal was damaged, and what became of this {kind} is lost with it"
                error = {"type": "CommitFailed", "message": f"{said}. {LOOK}"}
                noted = row["noted"] or "{}"
                ended = {"state": "failed", "ended": time.time(), "error": json.dumps(error)}
                self.kept["undertakings"].append({**row, "noted": noted, **ended})


LOOK = (
    "Look at the disks with `qmpcommit chain` and at the jobs with `qmpcommit jobs`; what QEMU"
    " still has of it is among the daemon's commits, to be decided"
)


def _readable(row: dict[str, Any], how: str) -> bool:
    """Whether there is enough of a commit to look for it in QEMU."""
    if row["ended"] is not None and how == "gone":
        return False  # it was over
    if not all(isinstance(row[name], str) and row[name] for name in ("vm", "disk", "job_id")):
        return False
    try:
        return isinstance(json.loads(row["request"]), dict) and isinstance(row["created"], float)
    except (TypeError, ValueError):
        return False


def _taken_up(row: dict[str, Any], how: str) -> dict[str, Any]:
    """A commit as it goes on: from its last step, or from what QEMU has of it, never anew."""
    noted: dict[str, Any] = {}
    with suppress(TypeError, ValueError):
        noted = json.loads(row["noted"])
    begun = how != "gone" and not row["in_group"] and "state" in noted and row["plan"]
    if not begun:
        row = {**row, "plan": None, "phase": ""}
        noted = {name: noted[name] for name in ("clock",) if name in noted}
    noted["lost"] = how
    if row["in_group"]:
        noted["group"] = row["in_group"]
    ended = dict.fromkeys(("ended", "outcome", "error"))
    return {**row, "state": "running", "in_group": "", "noted": json.dumps(noted), **ended}


def put_aside(path: Path, kept: Path, beside: Path) -> None:
    """Rename a journal with what belongs to it, and `beside` to its place; durable."""
    for suffix in ("", "-wal", "-shm"):
        if os.path.lexists(f"{path}{suffix}"):
            os.rename(f"{path}{suffix}", f"{kept}{suffix}")
    take_place(path, kept, beside)


def take_place(path: Path, kept: Path, beside: Path) -> None:
    """The rest of `put_aside`, also where a process was killed in it."""
    called = roll.path_of(path)
    if os.path.lexists(called):
        os.rename(called, f"{called}.kept-{kept.name.rpartition('corrupt-')[2]}")
    os.rename(beside, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
