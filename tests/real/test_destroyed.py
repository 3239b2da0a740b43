"""What goes with an overlay: internal snapshots, its external data file, what only QEMU has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.images import MIB, Picture, Write, assert_disk, create, make_chain, run, write
from tests.ground.machines import machine, storage_daemon
from tests.ground.qemu import QEMU


async def test_internal_snapshots_of_what_is_committed_are_not_spoiled(folder: Path) -> None:
    """Those of the overlay and between are refused; those of the base stay right after a pivot."""
    chain = make_chain(folder, 3)
    base, mid, top = chain.files
    for path in (base, mid, top):
        run(QEMU.img, "snapshot", "-c", f"of-{path.stem}", path)
    write(top, [Write(0, MIB, 0x99)])
    picture = chain.pictures[-1].copy()
    picture.fill(0, MIB, 0x99)
    async with storage_daemon(folder, chain) as daemon, qc.Session.connect(daemon.qmp) as vm:
        requests: tuple[dict[str, Any], ...] = (
            {"policy": qc.Pivot()}, {"policy": qc.Keep()}, {"policy": qc.Abort()}, {"top": 1},
        )  # fmt: skip
        for request in requests:
            with pytest.raises(qc.ChainError, match=r"internal snapshots \(of-mid\)"):
                await vm.commit("top", **request)
        with pytest.raises(qc.ChainError, match="of-mid"):
            await vm.flatten("top", keep=1)
        with pytest.raises(qc.ChainError, match="of-mid"):
            await vm.commit_group({"top": qc.Keep()})
        job = await vm.commit(
            "top", policy=qc.Pivot(), delete=True, override=["internal-snapshots"]
        )
        outcome = await job.wait()
        assert outcome.deleted == []
        assert (
            len([text for text in outcome.warnings if "it holds internal snapshots" in text]) == 2
        )
        await daemon.quit()
    assert_disk(base, picture)
    run(QEMU.img, "snapshot", "-a", "of-base", base)
    assert_disk(base, chain.pictures[0])


@pytest.mark.parametrize("how", ["delete", "rename", "own node", "linked"])
async def test_an_external_data_file_goes_with_its_overlay(how: str, folder: Path) -> None:
    base, top, data = create(folder / "base", 16 * MIB), folder / "top", folder / "top.data"
    run(QEMU.img, "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", "-b", base, "-F",
        "qcow2", top)  # fmt: skip
    write(top, [Write(MIB, 3 * MIB, 0x11)])
    picture = Picture(16 * MIB)
    picture.fill(MIB, 3 * MIB, 0x11)
    node = f"driver=qcow2,node-name=t,file.driver=file,file.filename={top}"
    extra = ["-blockdev", node, "-device", "virtio-blk-pci,drive=t,id=vda"]
    if how == "own node":
        extra[1] += ",data-file=d"
        extra = ["-blockdev", f"driver=file,node-name=d,filename={data}", *extra]
    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        if how == "linked":  # what a link leads to may be anybody's
            data.rename(folder / "elsewhere")
            data.symlink_to(folder / "elsewhere")
        stale: Any = "rename" if how == "rename" else "delete"
        outcome = await (await vm.commit("vda", policy=qc.Pivot(), stale=stale)).wait()
        await qemu.quit()
    assert not top.exists()
    if how in ("delete", "own node"):
        assert (outcome.deleted, outcome.warnings) == ([str(top), str(data)], [])
        assert not data.exists()
    else:
        assert str(data) in " ".join(outcome.warnings)
        assert data.exists()
    assert_disk(base, picture)


async def test_what_only_qemu_has_is_neither_committed_nor_lain_over(folder: Path) -> None:
    """The temporary overlay of ``snapshot=on`` is unlinked as soon as it is open."""
    chain = make_chain(folder)
    extra = ["-drive", f"file={chain.top},if=none,id=d,snapshot=on", "-device",
             "virtio-blk-pci,drive=d,id=vda"]  # fmt: skip
    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        for policy in (qc.Pivot(), qc.Keep()):
            with pytest.raises(qc.ChainError, match="temporary file of QEMU's own"):
                await vm.commit("vda", policy=policy)
        with pytest.raises(qc.ChainError, match=r"^\[temporary-overlay\] .*merged below it"):
            await vm.commit("vda", top=1)
        with pytest.raises(qc.ChainError, match="snapshot=on"):
            await vm.open_window(["vda"], overlay=folder)
        with pytest.raises(qc.ChainError, match=r"snapshot=on.*name a file or a folder"):
            await vm.discard("vda", guest="stop")
        assert await vm.execute("query-jobs") == []
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[0])


@pytest.mark.parametrize("how", ["delete", "rename", "discard", "data file"])
async def test_a_file_of_which_a_stale_layer_is_a_part_only_stays(how: str, folder: Path) -> None:
    """A layer may lie in a slice of a file that holds other things as well."""
    base, box, top = create(folder / "base", 16 * MIB), folder / "box", folder / "top"
    data = how == "data file"
    if data:
        run(QEMU.img, "create", "-q", "-f", "qcow2", "-o", f"data_file={folder / 'd'}", top, "16M")
    else:
        create(top, 16 * MIB)
    others = bytes([0x77]) * MIB
    part = {"driver": "raw", "offset": MIB, "size": 16 * MIB,
            "file": {"driver": "file", "filename": str(box)}}  # fmt: skip
    box.write_bytes(others + (bytes(16 * MIB) if data else top.read_bytes()))
    with box.open("r+b") as file:
        file.truncate(17 * MIB)
        file.seek(0, 2)
        file.write(others)
    below: dict[str, Any] = {"driver": "qcow2", "node-name": "b",
                             "file": {"driver": "file", "filename": str(base)}}  # fmt: skip
    over: dict[str, Any] = {"driver": "qcow2", "node-name": "t", "backing": "b", "file": part}
    if data:
        over |= {"file": {"driver": "file", "filename": str(top)}, "data-file": part}
    extra = ["-blockdev", json.dumps(below), "-blockdev", json.dumps(over),
             "-device", "virtio-blk-pci,drive=t,id=vda"]  # fmt: skip
    picture = Picture(16 * MIB)
    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        disk = "/machine/peripheral/vda/virtio-backend"
        await vm.execute("human-monitor-command", {
            "command-line": f'qemu-io -d {disk} "write -P 0x11 1M 3M"'})  # fmt: skip
        if how == "discard":
            discarded = await vm.discard("vda", guest="stop", delete=True)
            assert not discarded.deleted
            assert f'"offset": {MIB}' in discarded.former
            warnings = list(discarded.warnings)
            await (await vm.commit("vda", policy=qc.Pivot())).wait()
        else:
            stale: Any = "rename" if how == "rename" else "delete"
            outcome = await (await vm.commit("vda", policy=qc.Pivot(), stale=stale)).wait()
            assert str(box) not in (*outcome.deleted, *outcome.renamed, *outcome.invalidated)
            picture.fill(MIB, 3 * MIB, 0x11)
            warnings = outcome.warnings
        await qemu.quit()
    assert str(box) in " ".join(warnings)
    held = box.read_bytes()
    assert (held[:MIB], held[-MIB:]) == (others, others)
    assert_disk(base, picture)
