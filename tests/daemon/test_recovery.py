"""Promises outlive the daemon: killed at every step, its successor ends the commit, once."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from qemu.qmp import QMPClient

from tests.cli.command import run as run_command
from tests.daemon.daemons import Answer, Daemon, daemon
from tests.daemon.kill_sweep import rehearsed_and_killed_everywhere
from tests.ground.images import Chain, assert_disk, make_chain, run
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.qemu import QEMU


class Case(NamedTuple):
    """A kind of commit, what it runs on, and what is true in the end."""

    name: str
    asked: dict[str, Any]
    action: str
    guest: bool = False
    layers: int = 2
    bitmap: bool = False


CASES = [
    Case("pivot-and-delete", {"policy": {"kind": "pivot"}, "delete": True}, "pivot"),
    Case("keep", {"policy": {"kind": "keep"}}, "keep"),
    Case("check", {"policy": {"kind": "check", "command": ["true"]}}, "pivot"),
    Case("bitmap", {"policy": {"kind": "pivot"}}, "pivot", bitmap=True),
    Case("intermediate", {"top": 1}, "none", layers=3),
    Case("recycle", {"policy": {"kind": "recycle", "overlay": "fresh.qcow2"}}, "recycle", True),
]


class Watch:
    """Hears all that happens on a VM's second monitor."""

    def __init__(self) -> None:
        self.created = 0
        self.client = QMPClient()

    async def listen(self) -> None:
        with self.client.listener() as heard:
            async for event in heard:
                data: Any = event.get("data", {})
                is_start = event["event"] == "JOB_STATUS_CHANGE" and data["status"] == "created"
                self.created += is_start and data["id"] == "qmpcommit-disk"


@asynccontextmanager
async def watched(vm: Machine) -> AsyncIterator[Watch]:
    watch = Watch()
    await watch.client.connect(vm.qmp2)
    listening = asyncio.create_task(watch.listen())
    try:
        yield watch
    finally:
        listening.cancel()
        await asyncio.wait({listening})
        with suppress(EOFError, OSError):
            await watch.client.disconnect()


@asynccontextmanager
async def vm_of(folder: Path, case: Case) -> AsyncIterator[tuple[Machine, Chain]]:
    folder.mkdir()
    chain = make_chain(folder, case.layers)
    if case.bitmap:
        run(QEMU.img, "bitmap", "--add", chain.top, "daily")
    if case.guest:
        async with machine(folder, chain) as vm:
            await vm.execute("cont")
            yield vm, chain
    else:
        async with storage_daemon(folder, chain) as vm:
            yield vm, chain


async def ask(d: Daemon, number: int, asked: dict[str, Any]) -> Answer | None:
    """Ask for the commit; None where the daemon died before it answered."""
    with suppress(OSError, http.client.HTTPException):
        return await d.post(f"/v1/vms/vm{number}/commits", asked, Idempotency_Key=f"key{number}")
    return None


async def check(
    case: Case, vm: Machine, chain: Chain, watch: Watch, ended: Any, place: str
) -> None:
    """One job, of which nothing is left; the disk as it has to be; the guest running."""
    assert ended["state"] == "done", (place, ended)
    assert ended["outcome"]["action"] == case.action, (place, ended)
    assert watch.created == 1, f"{watch.created} jobs were created, killed {place}"
    execute: Any = watch.client.execute
    assert await execute("query-jobs") == [], f"a job was left behind, killed {place}"
    if case.guest:
        status = await execute("query-status")
        assert status["running"], f"the guest was left paused, killed {place}"
    nodes = {n["node-name"] for n in await execute("query-named-block-nodes", {"flat": True})}
    if case.action in ("pivot", "recycle"):
        assert "top" not in nodes, f"a stale overlay is open still, killed {place}"


def disk_is_right(case: Case, vm: Machine, chain: Chain) -> None:
    last = chain.pictures[-1]
    match case.action:
        case "pivot":
            assert_disk(chain.base, last)
            assert chain.top.exists() is not bool(case.asked.get("delete"))
        case "keep":
            assert_disk(chain.base, last)
            assert_disk(chain.top, last)
        case "none":
            assert_disk(chain.base, chain.pictures[1])
            assert_disk(chain.top, last)
        case "recycle":
            assert_disk(chain.base, last)
            assert_disk(vm.folder / "fresh.qcow2", last)
    if case.bitmap:
        assert "name: daily" in run(QEMU.img, "info", chain.base)


async def one(d: Daemon, folder: Path, case: Case, number: int, place: str) -> None:
    """A commit, a kill somewhere in it, another daemon, and the end."""
    async with vm_of(folder / f"{number}", case) as (vm, chain), watched(vm) as watch:
        added = await d.post("/v1/vms", {"name": f"vm{number}", "qmp": vm.qmp})
        assert added.status == 201
        await d.connected(f"vm{number}")
        disk = "vda" if case.guest else "top"
        asked = {"disk": disk, "job_id": "qmpcommit-disk", **case.asked}
        if case.guest:
            asked["policy"] = {**case.asked["policy"], "overlay": str(vm.folder / "fresh.qcow2")}
        answer = await ask(d, number, asked)
        if place:
            assert d.process is not None
            async with asyncio.timeout(30):
                await d.process.wait()
            d.environment["QMPCOMMIT_DIE_AT"] = "0" if answer is None else str(number + 1)
            await d.start()
            if answer is None:  # it died before it had answered: the client asks again
                await d.connected(f"vm{number}")
                answer = await ask(d, number, asked)
        assert answer is not None
        assert answer.status == 202, (place, answer.body)
        ended = await d.end_of(answer.json["id"])
        await check(case, vm, chain, watch, ended, place)
        await d.request("DELETE", f"/v1/vms/vm{number}")
        await watch.client.disconnect()
        await vm.quit()
        disk_is_right(case, vm, chain)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_killed_at_every_step(
    folder: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(d: Daemon, number: int, place: str) -> None:
        await one(d, folder, case, number, place)

    said = await rehearsed_and_killed_everywhere(folder, story, "UPDATE commits")
    with capsys.disabled():
        print(f" {case.name}: {said}", end="")


@pytest.mark.parametrize("how", ["keep", "abort"])
async def test_what_somebody_has_ended_meanwhile_is_not_begun_anew(how: str, folder: Path) -> None:
    """Its policy would undo what was decided, by `recover` or by hand."""
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        held = {"kind": "hold", "timeout": 600, "otherwise": {"kind": "pivot"}}
        commit = await d.commit("web1", disk="top", policy=held)
        await d.until(commit, "ready")
        await d.post("/v1/vms", {"name": "other", "qmp": str(folder / "no")})  # all is durable
        await d.kill()
        ended = await run_command("recover", qemu.qmp, "--decide", how, "--yes")
        assert ended.status == 0, ended.err
        await d.start()
        await d.connected("web1")
        failed = await d.end_of(commit)
        assert failed["state"] == "failed"
        assert "somebody has ended it while no daemon followed it" in failed["error"]["message"]
        assert await qemu.execute("query-jobs") == []
        await d.stop()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
