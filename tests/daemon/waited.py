"""The daemon, which tells what each transaction holds that somebody waits for.

One line a transaction in the file ``QMPCOMMIT_WAITED``: the steps of those who wait for it.
"""

from __future__ import annotations

import json
import os
import sqlite3
from typing import Any

import qmpcommit.cli.main
from qmpcommit.daemon.journal import Journal, Statement

TRANSACT = Journal._transact


def step_of(statement: Statement) -> str:
    """What a statement is for, in a word."""
    if statement.sql.startswith("INSERT INTO commits"):
        return "promised"
    if statement.sql.startswith("UPDATE commits SET noted"):
        return str(json.loads(statement.values[0])["step"])
    return "ended" if "outcome = ?" in statement.sql else statement.sql[:30]


def transact(self: Journal, writer: sqlite3.Connection, batch: list[Any]) -> Any:
    """`Journal._transact`, told of."""
    answer = TRANSACT(self, writer, batch)
    waited = [unit for unit in batch if unit.done is not None]
    steps = [step_of(statement) for unit in waited for statement in unit.statements]
    with open(os.environ["QMPCOMMIT_WAITED"], "a") as file:
        file.write(f"{' '.join(steps)}\n" if steps else "")
    return answer


Journal._transact = transact  # type: ignore[method-assign]
qmpcommit.cli.main.main()
