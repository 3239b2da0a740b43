"""The gate before the clearing up: decisions go first, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qmpcommit.daemon.clearing import AT_ONCE, CROWD, PATIENCE, Clearing


class Clock:
    """The loop's time, and sleeps that pass it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.slept = 0.0
        self.at_each: list[Any] = []
        self._real = asyncio.sleep
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        for call in self.at_each:
            call()
        await self._real(0)


async def crowd(gate: Clearing) -> None:
    for _ in range(CROWD):
        gate.decides()


async def test_few_decisions_keep_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, gate = Clock(monkeypatch), Clearing()
    for _ in range(CROWD - 1):
        gate.decides()
    await gate.acquire()
    assert clock.slept == 0


async def test_many_decisions_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, gate = Clock(monkeypatch), Clearing()
    await crowd(gate)
    await gate.acquire()
    assert 0 < clock.slept < PATIENCE


async def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, gate = Clock(monkeypatch), Clearing()
    await crowd(gate)
    clock.at_each = [gate.decides] * CROWD  # they never end
    await gate.acquire()
    assert clock.slept == pytest.approx(PATIENCE)


async def test_a_cancelled_one_gives_its_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, gate = Clock(monkeypatch), Clearing()
    await crowd(gate)
    clock.at_each = [gate.decides] * CROWD
    waiting = asyncio.ensure_future(gate.acquire())
    while not clock.slept:
        await clock._real(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    clock.now += 1000
    for _ in range(AT_ONCE):
        await gate.acquire()
    assert gate.locked()
