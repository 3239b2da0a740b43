"""The journal's tables, and the seals of its rows.

A seal tells with which transaction its row was written last, and a checksum over that number, the
journal's identity and all of the row: a damaged row, one of another journal and one that is older
than it should be are told from a good one. Temporary triggers collect the rows that a transaction
has touched, and all of them are sealed by one statement at its end.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from typing import Any, NamedTuple

VERSIONS = (
    """
    CREATE TABLE commits (
        id TEXT PRIMARY KEY,
        vm TEXT NOT NULL,
        disk TEXT NOT NULL,
        job_id TEXT NOT NULL,
        state TEXT NOT NULL,
        priority INTEGER NOT NULL DEFAULT 0,
        created REAL NOT NULL,
        request TEXT NOT NULL,
        storage TEXT NOT NULL DEFAULT '',
        phase TEXT NOT NULL DEFAULT '',
        plan TEXT,
        noted TEXT,
        decision TEXT,
        ready REAL,
        ended REAL,
        outcome TEXT,
        error TEXT
    );
    CREATE INDEX commits_by_state ON commits (state);
    CREATE INDEX commits_by_vm ON commits (vm, created);
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        kind TEXT NOT NULL,
        vm TEXT NOT NULL,
        commit_id TEXT,
        data TEXT NOT NULL
    );
    CREATE TABLE keys (
        key TEXT PRIMARY KEY,
        fingerprint TEXT NOT NULL,
        commit_id TEXT NOT NULL,
        created REAL NOT NULL
    );
    CREATE TABLE vms (name TEXT PRIMARY KEY, spec TEXT NOT NULL);
    """,
    """
    CREATE TABLE undertakings (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        vm TEXT NOT NULL,
        state TEXT NOT NULL,
        created REAL NOT NULL,
        request TEXT NOT NULL,
        noted TEXT,
        expires REAL,
        ended REAL,
        outcome TEXT,
        error TEXT
    );
    CREATE INDEX undertakings_by_kind ON undertakings (kind, state);
    """,
    "ALTER TABLE commits ADD COLUMN in_group TEXT NOT NULL DEFAULT ''",
    """
    ALTER TABLE commits ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    ALTER TABLE undertakings ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    ALTER TABLE keys ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    ALTER TABLE vms ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    CREATE TABLE whole (
        one INTEGER PRIMARY KEY CHECK (one = 1), identity TEXT, seq INTEGER, version INTEGER
    );
    INSERT INTO whole VALUES (1, lower(hex(randomblob(16))), 0, 4);
    CREATE TABLE losses (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        why TEXT NOT NULL,
        kept TEXT NOT NULL,
        all_named INTEGER NOT NULL,
        promises TEXT NOT NULL
    );
    """,
)
"""How each version of the schema is made from the one before; its number is `user_version`.

From the fourth on it is in ``whole.version`` too: a damaged number is told from a newer daemon's.
"""

SEALED = 4
"""The first version whose rows have seals."""

COLUMNS = {
    "commits": ("id", "vm", "disk", "job_id", "state", "priority", "created", "request", "storage",
                "phase", "plan", "noted", "decision", "ready", "ended", "outcome", "error",
                "in_group"),
    "undertakings": ("id", "kind", "vm", "state", "created", "request", "noted", "expires", "ended",
                     "outcome", "error"),
    "keys": ("key", "fingerprint", "commit_id", "created"),
    "vms": ("name", "spec"),
}  # fmt: skip
"""The tables whose rows are sealed, each with its key first."""

SEALING = "UPDATE whole SET seq = seq + 1"
"""Seals all rows that this transaction has touched; the last statement of each transaction."""

# What is told of a promise outside of the journal; of what has ended there is nothing to be told.
_FACTS = {
    "commits": "json_object('vm', vm, 'disk', disk, 'job_id', job_id, 'request', request,"
    " 'in_group', in_group, 'created', created)",
    "undertakings": "json_object('kind', kind, 'vm', vm, 'request', request, 'created', created)",
    "keys": "NULL",
    "vms": "json_object('spec', spec)",
}
_OPEN = {"commits": "ended IS NULL", "undertakings": "ended IS NULL", "keys": "0", "vms": "1"}


class Touched(NamedTuple):
    """A row that a transaction has written: what is to be remembered of it, None once it is over.

    `name` is its table and its key.
    """

    name: str
    facts: dict[str, Any] | None


class Entry(NamedTuple):
    """A promise that has not ended: the transaction that wrote it last, and what it is."""

    seq: int
    facts: dict[str, Any]


def text_of(table: str) -> str:
    """The SQL expression for all of a row, as it is sealed."""
    return " || ',' || ".join(f"quote({table}.{column})" for column in COLUMNS[table])


def seal(identity: str, table: str, seq: int, text: bytes) -> str:
    """The seal of a row, whose text is as `text_of` has it."""
    start = f"{identity} {table} {seq} ".encode()
    return f"{seq}.{hashlib.blake2b(start + text, digest_size=8).hexdigest()}"


def seq_of(seal: str) -> int:
    """With which transaction a row was sealed; -1 for what is no seal."""
    number, dot, _ = seal.partition(".")
    return int(number) if dot and number.isascii() and number.isdigit() else -1


def watch(connection: sqlite3.Connection, identity: str, told: Callable[[Touched], object]) -> None:
    """Have `SEALING` seal what was touched from now on; `told` is called with each such row."""

    def seals(table: str, seq: int, rows: str) -> str:
        made = []
        for number, key, text, open_, facts in json.loads(rows):
            if number is None:
                told(Touched(f"{table}/{key}", None))
                continue
            made.append((number, seal(identity, table, seq, text.encode())))
            told(Touched(f"{table}/{key}", facts if open_ else None))
        return json.dumps(made)

    connection.create_function("seals", 3, seals)
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(
        "CREATE TEMP TABLE touched (of_table TEXT, named TEXT, PRIMARY KEY (of_table, named))"
        " WITHOUT ROWID"
    )
    script = []
    for table, columns in COLUMNS.items():
        key = columns[0]
        for when, row in (
            ("INSERT", "NEW"), (f"UPDATE OF {', '.join(columns)}", "NEW"), ("DELETE", "OLD"),
        ):  # fmt: skip
            script.append(
                f"CREATE TEMP TRIGGER {table}_{when.split()[0]} AFTER {when} ON main.{table} BEGIN"
                f" INSERT OR IGNORE INTO touched VALUES ('{table}', {row}.{key}); END"
            )
        text = text_of(table)
        script.append(
            f"CREATE TEMP TRIGGER {table}_seal AFTER UPDATE OF seq ON main.whole"
            f" WHEN EXISTS (SELECT 1 FROM touched WHERE of_table = '{table}') BEGIN"
            f" UPDATE {table} SET seal = json_extract(sealed.value, '$[1]')"
            f" FROM json_each(seals('{table}', NEW.seq, (SELECT json_group_array(json_array("
            f" {table}.rowid, touched.named, {text}, {_OPEN[table]}, {_FACTS[table]}))"
            f" FROM touched LEFT JOIN {table} ON {table}.{key} = touched.named"
            f" WHERE touched.of_table = '{table}'))) AS sealed"
            f" WHERE {table}.rowid = json_extract(sealed.value, '$[0]');"
            f" DELETE FROM touched WHERE of_table = '{table}'; END"
        )
    for statement in script:
        connection.execute(statement)


def touch_all(connection: sqlite3.Connection) -> None:
    """Have the next `SEALING` seal all rows."""
    for table, columns in COLUMNS.items():
        connection.execute(
            f"INSERT OR IGNORE INTO touched SELECT '{table}', {columns[0]} FROM {table}"
        )


def all_open(connection: sqlite3.Connection) -> list[tuple[str, Entry]]:
    """All that has not ended, as the roll has it."""
    found = []
    for table, columns in COLUMNS.items():
        sql = f"SELECT {columns[0]}, seal, {_FACTS[table]} FROM {table} WHERE {_OPEN[table]}"
        for key, sealed, facts in connection.execute(sql):
            found.append((f"{table}/{key}", Entry(seq_of(sealed), json.loads(facts))))
    return found
