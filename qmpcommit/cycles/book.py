"""What is noted of a round, or of a discard, in a `Ledger` before each step is taken.

Of each disk that is discarded there is a part with what its `Exchange` notes; what is kept is
noted by the commit, or the group, that carries it into the base: the round's `child`.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

from qmpcommit.callback import Noting
from qmpcommit.commit.ledger import Noted, add_note
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.phases import State
from qmpcommit.commit.policy import Recycle
from qmpcommit.errors import MonitorLost, QmpCommitError, VMGone
from qmpcommit.log import Log
from qmpcommit.qmp.process import process_identity

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM

KIND = "cycle"

Decided = Literal["exchange", "back"]
"""Which way a discard goes: all disks are exchanged, or all are put back."""

_BEFORE = ("stop", "lay", "reopen")
"""Steps of an exchange that are not taken if they can't be noted."""


def part_of(vm: VM, disk: str, overlay: str, asked: OverlayOptions) -> dict[str, Any]:
    """What is noted of one disk of a round, whether it is kept or discarded."""
    return {
        "vm": vm.name,
        "identity": process_identity(vm.peer_pid),
        "disk": disk,
        "overlay": overlay,
        "options": dict(asked.options),
        "secret": asked.secret,
    }


def recycle_of(part: Mapping[str, Any]) -> Recycle:
    """The policy by which one disk's changes are kept."""
    return Recycle(part["overlay"], part["options"] or None, part["secret"])


def is_exchanged(part: Mapping[str, Any]) -> bool:
    """Whether all is done that was to be done of one disk."""
    return part.get("step") == "exchanged"


def is_begun(part: Mapping[str, Any]) -> bool:
    """Whether the guest may stand still for one disk, or that be half exchanged."""
    return part.get("running") is not None and not is_exchanged(part)


class Parts:
    """What is kept of a round, in JSON's own types, wherever that is.

    `parts` is what is noted of each of its disks, in their order.
    """

    value: Mapping[str, Any]

    async def note(
        self, step: str, *, held: bool = False, anyway: bool = False, **facts: Any
    ) -> None:
        """A step of all of it that is about to be taken, and what is known by then."""
        raise NotImplementedError

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What is noted of its disks; empty until it is known what becomes of them."""
        return list(self.value.get("parts") or [])

    @property
    def decided(self) -> Decided | None:
        """Which way the disks of a discard go."""
        which: Decided | None = self.value.get("decided")
        return which

    async def note_of(self, number: int, step: str, **facts: Any) -> None:
        """A step of one disk's exchange."""
        parts = self.parts
        parts[number] = {**parts[number], **facts, "step": step}
        await self.note(step, held=step != "stop", anyway=step not in _BEFORE, parts=parts)

    async def decide(self, which: Decided) -> None:
        """Which way all disks go."""
        await self.note(which, held=True, anyway=which == "back", decided=which)

    @property
    def exchanged(self) -> bool:
        """Whether all of its disks are."""
        return all(map(is_exchanged, self.parts))

    @property
    def begun(self) -> bool:
        """Whether a guest may stand still for it, or a disk be half exchanged."""
        return any(map(is_begun, self.parts))


class RoundBook(Parts):
    """Notes one round in a ledger, if there is one: `value` is all that is kept of it.

    `over` is that it has ended, `result` what was decided of the changes, `decided` which way a
    discard goes.
    """

    def __init__(self, ledger: Any, log: Log, known_as: str, value: Noted | None = None) -> None:
        self._ledger, self._noting, self.known_as = ledger, Noting.of(ledger, log), known_as
        self.value: dict[str, Any] = {"over": False, "decided": None, "parts": [], "child": {}}
        self.value |= value or {}

    async def note(
        self, step: str, *, held: bool = False, anyway: bool = False, **facts: Any
    ) -> None:
        """A step of all of it; raises `CommitFailed` where it can't be noted."""
        self.value = {**self.value, **facts}
        if self._noting is not None:
            await self._noting.note(step, held=held, anyway=anyway, **self._facts())

    def _facts(self) -> dict[str, Any]:
        over = bool(self.value["over"])
        return {"kind": KIND, "known_as": self.known_as, "value": self.value, "over": over}

    @property
    def child(self) -> ChildLedger | None:
        """Where the commit or the group notes its steps that carries into the base what is kept."""
        return None if self._ledger is None else ChildLedger(self)

    async def end(self, **how: Any) -> None:
        """Note that it is over, if it is: with an `error` nothing of it may be left half done."""
        if "result" not in self.value:
            return
        error = how.get("error")
        if error is not None:
            how = {"error": {"type": type(error).__name__, "message": error.message}}
            if self.begun or isinstance(error, (MonitorLost, VMGone)):
                return
        await self.note("end", anyway=True, over=True, **how)

    @asynccontextmanager
    async def noting_failure(self) -> AsyncIterator[None]:
        """The error that ends the body is noted: it ends the round, too."""
        try:
            yield
        except QmpCommitError as error:
            await self.end(error=error)
            raise

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
