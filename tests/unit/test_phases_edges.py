"""The state machine, one edge at a time: what each fact leads to, and what it must not lead to."""

from __future__ import annotations

import pytest

from qmpcommit.commit import phases
from qmpcommit.commit.facts import (
    Accepted,
    Action,
    Answered,
    BecameReady,
    Checked,
    Choice,
    Command,
    Decided,
    Duty,
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
    Use,
    Where,
)
from qmpcommit.commit.phases import Halt, Link, Order, Phase, Preparation, State, Step, Verdict
from tests.unit.scenes import CREATED, HELD, PENDING, begun, concluded

ONE = begun(two_phase=True)
LAYER = begun(two_phase=False)
PREPARES = begun(two_phase=True, prepares=True)
MEETS = begun(two_phase=True, meets=True)
STALLS = begun(two_phase=True, stalls=True)


def after(start: Step, *facts: Fact) -> Step:
    """The state after the facts, and what the last of them asked for."""
    state, actions = start
    for fact in facts:
        state, actions = phases.step(state, fact)
    return state, actions


def decided(choice: Choice, start: Step = ONE) -> Step:
    """READY, and that decision made: its reply is due."""
    return after(start, *CREATED, BecameReady(), Decided(choice, "policy"))


def taken(choice: Choice, start: Step = ONE) -> Step:
    """READY, decided, and accepted."""
    return after(decided(choice, start), Accepted(phases.ORDERS[choice]))


# -- the beginning --------------------------------------------------------------------------------


def test_a_new_commit_sends_block_commit_and_waits_for_nothing_that_was_not_asked_for() -> None:
    state, actions = begun(two_phase=True)
    assert (state, actions) == (State(two_phase=True), [Command.START])
    state, _ = begun(two_phase=False, stalls=True)
    assert state == State(two_phase=False, stall=Halt(stalls=True))
    state, _ = begun(two_phase=True, prepares=True)
    assert state == State(two_phase=True, barrier=Preparation(prepares=True), auto_finalize=False)
    state, _ = begun(two_phase=True, meets=True)
    assert state == State(
        two_phase=True, barrier=Preparation(prepares=True, meets=True), auto_finalize=False
    )


@pytest.mark.parametrize("status", ["created", "running", "paused"])
@pytest.mark.parametrize("asked", [False, True])
def test_a_job_that_is_there_has_begun(status: str, asked: bool) -> None:
    fact = Answered(JobSeen(status)) if asked else StatusChanged(status)
    state, actions = after(ONE, fact)
    assert (state.phase, state.began, actions) == (Phase.COPYING, True, [])


def test_an_accepted_start_has_begun() -> None:
    state, actions = after(ONE, Accepted(Command.START))
    assert (state.phase, state.began, actions) == (Phase.COPYING, True, [])


@pytest.mark.parametrize("fact", [StatusChanged("ready"), BecameReady(), Ended(False)])
def test_what_is_heard_of_a_job_tells_that_it_began(fact: Fact) -> None:
    assert after(ONE, fact)[0].began


def test_ready_tells_how_much_was_copied() -> None:
    state, _ = after(ONE, *CREATED, BecameReady(7, 9))
    assert (state.done, state.total) == (7, 9)


@pytest.mark.parametrize("status", ["concluded", "null"])
def test_the_end_of_a_job_is_asked_for_if_it_began(status: str) -> None:
    assert after(ONE, *CREATED, StatusChanged(status))[1] == [Duty.ASK]
    assert after(ONE, StatusChanged(status))[1] == []
    ended = after(ONE, *CREATED, concluded())
    assert after(ended, StatusChanged(status))[1] == []


def test_a_status_after_the_beginning_does_not_lead_back() -> None:
    assert after(decided(Choice.PIVOT), StatusChanged("running"))[0].phase is Phase.DECIDED


def test_an_abort_waits_for_a_job_that_was_not_seen() -> None:
    abort = Decided(Choice.ABORT, "caller")
    state, actions = after(ONE, abort)
    assert (state.phase, actions) == (Phase.STARTING, [])
    assert after(ONE, Ended(False), abort)[1] == [Command.ABORT]


@pytest.mark.parametrize("status", ["running", "ready"])
def test_an_abort_is_sent_to_a_job_that_is_found_after_a_lost_reply(status: str) -> None:
    lost = after(ONE, Decided(Choice.ABORT, "caller"), Unanswered(Command.START), LinkBack(True))
    assert after(lost, Answered(JobSeen(status)))[1] == [Command.ABORT]


def test_an_adopted_job_is_there_and_has_not_been_decided() -> None:
    state, actions = phases.adopt(two_phase=True)
    assert (state.phase, actions) == (Phase.COPYING, [Duty.ASK])
    assert phases.objection(state, Choice.PIVOT) == "not ready"
    assert after((state, []), Answered(None))[1] == [Duty.READ_GRAPH]


# -- decisions ------------------------------------------------------------------------------------


def test_a_decision_is_made_once() -> None:
    for choice in (Choice.PIVOT, Choice.KEEP, Choice.ABORT):
        assert after(decided(choice), Decided(choice, "caller"))[1] == []
    state, actions = after(ONE, *CREATED, concluded(), Decided(Choice.ABORT, "caller"))
    assert (state.order.decision, actions) == (None, [])


def test_who_decided_is_remembered() -> None:
    assert decided(Choice.KEEP)[0].order.by == "policy"
    assert after(decided(Choice.KEEP), Decided(Choice.ABORT, "deadline"))[0].order.by == "deadline"
    assert after(LAYER, *CREATED, BecameReady())[0].order.by == "qmpcommit"
    refused = Refused(Command.PIVOT, "no such command", final=True)
    state, _ = after(decided(Choice.PIVOT), refused)
    assert (state.order.decision, state.order.by) == (Choice.ABORT, "policy")


def test_an_abort_after_another_decision_begins_anew() -> None:
    abort = Decided(Choice.ABORT, "caller")
    state, _ = after(taken(Choice.PIVOT), abort)
    assert (state.order.accepted, state.order.tries) == (False, 1)
    refused = after(decided(Choice.PIVOT), Refused(Command.PIVOT, "not now"))
    assert refused[0].order.refusal == "not now"
    state, actions = after(refused, abort)
    assert (state.order.refusal, actions) == (None, [Command.ABORT])


def test_what_an_abort_came_after_may_have_been_done() -> None:
    abort = Decided(Choice.ABORT, "deadline")
    state, _ = after(decided(Choice.PIVOT), abort)
    assert (state.order.former, state.order.former_by, state.ordered) == (
        Choice.PIVOT,
        "policy",
        Choice.PIVOT,
    )
    state, _ = after(taken(Choice.KEEP), abort)
    assert (state.order.decision, state.ordered) == (Choice.ABORT, Choice.KEEP)
    never_sent, _ = after(decided(Choice.RECYCLE), abort)
    assert (never_sent.order.former, never_sent.ordered) == (None, None)
    refused = Refused(Command.PIVOT, "no such command", final=True)
    assert after(decided(Choice.PIVOT), refused)[0].order.former is None
    assert after(ONE, *CREATED, abort)[0].ordered is None
    assert taken(Choice.PIVOT)[0].ordered is Choice.PIVOT


def test_a_recycle_whose_abort_came_too_late_has_its_overlay() -> None:
    pivoted = after(decided(Choice.RECYCLE), Frozen(), Accepted(Command.PIVOT))
    late = after(pivoted, Decided(Choice.ABORT, "deadline"), Ended(False, None, 10, 10))
    asked = after(late, concluded(), GraphRead(Where.BASE))
    assert asked[1] == [Duty.OVERLAY]
    state, actions = after(asked, Overlaid(), News.THAWED)
    assert (state.verdict, actions) == (Verdict.RECYCLED, [Command.DISMISS])


@pytest.mark.parametrize("choice", [Choice.PIVOT, Choice.KEEP])
def test_a_disk_that_nobody_uses_is_believed_only_by_what_qemu_has_taken(choice: Choice) -> None:
    ended = (Ended(False, None, 10, 10), concluded(), GraphRead(Where.UNUSED))
    pivots = choice is Choice.PIVOT
    verdict = after(taken(choice), *ended)[0].verdict
    assert verdict is (Verdict.PIVOTED if pivots else Verdict.KEPT)
    assert after(decided(choice), *ended)[0].verdict is Verdict.UNCLEAR
    refused = Refused(phases.ORDERS[choice], "Job not found")
    assert after(decided(choice), refused, *ended)[0].verdict is Verdict.UNCLEAR
    late = after(taken(choice), Decided(Choice.ABORT, "caller"), *ended)
    assert late[0].verdict is Verdict.UNCLEAR
    never = after(ONE, *CREATED, Decided(Choice.ABORT, "caller"), Ended(False, None, 10, 10))
    assert after(never, concluded(), GraphRead(Where.UNUSED))[0].verdict is Verdict.UNCLEAR
    dismissed = after(taken(choice), Answered(None), GraphRead(Where.UNUSED))
    assert dismissed[0].verdict is Verdict.UNCLEAR


@pytest.mark.parametrize("choice", [Choice.PIVOT, Choice.KEEP, Choice.RECYCLE])
def test_of_a_disk_that_nobody_ever_used_a_killed_process_need_not_know_who_was_first(
    choice: Choice,
) -> None:
    sent = decided(choice)
    if choice is Choice.RECYCLE:
        sent = after(sent, Frozen())
    for where, knows in ((Where.IDLE, True), (Where.UNUSED, False)):
        resumed = phases.resume(sent[0], same_vm=True)
        state, _ = after(resumed, concluded(), GraphRead(where))
        verdict = Verdict.KEPT if choice is Choice.KEEP else Verdict.PIVOTED
        assert state.verdict is (verdict if knows else Verdict.UNCLEAR)
    ended = after(sent, concluded(), GraphRead(Where.IDLE))  # of a process that lives
    assert ended[0].verdict is Verdict.UNCLEAR


def test_a_refused_decision_is_sent_again_at_the_next_ready_and_only_once() -> None:
    refused = after(decided(Choice.PIVOT), Refused(Command.PIVOT, "not now"))
    again = after(refused, StatusChanged("ready"))
    assert again[1] == [Command.PIVOT]
    assert after(again, BecameReady())[1] == []
    assert after(refused, StatusChanged("standby"))[1] == []


def test_a_decision_that_never_got_a_reply_ends_in_an_abort() -> None:
    state, actions = decided(Choice.KEEP)
    sent = 1
    while state.order.decision is Choice.KEEP and sent <= phases.MAX_TRIES:
        lost = after((state, actions), Unanswered(Command.KEEP), LinkBack(True))
        state, actions = after(lost, Answered(JobSeen("ready")))
        sent += actions.count(Command.KEEP)
    assert (sent, actions) == (phases.MAX_TRIES, [Command.ABORT])
    assert state.error == "QEMU did not keep in 20 tries, and gave no answer to any"


def test_a_refused_abort_is_told_and_asked_about_at_each_tick() -> None:
    start = after(ONE, *CREATED, Decided(Choice.ABORT, "caller"))
    state, actions = after(start, Refused(Command.ABORT, "disabled", final=True))
    assert (state.order.refusal, actions) == ("disabled", [])
    assert state.trail == (state.error,) == ("QEMU refused to abort: disabled",)
    assert phases.step(state, News.TICK)[1] == [Duty.ASK]
    again = after((state, []), Answered(JobSeen("running")))
    assert again[1] == [Command.ABORT]
    refused = Refused(Command.ABORT, "disabled", final=True)
    assert after(again, refused)[0].trail == state.trail, "it is told once"


def test_an_abort_that_never_got_a_reply_is_told_of_once() -> None:
    state, actions = after(ONE, *CREATED, Decided(Choice.ABORT, "caller"))
    for _ in range(phases.MAX_TRIES + 2):
        lost = after((state, actions), Unanswered(Command.ABORT), LinkBack(True))
        state, actions = after(lost, Answered(JobSeen("running")))
    assert actions == []
    assert state.trail == ("QEMU did not abort in 20 tries, and gave no answer to any",)


def test_an_abort_is_repeated_only_while_nothing_tells_that_it_was_taken() -> None:
    running = Answered(JobSeen("running"))
    start = after(ONE, *CREATED, Decided(Choice.ABORT, "caller"))
    assert after(start, running)[1] == []
    assert after(start, Accepted(Command.ABORT), running)[1] == []
    lost = after(start, Unanswered(Command.ABORT), LinkBack(True))
    for status in ("created", "running", "paused"):
        assert after(lost, Answered(JobSeen(status)))[1] == [Command.ABORT]


def test_a_paused_job_whose_decision_was_lost_gets_it_again_once_it_is_resumed() -> None:
    lost = after(decided(Choice.PIVOT), Unanswered(Command.PIVOT), LinkBack(True))
    resumed = after(lost, Answered(JobSeen("standby")))
    assert (resumed[0].order.refusal, resumed[1]) == ("the job is paused", [Command.RESUME])
    assert after(resumed, StatusChanged("ready"))[1] == [Command.PIVOT]
    refused = after(decided(Choice.PIVOT), Refused(Command.PIVOT, "it is paused"))
    assert after(refused, Answered(JobSeen("standby")))[0].order.refusal == "it is paused"


def test_a_paused_job_that_took_its_decision_does_not_get_it_again() -> None:
    resumed = after(taken(Choice.PIVOT), Answered(JobSeen("standby")))
    assert (resumed[0].order.refusal, resumed[1]) == (None, [Command.RESUME])
    assert after(resumed, StatusChanged("ready"))[1] == []


# -- held in PENDING ------------------------------------------------------------------------------


def test_what_has_to_be_done_is_done_once_and_then_the_job_is_finalized() -> None:
    first = after(taken(Choice.PIVOT, PREPARES), PENDING)
    assert first[1] == [Duty.PREPARE]
    assert after(first, PENDING)[1] == []
    done = after(first, Prepared())
    assert (done[0].barrier.prepared, done[1]) == (True, [Command.FINALIZE])
    assert after(done, PENDING)[1] == [Command.FINALIZE]
    assert after(done, Prepared())[1] == []


def test_pending_before_the_reply_to_the_decision() -> None:
    early = after(decided(Choice.PIVOT, PREPARES), PENDING)
    assert early[1] == []
    assert after(early, Accepted(Command.PIVOT))[1] == [Duty.PREPARE]
    assert after(decided(Choice.PIVOT), PENDING, Accepted(Command.PIVOT))[1] == []


def test_a_job_that_finalizes_itself_is_not_finalized() -> None:
    assert after(taken(Choice.PIVOT), PENDING)[1] == []
    assert after(taken(Choice.PIVOT), Answered(JobSeen("waiting")), PENDING)[1] == []


def test_a_keep_has_nothing_to_prepare_unless_others_are_waited_for() -> None:
    assert after(taken(Choice.KEEP, PREPARES), PENDING)[1] == [Command.FINALIZE]
    assert after(taken(Choice.KEEP, MEETS), PENDING)[1] == [Duty.PREPARE]


def test_a_pivot_with_nothing_to_prepare_is_finalized() -> None:
    ready = after(phases.adopt(two_phase=True), Answered(JobSeen("ready", auto_finalize=False)))
    pivoted = after(ready, Decided(Choice.PIVOT, "caller"), Accepted(Command.PIVOT))
    assert after(pivoted, PENDING)[1] == [Command.FINALIZE]


def test_what_can_not_be_prepared_aborts_the_commit() -> None:
    state, actions = after(taken(Choice.PIVOT, PREPARES), PENDING, Prepared("a bitmap is busy"))
    assert actions == [Command.ABORT]
    assert (state.error, state.order.by) == ("a bitmap is busy", "qmpcommit")


def test_an_abort_overtakes_what_is_being_prepared() -> None:
    held = after(taken(Choice.PIVOT, PREPARES), PENDING)
    aborted = after(held, Decided(Choice.ABORT, "caller"))
    assert aborted[1] == [Command.ABORT]
    assert after(aborted, Prepared())[1] == []
    taken_ = after(aborted, Accepted(Command.ABORT))
    assert taken_[1] == [Duty.ASK]
    assert after(taken_, HELD)[1] == [Command.ABORT]


def test_an_abort_that_was_refused_is_sent_again_to_a_held_job() -> None:
    held = after(taken(Choice.PIVOT, PREPARES), PENDING, Decided(Choice.ABORT, "caller"))
    refused = after(held, Refused(Command.ABORT, "not now"))
    assert after(refused, PENDING)[1] == [Command.ABORT]


def test_an_adopted_job_that_is_pending_is_finalized_or_undone() -> None:
    assert after(phases.adopt(two_phase=True), HELD)[1] == [Command.FINALIZE]
    state, actions = after(phases.adopt(two_phase=True, undoes=True), HELD)
    assert (actions, state.order.by) == ([Command.ABORT], "caller")


def test_an_adopted_job_that_can_be_held_is_prepared_before_it_is_finalized() -> None:
    state, actions = after(phases.adopt(two_phase=True, prepares=True), HELD)
    assert actions == [Duty.PREPARE]
    assert after((state, actions), Prepared())[1] == [Command.FINALIZE]
    start = phases.adopt(two_phase=True, prepares=True, undoes=True)
    assert after(start, HELD)[1] == [Command.ABORT]
    by_itself = Answered(JobSeen("pending", auto_finalize=True))
    assert after(phases.adopt(two_phase=True, prepares=True), by_itself)[1] == []


def test_an_adopted_job_that_others_dismiss_is_left_concluded() -> None:
    concluded = Answered(JobSeen("concluded", 1, 1))
    for spares, last in ((True, Duty.FINISH), (False, Command.DISMISS)):
        start = phases.adopt(two_phase=True, spares=spares)
        state, actions = after(start, concluded, GraphRead(Where.BASE))
        assert (state.verdict, actions) == (Verdict.PIVOTED, [last])


def test_a_job_adopted_to_be_undone_is_still_ours_to_decide_at_ready() -> None:
    ready = Answered(JobSeen("ready", auto_finalize=False))
    start = after(phases.adopt(two_phase=True, undoes=True), ready)
    pivoted = after(start, Decided(Choice.PIVOT, "caller"), Accepted(Command.PIVOT))
    assert after(pivoted, PENDING)[1] == [Command.FINALIZE]


def test_a_lost_monitor_while_preparing_has_it_prepared_again() -> None:
    lost = after(taken(Choice.PIVOT, PREPARES), PENDING, News.LINK_LOST, LinkBack(True))
    assert after(lost, HELD)[1] == [Duty.PREPARE]


def test_a_lost_monitor_while_a_decision_is_in_flight() -> None:
    lost = after(decided(Choice.PIVOT), News.LINK_LOST)
    assert lost[1] == [Duty.RELINK]
    assert after(lost, News.LINK_LOST)[1] == []
    assert after(lost, LinkBack(True), Answered(JobSeen("ready")))[1] == [Command.PIVOT]


def test_a_link_that_is_lost_is_made_again_until_it_is_back() -> None:
    state, _ = after(ONE, *CREATED, News.LINK_LOST)
    assert phases.step(state, News.TICK) == (state, [Duty.RELINK])
    back, actions = phases.step(state, LinkBack(True))
    assert (back.link.linked, actions) == (True, [Duty.ASK])
    assert phases.step(back, LinkBack(True)) == (back, [])


# -- a job that waits on storage errors -----------------------------------------------------------


@pytest.mark.parametrize("status", ["paused", "standby"])
def test_a_halted_job_is_asked_why_if_errors_halt_it(status: str) -> None:
    halted = StatusChanged(status)
    assert Duty.ASK in after(STALLS, *CREATED, halted)[1]
    assert Duty.ASK not in after(ONE, *CREATED, halted)[1]
    full = Answered(JobSeen(status, io_status="nospace"))
    stalled = after(STALLS, *CREATED, full)
    assert (stalled[0].stall.stalled, stalled[1]) == (True, [Duty.STALL])
    assert after(stalled, full)[1] == []
    assert Duty.ASK not in after(stalled, halted)[1]
    assert after(ONE, *CREATED, full)[1] != [Duty.STALL]
    for well in ("ok", ""):
        assert Duty.STALL not in after(STALLS, *CREATED, Answered(JobSeen(status)))[1]
        fine = Answered(JobSeen(status, io_status=well))
        assert Duty.STALL not in after(STALLS, *CREATED, fine)[1]


@pytest.mark.parametrize("status", ["running", "ready"])
def test_a_job_that_moves_again_does_not_stall(status: str) -> None:
    full = Answered(JobSeen("paused", io_status="nospace"))
    state, actions = after(STALLS, *CREATED, full, StatusChanged(status))
    assert not state.stall.stalled
    assert Duty.ASK not in actions


def test_a_stalled_job_is_resumed_when_there_is_room_again() -> None:
    full = Answered(JobSeen("paused", io_status="nospace"))
    stalled = after(STALLS, *CREATED, full)
    relieved = after(stalled, News.RELIEVED)
    assert (relieved[0].stall.stalled, relieved[1]) == (False, [Command.RESUME])
    assert after(relieved, News.RELIEVED)[1] == []
    assert after(relieved, Accepted(Command.RESUME))[0].trail == ()
    ended = after(stalled, concluded("No space left on device"))
    assert after(ended, News.RELIEVED)[1] == []


# -- recycling ------------------------------------------------------------------------------------


def test_a_recycle_freezes_the_guest_before_the_pivot() -> None:
    freezing = decided(Choice.RECYCLE)
    assert (freezing[0].phase, freezing[0].guest.frozen, freezing[1]) == (
        Phase.DECIDED,
        True,
        [Duty.FREEZE],
    )
    assert after(freezing, Answered(JobSeen("ready")))[1] == []
    assert after(freezing, Frozen())[1] == [Command.PIVOT]


def test_a_guest_that_can_not_be_frozen_aborts_the_recycle() -> None:
    state, actions = after(decided(Choice.RECYCLE), Frozen("the guest does not stop"))
    assert actions == [Command.ABORT]
    assert (state.error, state.order.by) == ("the guest does not stop", "qmpcommit")


def test_a_frozen_guest_is_nothing_to_any_other_decision() -> None:
    assert after(decided(Choice.PIVOT), Frozen())[1] == []
    assert after(decided(Choice.RECYCLE), Decided(Choice.ABORT, "caller"), Frozen())[1] == []


def test_an_abort_over_a_freeze_without_a_link_is_sent_when_the_link_is_back() -> None:
    ready = after(ONE, *CREATED, BecameReady(), News.LINK_LOST, Decided(Choice.RECYCLE, "policy"))
    assert ready[1] == [Duty.FREEZE]
    aborted = after(ready, Decided(Choice.ABORT, "deadline"), Frozen("the monitor was lost"))
    seen = Answered(JobSeen("standby", 10, 10))
    assert after(aborted, LinkBack(True), seen)[1] == [Command.ABORT]


def recycled() -> Step:
    pivoted = after(decided(Choice.RECYCLE), Frozen(), Accepted(Command.PIVOT), Ended(False))
    return after(pivoted, concluded(), GraphRead(Where.BASE))


def test_a_fresh_overlay_is_laid_then_the_guest_goes_on_then_the_job_is_dismissed() -> None:
    assert recycled()[1] == [Duty.OVERLAY]
    laid = after(recycled(), Overlaid())
    assert (laid[0].verdict, laid[0].error, laid[1]) == (Verdict.RECYCLED, None, [Duty.THAW])
    assert after(laid, Overlaid())[1] == []
    thawed = after(laid, News.THAWED)
    assert (thawed[0].guest.frozen, thawed[1]) == (False, [Command.DISMISS])


def test_an_overlay_that_can_not_be_laid_is_a_pivot_with_an_error() -> None:
    state, actions = after(recycled(), Overlaid("no room"))
    assert (state.verdict, state.error, actions) == (Verdict.PIVOTED, "no room", [Duty.THAW])


def test_an_overlay_comes_only_after_the_pivot_was_confirmed() -> None:
    state, actions = after(decided(Choice.RECYCLE), Overlaid())
    assert (state.guest.overlaid, actions) == (False, [])
    state, actions = after(decided(Choice.RECYCLE), News.THAWED)
    assert (state.phase, state.guest.frozen, actions) == (Phase.DECIDED, False, [])


# -- the end --------------------------------------------------------------------------------------


def test_a_dismissed_job_is_not_dismissed_again() -> None:
    vanished = after(taken(Choice.PIVOT), Answered(None), GraphRead(Where.BASE))
    assert vanished[1] == [Duty.FINISH]
    confirmed = after(taken(Choice.PIVOT), concluded(), GraphRead(Where.BASE))
    assert confirmed[1] == [Command.DISMISS]
    assert after(confirmed, Answered(JobSeen("null")))[1] == []


def test_who_dismissed_it_is_said_only_where_somebody_did() -> None:
    ended = (Ended(False, None, 10, 10), concluded())
    for start, where, verdict in (
        (taken(Choice.PIVOT), Where.BASE, Verdict.PIVOTED),
        (after(LAYER, *CREATED), Where.MERGED, Verdict.MERGED),
    ):
        state, _ = after(start, Answered(None), GraphRead(where))
        assert state.verdict is verdict
        assert "another client" in state.trail[0]
        state, _ = after(start, *ended, GraphRead(where))
        assert (state.verdict, state.trail) == (verdict, ())


def test_a_layer_whose_end_is_unknown_has_vanished() -> None:
    gone = after(LAYER, *CREATED, Answered(None))
    for where in (Where.TOP, Where.OTHER, Where.UNUSED):
        assert after(gone, GraphRead(where))[0].verdict is Verdict.VANISHED


@pytest.mark.parametrize("where", [Where.MERGED, Where.OTHER, Where.UNUSED])
def test_a_layer_is_merged_as_qemu_says_whatever_others_did_to_its_base(where: Where) -> None:
    ended = after(LAYER, *CREATED, Ended(False, None, 10, 10), concluded(), GraphRead(where))
    assert (ended[0].verdict, ended[0].trail) == (Verdict.MERGED, ())


def test_a_disk_that_nobody_uses_says_why_its_pivot_is_believed() -> None:
    state, _ = after(taken(Choice.PIVOT), concluded(), GraphRead(Where.UNUSED))
    assert "no device" in state.trail[0]
    ready = after(ONE, *CREATED, BecameReady())
    state, _ = after(ready, concluded(), GraphRead(Where.UNUSED))
    assert state.verdict is Verdict.UNCLEAR
    assert "can't be seen" in str(state.error)


def test_a_short_keep_says_how_short() -> None:
    state, _ = after(taken(Choice.KEEP), concluded(done=9), GraphRead(Where.TOP))
    assert "9 of 10" in str(state.error)


def test_the_end_is_told_by_its_event_and_by_the_job() -> None:
    event, asked = Ended(False, None, 0, 0), concluded("Input/output error", done=4)
    end = after(taken(Choice.KEEP), event, asked)[0].end
    assert end == Ended(False, "Input/output error", 4, 10)
    end = after(taken(Choice.KEEP), asked)[0].end
    assert end == Ended(False, "Input/output error", 4, 10)
    first = Ended(False, "the first error", 1, 2)
    assert after(taken(Choice.KEEP), first, asked)[0].end == first._replace(done=4, total=10)
    cancelled = concluded("Operation canceled", done=4)
    assert after(taken(Choice.KEEP), Ended(True), cancelled)[0].end == Ended(True, None, 4, 10)
    # As QEMU 5.2 tells of a keep that fails.
    assert after(taken(Choice.KEEP), Ended(True), asked)[0].end == end
    well = after(taken(Choice.KEEP), Ended(False), concluded())[0].end
    assert well == Ended(False, None, 10, 10)


def test_an_error_after_an_abort_that_was_taken_is_its_cancellation() -> None:
    error = concluded("the job was stopped")
    start = after(ONE, *CREATED, Decided(Choice.ABORT, "caller"))
    assert after(start, Accepted(Command.ABORT), error)[0].end == Ended(True, None, 10, 10)
    for other in (start, taken(Choice.PIVOT)):
        assert after(other, error)[0].end == Ended(False, "the job was stopped", 10, 10)


def test_a_monitor_that_dies_after_the_end_leaves_the_verdict() -> None:
    confirmed = after(taken(Choice.PIVOT), concluded(), GraphRead(Where.BASE), News.LINK_LOST)
    assert after(confirmed, LinkDead(True))[0].verdict is Verdict.PIVOTED
    frozen = after(recycled(), News.LINK_LOST, LinkDead(True))
    assert frozen[0].verdict is Verdict.VM_GONE


# -- another process goes on ----------------------------------------------------------------------


def test_whoever_takes_over_believes_nothing_that_was_under_way() -> None:
    state = State(
        two_phase=True,
        phase=Phase.COPYING,
        link=Link(linked=False, other_vm=True),
        order=Order(in_flight=True, resumed=True),
        barrier=Preparation(preparing=True),
        stall=Halt(stalled=True),
    )
    resumed, actions = phases.resume(state, same_vm=True)
    assert actions == [Duty.ASK]
    assert resumed == State(two_phase=True, phase=Phase.COPYING, taken_up=True)
    assert phases.resume(state, same_vm=None)[0] == resumed


def test_a_job_that_was_never_seen_may_have_begun_and_ended() -> None:
    start = phases.resume(ONE[0], same_vm=True)
    gone = after(start, Answered(None))
    assert gone[1] == [Duty.READ_GRAPH]
    assert after(gone, GraphRead(Where.TOP))[0].verdict is Verdict.NEVER_BEGAN
    assert after(gone, GraphRead(Where.OTHER))[0].verdict is Verdict.NEVER_BEGAN
    assert after(gone, GraphRead(Where.BASE))[0].verdict is Verdict.PIVOTED
    layer = after(phases.resume(LAYER[0], same_vm=True), Answered(None))
    assert after(layer, GraphRead(Where.MERGED))[0].verdict is Verdict.MERGED
    ended = after(start, Ended(False, None, 10, 10), Answered(None), GraphRead(Where.TOP))
    assert ended[0].verdict is Verdict.KEPT


def test_a_finished_commit_is_finished() -> None:
    state, _ = after(ONE, Refused(Command.START, "no"))
    assert phases.resume(state, same_vm=True)[1] == [Duty.FINISH]


def test_what_was_left_to_do_after_the_end_is_done() -> None:
    state, _ = after(taken(Choice.PIVOT), concluded(), GraphRead(Where.BASE))
    assert phases.resume(state, same_vm=True)[1] == [Command.DISMISS]
    state, _ = after(recycled(), Overlaid())
    assert phases.resume(state, same_vm=None)[1] == [Duty.THAW]


def test_another_qemu_has_no_job_of_ours_and_no_guest_to_thaw() -> None:
    confirmed, _ = after(recycled(), Overlaid())
    state, actions = phases.resume(confirmed._replace(trail=("first",)), same_vm=False)
    assert (state.verdict, state.guest.frozen, actions) == (Verdict.RECYCLED, False, [Duty.FINISH])
    assert state.trail[0] == "first"
    assert "before what follows" in state.trail[1]
    frozen = decided(Choice.RECYCLE)[0]
    state, actions = phases.resume(frozen, same_vm=False)
    assert (state.verdict, state.guest.frozen, actions) == (Verdict.VM_GONE, False, [Duty.FINISH])


def test_a_freeze_that_was_noted_is_done_again_unless_the_pivot_was_sent() -> None:
    freezing = decided(Choice.RECYCLE)[0]
    state, actions = phases.resume(freezing, same_vm=True)
    assert (state.order.in_flight, actions) == (True, [Duty.FREEZE])
    assert after((state, []), Answered(JobSeen("ready")))[1] == []
    sent = after(decided(Choice.RECYCLE), Frozen())[0]
    assert phases.resume(sent, same_vm=True)[1] == [Duty.ASK]
    thawed = freezing._replace(guest=freezing.guest._replace(frozen=False))
    assert phases.resume(thawed, same_vm=True)[1] == [Duty.ASK]
    assert phases.resume(taken(Choice.PIVOT)[0], same_vm=True)[1] == [Duty.ASK]


def test_whoever_takes_over_while_the_monitor_is_away_waits_until_the_same_qemu_answers() -> None:
    ready, _ = after(ONE, *CREATED, BecameReady())
    freezing, _ = decided(Choice.RECYCLE)
    thawing, _ = after(recycled(), Overlaid())
    due: list[tuple[State, Action]] = [
        (ONE[0], Duty.ASK),
        (ready, Duty.ASK),
        (freezing, Duty.FREEZE),
        (thawing, Duty.ASK),
    ]
    for state, action in due:
        away = phases.resume(state, same_vm=None, linked=False)
        assert away[1] == [Duty.RELINK]
        for same in (True, None):
            back, actions = after(away, LinkBack(same))
            assert actions == [action]
            assert (back.link.linked, back.order.in_flight) == (True, action is Duty.FREEZE)
        other, actions = after(away, LinkBack(False))
        assert (other.verdict, actions) == (Verdict.VM_GONE, [Duty.FINISH])
        gone, actions = after(away, LinkDead(False))
        assert (gone.verdict, actions) == (Verdict.MONITOR_LOST, [Duty.FINISH])
    assert after(
        phases.resume(thawing, same_vm=True, linked=False), LinkBack(True), Answered(None)
    )[1] == [Duty.THAW]
    away = phases.resume(ready, same_vm=True, linked=False)
    assert after(away, LinkBack(True), Answered(JobSeen("ready")))[1] == [Duty.CONSULT]


def test_an_adopted_job_is_asked_for_when_the_monitor_is_back() -> None:
    away = phases.adopt(two_phase=True, undoes=True, linked=False)
    assert away[1] == [Duty.RELINK]
    assert after(away, LinkBack(True)) == phases.adopt(two_phase=True, undoes=True)
    assert after(away, LinkBack(False))[0].verdict is Verdict.VM_GONE


def test_a_freeze_is_done_once_by_whoever_has_begun_it() -> None:
    frozen = after(decided(Choice.RECYCLE), News.LINK_LOST, Frozen())
    assert after(frozen, LinkBack(True))[1] == [Duty.ASK]
    assert not phases.freezes_again(frozen[0])


def test_another_qemu_is_never_asked_nor_has_a_guest_to_thaw() -> None:
    for state, verdict in (
        (after(taken(Choice.PIVOT), concluded()), Verdict.VM_GONE),
        (after(recycled(), Overlaid()), Verdict.VM_GONE),
        (after(taken(Choice.PIVOT), concluded(), GraphRead(Where.BASE)), Verdict.PIVOTED),
    ):
        other, actions = after(state, News.LINK_LOST, LinkBack(False))
        assert (other.verdict, other.link.other_vm, actions) == (verdict, True, [Duty.FINISH])


def test_whoever_takes_over_at_ready_asks_the_policy_again() -> None:
    ready, _ = after(ONE, *CREATED, BecameReady())
    start = phases.resume(ready, same_vm=True)
    assert (start[0].phase, start[1]) == (Phase.COPYING, [Duty.ASK])
    assert after(start, Answered(JobSeen("ready")))[1] == [Duty.CONSULT]
    pivot = phases.resume(decided(Choice.PIVOT)[0], same_vm=True)
    assert pivot[0].phase is Phase.DECIDED
    actions: list[Action] = after(pivot, Answered(JobSeen("ready")))[1]
    assert actions == [Command.PIVOT]


# -- a stale plan ---------------------------------------------------------------------------------

NEW = phases.begin(two_phase=True)
BELOW = phases.begin(two_phase=False)
SENT = after(NEW, Looked())


def test_the_disk_is_looked_at_before_anything_is_sent() -> None:
    assert NEW[1] == [Duty.LOOK]
    assert SENT[1] == [Command.START]
    assert after(SENT, Looked())[1] == [], "it is sent once"
    state, actions = after(NEW, Looked("it was changed"))
    assert (state.verdict, state.error, actions) == (
        Verdict.CHANGED,
        "it was changed",
        [Duty.FINISH],
    )


@pytest.mark.parametrize("fact", [News.TICK, LinkBack(True)])
def test_a_look_that_failed_is_made_again(fact: Fact) -> None:
    start = NEW if fact is News.TICK else after(NEW, News.LINK_LOST)
    assert after(start, fact)[1] == [Duty.LOOK]


@pytest.mark.parametrize("status", ["ready", "standby", "pending"])
@pytest.mark.parametrize("asked", [False, True])
def test_a_job_is_not_decided_before_it_was_checked(status: str, asked: bool) -> None:
    """Neither is it READY for anybody, nor is one that is held finalized."""
    start = SENT if status != "pending" else after(BELOW, Looked())
    start = start[0]._replace(auto_finalize=status != "pending"), start[1]
    fact = Answered(JobSeen(status, auto_finalize=status != "pending")) if asked else (
        StatusChanged(status)
    )  # fmt: skip
    state, actions = after(start, Accepted(Command.START), fact)
    assert (state.phase, actions) == (Phase.COPYING, [Duty.CHECK] if asked else [])
    assert phases.objection(state, Choice.PIVOT) == "not ready"
    used = after((state, []), Checked(Use.USED))[1]
    assert used == [Command.FINALIZE if status == "pending" else Duty.CONSULT]
    assert after((state, []), Checked(Use.UNKNOWN))[1] == []
    state, actions = after((state, []), Checked(Use.STALE, "it uses the base"))
    assert (state.stale, state.error, actions) == (True, "it uses the base", [Command.ABORT])


def test_the_check_is_owed_until_it_is_made() -> None:
    began = after(SENT, Accepted(Command.START))
    assert began[1] == [Duty.CHECK]
    lost = after(began, News.LINK_LOST, LinkBack(True), Answered(JobSeen("running")))
    assert lost[1] == [Duty.CHECK]
    resumed = phases.resume(began[0], same_vm=True)
    assert after(resumed, Answered(JobSeen("running")))[1] == [Duty.CHECK]
    checked = after(lost, Checked(Use.USED))
    assert after(checked, Answered(JobSeen("running")))[1] == []
    assert after(checked, Checked(Use.STALE, "late"))[0].stale is False
    ready = after(began, BecameReady(7, 9), Checked(Use.USED))
    assert (ready[0].phase, ready[0].total, ready[1]) == (Phase.READY, 9, [Duty.CONSULT])
    aborted = after(began, Decided(Choice.ABORT, "caller"))
    assert after(aborted, Checked(Use.USED))[1] == []


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("where", Where)
def test_a_stale_job_ends_as_one_however_it_ends(cancelled: bool, where: Where) -> None:
    stale = after(SENT, Accepted(Command.START), Checked(Use.STALE, "it uses the base"))
    ended = after(stale, Ended(cancelled, None, 10, 10), Answered(None), GraphRead(where))
    assert (ended[0].verdict, ended[0].error) == (Verdict.STALE, "it uses the base")


@pytest.mark.parametrize("start", [NEW, BELOW])
@pytest.mark.parametrize("where", [Where.BASE, Where.TOP, Where.MERGED])
def test_an_end_before_the_check_is_not_called_a_success(start: Step, where: Where) -> None:
    began = after(start, Looked(), Accepted(Command.START))
    state, _ = after(began, Ended(False, None, 10, 10), Answered(None), GraphRead(where))
    assert state.verdict in (Verdict.UNCLEAR, Verdict.FAILED)


@pytest.mark.parametrize("status", ["running", "ready", "standby", "pending"])
def test_an_adopted_job_that_is_stale_is_cancelled(status: str) -> None:
    start = phases.adopt(two_phase=True, stale="it uses the base")
    state, actions = after(start, Answered(JobSeen(status, auto_finalize=False)))
    assert (state.order.by, actions) == ("qmpcommit", [Command.ABORT])


@pytest.mark.parametrize("choice", list(Choice))
def test_a_pivot_is_not_sent_into_a_migration(choice: Choice) -> None:
    start = after(decided(choice), *([Frozen()] if choice is Choice.RECYCLE else []))
    state, actions = after(start, Looked("it is being migrated"))
    if choice in phases.PIVOTS:
        assert (state.order.decision, actions) == (Choice.ABORT, [Command.ABORT])
        assert (state.order.former, state.error) == (None, "it is being migrated")
    else:
        assert (state, actions) == (start[0], [])
    assert after(start, Looked()) == (start[0], [])


@pytest.mark.parametrize("status", ["created", "running", "paused", "ready", "standby", "pending"])
@pytest.mark.parametrize("choice", [None, Choice.PIVOT, Choice.KEEP, Choice.RECYCLE])
def test_a_member_whose_group_is_undone_is_cancelled_wherever_it_is(
    status: str, choice: Choice | None
) -> None:
    """And what it was to be is known still, where QEMU may have done that by now."""
    start = after(MEETS, *CREATED) if choice is None else decided(choice, MEETS)
    if choice is Choice.RECYCLE:
        start = after(start, Frozen())
    noted = start[0]
    step = phases.resume(noted, same_vm=True, undoes=True)
    assert step[1] == [Duty.ASK]
    assert (step[0].ordered, step[0].order.decision) == (choice, Choice.ABORT)
    state, actions = after(step, Answered(JobSeen(status, auto_finalize=False)))
    assert actions == [Command.ABORT]
    assert (state.order.former, state.order.by) == (choice, "group")
    ended = after(step, Answered(None), GraphRead(Where.BASE))[0]
    assert ended.verdict is Verdict.PIVOTED


def test_a_member_that_was_cancelled_before_is_not_undone_once_more() -> None:
    noted = taken(Choice.ABORT, MEETS)[0]
    plain = phases.resume(noted, same_vm=True)
    assert phases.resume(noted, same_vm=True, undoes=True) == plain
    finished = noted._replace(phase=Phase.FINISHED, verdict=Verdict.PIVOTED)
    assert phases.resume(finished, same_vm=True, undoes=True)[1] == [Duty.FINISH]


@pytest.mark.parametrize("choice", [Choice.PIVOT, Choice.KEEP])
def test_a_member_whose_group_is_finalized_meets_nobody_any_more(choice: Choice) -> None:
    noted = decided(choice, MEETS)[0]
    held = Answered(JobSeen("pending", auto_finalize=False))
    assert after(phases.resume(noted, same_vm=True), held)[1] == [Duty.PREPARE]
    step = phases.resume(noted, same_vm=True, finalizes=True)
    assert after(step, held)[1] == [Command.FINALIZE]


def test_a_job_that_a_former_process_may_have_begun_is_not_begun_again_unseen() -> None:
    """Its disk may have pivoted, and nothing use it any more: what it was would be committed."""
    noted = phases.begin(two_phase=True)[0]._replace(unsent=False)
    gone = after(phases.resume(noted, same_vm=True), Answered(None))
    assert after(gone, GraphRead(Where.UNUSED))[0].verdict is Verdict.UNCLEAR
    assert after(gone, GraphRead(Where.TOP))[0].verdict is Verdict.NEVER_BEGAN
