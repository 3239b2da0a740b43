"""A process is killed at any step of any work; then one `recover` puts all of it right."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

import qmpcommit as qc
from tests.cli.command import ENVIRONMENT
from tests.ground.images import Chain, assert_disk, make_chain, read
from tests.ground.machines import Machine, machine
from tests.ground.places import STRIDE, first
from tests.real.killable_work import WORK

pytestmark = pytest.mark.timeout(1800)

KILLABLE = [sys.executable, "-m", "tests.real.killable_work"]
WORKS = [work for work in WORK if not work.startswith("recover")]
DECIDE = {"pivot": "pivot", "keep": "keep", "group pivot": "pivot", "group keep": "keep"}
KILLED = -signal.SIGKILL


async def killed(qemu: Machine, work: str, place: int, folder: Path) -> tuple[int, list[str]]:
    """Run the work's process until it dies at that place: its status, the places it passed."""
    places = folder / "places"
    places.unlink(missing_ok=True)
    words = [qemu.qmp, work, str(place), str(places), str(folder)]
    process = await asyncio.create_subprocess_exec(*KILLABLE, *words, env=ENVIRONMENT)
    status = await asyncio.wait_for(process.wait(), 120)
    passed = places.read_text().splitlines() if places.exists() else []
    return status, passed


def chains_in(folder: Path) -> list[Chain]:
    """Two disks, the first of three layers."""
    return [
        make_chain(folder, 3),
        make_chain(folder, names=("base2", "top2")),
    ]


async def assert_nothing_left(vm: qc.Session, folder: Path, chains: list[Chain]) -> list[Path]:
    """Of no work anything is left; the files that the disks write to."""
    assert [job["id"] for job in await vm.execute("query-jobs")] == []
    disks = await vm.disks()
    graph = await vm.graph()
    assert not graph.claims
    used = {name for disk in disks for image in disk.chain for name in (image.node_name,)}
    used |= {below for name in used for below in graph.nodes[name].children.values()}
    assert graph.nodes.keys() - used == set(), "nodes that no disk uses"
    active = [Path(disk.active.filename) for disk in disks if disk.active is not None]
    mine = {path for chain in chains for path in chain.files}
    assert set(folder.glob("*.qcow2")) - mine <= set(active), "files that no disk uses"
    assert (await vm.execute("query-status"))["status"] == "running"
    assert (await vm.recover(look_only=True)).findings == ()
    return active


def assert_whole(work: str, active: list[Path], chains: list[Chain]) -> None:
    """Each disk shows what it showed, or, where it was discarded, what its base shows."""
    for path, chain in zip(active, chains, strict=True):
        discards = work.startswith("discard") and path not in chain.files
        if not discards:
            assert_disk(path, chain.pictures[-1])
        else:
            assert read(path) == bytes(chain.pictures[-2].data)
    if work == "discard":
        assert len({path in chain.files for path, chain in zip(active, chains, strict=True)}) == 1


@pytest.mark.parametrize("work", WORKS)
async def test_killed_anywhere_it_is_recovered(folder: Path, work: str) -> None:
    count = 0
    decide = DECIDE.get(work, "abort")
    for place in itertools.count(first(), STRIDE):
        at = folder / f"at-{place}"
        at.mkdir()
        chains = chains_in(at)
        async with machine(at, *chains, running=True) as qemu:
            status, passed = await killed(qemu, work, place, at)
            print(f"{work}: killed at {place}: {passed[-1:]}, {status}")
            assert status in (0, KILLED)
            async with qc.Session.connect(qemu.qmp) as vm:
                found = await vm.recover(decide=decide)  # type: ignore[arg-type]
                print("\n".join(f"  {each} -> {each.result}" for each in found.findings))
                assert found.left == (), found.left
                active = await assert_nothing_left(vm, at, chains)
            await qemu.quit()
        assert_whole(work, active, chains)
        shutil.rmtree(at)
        if status == 0:
            break
        count += 1
    print(f"{work}: killed at {count} places, or every {STRIDE}., all recovered")


@pytest.mark.parametrize("work", WORKS)
async def test_the_recovery_is_killed_too(folder: Path, work: str) -> None:
    decide = DECIDE.get(work, "abort")
    recovery = "recover" if decide == "abort" else f"recover, {decide}"
    count = 0
    for place in itertools.count(first(), STRIDE):
        at = folder / f"at-{place}"
        at.mkdir()
        chains = chains_in(at)
        async with machine(at, *chains, running=True) as qemu:
            status, passed = await killed(qemu, work, place, at)
            again, then = await killed(qemu, recovery, random.randint(1, 6), at)
            print(f"{work}: killed at {place}: {passed[-1:]}, {status}; then {then[-1:]}, {again}")
            async with qc.Session.connect(qemu.qmp) as vm:
                found = await vm.recover(decide=decide)  # type: ignore[arg-type]
                print("\n".join(f"  {each} -> {each.result}" for each in found.findings))
                assert found.left == (), found.left
                active = await assert_nothing_left(vm, at, chains)
            await qemu.quit()
        assert_whole(work, active, chains)
        shutil.rmtree(at)
        if status == 0:
            break
        count += again == KILLED
    print(f"{work}: the recovery was killed too {count} times, all recovered")
