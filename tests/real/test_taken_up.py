"""A job that is taken up ends as if its owner had never died: bitmaps, nodes, files, hook."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.claim import layer_number, lives, owners_of
from qmpcommit.qmp.process import process_identity
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
            "node top stays open: bitmap 'daily' of top is used" in w for w in outcome.warnings
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


async def ended(vm: qc.Session, job_id: str, order: str) -> None:
    """The job ends without its owner: as one that was killed after it had decided."""
    command = {"pivot": "job-complete", "abort": "job-cancel"}.get(order)
    with vm.events("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") as over:
        if command is not None:
            await vm.execute(command, {"id": job_id})
        else:
            await vm.execute("block-job-cancel", {"device": job_id, "force": False})
        await anext(over)


ENDS = {"pivot": ("completed", "base"), "keep": ("completed", "top"), "abort": ("cancelled", "top")}


@pytest.mark.parametrize("style", ["blockdev", "drive"])
@pytest.mark.parametrize("order", list(ENDS))
async def test_a_job_that_concluded_meanwhile_is_told_of_with_its_disk(
    order: str, style: Any, folder: Path
) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain, style=style) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold(), shallow=True, job_id="mine")
        await job.ready()
        await died(job)
        await (await vm.adopt("mine")).detach()  # who only looks at it leaves what tells of it
        await ended(vm, job.id, order)
        outcome = await (await vm.adopt("mine", policy=qc.Pivot())).wait()
        assert (outcome.status, outcome.action) == (ENDS[order][0], order)
        assert (outcome.disk, outcome.base.filename) == ("vda", str(chain.files[1]))
        active = chain.files[1] if order == "pivot" else chain.top
        assert outcome.active is not None
        assert outcome.active.filename == str(active)
        gone = style == "drive" and order == "pivot"  # QEMU has closed it itself
        assert outcome.top.filename == ("(unknown)" if gone else str(chain.top))
        assert outcome.invalidated == ([str(chain.top)] if order == "pivot" and not gone else [])
        assert await vm.execute("query-jobs") == []
        assert await owners_of(vm) == []
        if style == "blockdev":
            assert ("top" in (await vm.graph()).nodes) is (order != "pivot")
        await vm.close()
        await qemu.quit()
    assert_disk(active, chain.pictures[-1])


async def died(job: qc.CommitJob) -> None:
    """As if its process had been killed: its claim stays, and nobody holds it."""
    assert job.own_claim is not None
    job.own_claim.abandon()
    await job.detach()


@pytest.mark.parametrize("pending", ["finalize", "leave"])
async def test_an_owner_who_lives_and_hangs_is_not_waited_for_while_the_disk_is_held(
    pending: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpcommit.commit.job_seen.OWNERS", 0.5)
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await add_bitmap(vm, "top", "daily")
        await begin(vm, HELD, "export0", "top")
        hangs = await asyncio.create_subprocess_exec("sleep", "100")
        began = int(process_identity(hangs.pid).partition(".")[2])
        owner = await leave(vm, pid=hangs.pid, began=began)
        assert lives(owner)
        job = await vm.adopt("theirs", pending=pending)
        with vm.events("BLOCK_JOB_PENDING") as held:
            if pending == "finalize":
                job.pivot()
            else:
                await vm.execute("job-complete", {"id": "theirs"})
            await anext(held)
        outcome = await job.wait()
        assert outcome.action == "pivot"
        assert set(await marked(vm, "base")) == {"daily"}
        hangs.kill()
        await hangs.wait()
        await vm.execute("blockdev-del", {"node-name": owner.node})
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_who_follows_a_job_of_an_owner_who_lives_leaves_its_end_to_it(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await add_bitmap(vm, "top", "daily")
        async with qc.Session.connect(qemu.qmp2) as other:
            job = await vm.commit("export0", policy=qc.Hold())
            await job.ready()
            following = await other.adopt(job.id)
            job.pivot()
            ends = [await each.wait() for each in (following, job)]
            assert [end.action for end in ends] == ["pivot", "pivot"]
            assert not following._driver._finalized
            assert set(await marked(vm, "base")) == {"daily"}
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("order", ["pivot", "keep"])
async def test_a_foreign_job_that_concluded_is_told_of_as_the_graph_shows_it(
    order: str, folder: Path
) -> None:
    """Nothing of it is certain, so no node is closed, and what can't be known stays there."""
    foreign = {**FOREIGN, "auto-dismiss": False}
    async with two(folder, 3) as (_, vm, chain):
        await ended(vm, await begin(vm, foreign, "vda", "top"), order)
        job = await vm.adopt("theirs", delete=True)
        if order == "pivot":
            outcome = await job.wait()
            assert (outcome.action, outcome.disk) == ("pivot", "vda")
            assert outcome.invalidated == [str(f) for f in chain.files[:0:-1]]
            assert "is what the block graph shows" in " ".join(outcome.warnings)
            assert outcome.deleted == []
            assert "top" in (await vm.graph()).nodes
        else:
            with pytest.raises(qc.CommitFailed, match="still lists the job theirs as concluded"):
                await job.wait()
            (left,) = await vm.execute("query-jobs")
            assert left["status"] == "concluded"
            await vm.execute("job-dismiss", {"id": "theirs"})
    active = chain.base if order == "pivot" else chain.top
    assert_disk(active, chain.pictures[-1])


async def test_a_concluded_job_is_dismissed_by_its_owner_who_lives(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job_id = await begin(vm, None, "export0", "top")
        with vm.events("BLOCK_JOB_COMPLETED") as over:
            owner = await leave(vm, place="ffffff", layer=layer_number("top"))
            await vm.execute("job-complete", {"id": job_id})
            await anext(over)
        outcome = await (await vm.adopt(job_id)).wait()
        assert outcome.action == "pivot"
        (left,) = await vm.execute("query-jobs")
        assert left["status"] == "concluded"
        await vm.execute("job-dismiss", {"id": job_id})
        await vm.execute("blockdev-del", {"node-name": owner.node})
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
