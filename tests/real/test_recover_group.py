"""A group that its process has left, ended by `recover` as its caller says."""

from __future__ import annotations

from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.group.resume import ResumableGroup
from tests.ground.daemons import many_disks
from tests.ground.images import assert_disk, make_chain


async def bitmaps_of(vm: qc.Session, node: str) -> set[str]:
    """The names of a node's."""
    nodes = await vm.execute("query-named-block-nodes", {"flat": True})
    (found,) = [each for each in nodes if each["node-name"] == node]
    return {bitmap["name"] for bitmap in found.get("dirty-bitmaps", ())}


@pytest.mark.parametrize("decide", ["pivot", "keep", "abort"])
async def test_the_bitmaps_are_carried_as_of_a_single_commit(decide: str, folder: Path) -> None:
    chains = [make_chain(folder, names=(f"base{number}", f"d{number}")) for number in range(2)]
    async with many_disks(folder / "m", *chains) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            for number in range(2):
                await vm.execute("block-dirty-bitmap-add", {"node": f"d{number}", "name": "b"})
            left = ResumableGroup([(vm, "d0"), (vm, "d1")], policy=qc.Hold())
            await left.start()
            await left.ready()
            await left.leave()
        async with qc.Session.connect(qemu.qmp) as vm:
            recovered = await vm.recover(decide=decide)  # type: ignore[arg-type]
            assert not recovered.left, recovered
            assert await vm.execute("query-jobs") == []
            pivots = decide == "pivot"
            for number, chain in enumerate(chains):
                (disk,) = [each for each in await vm.disks() if f"export{number}" in each.exports]
                active = disk.chain[0]
                assert active.filename == str(chain.base if pivots else chain.top)
                assert await bitmaps_of(vm, active.node_name) == {"b"}
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base if pivots else chain.top, chain.pictures[-1])
