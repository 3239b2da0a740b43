"""A QEMU that creates an image is not asked for its nodes: older ones die of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import machine, storage_daemon
from tests.ground.proxy import proxy
from tests.ground.sessions import hurried


async def create(vm: qc.Session, job: str, base: Path) -> None:
    """One qcow2 image by ``blockdev-create``, to the end of its job."""
    with vm.events("JOB_STATUS_CHANGE") as changes:
        options = {
            "driver": "qcow2",
            "file": "new",
            "size": 64 << 20,
            "backing-file": str(base),
            "backing-fmt": "qcow2",
        }
        await vm.execute("blockdev-create", {"job-id": job, "options": options})
        async for change in changes.raw():
            if (change.get("id"), change.get("status")) == (job, "concluded"):
                break
    await vm.execute("job-dismiss", id=job)


async def test_the_graph_is_read_again_and_again_while_images_are_created(folder: Path) -> None:
    chain = make_chain(folder)
    (folder / "new.qcow2").touch()
    async with machine(folder, chain) as qemu:
        async with asyncio.timeout(60), qc.Session.connect(qemu.qmp) as vm:
            file = {"driver": "file", "filename": str(folder / "new.qcow2")}
            await vm.execute("blockdev-add", {**file, "node-name": "new"})
            over = asyncio.Event()

            async def look() -> None:
                while not over.is_set():
                    assert (await vm.disks())[0].name == "vda"

            looking = [asyncio.create_task(look()) for _ in range(3)]
            for number in range(60):
                await create(vm, f"create{number}", chain.top)
            over.set()
            await asyncio.gather(*looking)
        await qemu.quit()


async def test_a_creation_that_does_not_end_is_told_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            execute = vm._execute

            async def jobs(command: str, *more: Any) -> Any:
                if command == "query-jobs":
                    return [{"id": "theirs", "type": "create", "status": "running"}]
                return await execute(command, *more)

            monkeypatch.setattr(vm, "_execute", jobs)
            before = between.sent.count("query-named-block-nodes")
            never = pytest.raises(qc.DeadlineExceeded, match=r"\(theirs\).*was not sent")
            with hurried(vm), never:
                await vm.graph()
            assert between.sent.count("query-named-block-nodes") == before
            monkeypatch.undo()
            await vm.graph()
        await qemu.quit()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount namespace of its own")
async def test_a_folder_that_only_qemu_sees_is_asked_of_qemu(folder: Path) -> None:
    """Whether it is there is known before anything is written to the base."""
    theirs, mount = folder / "theirs", folder / "mount"
    theirs.mkdir()
    mount.mkdir()
    chain, unseen = make_chain(theirs, relative=True), mount / "only"
    seen = Chain([unseen / path.name for path in chain.files], chain.pictures)
    program = 'mount -t tmpfs none "$2" && mkdir "$3" && mount --bind "$1" "$3" && shift 3'
    wrap = ["unshare", "-m", "sh", "-c", f'{program} && exec "$@"', "sh"]
    wrap += [str(theirs), str(mount), str(unseen)]
    async with (
        storage_daemon(folder, seen, export=False, wrap=wrap) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        before = chain.base.read_bytes()
        with pytest.raises(
            qc.InvalidRequest, match=r"no folder .*as QEMU sees its files.*was sent"
        ):
            await vm.commit("top", policy=qc.Recycle(str(mount / "none" / "fresh")))
        with pytest.raises(qc.CommitFailed, match=r"no folder .*as QEMU sees its files"):
            await vm.overlay(["top"], overlay=mount / "none" / "fresh")
        assert chain.base.read_bytes() == before
        fresh = str(unseen / "fresh")
        outcome = await (await vm.commit("top", policy=qc.Recycle(fresh))).wait()
        assert outcome.active is not None
        assert (outcome.action, outcome.active.filename) == ("recycle", fresh)
        await qemu.quit()
    assert (theirs / "fresh").exists()
    assert_disk(chain.base, chain.pictures[-1])
