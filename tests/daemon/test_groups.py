"""Groups through the daemon: all disks at one instant or none, whatever happens to it."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qmpcommit.daemon.groups import Groups
from tests.daemon.daemons import Daemon, daemon
from tests.daemon.kill_sweep import rehearsed_and_killed_everywhere
from tests.daemon.test_api import assert_problem
from tests.ground.daemons import many_disks
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine

PIVOT, KEEP, HOLD = {"kind": "pivot"}, {"kind": "keep"}, {"kind": "hold"}


class Host:
    """Storage daemons of so many disks each, and what a group names of them."""

    def __init__(self) -> None:
        self.vms: list[Machine] = []
        self.chains: list[Chain] = []
        self.members: list[dict[str, Any]] = []

    async def jobs(self) -> list[Any]:
        return [job for vm in self.vms for job in await vm.execute("query-jobs")]

    async def ends_as(self, action: str) -> None:
        """All QEMUs end, and each disk is as it has to be."""
        for vm in self.vms:
            await vm.quit()
        for chain in self.chains:
            if action in ("pivot", "keep"):
                assert_disk(chain.base, chain.pictures[-1])
            if action != "pivot":
                assert_disk(chain.top, chain.pictures[-1])


@asynccontextmanager
async def hosted(folder: Path, *disks: int, names: str = "vm", **more: Any) -> AsyncIterator[Host]:
    """So many storage daemons, with so many disks each."""
    host = Host()
    async with AsyncExitStack() as stack:
        for vm, many in enumerate(disks):
            mine = []
            for disk in range(many):
                name = f"v{vm}d{disk}"
                mine.append(make_chain(folder, names=(f"base{vm}{disk}", name), **more))
                host.members.append({"vm": f"{names}{vm}", "disk": name})
            host.chains += mine
            host.vms.append(await stack.enter_async_context(many_disks(folder / f"m{vm}", *mine)))
        yield host


@asynccontextmanager
async def served(folder: Path, *disks: int, top: str = "", **more: Any) -> AsyncIterator[Any]:
    async with hosted(folder, *disks, **more) as host:
        config = top
        for number, vm in enumerate(host.vms):
            config += f'[[vm]]\nname = "vm{number}"\nqmp = "{vm.qmp}"\n'
        async with daemon(folder, config) as d:
            for number in range(len(disks)):
                await d.connected(f"vm{number}")
            yield d, host


async def ask(d: Daemon, host: Host, **asked: Any) -> Any:
    answer = await d.post("/v1/groups", {"members": host.members, **asked})
    assert answer.status == 202, answer.body
    return answer.json


async def end_of(d: Daemon, group: str) -> Any:
    async with asyncio.timeout(60):
        while True:
            with suppress(OSError, http.client.HTTPException):
                answer = await d.get(f"/v1/groups/{group}?wait=2")
                assert answer.status == 200, answer.body
                if answer.json["ended"]:
                    return answer.json
            await asyncio.sleep(0.01)


async def until(d: Daemon, group: str, phase: str) -> None:
    async with asyncio.timeout(30):
        while (await d.get(f"/v1/groups/{group}")).json["phase"] != phase:
            await asyncio.sleep(0.01)


async def members_of(d: Daemon, group: Any) -> list[Any]:
    return [(await d.get(f"/v1/commits/{m['commit']}")).json for m in group["members"]]


@pytest.mark.parametrize("action", ["pivot", "keep"])
@pytest.mark.parametrize("disks", [(2,), (1, 1)], ids=["one VM", "two VMs"])
async def test_all_disks_at_one_instant(folder: Path, action: str, disks: Sequence[int]) -> None:
    async with served(folder, *disks) as (d, host):
        group = await ask(d, host, policy={"kind": action})
        ended = await end_of(d, group["id"])
        assert ended["state"] == "done", ended
        outcome = ended["outcome"]
        assert (outcome["group"], outcome["action"]) == (group["id"], action)
        assert outcome["instant"]
        assert [each["action"] for each in outcome["outcomes"]] == [action] * 2
        assert all(0 <= each["held"] < 2 for each in outcome["outcomes"])
        for member in await members_of(d, group):
            assert (member["state"], member["group"]) == ("done", group["id"])
            assert member["outcome"]["action"] == action
        metrics = (await d.get("/metrics")).body.decode()
        assert f'qmpcommit_groups_total{{outcome="{action}"}} 1.0' in metrics
        assert "qmpcommit_group_held_seconds_count 2.0" in metrics
        assert await host.jobs() == []
        await host.ends_as(action)


async def test_a_hold_is_decided_for_all_and_survives_restarts(folder: Path) -> None:
    async with served(folder, 1, 1) as (d, host):
        body = {"members": host.members, "policy": HOLD}
        answer = await d.post("/v1/groups", body, Idempotency_Key="k")
        group = answer.json["id"]
        await until(d, group, "ready")
        (member, _) = await members_of(d, answer.json)
        for way in ("decision", ""):
            path = f"/v1/commits/{member['id']}/{way}".rstrip("/")
            method = "POST" if way else "DELETE"
            refused = await d.request(method, path, {"action": "pivot"} if way else None)
            assert group in assert_problem(refused, 409, "JobConflict")["detail"]
        jobs = {job["id"] for job in await host.jobs()}
        await d.kill()
        await d.start()
        await until(d, group, "ready")
        assert await d.stop() == 0
        assert {(j["id"], j["status"]) for j in await host.jobs()} == {(j, "ready") for j in jobs}
        await d.start()
        await until(d, group, "ready")
        again = await d.post("/v1/groups", body, Idempotency_Key="k")
        assert (again.status, again.json["id"]) == (202, group)
        assert again.headers["idempotent-replay"] == "true"
        other = await d.post("/v1/groups", {**body, "priority": 1}, Idempotency_Key="k")
        assert_problem(other, 422, "KeyReused")
        decided = await d.post(f"/v1/groups/{group}/decision", {"action": "pivot"})
        assert decided.status == 202
        ended = await end_of(d, group)
        assert ended["outcome"]["action"] == "pivot", ended
        late = await d.post(f"/v1/groups/{group}/decision", {"action": "keep"})
        assert_problem(late, 409, "JobConflict")
        assert [each["id"] for each in (await d.get("/v1/groups")).json] == [group]
        assert await host.jobs() == []
        await host.ends_as("pivot")


async def test_an_abort_cancels_all(folder: Path) -> None:
    async with served(folder, 2) as (d, host):
        group = (await ask(d, host, policy=HOLD))["id"]
        await until(d, group, "ready")
        assert (await d.request("DELETE", f"/v1/groups/{group}")).status == 202
        ended = await end_of(d, group)
        assert (ended["state"], ended["outcome"]["action"]) == ("done", "abort")
        assert await host.jobs() == []
        await host.ends_as("abort")


async def test_members_start_together_within_the_limits(folder: Path) -> None:
    async with served(folder, 3, top="[limits]\nper_vm = 2\n") as (d, host):
        all_three = await d.post("/v1/groups", {"members": host.members, "policy": KEEP})
        refused = assert_problem(all_three, 422, "InvalidRequest")
        assert "limits.per_vm" in refused["detail"]
        first = await d.commit("vm0", disk="v0d2", policy=HOLD)
        await d.until(first, "ready")
        host.members.pop()
        group = await ask(d, host, policy=KEEP)
        assert (group["state"], group["position"]) == ("queued", 1)
        assert [m["state"] for m in await members_of(d, group)] == ["queued"] * 2
        assert len(await host.jobs()) == 1, "one could run, and not without the other"
        await d.kill()
        await d.start()
        assert (await d.get(f"/v1/groups/{group['id']}")).json["state"] == "queued"
        await d.until(first, "ready")
        await d.post(f"/v1/commits/{first}/decision", {"action": "keep"})
        assert (await end_of(d, group["id"]))["outcome"]["action"] == "keep"
        waiting = await d.commit("vm0", disk="v0d2", policy=HOLD)
        await d.until(waiting, "ready")
        queued = await ask(d, host, policy=KEEP)
        cancelled = await d.request("DELETE", f"/v1/groups/{queued['id']}")
        assert cancelled.status == 202
        assert (await end_of(d, queued["id"]))["state"] == "cancelled"
        assert [m["state"] for m in await members_of(d, queued)] == ["cancelled"] * 2
        await d.request("DELETE", f"/v1/commits/{waiting}")
        await d.end_of(waiting)
        await host.ends_as("keep")


async def test_groups_that_are_wrong(folder: Path) -> None:
    async with served(folder, 2) as (d, host):
        one, two = host.members
        wrong: list[dict[str, Any]] = [
            {"members": [], "policy": KEEP},
            {"members": [one, two]},
            {"members": [{**one, "policy": KEEP}, two]},
            {"members": [{**one, "policy": KEEP}, two], "policy": KEEP},
            {"members": [one, one], "policy": KEEP},
            {"members": [one, two], "policy": {"kind": "recycle", "overlay": "/x"}},
            {"members": [one, two], "policy": KEEP, "hold_limit": -1},
            {"members": [one, two], "policy": KEEP, "only_if": ["true"]},
        ]
        for body in wrong:
            assert_problem(await d.post("/v1/groups", body), 422, "InvalidRequest")
        nobody = {"members": [one, {**two, "vm": "nobody"}], "policy": KEEP}
        assert_problem(await d.post("/v1/groups", nobody), 404, "VMNotFound")
        nothing = {"members": [one, {**two, "disk": "nothing"}], "policy": KEEP}
        assert_problem(await d.post("/v1/groups", nothing), 404, "DiskNotFound")
        idle = {"members": [one, two], "policy": KEEP, "delete": True}
        assert_problem(await d.post("/v1/groups", idle), 422, "InvalidRequest")
        assert_problem(await d.get("/v1/groups/0123abcd"), 404, "CommitNotFound")
        assert (await d.get("/v1/groups")).json == []
        assert await host.jobs() == []


async def one_killed(d: Daemon, folder: Path, disks: Sequence[int], number: int, place: str) -> Any:
    """A group, a kill somewhere in it, another daemon, and the end of all or none."""
    place_of = folder / f"{number}"
    place_of.mkdir()
    async with hosted(place_of, *disks, names=f"vm{number}-") as host:
        for vm, machine in enumerate(host.vms):
            added = {"name": f"vm{number}-{vm}", "qmp": machine.qmp}
            assert (await d.post("/v1/vms", added)).status == 201
            await d.connected(added["name"])
        body = {"members": host.members, "policy": PIVOT}

        async def promised() -> Any:
            with suppress(OSError, http.client.HTTPException):
                return await d.post("/v1/groups", body, Idempotency_Key=f"key{number}")
            return None

        answer = await promised()
        if place:
            assert d.process is not None
            async with asyncio.timeout(30):
                await d.process.wait()
            d.environment["QMPCOMMIT_DIE_AT"] = "0" if answer is None else str(number + 1)
            await d.start()
            if answer is None:
                for vm in range(len(disks)):
                    await d.connected(f"vm{number}-{vm}")
                answer = await promised()
        assert answer is not None
        assert answer.status == 202, (place, answer.body)
        ended = await end_of(d, answer.json["id"])
        assert await host.jobs() == [], f"a job was left behind, killed {place}"
        for vm in range(len(disks)):
            await d.request("DELETE", f"/v1/vms/vm{number}-{vm}")
        assert ended["state"] == "done", (place, ended)
        assert [each["action"] for each in ended["outcome"]["outcomes"]] == ["pivot"] * sum(disks)
        await host.ends_as("pivot")
        return ended


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("disks", [(2,), (1, 1)], ids=["one VM", "two VMs"])
async def test_killed_at_every_step(
    folder: Path, disks: Sequence[int], capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(d: Daemon, number: int, place: str) -> None:
        await one_killed(d, folder, disks, number, place)

    said = await rehearsed_and_killed_everywhere(folder, story)
    with capsys.disabled():
        print(f" {said}", end="")


@pytest.mark.parametrize(("begun", "phase"), [(False, "copying"), (True, "recovering")])
def test_only_what_was_begun_is_recovered(begun: bool, phase: str) -> None:
    here: Any = None
    group: Any = SimpleNamespace(state="running", commit=None, begun=begun)
    assert Groups.phase(here, group) == phase
