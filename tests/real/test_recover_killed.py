"""A process is killed at any step of any work; then one `recover` puts all of it right."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground import forked
from tests.ground.images import Chain, assert_disk, make_chain, read
from tests.ground.machines import Machine, machine
from tests.ground.places import STRIDE, first, some
from tests.real.killable_work import WORK
from tests.real.test_converge import DEVICE, limits_in, limits_of

pytestmark = pytest.mark.timeout(3600)

KILLABLE = "tests.real.killable_work"
WORKS = [work for work in WORK if not work.startswith("recover")]
DECIDE: dict[str, Any] = {
    "pivot": "pivot",
    "keep": "keep",
    "group pivot": "pivot",
    "group keep": "keep",
}
"""What is said of jobs that are READY; where nothing else is, "abort"."""

STOPPED = ("recycle", "discard one", "group recycle")
"""Works that are tried on a guest as well that does not run."""

KILLED = -signal.SIGKILL


async def killed(
    qemus: Sequence[Machine], work: str, place: int, folder: Path, *die_in: str
) -> tuple[int, list[str]]:
    """Run the work's process until it dies at that place: its status, the places it passed."""
    places = folder / "places"
    places.unlink(missing_ok=True)
    qmps = ",".join(qemu.qmp for qemu in qemus)
    words = [qmps, work, str(place), str(places), str(folder), *die_in]
    status, _ = await forked.run(KILLABLE, *words)
    return status, places.read_text().splitlines() if places.exists() else []


LIMITS = {"bps_wr": 50_000_000, "bps_wr_max": 70_000_000, "bps_wr_max_length": 4, "iops": 900}


async def limits(vm: qc.Session) -> list[Any]:
    """Those of the devices and those of all throttle groups that are there."""
    devices = [limits_in(device) for device in await vm.execute("query-block")]
    objects = await vm.execute("qom-list", {"path": "/objects"})
    names = [each["name"] for each in objects if each["type"] == "child<throttle-group>"]
    return [*devices, *[(name, await limits_of(vm, name)) for name in names]]


class World:
    """The VMs of one run, with two disks each, the first of three layers."""

    def __init__(self, folder: Path, work: str, *, running: bool) -> None:
        self.folder, self.work, self.running = folder, work, running
        self.qemus: list[Machine] = []
        self.chains: list[list[Chain]] = []
        self.limits: list[Any] = []

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[None]:
        """In the block they run."""
        async with AsyncExitStack() as stack:
            for name in ("a", "b") if self.work.startswith("two VMs") else ("a",):
                at = self.folder / name
                at.mkdir(parents=True)
                chains = [make_chain(at, 3), make_chain(at, names=("base2", "top2"))]
                filters = ("throttle",) if "filter" in self.work else ()
                qemu = await stack.enter_async_context(
                    machine(at, *chains, running=self.running, filters=filters)
                )
                self.qemus.append(qemu)
                self.chains.append(chains)
                if "slowed" in self.work:
                    async with qc.Session.connect(qemu.qmp) as vm:
                        former = {**DEVICE, **LIMITS, "group": "theirs"}
                        await vm.execute("block_set_io_throttle", former)
                        self.limits = await limits(vm)
            yield

    async def recovered(self, decide: Any) -> None:
        """One call, and nothing is left; the disks show what they have to."""
        actives = []
        async with AsyncExitStack() as stack:
            vms = [
                await stack.enter_async_context(qc.Session.connect(qemu.qmp)) for qemu in self.qemus
            ]
            await self.put_right(vms, decide)
            for vm, chains in zip(vms, self.chains, strict=True):
                actives.append(await self._nothing_left(vm, chains))
            assert (await qc.recover(vms, look_only=True, folders=[self.folder])).findings == ()
        for qemu in self.qemus:
            await qemu.quit()
        self._whole(actives)

    async def put_right(self, vms: Sequence[qc.Session], decide: Any) -> None:
        """All of it, at once."""
        found = await qc.recover(vms, decide=decide, folders=[self.folder])
        print("\n".join(f"  {each} -> {each.result}" for each in found.findings))
        assert found.left == ()

    async def _nothing_left(self, vm: qc.Session, chains: list[Chain]) -> list[Path]:
        assert [job["id"] for job in await vm.execute("query-jobs")] == []
        disks = await vm.disks()
        graph = await vm.graph()
        assert not graph.claims
        if "slowed" in self.work:
            assert await limits(vm) == self.limits
        used = {name for disk in disks for name in disk.filters}
        used |= {image.node_name for disk in disks for image in disk.chain}
        used |= {below for name in used for below in graph.nodes[name].children.values()}
        assert graph.nodes.keys() - used == set(), "nodes that no disk uses"
        active = [Path(disk.active.filename) for disk in disks if disk.active is not None]
        mine = {path for chain in chains for path in chain.files}
        left = {path for folder in (self.folder, active[0].parent) for path in folder.glob("*.q*")}
        assert left - mine <= set(active), "files that no disk uses"
        status = (await vm.execute("query-status"))["status"]
        stops = self.work == "discard and stop" and active[0] not in mine
        if not self.running:
            assert status in ("prelaunch", "paused")
        elif stops:
            assert status in ("paused", "running")  # killed before it was stopped, or after
        else:
            assert status == "running"
        return active

    def _whole(self, actives: list[list[Path]]) -> None:
        """Each disk shows what it showed, or, where it was discarded, what its base shows."""
        discarded = set()
        for active, chains in zip(actives, self.chains, strict=True):
            for number, (path, chain) in enumerate(zip(active, chains, strict=True)):
                if "discard" in self.work and path not in chain.files:
                    assert read(path) == bytes(chain.pictures[-2].data)
                    discarded.add((number, True))
                else:
                    assert_disk(path, chain.pictures[-1])
                    discarded.add((number, False))
        if self.work == "discard":
            assert len({done for _, done in discarded}) == 1, "all or none"
        if self.work.startswith("two VMs"):
            ends = {active[0].name in ("base.qcow2",) or (0, True) in discarded
                    for active in actives}  # fmt: skip
            assert len(ends) == 1, "all or none"
            assert len({done for number, done in discarded if number == 0}) == 1, "all or none"


async def swept(
    folder: Path, work: str, *, running: bool = True, twice: bool = False
) -> tuple[int, int]:
    """Die at each place in turn, or at every so many: how many were tried, and died twice."""
    decide = DECIDE.get(work, "abort")
    count = again = 0
    for place in itertools.count(first(), STRIDE):
        world = World(folder / f"at-{place}", work, running=running)
        async with world.begin():
            status, passed = await killed(world.qemus, work, place, world.folder)
            print(f"{work}: killed at {place}: {passed[-1:]}, {status}")
            assert status in (0, KILLED)
            if twice:
                died, then = await killed(
                    world.qemus, f"recover, {decide}", random.randint(1, 6), world.folder
                )
                print(f"  the recovery too: {then[-1:]}, {died}")
                assert died in (0, KILLED)
                again += died == KILLED
            await world.recovered(decide)
        shutil.rmtree(world.folder)
        if status == 0:
            break
        count += 1
    return count, again


@pytest.mark.parametrize("work", WORKS)
async def test_killed_anywhere_it_is_recovered(folder: Path, work: str) -> None:
    count, _ = await swept(folder, work)
    print(f"{work} x every {STRIDE}. step: {count} run, {count} held")


@pytest.mark.parametrize("work", some(STOPPED))
async def test_a_guest_that_did_not_run_does_not_run_then(folder: Path, work: str) -> None:
    count, _ = await swept(folder, work, running=False)
    print(f"{work}, not running x every {STRIDE}. step: {count} run, {count} held")


@pytest.mark.parametrize("work", some(WORKS))
async def test_the_recovery_is_killed_too(folder: Path, work: str) -> None:
    count, again = await swept(folder, work, twice=True)
    print(f"{work} x every {STRIDE}. step, twice: {count} run ({again} died twice), {count} held")


async def test_who_takes_a_killed_job_up_puts_the_limits_back(folder: Path) -> None:
    world = World(folder / "vms", "slowed", running=True)
    async with world.begin():
        died = "after block_set_io_throttle"
        status, _ = await killed(world.qemus, world.work, 0, world.folder, died)
        assert status == KILLED
        async with qc.Session.connect(world.qemus[0].qmp) as vm:
            assert await limits(vm) != world.limits
            (job,) = await vm.query_jobs()
            following = await vm.adopt(job.id, policy=qc.Keep())
            assert await limits(vm) == world.limits
            assert (await following.wait()).action == "keep"
        await world.recovered("abort")
