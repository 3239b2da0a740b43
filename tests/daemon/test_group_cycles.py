"""Cycles over several disks, of one VM or of several: they all end the same way, whatever dies."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.claim import take
from tests.daemon.daemons import Daemon
from tests.daemon.kill_sweep import killable
from tests.daemon.test_cycles import ask, end_of
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.places import chosen, told
from tests.ground.sessions import runs

SHAPES = {"one VM": (2,), "two VMs": (1, 1)}
DISKS = ("vda", "vdb")
KEEP, DISCARD = '["true"]', '["false"]'


@dataclass
class Ground:
    """Machines whose guests run, and how many disks of each the cycle is for."""

    folder: Path
    vms: dict[str, Machine]
    chains: dict[tuple[str, str], Chain]

    def config(self, keep_if: str, **members: str) -> str:
        """A configuration with a cycle for all disks."""
        known = "".join(
            f'[[vm]]\nname = "{name}"\nqmp = "{vm.qmp}"\n' for name, vm in self.vms.items()
        )
        (vm, disk), *others = self.chains
        together = ", ".join(f'{{vm = "{vm}", disk = "{disk}"}}' for vm, disk in others)
        given = {"keep_if": keep_if, "guest": '"reset"', "every": '"1h"', "delete": "true"}
        lines = "\n".join(f"{key} = {value}" for key, value in {**given, **members}.items())
        cycle = f'[[cycle]]\nvm = "{vm}"\ndisk = "{disk}"\ntogether = [{together}]\n{lines}\n'
        return known + cycle

    async def connected(self, d: Daemon) -> None:
        """The daemon has all VMs."""
        for name in self.vms:
            await d.connected(name)

    async def ended_as(self, d: Daemon, ended: Any, keep: bool) -> None:
        """All disks ended the same way, the guests run, and nothing is left of it."""
        assert (ended["state"], ended["result"]) == ("done", "kept" if keep else "discarded"), ended
        assert [(each["vm"], each["disk"]) for each in ended["disks"]] == list(self.chains)
        await self.at_rest()
        fresh = [Path(each["overlay"]) for each in ended["disks"]]
        assert await self.layers(d) == [
            [overlay, chain.base]
            for overlay, chain in zip(fresh, self.chains.values(), strict=True)
        ]
        files = {*fresh, *(chain.base for chain in self.chains.values())}
        await d.kill()
        for vm in self.vms.values():
            await vm.quit()
        assert set(self.folder.rglob("*.qcow2")) == files
        for overlay, chain in zip(fresh, self.chains.values(), strict=True):
            picture = chain.pictures[-1 if keep else 0]
            assert_disk(chain.base, picture)
            assert_disk(overlay, picture)

    async def as_before(self, d: Daemon) -> None:
        """Nothing was changed, and nothing is left of it."""
        await self.at_rest()
        assert await self.layers(d) == [[c.top, c.base] for c in self.chains.values()]
        await d.kill()
        for vm in self.vms.values():
            await vm.quit()
        files = {path for chain in self.chains.values() for path in (chain.top, chain.base)}
        assert set(self.folder.rglob("*.qcow2")) == files
        for chain in self.chains.values():
            assert_disk(chain.base, chain.pictures[0])
            assert_disk(chain.top, chain.pictures[-1])

    async def told_apart(self, d: Daemon, ended: Any) -> None:
        """The first of two was discarded and the last is as before, which the error tells."""
        first, last = self.chains
        assert f"But {first[1]} of {first[0]} was discarded already" in ended["error"]["message"]
        await self.at_rest()
        fresh = Path(ended["disks"][0]["overlay"])
        gone, whole = self.chains[first], self.chains[last]
        assert await self.layers(d) == [[fresh, gone.base], [whole.top, whole.base]]
        await d.kill()
        for vm in self.vms.values():
            await vm.quit()
        assert_disk(fresh, gone.pictures[0])
        assert_disk(gone.base, gone.pictures[0])
        assert_disk(whole.top, whole.pictures[-1])
        assert_disk(whole.base, whole.pictures[0])

    async def at_rest(self) -> None:
        """No guest stands still, and no job is there."""
        for name, vm in self.vms.items():
            assert await runs(vm), f"{name} was left paused"
            assert await vm.execute("query-jobs") == []

    async def layers(self, d: Daemon) -> list[list[Path]]:
        """The files of the chains, active layer first."""
        return [
            [Path(image["filename"]) for image in disk["chain"]]
            for name in self.vms
            for disk in (await d.get(f"/v1/vms/{name}/disks")).json
        ]


@asynccontextmanager
async def ground(folder: Path, shape: Sequence[int], number: int = 0) -> AsyncIterator[Ground]:
    """So many disks on each of so many machines, in a folder of their own."""
    place = folder / f"ground{number}"
    made = Ground(place, {}, {})
    async with AsyncExitStack() as stack:
        for which, many in enumerate(shape):
            name = f"vm{which}x{number}"
            (home := place / name).mkdir(parents=True)
            chains = [make_chain(home, names=(f"base{n}", f"top{n}")) for n in range(many)]
            made.vms[name] = await stack.enter_async_context(machine(home, *chains, running=True))
            for disk, chain in zip(DISKS, chains, strict=False):
                made.chains[name, disk] = chain
        yield made


@asynccontextmanager
async def killed_daemon(folder: Path) -> AsyncIterator[Daemon]:
    """A daemon that can be killed at a step; its log is printed where the test fails."""
    d = killable(folder)
    try:
        yield d
    except BaseException:
        print(d.log[-8000:])
        raise
    finally:
        if d.process is not None and d.process.returncode is None:
            await d.kill()


async def died(d: Daemon) -> None:
    """Wait until it has died where it had to."""
    assert d.process is not None
    async with asyncio.timeout(60):
        await d.process.wait()
    for name in ("QMPCOMMIT_DIE_AT", "QMPCOMMIT_DIE_IN"):
        d.environment.pop(name, None)
    d.environment["QMPCOMMIT_DIE_AT"] = "0"


async def begin(d: Daemon, at: Ground) -> None:
    """Ask for a round, by its last disk; the daemon may die before it answers."""
    vm, disk = list(at.chains)[-1]
    with suppress(OSError, http.client.HTTPException):
        await d.post(f"/v1/vms/{vm}/cycles", {"disk": disk}, Idempotency_Key=vm)


async def end(d: Daemon, at: Ground) -> Any:
    """How that round ended."""
    vm, disk = list(at.chains)[-1]
    return await end_of(d, await ask(d, vm, disk, Idempotency_Key=vm))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(2,), (1, 1), (2, 1)], ids=str)
async def test_all_disks_end_the_same_way(folder: Path, shape: Sequence[int], keep: bool) -> None:
    seen = folder / "seen"
    status = 0 if keep else 1
    variables = "$QMPCOMMIT_VM $QMPCOMMIT_DISK"
    command = f'["sh", "-c", "echo {variables} >> {seen}; exit {status}"]'
    async with ground(folder, shape) as at, killed_daemon(folder) as d:
        d.config = at.config(command)
        await d.start()
        await at.connected(d)
        vm, disk = list(at.chains)[-1]
        ended = await end_of(d, await ask(d, vm, disk))
        assert seen.read_text().split() == [*(v for v, _ in at.chains), *(n for _, n in at.chains)]
        if keep:
            group = (await d.get(f"/v1/groups/{ended['group']}")).json
            assert [m["commit"] for m in group["members"]] == [e["commit"] for e in ended["disks"]]
        (shown,) = (await d.get("/v1/cycles")).json
        assert (shown["running"], shown["last"]) == (None, ended)
        async with qc.Client(d.socket) as client, asyncio.timeout(20):
            async for event in client.events(0, vm=vm):  # whichever of its VMs one follows
                if event.kind == "cycle" and event.data["state"] == "done":
                    break
            assert event.data["id"] == ended["id"]
        await at.ended_as(d, ended, keep)


async def test_a_disk_by_two_names_is_refused(folder: Path) -> None:
    async with ground(folder, (1,)) as at, killed_daemon(folder) as d:
        ((name, _),) = at.chains
        together = f'[{{vm = "{name}", disk = "{at.chains[name, "vda"].top}"}}]'
        d.config = at.config(DISCARD).replace("together = []", f"together = {together}")
        await d.start()
        await at.connected(d)
        ended = await end_of(d, await ask(d, name))
        assert "name it once" in ended["error"]["message"]
        await at.as_before(d)


@pytest.mark.parametrize("shape", SHAPES)
async def test_one_that_is_not_exchanged_leaves_all_as_they_were(folder: Path, shape: str) -> None:
    async with ground(folder, SHAPES[shape]) as at, killed_daemon(folder) as d:
        d.config = at.config(DISCARD)
        d.environment["QMPCOMMIT_REFUSES"] = f"{list(at.vms)[-1]} blockdev-reopen"
        await d.start()
        await at.connected(d)
        ended = await end(d, at)
        assert (ended["state"], ended["error"]["type"]) == ("failed", "CommitFailed"), ended
        assert "Nothing was discarded" in ended["error"]["message"]
        await at.as_before(d)


# -- a QEMU that is lost together with the daemon --------------------------------------------------


@pytest.mark.parametrize("decided", [False, True])
async def test_a_vm_never_waits_for_one_that_is_gone(folder: Path, decided: bool) -> None:
    async with ground(folder, (1, 1)) as at, killed_daemon(folder) as d:
        lost = list(at.vms)[-1]
        d.config = at.config(DISCARD)
        place = "before blockdev-reopen" if decided else "after blockdev-snapshot"
        d.environment["QMPCOMMIT_DIE_IN"] = place
        await d.start()
        await at.connected(d)
        await begin(d, at)
        await died(d)
        vm = at.vms.pop(lost)
        chain = at.chains[lost, "vda"]
        vm.kill()
        await vm.ended()
        await d.start()
        (shown,) = (await d.get("/v1/cycles")).json
        ended = await end_of(d, (shown["running"] or shown["last"])["id"])
        error = ended["error"]
        assert (ended["state"], error["type"]) == ("failed", "VMGone"), ended
        fresh = Path(ended["disks"][1]["overlay"])
        other = at.chains.pop((lost, "vda"))
        assert other is chain
        if decided:
            assert f"boot {fresh}" in error["message"]
            assert_disk(fresh, chain.pictures[0])
        else:
            assert f"nothing was discarded: boot {chain.top}" in error["message"]
        assert_disk(chain.top, chain.pictures[-1])
        assert_disk(chain.base, chain.pictures[0])
        for path in (fresh, chain.top, chain.base):
            path.unlink(missing_ok=True)
        if decided:
            shown = {**ended, "state": "done", "result": "discarded", "disks": ended["disks"][:1]}
            await at.ended_as(d, shown, keep=False)
        else:
            await at.as_before(d)


async def test_a_guest_goes_on_although_another_of_its_disks_is_held_by_now(folder: Path) -> None:
    """By somebody who was quicker than the daemon that comes next."""
    async with ground(folder, (2,)) as at, killed_daemon(folder) as d:
        (name,) = at.vms
        d.config = at.config(DISCARD)
        d.environment["QMPCOMMIT_DIE_IN"] = "after blockdev-snapshot"
        await d.start()
        await at.connected(d)
        await begin(d, at)
        await died(d)
        async with qc.Session.connect(at.vms[name].qmp) as session:
            (await take(session, await session.disk("vdb"), "flat")).abandon()
        await d.start()
        (shown,) = (await d.get("/v1/cycles")).json
        ended = await end_of(d, (shown["running"] or shown["last"])["id"])
        assert (ended["state"], ended["error"]["type"]) == ("failed", "JobConflict"), ended
        assert "Nothing was discarded" in ended["error"]["message"]
        await at.as_before(d)


async def test_what_a_vm_refuses_after_the_decision_is_told(folder: Path) -> None:
    async with ground(folder, (1, 1)) as at, killed_daemon(folder) as d:
        last = list(at.vms)[-1]
        d.config = at.config(DISCARD)
        d.environment["QMPCOMMIT_DIE_IN"] = "before blockdev-reopen"
        await d.start()
        await at.connected(d)
        await begin(d, at)
        await died(d)
        d.environment["QMPCOMMIT_REFUSES"] = f"{last} blockdev-reopen"
        await d.start()
        (shown,) = (await d.get("/v1/cycles")).json
        ended = await end_of(d, (shown["running"] or shown["last"])["id"])
        assert ended["error"]["type"] == "CommitFailed", ended
        assert f"of vda of {last}" in ended["error"]["message"]
        await at.told_apart(d, ended)


# -- killed at every step -------------------------------------------------------------------------


async def one(d: Daemon, folder: Path, case: str, shape: Sequence[int], number: int) -> None:
    """A round, a kill at that place of it, and the end by another daemon."""
    async with ground(folder, shape, number) as at:
        d.config = at.config(KEEP if case == "keep" else DISCARD)
        d.environment["QMPCOMMIT_DIE_AT"] = str(number)
        if case == "refused":
            d.environment["QMPCOMMIT_REFUSES"] = f"{list(at.vms)[-1]} blockdev-reopen"
        await d.start()
        await at.connected(d)
        await begin(d, at)
        if number:
            await died(d)
            await d.start()
            await at.connected(d)
        ended = await end(d, at)
        if case == "refused":
            assert (ended["state"], ended["error"]["type"]) == ("failed", "CommitFailed"), ended
            # Killed between the decision and the refusal's note: each VM was completed alone.
            apart = number > 0 and len(shape) > 1 and "discarded already" in str(ended["error"])
            await (at.told_apart(d, ended) if apart else at.as_before(d))
        else:
            await at.ended_as(d, ended, case == "keep")


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["discard", "keep", "refused"])
async def test_killed_at_every_step(
    folder: Path, case: str, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another daemon ends the round: all disks the same way, or all are as they were."""
    async with killed_daemon(folder) as d:
        await one(d, folder, case, SHAPES[shape], 0)
        places = (folder / "places").read_text().splitlines()
        last = max(n for n, place in enumerate(places) if "UPDATE undertakings" in place)
        tried = chosen(last)
        for number in tried:
            try:
                await one(d, folder, case, SHAPES[shape], number)
            except BaseException:
                print(f"killed at {number}: {places[number - 1]}")
                raise
    with capsys.disabled():
        print(f" {told(last, len(tried))}", end="")
