"""What is noted of a round, or of a discard, in a `Ledger` before each step is taken.

Of each disk that is discarded there is a part with what its `Exchange` notes; what is kept is
noted by the commit, or the group, that carries it into the base: the round's `child`.
"""

from __future__ import annotations

import inspect
from typing import Any

from qmpcommit.callback import Noting
from qmpcommit.commit.ledger import Noted, add_note
from qmpcommit.commit.phases import State
from qmpcommit.log import Log

KIND = "cycle"

_BEFORE = ("stop", "lay", "reopen")
"""Steps of an exchange that are not taken if they can't be noted."""


class RoundBook:
    """Notes one round: `value` is all that is kept of it, in JSON's own types.

    `over` is that it has ended, `result` what was decided of the changes, `decided` which way a
    discard goes.
    """

    def __init__(self, ledger: Any, log: Log, known_as: str, value: Noted | None = None) -> None:
        self._ledger, self._noting, self._known_as = ledger, Noting(ledger, log), known_as
        self.value: dict[str, Any] = {"over": False, "decided": None, "parts": [], "child": {}}
        self.value |= value or {}

    async def note(
        self, step: str, *, held: bool = False, anyway: bool = False, **facts: Any
    ) -> None:
        """A step of all of it; raises `CommitFailed` where it can't be noted."""
        self.value = {**self.value, **facts}
        await self._noting.note(step, held=held, anyway=anyway, **self._facts())

    def _facts(self) -> dict[str, Any]:
        over = bool(self.value["over"])
        return {"kind": KIND, "known_as": self._known_as, "value": self.value, "over": over}

    async def note_of(self, number: int, step: str, **facts: Any) -> None:
        """A step of one disk's exchange."""
        parts = list(self.value["parts"])
        parts[number] = {**parts[number], **facts, "step": step}
        await self.note(step, held=step != "stop", anyway=step not in _BEFORE, parts=parts)

    async def decide(self, which: str) -> None:
        """Which way all disks go."""
        await self.note(which, held=True, anyway=which == "back", decided=which)

    @property
    def begun(self) -> bool:
        """Whether a guest may stand still for it, or a disk be half exchanged."""
        return any(
            part.get("running") is not None and part.get("step") != "exchanged"
            for part in self.value["parts"]
        )

    @property
    def child(self) -> ChildLedger:
        """Where the commit or the group notes its steps that carries into the base what is kept."""
        return ChildLedger(self)

    async def put(self, step: str, child: Noted) -> None:
        """The child's notes, for whoever calls by the rule; raises what the ledger raises."""
        self.value = {**self.value, "child": dict(child)}
        written = self._ledger.note(step, **self._facts())
        if inspect.isawaitable(written):
            await written


class ChildLedger:
    """A `Ledger` that is kept with its round."""

    def __init__(self, book: RoundBook) -> None:
        self._book = book

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        """A step is about to be taken."""
        await self._book.put(step, add_note(self._book.value["child"], step, state, **facts))

    def moved(self, state: State) -> None:
        """It is not waited for."""

    async def noted(self) -> Noted:
        """All that was noted of it."""
        noted: Noted = self._book.value["child"]
        return noted
