"""A group as it is written down: where it was, and how whoever finds that goes on; pure.

Of each member there is what its own `Ledger` would hold, and of the group one decision: that all
jobs are to be finalized, durable while all disks are held and before the first one is. Whoever
goes on looks at what QEMU shows of each job and asks `resume`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from qmpcommit.commit.facts import Choice
from qmpcommit.commit.ledger import Noted
from qmpcommit.commit.phases import Phase, Verdict
from qmpcommit.guest.hold import HeldGuest

_UNDECIDED = (Phase.STARTING, Phase.COPYING, Phase.READY)
_DONE = (Verdict.PIVOTED, Verdict.RECYCLED, Verdict.KEPT, Verdict.MERGED)
_WANTED = ("policy", "caller")


class NotedMember(NamedTuple):
    """One disk: what of its commit is `noted`; nothing where none was begun."""

    vm: str
    noted: Noted

    @property
    def begun(self) -> bool:
        """Whether ``block-commit`` may have been sent."""
        return "state" in self.noted

    @property
    def _state(self) -> Mapping[str, Any]:
        return self.noted.get("state") or {}

    @property
    def undecided(self) -> bool:
        """Whether it was begun, and nothing was decided for it."""
        return self.begun and self._state["phase"] in _UNDECIDED

    @property
    def aborted(self) -> bool:
        """Whether it was to be cancelled."""
        return self._state.get("decision") == Choice.ABORT

    @property
    def recycles(self) -> bool:
        """Whether a fresh overlay is to be laid over its base."""
        return "overlay" in self.noted

    @property
    def finalized(self) -> bool:
        """Whether ``job-finalize`` may have been sent, or it has ended as it was decided."""
        done = self.noted.get("finalized") or self.noted.get("step") == "job-finalize"
        return bool(done) or self._state.get("verdict") in _DONE


class NotedGroup(NamedTuple):
    """A group as its ledger holds it.

    `finalize` is that all jobs are to be finalized, as `by` has decided; `tries` counts how often
    it was begun again; `frozen` are the guests that are quiesced, or may be, by their VMs, and
    `quiesced` for how many seconds those stood still that go on again; `over` that it has ended.
    """

    members: tuple[NotedMember, ...]
    finalize: bool = False
    by: str = ""
    tries: int = 0
    frozen: Mapping[str, HeldGuest] = {}
    quiesced: Mapping[str, float] = {}
    over: bool = False

    def dump(self) -> dict[str, Any]:
        """In JSON's own types."""
        frozen = {vm: guest.dump() for vm, guest in self.frozen.items()}
        members = [member._asdict() for member in self.members]
        quiesced = dict(self.quiesced)
        return {**self._asdict(), "members": members, "frozen": frozen, "quiesced": quiesced}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> NotedGroup:
        """What was dumped; raises ValueError or the like for what is none."""
        frozen, quiesced = dumped.get("frozen") or {}, dumped.get("quiesced") or {}
        return cls(
            members=tuple(NotedMember(each["vm"], each["noted"]) for each in dumped["members"]),
            finalize=bool(dumped.get("finalize")),
            by=str(dumped.get("by") or ""),
            tries=int(dumped.get("tries", 0)),
            frozen={vm: HeldGuest.load(vm, facts) for vm, facts in frozen.items()},
            quiesced=dict(quiesced),
            over=bool(dumped.get("over")),
        )

    @property
    def begun(self) -> bool:
        """Whether anything may have been sent."""
        return any(member.begun for member in self.members)

    @property
    def finalizes(self) -> bool:
        """Whether all are to be finalized, and nothing else was noted since."""
        return self.finalize and not any(member.aborted for member in self.members)

    @property
    def aborted_by(self) -> str:
        """Who wanted no end; empty where it was cancelled for another reason, or not at all."""
        states = [member.noted["state"] for member in self.members if member.aborted]
        return next((state["by"] for state in states if state["by"] in _WANTED), "")

    @property
    def stage(self) -> str:
        """Where it was, for people to read."""
        if self.over:
            return "over"
        if any(member.aborted for member in self.members):
            return "cancelling"
        if self.finalizes:
            return "finalizing"
        if not self.begun:
            return "begun"
        undecided = all(member.undecided or not member.begun for member in self.members)
        return "copying" if undecided else "decided"


class Shown(StrEnum):
    """What is seen of a member's job in its QEMU."""

    NOTHING = "no such job"
    RUNS = "it copies, or is ready"
    HELD = "it holds its disk"
    ENDED = "it has ended well"
    FAILED = "it has failed, or was cancelled"
    GONE = "another QEMU answers"
    AWAY = "its QEMU can't be asked"


class Way(StrEnum):
    """How a group goes on."""

    BEGIN = "it is begun"
    FOLLOW = "its jobs are followed, and decided"
    FINALIZE = "all that is held is finalized"
    CANCEL = "all are cancelled"


def shown_of(job: Mapping[str, Any] | None) -> Shown:
    """What a job of ``query-jobs`` shows; None is one that is not listed."""
    if job is None or job["status"] == "null":
        return Shown.NOTHING
    if job["status"] == "concluded":
        return Shown.FAILED if job.get("error") else Shown.ENDED
    if job["status"] == "aborting":
        return Shown.FAILED
    return Shown.HELD if job["status"] == "pending" else Shown.RUNS


def resume(group: NotedGroup, shown: Sequence[Shown]) -> Way:
    """How it goes on, from what was noted and what is `shown` of each member now.

    What is to be finalized is finalized, unless one has ended otherwise before the first was:
    another client may have cancelled it while the decision was written down. What was not is
    followed where all jobs are there and none is decided, and else cancelled.
    """
    if group.finalizes:
        lost = {Shown.NOTHING, Shown.FAILED} & {*shown}
        begun = Shown.ENDED in shown or any(member.finalized for member in group.members)
        return Way.CANCEL if lost and not begun else Way.FINALIZE
    if not group.begun:
        return Way.BEGIN
    undecided = all(member.undecided for member in group.members)
    there = all(each in (Shown.RUNS, Shown.AWAY) for each in shown)
    return Way.FOLLOW if undecided and there else Way.CANCEL
