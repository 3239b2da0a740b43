"""What was promised: its end is shown when it is durable, and taken back by nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qmpcommit.daemon.cycle_round import Round
from qmpcommit.daemon.journal import Event, Journal, Statement
from qmpcommit.daemon.leased_window import LeasedWindow
from qmpcommit.daemon.promised_group import Group
from qmpcommit.daemon.undertaking import Undertaking
from qmpcommit.wire.cycle import Cycle
from qmpcommit.wire.group import GroupRequest
from qmpcommit.wire.window import WindowRequest

CYCLE = {"vm": "web1", "disk": "vda", "every": 60, "keep_if": ["true"], "guest": "reset"}
KINDS: list[tuple[type[Undertaking[Any]], Any]] = [
    (Group, GroupRequest.model_validate(
        {"members": [{"vm": "web1", "disk": "vda"}], "policy": {"kind": "keep"}})),
    (LeasedWindow, WindowRequest.model_validate({"members": [{"vm": "web1", "disk": "vda"}]})),
    (Round, Cycle.model_validate(CYCLE)),
]  # fmt: skip


class Slow(Journal):
    """It takes what is written when it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked, self.let = asyncio.Event(), asyncio.Event()

    async def write(
        self, *statements: Statement, events: Sequence[Event] = (), **options: Any
    ) -> None:
        self.asked.set()
        await self.let.wait()
        await super().write(*statements, events=events, **options)


@pytest.mark.parametrize(("kind", "request_"), KINDS, ids=lambda each: getattr(each, "kind", ""))
async def test_an_end_is_shown_when_it_is_durable_and_stays(
    folder: Path, kind: type[Undertaking[Any]], request_: Any
) -> None:
    journal = Slow(folder / "j.db")
    await journal.open()
    try:
        made = kind("web1", request_, journal)
        made.state = "running" if kind is Group else "keeping"
        before = made.state
        journal.let.set()
        await journal.write(made.insertion())
        journal.let.clear()
        journal.asked.clear()
        ending = asyncio.create_task(made.end("done", outcome={"result": "kept"}))
        await journal.asked.wait()
        assert (made.state, made.ended, made.outcome, made.over.is_set()) == (
            before, None, None, False,
        )  # fmt: skip
        noting = asyncio.create_task(made.note("thaw"))  # whose row is written after the end's
        await asyncio.sleep(0)
        journal.let.set()
        await asyncio.gather(ending, noting)
        assert (made.state, made.outcome) == ("done", {"result": "kept"})
        (row,) = await journal.read("SELECT * FROM undertakings")
        found = kind.load(row, journal)
        assert (found.state, found.ended, found.outcome) == ("done", made.ended, made.outcome)
    finally:
        await journal.close()
