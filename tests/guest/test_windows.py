"""Windows on real guests: frozen by a real ``qemu-ga``, and several of them at one instant."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from qmpcommit.qmp.agent import Agent
from tests.cli.command import ENVIRONMENT
from tests.cli.command import run as qmpcommit
from tests.daemon.daemons import Daemon
from tests.daemon.kill_sweep import killable
from tests.daemon.test_windows import closed, end_of, overlays
from tests.ground.images import Chain
from tests.guest.guest import (
    SLOTS,
    Guest,
    assert_files,
    count_in,
    file_system,
    guest,
    journal_is_empty,
    needs_guest,
)

pytestmark = [needs_guest, pytest.mark.timeout(600)]


@asynccontextmanager
async def hosted(
    folder: Path, *names: str, **environment: str
) -> AsyncIterator[tuple[Daemon, dict[str, Guest]]]:
    """Guests that write, each in a folder of its own, and their daemon, which may be killed."""
    d, guests = killable(folder), dict[str, Guest]()
    d.environment |= environment
    async with AsyncExitStack() as stack:
        for name in names:
            (folder / name).mkdir()
            chain = file_system(folder / name)
            made = await stack.enter_async_context(guest(folder / name, chain, style="implicit"))
            guests[name] = made
            d.config += f'[[vm]]\nname = "{name}"\nqmp = "{made.qemu.qmp}"\n'
        await d.start()
        try:
            for name in names:
                await d.connected(name)
            yield d, guests
        except BaseException:
            print(d.log[-6000:])
            raise
        finally:
            if d.process is not None:
                await d.kill()


async def status_of(made: Guest) -> str:
    async with Agent(made.agent) as client:
        return await client.status()


async def spun(made: Guest) -> int:
    """How many writes it acknowledges while its CPU does the work of 20."""
    await made.spin()  # what was under way has been said
    before = made.count
    await made.spin()
    return made.count - before


def as_acknowledged(made: Guest) -> Guest:
    """What it had acknowledged by now."""
    return Guest(made.qemu, "", made.reader, made.writer, dict(made.acked), made.count)


async def test_the_daemons_window_is_what_the_agent_has_flushed(folder: Path) -> None:
    async with hosted(folder, "web1") as (d, guests):
        web1, top = guests["web1"], folder / "web1" / "top.qcow2"
        web1.order("agent")
        before = as_acknowledged(web1)
        asked: dict[str, Any] = {"disks": ["vda"], "freeze": "agent", "agent": web1.agent}
        answer = await d.post("/v1/vms/web1/windows", {**asked, "lease": 600})
        assert answer.status == 201, answer.body
        now = as_acknowledged(web1)
        assert answer.json["quiesced"] > 0
        assert await status_of(web1) == "thawed"
        await web1.more()
        assert journal_is_empty(top), "nobody has frozen it"
        now.acked.pop(now.count % SLOTS, None)  # which may have been written already
        before.acked = {n: said for n, said in before.acked.items() if now.acked.get(n) == said}
        assert_files(top, before)
        await closed(d, answer.json["id"])
        assert (await end_of(d, answer.json["id"]))["state"] == "done"
        await web1.more()
        await web1.power_off()
    assert overlays(folder) == []
    assert_files(top, web1)


@pytest.mark.parametrize("place", ["after guest-fsfreeze-freeze", "after transaction"])
async def test_a_daemon_that_is_killed_while_it_is_frozen_thaws_it_first(
    folder: Path, place: str
) -> None:
    async with hosted(folder, "web1") as (d, guests):
        web1 = guests["web1"]
        web1.order("agent")
        assert await status_of(web1) == "thawed"
        assert await spun(web1) > 0
        await d.kill()
        d.environment["QMPCOMMIT_DIE_IN"] = place
        await d.start()
        await d.connected("web1")
        asked = {"disks": ["vda"], "freeze": "agent", "agent": web1.agent, "lease": 2}
        with suppress(OSError):
            await d.post("/v1/vms/web1/windows", asked)
        assert d.process is not None
        assert await d.process.wait() == -signal.SIGKILL
        assert await status_of(web1) == "frozen"
        assert await spun(web1) == 0
        del d.environment["QMPCOMMIT_DIE_IN"]
        await d.start()
        await d.connected("web1")  # before it is that, the guest is let go on
        assert await status_of(web1) == "thawed"
        await web1.more()
        (window,) = (await d.get("/v1/windows")).json
        ended = await end_of(d, window["id"])
        laid = place == "after transaction"
        assert ended["state"] == ("done" if laid else "failed"), ended
        await web1.more()
        await web1.power_off()
    assert overlays(folder) == []
    assert_files(folder / "web1" / "top.qcow2", web1)


async def test_closing_what_a_killed_command_left_frozen_thaws_it(folder: Path) -> None:
    chain: Chain = file_system(folder)
    async with guest(folder, chain, style="implicit") as made:
        made.order("agent")
        assert await status_of(made) == "thawed"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.guest.killed_frozen", "window", made.qemu.qmp, "vda",
            "--freeze", "agent", "--agent", made.agent, "--", "true", env=ENVIRONMENT,
        )  # fmt: skip
        assert await process.wait() == -signal.SIGKILL
        assert await status_of(made) == "frozen"
        assert await spun(made) == 0
        unknown = await qmpcommit("window", "--close", made.qemu.qmp)
        assert unknown.status == 1
        assert "--agent SOCKET" in unknown.err
        assert await status_of(made) == "frozen"
        said = await qmpcommit("window", "--close", made.qemu.qmp, "--agent", made.agent)
        assert said.status == 0, said.err
        assert await status_of(made) == "thawed"
        await made.more()
        await made.power_off()
    assert overlays(folder) == []
    assert_files(chain.top, made)


class Counting:
    """Counts in two guests, always in the first before in the second, each count on its disk.

    So at any one instant the second's disk shows what the first's does, or one less.
    """

    def __init__(self, guests: dict[str, Guest]) -> None:
        self.count = 0
        self._guests = list(guests.values())
        self._over = False
        self._news = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Counting:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over = True
        assert self._task is not None
        await self._task

    async def _run(self) -> None:
        while not self._over:
            for made in self._guests:
                await made.counts(self.count + 1)
            async with self._news:
                self.count += 1
                self._news.notify_all()

    async def more(self, counts: int) -> None:
        """Wait until it has counted so far."""
        wanted = self.count + counts
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: self.count >= wanted)


@pytest.mark.parametrize("freeze", ["pause", "agent"])
async def test_frozen_files_of_two_guests_never_show_the_second_ahead(
    folder: Path, freeze: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = 10
    # The first is fit long before the second: had it not to wait, it would go on too early.
    async with hosted(folder, "a", "b", QMPCOMMIT_SLOW="b blockdev-create") as (d, guests):
        for made in guests.values():
            made.order("agent")
            assert await status_of(made) == "thawed"
        asked: dict[str, Any] = {"members": [{"vm": name, "disk": "vda"} for name in guests]}
        asked |= {"freeze": freeze, "lease": 600}
        if freeze == "agent":
            asked["agents"] = {name: made.agent for name, made in guests.items()}
        seen = set()
        async with Counting(guests) as counting:
            await counting.more(1)
            for _ in range(rounds):
                answer = await d.post("/v1/windows", asked)
                assert answer.status == 201, answer.body
                files = [each["disks"]["vda"]["filename"] for each in answer.json["windows"]]
                await counting.more(1)
                first, second = [count_in(Path(file), folder) for file in files]
                assert second in (first, first - 1), f"{second} was written after {first}"
                seen.add(first)
                await closed(d, answer.json["id"])
                assert (await end_of(d, answer.json["id"]))["state"] == "done"
            assert len(seen) > rounds / 2, "it has counted meanwhile"
            # The same without one instant: a window on each shows the second ahead.
            alone = []
            for name in guests:
                body = {"disks": ["vda"], "freeze": "pause", "lease": 600}
                answer = await d.post(f"/v1/vms/{name}/windows", body)
                assert answer.status == 201, answer.body
                alone.append(answer.json)
                await counting.more(2)
            first, second = [count_in(Path(w["disks"]["vda"]["filename"]), folder) for w in alone]
            assert second > first, "the test can't tell"
            for window in alone:
                await closed(d, window["id"])
                assert (await end_of(d, window["id"]))["state"] == "done"
        for made in guests.values():
            await made.power_off()
    assert overlays(folder) == []
    for name, made in guests.items():
        assert_files(folder / name / "top.qcow2", made)
        assert count_in(folder / name / "top.qcow2", folder) == counting.count
    with capsys.disabled():
        print(f" {freeze}: {rounds} windows at {len(seen)} counts, none ahead", end="")
