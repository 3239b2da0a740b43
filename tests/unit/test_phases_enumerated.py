"""The state machine, from every state that a few facts of any kind lead to: no edge but `EDGES`."""

from __future__ import annotations

from pathlib import Path

import pytest

import qmpcommit
from qmpcommit.commit import phases
from qmpcommit.commit.facts import (
    Accepted,
    Answered,
    BecameReady,
    Checked,
    Choice,
    Command,
    Decided,
    Ended,
    Fact,
    Frozen,
    GraphRead,
    JobSeen,
    LinkBack,
    LinkDead,
    Looked,
    News,
    Overlaid,
    Prepared,
    Refused,
    StatusChanged,
    Unanswered,
    Unnoted,
    Use,
    Where,
)
from qmpcommit.commit.phases import EDGES, Phase, State

STATUSES = ("running", "standby", "ready", "pending", "concluded")
FACTS: list[Fact] = [
    *(Looked(error) for error in (None, "changed")),
    *(Checked(use, "it uses another") for use in Use),
    *(StatusChanged(status) for status in STATUSES),
    BecameReady(),
    *(Ended(cancelled) for cancelled in (False, True)),
    Answered(None),
    *(
        Answered(JobSeen(status, auto_finalize=auto))
        for status in STATUSES
        for auto in (False, True)
    ),
    *(Accepted(command) for command in Command),
    *(Refused(command, "no", final) for command in Command for final in (False, True)),
    *(Unnoted(command, "full") for command in (Command.PIVOT, Command.FINALIZE)),
    Unanswered(Command.START),
    *(Decided(choice, "policy") for choice in Choice),
    *(GraphRead(where) for where in (Where.BASE, Where.TOP, Where.MERGED)),
    *(kind(error) for kind in (Prepared, Frozen, Overlaid) for error in (None, "no")),
    *(LinkBack(same) for same in (True, False)),
    LinkDead(True),
    *News,
]
BEGINNINGS = [
    *(
        phases.begin(two_phase=two, prepares=prepares, stalls=True)[0]
        for two in (True, False)
        for prepares in (True, False)
    ),
    *(phases.adopt(two_phase=True, stale=stale)[0] for stale in ("", "it uses the base")),
    phases.adopt(two_phase=True, undoes=True)[0],
]


def _alike(state: State) -> State:
    """A state without what no edge depends on."""
    return state._replace(done=0, total=0, error=None, trail=(), end=state.end and Ended(False))


def taken(depth: int) -> dict[tuple[Phase, Phase], tuple[State, Fact]]:
    """The edges that so many facts take, with what has taken each."""
    edges: dict[tuple[Phase, Phase], tuple[State, Fact]] = {}
    seen = set(map(_alike, BEGINNINGS))
    reached = [*BEGINNINGS]
    for _ in range(depth):
        states, reached = reached, []
        for state in states:
            for fact in FACTS:
                after, _actions = phases.step(state, fact)
                if after.phase is not state.phase:
                    edges.setdefault((state.phase, after.phase), (state, fact))
                alike = _alike(after)
                if alike not in seen:
                    seen.add(alike)
                    reached.append(after)
    return edges


def test_all_edges_are_known_and_each_is_taken() -> None:
    edges = taken(3)
    known = {(start, end) for start, ends in EDGES.items() for end in ends}
    unknown = {edge: edges[edge] for edge in edges.keys() - known}
    assert not unknown
    assert known == edges.keys()


def test_no_edge_leads_back() -> None:
    order = [*Phase]
    assert all(order.index(end) > order.index(start) for start in EDGES for end in EDGES[start])


@pytest.mark.parametrize("undoes", [False, True])
@pytest.mark.parametrize("same_vm", [False, True])
def test_whoever_takes_over_goes_back_to_copying_at_most(undoes: bool, same_vm: bool) -> None:
    for phase in EDGES:
        noted = State(two_phase=True, phase=phase)
        state, _ = phases.resume(noted, same_vm=same_vm, undoes=undoes)
        assert state.phase in (phase, Phase.COPYING, Phase.FINISHED)
        assert state.phase is phase or not (noted.running and state.finished and same_vm)


def picture() -> str:
    """The edges as the manual has them."""
    lines = []
    for start, ends in EDGES.items():
        for number, (end, why) in enumerate(ends.items()):
            lines.append(f"{'' if number else start.value:<9} ─▶ {end.value:<9}  {why}")
    return "\n".join(lines)


def test_the_picture_in_the_manual_is_drawn_from_the_edges() -> None:
    manual = Path(qmpcommit.__file__).parent / "manual" / "concepts.md"
    assert f"```text\n{picture()}\n```" in manual.read_text()
