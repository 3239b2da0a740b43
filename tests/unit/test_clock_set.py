"""The host's clock is set while a lease runs, or the time of a round is waited for."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qmpcommit.commit.phases import Phase, State
from qmpcommit.commit.policy import Hold
from qmpcommit.daemon import (
    clock,
    cycle_times,
    keeping,
    leased_window,
    promise,
    promised_group,
    undertaking,
)
from qmpcommit.daemon.journal import Journal, Statement
from qmpcommit.daemon.keeping import seconds_left
from qmpcommit.daemon.leased_window import LeasedWindow
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.promised_group import Group
from qmpcommit.wire.commit import CommitRequest
from qmpcommit.wire.cycle import Cycle
from qmpcommit.wire.group import GroupRequest
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
    for module in (
        cycle_times, leased_window, undertaking, clock, promise, promised_group, keeping,
    ):  # fmt: skip
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


# -- over a restart -------------------------------------------------------------------------------

AWAY = 20.0
"""Seconds between the end of one daemon and the start of the next."""


@pytest.fixture(params=["same", "another"])
def boot(request: pytest.FixtureRequest, clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> str:
    """The host is booted between the daemons, or not."""
    monkeypatch.setattr(clock, "boot", lambda: "first")
    return str(request.param)


def restart(clocks: Clocks, boot: str, set_by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks.wall += AWAY + set_by
    clocks.going = clocks.going + AWAY if boot == "same" else 3.0
    monkeypatch.setattr(clock, "boot", lambda: "first" if boot == "same" else "second")


def left_of(whole: float, boot: str, set_by: float) -> float:
    """What is left of so many seconds after the restart."""
    return whole - AWAY if boot == "same" else whole - max(0.0, AWAY + set_by)


async def row_of(path: Path, table: str, journal: Journal) -> dict[str, Any]:
    (row,) = await journal.read(f"SELECT * FROM {table}")
    return row


@pytest.mark.parametrize("set_by", [-3600.0, -10.0, 0.0, 10.0])
@pytest.mark.parametrize("renewed", [None, 600.0])
async def test_the_rest_of_a_lease_over_a_restart(
    clocks: Clocks, boot: str, set_by: float, renewed: float | None, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    journal = await Journal(folder / "j.db").open()
    try:
        request = VMWindowRequest(disks=["vda"], lease=60).of("web1")
        window = LeasedWindow.new(request, journal)
        await journal.write(window.insertion())
        if renewed is not None:
            await window.renew(renewed)
            assert window.left == renewed
        restart(clocks, boot, set_by, monkeypatch)
        again = LeasedWindow.load(await row_of(folder, "undertakings", journal), journal)
        assert again.left == pytest.approx(left_of(renewed or 60.0, boot, set_by), abs=0.01)
        assert again.expires == pytest.approx(clocks.wall + again.left)
    finally:
        await journal.close()


async def test_a_lease_of_the_version_before_is_never_longer_than_it_was(
    clocks: Clocks, boot: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await Journal(folder / "j.db").open()
    try:
        request = VMWindowRequest(disks=["vda"], lease=60).of("web1")
        window = LeasedWindow.new(request, journal)
        window.noted = {}
        await journal.write(window.insertion())
        restart(clocks, boot, -3600.0, monkeypatch)
        again = LeasedWindow.load(await row_of(folder, "undertakings", journal), journal)
        assert again.left == pytest.approx(60.0)
    finally:
        await journal.close()


@pytest.mark.parametrize("set_by", [-3600.0, -10.0, 0.0, 10.0])
async def test_the_time_of_a_commit_over_a_restart(
    clocks: Clocks, boot: str, set_by: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await Journal(folder / "j.db").open()
    try:
        metrics: Any = None
        asked = CommitRequest(disk="vda", policy=Hold(timeout=100), timeout=90)
        made = Promise("1", "web1", asked, "job", journal=journal, metrics=metrics)
        await journal.write(made.insertion())
        made.moved(State(two_phase=True, phase=Phase.READY))
        made.moved(State(two_phase=True, phase=Phase.COPYING))
        await journal.write(Statement("DELETE FROM vms"))  # which flushes
        for times in (1, 2):  # READY is found again after each restart, and is not new
            restart(clocks, boot if times == 1 else "same", set_by, monkeypatch)
            left = left_of(0.0, boot, set_by) - AWAY * (times - 1)
            again = Promise.load(await row_of(folder, "commits", journal), journal, metrics)
            assert seconds_left(again) == pytest.approx(90 + left, abs=0.01)
            policy = again.decided_policy()
            assert policy.timeout == pytest.approx(100 + left, abs=0.01)
            again.moved(State(two_phase=True, phase=Phase.READY))
            await journal.write(Statement("DELETE FROM vms"))  # which flushes
            if boot == "another":
                break
    finally:
        await journal.close()


@pytest.mark.parametrize("set_by", [-3600.0, -10.0, 0.0, 10.0])
async def test_the_time_of_a_group_over_a_restart(
    clocks: Clocks, boot: str, set_by: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await Journal(folder / "j.db").open()
    try:
        members = [{"vm": "a", "disk": "x"}, {"vm": "b", "disk": "y"}]
        asked = GroupRequest.model_validate(
            {"members": members, "policy": {"kind": "keep"}, "timeout": 90}
        )
        made = Group("a,b", asked, journal)
        await journal.write(made.insertion())
        restart(clocks, boot, set_by, monkeypatch)
        again = Group.load(await row_of(folder, "undertakings", journal), journal)
        assert again.left == pytest.approx(left_of(90.0, boot, set_by), abs=0.01)
    finally:
        await journal.close()
