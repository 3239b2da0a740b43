"""A commit's state, as it is written down and read again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qmpcommit.commit.facts import Choice, Ended
from qmpcommit.commit.ledger import dump_state, load_state
from qmpcommit.commit.phases import Phase, State, Verdict

STATES = [
    State(two_phase=True),
    State(two_phase=False, phase=Phase.COPYING, began=True, done=5, total=10),
    State(two_phase=True, phase=Phase.DECIDED, decision=Choice.ABORT, former=Choice.PIVOT,
          former_by="caller"),
    State(two_phase=True, phase=Phase.CONFIRMED, decision=Choice.RECYCLE, by="policy",
          end=Ended(False, "no room", 5, 10), verdict=Verdict.PIVOTED, error="no room",
          trail=("one", "two")),
]  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_what_was_written_down_is_read_again(state: State) -> None:
    assert load_state(json.loads(json.dumps(dump_state(state)))) == state


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "floating"},
        {"decision": "both"},
        {"verdict": "perhaps"},
        {"end": {"cancelled": False, "colour": "red"}},
        {"colour": "red"},
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        load_state({**dump_state(STATES[-1]), **change})
