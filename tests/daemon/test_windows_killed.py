"""The daemon, killed at every step of a window: its successor closes it by its lease."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.daemon.daemons import Daemon
from tests.daemon.kill_sweep import killable, killed_everywhere, places_of
from tests.daemon.test_windows import OTHERS, end_of, overlays
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.real.test_agent import FakeAgent, fake_agent

STEP = 65536
DEVICE = "/machine/peripheral/vda/virtio-backend"
PATH = "/v1/vms/web1/windows"


class Host:
    """A guest that runs, its agent, and the daemon that is killed."""

    def __init__(self, d: Daemon, vm: Machine, chains: list[Chain], agent: FakeAgent) -> None:
        self.d, self.vm, self.chains, self.agent = d, vm, chains, agent
        self.pictures = [chain.pictures[-1].copy() for chain in chains]

    async def writes(self, number: int) -> None:
        """The guest writes something new to its first disk."""
        offset, pattern = number % 512 * STEP, number % 255 + 1
        line = f'qemu-io -d {DEVICE} "write -P {pattern} {offset} 64k"'
        said = await self.vm.execute("human-monitor-command", command_line=line)
        assert not said, said
        self.pictures[0].fill(offset, STEP, pattern)

    async def ask(self, number: int, asked: dict[str, Any]) -> str | None:
        """Ask for a window; None where the daemon died before it answered."""
        with suppress(OSError, http.client.HTTPException):
            while True:
                answer = await self.d.post(PATH, asked, Idempotency_Key=f"key{number}")
                if answer.status == 201:
                    return str(answer.json["id"])
                # The successor tells of the window that was not opened; the next one is.
                assert answer.status == 409, answer.body
                assert b"Ask again" in answer.body
        return None

    async def one(self, asked: dict[str, Any], number: int, place: str) -> None:
        """A window, a kill somewhere in it, another daemon, and the end."""
        d = self.d
        window = await self.ask(number, asked)
        if place:
            assert d.process is not None
            async with asyncio.timeout(60):
                await d.process.wait()
            await self.writes(number)
            d.environment["QMPCOMMIT_DIE_AT"] = "0"  # it asks for commits itself, which counts
            await d.start()
            if window is None:
                await d.connected("web1")
                window = await self.ask(number, asked)
        assert window is not None
        ended = await end_of(d, window)
        assert ended["state"] == "done", ended
        await self.nothing_is_left()

    async def nothing_is_left(self) -> None:
        """No job, no node, no file; the guest goes on, and writes where it did before."""
        assert not self.agent.frozen
        assert (await self.vm.execute("query-status"))["status"] == "running"
        assert await self.vm.execute("query-jobs") == []
        nodes = [n["node-name"] for n in await self.vm.execute("query-named-block-nodes")]
        assert [name for name in nodes if "qmpcommit" in name] == []
        active = [each["inserted"]["file"] for each in await self.vm.execute("query-block")]
        assert active == [str(chain.top) for chain in self.chains]
        assert overlays(self.vm.folder) == []


@asynccontextmanager
async def host(folder: Path, disks: int) -> AsyncIterator[Host]:
    """All of it; the disks are compared in the end."""
    chains = [make_chain(folder), make_chain(folder, names=OTHERS)][:disks]
    d = killable(folder)
    async with (
        machine(folder, *chains, style="implicit", running=True) as vm,
        fake_agent(folder) as agent,
    ):
        d.config += f'[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n'
        await d.start()
        try:
            await d.connected("web1")
            made = Host(d, vm, chains, agent)
            yield made
        finally:
            if d.process is not None:
                await d.kill()
        await vm.quit()
    for chain, picture in zip(chains, made.pictures, strict=True):
        assert_disk(chain.top, picture)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("freeze", "disks"), [("none", 1), ("pause", 2), ("agent", 1)])
async def test_killed_at_every_step(
    folder: Path, freeze: str, disks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async with host(folder, disks) as at:
        asked: dict[str, Any] = {"disks": ["vda", "vdb"][:disks], "lease": 0.2}
        if freeze != "none":
            asked["freeze"] = freeze
        if freeze == "agent":
            asked["agent"] = at.agent.path
        await at.one(asked, 0, "")
        places = places_of(folder)
        wanted = {"pause": "after stop", "agent": "after guest-fsfreeze-freeze"}
        assert {"after transaction", wanted.get(freeze, "before unlink")} <= set(places)
        story = partial(at.one, asked)
        said = await killed_everywhere(at.d, story, places, partial(at.d.connected, "web1"))
    with capsys.disabled():
        print(f" {freeze}: {said}", end="")


@pytest.mark.parametrize("verb", ["recover", "close"])
async def test_the_overlay_that_it_had_pivoted_away_from_goes_without_it(
    folder: Path, verb: str
) -> None:
    """It is killed before the deletion, and no daemon comes: the file says itself that it may go.

    Somebody's file in its place stays.
    """
    async with host(folder, 1) as at:
        await at.d.kill()
        at.d.environment["QMPCOMMIT_DIE_IN"] = "before unlink"
        await at.d.start()
        await at.d.connected("web1")
        window = await at.ask(1, {"disks": ["vda"], "lease": 600})
        await at.writes(1)
        with suppress(OSError, http.client.HTTPException):
            await at.d.request("DELETE", f"/v1/windows/{window}")
        assert at.d.process is not None
        async with asyncio.timeout(60):
            await at.d.process.wait()
        (overlay,) = overlays(folder)
        await at.writes(2)
        theirs = overlay.rename(folder / "theirs")
        overlay.write_bytes(at.chains[0].base.read_bytes())
        async with qc.Session.connect(at.vm.qmp) as vm:
            for there in (True, False):
                if verb == "recover":
                    left = (await vm.recover()).left
                    assert [each.what for each in left] == [str(overlay)] * there
                elif there:
                    with pytest.raises(qc.WindowError, match="has not open"):
                        await vm.close_windows()
                else:
                    assert await vm.close_windows() == []
                assert overlays(folder) == [overlay] * there
                if there:
                    theirs.rename(overlay)
        await at.nothing_is_left()


async def test_an_overlay_that_no_disk_writes_to_any_more_is_told_of(folder: Path) -> None:
    """It was laid, the daemon was killed before it was noted, and the VM is started without it."""
    chain = make_chain(folder)
    picture = chain.pictures[-1].copy()
    d = killable(folder)
    d.environment["QMPCOMMIT_DIE_IN"] = "after transaction"
    asked = {"disks": ["vda"], "lease": 600}
    try:
        async with machine(folder, chain, style="implicit", running=True) as vm:
            d.config += f'[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n'
            await d.start()
            await d.connected("web1")
            with suppress(OSError, http.client.HTTPException):
                await d.post(PATH, asked, Idempotency_Key="key")
            assert d.process is not None
            async with asyncio.timeout(60):
                await d.process.wait()
            line = f'qemu-io -d {DEVICE} "write -P 85 0 64k"'
            assert not await vm.execute("human-monitor-command", command_line=line)
            await vm.quit()
        picture.fill(0, STEP, 85)
        (overlay,) = overlays(folder)
        del d.environment["QMPCOMMIT_DIE_IN"]
        async with machine(folder, chain, style="implicit", running=True) as vm:
            await d.start()
            await d.connected("web1")
            (shown,) = (await d.get("/v1/windows")).json
            ended = await end_of(d, shown["id"])
            assert ended["state"] == "failed", ended
            assert f"{overlay} is an overlay of a window" in ended["error"]["message"]
            assert "nothing is left" not in ended["error"]["message"]
            await d.kill()
            await vm.quit()
    finally:
        if d.process is not None and d.process.returncode is None:
            await d.kill()
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(overlay, picture)
