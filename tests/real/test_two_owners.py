"""Two have one guest stand still at the same time: it goes on with the last, or that is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.guest.hold import quiesced
from tests.ground.images import assert_disk, make_chain, two_chains
from tests.ground.machines import machine
from tests.ground.sessions import files, lost, runs

PATIENCE = 60


class Gate:
    """One command that waits, once it is about to be sent, until it is let through."""

    def __init__(self, vm: qc.Session, patch: pytest.MonkeyPatch, command: str, node: str) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        execute = vm.execute

        async def late(sent: str, arguments: Any = None, **more: Any) -> Any:
            if sent == command and arguments["node"] == node:
                self.reached.set()
                await self.opened.wait()
            return await execute(sent, arguments, **more)

        patch.setattr(vm, "execute", late)


async def recycle(vm: qc.Session, disk: str, fresh: Path) -> qc.CommitOutcome:
    job = await vm.commit(disk, policy=qc.Recycle(str(fresh)))
    return await job.wait()


async def test_a_guest_goes_on_with_the_last_of_two_recycles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = two_chains(folder)
    fresh = [folder / "fresh1", folder / "fresh2"]
    async with (
        machine(folder, *chains, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        asyncio.timeout(PATIENCE),
    ):
        first, second = (Gate(vm, monkeypatch, "blockdev-snapshot", c.base.stem) for c in chains)
        one = asyncio.create_task(recycle(vm, "vda", fresh[0]))
        await first.reached.wait()
        two = asyncio.create_task(recycle(vm, "vdb", fresh[1]))
        await second.reached.wait()
        first.opened.set()
        assert (await one).warnings == []
        assert not await runs(qemu)  # else it would write to the base of the other
        second.opened.set()
        assert (await two).warnings == []
        assert await runs(qemu)
        await qemu.quit()
    for chain, path in zip(chains, fresh, strict=True):
        assert_disk(path, chain.pictures[-1])
        assert_disk(chain.base, chain.pictures[-1])


async def test_a_guest_that_a_discard_leaves_stopped_stays_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = two_chains(folder)
    async with (
        machine(folder, *chains, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        asyncio.timeout(PATIENCE),
    ):
        gate = Gate(vm, monkeypatch, "blockdev-snapshot", chains[1].base.stem)
        recycling = asyncio.create_task(recycle(vm, "vdb", folder / "fresh2"))
        await gate.reached.wait()
        made = await vm.discard("vda", guest="stop")
        gate.opened.set()
        await recycling
        assert not await runs(qemu)
        await qemu.quit()
    assert_disk(Path(made.overlay), chains[0].pictures[0])
    assert_disk(chains[1].base, chains[1].pictures[-1])


async def test_a_recycle_in_a_pause_lets_nobody_go_on(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        asyncio.timeout(PATIENCE),
    ):
        async with quiesced(vm, "pause", limit=PATIENCE):
            await recycle(vm, "vda", folder / "fresh")
            assert not await runs(qemu)
        assert await runs(qemu)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("last", ["blockdev-snapshot", "blockdev-reopen"])
async def test_nothing_is_discarded_under_a_guest_that_somebody_lets_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        qc.Session.connect(qemu.qmp2) as other,
    ):
        execute = vm.execute

        async def disturbed(command: str, *more: Any, **options: Any) -> Any:
            answer = await execute(command, *more, **options)
            if command.endswith(last):
                await other.execute("cont")
            return answer

        monkeypatch.setattr(vm, "execute", disturbed)
        with pytest.raises(qc.CommitFailed, match="somebody let the guest"):
            await vm.discard("vda", guest="reset")
        assert await files(vm) == [chain.top, chain.base]
        assert await runs(vm)
        await other.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_what_a_guest_may_have_written_before_its_reset_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder)
    fresh = folder / "fresh"
    async with (
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        qc.Session.connect(qemu.qmp2) as other,
    ):
        execute = vm.execute

        async def disturbed(command: str, *more: Any, **options: Any) -> Any:
            if command == "system_reset" or (command, *more[:1]) == (
                "blockdev-snapshot",
                {"node": chain.base.stem, "overlay": f"{job.id}-top"},
            ):
                await other.execute("cont")
            return await execute(command, *more, **options)

        job = await vm.commit("vda", policy=qc.Hold(), job_id="qmpcommit-a")
        monkeypatch.setattr(vm, "execute", disturbed)
        await job.ready()
        job.decide(qc.Recycle(str(fresh)), "caller")
        outcome = await job.wait()
        assert outcome.action == "recycle"
        assert f"so that {chain.base} may hold what it wrote" in outcome.warnings[0]
        made = await vm.discard("vda", guest="reset")
        assert "belongs to what was discarded" in made.warnings[0]
        assert await runs(vm)
        await other.close()
        await qemu.quit()
    assert_disk(Path(made.overlay), chain.pictures[-1])


async def test_what_a_guest_may_have_written_while_a_group_had_it_stand_still_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = two_chains(folder)
    fresh = [folder / "fresh1", folder / "fresh2"]
    async with (
        machine(folder, *chains, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        qc.Session.connect(qemu.qmp2) as other,
        asyncio.timeout(PATIENCE),
    ):
        last = Gate(vm, monkeypatch, "blockdev-snapshot", chains[1].base.stem)
        policies = {disk: qc.Recycle(str(p)) for disk, p in zip(("vda", "vdb"), fresh, strict=True)}
        group = asyncio.create_task(vm.commit_group(policies))
        await last.reached.wait()
        assert not await runs(other)
        await other.execute("cont")
        last.opened.set()
        outcome = await group
        assert outcome.action == "recycle"
        (warning,) = outcome.warnings
        assert f"let the guest of {vm.name} go on before its fresh overlays lay" in warning
        assert await runs(other)
        await other.close()
        await qemu.quit()
    for chain, path in zip(chains, fresh, strict=True):
        assert_disk(path, chain.pictures[-1])
        assert_disk(chain.base, chain.pictures[-1])


class Late:
    """Where the step that stops a guest can't be written down, once it is let through."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    async def note(self, step: str, state: object = None, **facts: Any) -> None:
        if step in ("freeze", "stop"):
            self.reached.set()
            await self.opened.wait()
            raise OSError("no room")

    def moved(self, state: object) -> None:
        pass


@pytest.mark.parametrize("group", [False, True], ids=["pause", "group"])
async def test_a_guest_goes_on_where_the_last_of_two_gives_up(group: bool, folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        asyncio.timeout(PATIENCE),
    ):
        notes = Late()

        async def in_vain() -> None:
            if group:
                policies = {"vda": qc.Recycle(str(folder / "fresh"))}
                await vm.commit_group(policies, hold_limit=PATIENCE, ledger=notes)
            async with quiesced(vm, "pause", limit=PATIENCE, ledger=notes):
                raise AssertionError("it was not noted")

        async with quiesced(vm, "pause", limit=PATIENCE):
            second = asyncio.create_task(in_vain())
            await notes.reached.wait()
        notes.opened.set()
        with pytest.raises(qc.QmpCommitError, match="no room"):
            await second
        assert await runs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("held", [False, True], ids=["not started", "paused anew"])
async def test_a_guest_is_not_taken_for_one_that_stood_still_in_another_qemu(
    held: bool, folder: Path
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, running=True) as qemu:
        vm = await qc.Session.connect(qemu.qmp)
        former = quiesced(vm, "pause", limit=PATIENCE)
        await former.__aenter__()
        qemu.kill()
        await lost(vm)
    async with machine(folder, chain) as qemu:
        if held:
            await qemu.execute("cont")
            async with quiesced(vm, "pause", limit=PATIENCE):
                assert not await runs(qemu)
            assert await runs(qemu)
        await former.__aexit__(None, None, None)
        assert await runs(qemu) is held
        await vm.close()
