"""Windows of the daemon over several VMs: one instant, all or none, closed on all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemons import Daemon
from tests.daemon.kill_sweep import killable
from tests.daemon.test_api import assert_problem
from tests.daemon.test_windows import OTHERS, closed, end_of, overlays, told
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine

NAMES = ("web1", "db1")
DEVICE = "/machine/peripheral/{}/virtio-backend"
MEMBERS = [{"vm": "web1", "disk": "vda"}, {"vm": "db1", "disk": "vda"}]
STEP = 65536


@dataclass
class Host:
    """Guests that run, by their names, each in a folder of its own, and their daemon."""

    d: Daemon
    folder: Path
    chains: dict[str, list[Chain]] = field(default_factory=dict)
    vms: dict[str, Machine] = field(default_factory=dict)

    @property
    def all_chains(self) -> list[Chain]:
        return [chain for chains in self.chains.values() for chain in chains]

    async def writes(self, vm: str, disk: str, number: int) -> None:
        """The guest writes something new, which its disk has to show in the end."""
        offset, pattern = number % 512 * STEP, number % 255 + 1
        line = f'qemu-io -d {DEVICE.format(disk)} "write -P {pattern} {offset} 64k"'
        said = await self.vms[vm].execute("human-monitor-command", command_line=line)
        assert not said, said
        self.chains[vm]["ab".index(disk[-1])].pictures[-1].fill(offset, STEP, pattern)

    async def open(self, key: str = "", **asked: Any) -> Any:
        """A window over both that is open."""
        asked = {"members": MEMBERS, "freeze": "pause", "lease": 600, **asked}
        headers = {"Idempotency_Key": key} if key else {}
        answer = await self.d.post("/v1/windows", asked, **headers)
        assert answer.status == 201, answer.body
        return answer.json

    async def nothing_is_left(self, *names: str) -> None:
        """No job, no node, no file; the guests go on, and write where they did before."""
        for name in names or self.vms:
            vm = self.vms[name]
            assert (await vm.execute("query-status"))["status"] == "running"
            assert await vm.execute("query-jobs") == []
            nodes = [n["node-name"] for n in await vm.execute("query-named-block-nodes")]
            assert [node for node in nodes if "qmpcommit" in node] == []
            active = [each["inserted"]["file"] for each in await vm.execute("query-block")]
            assert active == [str(chain.top) for chain in self.chains[name]]
            assert overlays(vm.folder) == []

    async def end(self) -> None:
        """Their disks show what was written to them."""
        for name, vm in self.vms.items():
            if vm.process.returncode is None:
                await vm.quit()
                for chain in self.chains[name]:
                    assert_disk(chain.top, chain.pictures[-1])


@asynccontextmanager
async def running(place: Path, chains: list[Chain]) -> AsyncIterator[Machine]:
    """A guest in its folder."""
    async with machine(place, *chains, style="implicit", running=True) as vm:
        yield vm


@asynccontextmanager
async def host(
    folder: Path, config: str = "", disks: tuple[int, int] = (1, 1)
) -> AsyncIterator[Host]:
    """Both, and a daemon that may be killed; the disks are compared in the end."""
    d = killable(folder)
    d.config += config
    made = Host(d, folder)
    async with AsyncExitStack() as stack:
        for name, many in zip(NAMES, disks, strict=True):
            place = folder / name
            place.mkdir()
            pair = [make_chain(place), make_chain(place, names=OTHERS)]
            made.chains[name] = pair[:many]
            vm = await stack.enter_async_context(running(place, made.chains[name]))
            made.vms[name] = vm
            d.config += f'[[vm]]\nname = "{name}"\nqmp = "{vm.qmp}"\n'
        await d.start()
        try:
            for name in NAMES:
                await d.connected(name)
            yield made
        except BaseException:
            print(d.log[-8000:])
            raise
        finally:
            if d.process is not None:
                await d.kill()
        await made.end()


async def test_the_disks_of_all_vms_stand_still_until_it_is_closed(folder: Path) -> None:
    async with host(folder, disks=(2, 1)) as at:
        d = at.d
        window = await at.open(members=[*MEMBERS, {"vm": "web1", "disk": "vdb"}])
        assert (window["state"], window["vm"], window["disks"]) == ("open", "db1,web1", {})
        by_vm = {each["vm"]: each for each in window["windows"]}
        assert list(by_vm) == ["web1", "db1"]
        assert window["name"] == ",".join(each["name"] for each in window["windows"])
        before = {chain.top: chain.pictures[-1].copy() for chain in at.all_chains}
        for name, chains in at.chains.items():
            each = by_vm[name]
            assert 0 < each["quiesced"] <= window["quiesced"]
            files = [disk["filename"] for _, disk in sorted(each["disks"].items())]
            assert files == [str(chain.top) for chain in chains]
            laid = sorted(Path(disk["overlay"]) for disk in each["disks"].values())
            assert laid == overlays(folder / name)
            for number, _ in enumerate(chains):
                await at.writes(name, f"vd{'ab'[number]}", number + 1)
            for chain in chains:
                assert_disk(chain.top, before[chain.top])
            for where in (f"/v1/windows?vm={name}", f"/v1/windows?state=open&vm={name}"):
                assert [w["id"] for w in (await d.get(where)).json] == [window["id"]]
            metrics = (await d.get("/metrics")).body.decode()
            assert f'qmpcommit_window_age_seconds{{disk="vda",vm="{name}"}}' in metrics
            assert f'qmpcommit_window_overlay_bytes{{disk="vda",vm="{name}"}}' in metrics
            by_name = await d.get(f"/v1/windows/{each['name']}")
            assert by_name.json["id"] == window["id"]
            assert_problem(await d.request("DELETE", f"/v1/vms/{name}"), 409, "JobConflict")
        assert (await d.get("/v1/windows?vm=web")).json == []
        assert (await d.get("/v1/windows?state=orphan")).json == []
        assert 'qmpcommit_windows{state="open"} 1.0' in metrics
        await closed(d, window["id"])
        ended = await end_of(d, window["id"])
        assert ended["state"] == "done", ended
        assert [outcome["action"] for outcome in ended["outcomes"]] == ["pivot"] * 3
        for each in ended["windows"]:
            mine = [(await d.get(f"/v1/commits/{i}")).json for i in each["commits"]]
            assert {commit["vm"] for commit in mine} == {each["vm"]}
            assert [outcome["action"] for outcome in each["outcomes"]] == ["pivot"] * len(mine)
        assert [event["state"] for event in await told(d)] == ["opening", "open", "closing", "done"]
        assert "qmpcommit_window_age_seconds{" not in (await d.get("/metrics")).body.decode()
        await at.nothing_is_left()


async def test_its_lease_closes_it_on_all_vms_over_a_restart_too(folder: Path) -> None:
    async with host(folder) as at:
        d = at.d
        window = await at.open("k")
        await d.kill()
        await d.start()
        assert (await d.get(f"/v1/windows/{window['id']}")).json == window
        again = await at.open("k")
        assert again["id"] == window["id"]
        for number, name in enumerate(NAMES):
            await d.connected(name)
            await at.writes(name, "vda", number + 7)
        await d.post(f"/v1/windows/{window['id']}/lease", {"seconds": 0.2})
        ended = await end_of(d, window["id"])
        assert ended["state"] == "done", ended
        assert [len(each["outcomes"]) for each in ended["windows"]] == [1, 1]
        await at.nothing_is_left()


async def test_one_vm_that_is_not_fit_leaves_nothing_on_the_other(folder: Path) -> None:
    async with host(folder) as at:
        web1, db1 = MEMBERS
        wrong: list[tuple[dict[str, Any], int, str]] = [
            ({"members": []}, 422, "InvalidRequest"),
            ({"freeze": None}, 422, "InvalidRequest"),
            ({"freeze": "agent", "agents": {"web1": "/a"}}, 422, "InvalidRequest"),
            ({"lease": 0}, 422, "InvalidRequest"),
            ({"members": [web1, {"vm": "none", "disk": "vda"}]}, 404, "VMNotFound"),
            ({"members": [web1, {"vm": "db1", "disk": "none"}]}, 404, "DiskNotFound"),
            ({"members": [web1, db1, db1]}, 409, "WindowError"),
            ({"overlay_dir": "/does/not/exist"}, 409, "CommitFailed"),
        ]
        for asked, status, kind in wrong:
            body = {"members": MEMBERS, "freeze": "pause", **asked}
            answer = await at.d.post("/v1/windows", body, Idempotency_Key="k")
            assert_problem(answer, status, kind)
            await at.nothing_is_left()
        detail = assert_problem(
            await at.d.post("/v1/windows", {"members": MEMBERS, "freeze": None}),
            422,
            "InvalidRequest",
        )["detail"]
        assert "several VMs have one instant only while their guests stand still" in detail
        states = [window["state"] for window in (await at.d.get("/v1/windows")).json]
        assert set(states) == {"failed"}
        window = await at.open("k")  # what was refused has not used its key up
        await closed(at.d, window["id"])
        assert (await end_of(at.d, window["id"]))["state"] == "done"
        await at.nothing_is_left()


@pytest.mark.parametrize("command", ["blockdev-create", "stop", "transaction"])
async def test_one_qemu_that_refuses_leaves_nothing_on_the_other(
    folder: Path, command: str
) -> None:
    async with host(folder) as at:
        d = at.d
        await d.stop()
        d.environment["QMPCOMMIT_REFUSES"] = f"db1 {command}"
        await d.start()
        for name in NAMES:
            await d.connected(name)
        body = {"members": MEMBERS, "freeze": "pause", "lease": 600}
        refused = await d.post("/v1/windows", body, Idempotency_Key="k")
        assert_problem(refused, 502, "CommandRefused")
        assert refused.json["error"]["vm"] == "db1"
        (window,) = (await d.get("/v1/windows")).json
        assert window["state"] == "failed"
        assert window["error"]["type"] == "CommandRefused"
        assert (await d.get("/v1/windows?state=orphan")).json == []
        await at.nothing_is_left()
        await d.stop()
        del d.environment["QMPCOMMIT_REFUSES"]
        await d.start()
        for name in NAMES:
            await d.connected(name)
        window = await at.open("k")
        await closed(d, window["id"])
        assert (await end_of(d, window["id"]))["state"] == "done"
        await at.nothing_is_left()


async def test_a_vm_that_is_away_leaves_nothing_on_the_other(folder: Path) -> None:
    async with host(folder) as at:
        at.vms["db1"].kill()
        await at.vms["db1"].ended()
        body = {"members": MEMBERS, "freeze": "pause"}
        answer = await at.d.post("/v1/windows", body)
        assert answer.status == 503, answer.body
        await at.nothing_is_left("web1")
        assert (await at.d.get("/v1/windows?state=orphan")).json == []


async def test_a_vm_that_comes_back_while_it_is_closed_is_closed_too(folder: Path) -> None:
    async with host(folder) as at:
        d = at.d
        window = await at.open()
        await at.writes("db1", "vda", 3)
        await at.writes("web1", "vda", 4)
        (overlay,) = overlays(folder / "db1")
        await at.vms["db1"].quit()
        await closed(d, window["id"])
        async with asyncio.timeout(60):
            while True:
                seen = (await d.get(f"/v1/windows/{window['id']}")).json
                if seen["problem"] and overlays(folder / "web1") == []:
                    break
        assert seen["problem"].startswith("db1 is away")
        assert seen["state"] == "closing"
        await at.nothing_is_left("web1")
        (chain,) = at.chains["db1"]
        assert_disk(overlay, chain.pictures[-1])
        grown = Chain([*chain.files, overlay], chain.pictures)
        async with machine(folder / "db1", grown, style="drive", running=True) as vm:
            ended = await end_of(d, window["id"])
            assert ended["state"] == "done", ended
            await vm.quit()
        assert overlays(folder) == []
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_vm_that_does_not_come_back_is_named_and_the_other_one_closed(
    folder: Path,
) -> None:
    async with host(folder, '[limits]\ngone_after = "300ms"\n') as at:
        d = at.d
        window = await at.open()
        await at.writes("db1", "vda", 3)
        await at.writes("web1", "vda", 4)
        (overlay,) = overlays(folder / "db1")
        await at.vms["db1"].quit()
        await closed(d, window["id"])
        ended = await end_of(d, window["id"])
        assert ended["state"] == "failed"
        assert ended["error"]["overlays"] == [str(overlay)]
        assert "db1 is gone, and did not come back" in ended["error"]["message"]
        assert "on web1" not in ended["error"]["message"]
        assert [len(each["outcomes"]) for each in ended["windows"]] == [1, 0]
        await at.nothing_is_left("web1")
        (orphan,) = (await d.get("/v1/windows?state=orphan")).json
        name = window["windows"][1]["name"]
        assert (orphan["id"], orphan["vm"]) == (name, "db1")
        (chain,) = at.chains["db1"]
        grown = Chain([*chain.files, overlay], chain.pictures)
        async with machine(folder / "db1", grown, style="drive", running=True) as vm:
            await d.connected("db1")
            answer = await d.request("DELETE", f"/v1/windows/{name}")
            ended = await end_of(d, answer.json["id"])
            assert ended["state"] == "done", ended
            await vm.quit()
        assert overlays(folder) == []
        assert_disk(chain.top, chain.pictures[-1])
