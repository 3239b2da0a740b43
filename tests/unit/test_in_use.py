"""What is told of a plan that does not fit any more, and of a job that began on a stale overlay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmpcommit.block.chain import Image
from qmpcommit.block.graph import JobNodes
from qmpcommit.commit import report
from qmpcommit.commit.facts import BecameReady, Ended, Fact, StatusChanged, Use
from qmpcommit.commit.in_use import changed_since, use_of, user_of
from qmpcommit.commit.phases import State, Verdict, begin, step
from qmpcommit.errors import ChainError, CommitFailed, QmpCommitError, VMGone
from tests.unit.test_checks import made

GRAPH, PLAN = made()


def told(state: State) -> QmpCommitError:
    error = report.error_of(PLAN, state._replace(error="it uses the base"), None, None, None)
    assert error is not None
    return error


def test_a_plan_that_fits_is_sent() -> None:
    assert changed_since(PLAN, GRAPH) is None
    assert use_of(PLAN, GRAPH) == (Use.USED, "")
    gone = replace(PLAN, disk=replace(PLAN.disk, qdev="other", device=""))
    assert isinstance(changed_since(gone, GRAPH), ChainError)


def test_of_a_job_whose_layers_are_not_known_nothing_is_said() -> None:
    assert use_of(replace(PLAN, top=Image("", "", "")), GRAPH) == (Use.UNKNOWN, "")


def test_what_is_no_device_is_not_taken_for_one() -> None:
    assert user_of(PLAN, []) is None
    with pytest.raises(TypeError):
        user_of(PLAN, ["vda"])


def test_a_plan_that_did_not_fit_is_told_also_after_a_restart() -> None:
    error = told(State(two_phase=True, verdict=Verdict.CHANGED))
    assert isinstance(error, ChainError)
    assert "Nothing was sent" in error.message


@pytest.mark.parametrize("end", [None, Ended(True), Ended(False)])
def test_a_stale_job_tells_which_base_may_hold_what(end: Ended | None) -> None:
    error = told(State(two_phase=True, verdict=Verdict.STALE, stale=True, end=end))
    assert isinstance(error, CommitFailed)
    assert f"{PLAN.base.filename} may hold older data of {PLAN.top.filename}" in error.message
    assert ("has ended before" in error.message) is (end == Ended(False))


def test_so_does_one_whose_vm_has_ended() -> None:
    error = told(State(two_phase=True, verdict=Verdict.VM_GONE, stale=True))
    assert isinstance(error, VMGone)
    assert error.pivoted is None, "its overlay would be booted"
    assert "still the image to boot" not in error.message
    assert "must not be booted" in error.message


def test_a_disk_that_nothing_uses_by_now_was_pivoted_away_perhaps() -> None:
    graph = GRAPH._replace(devices=(), exports=(), jobs={PLAN.job_id: JobNodes(PLAN.job_id, {})})
    assert use_of(PLAN, graph)[0] is Use.STALE
    assert use_of(PLAN, graph._replace(jobs={}))[0] is Use.UNKNOWN
    bare = replace(PLAN, disk=replace(PLAN.disk, qdev="", device="", exports=()))
    assert use_of(bare, graph)[0] is Use.USED, "it was only open"


@pytest.mark.parametrize(
    "fact", [StatusChanged("concluded"), BecameReady(1, 1), Ended(False), StatusChanged("paused")]
)
def test_of_a_job_that_is_not_sent_yet_nothing_is_heard(fact: Fact) -> None:
    state, _ = begin(two_phase=True)
    assert step(state, fact) == (state, [])
