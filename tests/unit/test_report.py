"""What a caller is told of each end of a commit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.cli.show import outcome_text
from qmpcommit.commit import report
from qmpcommit.commit.checks import Finding
from qmpcommit.commit.facts import Choice, Ended
from qmpcommit.commit.outcome import Timings
from qmpcommit.commit.phases import Order, State, Verdict
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.recycle import Left
from tests.unit.scenes import known
from tests.unit.test_checks import made

_, WHOLE = made()
_, LOWER = made(top="mid")
UNKNOWN = qc.Image(node_name="", filename="(unknown)", driver="")
ENDED_BEFORE = replace(WHOLE, disk=qc.Disk(name="?"), top=UNKNOWN, base=UNKNOWN, between=())
STILL = "/i/top is still the active image and whole"
DONE = Ended(cancelled=False)


def told(plan: Plan = WHOLE, lost: qc.QmpCommitError | None = None, **facts: Any) -> Any:
    state = known(two_phase=plan.two_phase, **facts)
    return report.error_of(plan, state, 7.5, lost, None)


@pytest.mark.parametrize(
    ("verdict", "error", "kind", "words"),
    [
        (Verdict.REFUSED, "Job ID 'j' already in use", qc.JobConflict, "Nothing was changed"),
        (Verdict.REFUSED, "no", qc.CommitFailed, "refused to start"),
        (Verdict.NEVER_BEGAN, None, qc.CommitFailed, "QEMU knows no such job: nothing was"),
        (Verdict.FAILED, "Input/output error", qc.CommitFailed, f"Input/output error. {STILL}"),
        (Verdict.UNCLEAR, "neither", qc.CommitFailed, "qemu-img compare /i/top /i/base"),
        (Verdict.VANISHED, None, qc.CommitFailed, "the base can't be called complete"),
        (Verdict.MONITOR_LOST, None, qc.MonitorLost, "the monitor was lost"),
        (Verdict.PIVOTED, "no room", qc.CommitFailed, "The guest writes to /i/base now"),
        (Verdict.CANCELLED, "it broke", qc.CommitFailed, f"failed: it broke. {STILL}"),
    ],
)
def test_an_end_that_is_no_outcome_is_an_error_with_its_facts(
    verdict: Verdict, error: str | None, kind: type[qc.QmpCommitError], words: str
) -> None:
    raised = told(verdict=verdict, error=error)
    assert type(raised) is kind
    assert words in str(raised)
    assert (raised.vm, raised.disk, raised.job_id) == ("v", WHOLE.disk.name, WHOLE.job_id)


@pytest.mark.parametrize("choice", [Choice.PIVOT, Choice.RECYCLE])
def test_a_pivot_that_was_not_all_never_calls_the_overlay_whole(choice: Choice) -> None:
    text = str(told(verdict=Verdict.PIVOTED, error="e", former=choice, decision=Choice.ABORT))
    assert "The guest writes to /i/base now; /i/top is stale" in text
    assert ("no fresh overlay" in text) is (choice is Choice.RECYCLE)
    assert STILL not in text


@pytest.mark.parametrize("verdict", [Verdict.PIVOTED, Verdict.KEPT, Verdict.CANCELLED])
def test_an_end_as_asked_is_no_error(verdict: Verdict) -> None:
    assert told(verdict=verdict) is None


@pytest.mark.parametrize("frozen", [True, False])
def test_a_lost_monitor_tells_of_a_guest_that_may_be_paused(frozen: bool) -> None:
    text = str(told(lost=qc.MonitorLost("cut"), verdict=Verdict.MONITOR_LOST, frozen=frozen))
    assert ": cut. The job" in text
    assert ("let it go on with 'cont'" in text) is frozen


def test_a_failed_layer_below_leaves_the_chain_and_an_unknown_one_sends_to_look() -> None:
    assert "is as it was and whole" in str(told(LOWER, verdict=Verdict.FAILED, error="e"))


def test_of_a_job_that_is_not_known_nothing_is_said_of_its_base() -> None:
    for verdict in (Verdict.MONITOR_LOST, Verdict.FAILED):
        assert "valid only under (unknown)" not in str(told(ENDED_BEFORE, verdict=verdict))


def test_what_was_found_before_is_told_of_a_plan_from_a_journal_too() -> None:
    found = [
        Finding("size", "note", "it grows"),
        Finding("corrupt", "refuse", "it is (override 'corrupt' to commit anyway)"),
        Finding("encrypted", "ok", "nothing"),
    ]
    said = [
        "found before it began, size: it grows",
        "found before it began and overridden, corrupt: it is",
    ]
    for findings in (found, [each.model_dump(mode="json") for each in found]):
        assert report.found_before(replace(WHOLE, findings=findings)) == said


@pytest.mark.parametrize("plan", [WHOLE, LOWER], ids=["active", "lower"])
@pytest.mark.parametrize(
    "verdict",
    [Verdict.FAILED, Verdict.VANISHED, Verdict.CANCELLED, Verdict.VM_GONE, Verdict.MONITOR_LOST],
)
def test_an_end_in_the_first_phase_says_of_the_base_what_an_abort_says(
    verdict: Verdict, plan: Plan
) -> None:
    for error in ("No space left on device", "Input/output error"):
        raised = told(plan, verdict=verdict, error=error)
        assert plan.base.filename in str(raised)
        assert f"valid only under {plan.top.filename}" in str(raised)
    late = report.deadline_error(plan, State(two_phase=plan.two_phase, verdict=verdict), 3)
    assert f"valid only under {plan.top.filename}" in str(late)
    unclear = str(told(verdict=Verdict.UNCLEAR, error="e"))
    assert STILL not in unclear
    assert "(unknown)" not in str(told(ENDED_BEFORE, verdict=Verdict.UNCLEAR, error="e"))
    text = str(told(ENDED_BEFORE, verdict=Verdict.FAILED, error="e"))
    assert f"the commit job {WHOLE.job_id} of v failed: e. Which image the guest writes to" in text
    assert "(unknown)" not in text


TRIED = {"decision": Choice.PIVOT, "tries": 1}
LATE = {"decision": Choice.ABORT, "tries": 1, "accepted": True}


@pytest.mark.parametrize(
    ("facts", "pivoted"),
    [
        ({}, False),
        ({"decision": Choice.KEEP, "tries": 1}, False),
        ({"decision": Choice.PIVOT}, False),
        (TRIED, None),
        ({**TRIED, "prepares": True}, False),
        ({**TRIED, "prepares": True, "prepared": True}, None),
        ({**TRIED, "accepted": True, "end": DONE}, True),
        ({**TRIED, "accepted": True, "end": DONE, "doubt": True}, None),
        ({**TRIED, "end": DONE}, None),
        ({**TRIED, "refusal": "not now", "end": DONE}, None),
        ({"decision": Choice.PIVOT, "end": DONE}, None),
        ({**TRIED, "end": Ended(cancelled=True)}, False),
        ({**TRIED, "end": Ended(cancelled=False, error="e")}, False),
        ({"decision": Choice.KEEP, "accepted": True, "end": DONE}, False),
        ({"end": DONE, "doubt": True}, False),
        ({"end": Ended(cancelled=True)}, False),
        ({"end": Ended(cancelled=False, error="e")}, False),
        ({"end": DONE}, None),
        ({"decision": Choice.KEEP, "end": DONE}, None),
        ({**LATE, "former": Choice.PIVOT}, None),
        ({**LATE, "former": Choice.PIVOT, "end": DONE}, None),
        ({**LATE, "former": Choice.RECYCLE, "end": Ended(cancelled=True)}, False),
        ({**LATE, "former": Choice.PIVOT, "prepares": True}, False),
        ({**LATE, "former": Choice.KEEP}, False),
        (LATE, False),
    ],
)
def test_a_vm_that_is_gone_leaves_word_what_to_boot(
    facts: dict[str, Any], pivoted: bool | None
) -> None:
    gone = told(verdict=Verdict.VM_GONE, **facts)
    assert isinstance(gone, qc.VMGone)
    assert gone.pivoted is pivoted
    words = {
        True: "boot from /i/base; /i/top is stale",
        False: "/i/top is still the image to boot",
        None: "qemu-img compare /i/top /i/base",
    }
    assert words[pivoted] in str(gone)
    ours = Choice.PIVOT in (facts.get("decision"), facts.get("former"))
    assert ("Another client may have pivoted" in str(gone)) is (pivoted is None and not ours)


@pytest.mark.parametrize("plan", [WHOLE, LOWER], ids=["active", "lower"])
@pytest.mark.parametrize("verdict", [Verdict.VM_GONE, Verdict.MONITOR_LOST])
def test_what_was_not_sent_has_written_nothing(verdict: Verdict, plan: Plan) -> None:
    raised = told(plan, verdict=verdict, unsent=True)
    assert "Nothing was sent" in str(raised)
    assert "valid only under" not in str(raised)
    assert getattr(raised, "pivoted", False) is False


def test_a_vm_that_is_gone_and_a_layer_below_or_a_disk_unknown() -> None:
    below = told(LOWER, lost=qc.VMGone("killed"), verdict=Verdict.VM_GONE)
    assert below.pivoted is False
    assert ": killed. The active image /i/top is still the one to boot" in str(below)
    unknown = told(ENDED_BEFORE, verdict=Verdict.VM_GONE)
    assert unknown.pivoted is None
    assert "look before booting" in str(unknown)
    assert "(unknown)" not in str(unknown)


def test_a_deadline_tells_whether_the_job_is_left() -> None:
    ended = told(verdict=Verdict.CANCELLED, by="deadline")
    assert isinstance(ended, qc.DeadlineExceeded)
    assert f"within 7.5 s: the job was cancelled. {STILL}" in str(ended)
    left = report.deadline_error(WHOLE, State(two_phase=True), 7.5)
    assert f"end it with 'qmpcommit abort QMP {WHOLE.job_id}'" in str(left)
    assert told(verdict=Verdict.PIVOTED, by="deadline") is None


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict.PIVOTED, "pivoted. The image to boot is /i/base, and /i/top, /i/mid must never"),
        (Verdict.KEPT, "kept. What was to follow"),
        (Verdict.CANCELLED, "aborted. What was to follow"),
    ],
)
def test_who_leaves_what_has_ended_is_told_how(verdict: Verdict, words: str) -> None:
    state = State(two_phase=True, verdict=verdict)
    outcome = report.outcome_of(WHOLE, state, WHOLE.base, Timings())
    text = str(report.deadline_error(WHOLE, state, 3, outcome))
    assert f"within 3 s: the job had ended before: {words}" in text


def test_a_policy_that_fails_is_the_cause_of_the_abort() -> None:
    cause = ValueError("own")
    state = State(two_phase=True, verdict=Verdict.CANCELLED)
    error = report.error_of(WHOLE, state, None, None, cause)
    assert error is not None
    assert error.__cause__ is cause
    assert f"ValueError('own')), so the job was aborted. {STILL}" in str(error)
    assert report.error_of(WHOLE, state._replace(verdict=Verdict.KEPT), None, None, cause) is None


def test_an_outcome_says_so_where_a_name_is_another_files_here() -> None:
    lost = replace(WHOLE.base, astray="another here", warnings=("another here",))
    state = State(two_phase=True, verdict=Verdict.PIVOTED)
    outcome = report.outcome_of(replace(WHOLE, base=lost), state, WHOLE.base, Timings())
    assert outcome.active is not None
    assert (outcome.active.astray, outcome.active.warnings) == ("another here", ("another here",))


@pytest.mark.parametrize(
    ("plan", "facts", "action", "by", "invalidated", "warnings"),
    [
        (
            WHOLE, {"verdict": Verdict.PIVOTED, "decision": Choice.PIVOT},
            "pivot", "policy", ["/i/top", "/i/mid"], [],
        ),
        (
            WHOLE, {"verdict": Verdict.KEPT, "decision": Choice.PIVOT, "doubt": True},
            "keep", "another client", [],
            ["with keep; this commit had asked for pivot", "/i/mid lies over", "shutting down"],
        ),
        (
            WHOLE, {"verdict": Verdict.CANCELLED}, "abort", "another client", [],
            ["ended the job with abort", "/i/mid, /i/base may hold part of the overlay's data"],
        ),
        (
            WHOLE, {"verdict": Verdict.PIVOTED, **LATE, "former": Choice.PIVOT, "former_by": "me"},
            "pivot", "me", ["/i/top", "/i/mid"],
            ["ended with pivot before it could be aborted (policy)"],
        ),
        (
            WHOLE, {"verdict": Verdict.CANCELLED, **LATE, "former": Choice.PIVOT},
            "abort", "policy", [], ["/i/mid, /i/base may hold part"],
        ),
        (LOWER, {"verdict": Verdict.MERGED, "trail": ("told",)}, "none", "", ["/i/mid"], ["told"]),
    ],
)  # fmt: skip
def test_an_outcome_says_who_decided_and_what_is_invalid(
    plan: Plan,
    facts: dict[str, Any],
    action: str,
    by: str,
    invalidated: list[str],
    warnings: list[str],
) -> None:
    state = known(two_phase=plan.two_phase, by="policy", done=5, **facts)
    outcome = report.outcome_of(plan, state, None, Timings())
    assert (outcome.action, outcome.decided_by) == (action, by)
    assert outcome.status == ("cancelled" if action == "abort" else "completed")
    assert outcome.invalidated == invalidated
    assert outcome.bytes_committed == 5
    assert len(outcome.warnings) == len(warnings)
    assert all(w in told for w, told in zip(warnings, outcome.warnings, strict=True))


@pytest.mark.parametrize("verdict", [Verdict.CANCELLED, Verdict.PIVOTED, Verdict.KEPT])
def test_an_outcome_names_no_image_that_is_not_known(verdict: Verdict) -> None:
    state = State(two_phase=True, verdict=verdict)
    outcome = report.outcome_of(ENDED_BEFORE, state, UNKNOWN, Timings())
    assert (outcome.active, outcome.invalidated) == (None, [])
    assert any("the disk's chain shows" in warning.lower() for warning in outcome.warnings)
    assert "(unknown)" not in outcome_text(outcome)
    assert "the image that 'qmpcommit chain' shows" in outcome_text(outcome)


@pytest.mark.parametrize("laid", [True, False])
def test_a_vm_that_is_gone_leaves_word_of_a_fresh_overlay(laid: bool) -> None:
    state = State(two_phase=True, verdict=Verdict.VM_GONE, order=Order(decision=Choice.RECYCLE))
    left = Left("/i/fresh", laid)
    gone = report.error_of(WHOLE, state, None, None, None, left=left)
    assert isinstance(gone, qc.VMGone)
    assert (gone.pivoted, gone.overlay) == (laid, "/i/fresh")
    assert ("boot from /i/fresh" in str(gone)) is laid
    assert ("/i/top is still the image to boot" in str(gone)) is not laid
    assert ("/i/fresh was never used: delete it" in str(gone)) is not laid
    assert "/i/fresh" not in str(report.error_of(WHOLE, state, None, None, None))
