"""Many disks at one instant, on real QEMUs: all or none, and what one instant means."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.counter import Counter, shown
from tests.ground.daemons import many_disks
from tests.ground.images import MIB, Chain, Picture, assert_disk, create, two_chains
from tests.ground.machines import Machine, machine
from tests.ground.nbd import Nbd, Writer
from tests.ground.qemu import QEMU


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
        outcome = await qc.commit_group(members, policy=qc.Pivot(), hold_limit=20)
        assert outcome.action == "pivot"
        assert [each.vm for each in outcome.outcomes] == [one.qmp, two.qmp]
        await one.quit()
        await two.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


# -- one instant ----------------------------------------------------------------------------------


def small_chain(folder: Path, base: str, top: str) -> Chain:
    """A chain of 2 MiB, so that a round takes milliseconds."""
    picture = Picture(2 * MIB)
    files = [folder / f"{base}.qcow2", folder / f"{top}.qcow2"]
    create(files[0], 2 * MIB)
    create(files[1], 2 * MIB, backing=files[0])
    return Chain(files, [picture.copy(), picture])


@asynccontextmanager
async def counted(
    folder: Path, daemons: int
) -> AsyncIterator[tuple[list[tuple[qc.Session, str, str, Machine]], Counter]]:
    """Two disks of one daemon, or of two, which are counted on and loaded; read at the end."""
    chains = (small_chain(folder, "base", "top"), small_chain(folder, "base2", "top2"))
    pictures = (chains[0].pictures[-1], chains[1].pictures[-1])
    async with AsyncExitStack() as stack:
        if daemons == 1:
            same = await stack.enter_async_context(many_disks(folder / "a", *chains))
            machines = [same, same]
        else:
            machines = [
                await stack.enter_async_context(many_disks(folder / str(number), chain))
                for number, chain in enumerate(chains)
            ]
        vms: dict[str, qc.Session] = {}
        for qemu in machines:
            if qemu.qmp not in vms:
                vms[qemu.qmp] = await stack.enter_async_context(qc.Session.connect(qemu.qmp))
        disks = [
            (vms[qemu.qmp], chain.top.stem, chain.base.stem, qemu)
            for qemu, chain in zip(machines, chains, strict=True)
        ]
        first, second = [await Nbd.connect(qemu.nbd, top) for _, top, _, qemu in disks]
        clients = [first, second]
        if QEMU.clients_of_an_export > 1:
            clients += [await Nbd.connect(qemu.nbd, top) for _, top, _, qemu in disks]
        try:
            async with Counter((first, second), pictures) as counter, AsyncExitStack() as load:
                for client, picture in zip(clients[2:], pictures, strict=False):
                    await load.enter_async_context(Writer(client, picture, start=MIB))
                yield disks, counter
        finally:
            for client in clients:
                await client.flush()
                await client.close()
        for vm in vms.values():
            await vm.close()
        for path in vms:
            await next(each for each in machines if each.qmp == path).quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def ahead(disks: list[tuple[qc.Session, str, str, Machine]]) -> int:
    """By how much the first base is ahead of the second."""
    first, second = [await shown(vm, qemu.nbd, base) for vm, _, base, qemu in disks]
    return first - second


@pytest.mark.parametrize(("daemons", "rounds"), [(1, 200), (2, 150)])
async def test_the_bases_show_one_instant(daemons: int, rounds: int, folder: Path) -> None:
    """A write that waited for another is never in its base without that other."""
    async with counted(folder, daemons) as (disks, counter):
        members = [(vm, top) for vm, top, _, _ in disks]
        counts = set()
        for _ in range(rounds):
            outcome = await qc.commit_group(members, policy=qc.Keep())
            assert outcome.action == "keep"
            assert await ahead(disks) in (0, 1)
            counts.add(counter.count)
        assert len(counts) > rounds / 2, "the counter has counted meanwhile"


@pytest.mark.parametrize("daemons", [1, 2])
async def test_without_the_barrier_they_do_not(daemons: int, folder: Path) -> None:
    """The failing twin of the above: the same commits, each by itself, at the same time."""
    async with counted(folder, daemons) as (disks, _):
        for _ in range(300):
            jobs = [await vm.commit(top, policy=qc.Keep()) for vm, top, _, _ in disks]
            for job in jobs:
                await job.wait()
            if await ahead(disks) not in (0, 1):
                return
        raise AssertionError("the inconsistency that the barrier is for did not show up")
