"""The daemon, killed at every step of a window over two VMs: open on both then, or on neither."""

from __future__ import annotations

import asyncio
import http.client
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_group_windows import MEMBERS, NAMES, Host, host
from tests.daemon.test_windows import end_of
from tests.daemon.test_windows_killed import places_of
from tests.ground.places import chosen, told

ASKED: dict[str, Any] = {"members": MEMBERS, "freeze": "pause", "lease": 0.2}


async def ask(at: Host, number: int) -> str | None:
    """Ask for a window; None where the daemon died before it answered."""
    with suppress(OSError, http.client.HTTPException):
        while True:
            answer = await at.d.post("/v1/windows", ASKED, Idempotency_Key=f"key{number}")
            if answer.status == 201:
                return str(answer.json["id"])
            # The successor tells of the window that was not opened on both; the next one is.
            assert answer.status == 409, answer.body
            assert b"Ask again" in answer.body
            await at.nothing_is_left()
    return None


async def connected(at: Host) -> None:
    """The daemon has both VMs."""
    for name in NAMES:
        await at.d.connected(name)


async def one(at: Host, number: int, place: str) -> None:
    """A window, a kill somewhere in it, another daemon, and the end."""
    d = at.d
    window = await ask(at, number)
    if place:
        assert d.process is not None
        async with asyncio.timeout(60):
            await d.process.wait()
        for name in NAMES:
            await at.writes(name, "vda", number)
        d.environment["QMPCOMMIT_DIE_AT"] = "0"  # it asks for commits itself, which counts
        await d.start()
        if window is None:
            await connected(at)
            window = await ask(at, number)
    assert window is not None
    ended = await end_of(d, window)
    assert ended["state"] == "done", ended
    await at.nothing_is_left()


@pytest.mark.timeout(1800)
async def test_killed_at_every_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with host(folder) as at:
        d = at.d
        await one(at, 0, "")
        places = places_of(folder)
        assert {"after stop", "after transaction", "before cont", "before unlink"} <= set(places)
        tried = chosen(len(places))
        for number in tried:
            place = places[number - 1]
            try:
                if d.environment["QMPCOMMIT_DIE_AT"] != str(number):
                    await d.kill()
                    d.environment["QMPCOMMIT_DIE_AT"] = str(number)
                    await d.start()
                    await connected(at)
                await one(at, number, place)
            except BaseException:
                print(f"killed at {number}: {place}\n{d.log[-8000:]}")
                raise
    with capsys.disabled():
        print(f" {told(len(places), len(tried))}", end="")
