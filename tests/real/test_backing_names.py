"""What a new overlay's header calls the image below it: it has to mean that image by itself."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.files import read_header
from tests.ground.images import MIB, Picture, assert_disk, create, make_chain
from tests.ground.machines import Machine, machine, storage_daemon


async def open_by_descriptor(qemu: Machine, vm: qc.Session, path: Path) -> None:
    """Have QEMU open a file as ``/dev/fdset/1``, and lay it over the disk as its active layer."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(qemu.qmp2)
        lines = monitor.makefile("r")
        lines.readline()

        def say(command: str, fds: list[int], **arguments: Any) -> None:
            text = json.dumps({"execute": command, "arguments": arguments}).encode()
            socket.send_fds(monitor, [text], fds)
            assert "return" in json.loads(lines.readline())

        say("qmp_capabilities", [])
        for flags in (os.O_RDWR, os.O_RDONLY):
            file = os.open(path, flags)
            say("add-fd", [file], **{"fdset-id": 1})
            os.close(file)
    file_node = {"driver": "file", "filename": "/dev/fdset/1"}
    node = {"driver": "qcow2", "node-name": "passed", "file": file_node, "backing": None}
    await vm.execute("blockdev-add", node)
    await vm.execute("blockdev-snapshot", {"node": "top", "overlay": "passed"})


async def test_nothing_is_laid_over_an_image_that_has_no_name(folder: Path) -> None:
    chain = make_chain(folder)
    passed, over = folder / "passed.qcow2", folder / "over.qcow2"
    create(passed, 64 * MIB)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await open_by_descriptor(qemu, vm, passed)
        with pytest.raises(qc.ChainError, match="open by a file descriptor"):
            await vm.open_window(["vda"], overlay=folder)
        over_it = {"node-name": "passed", "snapshot-file": str(over), "snapshot-node-name": "over"}
        await vm.execute("blockdev-snapshot-sync", over_it)
        with pytest.raises(qc.ChainError, match="open by a file descriptor"):
            await vm.commit("vda", policy=qc.Recycle(str(folder / "fresh")), shallow=True)
        with pytest.raises(qc.ChainError, match="open by a file descriptor"):
            await vm.discard("vda")
        assert await vm.execute("query-jobs") == []
        assert [len(disk.chain) for disk in await vm.disks()] == [4]
    assert sorted(folder.glob("*.qcow2")) == sorted([*chain.files, passed, over])


async def test_a_slice_of_a_raw_file_is_called_so(folder: Path) -> None:
    picture = Picture(4 * MIB)
    picture.fill(MIB, MIB, 7)
    path = folder / "many.raw"
    path.write_bytes(bytes(2 * MIB) + bytes(picture.data) + bytes(MIB))
    async with (
        storage_daemon(folder, make_chain(folder), export=False) as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):
        await vm.execute("blockdev-add", {
            "driver": "raw", "node-name": "slice", "offset": 2 * MIB, "size": 4 * MIB,
            "file": {"driver": "file", "filename": str(path)}})  # fmt: skip
        async with vm.snapshot(["slice"]) as read:  # which is not told the whole file's name
            assert f'"offset": {2 * MIB}' in read["slice"].filename
        (image,) = (await vm.disk("slice")).chain
        assert (image.filename, f"a slice of {path}" in image.warnings[0]) == (str(path), True)
        window = await vm.open_window(["slice"])
        overlay = Path(window["slice"].overlay)
        await daemon.quit()
    header = read_header(str(overlay))
    assert header is not None
    assert header.backing.startswith("json:")
    assert_disk(overlay, picture)
