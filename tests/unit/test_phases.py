"""The state machine: each race by name."""

from __future__ import annotations

import pytest

from qmpcommit.commit import phases
from qmpcommit.commit.facts import (
    Accepted,
    Action,
    Answered,
    BecameReady,
    Choice,
    Command,
    Decided,
    Duty,
    Ended,
    Fact,
    GraphRead,
    JobSeen,
    LinkBack,
    LinkDead,
    News,
    Refused,
    StatusChanged,
    Unanswered,
    Where,
)
from qmpcommit.commit.phases import Phase, State, Verdict
from tests.unit.scenes import COMPLETED, CREATED, HELD, PENDING, begun, concluded

START = Command.START
PIVOT = Command.PIVOT
KEEP = Command.KEEP
ABORT = Command.ABORT
DISMISS = Command.DISMISS


def play(*facts: Fact, two_phase: bool = True) -> tuple[State, list[Action]]:
    """Feed facts; all actions, in order."""
    state, actions = begun(two_phase=two_phase)
    for fact in facts:
        state, more = phases.step(state, fact)
        actions = actions + more
    return state, actions


def ready(choice: Choice, *facts: Fact) -> tuple[State, list[Action]]:
    """As `play`, from READY with that decision on."""
    return play(*CREATED, StatusChanged("ready"), BecameReady(), Decided(choice, "policy"), *facts)


def test_a_pivot_from_start_to_end() -> None:
    state, actions = ready(
        Choice.PIVOT,
        Accepted(Command.PIVOT),
        *COMPLETED,
        StatusChanged("concluded"),
        concluded(),
        GraphRead(Where.BASE),
        Accepted(Command.DISMISS),
    )
    assert actions == [START, Duty.CONSULT, PIVOT, Duty.ASK, Duty.READ_GRAPH, DISMISS, Duty.FINISH]
    assert state.verdict is Verdict.PIVOTED
    assert (state.done, state.total, state.trail) == (10, 10, ())


def test_a_keep_from_start_to_end() -> None:
    state, actions = ready(
        Choice.KEEP,
        Accepted(Command.KEEP),
        *COMPLETED,
        StatusChanged("concluded"),
        concluded(),
        GraphRead(Where.TOP),
        Accepted(Command.DISMISS),
    )
    assert actions == [START, Duty.CONSULT, KEEP, Duty.ASK, Duty.READ_GRAPH, DISMISS, Duty.FINISH]
    assert state.verdict is Verdict.KEPT


def test_an_intermediate_layer_has_one_phase_and_asks_no_policy() -> None:
    state, actions = play(
        *CREATED,
        *COMPLETED,
        StatusChanged("concluded"),
        concluded(),
        GraphRead(Where.MERGED),
        Accepted(Command.DISMISS),
        two_phase=False,
    )
    assert actions == [START, Duty.ASK, Duty.READ_GRAPH, DISMISS, Duty.FINISH]
    assert state.verdict is Verdict.MERGED


def test_an_intermediate_layer_that_becomes_ready_is_completed() -> None:
    _, actions = play(*CREATED, BecameReady(), two_phase=False)
    assert actions == [START, PIVOT]


def test_an_intermediate_layer_still_in_the_chain_is_a_failure() -> None:
    state, _ = play(*CREATED, *COMPLETED, concluded(), GraphRead(Where.TOP), two_phase=False)
    assert state.verdict is Verdict.FAILED


@pytest.mark.parametrize(
    "fact",
    [
        BecameReady(),
        StatusChanged("ready"),
        StatusChanged("standby"),
        Answered(JobSeen("ready")),
        Answered(JobSeen("standby")),
    ],
)
def test_ready_is_taken_from_any_source_once(fact: Fact) -> None:
    state, actions = play(*CREATED, fact)
    assert state.phase is Phase.READY
    assert actions == [START, Duty.CONSULT]
    for again in (BecameReady(), StatusChanged("ready"), Answered(JobSeen("ready")), News.TICK):
        state, more = phases.step(state, again)
        assert Duty.CONSULT not in more


@pytest.mark.parametrize("status", ["paused", "running", "created", "waiting"])
def test_no_other_status_is_ready(status: str) -> None:
    state, _ = play(*CREATED, StatusChanged(status))
    assert state.phase is Phase.COPYING


def test_ready_before_the_reply_to_block_commit() -> None:
    state, actions = play(StatusChanged("created"), BecameReady(), Accepted(Command.START))
    assert state.phase is Phase.READY
    assert actions == [START, Duty.CONSULT]


def test_a_refused_start_is_an_end_even_after_events_for_the_id() -> None:
    state, _ = play(
        StatusChanged("created"), StatusChanged("null"), Refused(Command.START, "negative speed")
    )
    assert state.verdict is Verdict.REFUSED
    assert state.error == "negative speed"


def test_a_lost_reply_to_block_commit_is_looked_up_never_sent_again() -> None:
    state, actions = play(Unanswered(Command.START), LinkBack(True), Answered(JobSeen("running")))
    assert state.phase is Phase.COPYING
    assert actions == [START, Duty.RELINK, Duty.ASK]
    state, actions = play(Unanswered(Command.START), LinkBack(True), Answered(None))
    assert state.verdict is Verdict.NEVER_BEGAN
    assert actions.count(START) == 1


def test_a_pivot_refused_in_standby_is_sent_again_when_ready() -> None:
    """QEMU 5.2 refuses to complete a job in the standby of a drain."""
    state, actions = ready(
        Choice.PIVOT,
        StatusChanged("standby"),
        Refused(Command.PIVOT, "in state 'standby' cannot accept"),
        Answered(JobSeen("standby")),
        Refused(Command.RESUME, "not paused"),
        StatusChanged("ready"),
    )
    assert actions[2:] == [PIVOT, Duty.ASK, Command.RESUME, PIVOT]
    assert state.trail == ()


def test_a_paused_job_is_resumed_to_carry_out_the_decision() -> None:
    """QEMU 7.2 and newer accept the pivot and defer it until the job is resumed."""
    state, actions = ready(
        Choice.PIVOT,
        StatusChanged("standby"),
        Accepted(Command.PIVOT),
        Answered(JobSeen("standby")),
        Accepted(Command.RESUME),
        StatusChanged("ready"),
    )
    assert actions[2:] == [PIVOT, Duty.ASK, Command.RESUME]
    assert "resumed" in state.trail[0]


def test_a_resume_is_tried_again_after_a_tick() -> None:
    _, actions = ready(
        Choice.KEEP,
        Refused(Command.KEEP, "paused"),
        Answered(JobSeen("standby")),
        Refused(Command.RESUME, "not paused"),
        Answered(JobSeen("standby")),
        News.TICK,
        Answered(JobSeen("standby")),
    )
    assert actions.count(Command.RESUME) == 2


def test_a_stale_ready_does_not_send_the_decision_twice() -> None:
    _, actions = ready(Choice.PIVOT, Answered(JobSeen("ready")), Accepted(Command.PIVOT))
    assert actions.count(PIVOT) == 1
    _, actions = ready(Choice.PIVOT, Accepted(Command.PIVOT), Answered(JobSeen("ready")))
    assert actions.count(PIVOT) == 1


def test_a_decision_whose_reply_was_lost_is_sent_again_only_if_still_ready() -> None:
    _, actions = ready(
        Choice.PIVOT, Unanswered(Command.PIVOT), LinkBack(True), Answered(JobSeen("ready"))
    )
    assert actions.count(PIVOT) == 2
    for status in ("waiting", "pending", "concluded"):
        _, actions = ready(
            Choice.PIVOT, Unanswered(Command.PIVOT), LinkBack(True), Answered(JobSeen(status))
        )
        assert actions.count(PIVOT) == 1


def test_a_decision_made_while_the_link_is_down_is_sent_when_it_is_back() -> None:
    _, actions = play(
        *CREATED,
        BecameReady(),
        News.LINK_LOST,
        Decided(Choice.KEEP, "check failed"),
        LinkBack(True),
        Answered(JobSeen("ready")),
    )
    assert actions == [START, Duty.CONSULT, Duty.RELINK, Duty.ASK, KEEP]


def test_a_decision_that_is_refused_for_ever_aborts_the_job() -> None:
    state, actions = ready(Choice.PIVOT, Refused(Command.PIVOT, "disabled by policy", final=True))
    assert actions[-1] == ABORT
    state, actions = phases.step(state, Ended(True))
    state, actions = phases.step(state, concluded("Operation canceled"))
    state, actions = phases.step(state, GraphRead(Where.TOP))
    assert state.verdict is Verdict.CANCELLED
    assert state.error is not None
    assert "disabled by policy" in state.error


def test_a_decision_that_is_refused_again_and_again_aborts_the_job() -> None:
    state, _ = ready(Choice.KEEP)
    sent = 1
    for _ in range(phases.MAX_TRIES + 5):
        state, _ = phases.step(state, Refused(Command.KEEP, "no"))
        state, actions = phases.step(state, Answered(JobSeen("ready")))
        sent += actions.count(KEEP)
        if ABORT in actions:
            break
    assert sent == phases.MAX_TRIES
    assert state.order.decision is Choice.ABORT
    assert state.error == "QEMU refused to keep: no"


@pytest.mark.parametrize(
    ("where", "verdict"), [(Where.BASE, Verdict.PIVOTED), (Where.TOP, Verdict.KEPT)]
)
def test_somebody_else_decides_under_us(where: Where, verdict: Verdict) -> None:
    state, actions = play(*CREATED, BecameReady(), *COMPLETED, concluded(), GraphRead(where))
    assert state.verdict is verdict
    assert state.order.decision is None
    assert DISMISS in actions


def test_the_first_of_two_clients_wins() -> None:
    state, _ = ready(
        Choice.PIVOT,
        *COMPLETED,
        StatusChanged("concluded"),
        Refused(Command.PIVOT, "not found"),
        concluded(),
        GraphRead(Where.TOP),
        Accepted(Command.DISMISS),
    )
    assert state.verdict is Verdict.KEPT
    assert state.order.decision is Choice.PIVOT


def test_a_job_dismissed_by_somebody_else_is_judged_by_the_graph() -> None:
    state, _ = ready(
        Choice.PIVOT,
        Accepted(Command.PIVOT),
        News.LINK_LOST,
        LinkBack(True),
        Answered(None),
        GraphRead(Where.BASE),
    )
    assert state.verdict is Verdict.PIVOTED
    assert state.trail
    state, _ = ready(
        Choice.KEEP,
        Accepted(Command.KEEP),
        News.LINK_LOST,
        LinkBack(True),
        Answered(None),
        GraphRead(Where.TOP),
    )
    assert state.verdict is Verdict.VANISHED, "a base is not called golden on a guess"


def test_a_keep_that_is_short_of_bytes_is_a_failure() -> None:
    state, _ = ready(
        Choice.KEEP, Accepted(Command.KEEP), *COMPLETED, concluded(done=9), GraphRead(Where.TOP)
    )
    assert state.verdict is Verdict.FAILED


def test_an_error_is_a_failure_although_the_event_says_completed() -> None:
    state, _ = play(
        *CREATED,
        StatusChanged("aborting"),
        Ended(False, "Input/output error"),
        StatusChanged("concluded"),
        concluded("Input/output error"),
        GraphRead(Where.TOP),
    )
    assert state.verdict is Verdict.FAILED
    assert state.error == "Input/output error"


def test_an_error_found_only_by_asking() -> None:
    state, _ = play(
        *CREATED,
        News.LINK_LOST,
        LinkBack(True),
        concluded("No space left on device"),
        GraphRead(Where.TOP),
    )
    assert state.verdict is Verdict.FAILED
    assert state.error == "No space left on device"


def test_a_cancellation_found_only_by_asking() -> None:
    state, _ = play(
        *CREATED,
        News.LINK_LOST,
        LinkBack(True),
        concluded("Operation canceled"),
        GraphRead(Where.TOP),
    )
    assert state.verdict is Verdict.CANCELLED


def test_an_abort_before_the_job_exists_waits_for_it() -> None:
    _, actions = play(Decided(Choice.ABORT, "caller"), *CREATED)
    assert actions == [START, ABORT]
    _, actions = play(
        Decided(Choice.ABORT, "caller"),
        StatusChanged("created"),
        BecameReady(),
        Accepted(Command.START),
    )
    assert actions.count(ABORT) == 1
    assert Duty.CONSULT not in actions


def test_an_abort_while_copying() -> None:
    state, actions = play(
        *CREATED,
        Decided(Choice.ABORT, "caller"),
        Accepted(Command.ABORT),
        Ended(True),
        concluded("Operation canceled"),
        GraphRead(Where.TOP),
    )
    assert state.verdict is Verdict.CANCELLED
    assert actions[1] == ABORT


def test_an_abort_overrides_a_pivot_and_nothing_overrides_an_abort() -> None:
    state, actions = ready(Choice.PIVOT, Decided(Choice.ABORT, "deadline"))
    assert actions[-1] == ABORT
    state, actions = phases.step(state, Decided(Choice.PIVOT, "policy"))
    assert actions == []
    assert state.order.decision is Choice.ABORT


@pytest.mark.parametrize("choice", [Choice.PIVOT, Choice.KEEP])
def test_nothing_is_sent_before_ready(choice: Choice) -> None:
    """A soft cancel before READY would be a hard one."""
    state, actions = play(*CREATED, Decided(choice, "caller"))
    assert actions == [START]
    assert phases.objection(state, choice) == "not ready"
    assert phases.objection(state, Choice.ABORT) is None


def test_objections() -> None:
    state, _ = play(*CREATED, BecameReady())
    assert phases.objection(state, Choice.PIVOT) is None
    state, _ = phases.step(state, Decided(Choice.PIVOT, "caller"))
    assert phases.objection(state, Choice.PIVOT) is None
    assert phases.objection(state, Choice.KEEP) == "decided"
    assert phases.objection(state, Choice.ABORT) is None
    state, _ = phases.step(state, concluded())
    assert phases.objection(state, Choice.PIVOT) == "ended"


def test_a_job_that_waits_to_be_finalized_is_finalized() -> None:
    """A held PENDING is a guest whose disk hangs."""
    state, actions = phases.adopt(two_phase=True)
    assert actions == [Duty.ASK]
    for fact in (
        Answered(JobSeen("ready", auto_finalize=False)),
        Decided(Choice.PIVOT, "caller"),
        Accepted(Command.PIVOT),
        PENDING,
    ):
        state, more = phases.step(state, fact)
        actions = actions + more
    assert actions == [Duty.ASK, Duty.CONSULT, PIVOT, Command.FINALIZE]
    state, more = phases.step(state, HELD)
    assert more == [Command.FINALIZE]


@pytest.mark.parametrize("vm_gone", [True, False])
def test_a_monitor_that_does_not_come_back_is_an_end(vm_gone: bool) -> None:
    state, actions = play(*CREATED, News.LINK_LOST, LinkDead(vm_gone))
    assert state.verdict is (Verdict.VM_GONE if vm_gone else Verdict.MONITOR_LOST)
    assert actions[-1] == Duty.FINISH


def test_an_outcome_that_is_known_survives_the_loss_of_the_monitor() -> None:
    state, _ = ready(
        Choice.PIVOT,
        Accepted(Command.PIVOT),
        *COMPLETED,
        concluded(),
        GraphRead(Where.BASE),
        News.LINK_LOST,
        LinkDead(True),
    )
    assert state.verdict is Verdict.PIVOTED
    assert "dismissed" in state.trail[-1]


def test_another_qemu_under_the_same_name() -> None:
    state, actions = play(*CREATED, News.LINK_LOST, LinkBack(False))
    assert state.verdict is Verdict.VM_GONE
    assert actions == [START, Duty.RELINK, Duty.FINISH]


def test_a_shutdown_casts_doubt_only_before_the_end() -> None:
    state, _ = play(*CREATED, BecameReady(), News.SHUTTING_DOWN)
    assert state.link.doubt
    state, _ = play(*CREATED, BecameReady(), *COMPLETED, News.SHUTTING_DOWN)
    assert not state.link.doubt


def test_a_disk_that_nobody_uses_is_believed_by_what_was_ordered() -> None:
    state, _ = ready(
        Choice.PIVOT, Accepted(PIVOT), *COMPLETED, concluded(), GraphRead(Where.UNUSED)
    )
    assert state.verdict is Verdict.PIVOTED
    assert state.trail
    state, _ = ready(Choice.KEEP, Accepted(KEEP), *COMPLETED, concluded(), GraphRead(Where.UNUSED))
    assert state.verdict is Verdict.KEPT
    state, _ = ready(Choice.PIVOT, *COMPLETED, concluded(), GraphRead(Where.OTHER))
    assert state.verdict is Verdict.UNCLEAR


def test_a_dismissal_that_was_lost_is_repeated_only_while_the_job_is_listed() -> None:
    facts = (
        Accepted(Command.PIVOT),
        *COMPLETED,
        concluded(),
        GraphRead(Where.BASE),
        Unanswered(Command.DISMISS),
        LinkBack(True),
    )
    state, actions = ready(Choice.PIVOT, *facts, concluded())
    assert actions.count(DISMISS) == 2
    state, actions = ready(Choice.PIVOT, *facts, Answered(None))
    assert actions.count(DISMISS) == 1
    assert state.finished


def test_a_refused_dismissal_is_repeated_while_the_job_is_listed() -> None:
    facts = (Accepted(Command.PIVOT), *COMPLETED, concluded(), GraphRead(Where.BASE))
    refused = Refused(Command.DISMISS, "not now")
    state, actions = ready(Choice.PIVOT, *facts, refused, Answered(None))
    assert actions.count(DISMISS) == 1
    assert state.finished
    assert not state.trail
    state, actions = ready(Choice.PIVOT, *facts)
    for _ in range(phases.MAX_REFUSALS):
        state, more = phases.step(state, refused)
        assert more == [Duty.ASK]
        state, more = phases.step(state, concluded())
        assert more == [DISMISS]
    state, _ = phases.step(state, refused)
    assert state.finished
    assert state.verdict is Verdict.PIVOTED
    assert "not now" in state.trail[-1]


def test_the_graph_is_read_again_after_the_link_was_lost() -> None:
    facts = (Accepted(Command.PIVOT), *COMPLETED, concluded(), News.LINK_LOST, LinkBack(True))
    for answer in (concluded(), Answered(None)):
        _, actions = ready(Choice.PIVOT, *facts, answer)
        assert actions.count(Duty.READ_GRAPH) == 2


def test_nothing_more_happens_after_the_end() -> None:
    state, _ = play(Refused(Command.START, "no"))
    assert phases.step(state, BecameReady()) == (state, [])


def test_a_cancellation_that_qemu_took_for_a_soft_one_is_sent_again() -> None:
    """QEMU 5.2, just before READY: the job ends PENDING, and its disk would stay held."""
    state, _ = begun(two_phase=True, meets=True)
    for fact in (*CREATED, Decided(Choice.ABORT, "caller"), Accepted(ABORT)):
        state, _ = phases.step(state, fact)
    actions: list[Action] = []
    for heard in (StatusChanged("ready"), StatusChanged("waiting"), PENDING):
        state, more = phases.step(state, heard)
        actions += more
    assert Duty.ASK in actions or ABORT in actions
    if ABORT not in actions:
        state, actions = phases.step(state, HELD)
    assert actions[-1] is ABORT
