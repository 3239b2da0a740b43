"""A golden cycle under a real guest: what is kept it finds again, and what is not, nowhere."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

import qmpcommit as qc
from tests.ground.qemu import QEMU
from tests.guest.guest import assert_files, count_in, file_system, guest, needs_guest

pytestmark = [needs_guest, pytest.mark.timeout(600)]


async def test_a_guest_comes_up_again_from_what_was_kept(folder: Path) -> None:
    """Its two disks are kept, discarded with a reset, and kept again, each time both."""
    chains = [file_system(folder, names=(f"base{n}", f"top{n}")) for n in "01"]
    bases = [chain.base for chain in chains]
    disks, deserves = ["vda", "vdb"], True

    async def keep_if(_: qc.Ready) -> bool:
        return deserves

    kinds = ["virtio-blk-pci", "scsi-hd"]
    async with guest(folder, *chains, device=kinds, reboots=True) as made:
        async with qc.Session.connect(made.qemu.qmp) as vm:
            await made.counts(1)
            kept = await vm.cycle(disks, keep_if=keep_if, guest="reset", delete=True)
            assert [each.result for each in kept] == ["kept"] * 2
            await made.counts(2)
            at_keep = [sha256(base.read_bytes()).digest() for base in bases]
            await made.more()

            deserves = False
            thrown = await vm.cycle(disks, keep_if=keep_if, guest="reset", delete=True)
            assert [each.result for each in thrown] == ["discarded"] * 2
            if QEMU.version < (6,):
                await made.qemu.quit()
                assert [sha256(base.read_bytes()).digest() for base in bases] == at_keep
                assert [count_in(Path(each.overlay), folder) for each in thrown] == [1, 1]
                pytest.skip("all else held; QEMU 5.2 on TCG boots no guest after a reset")
            await made.boots()
            made.order("tell")
            await made.says("counts 00000001 00000001")
            await made.counts(3)
            made.order("write")
            await made.more()
            assert [sha256(base.read_bytes()).digest() for base in bases] == at_keep
            assert [count_in(base, folder) for base in bases] == [1, 1]

            deserves = True
            kept = await vm.cycle(disks, keep_if=keep_if, guest="reset", delete=True)
            await made.more()
            assert [count_in(base, folder) for base in bases] == [3, 3]
            assert await vm.query_jobs() == []
        await made.power_off()
    overlays = [Path(each.overlay) for each in kept]
    left = set(folder.glob("*.qcow2*"))
    assert left == {*bases, *overlays}, "what was kept or discarded is deleted"
    for number, overlay in enumerate(overlays):
        assert_files(overlay, made, disk=number)
