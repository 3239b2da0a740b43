"""What happens between the end of a job and its news: what is told is true nevertheless."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.commit.policy import Decision
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, Style, machine
from tests.ground.proxy import Proxy, proxy


@asynccontextmanager
async def done_unheard(
    folder: Path, chain: Chain, policy: Decision, style: Style = "blockdev"
) -> AsyncIterator[tuple[Machine, Proxy, qc.CommitJob]]:
    """A job that QEMU has ended as it was told, of which nobody has heard yet."""
    async with (
        machine(folder, chain, style=style, running=True) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path, patience=5) as vm,
    ):
        job = await vm.commit("vda", policy=qc.Hold())
        await job.ready()
        ends = {"id": job.id, "status": "waiting"}
        between.to_client = lambda message: "hold" if message.get("data") == ends else "pass"
        async with qc.Session.connect(qemu.qmp2) as other:
            with other.events("JOB_STATUS_CHANGE") as changes:
                job.decide(policy, "me")
                while getattr(await anext(changes), "status", "") != "concluded" or (
                    [each.id for each in await other.query_jobs()] != [job.id]
                ):
                    pass
        yield qemu, between, job


@pytest.mark.parametrize("kind", ["pivot", "keep", "recycle"])
async def test_an_abort_that_comes_too_late_is_told_so(kind: str, folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    policies: dict[str, Decision] = {"pivot": qc.Pivot(), "keep": qc.Keep()}
    policy = policies.get(kind, qc.Recycle(str(fresh)))
    async with done_unheard(folder, chain, policy) as (qemu, between, job):
        aborting = asyncio.ensure_future(job.abort())
        await asyncio.sleep(0)
        between.release()
        await aborting
        outcome = await job.wait()
        assert (outcome.status, outcome.action, outcome.decided_by) == ("completed", kind, "me")
        assert [warning for warning in outcome.warnings if "before it could be aborted" in warning]
        assert (await qemu.execute("query-status"))["running"]
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    active = {"keep": chain.top, "recycle": fresh}.get(kind, chain.base)
    assert_disk(active, chain.pictures[-1])
    assert fresh.exists() is (kind == "recycle")


async def test_a_qemu_that_is_killed_after_such_an_abort_may_have_pivoted(folder: Path) -> None:
    chain = make_chain(folder)
    async with done_unheard(folder, chain, qc.Pivot()) as (qemu, between, job):
        aborting = asyncio.ensure_future(job.abort())
        await asyncio.sleep(0)
        qemu.kill()
        await between.refuse()
        await aborting
        with pytest.raises(qc.VMGone, match="qemu-img compare") as gone:
            await job.wait()
        assert gone.value.pivoted is None
    assert_disk(chain.base, chain.pictures[-1])


async def test_an_overlay_that_another_client_kept_is_not_deleted_because_its_disk_is_unplugged(
    folder: Path,
) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, device="scsi-hd", running=True) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path) as vm,
        qc.Session.connect(qemu.qmp2) as other,
    ):
        vm.peer_pid = qemu.pid  # as without the proxy
        job = await vm.commit("vda", policy=qc.Hold(), delete=True)
        await job.ready()
        ends = {"id": job.id, "status": "waiting"}
        between.to_client = lambda message: "hold" if message.get("data") == ends else "pass"
        with other.events("BLOCK_JOB_COMPLETED", "DEVICE_DELETED") as heard:
            await other.execute("block-job-cancel", {"device": job.id, "force": False})
            await anext(heard)
            await other.execute("device_del", {"id": "vda"})
            await anext(heard)
        pivoting = asyncio.ensure_future(job.pivot())
        while "job-complete" not in between.sent:
            await asyncio.sleep(0)
        between.release()
        await pivoting
        with pytest.raises(qc.CommitFailed, match="qemu-img compare"):
            await job.wait()
        await other.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("kind", ["pivot", "keep"])
async def test_an_overlay_that_another_client_lays_over_the_end_does_not_hide_it(
    kind: str, folder: Path
) -> None:
    chain, theirs = make_chain(folder), folder / "theirs.qcow2"
    policy: Decision = qc.Pivot() if kind == "pivot" else qc.Keep()
    async with done_unheard(folder, chain, policy, "drive") as (qemu, between, job):
        overlay = {"snapshot_file": str(theirs), "format": "qcow2"}
        await qemu.execute("blockdev-snapshot-sync", device="drive0", **overlay)
        between.release()
        outcome = await job.wait()
        assert (outcome.action, outcome.decided_by) == (kind, "me")
        assert outcome.active is not None
        assert outcome.active.filename == str(theirs)
        assert outcome.invalidated == ([str(chain.top)] if kind == "pivot" else [])
        await qemu.quit()
    assert_disk(theirs, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[-1])
