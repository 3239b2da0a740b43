"""What is known of images that QEMU creates, without asking it each time."""

from __future__ import annotations

from typing import Any

from qmpcommit.qmp.creations import MOST, Creations


def event(job: str, status: str) -> dict[str, Any]:
    return {"event": "JOB_STATUS_CHANGE", "data": {"id": job, "status": status}}


def listed(job: str, kind: str, status: str = "running") -> dict[str, Any]:
    return {"id": job, "type": kind, "status": status}


def asked(*jobs: dict[str, Any]) -> Creations:
    known = Creations()
    assert not known.none
    known.listed(jobs)
    return known


def test_nothing_is_known_before_qemu_was_asked_over_this_connection() -> None:
    known = asked()
    assert known.none
    known.forget()
    assert not known.none


def test_one_that_is_listed_counts_until_its_end_is_heard() -> None:
    for status in ("concluded", "null"):
        known = asked(listed("new", "create"), listed("j", "commit"))
        assert not known.none
        known.heard(event("j", status))
        assert not known.none
        known.heard(event("new", status))
        assert known.none
    assert asked(listed("old", "create", "concluded"), listed("j", "commit")).none


def test_a_job_that_begins_is_of_unknown_kind_until_it_is_listed_or_over() -> None:
    known = asked()
    known.heard(event("a", "created"))
    known.heard(event("b", "created"))
    assert not known.none
    known.listed([listed("a", "commit")])
    assert not known.none, "this answer is older than b"
    known.heard(event("b", "running"))
    assert not known.none
    known.heard(event("b", "null"))
    assert known.none


def test_an_answer_that_is_older_than_an_end_is_asked_for_again() -> None:
    known = asked()
    known.heard(event("new", "null"))
    known.listed([listed("new", "create")])
    assert not known.none
    known.listed([])
    assert known.none


def test_events_without_end_take_no_room_without_end() -> None:
    known = asked()
    for number in range(MOST + 1):
        known.heard(event(str(number), "created"))
    assert not known.none
    assert not known._begun
    known.listed([])
    assert known.none


def test_what_is_no_event_of_a_job_tells_nothing() -> None:
    known = asked()
    known.heard({"event": "JOB_STATUS_CHANGE", "data": None})
    known.heard({"event": "RESUME", "data": {"id": "x", "status": "created"}})
    assert known.none
