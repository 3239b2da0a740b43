"""The group's state machine: each way to fail by name, and any interleaving of members."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qmpcommit.group import machine
from qmpcommit.group.machine import (
    Back,
    Ended,
    GroupAction,
    GroupFact,
    GroupState,
    Lost,
    NotQuiesced,
    Pending,
    Quiesced,
    Ready,
    Recorded,
    Stage,
    Stop,
    Tick,
)

DECIDE, FINALIZE, CANCEL = GroupAction.DECIDE, GroupAction.FINALIZE, GroupAction.CANCEL
QUIESCE, RECORD = GroupAction.QUIESCE, GroupAction.RECORD
LIMIT = 2.0


def play(
    *facts: GroupFact, members: int = 2, freezes: bool = False, records: bool = False
) -> tuple[GroupState, list[GroupAction]]:
    """Feed facts, a tenth of a second apart; all actions, in order."""
    state = machine.begin(members, LIMIT, freezes=freezes, records=records)
    actions: list[GroupAction] = []
    for number, fact in enumerate(facts):
        state, more = machine.step(state, fact, number / 10)
        actions += more
    return state, actions


def test_from_start_to_end() -> None:
    state, actions = play(Ready(0), Ready(1), Pending(1), Pending(0), Ended(0), Ended(1))
    assert actions == [DECIDE, FINALIZE]
    assert (state.stage, state.why, state.over) == (Stage.OVER, "", True)


HELD = (Ready(0), Ready(1), Pending(0), Pending(1))


def test_what_is_to_be_finalized_is_written_down_before() -> None:
    state, actions = play(*HELD, Stop("late"), Lost(1), Back(1), Tick(), records=True)
    assert (state.stage, actions) == (Stage.RECORDING, [DECIDE, RECORD])
    state, actions = play(*HELD, Recorded(), Recorded("late"), records=True)
    assert (state.stage, actions) == (Stage.FINALIZING, [DECIDE, RECORD, FINALIZE])
    state, actions = play(*HELD, Recorded("full"), records=True)
    assert (state.stage, actions) == (Stage.CANCELLING, [DECIDE, RECORD, CANCEL])
    assert state.why == "the decision could not be written down (full)"


def test_one_that_ends_while_that_is_written_down_cancels_all() -> None:
    state, actions = play(*HELD, Ended(1), Recorded(), records=True)
    assert (state.stage, actions) == (Stage.CANCELLING, [DECIDE, RECORD, CANCEL])
    assert (state.why, state.culprit) == ("it ended before any was finalized", 1)


def test_nothing_is_decided_before_all_are_ready() -> None:
    state, actions = play(Ready(0), Ready(2), Ready(0), Tick(), members=3)
    assert (state.stage, actions) == (Stage.GATHERING, [])


def test_nothing_is_finalized_before_all_are_held() -> None:
    state, actions = play(Ready(0), Ready(1), Pending(0), Pending(0), Tick())
    assert (state.stage, actions) == (Stage.DECIDED, [DECIDE])
    assert state.deadline == pytest.approx(0.2 + LIMIT), "from the first disk that is held"


@pytest.mark.parametrize(
    ("facts", "culprit", "why"),
    [
        ([Ended(1)], 1, "ended"),
        ([Ready(0), Ended(0)], 0, "ended"),
        ([Ready(0), Ready(1), Ended(1)], 1, "ended"),
        ([Ready(0), Ready(1), Pending(0), Ended(0)], 0, "ended"),
        ([Ready(0), Ready(1), Pending(0), Ended(1)], 1, "ended"),
        ([Ready(0), Ready(1), Pending(0), Lost(0)], 0, "monitor"),
        ([Ready(0), Ready(1), Pending(0), Lost(1)], 1, "monitor"),
        ([Ready(0), Pending(0)], 0, "another client"),
        ([Stop("Ctrl-C")], None, "Ctrl-C"),
        ([Ready(0), Ready(1), Pending(0), Stop("Ctrl-C")], None, "Ctrl-C"),
    ],
)
def test_what_goes_wrong_before_the_first_finalize_cancels_all(
    facts: list[GroupFact], culprit: int | None, why: str
) -> None:
    state, actions = play(*facts)
    assert actions[-1] is CANCEL
    assert (state.stage, state.culprit) == (Stage.CANCELLING, culprit)
    assert why in state.why
    for more in (Ready(0), Ready(1), Pending(0), Pending(1), Back(0), Tick(), Stop("again")):
        state, after = machine.step(state, more, 99)
        assert after == []
    for member in (0, 1):
        state, _ = machine.step(state, Ended(member), 99)
    assert state.over


@pytest.mark.parametrize("fact", [Ended(0), Lost(0), Stop("Ctrl-C"), Tick(), Pending(0), Back(0)])
def test_what_goes_wrong_afterwards_does_not(fact: GroupFact) -> None:
    state, _ = play(Ready(0), Ready(1), Pending(0), Pending(1))
    state, actions = machine.step(state, fact, 99)
    assert (state.stage, actions) == (Stage.FINALIZING, [])


def test_a_hold_over_its_limit_is_let_go() -> None:
    state, _ = play(Ready(0), Ready(1), Pending(0))
    state, actions = machine.step(state, Tick(), 0.2 + LIMIT - 0.01)
    assert actions == []
    state, actions = machine.step(state, Tick(), 0.2 + LIMIT)
    assert actions == [CANCEL]
    assert (state.culprit, state.deadline) == (1, None)


def test_the_last_disk_comes_after_the_limit_but_before_the_tick() -> None:
    state, _ = play(Ready(0), Ready(1), Pending(0))
    _, actions = machine.step(state, Pending(1), 0.2 + LIMIT + 0.01)
    assert actions == [CANCEL]


def test_a_monitor_that_is_lost_while_copying_is_waited_for() -> None:
    state, actions = play(Ready(0), Lost(0), Ready(1))
    assert (state.stage, actions) == (Stage.GATHERING, [])
    state, actions = machine.step(state, Back(0), 1)
    assert actions == [DECIDE]


def test_guests_are_quiesced_when_all_are_ready_and_before_any_disk_is_held() -> None:
    facts: list[GroupFact] = [Ready(0), Ready(1), Quiesced(1)]
    state, actions = play(*facts, freezes=True)
    assert (state.stage, actions) == (Stage.FREEZING, [QUIESCE])
    state, actions = play(*facts, Lost(0), freezes=True)
    assert (state.stage, state.culprit, actions) == (Stage.CANCELLING, 0, [QUIESCE, CANCEL])
    facts += [Quiesced(0), Pending(0), Pending(1), Ended(0), Ended(1)]
    state, actions = play(*facts, freezes=True)
    assert actions == [QUIESCE, DECIDE, FINALIZE]
    assert (state.stage, state.why) == (Stage.OVER, "")


@pytest.mark.parametrize(
    ("facts", "culprit", "why"),
    [
        ([NotQuiesced(1, "refused")], 1, "refused"),
        ([Quiesced(1), NotQuiesced(0, "refused")], 0, "refused"),
        ([Quiesced(0), Quiesced(1), NotQuiesced(0, "its limit")], 0, "its limit"),
        ([Quiesced(0), Quiesced(1), Pending(1), NotQuiesced(0, "its limit")], 0, "its limit"),
        ([Quiesced(0), NotQuiesced(0, "its limit")], 1, "in time"),
        ([Quiesced(0), Ended(0)], 0, "ended"),
        ([Quiesced(0), Lost(1)], 1, "monitor"),
        ([Quiesced(0), Pending(1)], 1, "another client"),
        ([Quiesced(0), Stop("Ctrl-C")], None, "Ctrl-C"),
    ],
)
def test_one_guest_that_does_not_stand_still_has_none_decided(
    facts: list[GroupFact], culprit: int | None, why: str
) -> None:
    state, actions = play(Ready(0), Ready(1), *facts, freezes=True)
    assert actions[-1] is CANCEL
    assert FINALIZE not in actions
    assert (DECIDE in actions) is (sum(isinstance(fact, Quiesced) for fact in facts) == 2)
    assert (state.stage, state.culprit) == (Stage.CANCELLING, culprit)
    assert why in state.why
    for more in (Quiesced(0), Quiesced(1), NotQuiesced(0, "late"), Pending(0), Pending(1)):
        state, after = machine.step(state, more, 99)
        assert after == []


def test_a_freeze_that_ends_after_the_decision_changes_nothing() -> None:
    quiet: list[GroupFact] = [Ready(0), Ready(1), Quiesced(0), Quiesced(1)]
    state, _ = play(*quiet, Pending(0), Pending(1), NotQuiesced(0, "its limit"), freezes=True)
    assert (state.stage, state.why) == (Stage.FINALIZING, "")


class Members(RuleBasedStateMachine):
    """Jobs that obey late, fail, lose their monitor and die: all end the same way, or none does.

    The one exception is a QEMU that dies after the first finalize, which is told by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.jobs: list[str] = []
        self.orders: list[list[GroupAction]] = []
        self.issued: list[GroupAction] = []
        self.died_late: set[int] = set()
        self.guests: list[str] = []
        self.state = machine.begin(1, LIMIT)

    @initialize(members=st.integers(1, 4), freezes=st.booleans(), records=st.booleans())
    def start(self, members: int, freezes: bool, records: bool) -> None:
        self.jobs = ["running"] * members
        self.guests = ["going"] * members
        self.orders = [[] for _ in range(members)]
        self.state = machine.begin(members, LIMIT, freezes=freezes, records=records)

    def tell(self, fact: GroupFact) -> None:
        self.state, actions = machine.step(self.state, fact, self.now)
        self.issued += actions
        if QUIESCE in actions:
            assert set(self.jobs) == {"ready"}
            self.guests = ["asked"] * len(self.jobs)
        if CANCEL in actions:
            self.guests = ["going"] * len(self.jobs)
        if DECIDE in actions and self.state.freezes:
            assert set(self.guests) == {"quiet"}, "decided under a guest that writes"
        if FINALIZE in actions:
            assert set(self.jobs) == {"pending"}, "final before all disks were held"
            held = self.state.held_since
            assert held is not None
            assert self.state.records or self.now - held <= LIMIT
        for action in actions:
            for orders, job in zip(self.orders, self.jobs, strict=True):
                if job not in OVER and action not in (QUIESCE, RECORD):
                    orders.append(action)

    def end(self, member: int, how: str) -> None:
        self.jobs[member] = how
        self.orders[member].clear()
        self.tell(Ended(member))

    @rule(member=st.integers(0, 3))
    def become_ready(self, member: int) -> None:
        if self.job(member) == "running":
            self.jobs[member] = "ready"
            self.tell(Ready(member))

    @rule(member=st.integers(0, 3))
    def obey(self, member: int) -> None:
        """QEMU carries out the oldest order that it has not seen."""
        if self.job(member) in OVER or not self.orders[member]:
            return
        order = self.orders[member].pop(0)
        job = self.jobs[member]
        if order is CANCEL:
            self.end(member, "cancelled")
        elif order is DECIDE:
            assert job == "ready"
            self.jobs[member] = "pending"
            self.tell(Pending(member))
        else:
            assert job == "pending"
            self.end(member, "finalized")

    @rule(member=st.integers(0, 3), stands=st.booleans())
    def quiesce(self, member: int, stands: bool = True) -> None:
        if member < len(self.jobs) and self.guests[member] == "asked":
            self.guests[member] = "quiet" if stands else "going"
            self.tell(Quiesced(member) if stands else NotQuiesced(member, "refused"))

    @rule(member=st.integers(0, 3))
    def let_go(self, member: int) -> None:
        """The freeze has come to its limit."""
        if member < len(self.jobs) and self.guests[member] == "quiet":
            self.guests[member] = "going"
            self.tell(NotQuiesced(member, "its limit"))

    @rule(failed=st.booleans())
    def write_down(self, failed: bool = False) -> None:
        if self.state.stage is Stage.RECORDING:
            self.tell(Recorded("full" if failed else ""))

    @rule(member=st.integers(0, 3))
    def fail(self, member: int) -> None:
        if self.job(member) in ("running", "ready"):
            self.end(member, "failed")

    @rule(member=st.integers(0, 3))
    def die(self, member: int) -> None:
        if self.job(member) not in OVER:
            if self.state.stage is Stage.FINALIZING:
                self.died_late.add(member)
            self.end(member, "died")

    @rule(member=st.integers(0, 3))
    def lose_the_monitor(self, member: int) -> None:
        if self.job(member) not in OVER:
            self.tell(Lost(member))
            self.tell(Back(member))
            if self.jobs[member] == "pending":
                self.tell(Pending(member))

    @rule(seconds=st.floats(0.1, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        if self.state.deadline is not None and self.now >= self.state.deadline:
            self.tell(Tick())
            assert self.state.stage is Stage.CANCELLING

    @rule()
    @precondition(lambda self: self.state.stage is not Stage.OVER)
    def interrupt(self) -> None:
        self.tell(Stop("interrupted"))

    @invariant()
    def all_or_none(self) -> None:
        assert not {FINALIZE, CANCEL} <= set(self.issued)
        assert len(self.issued) == len(set(self.issued))
        if "finalized" in self.jobs:
            others = {job for n, job in enumerate(self.jobs) if n not in self.died_late}
            assert others <= {"finalized", "pending"}

    def teardown(self) -> None:
        """Whatever has happened, obeying and waiting bring every member to an end."""
        for _ in range(4):
            for member in range(len(self.jobs)):
                self.become_ready(member)
                self.quiesce(member)
                self.obey(member)
                self.write_down()
                self.obey(member)
        if self.jobs:
            assert self.state.over, (self.jobs, self.state)
            self.all_or_none()

    def job(self, member: int) -> str:
        return self.jobs[member] if member < len(self.jobs) else "no such member"


OVER = ("finalized", "cancelled", "failed", "died", "no such member")

TestMembers: Any = Members.TestCase
TestMembers.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
