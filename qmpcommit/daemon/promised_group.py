"""A group that was promised: its row in the journal, and what is noted of it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qmpcommit.commit.ledger import Noted
from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.undertaking import Undertaking
from qmpcommit.errors import QmpCommitError
from qmpcommit.group.book import Book
from qmpcommit.group.noted import NotedGroup
from qmpcommit.group.resume import ResumableGroup
from qmpcommit.wire.group import GroupRequest

if TYPE_CHECKING:
    from qmpcommit.daemon.group_keeping import GroupKeeping


class Group(Undertaking[GroupRequest], Book):
    """A group that was answered with 202; `members` are its promises, in their order.

    `commit` is there while it is driven from here, and `keeping` until it has ended. `torn` tells
    that it can't go on as it is: its jobs are cancelled, and it begins again. `deciding` is held by
    the request whose decision is being written down.

    It is the group's `Book`: what was noted, and each member's steps in its promise.
    """

    kind: ClassVar[str] = "group"
    asks: ClassVar[type[GroupRequest]] = GroupRequest

    def __init__(
        self, vm: str, request: GroupRequest, journal: Journal, *, known_as: str = ""
    ) -> None:
        super().__init__(vm, request, journal, known_as=known_as)
        self.members: list[Promise] = []
        self.commit: ResumableGroup | None = None
        self.keeping: GroupKeeping | None = None
        self.torn = self.handed_over = False
        self.changed = asyncio.Event()
        self.deciding = asyncio.Lock()

    @property
    def as_noted(self) -> NotedGroup:
        """It and its members as the journal has them."""
        members = [{"vm": p.vm, "noted": self.member(n)} for n, p in enumerate(self.members)]
        return NotedGroup.load({**self.noted, "members": members})

    def member(self, number: int) -> Noted:
        """What is noted of one; nothing where none was begun."""
        promise = self.members[number]
        return promise.as_noted if promise.begun else {}

    def of(self, number: int) -> Promise:
        """What its steps are noted in."""
        return self.members[number]

    @property
    def decision(self) -> Literal["pivot", "keep", "abort"] | None:
        """What a caller has decided."""
        return self.noted.get("decision")

    @property
    def begun(self) -> bool:
        """Whether anything may have been sent."""
        return any(promise.begun for promise in self.members)

    @property
    def left(self) -> float | None:
        """Seconds until its deadline, however the clock is set; None where it has none."""
        timeout = self.request.timeout
        return None if timeout is None else self.born + timeout - time.monotonic()

    async def write(self, step: str) -> None:
        """Have all of it written down, when there is room."""
        await self._save()

    async def finalize(self, by: str) -> None:
        """All disks are held and all jobs are to be finalized; raises `JournalFull`."""
        await self._promise(finalize=True, by=by)

    async def decide(self, action: str) -> None:
        """A decision that was answered is not forgotten; raises `JournalFull`."""
        await self._promise(decision=action)

    async def _promise(self, **facts: Any) -> None:
        """Facts that are true when they are durable, whatever else is noted meanwhile."""
        before = {name: self.noted[name] for name in facts if name in self.noted}
        self.noted = {**self.noted, **facts}
        try:
            await self._journal.write(self.row())
        except QmpCommitError:
            kept = {name: value for name, value in self.noted.items() if name not in facts}
            self.noted = {**kept, **before}
            raise
