"""How a monitor's messages are read beside all others."""

from __future__ import annotations

import asyncio

import pytest

from qmpcommit.qmp import reading
from qmpcommit.qmp.reading import FLOOD, MESSAGE, TURN, Lines


async def read_all(count: int) -> int:
    """Read so many lines that have come already; the turns that others had meanwhile."""
    reader = asyncio.StreamReader(limit=1 << 24)
    reader.feed_data(b"{}\n" * count)
    lines = Lines(reader, lambda: MESSAGE)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    for _ in range(count):
        assert await lines.next() == b"{}\n"
    beside.cancel()
    return turns


async def test_a_flood_leaves_turns_to_others() -> None:
    count = FLOOD // 4
    assert await read_all(count) >= count // TURN


async def test_a_flood_that_goes_on_is_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    reader = asyncio.StreamReader(limit=1 << 24)
    reader.feed_data(b"{}\n" * (FLOOD * 2))
    lines = Lines(reader, lambda: MESSAGE)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", lambda: 5.0)
    for _ in range(FLOOD):
        await lines.next()
    assert set(slept) == {0}
    for _ in range(FLOOD // 2):
        await lines.next()
    assert slept[-1] == reading.SLOWLY
    monkeypatch.setattr(loop, "time", lambda: 6.5)
    slept.clear()
    for _ in range(FLOOD // 2):
        await lines.next()
    assert set(slept) == {0}
