"""A fresh overlay is like the one that it follows, and nothing that exists is ever written to."""

from __future__ import annotations

import asyncio
import inspect
import os
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.bitmaps import bitmaps_of
from qmpcommit.commit.overlay import file as overlay_file
from qmpcommit.commit.overlay import fresh as fresh_overlay
from qmpcommit.commit.overlay import place as overlay_place
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.errors import CommandRefused
from qmpcommit.window import run as window
from tests.ground.daemons import many_disks
from tests.ground.images import MIB, Chain, assert_disk, make_chain, run
from tests.ground.machines import machine, node_options
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


@pytest.mark.parametrize("how", ["link", "gone"])
@pytest.mark.parametrize(
    ("verb", "at"),
    [("recycle", "blockdev-create"), ("recycle", "job-complete"), ("discard", "blockdev-create"),
     ("discard", "blockdev-reopen"), ("window", "blockdev-create")],
)  # fmt: skip
async def test_an_overlay_that_loses_its_name_is_left_or_told_of(
    verb: str, at: str, how: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, other, place = make_chain(folder), folder / "other", folder / "place"
    other.write_bytes(PRECIOUS)
    place.mkdir()
    done: list[str] = []

    def plant(command: str) -> None:
        if command == at and not done:
            done.append(command)
            (fresh,) = place.iterdir()
            fresh.unlink()
            if how == "link":
                fresh.symlink_to(other)

    async def work(vm: qc.Session) -> list[str]:
        if verb == "window":
            await vm.open_window(["top"], overlay=place)
        elif verb == "discard":
            return list((await vm.discard("top", guest="stop", overlay=place / "fresh")).warnings)
        job = await vm.commit("top", policy=qc.Recycle(str(place / "fresh")))
        return (await job.wait()).warnings

    async with serving(folder, chain, monkeypatch, plant) as vm:
        if at == "blockdev-create":
            with pytest.raises(qc.CommitFailed, match="does not lead to the fresh overlay any"):
                await work(vm)
            assert [disk.root for disk in await vm.disks()] == ["top"]
            assert not [name for name in (await vm.graph()).nodes if name.startswith("qmpcommit")]
        else:
            told = [text for text in await work(vm) if "does not lead to the fresh" in text]
            assert len(told) == 1
    assert other.read_bytes() == PRECIOUS


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


@pytest.mark.parametrize("how", ["cancelled", "killed"])
async def test_what_only_qemu_can_make_leaves_no_character_device(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch)
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    making: list[asyncio.Task[None]] = []

    def cancel(command: str) -> None:
        if command == "chardev-add" and making:
            making.pop().cancel()

    async with serving(folder, chain, monkeypatch, cancel) as vm:
        overlay = await overlay_of(vm, fresh)
        device = f"{overlay.node.removesuffix('top')}file"
        if how == "cancelled":
            making.append(asyncio.create_task(overlay.open()))
            with pytest.raises(asyncio.CancelledError):
                await making[0]
        else:
            backend = {"type": "file", "data": {"out": str(fresh), "append": True}}
            await vm.execute("chardev-add", {"id": device, "backend": backend})
            overlay.restore(stopped=False)
        await overlay.undo()
        with pytest.raises(CommandRefused, match="not found"):
            await vm.execute("chardev-remove", {"id": device})


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
            with pytest.raises(qc.CommitFailed, match=r"could not create .*: unknown"):
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


SECRET = ("--object", "secret,id=s0,data=hello")
LUKS = "encrypt.format=luks,encrypt.key-secret=s0"


def encrypt_top(chain: Chain) -> list[str]:
    """Make the top of a chain anew, encrypted; the daemon's options for it."""
    chain.top.unlink()
    words = [str(QEMU.img), "create", "-q", "-f", "qcow2", *SECRET, "-b", str(chain.base),
             "-F", "qcow2", "-o", f"{LUKS},encrypt.iter-time=10", str(chain.top)]  # fmt: skip
    while subprocess.run(words, check=False, stderr=subprocess.DEVNULL).returncode:
        pass  # on a busy machine it can't tell how fast it encrypts
    top = f"driver=qcow2,file.filename={chain.top},encrypt.key-secret=s0"
    run(QEMU.io, *SECRET, "-c", "write -P 0x77 2M 1M", "--image-opts", top)
    base, top = node_options(chain)
    return [*SECRET, "--blockdev", base, "--blockdev", f"{top},{LUKS}"]


async def test_over_an_encrypted_disk_lies_an_encrypted_overlay_or_none(folder: Path) -> None:
    chain, plain = make_chain(folder), make_chain(folder, names=("low", "plain"))
    words = encrypt_top(chain)
    fresh, last = folder / "fresh.qcow2", folder / "last.qcow2"
    async with (
        many_disks(folder / "d", plain, nodes=words, exports=False) as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):
        for refused in (
            vm.commit("top", policy=qc.Recycle(str(fresh)), override=["encrypted"]),
            vm.discard("top", guest="stop"),
            vm.open_window(["top"]),
        ):
            with pytest.raises(qc.ChainError, match=r"in clear.*--overlay-secret ID"):
                await refused
        with pytest.raises(qc.ChainError, match="no secret object 'other'"):
            await vm.discard("top", guest="stop", overlay_secret="other")
        with pytest.raises(qc.ChainError, match="is not encrypted"):
            await vm.discard("plain", guest="stop", overlay_secret="s0")
        async with vm.snapshot(["top", "plain"], overlay_secret="s0"):
            found = {disk.chain[1].node_name: disk.chain[0] for disk in await vm.disks()}
            told = {name: "encrypted" in image.warnings for name, image in found.items()}
            assert told == {"top": True, "plain": False}
        policy = qc.Recycle(str(fresh), overlay_secret="s0")
        job = await vm.commit("top", policy=policy, override=["encrypted"])
        outcome = await job.wait()
        assert outcome.active is not None
        name = outcome.active.node_name
        await vm.discard(name, guest="stop", overlay=last, overlay_secret="s0")
        await daemon.quit()
    for path in (fresh, last):
        image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s0"
        said = run(QEMU.io, *SECRET, "-c", "read -P 0x77 2M 1M", "--image-opts", image)
        assert "Pattern verification failed" not in said


@pytest.mark.parametrize("verb", ["recycle", "discard"])
async def test_its_nodes_are_opened_as_those_before(verb: str, folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    base, top = node_options(chain)
    mode = "cache.no-flush=on,detect-zeroes=unmap,discard=unmap"
    nodes = ["--blockdev", base, "--blockdev", f"{top},{mode},file.cache.no-flush=on"]
    options = {"detect-zeroes": "on"}
    async with (
        many_disks(folder / "d", nodes=nodes, exports=False) as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):
        if verb == "recycle":
            policy = qc.Recycle(str(fresh), overlay_options=options)
            outcome = await (await vm.commit("top", policy=policy)).wait()
            assert not [text for text in outcome.warnings if "fresh" in text]
        else:
            await vm.discard("top", guest="stop", overlay=fresh, overlay_options=options)
        graph = await vm.graph()
        (disk,) = await vm.disks()
        mine, below = graph.nodes[disk.root], graph.leaf(disk.root)
        assert [each.raw["cache"]["no-flush"] for each in (mine, below)] == [True, True]
        assert mine.raw["detect_zeroes"] == "on"
        await daemon.quit()
    assert_disk(fresh, chain.pictures[-1 if verb == "recycle" else 0])


async def test_a_discard_keeps_what_a_drive_was_given(folder: Path) -> None:
    """QEMU forgets detect-zeroes of a ``-drive`` when it reopens its node below the fresh one."""
    chain = make_chain(folder)
    mode = "detect-zeroes=unmap,discard=unmap,cache.no-flush=on"
    extra = ["-drive", f"file={chain.top},if=none,id=d,{mode}", "-device",
             "virtio-blk-pci,drive=d,id=vda"]  # fmt: skip
    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await vm.discard("vda", guest="stop", overlay=folder / "fresh")
        graph = await vm.graph()
        (disk,) = await vm.disks()
        mine = graph.nodes[disk.root].raw
        assert mine["file"] == str(folder / "fresh")
        assert (mine["detect_zeroes"], mine["cache"]["no-flush"]) == ("unmap", True)
        await qemu.quit()
    assert_disk(folder / "fresh", chain.pictures[0])


async def test_bitmaps_go_on_in_the_fresh_overlay(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    run(QEMU.img, "bitmap", "--add", "-g", "131072", chain.top, "nightly")
    run(QEMU.img, "bitmap", "--add", "--disable", chain.top, "resting")
    run(QEMU.io, "-c", "write -P 7 8M 1M", chain.top)
    chain.pictures[-1].fill(8 * MIB, MIB, 7)
    async with machine(folder, chain, running=True) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Recycle(str(fresh)))
        outcome = await job.wait()
        assert outcome.active is not None
        graph = await vm.graph()
        for name in (outcome.active.node_name, "base"):
            found = {each.name: each for each in bitmaps_of(graph, name)}
            assert found.keys() == {"nightly", "resting"}
            nightly, resting = found["nightly"], found["resting"]
            assert (nightly.granularity, nightly.persistent) == (131072, True)
            assert (nightly.recording, resting.recording) == (True, False)
            assert nightly.marked == MIB
        done = await vm.discard("vda", guest="reset")
        assert any("nightly, resting went with" in text for text in done.warnings)
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])


async def test_a_window_that_could_not_be_closed_is_not_opened(folder: Path) -> None:
    """A read-only disk, whose protocol node QEMU would not open for writing at the end."""
    (folder / "disk.qcow2").touch()
    chain = make_chain(folder, 1, names=("disk",))
    node = f"driver=qcow2,node-name=disk,read-only=on,file.driver=file,file.filename={chain.top}"
    async with (
        many_disks(
            folder / "d", nodes=["--blockdev", f"{node},file.read-only=on,file.node-name=f"],
            exports=False,
        ) as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):  # fmt: skip
        with pytest.raises(qc.WindowError, match=r"is read-only, .*never be merged back"):
            await vm.open_window(["disk"])
        await daemon.quit()
    assert len(list(folder.glob("disk*"))) == 1


@pytest.mark.parametrize("verb", ["discard", "window"])
async def test_beside_a_block_device_no_overlay_is_laid(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, place = make_chain(folder), folder / "place"
    place.mkdir()
    async with serving(folder, chain) as vm:
        for module in (overlay_place, window):
            monkeypatch.setattr(module, "is_device", lambda path: path == str(chain.top))
        asking = vm.open_window(["top"]) if verb == "window" else vm.discard("top")
        with pytest.raises(qc.QmpCommitError, match=r"a folder for it.*Nothing was changed"):
            await asking
        if verb == "window":
            async with vm.snapshot(["top"], overlay=place):
                assert len(list(place.iterdir())) == 1
        else:
            done = await vm.discard("top", guest="stop", overlay=place)
            assert Path(done.overlay).parent == place
    assert overlay_file.is_device("/dev/sda")
    assert not overlay_file.is_device(str(place))
    assert not overlay_file.is_device(str(place / "none"))


async def test_a_name_that_is_taken_is_known_before_the_base_is_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    fresh.write_bytes(PRECIOUS)
    unseen(monkeypatch)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # as in a folder of QEMU's alone
    async with serving(folder, chain) as vm:
        with pytest.raises(qc.InvalidRequest, match=r"exists already.*Nothing was sent"):
            await vm.commit("top", policy=qc.Recycle(str(fresh)))
    assert fresh.read_bytes() == PRECIOUS
