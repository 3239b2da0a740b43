"""After a pivot: nodes closed, files gone or renamed, and nothing else; and fresh overlays."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block import files as block_files
from qmpcommit.block import identity
from qmpcommit.cli.show import outcome_text
from qmpcommit.commit.stale_layers import BeforeClosing
from tests.ground.images import (
    MIB,
    Chain,
    Picture,
    Write,
    assert_disk,
    create,
    make_chain,
    run,
    write,
)
from tests.ground.machines import Style, machine, node_options, storage_daemon
from tests.ground.nbd import Nbd, Writer
from tests.ground.proxy import REFUSAL, Strike, proxy
from tests.ground.qemu import QEMU
from tests.ground.sessions import files

BULK = 33 * MIB


async def nodes(vm: qc.Session) -> set[str]:
    return {node.node_name or "" for node in await vm.query_named_block_nodes()}


@pytest.mark.parametrize("style", ["blockdev", "drive", "implicit"])
async def test_the_stale_nodes_are_closed_and_their_locks_gone(style: Any, folder: Path) -> None:
    chain = make_chain(folder, 3)
    seen: list[set[str]] = []

    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        seen.append(await nodes(vm))

    async with machine(folder, chain, style=style) as qemu, qc.Session.connect(qemu.qmp) as vm:
        outcome = await (await vm.commit("vda", policy=qc.Pivot(), on_pivot=on_pivot)).wait()
        assert (outcome.deleted, outcome.warnings) == ([], [])
        assert not {"top", "mid"} & seen[0], "nobody commits them while the hook runs"
        assert not {"top", "mid"} & await nodes(vm)
        for path in chain.files[1:]:
            assert path.exists(), "by default the files stay"
            run(QEMU.io, "-f", "raw", "-c", "read 0 512", path)  # fails on a lock
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("within", [False, True])
async def test_file_nodes_with_a_name_are_closed_too(within: bool, folder: Path) -> None:
    """Those that were made `within` the overlay's node go with it."""
    chain = make_chain(folder)
    file = f"file.driver=file,file.node-name=tf,file.filename={chain.top}" if within else "file=tf"
    extra = ["-blockdev", f"driver=file,node-name=bf,filename={chain.base}",
             "-blockdev", "driver=qcow2,node-name=b,file=bf",
             "-blockdev", f"driver=qcow2,node-name=t,{file},backing=b",
             "-device", "virtio-blk-pci,drive=t,id=vda"]  # fmt: skip
    if not within:
        extra = ["-blockdev", f"driver=file,node-name=tf,filename={chain.top}", *extra]
    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True)
        outcome = await job.wait()
        assert (outcome.deleted, outcome.warnings) == ([str(chain.top)], [])
        assert await nodes(vm) == {"b", "bf"}
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_stale_overlay_that_is_left_would_boot_an_old_disk(folder: Path) -> None:
    """The failing twin of all below: the file is whole, valid, and shows what is no more."""
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with await Nbd.connect(qemu.nbd, "top") as nbd:
            outcome = await (await vm.commit("top", policy=qc.Pivot())).wait()
            await nbd.write(2 * MIB, b"paid in full" * 100)
        assert outcome.invalidated == [str(chain.top)]
        await vm.close()
        await qemu.quit()
    run(QEMU.img, "check", "-q", chain.top)
    assert_disk(chain.top, picture)
    picture.write(2 * MIB, b"paid in full" * 100)
    assert_disk(chain.base, picture)


@pytest.mark.parametrize("style", ["blockdev", "drive"])
async def test_delete_unlinks_exactly_what_was_invalidated(style: Any, folder: Path) -> None:
    chain = make_chain(folder, 4)
    before = set(folder.iterdir())
    async with machine(folder, chain, style=style) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", top=2, base=3, delete=True)
        merged = await job.wait()
        assert merged.deleted == merged.invalidated == [str(chain.files[1])]
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True)
        outcome = await job.wait()
        assert outcome.deleted == outcome.invalidated == [str(chain.top), str(chain.files[2])]
        assert outcome.warnings == []
        await vm.close()
        await qemu.quit()
    gone = {path for path in before if not path.exists()}
    assert gone >= set(chain.files[1:])
    assert chain.base.exists()
    assert_disk(chain.base, chain.pictures[-1])


async def test_rename_keeps_the_data_under_another_name(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), stale="rename")
        outcome = await job.wait()
        assert (outcome.deleted, outcome.warnings) == ([], [])
        assert outcome.renamed == [f"{chain.top}.stale-{job.id}"]
        assert f"Renamed to: {chain.top}.stale-{job.id}." in outcome_text(outcome)
        await vm.close()
        await qemu.quit()
    assert not chain.top.exists()
    assert_disk(Path(f"{chain.top}.stale-{job.id}"), chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("end", [qc.Keep(), qc.Abort()], ids=lambda p: p.kind)
async def test_nothing_is_deleted_where_nothing_was_invalidated(end: Any, folder: Path) -> None:
    chain = make_chain(folder)
    policy = qc.Hold(timeout=0, otherwise=end)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        outcome = await (await vm.commit("vda", policy=policy, delete=True)).wait()
        assert (outcome.invalidated, outcome.deleted) == ([], [])
        assert {"top", "base"} <= await nodes(vm)
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@contextlib.asynccontextmanager
async def pivoting(folder: Path, chain: Chain) -> AsyncIterator[qc.Session]:
    """A session in which the disk is pivoted: in the end its base shows it."""
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        yield vm
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_file_that_another_node_uses_stays(folder: Path) -> None:
    chain = make_chain(folder)
    async with pivoting(folder, chain) as vm:
        file = {"driver": "file", "filename": str(chain.top), "locking": "off"}
        node = {"driver": "raw", "node-name": "other", "read-only": True, "file": file}
        await vm.execute("blockdev-add", node)
        outcome = await (await vm.commit("vda", policy=qc.Pivot(), delete=True)).wait()
        assert outcome.deleted == []
        assert "stays" in outcome.warnings[0]
    assert chain.top.exists()


async def test_an_overlay_that_a_device_uses_stays(folder: Path) -> None:
    """A disc drive, which writes nothing: QEMU has no other device look at a stale overlay."""
    chain = make_chain(folder)
    extra = ["-device", "virtio-scsi-pci,id=scsi0"]
    for options in node_options(chain):
        extra += ["-blockdev", options]
    extra += ["-device", "scsi-cd,drive=top,id=vda"]

    @BeforeClosing
    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        await vm.execute("device_add", driver="scsi-cd", id="theirs", drive="top")

    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=on_pivot)
        outcome = await job.wait()
        assert (outcome.action, outcome.deleted) == ("pivot", [])
        closed, kept = outcome.warnings
        assert closed == "node top stays open: theirs uses it"
        assert kept == f"{chain.top} stays: node top uses it"
        assert "top" in await nodes(vm)
    assert chain.top.exists()


async def test_what_other_nodes_and_the_base_are_called_meanwhile_keeps_no_file(
    folder: Path,
) -> None:
    chain = make_chain(folder)
    gone = create(folder / "gone.raw", MIB, fmt="raw")
    extra = ["-blockdev", f"driver=raw,node-name=gone,file.driver=file,file.filename={gone}",
             "-blockdev", "driver=null-co,node-name=nowhere,read-zeroes=on"]  # fmt: skip

    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        gone.unlink()
        chain.base.rename(folder / "golden.qcow2")

    async with (
        machine(folder, chain, extra=extra) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=on_pivot)
        outcome = await job.wait()
        assert (outcome.deleted, outcome.warnings) == ([str(chain.top)], [])
        await vm.close()
        await qemu.quit()
    assert not chain.top.exists()
    assert_disk(folder / "golden.qcow2", chain.pictures[-1])


@pytest.mark.parametrize("fate", ["refused", "lost"])
async def test_a_pivot_after_which_nothing_can_be_closed_is_a_pivot(
    fate: str, folder: Path
) -> None:
    chain = make_chain(folder)

    @BeforeClosing
    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        if fate == "lost":
            await between.refuse()

    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path, patience=0.1) as vm:
            between.to_qemu = Strike("blockdev-del", "refuse")
            job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=on_pivot)
            outcome = await job.wait()
        assert (outcome.action, outcome.deleted) == ("pivot", [])
        expected = {
            "refused": f"node top stays open: {REFUSAL}",
            "lost": "the stale layers were not cleared away: the monitor of",
        }
        assert outcome.warnings[0].startswith(expected[fate])
        await qemu.quit()
    assert chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])


async def test_an_overlay_that_was_unlinked_before_is_not_looked_for(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        chain.top.unlink()
        outcome = await (await vm.commit("vda", policy=qc.Pivot(), delete=True)).wait()
        assert outcome.deleted == []
        told, noted = outcome.warnings
        assert "no file has the name" in noted
        assert told.startswith(f"{chain.top} stays: it can't be looked at from here")
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_an_overlay_whose_folder_is_gone_is_told(folder: Path) -> None:
    chain, place = make_chain(folder), folder / "place"
    place.mkdir()
    top = create(place / "top.qcow2", None, backing=chain.base)

    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        place.rename(folder / "elsewhere")

    async with (
        machine(folder, Chain([chain.base, top], [])) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=on_pivot)
        outcome = await job.wait()
        assert outcome.deleted == []
        assert outcome.warnings == [f"{top} stays: No such file or directory"]
    assert (folder / "elsewhere" / "top.qcow2").exists()


async def test_a_file_that_is_gone_is_deleted_although_its_folder_can_not_be_synced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder)

    def fsync(file: int) -> None:
        raise OSError(22, "Invalid argument")

    async with pivoting(folder, chain) as vm:
        monkeypatch.setattr(os, "fsync", fsync)
        outcome = await (await vm.commit("vda", policy=qc.Pivot(), delete=True)).wait()
        monkeypatch.undo()
        assert (outcome.deleted, outcome.warnings) == ([str(chain.top)], [])
    assert not chain.top.exists()


async def test_a_file_that_another_process_has_locked_stays(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        reader: asyncio.subprocess.Process | None = None

        async def on_pivot(outcome: qc.CommitOutcome) -> None:
            nonlocal reader
            reader = await asyncio.create_subprocess_exec(
                QEMU.io, "-r", "-f", "raw", str(chain.top),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert reader.stdout
            await reader.stdout.readuntil(b"qemu-io> ")

        job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=on_pivot)
        outcome = await job.wait()
        assert outcome.deleted == []
        assert "another process" in outcome.warnings[0]
        assert reader is not None
        await reader.communicate(b"quit\n")
    assert chain.top.exists()


@pytest.mark.parametrize("swap", ["symlink", "other file", "gone"])
async def test_a_file_that_was_swapped_meanwhile_stays(swap: str, folder: Path) -> None:
    chain = make_chain(folder)
    precious = folder / "precious"
    precious.write_bytes(b"precious")

    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        chain.top.unlink()
        if swap == "symlink":
            chain.top.symlink_to(precious)
        elif swap == "other file":
            os.link(precious, chain.top)

    async with pivoting(folder, chain) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=on_pivot)
        outcome = await job.wait()
        assert outcome.deleted == []
        assert "stays" in outcome.warnings[0]
    assert precious.read_bytes() == b"precious"
    assert chain.top.exists() is (swap != "gone")


async def test_a_link_to_the_overlay_is_not_followed(folder: Path) -> None:
    chain = make_chain(folder)
    real = folder / "real.qcow2"
    chain.top.rename(real)
    chain.top.symlink_to(real)
    async with pivoting(folder, chain) as vm:
        outcome = await (await vm.commit("vda", policy=qc.Pivot(), delete=True)).wait()
        assert outcome.deleted == []
        assert f"is a link to {real}" in outcome.warnings[0]
    assert real.exists()
    assert chain.top.is_symlink()


async def test_the_hook_runs_between_pivot_and_deletion(folder: Path) -> None:
    chain = make_chain(folder)
    seen: list[bool] = []

    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        seen.append(chain.top.exists())
        assert outcome.active is not None
        assert outcome.active.filename == str(chain.base)

    async with pivoting(folder, chain) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=on_pivot)
        outcome = await job.wait()
    assert seen == [True]
    assert (outcome.hook, outcome.deleted) == ("done", [str(chain.top)])


async def test_nothing_is_deleted_when_the_hook_fails(folder: Path) -> None:
    chain = make_chain(folder)

    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        raise OSError("the inventory is down")

    async with pivoting(folder, chain) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=on_pivot)
        outcome = await job.wait()
    assert (outcome.hook, outcome.deleted, outcome.action) == ("failed", [], "pivot")
    assert "inventory" in outcome.warnings[0]
    assert chain.top.exists()


# -- recycle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("style", ["blockdev", "drive"])
async def test_a_recycled_overlay_is_empty_and_the_base_whole(
    style: Any, running: bool, folder: Path
) -> None:
    chain = make_chain(folder, 3)
    fresh = folder / "fresh.qcow2"
    async with machine(folder, chain, style=style) as qemu, qc.Session.connect(qemu.qmp) as vm:
        if running:
            await vm.execute("cont")
        with vm.events("STOP", "RESUME") as stops:
            job = await vm.commit("vda", policy=qc.Recycle(str(fresh)), delete=True)
            outcome = await job.wait()
        assert [event.name async for event in stops] == (["STOP", "RESUME"] if running else [])
        assert outcome.action == "recycle"
        assert outcome.active is not None
        assert outcome.active.filename == str(fresh)
        assert (outcome.guest_paused is not None) is running
        assert outcome.deleted == [str(path) for path in reversed(chain.files[1:])]
        assert (await vm.query_status()).running is running
        assert await files(vm) == [fresh, chain.base]
        assert (await vm.query_jobs()) == []
        again = folder / "again.qcow2"
        second = await (await vm.commit("vda", policy=qc.Recycle(str(again)))).wait()
        assert second.bytes_committed == 0, "only the changes since, and there are none"
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(folder / "again.qcow2", chain.pictures[-1])
    info = run(QEMU.img, "info", again)
    assert "backing file format: qcow2" in info


async def test_an_overlay_of_a_recycle_is_recycled_without_a_trace(folder: Path) -> None:
    """Its file's node was opened by itself, and so it does not go with the overlay's."""
    chain = make_chain(folder)
    overlays = [folder / f"round{number}.qcow2" for number in range(4)]
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        for overlay in overlays:
            job = await vm.commit("vda", policy=qc.Recycle(str(overlay)), delete=True)
            outcome = await job.wait()
            assert outcome.warnings == []
            assert outcome.deleted == outcome.invalidated
        ours = {name for name in await nodes(vm) if name.startswith("qmpcommit-")}
        assert len(ours) == 2, ours
        await qemu.quit()
    assert sorted(folder.glob("*.qcow2")) == sorted([chain.base, overlays[-1]])
    assert_disk(overlays[-1], chain.pictures[-1])


async def test_a_keep_is_not_what_a_recycle_is(folder: Path) -> None:
    """The failing twin: after a keep the next commit copies everything again."""
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        first = await (await vm.commit("vda", policy=qc.Keep())).wait()
        second = await (await vm.commit("vda", policy=qc.Keep())).wait()
        assert second.bytes_committed == first.bytes_committed > 0
        await vm.close()
        await qemu.quit()
    for path in (chain.base, chain.top):
        assert_disk(path, chain.pictures[-1])


async def test_a_recycle_that_can_not_be_is_refused_or_aborted(folder: Path) -> None:
    chain = make_chain(folder)
    there = folder / "there.qcow2"
    there.write_bytes(b"data")

    async def late(ready: qc.Ready) -> qc.Recycle:
        return qc.Recycle(str(there))

    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await vm.execute("cont")
        with pytest.raises(qc.InvalidRequest, match="exists already"):
            await vm.commit("vda", policy=qc.Recycle(str(there)))
        with pytest.raises(qc.InvalidRequest, match="no folder"):
            await vm.commit("vda", policy=qc.Recycle(str(folder / "no" / "x.qcow2")))
        job = await vm.commit("vda", policy=late)
        with pytest.raises(qc.CommitFailed, match="exists already"):
            await job.wait()
        assert (await vm.query_status()).running
        assert await vm.query_jobs() == []
        assert there.read_bytes() == b"data"
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_an_exported_disk_is_not_recycled_under_its_clients(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.ChainError, match="exported"):
            await vm.commit("top", policy=qc.Recycle(str(folder / "x.qcow2")))
        assert await vm.query_jobs() == []
        assert await files(vm) == [chain.top, chain.base]
        await qemu.quit()
    assert not (folder / "x.qcow2").exists()
    assert_disk(chain.top, chain.pictures[-1])


# -- storage errors ------------------------------------------------------------------------------


@contextlib.contextmanager
def small_base(folder: Path) -> Iterator[tuple[Chain, Picture, Callable[[int], object]]]:
    """A chain whose base lies on a file system too small for the overlay, and what grows that."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = folder / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24M", "none", small)
    try:
        base = create(small / "base.qcow2", 64 * MIB)
        top = create(folder / "top.qcow2", None, backing=base)
        write(top, [Write(0, BULK, 0x55)])
        picture = Picture(64 * MIB)
        picture.fill(0, BULK, 0x55)

        def grow(size: int) -> object:
            return run("mount", "-o", f"remount,size={size}M", small)

        yield Chain([base, top], [Picture(64 * MIB), picture]), picture, grow
    finally:
        run("umount", "-l", small)


async def test_a_full_base_makes_the_job_wait_and_its_owner_makes_room(folder: Path) -> None:
    stalls: list[qc.Stall] = []
    with small_base(folder) as (chain, picture, grow):

        async def on_stall(stall: qc.Stall) -> None:
            stalls.append(stall)
            grow(64)

        async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit(
                "vda", policy=qc.Pivot(), on_error="stop", on_stall=on_stall,
                override=["free-space"],
            )  # fmt: skip
            assert (await job.wait()).action == "pivot"
            await vm.close()
            await qemu.quit()
        assert [stall.base.filename for stall in stalls] == [str(chain.base)]
        grow(200)  # for the copy that is compared
        assert_disk(chain.base, picture)


async def test_an_owner_who_can_not_make_room_leaves_the_overlay_active(folder: Path) -> None:
    async def on_stall(stall: qc.Stall) -> None:
        raise OSError("no room anywhere")

    with small_base(folder) as (chain, picture, grow):
        async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit(
                "vda", policy=qc.Pivot(), on_error="stop", on_stall=on_stall,
                override=["free-space"],
            )  # fmt: skip
            with pytest.raises(qc.CommitFailed) as error:
                await job.wait()
            assert "no room anywhere" in repr(error.value.__cause__)
            assert await vm.execute("query-jobs") == []
            await vm.close()
            await qemu.quit()
        grow(200)
        assert_disk(chain.top, picture)


async def test_without_that_a_full_base_is_a_failure_and_nothing_is_lost(folder: Path) -> None:
    with small_base(folder) as (chain, picture, _):
        async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.NoSpace, match="free-space"):
                await vm.commit("vda", policy=qc.Pivot())
            job = await vm.commit("vda", policy=qc.Pivot(), override=["free-space"])
            with pytest.raises(qc.NoSpace, match=r"still the active image.*Make room") as error:
                await job.wait()
            assert isinstance(error.value, qc.CommitFailed)
            assert error.value.error == "No space left on device"
            await vm.close()
            await qemu.quit()
        assert_disk(chain.top, picture)


async def test_a_stall_that_nobody_relieves_ends_with_the_deadline(folder: Path) -> None:
    with small_base(folder) as (chain, picture, _):
        async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit(
                "vda", policy=qc.Pivot(), on_error="stop", timeout=1, override=["free-space"]
            )
            with pytest.raises(qc.DeadlineExceeded, match="still the active image"):
                await job.wait()
            assert await vm.query_jobs() == []
            await vm.close()
            await qemu.quit()
        assert_disk(chain.top, picture)


@pytest.mark.parametrize("there", ["its own", "another", "unreadable"])
async def test_of_a_qemu_whose_files_can_not_be_looked_at_only_a_locked_one_is_deleted(
    there: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: str) -> bool:
        raise PermissionError(path)  # as another user's file is, but not to root

    for module in (identity, block_files):
        monkeypatch.setattr(module, "open_files", lambda pid: {})  # another user's process
    if there == "unreadable":
        monkeypatch.setattr(identity, "is_locked", unreadable)
    replaced, deleted = there == "another", there == "its own"
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        if replaced:
            chain.top.rename(folder / "moved.qcow2")
            chain.top.write_bytes(b"precious")
        outcome = await (await vm.commit("vda", policy=qc.Pivot(), delete=True)).wait()
        assert outcome.deleted == ([str(chain.top)] if deleted else [])
        stays = [text for text in outcome.warnings if "stays" in text]
        assert len(stays) == (0 if deleted else 1)
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert chain.top.exists() is not deleted
    assert not replaced or chain.top.read_bytes() == b"precious"


# -- chain care ----------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
async def test_relative_backing_names_stay_relative(relative: bool, folder: Path) -> None:
    chain = make_chain(folder, 3, relative=True)
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        job = await vm.commit("vda", top=1, keep_relative=relative)
        await job.wait()
        await vm.close()
        await qemu.quit()
    assert "backing file: base.qcow2" in run(QEMU.img, "info", chain.top)
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("style", ["blockdev", "implicit"])
async def test_a_name_that_counts_from_qemus_folder_is_not_written_into_an_overlay(
    style: Style, folder: Path
) -> None:
    images = folder / "images"
    images.mkdir()
    chain = make_chain(images, 3, relative=True)
    opened = Chain([path.relative_to(folder) for path in chain.files], chain.pictures)
    async with machine(folder, opened, style=style) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("vda", top=1, delete=True)
            assert (await job.wait()).deleted == [str(chain.files[1])]
        await qemu.quit()
    header = block_files.read_header(str(chain.top))
    assert header is not None
    assert header.backing == "base.qcow2"
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_chosen_filter_node_name(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold(), filter_node_name="thefilter")
        await job.ready()
        disk = await vm.disk("vda")
        assert (disk.filters, disk.chain[0].node_name) == (("thefilter",), "top")
        await job.pivot()
        assert (await job.wait()).action == "pivot"
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_masked_protocol_where_qemu_has_it(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        if (await vm.features()).has_argument("block-commit", "backing-mask-protocol"):
            job = await vm.commit("vda", top=1, backing_mask_protocol=True)
            assert (await job.wait()).action == "none"
        else:
            with pytest.raises(qc.InvalidRequest, match="Nothing was sent"):
                await vm.commit("vda", top=1, backing_mask_protocol=True)
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_the_bandwidth_of_a_running_job(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold(), bandwidth="1MiB")
        await job.set_bandwidth("1GiB")
        (entry,) = await vm.query_block_jobs()
        assert entry.speed == 1 << 30
        await job.ready()
        await job.pivot()
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_write_threshold_tells_when_a_thin_volume_fills(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        base_file = (await vm.graph()).leaf("base").name
        await vm.set_write_threshold(base_file, "6MiB")
        with vm.events("BLOCK_WRITE_THRESHOLD") as thresholds:
            await (await vm.commit("vda", policy=qc.Keep())).wait()
            event = await anext(thresholds)
        assert getattr(event, "node_name", "") == base_file


async def test_an_overlay_is_deleted_under_a_writer_and_nothing_is_lost(folder: Path) -> None:
    """Deleting under a writer: the export keeps writing to the base, and nothing is lost."""
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with await Nbd.connect(qemu.nbd, "top") as nbd, Writer(nbd, picture) as writer:
            await writer.writes(50)
            outcome = await (await vm.commit("top", policy=qc.Pivot(), delete=True)).wait()
            assert outcome.deleted == [str(chain.top)]
            await writer.writes(50)
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, picture)


async def test_a_recycle_of_a_disk_with_a_long_name(folder: Path) -> None:
    """QEMU's node-names are short, and a job's id need not be."""
    chain = make_chain(folder)
    fresh = folder / "fresh.qcow2"
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Recycle(str(fresh)), job_id="qmpcommit-" + "x" * 40)
        outcome = await job.wait()
        assert outcome.action == "recycle"
        assert outcome.active is not None
        assert outcome.active.filename == str(fresh)
        await vm.close()
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])
