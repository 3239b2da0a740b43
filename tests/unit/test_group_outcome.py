"""What a group commit came to, where its members' ends alone tell it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.facts import Choice, Ended
from qmpcommit.commit.outcome import Timings
from qmpcommit.commit.phases import Preparation, State, Verdict
from qmpcommit.group.outcome import MemberEnd, error_of

LOST = qc.VMGone("QEMU has ended")


def end(
    disk: str, verdict: Verdict, error: Exception | None = None, *, end: Ended | None = None
) -> MemberEnd:
    plan: Any = SimpleNamespace(vm="web1", disk=SimpleNamespace(name=disk), job_id=f"job-{disk}")
    state = State(two_phase=True, verdict=verdict, end=end, barrier=Preparation(prepared=True))
    return MemberEnd(plan, state, Timings(), None, error or LOST, Choice.PIVOT)


@pytest.mark.parametrize(
    ("said", "done"),
    [
        (Ended(cancelled=False), True),
        (Ended(cancelled=True), False),
        (Ended(cancelled=False, error="Input/output error"), False),
        (None, None),
    ],
)
def test_what_qemu_said_before_it_died_is_believed(said: Ended | None, done: bool | None) -> None:
    lost = end("vdb", Verdict.VM_GONE, end=said)
    assert lost.done() is done
    error = error_of([end("vda", Verdict.PIVOTED), lost], why="", culprit=None, finalized=True)
    if done:
        assert error is LOST
        return
    assert isinstance(error, qc.GroupSplit)
    assert error.pivoted == ["vda of web1"]
    assert error.not_pivoted == (["vdb of web1"] if done is False else [])
    assert error.unknown == (["vdb of web1"] if done is None else [])
    assert "first failure: QEMU has ended" in error.message
