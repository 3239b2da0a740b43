"""The daemon stops, is replaced or loses its VMs and its journal: nothing is lost in silence."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemons import Daemon, daemon
from tests.ground.images import MIB, Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine, storage_daemon

HOLD = {"kind": "hold"}


def config_of(**vms: Machine) -> str:
    return "".join(f'[[vm]]\nname = "{name}"\nqmp = "{vm.qmp}"\n' for name, vm in vms.items())


async def held(d: Daemon, vm: str) -> str:
    """A commit that waits in READY for its decision."""
    await d.connected(vm)
    commit = await d.commit(vm, disk="top", policy=HOLD)
    await d.until(commit, "ready")
    return commit


async def test_sigterm_leaves_jobs_in_qemu_and_the_next_daemon_takes_them_up(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as vm, daemon(folder, config_of(web=vm)) as d:
        commit = await held(d, "web")
        assert await d.stop() == 0
        (job,) = await vm.execute("query-jobs")
        assert job["status"] == "ready"
        await d.start()
        await d.until(commit, "ready")
        answer = await d.post(f"/v1/commits/{commit}/decision", {"action": "pivot"})
        assert answer.status == 202
        assert (await d.end_of(commit))["outcome"]["action"] == "pivot"
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_decision_that_was_answered_outlives_the_daemon(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as vm, daemon(folder, config_of(web=vm)) as d:
        commit = await held(d, "web")
        vm.signal(signal.SIGSTOP)  # so that QEMU can't have heard of it
        answer = await d.post(f"/v1/commits/{commit}/decision", {"action": "keep"})
        assert answer.status == 202
        await d.kill()
        vm.signal(signal.SIGCONT)
        await d.start()
        assert (await d.end_of(commit))["outcome"]["action"] == "keep"
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.timeout(300)
async def test_an_upgrade_in_the_middle_of_fifty_commits_loses_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 50
    async with AsyncExitStack() as stack:
        vms: list[Machine] = []
        chains: list[Chain] = []
        for number in range(count):
            place = folder / f"{number}"
            place.mkdir()
            chains.append(make_chain(place, bulk=20 * MIB))
            vms.append(await stack.enter_async_context(storage_daemon(place, chains[-1])))
        limits = "[limits]\ncommits = 50\nper_storage = 50\n"
        names = {f"vm{number}": vm for number, vm in enumerate(vms)}
        d = await stack.enter_async_context(daemon(folder, limits + config_of(**names)))
        commits = []
        for number in range(count):
            await d.connected(f"vm{number}")
            kind = "keep" if number % 2 else "pivot"
            asked: dict[str, Any] = {"policy": {"kind": kind}, "bandwidth": MIB}
            commits.append(await d.commit(f"vm{number}", disk="top", **asked))
        await d.until(commits[-1], "copying")
        begun = time.monotonic()
        assert await d.stop() == 0
        stopped = time.monotonic() - begun
        still = 0
        for vm in vms:
            for job in await vm.execute("query-block-jobs"):
                still += job["status"] == "running"
                await vm.execute("block-job-set-speed", device=job["device"], speed=0)
        await d.start()
        ends = [await d.end_of(commit) for commit in commits]
        assert [end["state"] for end in ends] == ["done"] * count
        for vm in vms:
            assert await vm.execute("query-jobs") == []
        for vm, chain, end in zip(vms, chains, ends, strict=True):
            await vm.quit()
            assert_disk(chain.base, chain.pictures[-1])
            if end["outcome"]["action"] == "keep":
                assert_disk(chain.top, chain.pictures[-1])
        assert still > count // 2, "most jobs were to be under way when it stopped"
        with capsys.disabled():
            print(f" stopped in {stopped:.2f} s with {still} jobs under way", end="")


async def test_a_vm_that_ends_while_the_daemon_is_away(folder: Path) -> None:
    chain = make_chain(folder)
    async with daemon(folder) as d:
        async with storage_daemon(folder, chain) as vm:
            await d.post("/v1/vms", {"name": "web", "qmp": vm.qmp})
            commit = await held(d, "web")
            await d.kill()
            await vm.quit()
        await d.start()
        end = await d.end_of(commit)
        assert end["state"] == "failed"
        assert end["error"]["type"] == "VMGone"
        assert f"{chain.top} is still the image to boot" in end["error"]["message"]
    assert_disk(chain.top, chain.pictures[-1])


async def test_another_qemu_under_the_same_name(folder: Path) -> None:
    chain = make_chain(folder)
    async with daemon(folder) as d:
        async with storage_daemon(folder, chain) as vm:
            await d.post("/v1/vms", {"name": "web", "qmp": vm.qmp})
            commit = await held(d, "web")
            await d.kill()
            await vm.quit()
        for left in ("qmp", "qmp2", "nbd"):
            (folder / left).unlink(missing_ok=True)
        async with storage_daemon(folder, chain) as vm:
            await d.start()
            end = await d.end_of(commit)
            assert end["state"] == "failed"
            assert end["error"]["type"] == "VMGone"
            assert end["error"]["pivoted"] is False
            assert await vm.execute("query-jobs") == []
            await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_vm_that_is_killed_under_the_daemon(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as vm, daemon(folder, config_of(web=vm)) as d:
        commit = await held(d, "web")
        vm.signal(signal.SIGKILL)
        end = await d.end_of(commit)
        assert end["state"] == "failed"
        assert "still the image to boot, and it is whole" in end["error"]["message"]
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_damaged_journal_is_set_aside_and_the_job_that_it_knew_is_found(
    folder: Path,
) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as vm, daemon(folder, config_of(web=vm)) as d:
        commit = await held(d, "web")
        await d.kill()
        journal = folder / "state" / "journal.db"
        for name in ("journal.db-wal", "journal.db-shm"):
            (folder / "state" / name).unlink(missing_ok=True)
        journal.write_bytes(b"not a database, but not empty either" * 200)
        await d.start()
        await d.connected("web")
        ready = await d.get("/readyz")
        (aside,) = (folder / "state").glob("journal.db.corrupt-*")
        assert str(aside) in ready.json["warnings"][0]
        assert aside.read_bytes().startswith(b"not a database")
        metrics = (await d.get("/metrics")).body.decode()
        assert 'qmpcommit_orphan_jobs{vm="web"} 0.0' in metrics
        (job,) = (await d.get("/v1/vms/web/jobs")).json
        assert job["commit"] == commit
        assert job["status"] == "ready"


async def test_an_orphan_that_holds_its_disk_is_let_go_at_once(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as vm:
        await vm.execute(
            "block-commit", job_id="qmpcommit-lost", device="top", auto_finalize=False,
            auto_dismiss=False,
        )  # fmt: skip
        await until_status(vm, "ready")
        await vm.execute("job-complete", id="qmpcommit-lost")
        await until_status(vm, "pending")
        slow = {"QMPCOMMIT_DIE_AT": "0", "QMPCOMMIT_PLACES": f"{folder}/places"}
        slow["QMPCOMMIT_SLOW"] = "web job-cancel"
        d = Daemon(folder, config_of(web=vm), slow, "tests.daemon.killable")
        try:
            await d.start()
            await d.connected("web")
            assert await vm.execute("query-jobs") == [], "it is not shown as connected before"
        finally:
            await d.kill()
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def until_status(vm: Machine, status: str) -> None:
    async with asyncio.timeout(20):
        while (await vm.execute("query-jobs"))[0]["status"] != status:
            await asyncio.sleep(0.01)


async def test_a_monitor_that_is_shared_is_free_between_commits(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as vm:
        config = f'[[vm]]\nname = "web"\nqmp = "{vm.qmp2}"\nconnect = "on-demand"\n'
        async with daemon(folder, config) as d:
            assert (await d.get("/v1/vms/web")).json["state"] == "idle"
            assert await vm.execute("query-jobs") == []  # over the daemon's monitor
            end = await d.end_of(await d.commit("web", disk="vda", policy={"kind": "pivot"}))
            assert end["outcome"]["action"] == "pivot"
            assert await vm.execute("query-jobs") == []
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_deadline_that_comes_in_the_queue_ends_the_commit(folder: Path) -> None:
    first, second = folder / "1", folder / "2"
    first.mkdir()
    second.mkdir()
    chains = [make_chain(first), make_chain(second)]
    async with storage_daemon(first, chains[0]) as a, storage_daemon(second, chains[1]) as b:
        config = "[limits]\ncommits = 1\n" + config_of(a=a, b=b)
        async with daemon(folder, config) as d:
            await held(d, "a")
            await d.connected("b")
            late = await d.commit("b", disk="top", policy={"kind": "pivot"}, timeout=0.2)
            end = await d.end_of(late)
            assert end["state"] == "failed"
            assert end["error"]["type"] == "DeadlineExceeded"
            assert "Nothing was sent" in end["error"]["message"]
            assert await b.execute("query-jobs") == []
        await b.quit()
    assert_disk(chains[1].top, chains[1].pictures[-1])


async def test_sighup_ends_nothing(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as vm, daemon(folder, config_of(web=vm)) as d:
        await d.connected("web")
        assert d.process is not None
        d.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(30):
            while "reloaded" not in d.log:
                await asyncio.sleep(0.01)
        assert (await d.get("/v1/vms/web/disks")).status == 200
        assert await d.stop() == 0
