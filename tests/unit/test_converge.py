"""Convergence, judged in a small world of a writer and a copier."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpcommit.block.throttle import DEVICE_NAMES, NO_LIMITS, write_limits
from qmpcommit.commit.converge import ConvergeReport
from qmpcommit.commit.pace import MIB, Advice, Controller, Converge, Pace, Sample, StallWatch
from qmpcommit.errors import InvalidRequest


class World:
    """A guest that dirties up to `range` bytes, a storage that copies; a second a sample."""

    def __init__(self, *, backlog: int, guest: int, storage: int, reach: int) -> None:
        self.guest, self.storage, self.reach = guest, storage, reach
        self.now, self.current, self.left = 0.0, 0, backlog
        self.limit: int | None = None
        self.limits: list[int | None] = []
        self.paces: list[Pace] = []

    def second(self, controller: Controller) -> Advice:
        advice = controller.feed(
            Sample(self.now, self.current, self.current + self.left), self.limit
        )
        self.paces.append(advice.pace)
        if advice.do != "nothing":
            self.limit = advice.limit
            self.limits.append(advice.limit)
        self.now += 1
        writes = min(self.guest, self.limit if self.limit is not None else self.guest)
        # a write to what is dirty already adds nothing; the copier takes what it can
        self.left = min(self.left + writes, max(self.reach, self.left))
        copied = min(self.storage, self.left)
        self.current += copied
        self.left -= copied
        return advice

    def run(self, controller: Controller, seconds: int) -> bool:
        for _ in range(seconds):
            self.second(controller)
            if not self.left:
                return True
        return False


def test_a_guest_too_fast_is_slowed_until_the_job_comes_home() -> None:
    def world() -> World:
        return World(backlog=128 * MIB, guest=300 * MIB, storage=20 * MIB, reach=256 * MIB)

    tame = world()
    assert tame.run(Controller(Converge(30), 0), 60)
    assert tame.limits[0] is not None
    assert tame.limits[0] <= 10 * MIB
    assert Pace.NOT_CONVERGING in tame.paces
    assert tame.paces[-1] is Pace.CONVERGING
    wild = world()
    wild.limits = []
    controller = Controller(Converge(30, floor=300 * MIB), 0)  # never held: the failing twin
    assert not wild.run(controller, 600)


@given(
    backlog=st.integers(0, 1 << 34),
    guest=st.integers(0, 1 << 30),
    storage=st.integers(0, 1 << 30),
    reach=st.integers(0, 1 << 34),
    floor=st.integers(1, 1 << 24),
    step=st.floats(0.1, 0.9),
    deadline=st.floats(1, 300),
)
@settings(max_examples=200, deadline=None)
def test_never_under_the_floor_and_home_where_the_floor_allows_it(
    backlog: int, guest: int, storage: int, reach: int, floor: int, step: float, deadline: float
) -> None:
    world = World(backlog=backlog, guest=guest, storage=storage, reach=reach)
    controller = Controller(Converge(deadline, floor=floor, step=step), 0)
    home = world.run(controller, 400)
    assert all(limit is None or limit >= floor for limit in world.limits)
    slack = storage - floor
    if slack > storage / 4 and max(backlog, reach) / slack < 150:
        assert home, world.limits


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40)), max_size=60))
def test_any_figures_give_sound_advice(figures: list[tuple[int, int]]) -> None:
    controller, limit = Controller(Converge(10, floor=1000), 0), None
    for at, (current, total) in enumerate(figures):
        advice = controller.feed(Sample(float(at), current, total), limit)
        if advice.do == "throttle":
            assert advice.limit is not None
            assert advice.limit >= 1000
            assert limit is None or advice.limit < limit
        elif advice.do == "relax":
            assert limit is not None
            assert advice.limit is None or advice.limit > limit
        else:
            assert advice.limit == limit
        limit = advice.limit


def test_slow_storage_is_not_held_against_a_guest_that_does_not_write() -> None:
    world = World(backlog=1 << 30, guest=0, storage=2 * MIB, reach=1 << 30)
    controller = Controller(Converge(10), 0)
    world.run(controller, 60)
    assert world.limits == []
    assert controller.pace is Pace.SLOW


def test_stuck_storage_frees_the_guest_and_is_told_from_slow() -> None:
    world = World(backlog=1 << 28, guest=1 << 28, storage=20 * MIB, reach=1 << 28)
    controller = Controller(Converge(20), 0)
    world.run(controller, 6)
    assert world.limit is not None
    world.storage = 0
    world.run(controller, 15)
    assert controller.pace is Pace.STUCK
    assert world.limit is None
    world.storage = 20 * MIB
    assert world.run(controller, 60)
    assert controller.pace is not Pace.STUCK


def test_a_burst_is_forgiven_when_there_is_time() -> None:
    world = World(backlog=1 << 33, guest=100 * MIB, storage=50 * MIB, reach=1 << 34)
    controller = Controller(Converge(1200), 0)
    world.run(controller, 20)
    assert world.limit is not None
    world.guest = 0
    world.run(controller, 60)
    assert world.limit is None
    assert world.limits[-1] is None


def test_a_pause_is_no_stall() -> None:
    controller = Controller(Converge(100), 0)
    controller.feed(Sample(0, 0, MIB), None)
    controller.forget()
    assert controller.feed(Sample(50, 0, MIB), None).pace is Pace.CONVERGING


def test_stall_watch() -> None:
    watch = StallWatch(10)
    assert [watch.feed(Sample(t, t * MIB, 1 << 40)) for t in range(20)] == ["moving"] * 20
    slow = [watch.feed(Sample(t, 20 * MIB + t, 1 << 40)) for t in range(20, 40)]
    assert slow[-1] == "slow"
    assert "stuck" not in slow
    stuck = [watch.feed(Sample(t, 30 * MIB, 1 << 40)) for t in range(40, 55)]
    assert stuck.index("stuck") == 10
    assert watch.feed(Sample(55, 40 * MIB, 1 << 40)) != "stuck"
    assert watch.feed(Sample(99, 40 * MIB, 40 * MIB)) == "moving"  # nothing is left
    watch.forget()
    assert watch.feed(Sample(200, 40 * MIB, 1 << 40)) == "moving"


def test_a_job_with_a_speed_limit_rests_between_slices() -> None:
    watch = StallWatch(10, speed=MIB)
    assert {watch.feed(Sample(t, t // 16 * 16 * MIB, 1 << 40)) for t in range(100)} == {"moving"}
    assert watch.feed(Sample(140, 96 * MIB, 1 << 40)) == "stuck"


# -- limits ------------------------------------------------------------------------------------

SOME = st.fixed_dictionaries(
    {
        "bps-total": st.sampled_from([0, 5 * MIB]),
        "bps-write": st.sampled_from([0, 3 * MIB, 1 << 30]),
        "bps-write-max": st.sampled_from([0, 1 << 31]),
        "iops-total": st.sampled_from([0, 500]),
    }
)


@given(SOME, st.integers(1, 1 << 32))
def test_write_limits_are_legal_and_never_looser(some: dict[str, int], rate: int) -> None:
    former = {**NO_LIMITS, **some}
    if former["bps-total"]:
        former["bps-write"] = former["bps-write-max"] = 0
    if not former["bps-write"]:
        former["bps-write-max"] = 0
    now = write_limits(former, rate)
    assert not (now["bps-total"] and (now["bps-read"] or now["bps-write"]))  # QEMU refuses both
    assert now["bps-total"] or now["bps-write"] <= rate
    for unit in ("bps-total", "bps-write"):
        if former[unit]:
            allowed = now["bps-total"] or now["bps-write"]
            assert allowed <= former[unit]
    if former["bps-total"] and not now["bps-total"]:
        assert now["bps-read"] + now["bps-write"] == former["bps-total"]
    for name in NO_LIMITS:
        if name.startswith("iops"):
            assert now[name] == former[name]


def test_device_names() -> None:
    assert len(DEVICE_NAMES) == len(NO_LIMITS) == 19
    assert DEVICE_NAMES["bps_wr_max_length"] == "bps-write-max-length"
    assert DEVICE_NAMES["iops"] == "iops-total"
    assert DEVICE_NAMES["iops_size"] == "iops-size"


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"deadline": 0}, {"deadline": float("nan")}, {"deadline": float("inf")}, {"deadline": True},
     {"deadline": "5"}, {"floor": 0}, {"floor": 1.5}, {"step": 1}, {"step": 0}, {"every": 0},
     {"pause": -1}, {"pause": float("inf")}],
)  # fmt: skip
def test_wrong_requests(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Converge(**{"deadline": 5, **wrong})


def test_a_report_travels_through_json() -> None:
    report = ConvergeReport("ready", 3.5, steps=((1.0, 100), (2.0, None)), former={"bps": 1})
    assert ConvergeReport.model_validate_json(report.model_dump_json()) == report
    config = Converge(5, pause=0.5)
    assert Converge.model_validate_json(config.model_dump_json()) == config


def test_a_guest_at_the_floor_is_not_held_any_further() -> None:
    controller = Controller(Converge(30, floor=10 * MIB), 0)
    for second in range(8):  # it copies 10 MiB/s, and as much is dirtied
        sample = Sample(second, second * 10 * MIB, (second * 10 + 500) * MIB)
        advice = controller.feed(sample, 10 * MIB)
        assert (advice.do, advice.limit) == ("nothing", 10 * MIB)
    assert advice.pace is Pace.NOT_CONVERGING


def test_a_guest_that_was_let_go_too_soon_is_held_twice_as_long() -> None:
    controller, now, current, left = Controller(Converge(10_000), 0), 0, 0, 50_000 * MIB

    def until(do: str, limit: int | None, writes: int) -> int:
        nonlocal now, current, left
        begun = now
        while now < begun + 100:
            now, current, left = now + 1, current + 20 * MIB, left + writes - 20 * MIB
            if controller.feed(Sample(now, current, current + left), limit).do == do:
                return now - begun
        pytest.fail(f"no {do}")

    first = until("relax", 8 * MIB, 0)  # the guest rests
    until("throttle", None, 40 * MIB)  # and writes again
    assert until("relax", 8 * MIB, 0) == first + 5
    assert until("relax", 8 * MIB, 0) == 10  # nothing came of it: as long as before
