"""Who hears which event of a monitor."""

from __future__ import annotations

from typing import Any

import pytest

from qmpcommit.qmp.subscriptions import EventStream, Subscribers

ABOUT_J1 = [
    {"event": "JOB_STATUS_CHANGE", "data": {"id": "j1", "status": "ready"}},
    {"event": "BLOCK_JOB_READY", "data": {"device": "j1"}},
    {"event": "BLOCK_JOB_PENDING", "data": {"id": "j1"}},
    {"event": "BLOCK_JOB_COMPLETED", "data": {"device": "j1"}},
    {"event": "BLOCK_JOB_CANCELLED", "data": {"device": "j1"}},
    {"event": "BLOCK_JOB_ERROR", "data": {"device": "j1"}},
]
FOR_ALL: list[dict[str, Any]] = [
    {"event": "SHUTDOWN", "data": {"guest": False}},
    {"event": "STOP"},
    {"event": "JOB_STATUS_CHANGE"},
    {"event": "JOB_STATUS_CHANGE", "data": {"id": ["j1"]}},
    {"event": "BLOCK_JOB_READY", "data": "j2"},
    {"event": "BLOCK_IO_ERROR", "data": {"device": "j2"}},
]


@pytest.mark.parametrize("message", [*ABOUT_J1, *FOR_ALL], ids=str)
def test_a_job_hears_what_is_about_it_or_about_no_job(message: dict[str, Any]) -> None:
    heard: list[str] = []
    everybody = Subscribers()
    everybody.add(lambda m: heard.append("wide"))
    everybody.add(lambda m: heard.append("j1"), job="j1")
    everybody.add(lambda m: heard.append("j2"), job="j2")
    everybody.message(message)
    assert sorted(heard) == (["j1", "wide"] if message in ABOUT_J1 else ["j1", "j2", "wide"])


def test_closed_it_hears_no_more() -> None:
    heard: list[int] = []
    everybody = Subscribers()
    with everybody.while_in(lambda m: heard.append(1), lambda up: None, job="j1"):
        second = everybody.add(lambda m: heard.append(2), job="j1")
        everybody.message(ABOUT_J1[0])
    everybody.message(ABOUT_J1[0])
    second.close()
    second.close()
    everybody.message(ABOUT_J1[0])
    everybody.message(FOR_ALL[0])
    assert heard == [1, 2, 2]
    assert everybody.none


def test_one_that_closes_while_it_hears_disturbs_nobody() -> None:
    heard: list[int] = []
    everybody = Subscribers()
    first = everybody.add(lambda m: first.close(), job="j1")
    everybody.add(lambda m: heard.append(2), job="j1")
    everybody.message(ABOUT_J1[0])
    assert heard == [2]


async def test_what_is_read_raw_ends_with_its_stream() -> None:
    everybody = Subscribers()
    with EventStream(everybody, frozenset({"STOP"}), limit=10) as stream:
        for message in FOR_ALL:
            everybody.message(message)
        everybody.end()
        assert [data async for data in stream.raw()] == [{}]
    assert everybody.none
