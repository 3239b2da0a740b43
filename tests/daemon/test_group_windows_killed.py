"""The daemon, killed at every step of a window over two VMs: open on both then, or on neither."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.kill_sweep import places_of
from tests.daemon.test_group_windows import MEMBERS, NAMES, Host, host
from tests.daemon.test_windows import end_of
from tests.ground.places import chosen, told
from tests.real.test_agent import FakeAgent, fake_agent


class Twice:
    """Two guests with their agents, and how windows over them are asked for."""

    def __init__(self, at: Host, freeze: str, agents: dict[str, FakeAgent]) -> None:
        self.at, self.d, self._agents = at, at.d, agents
        self._asked: dict[str, Any] = {"members": MEMBERS, "freeze": freeze, "lease": 0.2}
        if freeze == "agent":
            self._asked["agents"] = {name: agent.path for name, agent in agents.items()}

    async def starts(self, die_at: int, refuses: str = "") -> None:
        """Another daemon."""
        await self.d.kill()
        self.d.environment |= {"QMPCOMMIT_DIE_AT": str(die_at), "QMPCOMMIT_REFUSES": refuses}
        await self.d.start()
        for name in NAMES:
            await self.d.connected(name)

    async def dies(self) -> None:
        """It does by itself; then the guests write."""
        assert self.d.process is not None
        async with asyncio.timeout(60):
            await self.d.process.wait()

    async def write(self, number: int) -> None:
        for name in NAMES:
            await self.at.writes(name, "vda", number)

    async def nothing_is_left(self) -> None:
        """And no guest is frozen."""
        await self.at.nothing_is_left()
        assert [name for name, agent in self._agents.items() if agent.frozen] == []

    async def ask(self, number: int, status: int = 201) -> str | None:
        """Ask for a window; None where the daemon died before it answered."""
        with suppress(OSError, http.client.HTTPException):
            while True:
                key = f"key{number}"
                answer = await self.d.post("/v1/windows", self._asked, Idempotency_Key=key)
                if answer.status == status:
                    return str(answer.json.get("id"))
                # The successor tells of the window that was not opened on both; the next one is.
                assert answer.status == 409, answer.body
                assert b"Ask again" in answer.body
                await self.nothing_is_left()
        return None

    async def one(self, number: int, killed: bool) -> None:
        """A window, a kill somewhere in it, another daemon, and the end."""
        window = await self.ask(number)
        if killed:
            await self.dies()
            await self.write(number)
            await self.starts(0)  # it asks for commits itself, which counts
            window = window or await self.ask(number)
        assert window is not None
        ended = await end_of(self.d, window)
        assert ended["state"] == "done", ended
        await self.nothing_is_left()

    async def refused(self, number: int, killed: bool) -> None:
        """One that is undone since a QEMU refuses it, a kill somewhere in that, and its end."""
        await self.ask(number, 502)
        if killed:
            await self.dies()
            await self.write(number)
            await self.starts(0)
        windows = (await self.d.get("/v1/windows?limit=1")).json
        if windows:  # it had not been written down yet
            assert (await end_of(self.d, windows[0]["id"]))["state"] == "failed"
        await self.nothing_is_left()


KINDS = {"pause": "after stop", "agent": "after guest-fsfreeze-freeze"}


@asynccontextmanager
async def twice(folder: Path, freeze: str) -> AsyncIterator[Twice]:
    async with host(folder) as at, AsyncExitStack() as stack:
        agents = {name: await stack.enter_async_context(fake_agent(folder / name))
                  for name in NAMES}  # fmt: skip
        yield Twice(at, freeze, agents)


async def at_each_place(
    here: Twice, places: list[str], capsys: pytest.CaptureFixture[str], refuses: str = ""
) -> None:
    tried = chosen(len(places))
    for number in tried:
        place = places[number - 1]
        try:
            await here.starts(number, refuses)
            await (here.refused if refuses else here.one)(number, True)
        except BaseException:
            print(f"killed at {number}: {place}\n{here.d.log[-8000:]}")
            raise
    with capsys.disabled():
        print(f" {told(len(places), len(tried))}", end="")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("freeze", KINDS)
async def test_killed_at_every_step(
    folder: Path, freeze: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with twice(folder, freeze) as here:
        await here.one(0, False)
        places = places_of(folder)
        assert {KINDS[freeze], "after transaction", "before unlink"} <= set(places)
        await at_each_place(here, places, capsys)


@pytest.mark.timeout(1800)
async def test_killed_at_every_step_of_undoing_one_that_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with twice(folder, "pause") as here:
        refuses = "db1 transaction"
        await here.starts(0, refuses)
        await here.refused(0, False)
        places = places_of(folder)
        assert {"after stop", "after transaction", "after block-commit"} <= set(places)
        await at_each_place(here, places, capsys, refuses)
