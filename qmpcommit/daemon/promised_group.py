"""A group that was promised: its row in the journal, and what is noted of it."""

from __future__ import annotations

import asyncio
import time
from typing import Any, ClassVar, Literal

from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.undertaking import Undertaking
from qmpcommit.errors import QmpCommitError
from qmpcommit.group.noted import FrozenGuest, NotedGroup, NotedMember, Shown, Way, resume
from qmpcommit.group.resume import ResumableGroup
from qmpcommit.wire.group import GroupRequest


class Group(Undertaking[GroupRequest]):
    """A group that was answered with 202; `members` are its promises, in their order.

    `commit` is there while it is driven from here. `torn` tells that it can't go on as it is: its
    jobs are cancelled, and it begins again; `undone` that they are although all were to be
    finalized: one had been cancelled by somebody before the first was. `problems` are for people
    to read, beside its end. `deciding` is held by the request whose decision is being written down.
    """

    kind: ClassVar[str] = "group"
    asks: ClassVar[type[GroupRequest]] = GroupRequest

    def __init__(
        self, vm: str, request: GroupRequest, journal: Journal, *, known_as: str = ""
    ) -> None:
        super().__init__(vm, request, journal, known_as=known_as)
        self.members: list[Promise] = []
        self.commit: ResumableGroup | None = None
        self.torn = self.undone = False
        self.handed_over = False
        self.problems: list[str] = []
        self.changed = asyncio.Event()
        self.deciding = asyncio.Lock()

    @property
    def as_noted(self) -> NotedGroup:
        """It and its members as the journal has them."""
        members = (NotedMember(p.vm, p.noted if p.begun else {}) for p in self.members)
        return NotedGroup(tuple(members), finalize=bool(self.noted.get("finalize")))

    @property
    def finalizes(self) -> bool:
        """Whether it was noted that all jobs are to be finalized, and they can be."""
        return self.as_noted.finalizes and not self.undone

    @property
    def in_doubt(self) -> bool:
        """Whether all are to be finalized, and none may have been: somebody may have cancelled."""
        lost = [Shown.NOTHING] * len(self.members)
        return self.finalizes and resume(self.as_noted, lost) is Way.CANCEL

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
        if self.undone or self.torn or self.decision == "abort":
            return False
        unseen = [Shown.AWAY] * len(self.members)
        return resume(self.as_noted, unseen) in (Way.BEGIN, Way.FOLLOW)

    @property
    def left(self) -> float | None:
        """Seconds until its deadline, however the clock is set; None where it has none."""
        timeout = self.request.timeout
        return None if timeout is None else self.born + timeout - time.monotonic()

    @property
    def frozen(self) -> dict[str, FrozenGuest]:
        """The guests that are quiesced, or may be, by their VMs."""
        noted = self.noted.get("frozen", {})
        return {
            vm: FrozenGuest(vm, **{name: facts[name] for name in FrozenGuest._fields[1:]})
            for vm, facts in noted.items()
        }

    @property
    def quiesced(self) -> dict[str, float]:
        """For how many seconds guests stood still that go on again, by their VMs."""
        return dict(self.noted.get("quiesced") or {})

    async def freezes(self, guest: FrozenGuest, step: str) -> None:
        """``freeze`` or ``thaw`` is about to be sent."""
        facts = {**guest._asdict(), "step": step}
        frozen = {**self.noted.get("frozen", {}), facts.pop("vm"): facts}
        self.noted = {**self.noted, "frozen": frozen}
        await self._save()

    def goes_on_again(self, vm: str, seconds: float | None = None) -> None:
        """A guest is not quiesced any more, and stood still for so long; durable with the next."""
        frozen = {name: facts for name, facts in self.noted.get("frozen", {}).items() if name != vm}
        quiesced = {**self.quiesced, **({} if seconds is None else {vm: seconds})}
        self.noted = {**self.noted, "frozen": frozen, "quiesced": quiesced}

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
