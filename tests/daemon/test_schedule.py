"""Limits, order and bandwidth shares of commits that run at once, on real storage daemons."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.daemon.daemons import Daemon, daemon
from tests.ground.daemons import many_disks
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine
from tests.ground.small_disk import needs_mounts, small_disk

HOLD: dict[str, Any] = {"policy": {"kind": "hold"}}


class Host:
    """A daemon with so many storage daemons (vm0, ...) of so many disks each (d0, ...)."""

    def __init__(self, d: Daemon, chains: list[Chain], vms: list[Machine]) -> None:
        self.d, self.chains, self.vms = d, chains, vms

    async def hold(self, vm: int, disk: int, **more: Any) -> str:
        body = {"disk": f"vm{vm}d{disk}", **HOLD, **more}
        return await self.d.commit(f"vm{vm}", **body)

    async def see(self, commit: str) -> Any:
        return (await self.d.get(f"/v1/commits/{commit}")).json

    async def states(self, *commits: str) -> list[tuple[str, int | None]]:
        seen = [await self.see(commit) for commit in commits]
        return [(each["state"], each["position"]) for each in seen]

    async def end(self, commit: str, action: str = "abort") -> None:
        await self.d.until(commit, "ready")
        answer = await self.d.post(f"/v1/commits/{commit}/decision", {"action": action})
        assert answer.status == 202
        await self.d.end_of(commit)

    async def speeds(self, expected: dict[str, int]) -> None:
        """Wait until QEMU's jobs of these commits have these speeds."""
        jobs = {(await self.see(commit))["job_id"]: rate for commit, rate in expected.items()}
        seen: dict[str, int] = {}
        async with asyncio.timeout(30):
            while seen != jobs:
                seen = {}
                for vm in self.vms:
                    for job in await vm.execute("query-block-jobs"):
                        seen[job["device"]] = job["speed"]
        for commit, rate in expected.items():
            assert (await self.see(commit))["bandwidth"] == rate


@asynccontextmanager
async def host(
    folder: Path,
    limits: str,
    vms: int,
    disks: int,
    places: list[Path] | None = None,
    **more: Any,
) -> AsyncIterator[Host]:
    config = f"[limits]\n{limits}\n"
    chains: list[Chain] = []
    machines: list[Machine] = []
    async with AsyncExitStack() as stack:
        for vm in range(vms):
            mine = []
            for disk in range(disks):
                place = places[vm] if places else folder
                names = (f"base{vm}{disk}", f"vm{vm}d{disk}")
                mine.append(make_chain(place, names=names, **more))
            chains += mine
            machines.append(await stack.enter_async_context(many_disks(folder / f"m{vm}", *mine)))
            config += f'[[vm]]\nname = "vm{vm}"\nqmp = "{machines[-1].qmp}"\n'
        d = await stack.enter_async_context(daemon(folder, config))
        for vm in range(vms):
            await d.connected(f"vm{vm}")
        yield Host(d, chains, machines)
        assert await d.stop() == 0
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_limits_on_the_host_and_on_a_vm_and_their_queue(folder: Path) -> None:
    async with host(folder, "commits = 2\nper_vm = 1", 3, 2) as h:
        a0 = await h.hold(0, 0)
        a1 = await h.hold(0, 1)  # held up by its VM
        b0 = await h.hold(1, 0)  # goes past it
        await h.d.until(a0, "ready")
        await h.d.until(b0, "ready")
        c0 = await h.hold(2, 0)  # held up by the host
        c1 = await h.hold(2, 1, priority=5)
        assert await h.states(a0, b0, c1, a1, c0) == [
            ("running", None), ("running", None), ("queued", 1), ("queued", 2), ("queued", 3)
        ]  # fmt: skip
        early = await h.d.post(f"/v1/commits/{c0}/decision", {"action": "pivot"})
        assert (early.status, early.json["type"]) == (409, "urn:qmpcommit:NotReady")
        assert (await h.d.request("DELETE", f"/v1/commits/{a1}")).json["state"] == "cancelled"
        assert (await h.see(a1))["error"] is None
        assert await h.states(c1, c0) == [("queued", 1), ("queued", 2)]
        await h.d.kill()  # the queue is kept, and its order
        await h.d.start()
        assert await h.states(a1, c1, c0) == [("cancelled", None), ("queued", 1), ("queued", 2)]
        await h.end(a0)
        await h.d.until(c1, "ready")
        assert await h.states(c1, c0) == [("running", None), ("queued", 1)]
        await h.end(b0)  # room on the host, but not on its VM
        assert await h.states(c0) == [("queued", 1)]
        await h.end(c1)
        await h.end(c0)
        assert [job for vm in h.vms for job in await vm.execute("query-jobs")] == []


@needs_mounts
async def test_limits_on_a_storage(folder: Path) -> None:
    """The device behind the base counts, whichever VM it is."""
    with small_disk(folder / "one", 64 << 20) as one, small_disk(folder / "two", 64 << 20) as two:
        async with host(folder, "per_storage = 1", 3, 1, [one, one, two]) as h:
            first, second, other = [await h.hold(vm, 0) for vm in range(3)]
            await h.d.until(first, "ready")
            await h.d.until(other, "ready")
            seen = [await h.see(commit) for commit in (first, second, other)]
            assert [each["state"] for each in seen] == ["running", "queued", "running"]
            assert seen[0]["storage"] == seen[1]["storage"] != seen[2]["storage"]
            await h.end(first)
            await h.end(second)
            await h.end(other)


async def test_a_full_queue_is_said(folder: Path) -> None:
    async with host(folder, "commits = 1\nqueue = 1", 1, 3) as h:
        first, second = await h.hold(0, 0), await h.hold(0, 1)
        answer = await h.d.post("/v1/vms/vm0/commits", {"disk": "vm0d2", **HOLD})
        assert (answer.status, answer.json["type"]) == (503, "urn:qmpcommit:QueueFull")
        await h.d.request("DELETE", f"/v1/commits/{second}")
        third = await h.hold(0, 2)
        await h.end(first)
        await h.end(third)


async def test_the_budget_is_divided_anew_as_jobs_come_and_go(folder: Path) -> None:
    """As QEMU itself tells their speeds; 24 MiB to copy at most at 128 KiB/s never ends here."""
    kib = 1024
    async with host(folder, 'bandwidth = "128K"', 2, 2, bulk=20 << 20) as h:
        a = await h.hold(0, 0)
        await h.d.until(a, "copying")
        await h.speeds({a: 128 * kib})
        b = await h.hold(1, 0)
        await h.speeds({a: 64 * kib, b: 64 * kib})
        modest = await h.hold(0, 1, bandwidth="16K")
        await h.speeds({a: 56 * kib, b: 56 * kib, modest: 16 * kib})
        await h.d.kill()  # and the next daemon goes on with them
        await h.d.start()
        for vm in ("vm0", "vm1"):
            await h.d.connected(vm)
        for commit in (a, b, modest):
            await h.d.until(commit, "copying")
        await h.d.request("DELETE", f"/v1/commits/{a}")
        await h.d.end_of(a)
        await h.speeds({b: 112 * kib, modest: 16 * kib})
        await h.d.request("DELETE", f"/v1/commits/{b}")
        await h.d.end_of(b)
        await h.speeds({modest: 16 * kib})
        await h.d.request("DELETE", f"/v1/commits/{modest}")
        await h.d.end_of(modest)
