"""What headers say after a commit: it opens, and means the same disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.files import read_header
from qmpcommit.block.identity import FileId
from qmpcommit.commit.overlay import fresh as fresh_overlay
from qmpcommit.commit.overlay.file import write_base_name
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
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.qemu import QEMU

SIZE = 4 * MIB


def file_of(path: Path | str) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


def qcow2(path: Path | str) -> dict[str, Any]:
    return {"driver": "qcow2", "file": file_of(path)}


def filled(path: Path, layer: int, picture: Picture, fmt: str = "qcow2") -> Path:
    """Give a layer a MiB of its own."""
    write(path, [Write(layer * MIB, MIB, layer + 1)], fmt=fmt)
    picture.fill(layer * MIB, MIB, layer + 1)
    return path


def said(path: Path) -> tuple[str, str]:
    """The backing name and format in a header."""
    header = read_header(str(path))
    assert header is not None
    return header.backing, header.backing_format


@asynccontextmanager
async def opened(folder: Path, *nodes: dict[str, Any]) -> AsyncIterator[tuple[Machine, qc.Session]]:
    """A storage daemon with these layers, base first, called ``l0`` and so on."""
    (folder / "own").mkdir()
    async with (
        storage_daemon(folder, make_chain(folder / "own", size=64 * MIB), export=False) as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):
        for number, node in enumerate(nodes):
            below = {"backing": f"l{number - 1}"} if number else {}
            await vm.execute("blockdev-add", {"node-name": f"l{number}", **node, **below})
        yield daemon, vm


def of_slice(folder: Path, inner: str, picture: Picture) -> dict[str, Any]:
    """A base in the middle of a file, bare or a qcow2."""
    image = create(folder / "image", SIZE, fmt=inner)
    data = filled(image, 0, picture, inner).read_bytes()
    whole = folder / "whole.raw"
    whole.write_bytes(b"x" * MIB + data.ljust(8 * MIB, b"\0") + b"x" * MIB)
    part = {"driver": "raw", "offset": MIB, "size": SIZE if inner == "raw" else 8 * MIB,
            "file": file_of(whole)}  # fmt: skip
    return part if inner == "raw" else {"driver": "qcow2", "file": part}


@pytest.mark.parametrize("inner", ["raw", "qcow2"])
async def test_a_base_inside_a_file_is_named_with_its_place_in_it(inner: str, folder: Path) -> None:
    picture = Picture(SIZE)
    base = of_slice(folder, inner, picture)
    mid = create(folder / "mid", SIZE)
    run(QEMU.img, "rebase", "-u", "-F", inner, "-b", f"json:{json.dumps(base)}", mid)
    filled(mid, 1, picture)
    top = filled(create(folder / "top", SIZE, backing="mid"), 2, picture)
    fresh = folder / "fresh"
    async with opened(folder, base, qcow2(mid), qcow2(top)) as (daemon, vm):
        merged = await (await vm.commit("l2", top="l1", keep_relative=True, delete=True)).wait()
        assert (merged.warnings, merged.deleted) == ([], [str(mid)])
        recycled = await (await vm.commit("l2", policy=qc.Recycle(str(fresh)))).wait()
        assert not any("header" in warning for warning in recycled.warnings)
        window = await vm.open_window([str(fresh)])
        over = Path(window[str(fresh)].overlay)
        name, fmt = said(top)
        assert (said(fresh), fmt) == ((name, inner), inner)
        assert json.loads(name.removeprefix("json:")) == base
        await vm.close_window(window)
        assert not over.exists()
        await daemon.quit()
    for file in (top, fresh):
        assert_disk(file, picture)


async def test_a_name_through_a_linked_folder_is_not_another_vms(folder: Path) -> None:
    """From the text of the overlay's folder, ``../gold/base`` is the other one."""
    picture = Picture(SIZE)
    for name in ("real/deep", "real/gold", "gold"):
        (folder / name).mkdir(parents=True)
    (folder / "link").symlink_to("real/deep")
    base = filled(create(folder / "gold/base", SIZE), 0, picture)
    create(folder / "real/gold/base", SIZE)
    mid = filled(create(folder / "link/mid", SIZE, backing=base), 1, picture)
    top = filled(create(folder / "link/top", SIZE, backing=mid), 2, picture)
    async with opened(folder, qcow2(base), qcow2(mid), qcow2(top)) as (daemon, vm):
        assert (await (await vm.commit("l2", top="l1", keep_relative=True)).wait()).warnings == []
        await daemon.quit()
    assert said(top) == ("../../gold/base", "qcow2")
    assert_disk(top, picture)


async def test_a_chain_that_was_relative_goes_on_when_it_is_moved(folder: Path) -> None:
    """Each layer has a folder of its own, and those of the merged layers are gone."""
    picture = Picture(SIZE)
    vm_folder = folder / "vm"
    files = []
    for number, name in enumerate("abcd"):
        (vm_folder / name).mkdir(parents=True)
        below = f"../{'abcd'[number - 1]}/i" if number else None
        files.append(filled(create(vm_folder / name / "i", SIZE, backing=below), number, picture))
    top = files[-1]
    chain = Chain([top], [picture])
    async with (
        storage_daemon(folder, chain, style="implicit") as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):
        steps = await vm.flatten("export0", keep=2, delete=True)
        assert [step.warnings for step in steps] == [[], []]
        assert [step.base.filename for step in steps] == [str(files[0])] * 2
        assert [step.deleted for step in steps] == [[str(files[1])], [str(files[2])]]
        for name in "bc":
            (vm_folder / name).rmdir()
        again = f"'mkdir {vm_folder}/c {vm_folder}/b'"
        with pytest.raises(qc.ChainError, match=again):
            await vm.commit("export0", policy=qc.Pivot())
        async with vm.snapshot(["export0"]):
            pass
        await daemon.quit()
    assert said(top) == ("../a/i", "qcow2")
    shutil.move(vm_folder, folder / "moved")
    assert_disk(folder / "moved/d/i", picture)


@pytest.mark.parametrize("how", ["link", "folders", "bitmaps", "elsewhere"])
async def test_a_fresh_overlay_moves_with_its_base_and_is_shown_by_its_name(
    how: str, folder: Path
) -> None:
    """QEMU knows the base by the name that it shows, the header by one that was relative before.

    A header into which QEMU writes bitmaps has the name that QEMU knows.
    """
    picture = Picture(SIZE)
    vm_folder = folder if how == "elsewhere" else folder / "vm"
    places = [vm_folder / (name if how == "folders" else "") for name in "abc"]
    files: list[Path] = []
    for number, place in enumerate(places):
        place.mkdir(parents=True, exist_ok=True)
        below = os.path.relpath(files[-1], place) if files else None
        files.append(create(place / f"i{number}", SIZE, backing=below))
        if number < 2:  # what the top holds is thrown away
            filled(files[-1], number, picture)
    write(files[-1], [Write(2 * MIB, MIB, 9)])
    (folder / "link").symlink_to("vm")
    seen = folder / "link" if how == "link" else vm_folder
    chain = Chain([seen / files[-1].relative_to(vm_folder)], [picture])
    if how == "elsewhere":  # names that count from QEMU's folder
        chain = Chain([Path(files[-1].name)], [picture])
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        if how == "bitmaps":
            await vm.execute("block-dirty-bitmap-add", {
                "node": chain.top.stem, "name": "b", "persistent": True})  # fmt: skip
        await vm.discard("vda", guest="stop", delete=True)
        policy = qc.Recycle(str(places[-1] / "fresh"))
        outcome = await (await vm.commit("vda", policy=policy, shallow=True, delete=True)).wait()
        assert [warning for warning in outcome.warnings if "bitmap" not in warning] == []
        assert outcome.active is not None
        (block,) = await vm.execute("query-block")
        shown = block["inserted"]["file"]
        assert shown == outcome.active.filename == str(places[-1] / "fresh")
        if how == "bitmaps":
            await vm.execute("block-dirty-bitmap-add", {
                "node": outcome.active.node_name, "name": "b", "persistent": True})  # fmt: skip
        if how == "elsewhere":
            (folder / "other").mkdir()
            policy = qc.Recycle(str(folder / "other/fresh"))
            await (await vm.commit("vda", policy=policy, shallow=True)).wait()
        await qemu.quit()
    if how == "elsewhere":
        assert said(folder / "other/fresh") == (str(files[1]), "qcow2")
        assert_disk(folder / "other/fresh", picture)
    name = str(files[1]) if how == "bitmaps" else os.path.relpath(files[1], places[-1])
    assert said(places[-1] / "fresh") == (name, "qcow2")
    (folder / "link").unlink()
    if how in ("link", "folders"):
        shutil.move(vm_folder, folder / "moved")
        places[-1] = folder / "moved" / places[-1].relative_to(vm_folder)
    assert_disk(places[-1] / "fresh", picture)


async def test_what_qemu_writes_again_does_not_lead_through_the_folders_of_merged_layers(
    folder: Path,
) -> None:
    """A bitmap that comes later has QEMU write the header anew, with the name that it knows."""
    picture, files = Picture(SIZE), list[Path]()
    for number, name in enumerate("abc"):
        (folder / name).mkdir()
        below = os.path.relpath(files[-1], folder / name) if files else None
        files.append(create(folder / name / "i", SIZE, backing=below))
        filled(files[-1], number, picture)
    chain, fresh = Chain([files[-1]], [picture]), folder / "c/fresh"
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        job = await vm.commit("vda", policy=qc.Recycle(str(fresh)), delete=True)
        outcome = await job.wait()
        assert outcome.active is not None
        await vm.execute("block-dirty-bitmap-add", {
            "node": outcome.active.node_name, "name": "later", "persistent": True})  # fmt: skip
        await qemu.quit()
    (folder / "b").rmdir()
    assert said(fresh) == (str(files[0]), "qcow2")
    assert_disk(fresh, picture)


async def test_a_name_is_written_into_the_overlay_that_was_made_and_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = create(folder / "base", SIZE), folder / "link"
    alone, top = create(folder / "alone", SIZE), create(folder / "top", SIZE, backing=base)
    other.symlink_to(top)
    id_of = {path: FileId.of(path.stat()) for path in (base, alone, top)}
    for path, file, name in (
        (other, id_of[top], "base"),
        (top, id_of[base], "base"),
        (alone, id_of[alone], "base"),
        (top, id_of[top], "b" * 1024),
    ):
        assert not write_base_name(str(path), file, name)
    assert said(top) == (str(base), "qcow2")
    longer = f"{'./' * 200}base"
    for name in ("base", longer):
        assert write_base_name(str(top), id_of[top], name)
        assert said(top) == (name, "qcow2")
    assert_disk(top, Picture(SIZE))
    async with (
        machine(folder, Chain([top], [Picture(SIZE)]), style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        monkeypatch.setattr(fresh_overlay, "write_base_name", _full)
        job = await vm.commit("vda", policy=qc.Recycle(str(folder / "fresh")))
        with pytest.raises(qc.CommitFailed, match="fresh could not be written: No space left"):
            await job.wait()
        assert not (folder / "fresh").exists()
        await qemu.quit()


_pwrite = os.pwrite


def _full(opened: int, data: bytes, place: int) -> int:
    """There is no room for a name; whether there is for the file itself was asked before."""
    if place:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return _pwrite(opened, data, place)


@pytest.mark.parametrize("shared", [False, True])
async def test_flattening_makes_names_relative_where_it_is_asked_to(
    shared: bool, folder: Path
) -> None:
    """But not in two folders at once: QEMU writes one name into all overlays over the layer."""
    picture = Picture(SIZE)
    base = filled(create(folder / "base", SIZE), 0, picture)
    mid = filled(create(folder / "mid", SIZE, backing=base), 1, picture)
    top = filled(create(folder / "top", SIZE, backing=mid), 2, picture)
    async with opened(folder, qcow2(base), qcow2(mid), qcow2(top)) as (daemon, vm):
        if shared:
            (folder / "other").mkdir()
            other = create(folder / "other/top", SIZE, backing=mid)
            await vm.execute("blockdev-add", {"node-name": "o", "backing": "l1", **qcow2(other)})
            job = await vm.commit("l2", top="l1", override=["base-shared"], keep_relative=True)
            await job.wait()
            assert said(other) == (str(base), "qcow2")
        else:
            await vm.flatten("l2", keep=2, keep_relative=True)
        await daemon.quit()
    assert said(top) == (str(base) if shared else "base", "qcow2")
    assert_disk(top, picture)


async def test_a_bare_file_below_is_called_raw_or_it_is_said(folder: Path) -> None:
    picture = Picture(SIZE)
    base = filled(create(folder / "base", SIZE, fmt="raw"), 0, picture, "raw")
    mid = filled(create(folder / "mid", SIZE, backing=base, backing_fmt="raw"), 1, picture)
    top = filled(create(folder / "top", SIZE, backing=mid), 2, picture)
    fresh = folder / "fresh"
    async with opened(folder, file_of(base), qcow2(mid), qcow2(top)) as (daemon, vm):
        outcome = await (await vm.commit("l2", top="l1", delete=True)).wait()
        masks = (await vm.features()).has_argument("block-commit", "backing-mask-protocol")
        mending = f"qemu-img rebase -u -f qcow2 -F raw -b {base} {top}"
        assert any(mending in warning for warning in outcome.warnings) is not masks
        assert outcome.deleted == [str(mid)]
        recycle = qc.Recycle(str(fresh))
        await (await vm.commit("l2", policy=recycle, keep_relative=True)).wait()
        await daemon.quit()
    assert said(top) == (str(base), "raw" if masks else "file")
    assert said(fresh) == ("base", "raw")
    for file in (top, fresh):
        assert_disk(file, picture)


async def test_a_header_that_leads_astray_is_told_of_and_nothing_is_deleted(
    folder: Path,
) -> None:
    picture = Picture(SIZE)
    base = filled(create(folder / "base", SIZE), 0, picture)
    create(folder / "rebs", SIZE)
    mid = filled(create(folder / "mid", SIZE, backing=base), 1, picture)
    top = filled(create(folder / "top", SIZE, backing=mid), 2, picture)

    async def spoil(outcome: qc.CommitOutcome) -> None:
        data = top.read_bytes()
        top.write_bytes(data.replace(bytes(base), bytes(folder / "rebs")))

    async with opened(folder, qcow2(base), qcow2(mid), qcow2(top)) as (daemon, vm):
        outcome = await (await vm.commit("l2", top="l1", delete=True, on_pivot=spoil)).wait()
        told, stays = outcome.warnings
        assert f"names '{folder}/rebs'" in told
        mending = told.partition("Mend it while the VM is off: ")[2]
        assert str(mid) in stays
        await daemon.quit()
    assert (outcome.deleted, mid.exists()) == ([], True)
    run(*mending.split())
    assert_disk(top, picture)


@pytest.mark.parametrize("verb", ["overlay", "merge", "relative merge", "flatten"])
async def test_a_layer_that_is_a_link_is_named_so_that_its_own_base_is_found(
    verb: str, folder: Path
) -> None:
    """A relative name counts from the folder of the link, by which the layer was opened."""
    shown, deep, over = folder / "shown", folder / "far" / "down", folder / "over"
    for each in (shown, deep, over):
        each.mkdir(parents=True)
    picture = Picture(SIZE)
    base = filled(create(shown / "base", SIZE), 0, picture)
    layers, below = [base], "base"
    for number, name in enumerate(("linked", "mid", "top"), 1):
        at = deep / name if name == "linked" else over / name
        run(
            QEMU.img, "create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", at, str(SIZE)
        )
        if name == "linked":
            (shown / name).symlink_to(at)
            at = shown / name
        layers.append(filled(at, number, picture))
        below = str(shown / name) if name == "linked" else name
    fresh = folder / "fresh"
    if verb == "overlay":
        layers = layers[:2]
    async with opened(folder, *map(qcow2, layers)) as (daemon, vm):
        if verb == "overlay":
            await vm.overlay(["l1"], overlay=fresh)
        elif verb == "flatten":
            await vm.flatten("l3", keep=3)
        else:
            relative = verb == "relative merge"
            await (await vm.commit("l3", top=1, base=2, keep_relative=relative)).wait()
        await daemon.quit()
    if verb == "overlay":
        assert said(fresh) == (str(shown / "linked"), "qcow2")
        run(QEMU.img, "info", "--backing-chain", fresh)
        for number in (2, 3):
            picture.fill(number * MIB, MIB, 0)
        assert_disk(fresh, picture)
    else:
        run(QEMU.img, "info", "--backing-chain", over / "top")
        assert_disk(over / "top", picture)
