"""The host's clock is set while a lease runs, or the time of a round is waited for."""

from __future__ import annotations

from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from qmpcommit.daemon import cycle_times, leased_window, undertaking
from qmpcommit.daemon.leased_window import LeasedWindow
from qmpcommit.wire.cycle import Cycle
from qmpcommit.wire.window import VMWindowRequest


class Clocks:
    """The host's clock, which may be set, and the one that goes on."""

    def __init__(self) -> None:
        self.wall = datetime(2026, 1, 15, 2, 0).astimezone().timestamp()
        self.going = 500.0
        self.slept = 0.0
        self.set_by = 0.0

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.going

    async def sleep(self, seconds: float) -> None:
        """It is set while somebody sleeps for the first time."""
        self.wall += seconds + self.set_by
        self.going += seconds
        self.slept += seconds
        self.set_by = 0.0


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    for module in (cycle_times, leased_window, undertaking):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(cycle_times, "asyncio", SimpleNamespace(sleep=made.sleep))
    return made


def cycle_of(**members: Any) -> Cycle:
    return Cycle(vm="web1", disk="vda", keep_if=("true",), guest="reset", **members)


@pytest.mark.parametrize("set_by", [-600.0, 0.0, 600.0])
async def test_a_round_comes_at_its_time_and_once(clocks: Clocks, set_by: float) -> None:
    cycle = cycle_of(at="03:00")
    due = clocks.wall + cycle_times.until_next(cycle, clocks.wall)
    assert due == clocks.wall + 3600
    clocks.set_by = set_by
    await cycle_times.reached(cycle, due)
    assert due <= clocks.wall < due + cycle_times.STEP
    assert clocks.slept == 3600 - set_by
    assert cycle_times.until_next(cycle, clocks.wall) > 86400 - cycle_times.STEP


async def test_rounds_keep_their_distance(clocks: Clocks) -> None:
    clocks.set_by = -600
    await cycle_times.reached(cycle_of(every=60), clocks.wall + 60)
    assert clocks.slept == 60


@pytest.mark.parametrize("set_by", [-3600.0, 3600.0])
def test_a_lease_is_as_long_as_it_was_asked_for(clocks: Clocks, set_by: float) -> None:
    request = VMWindowRequest(disks=["vda"], lease=60).of("web1")
    journal: Any = None
    window = LeasedWindow.new(request, journal)
    clocks.wall += set_by
    clocks.going += 59
    assert window.left == 1
    clocks.going += 1
    assert window.left == 0
