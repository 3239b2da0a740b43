"""Groups of recycles through the daemon: one pause of a guest, a fresh overlay for each disk."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

import qmpcommit as qc
from qmpcommit.names import node_stem
from tests.cli.command import run
from tests.daemon.daemons import Daemon, daemon
from tests.daemon.kill_sweep import killable, places_of, rehearsed_and_killed_everywhere
from tests.daemon.test_api import assert_problem
from tests.daemon.test_groups import end_of, until
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.places import chosen, told
from tests.ground.proxy import Hook, Strike, proxy
from tests.ground.sessions import runs


class Guest:
    """A VM whose second monitor is listened to, and what a group names of it."""

    def __init__(self, vm: Machine, chains: Sequence[Chain], name: str) -> None:
        self.vm, self.chains, self.name = vm, chains, name
        self.fresh = [vm.folder / f"fresh{number}.qcow2" for number in range(len(chains))]
        self.members: list[dict[str, Any]] = [
            {
                "vm": name,
                "disk": f"vd{'ab'[number]}",
                "policy": {"kind": "recycle", "overlay": str(path)},
            }
            for number, path in enumerate(self.fresh)
        ]
        self.client = QMPClient()
        self.pivoted: set[str] = set()
        self.gone: set[str] = set()
        self.pauses = 0
        self.wrongs: list[str] = []

    async def listen(self) -> None:
        with self.client.listener() as heard:
            async for event in heard:
                data: Any = event.get("data", {})
                match event["event"]:
                    case "STOP":
                        self.pauses += 1
                    case "BLOCK_JOB_COMPLETED":
                        self.pivoted.add(data["device"])
                    case "JOB_STATUS_CHANGE" if data["status"] == "null":
                        self.gone.add(data["id"])
                    case "RESUME":
                        self._goes_on()

    def _goes_on(self) -> None:
        """It has to find each of its disks with its overlay, or none pivoted."""
        if self.pivoted and len(self.pivoted) < len(self.chains):
            self.wrongs.append(f"it went on when only {self.pivoted} had pivoted")
        if not self.pivoted <= self.gone:
            self.wrongs.append(f"it went on before {self.pivoted - self.gone} were laid over")

    async def execute(self, command: str, **arguments: Any) -> Any:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.client.execute(command, named or None)

    async def recycled(self, *, running: bool = True) -> None:
        """Its disks are the fresh overlays, and nothing else of ours is left."""
        assert self.wrongs == []
        assert await runs(self) is running
        assert await self.execute("query-jobs") == []
        nodes = await self.execute("query-named-block-nodes", flat=True)
        bases = [str(chain.base) for chain in self.chains]
        files = sorted({n["file"] for n in nodes if not n["file"].startswith("json:")})
        assert files == sorted([*bases, *map(str, self.fresh)]), [n["node-name"] for n in nodes]
        ours = [n for n in nodes if n["node-name"].startswith("qmpcommit-")]
        assert len(ours) == 2 * len(self.fresh)
        assert {path for path in self.vm.folder.glob("fresh*")} == set(self.fresh)

    async def leave(self) -> None:
        with suppress(EOFError, OSError):
            await self.client.disconnect()

    async def quit(self) -> None:
        await self.leave()
        await self.vm.quit()

    def assert_disks(self) -> None:
        for chain, fresh in zip(self.chains, self.fresh, strict=True):
            assert_disk(chain.base, chain.pictures[-1])
            assert_disk(fresh, chain.pictures[-1])


@asynccontextmanager
async def guests(folder: Path, *disks: int, names: str = "vm") -> AsyncIterator[list[Guest]]:
    """So many VMs, with so many disks each."""
    made = []
    async with AsyncExitStack() as stack:
        for number, many in enumerate(disks):
            place = folder / f"m{number}"
            place.mkdir()
            layers = [(f"base{disk}", f"top{disk}") for disk in range(many)]
            chains = [make_chain(place, names=pair) for pair in layers]
            vm = await stack.enter_async_context(machine(place, *chains, running=True))
            guest = Guest(vm, chains, f"{names}{number}")
            await guest.client.connect(vm.qmp2)
            listening = asyncio.create_task(guest.listen())
            stack.push_async_callback(guest.leave)
            stack.callback(listening.cancel)
            made.append(guest)
        yield made


async def known(d: Daemon, vms: Sequence[Guest]) -> None:
    """Make them known to a daemon."""
    for guest in vms:
        added = await d.post("/v1/vms", {"name": guest.name, "qmp": guest.vm.qmp})
        assert added.status == 201
    for guest in vms:
        await d.connected(guest.name)


@asynccontextmanager
async def served(folder: Path, *disks: int) -> AsyncIterator[tuple[Daemon, list[Guest]]]:
    async with guests(folder, *disks) as vms, daemon(folder) as d:
        await known(d, vms)
        yield d, vms


@asynccontextmanager
async def killed_in(
    place: str, folder: Path, *disks: int, running: bool = True, hook: Hook | None = None
) -> AsyncIterator[tuple[Daemon, list[Guest], str]]:
    """A daemon that was killed there while it recycled, and the group's id.

    The first VM's monitor is reached through a proxy with that hook, where one is given.
    """
    d = killable(folder)
    d.environment["QMPCOMMIT_DIE_IN"] = place
    async with AsyncExitStack() as stack:
        vms = await stack.enter_async_context(guests(folder, *disks))
        for guest in vms if not running else ():
            await guest.execute("stop")
        if hook is not None:
            between = await stack.enter_async_context(proxy(folder, vms[0].vm.qmp))
            between.to_qemu, vms[0].vm.qmp = hook, between.path
        try:
            await d.start()
            await known(d, vms)
            group = await promised(d, vms)
            assert d.process is not None
            async with asyncio.timeout(30):
                await d.process.wait()
            del d.environment["QMPCOMMIT_DIE_IN"]
            yield d, vms, group
        except BaseException:
            print(d.log[-8000:])
            raise
        finally:
            if d.process is not None:
                await d.kill()


async def promised(d: Daemon, vms: Sequence[Guest], **asked: Any) -> str:
    members = [member for guest in vms for member in guest.members]
    answer = await d.post("/v1/groups", {"members": members, **asked})
    assert answer.status == 202, answer.body
    return str(answer.json["id"])


async def status_of(guest: Guest) -> str:
    return str((await guest.execute("query-status"))["status"])


async def goes_on(guest: Guest) -> None:
    async with asyncio.timeout(20):
        while await status_of(guest) != "running":
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("disks", [(2,), (1, 1)], ids=["one VM", "two VMs"])
async def test_disks_are_recycled_in_one_pause_of_their_guest(
    folder: Path, disks: Sequence[int]
) -> None:
    async with served(folder, *disks) as (d, vms):
        outcome = (await end_of(d, await promised(d, vms)))["outcome"]
        assert (outcome["action"], outcome["warnings"]) == ("recycle", [])
        assert all(each["guest_paused"] > 0 for each in outcome["outcomes"])
        active = [each["active"]["filename"] for each in outcome["outcomes"]]
        assert active == [str(path) for guest in vms for path in guest.fresh]
        for guest in vms:
            await guest.recycled()
            assert guest.pauses == 1
            await guest.quit()
            guest.assert_disks()


async def test_one_disk_is_recycled_and_another_kept(folder: Path) -> None:
    async with served(folder, 2) as (d, (guest,)):
        guest.members[1]["policy"] = {"kind": "keep"}
        outcome = (await end_of(d, await promised(d, [guest])))["outcome"]
        assert outcome["action"] == "mixed"
        assert [each["action"] for each in outcome["outcomes"]] == ["recycle", "keep"]
        assert (await status_of(guest), guest.pauses) == ("running", 1)
        await guest.quit()
        for path, chain in zip((guest.fresh[0], guest.chains[1].top), guest.chains, strict=True):
            assert_disk(chain.base, chain.pictures[-1])
            assert_disk(path, chain.pictures[-1])


async def test_recycles_that_are_wrong(folder: Path) -> None:
    async with served(folder, 2) as (d, (guest,)):
        one, two = guest.members
        (there := folder / "there").touch()
        shared: dict[str, Any] = {"vm": guest.name, "disk": "vdb", "policy": one["policy"]}
        taken = {**two, "policy": {"kind": "recycle", "overlay": str(there)}}
        plain = [{"vm": guest.name, "disk": disk} for disk in ("vda", "vdb")]
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("each needs its own overlay", {"members": plain, "policy": one["policy"]}),
            ("each needs its own overlay", {"members": [one, shared]}),
            ("exists already", {"members": [one, taken]}),
        ]
        for words, body in wrong:
            refused = assert_problem(await d.post("/v1/groups", body), 422, "InvalidRequest")
            assert words in refused["detail"]
        assert (await d.get("/v1/groups")).json == []
        assert await guest.execute("query-jobs") == []
        guest.members, guest.fresh, guest.chains = plain[:1], guest.fresh[:1], guest.chains[:1]
        alone = await promised(d, [guest], policy=one["policy"])
        assert (await end_of(d, alone))["outcome"]["action"] == "recycle"


async def test_the_client_and_the_command_recycle_together(folder: Path) -> None:
    (into := folder / "into").mkdir()
    async with served(folder, 2) as (d, (guest,)):
        async with qc.Client(d.socket) as client:
            members = zip(("vda", "vdb"), guest.fresh, strict=True)
            group = await client.commit_group(
                [(guest.name, disk, qc.Recycle(str(path))) for disk, path in members]
            )
            assert (await group.wait()).action == "recycle"
        await guest.recycled()
        words = [f"--daemon={d.socket}", "commit", guest.name, "vda", "vdb", "--json"]
        said = await run(*words, "--recycle", into / "fresh")
        assert said.status == 2
        assert "Each disk needs a fresh overlay of its own" in said.error["message"]
        said = await run(*words, "--recycle", into)
        assert (said.status, said.json["action"]) == (0, "recycle"), said
        active = [Path(each["active"]["filename"]) for each in said.json["outcomes"]]
        assert sorted(active) == sorted(into.iterdir())
        assert [path.name.partition("-")[0] for path in active] == ["vda", "vdb"]
        assert await status_of(guest) == "running"
        await guest.quit()
        for path, chain in zip(active, guest.chains, strict=True):
            assert_disk(chain.base, chain.pictures[-1])
            assert_disk(path, chain.pictures[-1])


async def test_a_guest_goes_on_although_another_one_hangs(folder: Path) -> None:
    async with served(folder, 1, 1) as (d, (first, second)):
        second.members[0]["policy"] = {"kind": "hold"}
        group = await promised(d, [first, second], hold_limit=0.3)
        await until(d, group, "ready")
        second.vm.stop()
        decided = await d.post(f"/v1/groups/{group}/decision", {"action": "pivot"})
        assert decided.status == 202
        async with asyncio.timeout(20):
            while not first.pauses:
                await asyncio.sleep(0.01)
        await goes_on(first)
        second.vm.cont()
        ended = await end_of(d, group)
        assert ended["error"]["type"] == "GroupFailed", ended
        assert not first.fresh[0].exists()
        for guest in (first, second):
            assert await status_of(guest) == "running"
            assert await guest.execute("query-jobs") == []
            await guest.quit()
            assert_disk(guest.chains[0].top, guest.chains[0].pictures[-1])


async def test_a_guest_goes_on_whose_monitor_is_lost_just_then(folder: Path) -> None:
    async with guests(folder, 2) as vms, proxy(folder, vms[0].vm.qmp) as between:
        between.to_qemu = cut = Strike("cont", "cut", times=1)
        vms[0].vm.qmp = between.path
        async with daemon(folder) as d:
            await known(d, vms)
            ended = await end_of(d, await promised(d, vms))
            assert ended["outcome"]["action"] == "recycle", ended
            assert cut.met
            await vms[0].recycled()
            await vms[0].quit()
        vms[0].assert_disks()


async def test_a_guest_that_stood_still_before_is_not_started(folder: Path) -> None:
    async with killed_in("after job-finalize", folder, 2, running=False) as (d, (guest,), group):
        await d.start()
        ended = await end_of(d, group)
        assert ended["outcome"]["action"] == "recycle", ended
        await guest.recycled(running=False)
        assert [each["guest_paused"] for each in ended["outcome"]["outcomes"]] == [None, None]
        await guest.quit()
        guest.assert_disks()


@pytest.mark.parametrize(
    ("place", "order"), [("after job-complete", "cancel"), ("before job-finalize", "finalize")]
)
async def test_what_is_held_is_ended_as_soon_as_its_vm_answers(
    folder: Path, place: str, order: str
) -> None:
    async with killed_in(place, folder, 2) as (d, (guest,), group):
        assert await status_of(guest) == "paused"
        await d.start()
        ended = await end_of(d, group)
        assert ended["outcome"]["action"] == "recycle", ended
        (found, *_) = [json.loads(line) for line in d.log.splitlines() if "held_its_disk" in line]
        assert (found["vm"], found["sending"]) == (guest.name, f"job-{order}")
        await guest.recycled()
        await guest.quit()
        guest.assert_disks()


async def test_a_guest_does_not_wait_for_the_daemon_to_find_another_one(folder: Path) -> None:
    async with killed_in("after stop", folder, 1, 1) as (d, (first, second), group):
        assert await status_of(first) == "paused"
        second.vm.stop()
        await d.start()
        await goes_on(first)
        second.vm.cont()
        ended = await end_of(d, group)
        assert ended["outcome"]["action"] == "recycle", ended
        for guest in (first, second):
            await guest.recycled()
            await guest.quit()
            guest.assert_disks()


async def test_an_overlay_that_is_gone_after_the_decision_is_told(folder: Path) -> None:
    async with killed_in("before job-finalize", folder, 2) as (d, (guest,), group):
        jobs = sorted(job["id"] for job in await guest.execute("query-jobs"))
        await guest.execute("blockdev-del", node_name=f"{node_stem(jobs[1])}-top")
        assert await status_of(guest) == "paused"
        await d.start()
        ended = await end_of(d, group)
        assert (ended["state"], ended["error"]["type"]) == ("failed", "CommitFailed"), ended
        assert "has pivoted, but no fresh overlay" in ended["error"]["message"]
        commits = [(await d.get(f"/v1/commits/{m['commit']}")).json for m in ended["members"]]
        assert [commit["state"] for commit in commits] == ["done", "failed"]
        assert await status_of(guest) == "running"
        assert (guest.wrongs, await guest.execute("query-jobs")) == ([], [])
        assert not guest.fresh[1].exists()
        await guest.quit()
        assert_disk(guest.fresh[0], guest.chains[0].pictures[-1])
        for chain in guest.chains:
            assert_disk(chain.base, chain.pictures[-1])


async def test_sigterm_while_overlays_are_laid_leaves_no_guest_paused(folder: Path) -> None:
    """The next daemon lays what this one could not, on the guest that goes on."""
    asked: list[str] = []

    def lose(message: dict[str, Any]) -> str:
        if message.get("execute") != "blockdev-snapshot":
            return "pass"
        asked.append(message["arguments"]["overlay"])
        return "drop" if len(asked) == 2 else "pass"

    async with killed_in("before job-finalize", folder, 2, hook=lose) as (d, (guest,), group):
        await d.start()
        async with asyncio.timeout(20):
            while len(asked) < 2:
                await asyncio.sleep(0.01)
        assert await status_of(guest) == "paused"
        assert await d.stop() == 0
        assert await status_of(guest) == "running"
        await d.start()
        ended = await end_of(d, group)
        assert ended["outcome"]["action"] == "recycle", ended
        guest.wrongs.clear()
        await guest.recycled()
        await guest.quit()
        guest.assert_disks()


async def one_killed(d: Daemon, folder: Path, disks: Sequence[int], number: int, place: str) -> Any:
    """A group, a kill somewhere in it, another daemon, and the end of all."""
    (folder / f"{number}").mkdir()
    async with guests(folder / f"{number}", *disks, names=f"vm{number}-") as vms:
        await known(d, vms)
        body = {"members": [member for guest in vms for member in guest.members]}

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
                for guest in vms:
                    await d.connected(guest.name)
                answer = await promised()
        assert answer is not None
        assert answer.status == 202, (place, answer.body)
        ended = await end_of(d, answer.json["id"])
        assert ended["state"] == "done", (place, ended)
        assert ended["outcome"]["action"] == "recycle", (place, ended)
        for guest in vms:
            await guest.recycled()
            await d.request("DELETE", f"/v1/vms/{guest.name}")
            await guest.quit()
            guest.assert_disks()
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


async def killed_twice(first: str, folder: Path, number: int) -> list[str]:
    """A kill there, one at that place of the recovery, and the end; the recovery's places.

    A recovery may have fewer places than another one: who has ended all before is killed then.
    """
    (place := folder / f"{number}").mkdir()
    async with killed_in(first, place, 2) as (d, (guest,), group):
        (place / "places").write_text("")
        d.environment |= {"QMPCOMMIT_RECOVERS": "1", "QMPCOMMIT_DIE_AT": str(number)}
        if number:
            dying = asyncio.create_task((await d.launch()).wait())
            ending = asyncio.create_task(end_of(d, group))
            try:
                async with asyncio.timeout(30):
                    await asyncio.wait({dying, ending}, return_when=asyncio.FIRST_COMPLETED)
                    if len((place / "places").read_text().splitlines()) >= number:
                        await dying  # it can't be asked any more
            finally:
                ending.cancel()
                await asyncio.wait({ending})
                await d.kill()
                await dying
            d.environment["QMPCOMMIT_DIE_AT"] = "0"
        await d.start()
        ended = await end_of(d, group)
        assert ended["state"] == "done", ended
        assert ended["outcome"]["action"] == "recycle", ended
        await guest.recycled()
        await guest.quit()
        guest.assert_disks()
    return places_of(place)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", ["after job-complete", "before job-finalize"])
async def test_killed_again_at_every_step_of_the_recovery(
    folder: Path, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = await killed_twice(first, folder, 0)
    tried = chosen(len(places))
    for number in tried:
        try:
            await killed_twice(first, folder, number)
        except BaseException:
            print(f"killed again at {number}: {places[number - 1]}")
            raise
    with capsys.disabled():
        print(f" {told(len(places), len(tried))}", end="")
