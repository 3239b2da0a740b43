"""What happens to a job, as the state machine's tests tell it in one word."""

from __future__ import annotations

from typing import Any

from qmpcommit.commit import phases
from qmpcommit.commit.facts import (
    Accepted,
    Answered,
    Command,
    Ended,
    JobSeen,
    Looked,
    StatusChanged,
)

PENDING = StatusChanged("pending")
CREATED = (StatusChanged("created"), StatusChanged("running"), Accepted(Command.START))
COMPLETED = (StatusChanged("waiting"), PENDING, Ended(False, None, 10, 10))
HELD = Answered(JobSeen("pending", auto_finalize=False))


def begun(
    *, two_phase: bool = True, prepares: bool = False, stalls: bool = False, meets: bool = False
) -> phases.Step:
    """A commit that is being sent, and whose disk stays as it was planned."""
    state, _ = phases.begin(two_phase=two_phase, prepares=prepares, stalls=stalls, meets=meets)
    state, actions = phases.step(state, Looked())
    return state._replace(unchecked=False), actions


def known(**facts: Any) -> phases.State:
    """A state of which all that is not told is as at the beginning, whichever value holds it."""
    facts.setdefault("two_phase", True)
    for name, part in phases.PARTS.items():
        facts[name] = part(**{fact: facts.pop(fact) for fact in part._fields if fact in facts})
    return phases.State(**facts)


def concluded(error: str | None = None, done: int = 10) -> Answered:
    """QEMU says that it has ended, with that error."""
    return Answered(JobSeen("concluded", done, 10, error))
