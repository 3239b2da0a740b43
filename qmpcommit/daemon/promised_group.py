"""A group that was promised: its row in the journal, and what is noted of it."""

from __future__ import annotations

import asyncio
from typing import ClassVar, Literal

from qmpcommit.commit.group_resume import ResumableGroup
from qmpcommit.daemon.group_models import GroupRequest
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.undertaking import Undertaking
from qmpcommit.errors import QmpCommitError
from qmpcommit.journal import Journal

_COPYING = ("starting", "copying", "ready")


class Group(Undertaking[GroupRequest]):
    """A group that was answered with 202; `members` are its promises, in their order.

    `commit` is there while it is driven from here. `torn` tells that it can't go on as it is: its
    jobs are cancelled, and it begins again.
    """

    kind: ClassVar[str] = "group"
    asks: ClassVar[type[GroupRequest]] = GroupRequest

    def __init__(
        self, vm: str, request: GroupRequest, journal: Journal, *, known_as: str = ""
    ) -> None:
        super().__init__(vm, request, journal, known_as=known_as)
        self.members: list[Promise] = []
        self.commit: ResumableGroup | None = None
        self.torn = False
        self.handed_over = False
        self.changed = asyncio.Event()

    @property
    def finalizes(self) -> bool:
        """Whether it was noted that all jobs are to be finalized."""
        return bool(self.noted.get("finalize"))

    @property
    def decision(self) -> Literal["pivot", "keep", "abort"] | None:
        """What a caller has decided."""
        return self.noted.get("decision")

    @property
    def begun(self) -> bool:
        """Whether anything may have been sent."""
        return any(promise.begun for promise in self.members)

    @property
    def goes_on(self) -> bool:
        """Whether what the journal holds can be driven: nothing sent, or all and none decided."""
        if self.finalizes or self.torn or self.decision == "abort":
            return False
        copying = [p for p in self.members if p.begun and p.noted["state"]["phase"] in _COPYING]
        return not self.begun or len(copying) == len(self.members)

    def left(self, now: float) -> float | None:
        """Seconds until its deadline; None where it has none."""
        timeout = self.request.timeout
        return None if timeout is None else self.created + timeout - now

    async def finalize(self, by: str) -> None:
        """All disks are held and all jobs are to be finalized; raises `JournalFull`."""
        before = self.noted
        self.noted = {**before, "finalize": True, "by": by}
        try:
            await self._journal.write(self.row())
        except QmpCommitError:
            self.noted = before
            raise

    async def decide(self, action: str) -> None:
        """A decision that was answered is not forgotten; raises `JournalFull`."""
        before = self.noted
        self.noted = {**before, "decision": action}
        try:
            await self._journal.write(self.row())
        except QmpCommitError:
            self.noted = before
            raise
