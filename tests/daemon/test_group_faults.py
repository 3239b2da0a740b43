"""A group of the daemon that is stopped, or loses a QEMU, at its worst moments."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.daemon.daemons import daemon
from tests.daemon.kill_sweep import killable
from tests.daemon.test_groups import (
    HOLD,
    KEEP,
    PIVOT,
    ask,
    end_of,
    hosted,
    served,
    until,
)
from tests.daemon.test_slow_journal import locked
from tests.ground.images import assert_disk
from tests.ground.machines import Machine
from tests.ground.proxy import Strike, let_pass, proxy


async def status_of(vm: Machine) -> str:
    jobs = await vm.execute("query-jobs")
    return str(jobs[0]["status"]) if jobs else "none"


async def shows(vm: Machine, job: str, status: str) -> None:
    """Wait until the job of that id is in that state."""
    async with asyncio.timeout(30):
        while True:
            if (job, status) in [(j["id"], j["status"]) for j in await vm.execute("query-jobs")]:
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("answers", [True, False], ids=["in time", "not before it has stopped"])
async def test_sigterm_while_one_disk_is_held_leaves_none_pending(
    folder: Path, answers: bool
) -> None:
    """One VM hangs, so that the other's disk is held when the daemon is stopped."""
    async with served(folder, 1, 1) as (d, host):
        group = (await ask(d, host, policy=HOLD, hold_limit=30))["id"]
        await until(d, group, "ready")
        held, hung = host.vms
        hung.signal(signal.SIGSTOP)
        decided = await d.post(f"/v1/groups/{group}/decision", {"action": "pivot"})
        assert decided.status == 202
        async with asyncio.timeout(20):
            while await status_of(held) != "pending":
                await asyncio.sleep(0.01)
        stopping = asyncio.create_task(d.stop())
        if answers:
            hung.signal(signal.SIGCONT)
        assert await stopping == 0
        assert await status_of(held) != "pending"
        hung.signal(signal.SIGCONT)
        await d.start()
        ended = await end_of(d, group)
        assert ended["state"] == "done", ended
        assert ended["outcome"]["action"] == "pivot"
        assert await host.jobs() == []
        await host.ends_as("pivot")


async def test_a_qemu_that_is_killed_before_the_decision_leaves_all_unpivoted(folder: Path) -> None:
    async with served(folder, 1, 1) as (d, host):
        group = (await ask(d, host, policy=HOLD))["id"]
        await until(d, group, "ready")
        await d.kill()
        host.vms[1].signal(signal.SIGKILL)
        await d.start()
        ended = await end_of(d, group)
        assert ended["state"] == "failed"
        assert ended["error"]["type"] == "GroupFailed", ended
        assert "No disk was pivoted" in ended["error"]["message"]
        assert await host.vms[0].execute("query-jobs") == []
        await host.vms[0].quit()
    for chain in host.chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_qemu_that_dies_after_the_decision_splits_the_group(folder: Path) -> None:
    """The daemon is killed between its decision and the first finalize, and so is one QEMU."""
    d = killable(folder)
    d.environment["QMPCOMMIT_DIE_IN"] = "before job-finalize"
    await d.start()
    try:
        async with hosted(folder, 1, 1) as host:
            for number, vm in enumerate(host.vms):
                await d.post("/v1/vms", {"name": f"vm{number}", "qmp": vm.qmp})
                await d.connected(f"vm{number}")
            group = await ask(d, host, policy=PIVOT)
            assert d.process is not None
            async with asyncio.timeout(30):
                await d.process.wait()
            assert [await status_of(vm) for vm in host.vms] == ["pending", "pending"]
            host.vms[1].signal(signal.SIGKILL)
            del d.environment["QMPCOMMIT_DIE_IN"]
            await d.start()
            ended = await end_of(d, group["id"])
            error = ended["error"]
            assert error["type"] == "GroupSplit", ended
            assert (error["pivoted"], error["not_pivoted"]) == (["v0d0 of vm0"], [])
            assert error["unknown"] == ["v1d0 of vm1"]
            assert await status_of(host.vms[0]) == "none"
            await host.vms[0].quit()
        assert_disk(host.chains[0].base, host.chains[0].pictures[-1])
        assert_disk(host.chains[1].top, host.chains[1].pictures[-1])
    finally:
        if d.process is not None:
            await d.kill()


@pytest.mark.parametrize("cancelled", [0, 1])
@pytest.mark.parametrize("dismissed", [False, True])
async def test_one_that_is_cancelled_when_the_decision_is_durable_cancels_all(
    folder: Path, cancelled: int, dismissed: bool
) -> None:
    """The daemon is killed before it can note that: none was finalized, and none is then."""
    d = killable(folder)
    d.environment["QMPCOMMIT_DIE_IN"] = "after finalize"
    await d.start()
    try:
        async with hosted(folder, 1, 1) as host:
            for number, vm in enumerate(host.vms):
                await d.post("/v1/vms", {"name": f"vm{number}", "qmp": vm.qmp})
                await d.connected(f"vm{number}")
            group = await ask(d, host, policy=PIVOT)
            assert d.process is not None
            async with asyncio.timeout(30):
                await d.process.wait()
            assert [await status_of(vm) for vm in host.vms] == ["pending", "pending"]
            other = host.vms[cancelled]
            ((job,),) = [await other.execute("query-jobs")]
            await other.execute("job-cancel", id=job["id"])
            await shows(other, job["id"], "concluded")
            if dismissed:
                await other.execute("job-dismiss", id=job["id"])
            del d.environment["QMPCOMMIT_DIE_IN"]
            await d.start()
            ended = await end_of(d, group["id"])
            assert ended["error"]["type"] == "GroupFailed", ended
            assert await host.jobs() == []
            await host.ends_as("abort")
    finally:
        if d.process is not None:
            await d.kill()


async def test_an_end_that_can_not_be_seen_is_not_called_unpivoted(folder: Path) -> None:
    """Nothing uses the disk any more whose job another client has ended meanwhile."""
    async with served(folder, 2) as (d, host):
        group = (await ask(d, host, policy=HOLD))["id"]
        await until(d, group, "ready")
        await d.kill()
        (vm,) = host.vms
        job, _ = sorted(each["id"] for each in await vm.execute("query-jobs"))
        await vm.execute("job-complete", id=job)
        await shows(vm, job, "pending")
        await vm.execute("block-export-del", id="export0")  # of v0d0
        await vm.execute("job-finalize", id=job)
        await shows(vm, job, "concluded")
        await vm.execute("job-dismiss", id=job)
        await d.start()
        error = (await end_of(d, group))["error"]
        assert error["type"] == "GroupSplit", error
        assert (len(error["unknown"]), len(error["not_pivoted"])) == (1, 1), error


async def test_a_hold_that_is_too_long_cancels_all(folder: Path) -> None:
    async with served(folder, 1, 1) as (d, host):
        group = (await ask(d, host, policy=HOLD, hold_limit=0.3))["id"]
        await until(d, group, "ready")
        host.vms[1].signal(signal.SIGSTOP)
        await d.post(f"/v1/groups/{group}/decision", {"action": "pivot"})
        async with asyncio.timeout(20):
            while await status_of(host.vms[0]) != "none":
                await asyncio.sleep(0.01)
        host.vms[1].signal(signal.SIGCONT)
        ended = await end_of(d, group)
        assert ended["error"]["type"] == "GroupFailed", ended
        assert await host.jobs() == []
        again = await ask(d, host, policy=KEEP)
        assert (await end_of(d, again["id"]))["outcome"]["action"] == "keep"
        await host.ends_as("keep")


async def test_a_deadline_cancels_all(folder: Path) -> None:
    async with served(folder, 2) as (d, host):
        group = await ask(d, host, policy=HOLD, timeout=1.5)
        ended = await end_of(d, group["id"])
        assert ended["error"]["type"] == "DeadlineExceeded", ended
        assert await host.jobs() == []
        await host.ends_as("abort")


async def test_one_that_is_being_cancelled_is_not_finalized_by_the_next_daemon(
    folder: Path,
) -> None:
    """One ends while the group's decision is written down; the daemon is killed at the other."""
    async with (
        hosted(folder, 1, 1) as host,
        proxy(folder / "m0", host.vms[0].qmp) as first,
        proxy(folder / "m1", host.vms[1].qmp) as second,
        daemon(folder, "") as d,
    ):
        for number, between in enumerate((first, second)):
            await d.post("/v1/vms", {"name": f"vm{number}", "qmp": between.path})
            await d.connected(f"vm{number}")
        first.to_qemu, second.to_qemu = (
            Strike("job-dismiss", "hold"),
            Strike("job-complete", "hold"),
        )
        group = (await ask(d, host, policy=PIVOT, hold_limit=30))["id"]
        async with asyncio.timeout(30):
            await second.held.wait()
            while await status_of(host.vms[0]) != "pending":
                await asyncio.sleep(0.01)
            ((job,),) = [await host.vms[0].execute("query-jobs")]
            await host.vms[0].execute("job-cancel", id=job["id"])
            await first.held.wait()
            with locked(d):
                second.to_qemu = Strike("job-cancel", "hold")
                second.release()
                await until(d, group, "finalizing")
                first.to_qemu = let_pass
                first.release()
                await until(d, group, "cancelling")
            await second.held.wait()
        await d.kill()
        second.to_qemu = let_pass
        await second.cut()
        await d.start()
        ended = await end_of(d, group)
        assert (ended["error"] or {}).get("type") != "GroupSplit", ended
        assert await host.jobs() == []
        await host.ends_as("pivot" if ended["state"] == "done" else "abort")
