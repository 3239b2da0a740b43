"""How a monitor's messages are read beside all others."""

from __future__ import annotations

import asyncio

import pytest
from qemu.qmp.message import Message

from qmpcommit.qmp import reading
from qmpcommit.qmp.client import Client
from qmpcommit.qmp.reading import FLOOD, MESSAGE, QUERY, TURN, VALUES, Breach, Lines


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


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that it sleeps, which take no time."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    return slept


async def test_a_flood_that_goes_on_is_read_slowly(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_large_events_are_read_as_slowly_as_many(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = asyncio.StreamReader(limit=1 << 24)
    line = b"x" * 60_000 + b"\n"
    reader.feed_data(line * 100)
    lines = Lines(reader, lambda: MESSAGE)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 5.0)
    for _ in range(100):
        lines.unasked(len(await lines.next()))
    read_slowly = 100 * len(line) - FLOOD * reading.WEIGHT
    assert sum(slept) >= 0.9 * read_slowly / reading.WEIGHT / TURN * reading.SLOWLY


async def read(*parts: bytes) -> list[int]:
    """The lengths of the lines that come in these parts."""
    reader = asyncio.StreamReader(limit=1 << 24)
    for part in parts:
        reader.feed_data(part)
    reader.feed_eof()
    lines, found = Lines(reader, lambda: QUERY), []
    while True:
        try:
            found.append(len(await lines.next()))
        except EOFError:
            return found


async def test_lines_are_parted_wherever_they_are_cut() -> None:
    assert await read(b"{}\n{}", b"\n\n", b"x" * 100_000, b"\n{}") == [3, 3, 1, 100_001, 2]


@pytest.mark.parametrize(
    "line",
    [b"[" + b"1," * 40_000 + b"1]\n", b"[" + b'"%s",' % (b"x" * 9) * (VALUES + 1)],
    ids=["dense", "many"],
)
async def test_what_has_more_values_than_qemu_says_is_a_breach(line: bytes) -> None:
    with pytest.raises(Breach, match="values, which QEMU does not"):
        await read(line)


async def test_many_values_that_have_names_are_read() -> None:
    line = b'{"return": [' + b'{"number": 1}, ' * 30_000 + b"{}]}\n"
    assert await read(line) == [len(line)]


async def test_a_reply_for_which_nobody_waits_is_not_rendered() -> None:
    class Large(Message):
        def __str__(self) -> str:
            raise AssertionError("it was")

    await Client("vm")._on_message(Large({"return": {}, "id": "given-up"}, eager=False))
