"""Windows and cycles whose process is killed anywhere go on from their ledger in a file."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground import forked
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.places import STRIDE, first
from tests.ground.sessions import runs

pytestmark = pytest.mark.timeout(1800)

KILLABLE = "tests.real.killable_ledger"
DEVICE = "/machine/peripheral/vda/virtio-backend"
KILLED = -signal.SIGKILL


class World:
    """The VMs of one run with their chains, and the ledger of what is done to them."""

    def __init__(self, folder: Path, work: str) -> None:
        self.folder, self.work = folder, work
        self.ledger = folder / "ledger"
        self.qemus: list[Machine] = []
        self.chains: list[list[Chain]] = []
        self.passed: list[str] = []

    async def begin(self, stack: AsyncExitStack) -> None:
        """They run from now on."""
        for name in ("a",) if self.work in ALONE else ("a", "b"):
            at = self.folder / name
            at.mkdir(parents=True)
            chains = [make_chain(at, 3), make_chain(at, names=("base2", "top2"))]
            qemu = await stack.enter_async_context(machine(at, *chains, running=True))
            self.qemus.append(qemu)
            self.chains.append(chains)

    async def run(self, place: int, work: str) -> int:
        """A process that dies at that place: its status."""
        places = self.folder / "places"
        places.unlink(missing_ok=True)
        qmps = ",".join(qemu.qmp for qemu in self.qemus)
        words = [qmps, work, str(self.ledger), str(place), str(places)]
        status, _ = await forked.run(KILLABLE, *words)
        assert status in (0, KILLED)
        self.passed += places.read_text().splitlines() if places.exists() else []
        return status

    @property
    def outcome(self) -> list[dict[str, Any]]:
        """What the last process came to."""
        return list(json.loads((self.folder / "outcome").read_text()))

    async def nothing_left(self) -> list[list[Path]]:
        """No job, node, claim, file or paused guest; what each disk writes to."""
        active = []
        for qemu, chains in zip(self.qemus, self.chains, strict=True):
            async with qc.Session.connect(qemu.qmp) as vm:
                assert await vm.execute("query-jobs") == []
                disks = await vm.disks()
                graph = await vm.graph()
                used = {image.node_name for disk in disks for image in disk.chain}
                used |= {below for name in used for below in graph.nodes[name].children.values()}
                assert graph.nodes.keys() - used == set(), "nodes that no disk uses"
                assert not graph.claims
                assert await runs(vm)
                files = [Path(disk.chain[0].filename) for disk in disks]
                mine = {path for chain in chains for path in chain.files}
                assert {*qemu.folder.glob("*.q*")} - mine <= {*files}, "files of nobody's"
                active.append(files)
            await qemu.quit()
        return active


async def died(folder: Path, work: str, place: int, again: int) -> bool:
    """Whether it was killed at that place; and then, at another, who goes on with it."""
    world = World(folder, work)
    async with AsyncExitStack() as stack:
        await world.begin(stack)
        status = await world.run(place, work)
        where = world.passed[-1]
        if again and status and world.ledger.exists():
            await world.run(again, "resume")
            where = f"{where}, {world.passed[-1]}"
        print(f"{work}: killed at {place}: {where}")
        if world.ledger.exists():
            assert world.ledger.stat().st_mode & 0o777 == 0o600
            assert await world.run(0, "resume") == 0, where
        else:  # nothing was begun
            for qemu in world.qemus:
                async with qc.Session.connect(qemu.qmp) as vm:
                    with pytest.raises(qc.JobNotFound, match="nothing was begun"):
                        await qc.resume(qc.FileLedger(world.ledger), [vm])
                    await vm.recover()  # the claims of a dead process, which hold nobody up
        CHECKS[work](world, await world.nothing_left())
    shutil.rmtree(folder)
    return status != 0


def _window_is_closed(world: World, active: list[list[Path]]) -> None:
    """What was written meanwhile is in the files that stood still."""
    for number, (files, chains) in enumerate(zip(active, world.chains, strict=True)):
        assert files == [chain.top for chain in chains]
        for disk, chain in zip(("vda", "vdb"), chains, strict=True):
            picture = chain.pictures[-1]
            wrote = f"wrote {disk}" if world.work == "window" else f"wrote {number}"
            if wrote in world.passed and (world.work == "window" or disk == "vda"):
                picture.fill(0, 65536, 85)
            assert_disk(chain.top, picture)
            assert_disk(chain.base, chain.pictures[0])
    for outcome in world.outcome if world.ledger.exists() else ():
        assert outcome["action"] == "pivot"


def _round_has_ended(world: World, active: list[list[Path]]) -> None:
    """All disks of it have begun anew, or none where nothing was noted."""
    for files, chains in zip(active, world.chains, strict=True):
        for number, (active_now, chain) in enumerate(zip(files, chains, strict=True)):
            begun = world.ledger.exists() and (number == 0 or world.work == "discard two")
            assert (active_now == chain.top) is not begun
            kept = not begun or world.work.startswith("keep")
            assert_disk(active_now, chain.pictures[-1 if kept else -2])
            assert chain.top.exists() is not (begun and world.work != "discard two")
    ends = world.outcome if world.ledger.exists() else []
    assert {end.get("result", "discarded") for end in ends} <= {
        "kept" if world.work.startswith("keep") else "discarded"
    }
    overlays = sorted(str(files[0]) for files in active)
    if ends and world.work != "discard two":
        assert sorted(end["overlay"] for end in ends) == overlays


ALONE = ("window", "keep one", "discard two")
CHECKS: dict[str, Any] = {
    "window": _window_is_closed,
    "windows": _window_is_closed,
    "keep one": _round_has_ended,
    "keep": _round_has_ended,
    "discard": _round_has_ended,
    "discard two": _round_has_ended,
}


@pytest.mark.parametrize("work", CHECKS)
async def test_killed_anywhere_it_goes_on_from_the_ledger(work: str, folder: Path) -> None:
    count = 0
    for place in itertools.count(first(), STRIDE):
        if not await died(folder / str(place), work, place, 0):
            break
        count += 1
    print(f"{work}: killed at {count} places")
    assert count >= 12 // STRIDE


@pytest.mark.parametrize("work", CHECKS)
async def test_killed_again_while_it_goes_on(work: str, folder: Path) -> None:
    """The second process too, at each of its places."""
    for place in itertools.count(first(), max(STRIDE, 7)):
        for again in range(first(), 12, max(STRIDE, 5)):
            if not await died(folder / f"{place}-{again}", work, place, again):
                return


@pytest.mark.parametrize("decided", [False, True])
async def test_a_guest_never_waits_for_a_qemu_that_has_ended(folder: Path, decided: bool) -> None:
    """Which of both ways its own disk goes, the ledger tells."""
    rehearsed, world = World(folder / "0", "discard"), World(folder / "1", "discard")
    async with AsyncExitStack() as stack:
        await rehearsed.begin(stack)
        assert await rehearsed.run(0, "discard") == 0
        where = "before blockdev-reopen" if decided else "after blockdev-snapshot"
        await world.begin(stack)
        assert await world.run(rehearsed.passed.index(where) + 1, "discard") == KILLED
        here, gone = world.qemus
        gone.kill()
        await gone.ended()
        async with (
            qc.Session.connect(here.qmp) as vm,
            machine(gone.folder, *world.chains[1]) as anew,
            qc.Session.connect(anew.qmp) as other,
        ):
            for _ in range(2):
                boot = "its changes were to be discarded" if decided else "nothing was discarded"
                with pytest.raises(qc.VMGone, match=f"{boot}.* boot"):
                    await qc.resume(qc.FileLedger(world.ledger), [vm, other])
                assert await runs(here)
            (disk, _) = await vm.disks()
            assert (disk.chain[0].filename == str(world.chains[0][0].top)) is not decided
            await anew.quit()
        await here.quit()
    for chains in world.chains:
        assert_disk(chains[0].base, chains[0].pictures[0])


async def test_a_window_is_opened_by_one_process_and_closed_by_another(folder: Path) -> None:
    """With one ledger, which tells afterwards how it was closed; or what has to be done first."""
    chain, other = make_chain(folder), make_chain(folder, names=("base2", "top2"))
    path = folder / "ledger"
    async with machine(folder, chain, other, running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            window = await vm.open_window(["vda"], ledger=qc.FileLedger(path))
            for claim in window.claims.values():
                claim.abandon()  # as if killed
            with pytest.raises(qc.CommitFailed, match="holds a window that has not ended"):
                await vm.open_window(["vdb"], ledger=qc.FileLedger(path))
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.InvalidRequest, match=r"qc.resume\(ledger, vms\)"):
                await vm.resume(qc.FileLedger(path))
            (outcome,) = await vm.close_window([window["vda"]], ledger=qc.FileLedger(path))
            assert await qc.resume(qc.FileLedger(path), vm) == (outcome,)
            async with vm.snapshot(["vda"], ledger=qc.FileLedger(path)):  # the next one
                pass
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_window_whose_qemu_has_ended_is_not_forgotten(folder: Path) -> None:
    chain = make_chain(folder)
    path = folder / "ledger"
    async with machine(folder, chain, running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            window = await vm.open_window(["vda"], ledger=qc.FileLedger(path))
            overlay = Path(window["vda"].overlay)
            line = f'qemu-io -d {DEVICE} "write -P 85 0 64k"'
            await vm.execute("human-monitor-command", {"command-line": line})
            for claim in window.claims.values():
                claim.abandon()
        await qemu.quit()
    async with machine(folder, chain, running=True) as qemu:  # without the newest data
        async with qc.Session.connect(qemu.qmp) as vm:
            for _ in range(2):
                with pytest.raises(qc.WindowError, match="holds the newest data") as failed:
                    await qc.resume(qc.FileLedger(path), vm)
                assert failed.value.overlays == [str(overlay)]
            assert overlay.exists()
            assert await runs(vm)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
    written = chain.pictures[-1].copy()
    written.fill(0, 65536, 85)
    assert_disk(overlay, written)
