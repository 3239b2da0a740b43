"""What is noted of a group, and how it goes on from that: every case, with no process."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from typing import Any

import pytest

from qmpcommit.commit.facts import Choice
from qmpcommit.commit.ledger import add_note, dump_state
from qmpcommit.commit.phases import Order, Phase, Preparation, State, Verdict
from qmpcommit.group.noted import (
    NotedGroup,
    NotedMember,
    Shown,
    Way,
    resume,
    shown_of,
)
from qmpcommit.guest.hold import HeldGuest

STATE = State(two_phase=True, began=True, barrier=Preparation(meets=True))
PIVOT: dict[str, Any] = {"phase": Phase.DECIDED, "order": Order(Choice.PIVOT, "policy")}
STAGES: dict[str, dict[str, Any]] = {
    "not begun": {},
    "starting": {"state": STATE._replace(phase=Phase.STARTING)},
    "copying": {"state": STATE._replace(phase=Phase.COPYING)},
    "ready": {"state": STATE._replace(phase=Phase.READY)},
    "decided": {"state": STATE._replace(**PIVOT), "step": "job-complete"},
    "finalized": {"state": STATE._replace(**PIVOT), "step": "job-finalize"},
    "ended": {"state": STATE._replace(phase=Phase.CONFIRMED, verdict=Verdict.PIVOTED)},
    "aborted": {
        "state": STATE._replace(phase=Phase.DECIDED, order=Order(Choice.ABORT, "group")),
    },
    "unwanted": {
        "state": STATE._replace(phase=Phase.DECIDED, order=Order(Choice.ABORT, "policy")),
    },
}


@cache
def member(stage: str) -> NotedMember:
    """One as its notes have it."""
    noted = dict(STAGES[stage])
    if "state" in noted:
        noted["state"] = json.loads(json.dumps(dump_state(noted["state"])))
    return NotedMember("vm", noted)


def group(*stages: str, finalize: bool = False) -> NotedGroup:
    """A group of members that were so far."""
    return NotedGroup(tuple(map(member, stages)), finalize=finalize)


PAIRS = list(product(STAGES, STAGES))
SHOWN = list(product(Shown, Shown))
UNDECIDED = {"starting", "copying", "ready"}
ABORTED = {"aborted", "unwanted"}
DONE = {"finalized", "ended"}
LOST = {Shown.NOTHING, Shown.FAILED}


def expected(stages: tuple[str, ...], shown: tuple[Shown, ...], *, finalize: bool) -> Way:
    """What is right, said once more in other words."""
    there = set(stages)
    if finalize and not there & ABORTED:
        none_was_finalized = not there & DONE and Shown.ENDED not in shown
        return Way.CANCEL if none_was_finalized and LOST & {*shown} else Way.FINALIZE
    if there == {"not begun"}:
        return Way.BEGIN
    followable = there <= UNDECIDED and {*shown} <= {Shown.RUNS, Shown.AWAY}
    return Way.FOLLOW if followable else Way.CANCEL


@pytest.mark.parametrize("finalize", [False, True])
def test_every_stage_meets_all_that_qemu_may_show(finalize: bool) -> None:
    ways = set()
    for stages, shown in product(PAIRS, SHOWN):
        way = resume(group(*stages, finalize=finalize), shown)
        assert way is expected(stages, shown, finalize=finalize), (stages, shown)
        assert way is resume(group(*stages[::-1], finalize=finalize), shown[::-1])
        ways.add(way)
    assert ways == ({Way.FINALIZE, Way.CANCEL} if finalize else {Way.BEGIN, Way.FOLLOW, Way.CANCEL})


@pytest.mark.parametrize("finalize", [False, True])
def test_what_must_never_be(finalize: bool) -> None:
    """None is finalized that was not to be, and none cancelled where another one was finalized."""
    for stages, shown in product(PAIRS, SHOWN):
        way = resume(group(*stages, finalize=finalize), shown)
        if way is Way.FINALIZE:
            assert finalize
            assert not {*stages} & ABORTED
        if way is Way.CANCEL and finalize and not {*stages} & ABORTED:
            assert not {*stages} & DONE
            assert Shown.ENDED not in shown
        if way is Way.BEGIN and not finalize:
            assert stages == ("not begun", "not begun")
        if way is Way.FOLLOW:
            assert "not begun" not in stages


def test_the_way_does_not_depend_on_how_many_there_are() -> None:
    for stage, seen, finalize in product(STAGES, Shown, (False, True)):
        ways = {resume(group(*[stage] * n, finalize=finalize), [seen] * n) for n in (1, 2, 5)}
        assert len(ways) == 1, (stage, seen, finalize)


@pytest.mark.parametrize(
    ("job", "shown"),
    [
        (None, Shown.NOTHING),
        ({"status": "null"}, Shown.NOTHING),
        ({"status": "created"}, Shown.RUNS),
        ({"status": "running"}, Shown.RUNS),
        ({"status": "paused"}, Shown.RUNS),
        ({"status": "ready"}, Shown.RUNS),
        ({"status": "standby"}, Shown.RUNS),
        ({"status": "waiting"}, Shown.RUNS),
        ({"status": "pending"}, Shown.HELD),
        ({"status": "aborting"}, Shown.FAILED),
        ({"status": "concluded"}, Shown.ENDED),
        ({"status": "concluded", "error": "Operation canceled"}, Shown.FAILED),
    ],
)
def test_what_a_job_shows(job: dict[str, Any] | None, shown: Shown) -> None:
    assert shown_of(job) is shown


@pytest.mark.parametrize(
    ("stages", "finalize", "stage"),
    [
        (("not begun", "not begun"), False, "begun"),
        (("copying", "not begun"), False, "copying"),
        (("ready", "copying"), False, "copying"),
        (("decided", "ready"), False, "decided"),
        (("decided", "decided"), True, "finalizing"),
        (("decided", "aborted"), True, "cancelling"),
        (("unwanted", "ready"), False, "cancelling"),
    ],
)
def test_the_stage_is_told(stages: tuple[str, ...], finalize: bool, stage: str) -> None:
    noted = group(*stages, finalize=finalize)
    assert noted.stage == stage
    assert noted._replace(over=True).stage == "over"
    assert noted.aborted_by == ("policy" if "unwanted" in stages else "")


def test_what_is_dumped_is_loaded_again() -> None:
    guest = HeldGuest("vm", "agent", "/agent", "7.9", 1.5)
    noted = group(*STAGES, finalize=True)._replace(
        by="policy", tries=2, frozen={"vm": guest}, quiesced={"vm": 0.5}, over=True
    )
    assert NotedGroup.load(json.loads(json.dumps(noted.dump()))) == noted
    for damaged in ({}, {**noted.dump(), "members": [3]}, {**noted.dump(), "frozen": {"vm": [1]}}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            NotedGroup.load(damaged)


def test_that_it_was_finalized_is_not_forgotten_with_the_next_note() -> None:
    noted = add_note({}, "job-finalize", STATE._replace(**PIVOT), times={})
    noted = add_note(noted, "cont")
    assert NotedMember("vm", noted).finalized
