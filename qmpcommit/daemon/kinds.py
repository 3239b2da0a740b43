"""One kind of what the daemon promises: how it is found, promised, run, and taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from qmpcommit.daemon.journal import Statement
from qmpcommit.daemon.undertaking import Story, Undertaking, readable
from qmpcommit.errors import CommitNotFound, QmpCommitError

if TYPE_CHECKING:
    from qmpcommit.daemon.engine import Engine

U = TypeVar("U", bound=Undertaking[Any])


class Kind(Story, Generic[U]):
    """All undertakings of one kind; those that have not ended are in `live`, by their ids.

    `of` is their class, `called` what people call one; `missing` is raised, with `hint`, for an id
    that none has, and `bug` is how one ends that met a bug of ours.
    """

    of: type[U]
    called: ClassVar[str]
    missing: ClassVar[type[QmpCommitError]] = CommitNotFound
    hint: ClassVar[str] = ""
    bug: ClassVar[type[QmpCommitError]] = QmpCommitError

    def __init__(self, engine: Engine) -> None:
        self._engine, self._journal = engine, engine.journal
        self.live: dict[str, U] = {}

    # -- the journal ------------------------------------------------------------------------------

    def rows_of(self, vm: str | None, disk: str | None) -> list[tuple[str, Any]]:
        """Conditions in SQL for those of this kind, and of that VM and disk where one is given."""
        return [
            ("kind = ?", self.of.kind),
            ("instr(',' || vm || ',', ?)", None if vm is None else f",{vm},"),
            (
                "EXISTS (SELECT 1 FROM json_each(request, '$.members')"
                " WHERE json_extract(value, '$.disk') = ?)",
                disk,
            ),
        ]

    async def _rows(self, which: str, *values: Any) -> list[dict[str, Any]]:
        sql = f"SELECT * FROM undertakings WHERE kind = ? AND {which}"
        return await self._journal.read(sql, self.of.kind, *values)

    async def _unended(self) -> list[U]:
        """Those that a former daemon has left; what another version wrote is left as it is."""
        found = []
        for row in await self._rows("ended IS NULL ORDER BY created, rowid"):
            try:
                found.append(self.of.load(row, self._journal))
            except ValueError as error:
                told = {self.of.kind: row["id"], "why": str(error)}
                self._engine.log.warning(f"{self.called}_unreadable", **told)
        return found

    async def recover(self) -> None:
        """Take up those that a former daemon has left."""
        self.live.update({one.id: one for one in await self._unended()})

    async def _load(self, row: Mapping[str, Any]) -> U:
        """One that has ended; raises ValueError."""
        return self.of.load(row, self._journal)

    async def newest(self, which: str, *values: Any) -> list[U]:
        """The newest first, those that have ended included; `which` and how many in SQL's words."""
        found = []
        for row in await self._rows(which, *values):
            with suppress(ValueError):  # written by another version
                found.append(self.live.get(row["id"]) or await self._load(row))
        return found

    async def find(self, known_as: str) -> U:
        """The one with that id, those that have ended included; raises `missing`."""
        if known_as in self.live:
            return self.live[known_as]
        rows = await self._rows("id = ?", known_as)
        if not rows:
            raise self.unknown(known_as)
        with readable(f"{self.called} '{known_as}'", self.missing):
            return await self._load(rows[0])

    def unknown(self, known_as: str) -> QmpCommitError:
        """What is raised for an id of none, and for one that who asks may not see."""
        return self.missing(f"there is no {self.called} '{known_as}'{self.hint}")

    async def promise(self, made: U, *beside: Statement) -> None:
        """Begin a new one when it is durable; raises `JournalFull`."""
        self.live[made.id] = made
        try:
            await self._journal.write(made.insertion(), *beside, events=[made.event()])
        except BaseException:
            del self.live[made.id]
            raise
        self.launch(made)

    # -- the life of one --------------------------------------------------------------------------

    def start(self) -> None:
        """Go on with all that was taken up."""
        for each in self.live.values():
            self.launch(each)

    def launch(self, one: U) -> None:
        """Have it run."""
        one.task = asyncio.create_task(self._see_through(one), name=f"{self.called} {one.id}")

    async def _see_through(self, one: U) -> None:
        try:
            await self._run(one)
        except QmpCommitError as error:
            await self._fail(one, error)
        except Exception as error:  # a bug of ours must not leave one without an end
            one.log.warning("bug", error=repr(error))
            more = await self._rescue(one)
            await self._fail(one, self.bug(f"internal error: {error!r}{more}"))
        self.live.pop(one.id, None)
        await self._after(one)

    async def _run(self, one: U) -> None:
        """Bring it to its end, from wherever it is."""
        raise NotImplementedError

    async def _fail(self, one: U, error: QmpCommitError) -> None:
        """End it with that error."""
        raise NotImplementedError

    async def _rescue(self, one: U) -> str:
        """A bug has met one: leave no guest held, and say what else is to be told."""
        return ""

    async def _after(self, one: U) -> None:
        """Its end is durable."""


async def for_a_while(waiting: Awaitable[object], seconds: float) -> None:
    """Wait for that, and no longer than so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await waiting
