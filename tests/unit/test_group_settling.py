"""By which way a group is settled: by its notes where these are enough, else by QEMU's jobs."""

from __future__ import annotations

from typing import Any

import pytest

from qmpcommit.group.book import Book
from qmpcommit.group.noted import NotedGroup, Way
from qmpcommit.group.settling import Settling
from qmpcommit.log import Log
from tests.unit.test_group_noted import member

JOBS = ("one", "other")
FAILED = {"status": "concluded", "error": "cancelled"}
HELD, ENDED = {"status": "pending"}, {"status": "concluded"}


class Kept(Book):
    """Two members, each on a VM of its own, that were so far."""

    def __init__(self, *stages: str, finalize: bool = False) -> None:
        members = []
        for stage, job_id in zip(stages, JOBS, strict=True):
            noted = dict(member(stage).noted)
            noted |= {"plan": {"job_id": job_id}} if noted else {}
            members.append({"vm": f"vm of {job_id}", "noted": noted})
        self.noted = {"members": members, "finalize": finalize}

    @property
    def as_noted(self) -> NotedGroup:
        return NotedGroup.load(self.noted)

    def member(self, number: int) -> Any:
        return self.as_noted.members[number].noted

    def of(self, number: int) -> Any:
        raise AssertionError("nothing is noted")

    async def write(self, step: str) -> None:
        raise AssertionError("nothing is noted")


class Seen(Settling):
    """What its VMs show is in `jobs`, by their jobs' ids; a VM that is not there is away."""

    called = "test"

    def __init__(self, book: Book, **jobs: dict[str, Any]) -> None:
        super().__init__("0" * 8, book, Log(), None, {})
        self.jobs, self.asked = jobs, 0

    async def _jobs(self, key: str) -> tuple[str, list[dict[str, Any]]] | None:
        self.asked += 1
        job_id = key.removeprefix("vm of ")
        if job_id not in self.jobs:
            return None
        return "", [{"id": job_id, **self.jobs[job_id]}]

    def _reach(self, key: str) -> Any:
        raise AssertionError(key)

    async def _back(self, number: int, error: Exception) -> None:
        raise error

    def _hooks(self, number: int) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("stages", "finalize", "way"),
    [
        (("not begun", "not begun"), False, Way.BEGIN),
        (("decided", "ready"), False, Way.CANCEL),
        (("decided", "aborted"), True, Way.CANCEL),
        (("finalized", "decided"), True, Way.FINALIZE),
    ],
)
async def test_no_vm_is_waited_for_where_the_notes_are_enough(
    stages: tuple[str, str], finalize: bool, way: Way
) -> None:
    settling = Seen(Kept(*stages, finalize=finalize), one=FAILED)
    assert await settling.way() is way
    assert settling.asked == 0
    await settling.way(look=True)
    assert settling.asked == 2


async def test_what_was_ready_is_followed_while_all_jobs_may_be_there() -> None:
    settling = Seen(Kept("ready", "ready"), one={"status": "ready"})
    assert await settling.way() is Way.FOLLOW
    settling.jobs["other"] = HELD
    assert await settling.way() is Way.CANCEL
    assert not settling.undone


@pytest.mark.parametrize("other", [FAILED, {"status": "null"}])
async def test_what_was_cancelled_before_the_first_was_finalized_stays_so(
    other: dict[str, Any],
) -> None:
    """Also where that can't be seen any more: others may have been cancelled by then."""
    settling = Seen(Kept("decided", "decided", finalize=True), one=HELD)
    assert await settling.way() is Way.FINALIZE  # the other VM is away
    assert settling.finalizes
    settling.jobs["other"] = other
    assert await settling.way() is Way.CANCEL
    assert (settling.undone, settling.finalizes) == (True, False)
    settling.jobs.clear()
    assert await settling.way() is Way.CANCEL


async def test_where_one_has_ended_well_the_others_are_finalized() -> None:
    settling = Seen(Kept("decided", "decided", finalize=True), one=ENDED, other=FAILED)
    assert await settling.way() is Way.FINALIZE
