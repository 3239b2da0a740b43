"""Bad neighbours: what one VM's monitor does, or a full disk, hurts no other VM's commits."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.daemon.daemons import Daemon, daemon
from tests.ground.fake_monitor import FakeMonitor, fake_monitor
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, storage_daemon
from tests.ground.small_disk import fill, needs_mounts, small_disk

HOLD = {"policy": {"kind": "hold"}}


@asynccontextmanager
async def good(
    folder: Path, config: str, connect: str = "keep"
) -> AsyncIterator[tuple[Daemon, Machine, Chain]]:
    """A daemon with a VM called good; its disk is read in the end, and was kept."""
    (folder / "good").mkdir()
    chain = make_chain(folder / "good")
    async with storage_daemon(folder / "good", chain) as qemu:
        vm = f'[[vm]]\nname = "good"\nqmp = "{qemu.qmp}"\nconnect = "{connect}"\n'
        async with daemon(folder, config + vm) as d:
            if connect == "keep":
                await d.connected("good")
            yield d, qemu, chain
            assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


async def keep_once(d: Daemon) -> None:
    """One commit of the good VM, from the request to its end."""
    done = await d.end_of(await d.commit("good", disk="top", policy={"kind": "keep"}))
    assert (done["state"], done["outcome"]["action"]) == ("done", "keep"), done


async def hang(command: str, arguments: dict[str, Any]) -> Any:
    await asyncio.Event().wait()


async def lie(command: str, arguments: dict[str, Any]) -> Any:
    """A VM whose jobs are called as another's, and are of no known shape."""
    jobs = [{"id": "qmpcommit-top-00000000", "type": "commit", "status": "ready"},
            {"id": 7, "type": None}, {}]  # fmt: skip
    return jobs if command in ("query-jobs", "query-block-jobs") else {"unknown": command}


async def flood(bad: FakeMonitor) -> None:
    """100,000 events, of known and unknown kinds, about jobs that are not there."""
    for number in range(1000):
        for _ in range(25):
            bad.event("BLOCK_JOB_READY", device="qmpcommit-top-x", type="commit", len=1, offset=1,
                      speed=0)  # fmt: skip
            bad.event("JOB_STATUS_CHANGE", id="qmpcommit-top-x", status="ready")
            bad.event("NOBODY_KNOWS_IT", number=number)
            bad.event("BLOCK_JOB_COMPLETED", device=7)
        await asyncio.sleep(0)


async def garbage(bad: FakeMonitor) -> None:
    while True:
        await asyncio.sleep(0.05)
        bad.send(b'\x00\xff{"event": [}\n' * 10)


async def long_lines(bad: FakeMonitor) -> None:
    line = json.dumps({"event": "X", "data": {"a": "x" * (10 << 20)}}).encode() + b"\n"
    while True:
        with suppress(OSError):
            bad.send(line)
        await asyncio.sleep(0.2)


async def drops(bad: FakeMonitor) -> None:
    while True:
        await asyncio.sleep(0.05)
        bad.drop()


async def nothing(bad: FakeMonitor) -> None:
    await asyncio.sleep(0)


Deed = Callable[[FakeMonitor], Awaitable[None]]
DEEDS: dict[str, tuple[Any, bytes | None, Deed]] = {
    "does not greet": (None, b"", nothing),
    "greets with garbage": (None, b"\xff\x00 SSH-2.0\n" * 100, nothing),
    "answers no command": (hang, None, nothing),
    "floods events": (lie, None, flood),
    "sends garbage": (lie, None, garbage),
    "sends long lines": (lie, None, long_lines),
    "drops": (lie, None, drops),
    "lies": (lie, None, nothing),
}


@pytest.mark.parametrize("deed", DEEDS)
async def test_a_bad_monitor_hurts_no_other_vm(folder: Path, deed: str) -> None:
    handler, greeting, do = DEEDS[deed]
    (folder / "bad").mkdir()
    async with fake_monitor(folder / "bad", handler, greeting) as bad:
        config = f'[[vm]]\nname = "bad"\nqmp = "{bad.path}"\n'
        async with good(folder, config) as (d, _, _):
            async with asyncio.timeout(30):
                await bad.connected.wait()
            doing = asyncio.ensure_future(do(bad))
            asked = asyncio.ensure_future(
                d.post("/v1/vms/bad/commits", {"disk": "top", "policy": {"kind": "keep"}})
            )
            for _ in range(3):
                await keep_once(d)
            assert (await d.get("/v1/vms/good")).json["state"] == "connected"
            assert {vm["name"] for vm in (await d.get("/v1/vms")).json} == {"good", "bad"}
            if do is flood:
                await doing
                await keep_once(d)
            while not asked.done():  # the request may come after the first
                bad.drop()
                await asyncio.wait({asked}, timeout=0.5)
            answer = await asked
            doing.cancel()
            await asyncio.wait({doing})
            assert 400 <= answer.status < 600, answer.body
            assert answer.status != 500, answer.body
            text = (await d.get("/metrics")).body.decode()
            lost = [line for line in text.splitlines() if line.startswith("qmpcommit_reconnects")]
            assert lost
            assert '"bug"' not in d.log
            assert "never retrieved" not in d.log


async def test_a_vm_that_stops_in_ready_keeps_no_other_waiting(folder: Path) -> None:
    """A real one, stopped; it goes on where it was when it is let go on."""
    (folder / "bad").mkdir()
    chain = make_chain(folder / "bad")
    async with storage_daemon(folder / "bad", chain) as bad:
        config = f'[[vm]]\nname = "bad"\nqmp = "{bad.qmp}"\n'
        async with good(folder, config) as (d, _, _):
            await d.connected("bad")
            held = await d.commit("bad", disk="top", **HOLD)
            await d.until(held, "ready")
            bad.signal(signal.SIGSTOP)
            decided = await d.post(f"/v1/commits/{held}/decision", {"action": "pivot"})
            assert decided.status == 202
            for _ in range(3):
                await keep_once(d)
            assert (await d.get("/v1/commits?state=running")).json[0]["id"] == held
            bad.signal(signal.SIGCONT)
            assert (await d.end_of(held))["outcome"]["action"] == "pivot"
    assert_disk(chain.base, chain.pictures[-1])


async def test_vms_are_discovered_and_forgotten(folder: Path) -> None:
    rule = f'discover_every = "100ms"\n[[discover]]\nglob = "{folder}/run/*/qmp"\n'
    (folder / "run/web1").mkdir(parents=True)
    chain = make_chain(folder)
    async with daemon(folder, rule) as d:
        assert (await d.get("/v1/vms")).json == []
        async with storage_daemon(folder / "run/web1", chain) as qemu:
            await d.connected("web1")
            assert (await d.get("/v1/vms/web1")).json["origin"] == "discovered"
            assert (await d.request("DELETE", "/v1/vms/web1")).status == 409
            done = await d.end_of(await d.commit("web1", disk="top", policy={"kind": "pivot"}))
            assert done["outcome"]["action"] == "pivot"
            await qemu.quit()
        for name in ("qmp", "qmp2"):
            (folder / "run/web1" / name).unlink(missing_ok=True)
        async with asyncio.timeout(30):
            while (await d.get("/v1/vms")).json:
                await asyncio.sleep(0.01)
        assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_shared_monitor_is_free_between_commits(folder: Path) -> None:
    """QEMU serves one client a monitor: on demand, the daemon lets others have it."""
    async with good(folder, "", connect="on-demand") as (d, qemu, _):
        for _ in range(2):
            other = QMPClient("other")
            async with asyncio.timeout(30):
                await other.connect(qemu.qmp)
            assert await other.execute("query-jobs") == []
            await other.disconnect()
            await keep_once(d)
            async with asyncio.timeout(30):
                while (await d.get("/v1/vms/good")).json["state"] != "idle":
                    await asyncio.sleep(0.01)


@needs_mounts
async def test_a_full_disk_under_the_journal_stops_new_work_alone(folder: Path) -> None:
    with small_disk(folder / "state", 1 << 20) as disk:
        async with good(folder, "") as (d, qemu, _):
            held = await d.commit("good", disk="top", **HOLD)
            await d.until(held, "ready")
            fill(disk / "ballast")
            refused = None
            async with asyncio.timeout(30):
                while refused is None:  # SQLite's log may have room for some still
                    vm = {"name": "more", "qmp": "/nowhere", "connect": "on-demand"}
                    answer = await d.post("/v1/vms", vm)
                    if answer.status == 503:
                        refused = answer
                    await d.request("DELETE", "/v1/vms/more")
            assert refused.json["type"] == "urn:qmpcommit:JournalFull"
            ready = await d.get("/readyz")
            assert ready.status == 503
            assert "the disk under the journal is full" in ready.json["detail"]
            assert (await d.get("/healthz")).status == 200
            assert "qmpcommit_journal_full 1.0" in (await d.get("/metrics")).body.decode()
            body = {"disk": "top", "policy": {"kind": "keep"}}
            asked = await d.post("/v1/vms/good/commits", body)
            assert (asked.status, asked.json["type"]) == (503, "urn:qmpcommit:JournalFull")
            assert "Make room" in asked.json["detail"]
            for _ in range(20):  # asking does not make room
                assert (await d.get("/readyz")).status == 503
            assert (await d.get(f"/v1/commits/{held}")).json["phase"] == "ready"
            jobs = await qemu.execute("query-jobs")
            assert [job["status"] for job in jobs] == ["ready"]
            (disk / "ballast").unlink()
            async with asyncio.timeout(30):
                while (await d.get("/readyz")).status != 200:
                    await asyncio.sleep(0.05)
            decided = await d.post(f"/v1/commits/{held}/decision", {"action": "keep"})
            assert decided.status == 202
            assert (await d.end_of(held))["outcome"]["action"] == "keep"
            await keep_once(d)
            assert await qemu.execute("query-jobs") == []


@needs_mounts
async def test_a_commit_ends_well_although_its_end_finds_no_room(folder: Path) -> None:
    """It is written when there is room; nothing is done twice."""
    with small_disk(folder / "state", 1 << 20) as disk:
        async with good(folder, "") as (d, qemu, _):
            commit = await d.commit(
                "good", disk="top", policy={"kind": "hold", "timeout": 2,
                                            "otherwise": {"kind": "keep"}}
            )  # fmt: skip
            await d.until(commit, "ready")
            fill(disk / "ballast")
            async with asyncio.timeout(30):
                while (await d.get("/readyz")).status == 200:
                    vm = {"name": "more", "qmp": "/nowhere", "connect": "on-demand"}
                    await d.post("/v1/vms", vm)
                    await d.request("DELETE", "/v1/vms/more")
                while '"journal_full"' not in d.log:
                    await asyncio.sleep(0.05)
            (disk / "ballast").unlink()
            ended = await d.end_of(commit)
            assert (ended["state"], ended["outcome"]["action"]) == ("done", "keep")
            assert await qemu.execute("query-jobs") == []
            await d.kill()
            await d.start()
            assert (await d.get(f"/v1/commits/{commit}")).json["outcome"] == ended["outcome"]
