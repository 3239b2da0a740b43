"""Where the steps of a commit are written down before they are taken.

Whoever promises that a commit survives its own process (the daemon) gives a `Ledger`: each step
that changes something in QEMU is noted, with the state of the machine, before it is taken. From
the last note `phases.resume` goes on, in another process.
"""

from __future__ import annotations

from typing import Any, Protocol

from qmpcommit.commit.facts import Choice, Ended
from qmpcommit.commit.phases import Phase, State, Verdict


class Ledger(Protocol):
    """Writes a commit's steps down."""

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        """A step that is about to be taken; it is when this returns.

        `step` is the QMP command that will be sent, or what else will be done (``freeze``,
        ``overlay``, ``thaw``, ``clear-away``, ``throttle``, ``unthrottle``).
        """

    def moved(self, state: State) -> None:
        """The machine has reached another phase; for whoever watches, so nothing waits for it."""


def dump_state(state: State) -> dict[str, Any]:
    """The state as JSON's own types."""
    dumped = state._asdict()
    if state.end is not None:
        dumped["end"] = state.end._asdict()
    return dumped


def load_state(dumped: dict[str, Any]) -> State:
    """The state that was dumped; raises ValueError or TypeError for what is none."""
    values = dict(dumped)
    values["phase"] = Phase(values["phase"])
    for name, kind in (("decision", Choice), ("former", Choice), ("verdict", Verdict)):
        if values.get(name) is not None:
            values[name] = kind(values[name])
    if values.get("end") is not None:
        values["end"] = Ended(**values["end"])
    values["trail"] = tuple(values.get("trail") or ())
    return State(**values)
