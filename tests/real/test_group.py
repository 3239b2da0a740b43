"""Many disks at one instant, on real QEMUs: all or none, and what one instant means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.daemons import many_disks
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import machine


def two_chains(folder: Path, **more: Any) -> tuple[Chain, Chain]:
    """``base <- top`` and ``base2 <- top2``."""
    first = make_chain(folder, **more)
    return first, make_chain(folder, names=("base2", "top2"), **more)


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep()], ids=lambda p: p.kind)
async def test_two_disks_of_a_vm(policy: Any, folder: Path) -> None:
    chains = two_chains(folder)
    async with machine(folder, *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        outcome = await vm.commit_group({"vda": policy, "vdb": policy})
        assert (outcome.status, outcome.action) == ("completed", policy.kind)
        assert [each.disk for each in outcome.outcomes] == ["vda", "vdb"]
        assert outcome.decided_by == "policy"
        assert outcome.instant is not None
        for each in outcome.outcomes:
            assert each.action == policy.kind
            assert each.held is not None
            assert 0 < each.held <= (outcome.held or 0)
            assert each.timings.decided is not None
            assert each.timings.ended is not None
            assert each.timings.decided <= outcome.instant <= each.timings.ended
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])
        if policy.kind == "keep":
            assert_disk(chain.top, chain.pictures[-1])


async def test_two_vms_by_their_addresses(folder: Path) -> None:
    chains = two_chains(folder)
    async with (
        many_disks(folder / "a", chains[0]) as one,
        many_disks(folder / "b", chains[1]) as two,
    ):
        members = [(one.qmp, "top"), (two.qmp, "top2")]
        outcome = await qc.commit_group(members, policy=qc.Pivot(), hold_limit=1)
        assert outcome.action == "pivot"
        assert [each.vm for each in outcome.outcomes] == [one.qmp, two.qmp]
        await one.quit()
        await two.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])
