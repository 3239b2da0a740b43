"""A group whose process is killed at any step while guests stand still: the next sees to it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.guest import marks as freeze_marks
from tests.cli.command import run as qmpcommit
from tests.ground import forked
from tests.ground.images import assert_disk, two_chains
from tests.ground.machines import Machine, machine
from tests.ground.places import STRIDE, first
from tests.ground.sessions import runs
from tests.real.test_agent import fake_agent

pytestmark = pytest.mark.timeout(900)

KILLABLE = "tests.real.killable_group"


async def killed(
    qemu: Machine, freeze: str, place: int, folder: Path, fresh: str = ""
) -> tuple[int, list[str]]:
    """Run the group's process until it dies at that place: its status, the places it passed."""
    places = folder / "places"
    places.unlink(missing_ok=True)
    words = [qemu.qmp, freeze, str(place), str(places), fresh]
    status, _ = await forked.run(KILLABLE, *words)
    return status, places.read_text().splitlines()


async def resolved(vm: qc.Session) -> None:
    """End the jobs that are left, as they are told to be."""
    assert (await vm.recover(decide="abort")).left == ()


@pytest.mark.parametrize("freeze", ["pause", "agent"])
async def test_killed_anywhere_the_next_group_lets_the_guest_go_on(
    folder: Path, freeze: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze_marks, "GRACE", 0.0)
    chains = two_chains(folder)
    seen: list[str] = []
    stood = 0
    async with machine(folder, *chains, running=True) as qemu, fake_agent(folder) as fake:
        how = "pause" if freeze == "pause" else fake.path
        place, status = first() - STRIDE, -signal.SIGKILL
        while status == -signal.SIGKILL:
            place += STRIDE
            status, places = await killed(qemu, how, place, folder)
            assert status in (0, -signal.SIGKILL)
            seen.append(places[-1])
            async with qc.Session.connect(qemu.qmp) as vm:
                running = await runs(vm)
                still = bool(fake.frozen) if freeze == "agent" else not running
                stood += still
                marks = await freeze_marks.marks(vm)
                assert len(marks) == 1 or not still, "frozen, and nobody can know"
                socket = {} if freeze == "pause" else {"agents": fake.path}
                again = vm.commit_group(["vda"], policy=qc.Keep(), freeze=freeze, **socket)  # type: ignore[arg-type]
                try:
                    await again
                except qc.JobConflict:
                    assert await vm.execute("query-jobs")
                assert await runs(vm)
                assert not fake.frozen
                assert await freeze_marks.marks(vm) == []
                await resolved(vm)
                assert await vm.execute("query-jobs") == []
                assert [len(disk.chain) for disk in await vm.disks()] == [2, 2]
        print(f"{freeze}: killed at {len(seen) - 1} places, at {stood} the guest stood still")
        assert stood >= 2 // STRIDE
        assert len(seen) >= 16 // STRIDE
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("recycled", [False, True])
async def test_what_is_left_is_named_by_each_command_and_can_be_let_go_on(
    folder: Path, recycled: bool
) -> None:
    fresh = str(folder / "fresh.qcow2") if recycled else ""
    chains = two_chains(folder)
    async with machine(folder, *chains, running=True) as qemu:
        place, places = 0, [""]
        while places[-1] != "after stop":
            if place:
                await let_go(qemu)
            place += 1
            _, places = await killed(qemu, "pause", place, folder, fresh)
        assert (await qemu.execute("query-status"))["status"] == "paused"
        close = f"'qmpcommit recover {qemu.qmp}' lets the guest go on"
        for words in (
            ("commit", qemu.qmp, "vda", "vdb", "--pivot"),
            ("cycle", qemu.qmp, "vda", "--keep-if", "true", "--reset"),
        ):
            said = await qmpcommit(*words)
            assert said.status == 1
            assert "the guest was paused for a group commit or cycle" in said.err
            assert close in said.err
            assert "has a block job" in said.err
        one = await qmpcommit("commit", qemu.qmp, "vda", "--pivot", "--json")
        assert one.error["type"] == "JobConflict"
        assert close in one.error["message"]
        for command in ("jobs", "chain"):
            told = await qmpcommit(command, qemu.qmp, "--json")
            assert told.status == 0
            (left,) = told.json["window_remains"]
            assert "paused for a group commit or cycle" in left["message"]
            assert left["next"] == f"qmpcommit recover {qemu.qmp}"
        assert (await qemu.execute("query-status"))["status"] == "paused"
        closed = await qmpcommit("window", "--close", qemu.qmp)
        assert closed.status == 0, closed.err
        assert await runs(qemu)
        for job in await qemu.execute("query-jobs"):
            assert (await qmpcommit("abort", qemu.qmp, job["id"])).status == 0
        again = await qmpcommit("commit", qemu.qmp, "vda", "vdb", "--pivot", "--freeze", "pause")
        assert again.status == 0, again.err
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


async def let_go(qemu: Machine) -> None:
    """As it was before a process was killed."""
    async with qc.Session.connect(qemu.qmp) as vm:
        await vm.close_windows()
        await resolved(vm)
