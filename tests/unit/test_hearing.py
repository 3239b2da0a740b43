from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpcommit.commit import facts
from qmpcommit.commit.job_events import Hearing
from tests.unit.test_events import JOB, JSON, SAMPLES, STAMPS, message


def hear(*messages: dict[str, Any], job: str = "j") -> tuple[Hearing, list[facts.Fact]]:
    told: list[facts.Fact] = []
    hearing = Hearing(job, told.append)
    for each in messages:
        hearing.message(each)
    return hearing, told


def test_what_is_about_the_job_is_heard() -> None:
    hearing, told = hear(
        message("JOB_STATUS_CHANGE", {"id": "j", "status": "created"}, 1),
        message("BLOCK_JOB_READY", JOB, 2),
        message("JOB_STATUS_CHANGE", {"id": "j", "status": "waiting"}, 3),
        message("BLOCK_JOB_COMPLETED", {**JOB, "offset": 5}, 4),
        message("SHUTDOWN", {"guest": False}, 5),
    )
    assert told == [
        facts.StatusChanged("created"),
        facts.BecameReady(5242880, 5242880),
        facts.StatusChanged("waiting"),
        facts.Ended(False, None, 5, 5242880),
        facts.News.SHUTTING_DOWN,
    ]
    assert [time.timestamp() for time in hearing.times.values()] == [
        second + 0.123456 for second in (1, 2, 3, 4)
    ]
    assert list(hearing.times) == ["started", "ready", "decided", "ended"]


def test_a_shutdown_is_told_once() -> None:
    _, told = hear(*[message("SHUTDOWN", {"guest": False}, at) for at in range(5)])
    assert told == [facts.News.SHUTTING_DOWN]


def test_the_first_time_counts() -> None:
    hearing, _ = hear(
        message("JOB_STATUS_CHANGE", {"id": "j", "status": "aborting"}, 1),
        message("JOB_STATUS_CHANGE", {"id": "j", "status": "waiting"}, 2),
    )
    assert hearing.times["decided"].timestamp() == 1.123456


def test_failures_and_cancellations_are_told_apart() -> None:
    _, told = hear(
        message("BLOCK_JOB_COMPLETED", {**JOB, "error": "No space left on device"}),
        message("BLOCK_JOB_CANCELLED", JOB),
    )
    assert told == [
        facts.Ended(False, "No space left on device", 5242880, 5242880),
        facts.Ended(True, None, 5242880, 5242880),
    ]


def test_other_jobs_and_other_events_are_not_heard() -> None:
    told: list[facts.Fact] = []
    for name, data in SAMPLES.items():
        if name != "SHUTDOWN":
            told += hear(message(name, data), job="other")[1]
    assert told == []


def test_links() -> None:
    hearing, told = hear()
    hearing.link(True)
    hearing.link(False)
    assert told == [facts.News.LINK_LOST]


@pytest.mark.parametrize(
    "stamp",
    [None, *({"seconds": n, "microseconds": n} for n in (-1, 10**400, math.nan, math.inf, True))],
)
def test_where_qemus_clock_failed_there_is_no_time(stamp: object) -> None:
    hearing, told = hear({"event": "BLOCK_JOB_READY", "data": JOB, "timestamp": stamp})
    assert (hearing.times, told) == ({}, [facts.BecameReady(5242880, 5242880)])


@given(st.sampled_from(sorted(SAMPLES)), JSON, STAMPS)
def test_no_message_breaks_it(name: str, data: Any, stamp: Any) -> None:
    more = data if isinstance(data, dict) else {}
    hear({"event": name, "data": data, "timestamp": stamp})
    hear({"event": name, "data": {**more, "id": "j", "device": "j"}, "timestamp": stamp})
