"""A fresh overlay is like the one that it follows, and nothing that exists is ever written to."""

from __future__ import annotations

import asyncio
import inspect
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit import fresh_overlay, overlay_file
from qmpcommit.commit.fresh_overlay import FreshOverlay
from qmpcommit.commit.overlay_options import OverlayOptions
from qmpcommit.errors import CommandRefused
from tests.ground.daemons import many_disks
from tests.ground.images import MIB, Chain, make_chain, run
from tests.ground.qemu import QEMU

PRECIOUS = b"another VM's disk " * 5000


Hook = Callable[[str], object]
"""Is told of each command before it is sent; what it returns is awaited where it can be."""


@asynccontextmanager
async def serving(
    folder: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch | None = None, hook: Hook = len
) -> AsyncIterator[qc.Session]:
    """Connected without a proxy, whose process would be taken for QEMU's."""
    async with (
        many_disks(folder / "d", chain, exports=False) as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):
        execute = vm.execute

        async def hooked(command: str, arguments: Any = None, **more: Any) -> Any:
            told = hook(command)
            if inspect.isawaitable(told):
                await told
            return await execute(command, arguments, **more)

        if monkeypatch is not None:
            monkeypatch.setattr(vm, "execute", hooked)
        yield vm
        await vm.close()
        await daemon.quit()


async def overlay_of(vm: qc.Session, fresh: Path, **more: Any) -> FreshOverlay:
    plan = await vm.plan("top", policy=qc.Pivot())
    return FreshOverlay(vm, plan, str(fresh), vm.cwd, **more)


def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's open files can't be looked at."""
    monkeypatch.setattr(fresh_overlay, "open_files", lambda pid: {})


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's file names mean nothing here."""
    monkeypatch.setattr(fresh_overlay, "names_are_ours", lambda pid: False)


async def test_it_is_made_as_the_one_before(folder: Path) -> None:
    chain = make_chain(folder)
    options = "cluster_size=128k,refcount_bits=32,lazy_refcounts=on,extended_l2=on"
    chain.top.unlink()
    run(QEMU.img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", chain.base, "-o", options,
        chain.top)  # fmt: skip
    chain.top.chmod(0o640)
    if not os.geteuid():
        os.chown(chain.top, 12345, 54321)
    async with serving(folder, chain) as vm:
        overlay = await overlay_of(vm, folder / "fresh.qcow2")
        await overlay.open()
        nodes = (await vm.graph()).nodes
        mine, its = (nodes[name].raw["image"] for name in (overlay.node, "top"))
        assert mine["format-specific"] == its["format-specific"]
        assert mine["cluster-size"] == its["cluster-size"]
        assert overlay.warnings == []
        found = os.stat(folder / "fresh.qcow2"), os.stat(chain.top)
        assert len({(each.st_mode, each.st_uid, each.st_gid) for each in found}) == 1
        await overlay.undo()
    assert not (folder / "fresh.qcow2").exists()


@pytest.mark.parametrize("by", ["files", "size"])
@pytest.mark.parametrize("planted", ["link", "folder"])
async def test_a_link_that_is_planted_meanwhile_leads_nowhere(
    planted: str, by: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of the file and QEMU's opening of it."""
    if by == "size":
        unseen(monkeypatch)
    chain, place, other = make_chain(folder), folder / "place", folder / "other"
    place.mkdir()
    other.mkdir()
    (other / "fresh").write_bytes(PRECIOUS)

    def plant(command: str) -> None:
        if command == "blockdev-add" and (place / "fresh").exists() and not place.is_symlink():
            (place / "fresh").unlink()
            if planted == "folder":
                place.rmdir()
                place.symlink_to(other)
            else:
                (place / "fresh").symlink_to(other / "fresh")

    async with serving(folder, chain, monkeypatch, plant) as vm:
        overlay = await overlay_of(vm, place / "fresh")
        with pytest.raises(qc.CommitFailed, match="opened another file"):
            await overlay.open()
        await overlay.undo()
        ours = [name for name in (await vm.graph()).nodes if name.startswith("qmpcommit")]
        assert ours == []
    assert (other / "fresh").read_bytes() == PRECIOUS


async def test_which_file_qemu_opened_is_known_by_its_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen(monkeypatch)
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with serving(folder, chain) as vm:
        overlay = await overlay_of(vm, fresh)
        await overlay.open()
        assert fresh.stat().st_size < MIB
        await overlay.undo()
    assert not fresh.exists()


@pytest.mark.parametrize("when", ["before", "meanwhile", "never"])
async def test_where_only_qemu_can_make_it_no_file_is_emptied(
    when: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch)
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    link = folder / "link"
    link.symlink_to(fresh)

    def plant(command: str) -> None:
        if command == "chardev-add" and when == "meanwhile":
            fresh.write_bytes(PRECIOUS)

    async with serving(folder, chain, monkeypatch, plant) as vm:
        overlay = await overlay_of(vm, link)
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
        if when == "before":
            fresh.write_bytes(PRECIOUS)
        if when == "never":
            await overlay.open()
        else:
            with pytest.raises(qc.CommitFailed, match="exists already"):
                await overlay.open()
        await overlay.undo()
        with pytest.raises(CommandRefused, match="not found"):
            await vm.execute("chardev-remove", {"id": f"{overlay.node.removesuffix('top')}file"})
    assert (fresh.read_bytes() == PRECIOUS) is (when != "never")


async def test_a_name_of_which_qemu_tells_nothing_is_not_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch)
    chain = make_chain(folder)
    async with serving(folder, chain) as vm:
        overlay = await overlay_of(vm, folder / ("x" * 300))
        with pytest.raises(qc.CommitFailed, match="can't be told from here"):
            await overlay.open()


@pytest.mark.parametrize("why", ["Permission denied", "No such file or directory", "unknown"])
async def test_a_file_that_qemu_may_not_open_is_made_by_qemu(
    why: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    chain.top.chmod(0o600)
    told: list[str] = []

    def refuse(command: str) -> None:
        if command == "blockdev-add" and not told:
            told.append(command)
            desc = f"Could not open '{fresh}': {why}"
            raise CommandRefused(desc, error_class="GenericError", desc=desc)

    async with serving(folder, chain, monkeypatch, refuse) as vm:
        overlay = await overlay_of(vm, fresh)
        if why == "unknown":
            with pytest.raises(CommandRefused):
                await overlay.open()
            assert not fresh.exists()
            return
        await overlay.open()
        assert "has mode 644, not 600 as" in overlay.warnings[0]
        await overlay.undo()
    assert not fresh.exists()


@pytest.mark.parametrize("left", ["empty", "sized", "made", "theirs", "over another", "link"])
async def test_what_a_killed_process_has_made_is_made_anew_and_nothing_else(
    left: str, folder: Path
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    other = folder / "other"
    other.touch()
    async with serving(folder, chain) as vm:
        overlay = await overlay_of(vm, fresh)
        match left:
            case "empty":
                fresh.touch()
            case "sized":
                made = overlay_file.make_file(str(fresh), "")
                made.mark()
                made.close()
            case "theirs":
                fresh.write_bytes(PRECIOUS)
            case "link":
                fresh.symlink_to(other)
            case _:
                base = chain.base if left == "made" else chain.top
                run(QEMU.img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-u", "-b", base,
                    fresh, "1M")  # fmt: skip
        if left in ("empty", "sized", "made"):
            await overlay.make(again=True)
            await overlay.undo()
            assert not fresh.exists()
        else:
            with pytest.raises(qc.CommitFailed, match="exists already"):
                await overlay.make(again=True)
            again = await overlay_of(vm, folder / "x")
            again.filename = str(fresh)
            again.restore(stopped=False)
            await again.undo()
            assert os.path.lexists(fresh)
            assert other.exists()


async def test_a_file_that_comes_as_it_is_made_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with serving(folder, chain) as vm:
        overlay = await overlay_of(vm, fresh)
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
        fresh.write_bytes(PRECIOUS)
        with pytest.raises(qc.CommitFailed, match="exists already"):
            await overlay.open()
        await overlay.undo()
    assert fresh.read_bytes() == PRECIOUS


async def test_a_cancelled_creation_leaves_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    held = asyncio.Event()

    async def hold() -> None:
        held.set()
        await asyncio.Event().wait()

    def stop(command: str) -> object:
        return hold() if command == "blockdev-add" and not held.is_set() else None

    async with serving(folder, chain, monkeypatch, stop) as vm:
        overlay = await overlay_of(vm, fresh)
        opening = asyncio.create_task(overlay.open())
        await held.wait()
        assert fresh.exists()
        opening.cancel()
        await asyncio.wait({opening})
        assert not fresh.exists()
        await overlay.undo()


async def test_none_is_laid_into_the_hosts_memory(folder: Path) -> None:
    chain = make_chain(folder)
    async with serving(folder, chain) as vm:
        plan = await vm.plan("top", policy=qc.Recycle(str(folder / "fresh")))
        overlay = FreshOverlay(vm, plan, "/dev/qmpcommit-fresh", vm.cwd)
        assert "host's memory" in str(await overlay.obstacle())


def test_of_a_folder_or_a_file_that_is_not_there_nothing_is_told(tmp_path: Path) -> None:
    assert overlay_file.in_memory(str(tmp_path / "none" / "fresh")) == ""
    assert overlay_file.differences(str(tmp_path / "none"), str(tmp_path)) == ""
    made = overlay_file.make_file(str(tmp_path / "new"), str(tmp_path / "gone"))
    made.close()
    assert made.is_named()
    (tmp_path / "new").unlink()
    assert not made.is_named()
    assert not overlay_file.remove_new(str(tmp_path / "new"), made.file, ())
    assert stat.S_ISDIR(tmp_path.stat().st_mode)
    assert not overlay_file.remove_new(str(tmp_path), None, ())


async def test_an_encrypted_disk_is_not_followed_in_clear(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with serving(folder, chain) as vm:
        plan = await vm.plan("top", policy=qc.Recycle(str(fresh)))
        asked = OverlayOptions(secret="s0")  # which is for encrypted disks
        overlay = FreshOverlay(vm, replace(plan), str(fresh), vm.cwd, asked=asked)
        with pytest.raises(qc.CommitFailed, match="was not made: the disk is not encrypted"):
            await overlay.open()
    assert not fresh.exists()
