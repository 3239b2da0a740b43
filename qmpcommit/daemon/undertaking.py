"""What the daemon has promised beside single commits: its row in the journal, and its life."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

from pydantic import BaseModel

from qmpcommit.daemon import clock
from qmpcommit.daemon.journal import Event, Journal, JournalFull, Statement, event
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.rights import asked_by
from qmpcommit.errors import CommitNotFound, QmpCommitError
from qmpcommit.log import Log

ENDED = ("done", "failed", "cancelled")

ROOM = 1.0
"""Seconds between two tries to write where the journal has no room."""

R = TypeVar("R", bound=BaseModel)


class Story:
    """What the engine does beside single commits; each does some of this."""

    async def recover(self) -> None:
        """Take up what the journal holds; no VM is connected yet."""

    async def on_up(self, vm: VM) -> None:
        """`vm` was just connected and nobody uses it yet: let its guest go on, where we held it."""

    def busy(self, vm: str) -> list[str]:
        """The ids of undertakings for which the VM must not be forgotten."""
        return []

    def start(self) -> None:
        """All is recovered and VMs are being connected: go on."""

    def exchange(self) -> None:
        """The engine has another configuration: go on by that."""

    async def stop(self) -> None:
        """Hand over, within a second: end no undertaking, leave no task.

        Only a guest that is frozen, and whose agent does not answer, is waited for longer.
        """

    def gauge(self) -> None:
        """Bring the gauges up to date."""


class End(NamedTuple):
    """How one has ended, or where it is."""

    state: str
    ended: float | None
    outcome: dict[str, Any] | None
    error: dict[str, Any] | None


class Undertaking(Generic[R]):
    """Something that was promised, and is in the journal before it is begun.

    `noted` is what another process needs to go on with it: each step is written before it is
    taken. `over` is set when it has ended and its end is durable.
    """

    kind: ClassVar[str]
    asks: ClassVar[type[BaseModel]]

    def __init__(self, vm: str, request: R, journal: Journal, *, known_as: str = "") -> None:
        self.id = known_as or uuid.uuid4().hex
        self.vm, self.request = vm, request
        self.created = time.time()
        self.born = time.monotonic()
        self.state = "new"
        self.noted: dict[str, Any] = {"clock": clock.noted(self.born), **asked_by()}
        self.expires: float | None = None
        self.ended: float | None = None
        self.outcome: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.task: asyncio.Task[None] | None = None
        self.over = asyncio.Event()
        self._end: End | None = None
        self.log = Log(vm=vm, **{self.kind: self.id})
        self._journal = journal

    @classmethod
    def load(cls, row: Mapping[str, Any], journal: Journal) -> Self:
        """One as the journal has it; raises ValueError where it can't be understood."""
        request: Any = cls.asks.model_validate_json(row["request"])
        made = cls(row["vm"], request, journal, known_as=row["id"])
        for name in ("created", "state", "expires", "ended"):
            setattr(made, name, row[name])
        for name in ("noted", "outcome", "error"):
            setattr(made, name, json.loads(row[name]) if row[name] else None)
        made.noted = made.noted or {}
        made.born = clock.moment(made.noted.get("clock"), made.created)
        if made.state in ENDED:
            made.over.set()
        return made

    def insertion(self) -> Statement:
        """The row of a new one."""
        return Statement(
            "INSERT INTO undertakings (id, kind, vm, state, created, request, noted, expires)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self.id, self.kind, self.vm, self.state, self.created,
             self.request.model_dump_json(), json.dumps(self.noted), self.expires),
        )  # fmt: skip

    @property
    def vms(self) -> list[str]:
        """The VMs that it is for, whose followers are told of it."""
        return self.vm.split(",")

    def event(self, **more: Any) -> Event:
        """What is told of it now."""
        data = {"id": self.id, "vm": self.vm, "state": self.state, **more}
        return event(self.kind, ",".join(self.vms), self.id, json.dumps(data))

    async def note(self, step: str, **facts: Any) -> None:
        """A step that is about to be taken, with what a recovery has to know of it (JSON)."""
        self.noted = {**self.noted, **facts, "step": step}
        await self._save()

    async def move(
        self,
        state: str,
        *,
        beside: Sequence[Statement] = (),
        events: Sequence[Event] = (),
        **facts: Any,
    ) -> None:
        """It has come to another state, which is told when it is durable.

        `beside` is written, and `events` are told, with it or not at all.
        """
        self.state, self.noted = state, {**self.noted, **facts}
        await self._save(self.event(), *events, beside=beside)

    async def end(
        self,
        state: str,
        *,
        outcome: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
        beside: Sequence[Statement] = (),
        events: Sequence[Event] = (),
    ) -> None:
        """How it ended, durable before anybody is told or shown it; the rest is as for `move`."""
        self._end = End(state, time.time(), outcome, error)
        told = self.event(state=state, outcome=outcome, error=error)
        await self._save(told, *events, beside=beside)
        self.state, self.ended, self.outcome, self.error = self._end
        self.over.set()

    async def _save(self, *events: Event, beside: Sequence[Statement] = ()) -> None:
        # The row as it is then: what others have noted meanwhile is not taken back.
        made = lambda: (self.row(), *beside)  # noqa: E731
        await write_when_possible(self._journal, self.log, made, events=events)

    def row(self) -> Statement:
        """What brings its row up to date: as it is now, or as it is about to end."""
        end = self._end or End(self.state, self.ended, self.outcome, self.error)
        values = (
            end.state, json.dumps(self.noted), end.ended,
            json.dumps(end.outcome) if end.outcome is not None else None,
            json.dumps(end.error) if end.error is not None else None, self.id,
        )  # fmt: skip
        sql = (
            "UPDATE undertakings SET state = ?, noted = ?, ended = ?, outcome = ?, error = ?"
            " WHERE id = ?"
        )
        return Statement(sql, values)


@contextmanager
def readable(what: str, missing: type[QmpCommitError] = CommitNotFound) -> Iterator[None]:
    """Have what the body can't load from the journal, as ValueError tells, be `missing`."""
    try:
        yield
    except ValueError:
        raise missing(
            f"{what} was written by another version of qmpcommitd, and can't be read by this one"
        ) from None


async def write_when_possible(
    journal: Journal,
    log: Log,
    made: Callable[[], Sequence[Statement]],
    *,
    events: Sequence[Event] = (),
    told: bool = True,
) -> None:
    """Write a unit, waiting for room, made anew at each try: what runs goes on meanwhile."""
    while True:
        try:
            await journal.write(*made(), events=events, told=told)
            return
        except JournalFull as error:
            log.warning("journal_full", why=error.message)
            await asyncio.sleep(ROOM)
