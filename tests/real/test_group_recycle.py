"""Recycles of a group that can't be, or take too long: no guest waits for another one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import qmpcommit as qc
from tests.ground.images import assert_disk, make_chain, two_chains
from tests.ground.machines import machine
from tests.ground.proxy import Strike, proxy


async def test_two_disks_can_not_have_one_fresh_overlay(folder: Path) -> None:
    chains = two_chains(folder)
    async with machine(folder, *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        same = {"vda": qc.Recycle("fresh"), "vdb": qc.Recycle(str(folder / "." / "fresh"))}
        with pytest.raises(qc.InvalidRequest, match="each needs its own overlay"):
            await vm.commit_group(same)
        assert await vm.execute("query-jobs") == []
    assert not (folder / "fresh").exists()


async def test_a_guest_is_not_paused_for_longer_than_disks_are_held(folder: Path) -> None:
    """The other one's QEMU does not say whether it has paused its own."""
    places = [folder / "1", folder / "2"]
    for place in places:
        place.mkdir()
    chains = [make_chain(place) for place in places]
    fresh = [place / "fresh.qcow2" for place in places]
    async with (
        machine(places[0], chains[0], running=True) as one,
        machine(places[1], chains[1], running=True) as two,
        proxy(folder, two.qmp) as between,
        qc.Session.connect(one.qmp) as first,
        qc.Session.connect(between.path) as second,
    ):
        between.to_qemu = dropped = Strike("stop", "drop")
        with first.events("STOP", "RESUME") as heard:
            members = [(first, "vda", qc.Recycle(str(fresh[0]))),
                       (second, "vda", qc.Recycle(str(fresh[1])))]  # fmt: skip
            async with asyncio.timeout(20):  # and not the 30 s that a command may take
                with pytest.raises(qc.GroupFailed, match=r"within 0\.5 s of the guests' pause"):
                    await qc.GroupCommit(members, hold_limit=0.5).run()
        assert dropped.met
        assert [event.name async for event in heard] == ["STOP", "RESUME"]
        for vm in (first, second):
            assert (await vm.query_status()).running
            assert await vm.execute("query-jobs") == []
            await vm.close()
        await one.quit()
        await two.quit()
    for chain, path in zip(chains, fresh, strict=True):
        assert not path.exists()
        assert_disk(chain.top, chain.pictures[-1])
