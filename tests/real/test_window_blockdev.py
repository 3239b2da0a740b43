"""Windows over chains whose every layer was opened with ``-blockdev``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import qmpcommit as qc
from tests.ground.images import MIB, assert_disk, make_chain, run
from tests.ground.machines import machine, storage_daemon
from tests.ground.nbd import Nbd
from tests.ground.qemu import QEMU


def convert(path: str, copy: Path, *options: str) -> None:
    run(QEMU.img, "convert", *options, "-O", "qcow2", path, copy)


async def test_the_frozen_file_is_read_while_layers_below_are_held_for_writing(
    folder: Path,
) -> None:
    chain = make_chain(folder)
    now = chain.pictures[-1].copy()
    copy = folder / "copy"
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with await Nbd.connect(qemu.nbd, "top") as nbd, vm.snapshot(["top"]) as window:
            await nbd.write(5 * MIB, b"\xaa" * MIB)
            now.write(5 * MIB, b"\xaa" * MIB)
            frozen = window["top"].filename
            await asyncio.to_thread(convert, frozen, copy, "-U")
        assert await vm.windows() == []
        await vm.close()
        await qemu.quit()
    assert_disk(copy, chain.pictures[-1])
    assert_disk(chain.top, now)


@pytest.mark.parametrize("iothread", [False, True])
@pytest.mark.parametrize("running", [False, True])
async def test_two_disks_of_a_machine(folder: Path, iothread: bool, running: bool) -> None:
    chains = make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))
    async with machine(folder, *chains, iothread=iothread, running=running) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            async with vm.snapshot(["vda", "vdb"], freeze="pause") as window:
                assert [len(disk.chain) for disk in await vm.disks()] == [3, 3]
                assert (window.quiesced is not None) == running
            assert [len(disk.chain) for disk in await vm.disks()] == [2, 2]
            assert [len(outcome.deleted) for outcome in window.outcomes] == [1, 1]
        await qemu.quit()
    assert not list(folder.glob("*qmpcommit-window*"))
    for chain in chains:
        for path, picture in zip(chain.files, chain.pictures, strict=True):
            assert_disk(path, picture)
