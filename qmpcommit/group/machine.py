"""Many commits at one instant as a state machine: facts in, actions out, no I/O.

::

    GATHERING --all READY, all decided--> DECIDED --all PENDING--> FINALIZING --all ended--> OVER
        |   |                             ^  |                                                ^
        |   +--(freezes)--> FREEZING -----+  |                                                |
        |                     |  all quiet   |                                                |
        +--one ended, or was  |              +--one ended, one's monitor lost,                |
           decided by some-   +--the same, or   too long a hold, or a stop                    |
           body else,         |  a guest that   |                                             |
           or a stop          |  can't be quiet |                                             |
              +-----------> CANCELLING <--------+ ----------------all ended-------------------+

A group that freezes has its guests quiesced when all is copied and decided, and not before, so
that they stand still for milliseconds; and before any disk is held, never after, for a freeze
flushes and a held disk does not. They go on when their own disks have ended, or with CANCEL.

PENDING holds a disk's I/O. When all are PENDING no disk is written, so all bases show that one
instant, and a write that waited for another's completion can't be in one base without the other.

A group whose decision is written down is RECORDING between DECIDED and FINALIZING: nothing is
finalized yet, so a member that ends then (somebody took its job for one left behind, and cancelled
it) cancels all.

All or none: before FINALIZING anything that goes wrong cancels all, and QEMU undoes what was
decided. From FINALIZING on nothing is cancelled any more: the decision is made, and a member
that does not get there is the failure of that member alone.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, assert_never


class Stage(StrEnum):
    """Where a group is."""

    GATHERING = "gathering"
    FREEZING = "freezing"
    DECIDED = "decided"
    RECORDING = "recording"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    OVER = "over"


_UNDECIDED = (Stage.GATHERING, Stage.FREEZING, Stage.DECIDED)
"""Where all can be cancelled yet."""


class Part(NamedTuple):
    """One member: `ready` is that it is READY and decided, `quiet` that its guest stands still."""

    ready: bool = False
    quiet: bool = False
    linked: bool = True
    pending: bool = False
    ended: bool = False


class GroupState(NamedTuple):
    """All that is known about a group.

    `freezes` is whether its guests are quiesced before the decisions are carried out, `records`
    whether somebody writes down that all are to be finalized, before the first is;
    `held_since` is when the first member was seen PENDING, on the clock of `step`'s `now`;
    `why` tells why it was cancelled, `culprit` for which member.
    """

    parts: tuple[Part, ...]
    hold_limit: float
    freezes: bool = False
    records: bool = False
    stage: Stage = Stage.GATHERING
    held_since: float | None = None
    why: str = ""
    culprit: int | None = None

    @property
    def over(self) -> bool:
        """Whether all members have ended."""
        return self.stage is Stage.OVER

    @property
    def deadline(self) -> float | None:
        """When a `TICK` is due, since the hold ends then; None where there is none."""
        if self.stage is not Stage.DECIDED or self.held_since is None:
            return None
        return self.held_since + self.hold_limit


# -- facts ----------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """The member is READY, and its policy has come to a decision other than to abort."""

    member: int


class Quiesced(NamedTuple):
    """The guest of the member's VM stands still."""

    member: int


class NotQuiesced(NamedTuple):
    """The guest of the member's VM can't be quiesced, or not for any longer."""

    member: int
    why: str


class Pending(NamedTuple):
    """The member's disk is held, and whatever had to be done in that is done."""

    member: int


class Recorded(NamedTuple):
    """That all are to be finalized is written down; or it can't be, with why."""

    why: str = ""


class Lost(NamedTuple):
    """The monitor of the member's VM went away."""

    member: int


class Back(NamedTuple):
    """The monitor of the member's VM is back."""

    member: int


class Ended(NamedTuple):
    """The member's commit is over, as it was meant or not."""

    member: int


class Stop(NamedTuple):
    """Whoever owns the group, or a policy, wants no end but a cancellation."""

    why: str
    member: int | None = None


class Tick(NamedTuple):
    """Time has passed."""


GroupFact = Ready | Quiesced | NotQuiesced | Pending | Recorded | Lost | Back | Ended | Stop | Tick


class GroupAction(StrEnum):
    """What is owed to every member that has not ended; CANCEL lets their guests go on as well."""

    QUIESCE = "quiesce all guests, now"
    DECIDE = "carry out the decisions, now"
    RECORD = "write down that all are to be finalized"
    FINALIZE = "let all end, now"
    CANCEL = "cancel all"


GroupStep = tuple[GroupState, list[GroupAction]]


def begin(
    members: int, hold_limit: float, *, freezes: bool = False, records: bool = False
) -> GroupState:
    """A group whose members are about to copy; `hold_limit` in seconds."""
    return GroupState((Part(),) * members, hold_limit, freezes, records)


def step(state: GroupState, fact: GroupFact, now: float) -> GroupStep:
    """The next state and what has to be done, after one more fact; `now` in seconds."""
    match fact:
        case Ready(member):
            return _go_on(_with(state, member, ready=True), now)
        case Quiesced(member):
            return _go_on(_with(state, member, quiet=True), now)
        case NotQuiesced(member, why):
            return _not_quiesced(state, member, why)
        case Pending(member):
            return _pending(_with(state, member, pending=True), member, now)
        case Recorded(why):
            return _recorded(state, why)
        case Back(member):
            return _go_on(_with(state, member, linked=True), now)
        case Lost(member):
            state = _with(state, member, linked=False, pending=False)
            if state.stage is Stage.DECIDED:
                return _cancel(state, "its monitor was lost while the disks were held", member)
            if state.stage is Stage.FREEZING:
                return _cancel(state, "its monitor was lost while guests were quiesced", member)
            return state, []
        case Ended(member):
            return _ended(_with(state, member, ended=True), member)
        case Stop(why, member):
            return _cancel(state, why, member)
        case Tick():
            if state.deadline is not None and now >= state.deadline:
                late = [n for n, part in enumerate(state.parts) if not part.pending]
                why = f"not all disks could be held within {state.hold_limit:g} s"
                return _cancel(state, why, late[0] if late else None)
            return state, []
    assert_never(fact)


def _with(state: GroupState, member: int, **change: bool) -> GroupState:
    parts = list(state.parts)
    parts[member] = parts[member]._replace(**change)
    return state._replace(parts=tuple(parts))


def _not_quiesced(state: GroupState, member: int, why: str) -> GroupStep:
    """One that stood still, and goes on before all did, has waited for another: that is why."""
    late = [number for number, part in enumerate(state.parts) if not part.quiet]
    if state.stage is Stage.FREEZING and state.parts[member].quiet and late:
        return _cancel(state, "its guest could not be quiesced in time", late[0])
    return _cancel(state, why, member)


def _pending(state: GroupState, member: int, now: float) -> GroupStep:
    if state.held_since is None:
        state = state._replace(held_since=now)
    if state.stage in (Stage.GATHERING, Stage.FREEZING):
        why = "another client decided it before all disks were ready"
        return _cancel(state, why, member)
    return _go_on(state, now)


def _go_on(state: GroupState, now: float) -> GroupStep:
    """Once all are where they have to be, the next stage."""
    if state.stage is Stage.GATHERING and all(p.ready and p.linked for p in state.parts):
        if state.freezes:
            return state._replace(stage=Stage.FREEZING), [GroupAction.QUIESCE]
        return state._replace(stage=Stage.DECIDED), [GroupAction.DECIDE]
    if state.stage is Stage.FREEZING and all(p.quiet and p.linked for p in state.parts):
        return state._replace(stage=Stage.DECIDED), [GroupAction.DECIDE]
    if state.stage is Stage.DECIDED and all(p.pending and p.linked for p in state.parts):
        if state.deadline is not None and now > state.deadline:
            return step(state, Tick(), now)
        if state.records:
            return state._replace(stage=Stage.RECORDING), [GroupAction.RECORD]
        return state._replace(stage=Stage.FINALIZING), [GroupAction.FINALIZE]
    return state, []


def _recorded(state: GroupState, why: str) -> GroupStep:
    if state.stage is not Stage.RECORDING:
        return state, []
    if why:
        return _undo(state, f"the decision could not be written down ({why})", None)
    return state._replace(stage=Stage.FINALIZING), [GroupAction.FINALIZE]


def _ended(state: GroupState, member: int) -> GroupStep:
    actions: list[GroupAction] = []
    if state.stage in _UNDECIDED:
        state, actions = _cancel(state, "it ended before all disks were held", member)
    elif state.stage is Stage.RECORDING:
        state, actions = _undo(state, "it ended before any was finalized", member)
    if all(part.ended for part in state.parts):
        return state._replace(stage=Stage.OVER), []
    return state, actions


def _cancel(state: GroupState, why: str, member: int | None) -> GroupStep:
    return _undo(state, why, member) if state.stage in _UNDECIDED else (state, [])


def _undo(state: GroupState, why: str, member: int | None) -> GroupStep:
    state = state._replace(stage=Stage.CANCELLING, why=why, culprit=member)
    return state, [GroupAction.CANCEL]
