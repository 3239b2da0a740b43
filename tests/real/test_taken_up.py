"""A job that is taken up ends as if its owner had never died: bitmaps, nodes, files, hook."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.images import MIB, Chain, assert_disk, create, make_chain, read
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.nbd import Nbd, Writer
from tests.real.test_bitmaps import add_bitmap, backup, marked, one_layer, snapshot, write_some
from tests.real.test_claim import DEAD, leave

FOREIGN = {"job-id": "theirs"}
HELD = {**FOREIGN, "auto-finalize": False, "auto-dismiss": False}


async def begin(vm: qc.Session, foreign: dict[str, Any] | None, disk: str, top: str) -> str:
    """A job in READY that nobody follows: one of ours, or one that somebody else began."""
    if foreign is None:
        job = await vm.commit(disk, policy=qc.Hold())
        await job.ready()
        await job.detach()
        return job.id
    with vm.events("BLOCK_JOB_READY") as ready:
        await vm.execute("block-commit", {**foreign, "device": top})
        await anext(ready)
    return "theirs"


@asynccontextmanager
async def two(folder: Path, layers: int = 2) -> AsyncIterator[tuple[Machine, qc.Session, Chain]]:
    chain = make_chain(folder, layers)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        yield qemu, vm, chain
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()


@pytest.mark.parametrize("foreign", [None, HELD, FOREIGN], ids=["ours", "held", "by itself"])
async def test_an_incremental_backup_goes_on_over_a_job_that_was_taken_up(
    foreign: dict[str, Any] | None, folder: Path
) -> None:
    """A writer writes all the time, so that a bitmap that misses a write falls."""
    chain, picture = one_layer(folder)
    target = create(folder / "target.raw", 64 * MIB, fmt="raw")
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with await Nbd.connect(qemu.nbd, "base") as nbd:
            await add_bitmap(vm, "base", "daily")
            await backup(vm, "base", target, None)
            await snapshot(vm, folder, "base", "over")
            await vm.execute("block-dirty-bitmap-disable", {"node": "base", "name": "daily"})
            await add_bitmap(vm, "over", "daily")
            await write_some(nbd, picture, 8, 7)
            async with Writer(nbd, picture, start=30 * MIB, length=4 * MIB) as writer:
                await writer.writes(30)
                job = await vm.adopt(await begin(vm, foreign, "export0", "over"))
                await writer.writes(30)
                await job.pivot()
                outcome = await job.wait()
                assert outcome.action == "pivot"
                told = [each for each in outcome.warnings if "bitmap" in each]
                assert bool(told) is (foreign is FOREIGN), outcome.warnings
                await writer.writes(30)
            await write_some(nbd, picture, 9)
            await backup(vm, "base", target, "daily")
        assert "over" not in (await vm.graph()).nodes
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, picture)
    assert read(target, fmt="raw") == bytes(picture.data), "the incremental backup"


async def test_a_pending_job_is_finalized_with_its_bitmaps(folder: Path) -> None:
    async with two(folder) as (_, vm, chain):
        await add_bitmap(vm, "top", "daily")
        with vm.events("BLOCK_JOB_PENDING") as pending:
            await begin(vm, HELD, "vda", "top")
            await vm.execute("job-complete", {"id": "theirs"})
            await anext(pending)
        outcome = await (await vm.adopt("theirs")).wait()
        assert outcome.action == "pivot"
        assert set(await marked(vm, "base")) == {"daily"}
        assert "top" not in (await vm.graph()).nodes
    assert_disk(chain.base, chain.pictures[-1])


async def test_bitmaps_that_others_use_keep_it_as_it_is(folder: Path) -> None:
    """Where it can't wait for them, what stays behind is told."""
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await add_bitmap(vm, "top", "daily", disabled=True)
        await begin(vm, HELD, "export0", "top")
        reader = {"id": "reader", "type": "nbd", "node-name": "top", "name": "reader"}
        try:
            await vm.execute("block-export-add", {**reader, "bitmaps": ["daily"]})
        except qc.CommandRefused:  # QEMU 5.2
            await vm.execute("block-export-add", {**reader, "bitmap": "daily"})
        with pytest.raises(qc.JobConflict, match=r"'daily' of top is busy.*goes on as it is"):
            await vm.adopt("theirs")
        (left,) = await vm.execute("query-jobs")
        assert left["status"] == "ready"
        with vm.events("BLOCK_JOB_PENDING") as pending:
            await vm.execute("job-complete", {"id": "theirs"})
            await anext(pending)
        outcome = await (await vm.adopt("theirs")).wait()
        assert outcome.action == "pivot"
        (told,) = [each for each in outcome.warnings if "dirty bitmaps" in each]
        assert "'daily' were not carried into the base (QEMU did not: " in told
        assert await marked(vm, "base") == {}
        # QEMU would die of it: what used them is the base's by now, and they are not.
        assert any(
            "node top stays open: others use its bitmaps daily" in w for w in outcome.warnings
        )
        await vm.execute("block-export-del", {"id": "reader", "mode": "hard"})
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_is_asked_of_one_that_is_taken_up_is_done(folder: Path) -> None:
    heard: list[str | None] = []

    async def on_pivot(outcome: qc.CommitOutcome) -> None:
        assert chain.top.exists()
        heard.append(outcome.active.filename if outcome.active else None)

    async with two(folder, 3) as (_, vm, chain):
        with pytest.raises(qc.InvalidRequest, match="nothing is stale after a keep"):
            await vm.adopt("any", policy=qc.Keep(), delete=True)
        with pytest.raises(qc.InvalidRequest, match="exclude each other"):
            await vm.adopt("any", delete=True, stale="rename")
        job = await vm.adopt(
            await begin(vm, None, "vda", "top"), policy=qc.Pivot(), delete=True, on_pivot=on_pivot
        )
        outcome = await job.wait()
        assert heard == [str(chain.base)]
        assert (outcome.hook, outcome.deleted) == ("done", [str(f) for f in chain.files[:0:-1]])
        assert not chain.top.exists()
        assert {"top", "mid"}.isdisjoint((await vm.graph()).nodes)
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "alive"])
async def test_what_is_stale_is_for_an_owner_who_lives(dead: bool, folder: Path) -> None:
    """Of one that is only followed here, and was pivoted by somebody else."""
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job_id = await begin(vm, None, "export0", "top")
        owner = await leave(vm, pid=DEAD) if dead else await leave(vm, place="ffffff")
        job = await vm.adopt(job_id)
        await vm.execute("job-complete", {"id": job_id})
        outcome = await job.wait()
        assert (outcome.action, outcome.decided_by) == ("pivot", "another client")
        assert ("top" in (await vm.graph()).nodes) is not dead
        if not dead:
            await vm.execute("blockdev-del", {"node-name": owner.node})
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
