"""Dirty bitmaps survive a commit: proved by incremental backups, compared byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.bitmaps import bitmaps_of
from qmpcommit.commit import in_pending as care
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.plan import Plan
from tests.ground.images import (
    MIB,
    Chain,
    Picture,
    Write,
    assert_disk,
    create,
    make_chain,
    read,
    run,
    write,
)
from tests.ground.machines import machine, storage_daemon
from tests.ground.nbd import Nbd, Writer
from tests.ground.proxy import REFUSAL, Strike, proxy
from tests.ground.qemu import QEMU

GRAIN = 65536


async def add_bitmap(vm: qc.Session, node: str, name: str, **more: Any) -> None:
    arguments = {"node": node, "name": name, "persistent": True, "granularity": GRAIN, **more}
    await vm.execute("block-dirty-bitmap-add", arguments)


async def marked(vm: qc.Session, node: str) -> dict[str, int]:
    """Bytes that each bitmap of a node marks."""
    return {bitmap.name: bitmap.marked for bitmap in bitmaps_of(await vm.graph(), node)}


async def backup(vm: qc.Session, node: str, target: Path, bitmap: str | None) -> None:
    """A full backup, or an incremental one over the last: what backup programs do."""
    file = {"driver": "file", "filename": str(target)}
    await vm.execute("blockdev-add", {"driver": "raw", "node-name": "target", "file": file})
    arguments: dict[str, Any] = {"job-id": "backup", "device": node, "target": "target",
                                 "sync": "full"}  # fmt: skip
    if bitmap is not None:
        arguments |= {"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": "on-success"}
    with vm.events("BLOCK_JOB_COMPLETED") as done:
        await vm.execute("blockdev-backup", arguments)
        event = await anext(done)
        assert getattr(event, "error", None) is None
    await vm.execute("blockdev-del", {"node-name": "target"})


async def snapshot(vm: qc.Session, folder: Path, node: str, name: str) -> Path:
    """A fresh overlay over the active layer, as for a backup window."""
    path = create(folder / f"{name}.qcow2", 64 * MIB, backing=folder / f"{node}.qcow2")
    file = {"driver": "file", "filename": str(path)}
    overlay = {"driver": "qcow2", "node-name": name, "file": file, "backing": None}
    await vm.execute("blockdev-add", overlay)
    await vm.execute("blockdev-snapshot", {"node": node, "overlay": name})
    return path


def one_layer(folder: Path) -> tuple[Chain, Picture]:
    chain = make_chain(folder, 1)
    return chain, chain.pictures[0]


async def write_some(nbd: Nbd, picture: Picture, *places: int) -> None:
    for place in places:
        data = bytes([place % 251 + 1]) * 1000
        await nbd.write(place * MIB + 100, data)
        picture.write(place * MIB + 100, data)


@pytest.mark.parametrize("carry", [True, False], ids=["carried", "twin: not carried"])
async def test_an_incremental_backup_goes_on_over_a_pivot(carry: bool, folder: Path) -> None:
    """Full backup, snapshot, writes, commit and pivot under a writer, incremental backup."""
    chain, picture = one_layer(folder)
    target = create(folder / "target.raw", 64 * MIB, fmt="raw")
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with await Nbd.connect(qemu.nbd, "base") as nbd:
            await write_some(nbd, picture, 5)
            await add_bitmap(vm, "base", "daily")
            await backup(vm, "base", target, None)
            await write_some(nbd, picture, 6, 7)
            await snapshot(vm, folder, "base", "over")
            await vm.execute("block-dirty-bitmap-disable", {"node": "base", "name": "daily"})
            await add_bitmap(vm, "over", "daily")
            await write_some(nbd, picture, 8, 7)
            async with Writer(nbd, picture, start=30 * MIB, length=4 * MIB) as writer:
                await writer.writes(30)
                job = await vm.commit("export0", policy=qc.Hold(), carry_bitmaps=carry)
                await job.ready()
                await writer.writes(30)
                await job.pivot()
                outcome = await job.wait()
                assert (outcome.action, outcome.warnings) == ("pivot", [])
                await writer.writes(30)
            await write_some(nbd, picture, 9)
            await backup(vm, "base", target, "daily")
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, picture)
    copied = read(target, fmt="raw")
    assert (copied == bytes(picture.data)) is carry, "the incremental backup"


async def test_the_carried_bitmap_marks_all_that_it_marked_and_not_the_whole_commit(
    folder: Path,
) -> None:
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await add_bitmap(vm, "top", "a")
        await add_bitmap(vm, "top", "b", persistent=False)
        await add_bitmap(vm, "top", "stopped", disabled=True)
        async with await Nbd.connect(qemu.nbd, "top") as nbd:
            await write_some(nbd, picture, 33, 34)
            job = await vm.commit("top", policy=qc.Hold())
            await job.ready()
            await write_some(nbd, picture, 35)
            await job.pivot()
            assert (await job.wait()).warnings == []
            assert await marked(vm, "base") == {"a": 3 * GRAIN, "b": 3 * GRAIN, "stopped": 0}
            await write_some(nbd, picture, 36)
            assert await marked(vm, "base") == {"a": 4 * GRAIN, "b": 4 * GRAIN, "stopped": 0}
        found = {bitmap.name: bitmap for bitmap in bitmaps_of(await vm.graph(), "base")}
        assert found["a"].persistent
        assert not found["b"].persistent
        assert not found["stopped"].recording
        with vm.events("BLOCK_EXPORT_DELETED") as deleted:
            await vm.execute("block-export-del", {"id": "export0", "mode": "hard"})
            await anext(deleted)
        await vm.execute("blockdev-del", {"node-name": "base"})  # which stores what is persistent
        await vm.close()
        await qemu.quit()
    info = run(QEMU.img, "info", chain.base)
    assert "name: a" in info
    assert "name: b" not in info
    assert_disk(chain.base, picture)


async def test_an_intermediate_commit_carries_the_bitmaps_of_all_its_layers(folder: Path) -> None:
    chain = make_chain(folder, 4)
    for name, path in zip(("x", "y"), (chain.files[2], chain.files[1]), strict=True):
        run(QEMU.img, "bitmap", "--add", "-g", str(GRAIN), path, name)
        run(QEMU.img, "bitmap", "--add", "-g", str(GRAIN), path, "both")
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        before = {**await marked(vm, "low"), **await marked(vm, "mid")}
        assert set(before) == {"x", "y", "both"}
        outcome = await (await vm.commit("vda", top="low", base="base")).wait()
        assert (outcome.action, outcome.warnings) == ("none", [])
        assert set(await marked(vm, "base")) == {"x", "y", "both"}
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert "name: both" in run(QEMU.img, "info", chain.base)


async def test_bitmaps_that_were_not_to_be_carried_are_not_by_who_takes_it_up(folder: Path) -> None:
    chain = make_chain(folder, 3)
    write(chain.files[1], [Write(8 * MIB, 24 * MIB, 0x55)])  # more than goes through at once
    run(QEMU.img, "bitmap", "--add", "-g", str(GRAIN), chain.files[1], "x")
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        before = await vm.commit("export0", top="mid", carry_bitmaps=False, bandwidth="1MiB")
        await before.detach()
        plan = Plan.model_validate(before.plan.model_dump(mode="json"))
        job = await vm.resume(plan, Resumed(before.state))
        await vm.execute("block-job-set-speed", {"device": job.id, "speed": 0})
        assert (await job.wait()).action == "none"
        assert await marked(vm, "base") == {}
        await vm.close()
        await qemu.quit()


@pytest.mark.parametrize("policy", [qc.Abort(), qc.Keep()], ids=lambda p: p.kind)
async def test_without_a_pivot_every_bitmap_is_as_it_was(policy: Any, folder: Path) -> None:
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await add_bitmap(vm, "top", "a")
        async with await Nbd.connect(qemu.nbd, "top") as nbd:
            await write_some(nbd, picture, 33)
            outcome = await (await vm.commit("top", policy=policy)).wait()
            assert outcome.action == policy.kind
            await write_some(nbd, picture, 34)
        assert await marked(vm, "top") == {"a": 2 * GRAIN}
        assert await marked(vm, "base") == {}
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, picture)


async def test_bitmaps_that_are_busy_or_can_not_be_kept_are_told(folder: Path) -> None:
    chain = make_chain(folder, fmt="raw")
    picture = chain.pictures[-1]
    async with (
        storage_daemon(folder, chain, fmt="raw") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        await add_bitmap(vm, "top", "a")
        async with await Nbd.connect(qemu.nbd, "top") as nbd:
            await write_some(nbd, picture, 33)
        target = {"driver": "null-co", "node-name": "target", "size": 64 * MIB}
        await vm.execute("blockdev-add", target)
        arguments = {"job-id": "backup", "device": "top", "target": "target", "sync": "bitmap",
                     "bitmap": "a", "bitmap-mode": "never", "auto-finalize": False}  # fmt: skip
        with vm.events("BLOCK_JOB_PENDING", "BLOCK_JOB_CANCELLED") as heard:
            await vm.execute("blockdev-backup", arguments)
            await anext(heard)
            with pytest.raises(qc.JobConflict, match=r"busy|block job already"):
                await vm.commit("top", policy=qc.Pivot())
            await vm.execute("job-cancel", {"id": "backup"})
            await anext(heard)
        outcome = await (await vm.commit("top", policy=qc.Pivot())).wait()
        assert "in memory" in outcome.warnings[0]
        assert (await marked(vm, "base"))["a"] == GRAIN
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, picture, fmt="raw")


async def test_a_base_with_a_bitmap_of_its_own_joins_them(folder: Path) -> None:
    chain = make_chain(folder)
    run(QEMU.img, "bitmap", "--add", "-g", "131072", chain.base, "a")
    picture = chain.pictures[-1]
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await add_bitmap(vm, "top", "a")
        async with await Nbd.connect(qemu.nbd, "top") as nbd:
            await write_some(nbd, picture, 60)
            outcome = await (await vm.commit("top", policy=qc.Pivot())).wait()
            assert "granularities" in outcome.warnings[0]
            whole: Sequence[int] = list((await marked(vm, "base")).values())
            assert whole[0] >= outcome.bytes_committed, "what the commit wrote is marked too"
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, picture)


@pytest.mark.parametrize("fate", ["refuse", "drop"])
async def test_bitmaps_that_can_not_be_carried_undo_the_pivot(
    fate: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk's I/O waits meanwhile, so not for as long as the monitor may take."""
    monkeypatch.setattr(care, "HOLD_LIMIT", 0.2)
    why = REFUSAL if fate == "refuse" else "took longer than 0.2 s"
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with storage_daemon(folder, chain) as qemu:
        async with proxy(folder, qemu.qmp) as between, qc.Session.connect(between.path) as vm:
            between.to_qemu = Strike("transaction", fate)
            await add_bitmap(vm, "top", "a")
            async with await Nbd.connect(qemu.nbd, "top") as nbd:
                await write_some(nbd, picture, 33)
                with pytest.raises(qc.CommitFailed, match=why):
                    await (await vm.commit("top", policy=qc.Pivot())).wait()
                await write_some(nbd, picture, 34)
            assert await marked(vm, "top") == {"a": 2 * GRAIN}
            assert await vm.query_jobs() == []
        await qemu.quit()
    assert_disk(chain.top, picture)


async def test_bitmaps_are_carried_although_the_first_answer_does_not_come(folder: Path) -> None:
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    drop = Strike("transaction", "drop", times=1)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path, command_timeout=1) as vm:
            between.to_qemu = drop
            await add_bitmap(vm, "top", "a")
            async with await Nbd.connect(qemu.nbd, "top") as nbd:
                await write_some(nbd, picture, 33)
                outcome = await (await vm.commit("top", policy=qc.Pivot())).wait()
            assert (outcome.action, drop.met) == ("pivot", 1)
            assert await marked(vm, "base") == {"a": GRAIN}
        await qemu.quit()
    assert_disk(chain.base, picture)


SHARED = ["base-shared"]


async def exported(vm: qc.Session, folder: Path, node: str, name: str) -> None:
    """An NBD export for a backup program, which reads the bitmap with the disk."""
    address = {"type": "unix", "data": {"path": str(folder / "bitmaps")}}
    await vm.execute("nbd-server-start", {"addr": address})
    export = {"id": "reader", "type": "nbd", "node-name": node, "name": "reader"}
    try:
        await vm.execute("block-export-add", {**export, "bitmaps": [name]})
    except qc.CommandRefused as error:
        if "bitmaps" not in error.desc:
            raise
        await vm.execute("block-export-add", {**export, "bitmap": name})  # QEMU 5.2


@pytest.mark.parametrize(
    ("when", "style"),
    [(when, "drive") for when in ("before", "at READY", "taken up", "pending")]
    + [("before", "implicit")],
)
async def test_a_bitmap_over_which_qemu_would_die_is_found(
    when: str, style: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where QEMU closes the overlay by itself, or what lies under it, it dies of such a bitmap."""
    monkeypatch.setattr("qmpcommit.commit.in_use.FRESH", 0.0)
    chain = make_chain(folder, 3 if style == "implicit" else 2)
    async with machine(folder, chain, style=style) as qemu, qc.Session.connect(qemu.qmp) as vm:
        layer = (await vm.disk("vda")).chain[style == "implicit"].node_name
        bitmap = {"node": layer, "name": "daily", "disabled": True}
        await vm.execute("block-dirty-bitmap-add", bitmap)
        if when == "before":
            await exported(vm, folder, layer, "daily")
            with pytest.raises(qc.JobConflict, match=r"'daily' of .* fail an assertion.*Nothing"):
                await vm.commit("vda", policy=qc.Pivot(), carry_bitmaps=False, override=SHARED)
        else:
            job = await vm.commit("vda", policy=qc.Hold(), carry_bitmaps=when == "pending")
            await job.ready()
            if when != "at READY":
                await job.detach()
            await exported(vm, folder, layer, "daily")
            if when == "pending":
                with vm.events("BLOCK_JOB_PENDING") as held:
                    await vm.execute("job-complete", {"id": job.id})
                    await anext(held)
            if when != "at READY":
                job = await vm.adopt(job.id, carry_bitmaps=when == "pending")
            if when != "pending":
                job.pivot()
            with pytest.raises(qc.CommitFailed, match=r"fail an assertion.*still the active"):
                await job.wait()
        assert await vm.execute("query-jobs") == []
        await vm.execute("nbd-server-stop")
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_bitmap_that_does_not_go_on_in_an_overlay_is_told(folder: Path) -> None:
    """A QEMU that was killed leaves its persistent bitmaps inconsistent."""
    chain = make_chain(folder)
    run(QEMU.img, "bitmap", "--add", chain.top, "a")
    async with machine(folder, chain) as qemu:
        disk = "/machine/peripheral/vda/virtio-backend"
        for command in ("write -P 0x33 0 64k", "flush"):
            line = f'qemu-io -d {disk} "{command}"'
            await qemu.execute("human-monitor-command", command_line=line)
        qemu.kill()
        await qemu.ended()
    chain.pictures[-1].fill(0, GRAIN, 0x33)
    (folder / "again").mkdir()
    async with machine(folder / "again", chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await vm.execute("block-dirty-bitmap-add", {"node": "top", "name": "b"})
        (laid,) = (await vm.overlay(["vda"], overlay=folder / "fresh")).disks
        (text,) = laid.warnings
        assert "bitmap 'a' of top does not go on" in text
        assert list(await marked(vm, laid.node_name)) == ["b"]
        await qemu.quit()
    assert_disk(folder / "fresh", chain.pictures[-1])
