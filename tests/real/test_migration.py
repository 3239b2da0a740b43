"""A VM that migrates: nothing changes the chain that the other host has open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit import in_use
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.proxy import Strike, let_pass, proxy
from tests.ground.sessions import files, runs

CRAWLING = {"max-bandwidth": 4096}


async def until(qemu: Machine, *statuses: str) -> None:
    """The migration is in one of these states."""
    async with asyncio.timeout(20):
        while (await qemu.execute("query-migrate")).get("status") not in statuses:
            pass


@asynccontextmanager
async def destination(folder: Path) -> AsyncIterator[Callable[[Machine], Awaitable[None]]]:
    """What begins a migration to a host that listens, and takes nothing; it stays active."""
    held = []

    async def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append((reader, writer))

    async def migrate(qemu: Machine) -> None:
        await qemu.execute("migrate-set-parameters", **CRAWLING)
        await qemu.execute("migrate", uri=f"unix:{folder}/to")
        await until(qemu, "active")

    server = await asyncio.start_unix_server(taken, folder / "to", limit=4096)
    try:
        yield migrate
    finally:
        for _, writer in held:
            writer.transport.abort()
        server.close()


async def cancel(qemu: Machine) -> None:
    await qemu.execute("migrate_cancel")
    await until(qemu, "cancelled")


async def test_no_verb_changes_a_disk_of_a_vm_that_migrates(folder: Path) -> None:
    chain = make_chain(folder, layers=3)
    fresh = str(folder / "fresh")
    async with (
        destination(folder) as migrate,
        machine(folder, chain) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        verbs: list[Callable[[], Any]] = [
            *(
                lambda policy=policy: vm.commit("vda", policy=policy)
                for policy in (qc.Pivot(), qc.Keep(), qc.Abort(), qc.Hold(), qc.Recycle(fresh))
            ),
            lambda: vm.commit("vda", top=1),
            lambda: vm.plan("vda", policy=qc.Pivot()),
            lambda: vm.commit_group(["vda"], policy=qc.Pivot()),
            lambda: vm.open_window(["vda"]),
            vm.close_windows,
            lambda: vm.discard("vda", guest="reset", delete=True),
            lambda: vm.cycle("vda", keep_if=["false"], guest="reset", delete=True),
            lambda: vm.cycle("vda", keep_if=["true"], guest="reset", delete=True),
            lambda: vm.flatten("vda", keep=1, delete=True),
        ]
        before = sorted(folder.iterdir())
        await migrate(qemu)
        for verb in verbs:
            with pytest.raises(qc.VMStateError, match=r"migrat.*Nothing was sent"):
                await verb()
        assert [*await files(vm)] == chain.files[::-1]
        assert sorted(folder.iterdir()) == before
        assert (await qemu.execute("query-migrate"))["status"] == "active"
        await cancel(qemu)
        await vm.flatten("vda", keep=1)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("state", ["inmigrate", "pre-switchover", "postmigrate"])
async def test_a_vm_whose_disks_are_another_hosts(folder: Path, state: str) -> None:
    chain = make_chain(folder)
    extra = ("-incoming", "defer") if state == "inmigrate" else ()
    async with (
        machine(folder, chain, extra=extra) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        if state != "inmigrate":
            held = {"capability": "pause-before-switchover", "state": state == "pre-switchover"}
            await qemu.execute("migrate-set-capabilities", capabilities=[held])
            await qemu.execute("cont")
            await qemu.execute("migrate", uri="exec:cat >/dev/null")
            await until(qemu, "pre-switchover", "completed")
        with pytest.raises(qc.VMStateError, match="migrat"):
            await vm.commit("vda", policy=qc.Pivot())
        with pytest.raises(qc.VMStateError, match="migrat"):
            await vm.cycle("vda", keep_if=["false"], guest="reset", delete=True)
        assert chain.top.exists()


async def test_a_window_stays_open_while_its_vm_migrates(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        destination(folder) as migrate,
        machine(folder, chain) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        window = await vm.open_window(["vda"])
        await migrate(qemu)
        with pytest.raises(qc.WindowError, match="being migrated"):
            await vm.close_window(window)
        overlay = Path(window["vda"].overlay)
        assert await files(vm) == [overlay, *chain.files[::-1]]
        assert overlay.exists()
        await cancel(qemu)
        (outcome,) = await vm.close_window(window)
        assert outcome.deleted == [str(overlay)]
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("at", ["blockdev-snapshot", "blockdev-reopen"])
async def test_a_migration_that_begins_while_an_overlay_is_discarded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Before the overlay is exchanged all is put back, as the destination knows it."""
    chain = make_chain(folder)
    noted = {"blockdev-snapshot": "blockdev-create", "blockdev-reopen": "blockdev-snapshot"}[at]
    async with (
        destination(folder) as migrate,
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        execute = vm.execute

        async def late(sent: str, *more: Any, **options: Any) -> Any:
            answer = await execute(sent, *more, **options)
            if sent == noted:
                monkeypatch.setattr(vm, "execute", execute)
                await migrate(qemu)
            return answer

        monkeypatch.setattr(vm, "execute", late)
        with pytest.raises(qc.VMStateError, match="being migrated"):
            await vm.discard("vda", guest="reset", delete=True)
        assert await files(vm) == chain.files[::-1]
        assert (await qemu.execute("query-migrate"))["status"] == "active"
        assert await runs(qemu)
        await cancel(qemu)
        await qemu.quit()
    assert {path.name for path in folder.glob("*.qcow2")} <= {each.name for each in chain.files}
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("policy", ["recycle", "pivot", "hold", "adopt", "keep"])
async def test_a_migration_that_begins_while_a_job_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """It may end well if the job is over before, on the chain that was there at its beginning."""
    chain = make_chain(folder)
    async with (
        destination(folder) as migrate,
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        if policy != "pivot":
            monkeypatch.setattr(in_use, "FRESH", 0.0)  # the last look was long ago
            job = await vm.commit("vda", policy=qc.Hold())
            await job.ready()
            await migrate(qemu)
            if policy == "adopt":
                await job.detach()
                job = await vm.adopt(job.id)
                await job.ready()
            if policy == "keep":  # which leaves the chain as it is
                await job.keep()
                assert (await job.wait()).action == "keep"
            else:
                job.recycle(folder / "fresh") if policy == "recycle" else job.pivot()
                with pytest.raises(qc.CommitFailed, match="being migrated"):
                    await job.wait()
            assert await files(vm) == chain.files[::-1]
            assert not (folder / "fresh").exists()
            assert await runs(qemu)
        else:
            job = await vm.commit(
                "vda", policy=qc.Pivot(), delete=True, on_pivot=lambda outcome: migrate(qemu)
            )
            outcome = await job.wait()
            assert (outcome.action, outcome.deleted) == ("pivot", [])
            assert [text for text in outcome.warnings if "being migrated" in text]
            assert chain.top.exists()
        await cancel(qemu)
        await qemu.quit()
    assert_disk(chain.base if policy == "pivot" else chain.top, chain.pictures[-1])


@pytest.mark.parametrize("verb", ["pivot", "overlay"])
async def test_a_migration_that_begins_just_before_what_changes_the_chain(
    folder: Path, verb: str
) -> None:
    """After the last look: a job is not pivoted then, and an overlay that lies is told of."""
    chain = make_chain(folder)
    async with (
        destination(folder) as migrate,
        machine(folder, chain, running=True) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path) as vm,
    ):
        between.to_qemu = Strike("block-commit" if verb == "pivot" else "transaction", "hold")
        asked = asyncio.create_task(
            vm.commit("vda", policy=qc.Pivot(), delete=True)
            if verb == "pivot"
            else vm.overlay(["vda"], overlay=folder / "fresh")
        )
        await between.held.wait()
        await migrate(qemu)
        between.to_qemu = let_pass
        between.release()
        if verb == "pivot":
            with pytest.raises(qc.CommitFailed, match="being migrated"):
                await (await asked).wait()  # type: ignore[attr-defined]
            assert await files(vm) == chain.files[::-1]
        else:
            (laid,) = (await asked).disks  # type: ignore[attr-defined]
            assert [text for text in laid.warnings if "being migrated" in text]
        assert chain.top.exists()
        await cancel(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
