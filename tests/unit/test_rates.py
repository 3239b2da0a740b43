"""Rate, time to go and READY's age, from one look at a job to the next."""

from __future__ import annotations

from typing import Any

from qmpcommit.commit.rates import JobPace, Rates, percent

MIB = 1 << 20


def test_a_rate_needs_two_looks_and_a_limit_none() -> None:
    rates = Rates()
    first = rates.look("j", 0.0, status="running", current=0, total=100 * MIB)
    assert first == JobPace()
    limited = rates.look("k", 0.0, status="running", current=0, total=100 * MIB, speed=10 * MIB)
    assert limited == JobPace(None, 10.0)
    second = rates.look("j", 1.0, status="running", current=20 * MIB, total=100 * MIB)
    assert second == JobPace(20.0 * MIB, 4.0)
    slower = rates.look("j", 2.0, status="running", current=20 * MIB, total=100 * MIB)
    assert slower == JobPace(10.0 * MIB, 8.0)
    assert rates.look("j", 3.0, status="running", current=60 * MIB, total=100 * MIB).eta == 2.0
    # the limit was just lowered: what was copied before tells nothing
    assert rates.look("j", 3.0, status="running", current=60 * MIB, total=100 * MIB, speed=MIB) == (
        JobPace(None, 40.0)
    )
    assert rates.look("j", 4.0, status="paused", current=60 * MIB, total=100 * MIB).eta is None


def test_the_age_of_ready_says_how_well_it_is_known() -> None:
    rates = Rates()

    def look(key: str, at: float, status: str, **more: Any) -> tuple[float | None, str]:
        pace = rates.look(key, at, status=status, current=MIB, total=MIB, **more)
        return pace.ready_for, pace.ready_bound

    assert look("seen", 0.0, "running") == (None, "")
    assert look("seen", 1.0, "ready") == (0.0, "exactly")
    assert look("seen", 3.0, "ready") == (2.0, "exactly")
    assert look("found", 0.0, "ready") == (None, "")
    assert look("found", 5.0, "ready") == (5.0, "at least")
    assert look("claimed", 0.0, "ready", begun_for=60.0) == (60.0, "at most")
    assert look("told", 0.0, "standby", ready_for=7.0) == (7.0, "exactly")
    rates.forget({"found"})
    assert look("seen", 9.0, "ready") == (None, "")


def test_no_job_is_done_before_it_is_ready() -> None:
    assert percent(999_999, 1_000_000, "running") == 99.9
    assert percent(10, 10, "running") == 99.9
    assert percent(0, 0, "running") is None
    assert percent(0, 0, "ready") == 100.0


def test_between_the_bursts_of_a_limited_job_its_limit_tells_how_long_it_takes() -> None:
    rates = Rates()
    for at in (0.0, 0.25, 4.0):
        pace = rates.look("j", at, status="running", current=0, total=20 * MIB, speed=2 * MIB)
        assert pace == JobPace(None, 10.0)
    pace = rates.look("j", 10.0, status="running", current=0, total=20 * MIB, speed=2 * MIB)
    assert pace == JobPace(0.0, None)  # it copies nothing
