"""The daemon's client, cancelled at each of its steps in turn, leaves nothing behind.

No task, no socket, no window, and no commit or group but those whose promise somebody was given.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.daemon.daemons import Daemon, daemon
from tests.ground.cancelling import STEPS, ends_before, settle, small, sockets
from tests.ground.machines import Machine, machine
from tests.ground.places import STRIDE, first
from tests.ground.sessions import runs

NUMBERS = count()
CYCLE = """
commands = true
[[cycle]]
vm = "web1"
disk = "vda"
every = 3600
keep_if = ["true"]
guest = "reset"
delete = true
"""


@dataclass
class Ground:
    """A daemon with two machines for what is begun, and one with a commit that is READY."""

    d: Daemon
    qemus: dict[str, Machine]
    held: str = ""
    promised: set[str] = field(default_factory=set)

    def client(self) -> qc.Client:
        """A client of its own, for one run."""
        return qc.Client(self.d.socket)

    async def overlaid(self, *names: str) -> None:
        """Give them an overlay again, where a pivot has taken it."""
        async with self.client() as host:
            for name in names:
                disk = await host.vm(name).disk("vda")
                if len(disk.chain) > 1:
                    continue
                assert disk.active is not None
                number = next(NUMBERS)
                over = Path(disk.active.filename).parent / f"over{number}.qcow2"
                await self.qemus[name].execute(
                    "blockdev-snapshot-sync",
                    node_name=disk.active.node_name,
                    snapshot_file=str(over),
                    snapshot_node_name=f"n{number}",
                )

    async def at_rest(self) -> None:
        """What was promised is aborted; what nobody knows of has ended, or ends by itself."""
        async with asyncio.timeout(30), self.client() as host:
            for each in await host.commits(vm="web1") + await host.commits(vm="web2"):
                if each.id in self.promised:
                    with suppress(qc.JobConflict):
                        await each.abort()
            for group in await host.groups():
                if group.id in self.promised:
                    with suppress(qc.JobConflict):
                        await group.abort()
            while await self._busy(host):
                await asyncio.sleep(0.01)
            while await self.qemus["web1"].execute("query-jobs"):  # not adopted, then
                with suppress(qc.CommandRefused):
                    await self.qemus["web1"].execute("block-job-cancel", device="theirs")
                await asyncio.sleep(0.01)
            while await self.qemus["web2"].execute("query-jobs"):  # an overlay is being created
                await asyncio.sleep(0.01)
        for name in ("web1", "web2"):
            assert await self.qemus[name].execute("query-jobs") == []
            assert await runs(self.qemus[name])

    async def _busy(self, host: qc.Client) -> bool:
        commits = [each for each in await host.commits() if each.id != self.held]
        windows = (await self.d.get("/v1/windows")).json
        rounds = [each.running for each in await host.cycles() if each.running is not None]
        return bool(
            rounds
            or any(not each.done for each in commits)
            or any(not each.done for each in await host.groups())
            or any(each["ended"] is None for each in windows)
        )


@asynccontextmanager
async def ground(folder: Path) -> AsyncIterator[Ground]:
    """All of it; the commit of the third is undecided, and is so in the end."""
    async with AsyncExitStack() as stack:
        qemus, vms = {}, CYCLE
        for name in ("web1", "web2", "held"):
            place = folder / name
            place.mkdir()
            one = machine(place, small(place), style="implicit", running=True)
            qemus[name] = await stack.enter_async_context(one)
            vms += f'[[vm]]\nname = "{name}"\nqmp = "{qemus[name].qmp}"\n'
        d = await stack.enter_async_context(daemon(folder, vms))
        for name in qemus:
            await d.connected(name)
        made = Ground(d, qemus)
        made.held = await d.commit("held", disk="vda", policy={"kind": "hold"})
        await d.until(made.held, "ready")
        yield made
        assert (await d.get(f"/v1/commits/{made.held}")).json["phase"] == "ready"
        assert await d.stop() == 0


async def reads(at: Ground) -> None:
    async with at.client() as host:
        await host.ask("GET", "/v1/vms")
        await host.vms()
        await host.commits()
        await host.commit(at.held)
        await host.groups()
        await host.cycles()
        await host.rules()
        await host.losses()


async def reads_a_vm(at: Ground) -> None:
    async with at.client() as host:
        vm = host.vm("held")
        await vm.info()
        await vm.disks()
        await vm.disk("vda")
        await vm.jobs()
        await vm.job(at.held)
        await vm.recycles()
        await vm.owners()
        await host.vm("web1").plan("vda", policy=qc.Keep())


async def steers(at: Ground) -> None:
    async with at.client() as host:
        vm, job = host.vm("held"), (await host.commit(at.held)).job_id
        await vm.set_bandwidth(job, "100MiB")
        with suppress(qc.QmpCommitError):  # it is paused, by one that was cancelled then
            await vm.pause_job(job)
        await vm.resume_job(job)


async def lays_overlays(at: Ground) -> None:
    async with at.client() as host:
        with suppress(qc.JobConflict):  # the one that nobody waits for any more
            await host.vm("web2").overlay(["vda"])


async def opens(at: Ground) -> None:
    host = at.client()
    try:
        await host.open()
    finally:
        await host.close()


async def waits(at: Ground) -> None:
    async with at.client() as host:
        job = await host.commit(at.held)
        await job.refresh()
        await job.ready()
        steps = job.progress(every=0.01)
        try:
            for _ in range(2):
                await anext(steps)
        finally:
            await steps.aclose()  # type: ignore[attr-defined]
        with suppress(TimeoutError):
            async with asyncio.timeout(0.02):
                await job.wait()
        await job.detach()


async def follows(at: Ground) -> None:
    async with at.client() as host, host.events(after=0) as events:
        for _ in range(3):
            await anext(events)


async def adds(at: Ground) -> None:
    async with at.client() as host:
        await host.add_vm("other", "/nowhere/qmp", connect="on-demand")
        await host.remove_vm("other")


async def _begun(at: Ground, host: qc.Client) -> qc.RemoteJob:
    job = await host.vm("web1").commit("vda", policy=qc.Hold())
    at.promised.add(job.id)
    await job.ready()
    return job


async def pivots(at: Ground) -> None:
    async with at.client() as host:
        await (await _begun(at, host)).pivot()


async def keeps(at: Ground) -> None:
    async with at.client() as host:
        await (await _begun(at, host)).keep()


async def aborts(at: Ground) -> None:
    async with at.client() as host:
        await (await _begun(at, host)).abort()
        await (await _begun(at, host)).cancel()


async def decides(at: Ground) -> None:
    async with at.client() as host:
        job = await _begun(at, host)
        await job.decide("keep")
        await job.wait()


async def adopts(at: Ground) -> None:
    qemu = at.qemus["web1"]
    (device,) = await qemu.execute("query-block")
    await qemu.execute("block-commit", job_id="theirs", device=device["inserted"]["node-name"])
    async with at.client() as host:
        await host.vm("web1").adopt("theirs", "abort", wait=True)


async def _group(at: Ground, host: qc.Client) -> qc.RemoteGroup:
    group = await host.commit_group([("web1", "vda"), ("web2", "vda")], policy=qc.Hold())
    at.promised.add(group.id)
    while (await group.refresh()).phase != "ready":
        assert not group.done
    return await host.group(group.id)


async def pivots_a_group(at: Ground) -> None:
    async with at.client() as host:
        group = await _group(at, host)
        await group.pivot()
        await group.wait()


async def keeps_a_group(at: Ground) -> None:
    async with at.client() as host:
        group = await _group(at, host)
        await group.keep()
        await group.wait()


async def ends_groups(at: Ground) -> None:
    async with at.client() as host:
        await (await _group(at, host)).abort()
        with suppress(qc.JobConflict):  # while the disks of the first are in use
            await (await _group(at, host)).decide("abort")


async def opens_a_window(at: Ground) -> None:
    async with at.client() as host, host.vm("web1").snapshot(["vda"], lease=3600):
        pass


async def opens_a_window_of_two(at: Ground) -> None:
    disks = [("web1", "vda"), ("web2", "vda")]
    async with at.client() as host, host.snapshot(disks, lease=3600):
        pass


async def runs_a_round(at: Ground) -> None:
    async with at.client() as host:
        with suppress(qc.JobConflict):  # the round that nobody waits for any more
            await host.vm("web1").cycle("vda")


Story = Callable[[Ground], Coroutine[Any, Any, None]]
STORIES: list[Story] = [
    reads,
    reads_a_vm,
    steers,
    lays_overlays,
    opens,
    waits,
    follows,
    adds,
    pivots,
    keeps,
    aborts,
    adopts,
    decides,
    pivots_a_group,
    keeps_a_group,
    ends_groups,
    opens_a_window,
    opens_a_window_of_two,
    runs_a_round,
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
async def test_cancelled_at_every_step(story: Story, folder: Path) -> None:
    async with ground(folder) as at:
        before = (asyncio.all_tasks(), sockets())
        for step in range(first(), STEPS, STRIDE):
            if "pivots" in story.__name__ or "round" in story.__name__:
                await at.overlaid("web1", "web2")
            over = await ends_before(story(at), step)
            await settle()
            assert (asyncio.all_tasks(), sockets()) == before, step
            await at.at_rest()
            if over:
                break
        assert step > 2
