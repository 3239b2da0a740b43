"""A guest writes and syncs files while its disk is committed; nothing acknowledged is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.images import create
from tests.guest.guest import Guest, assert_files, file_system, guest, needs_guest

pytestmark = needs_guest

KINDS: dict[str, dict[str, Any]] = {
    "virtio-blk": {},
    "iothread": {"iothread": True},
    "drive": {"style": "drive"},
    "virtio-scsi": {"device": "scsi-hd"},
}


async def overlay(vm: qc.Session, path: Path) -> None:
    """A fresh overlay over the running disk, as a VM manager takes a snapshot."""
    disk = await vm.disk("vda")
    active = disk.chain[0]
    create(path, None, backing=active.filename)
    name = path.stem
    if active.node_name.startswith("#"):
        await vm.execute("blockdev-snapshot-sync", {"device": "drive0", "snapshot-file": str(path),
                         "format": "qcow2", "mode": "existing"})  # fmt: skip
        return
    await vm.execute("blockdev-add", {"driver": "qcow2", "node-name": name, "backing": None,
                     "file": {"driver": "file", "filename": str(path)}})  # fmt: skip
    await vm.execute("blockdev-snapshot", {"node": active.node_name, "overlay": name})


async def rounds(vm: qc.Session, made: Guest, folder: Path, count: int = 2) -> Path:
    """Keep, recycle and pivot, in turn, each under the guest's writes; the active image."""
    active = None
    for number in range(count):
        if number:
            await overlay(vm, folder / f"over{number}.qcow2")
        for policy in (qc.Keep(), qc.Recycle(overlay=str(folder / f"new{number}.qcow2")),
                       qc.Pivot()):  # fmt: skip
            await made.more()
            outcome = await (await vm.commit("vda", policy=policy, timeout=60)).wait()
            assert outcome.status == "completed"
            assert outcome.action == policy.kind
            active = outcome.active
            await made.more()
    assert active is not None
    return Path(active.filename)


@pytest.mark.parametrize("kind", KINDS)
async def test_every_acknowledged_write_is_there_after_commits(kind: str, folder: Path) -> None:
    chain = file_system(folder)
    async with guest(folder, chain, **KINDS[kind]) as made:
        async with qc.Session.connect(made.qemu.qmp) as vm:
            active = await rounds(vm, made, folder)
            assert await vm.query_jobs() == []
        await made.power_off()
    assert active == chain.base
    assert_files(active, made)


async def test_a_guest_that_is_cut_off_after_each_decision_loses_nothing(folder: Path) -> None:
    """QEMU is killed in the middle of the guest's writes; the journal is replayed."""
    chain = file_system(folder)
    async with guest(folder, chain) as made:
        async with qc.Session.connect(made.qemu.qmp) as vm:
            keep = await (await vm.commit("vda", policy=qc.Keep(), timeout=60)).wait()
            assert keep.active is not None
            await made.more()
            overlay_file = str(folder / "new.qcow2")
            recycled = qc.Recycle(overlay=overlay_file)
            outcome = await (await vm.commit("vda", policy=recycled, timeout=60)).wait()
            await made.more()
        await made.qemu.quit()
        await made.says("gone")
    assert outcome.active is not None
    assert_files(Path(outcome.active.filename), made, clean=False)


async def test_what_a_keep_carried_into_the_base_is_a_sound_file_system(folder: Path) -> None:
    """The base of a keep is what a crash at that instant leaves, and holds what was synced."""
    chain = file_system(folder)
    async with guest(folder, chain) as made:
        async with qc.Session.connect(made.qemu.qmp) as vm:
            await made.more()
            job = await vm.commit("vda", policy=qc.Hold(), timeout=60)
            await job.ready()
            acked = Guest(made.qemu, "", made.reader, made.writer, dict(made.acked), made.count)
            job.keep()
            assert (await job.wait()).action == "keep"
            await vm.execute("stop")
            copied = folder / "copied.qcow2"
            shutil.copyfile(chain.base, copied)
            later = made.count
            await vm.execute("cont")
        await made.power_off()
    # Slots that were written again between the look and the keep say nothing about it.
    for number in range(acked.count, later + 1):
        acked.acked.pop(number % 256, None)
    assert acked.acked
    assert_files(copied, acked, clean=False)
    assert_files(chain.top, made)
