"""Groups whose guests are quiesced for the instant: before a disk is held, and let go always.

"pause" on QEMUs whose guests run; "agent" with agents that answer as ``qemu-ga`` does (real ones
are in ``tests/guest``).
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.daemon.journal import Journal, Statement
from tests.cli.command import run
from tests.daemon.daemons import Daemon
from tests.daemon.kill_sweep import killable, places_of
from tests.daemon.test_api import assert_problem
from tests.daemon.test_group_recycles import Guest, guests, known, status_of
from tests.daemon.test_groups import end_of
from tests.ground.images import assert_disk
from tests.ground.places import chosen, told
from tests.real.test_agent import FakeAgent, fake_agent

KINDS = ("pause", "agent")
FROZEN = {"pause": "after stop", "agent": "after guest-fsfreeze-freeze"}
THAWS = {"pause": "before cont", "agent": "before guest-fsfreeze-thaw"}
ORDERS = ("before job-cancel", "before job-finalize", "before job-complete")


@dataclass
class Hosted:
    """Guests with their agents, their daemon, and how a group over all of their disks is asked."""

    d: Daemon
    vms: list[Guest]
    freeze: str
    action: str
    agents: dict[str, FakeAgent] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        members = [member for guest in self.vms for member in guest.members]
        if self.action != "recycle":
            policy = {"kind": self.action}
            members = [{**member, "policy": policy} for member in members]
        asked: dict[str, Any] = {"members": members, "freeze": self.freeze}
        if self.freeze == "agent":
            asked["agents"] = {name: agent.path for name, agent in self.agents.items()}
        return asked

    async def ask(self, key: str = "k", **more: Any) -> str:
        answer = await self.d.post("/v1/groups", {**self.body, **more}, Idempotency_Key=key)
        assert answer.status == 202, answer.body
        return str(answer.json["id"])

    async def starts(self, **environment: str) -> None:
        """The daemon, which knows these VMs from before."""
        self.d.environment = {"QMPCOMMIT_PLACES": self.d.environment["QMPCOMMIT_PLACES"],
                              "QMPCOMMIT_DIE_AT": "0", **environment}  # fmt: skip
        await self.d.start()

    async def begins(self, **environment: str) -> None:
        await self.starts(**environment)
        await known(self.d, self.vms)

    async def dies(self) -> None:
        assert self.d.process is not None
        async with asyncio.timeout(60):
            await self.d.process.wait()

    async def frozen(self, guest: Guest) -> bool:
        if self.freeze == "agent" and self.agents[guest.name].frozen:
            return True
        return await status_of(guest) == "paused"

    async def goes_on(self, guest: Guest) -> None:
        """Wait until it does."""
        async with asyncio.timeout(20):
            while await self.frozen(guest):
                await asyncio.sleep(0.01)

    async def nothing_is_left(self) -> None:
        """All guests go on, no job is there, and nothing in QEMU tells of a freeze."""
        for guest in self.vms:
            assert not await self.frozen(guest), guest.name
            assert await guest.execute("query-jobs") == []
            nodes = await guest.execute("query-named-block-nodes", flat=True)
            assert [n["node-name"] for n in nodes if n["drv"] == "null-co"] == []

    async def ends_as(self, action: str) -> None:
        """The disks hold what they have to, byte for byte, after all QEMUs have ended."""
        await self.nothing_is_left()
        for guest in self.vms:
            if action == "recycle":
                await guest.recycled()
            await guest.quit()
            for chain, fresh in zip(guest.chains, guest.fresh, strict=True):
                active = {"recycle": fresh, "pivot": chain.base}.get(action, chain.top)
                assert_disk(active, chain.pictures[-1])
                if action not in ("none", "abort"):
                    assert_disk(chain.base, chain.pictures[-1])


@asynccontextmanager
async def hosted(
    folder: Path, freeze: str, action: str, *disks: int, names: str = "vm", d: Daemon | None = None
) -> AsyncIterator[Hosted]:
    """So many guests with so many disks each; the daemon, which can be killed, is not started."""
    made = killable(folder) if d is None else d
    made.environment.setdefault("QMPCOMMIT_DIE_AT", "0")
    async with AsyncExitStack() as stack:
        vms = await stack.enter_async_context(guests(folder, *disks, names=names))
        at = Hosted(made, vms, freeze, action)
        for guest in vms:
            agent = await stack.enter_async_context(fake_agent(guest.vm.folder))
            at.agents[guest.name] = agent
        try:
            yield at
        except BaseException:
            if (folder / "daemon.log").exists():
                print(made.log[-8000:])
            raise
        finally:
            if d is None and made.process is not None:
                await made.kill()


@pytest.mark.parametrize("action", ["pivot", "keep", "recycle"])
@pytest.mark.parametrize("freeze", KINDS)
async def test_guests_stand_still_for_the_instant(folder: Path, freeze: str, action: str) -> None:
    async with hosted(folder, freeze, action, 2, 1) as at:
        await at.begins()
        ended = await end_of(at.d, await at.ask())
        assert ended["state"] == "done", ended
        outcome = ended["outcome"]
        assert (outcome["action"], outcome["warnings"]) == (action, [])
        stood = [each["quiesced"] for each in outcome["outcomes"]]
        assert all(0 < seconds < 10 for seconds in stood), stood
        assert stood[0] == stood[1], "it is one guest's"
        assert outcome["quiesced"] == max(stood)
        places = (folder / "places").read_text().splitlines()
        last = max(n for n, place in enumerate(places) if place == FROZEN[freeze])
        assert last < places.index("before job-complete" if action != "keep" else
                                   "before block-job-cancel")  # fmt: skip
        assert places.count(FROZEN[freeze]) == 2
        if freeze == "agent":
            for agent in at.agents.values():
                assert agent.asked.count("guest-fsfreeze-freeze") == 1
        paused = freeze == "pause" or action == "recycle"
        assert [guest.pauses for guest in at.vms] == [1 if paused else 0] * 2
        metrics = (await at.d.get("/metrics")).body.decode()
        assert "qmpcommit_guest_quiesced_seconds_count 2.0" in metrics
        await at.ends_as(action)


@pytest.mark.parametrize("freeze", KINDS)
async def test_one_guest_that_cannot_be_quiesced_lets_all_go_on(folder: Path, freeze: str) -> None:
    async with hosted(folder, freeze, "pivot", 1, 1) as at:
        refuses = {"QMPCOMMIT_REFUSES": "vm1 stop"} if freeze == "pause" else {}
        await at.begins(**refuses)
        said = b'{"error": {"class": "GenericError", "desc": "it will not"}}\n'
        if freeze == "agent":
            at.agents["vm1"].instead["guest-fsfreeze-freeze"] = [said]
        ended = await end_of(at.d, await at.ask())
        error = ended["error"]
        assert (ended["state"], error["type"]) == ("failed", "GroupFailed"), ended
        assert (error["vm"], "of vm1: its guest could not be quiesced" in error["message"]) == (
            "vm1",
            True,
        ), error
        assert ("stop refused" if freeze == "pause" else "it will not") in error["message"]
        places = (folder / "places").read_text().splitlines()
        assert "before job-complete" not in places
        await at.ends_as("none")


async def test_what_is_wrong_is_refused(folder: Path) -> None:
    async with hosted(folder, "agent", "pivot", 1, 1) as at:
        await at.begins()
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"agents": {"vm0": "/a"}}, "agents has no socket for vm1"),
            ({"agents": {}, "agent": "/a"}, "agent is for one VM"),
            ({"freeze": "ice"}, "freeze"),
        ]
        for asked, words in wrong:
            refused = assert_problem(
                await at.d.post("/v1/groups", {**at.body, **asked}), 422, "InvalidRequest"
            )
            assert words in refused["detail"]
        assert (await at.d.get("/v1/groups")).json == []
        (one, _) = at.body["members"]
        alone = {"members": [one], "freeze": "agent", "agent": at.agents["vm0"].path}
        answer = await at.d.post("/v1/groups", alone)
        assert answer.status == 202, answer.body
        assert (await end_of(at.d, answer.json["id"]))["outcome"]["quiesced"] > 0
        assert at.agents["vm0"].asked.count("guest-fsfreeze-freeze") == 1
        assert at.agents["vm1"].asked == []


async def test_the_client_freezes_too(folder: Path) -> None:
    async with hosted(folder, "agent", "keep", 1, 1) as at:
        await at.begins()
        async with qc.Client(at.d.socket) as client:
            group = await client.commit_group(
                [("vm0", "vda"), (client.vm("vm1"), "vda")],
                policy=qc.Keep(),
                freeze="agent",
                agents={client.vm("vm0"): at.agents["vm0"].path, "vm1": at.agents["vm1"].path},
            )
            outcome = await group.wait()
            assert outcome.quiesced is not None
            assert [agent.asked.count("guest-fsfreeze-freeze") for agent in at.agents.values()] == [
                1,
                1,
            ]
            with pytest.raises(qc.InvalidRequest, match="agents has no socket for vm1"):
                await client.commit_group(
                    [("vm0", "vda"), ("vm1", "vda")], policy=qc.Keep(), freeze="agent",
                    agents={"vm0": "/a"},
                )  # fmt: skip
        await at.ends_as("keep")


async def test_the_command_freezes_too(folder: Path) -> None:
    async with hosted(folder, "agent", "keep", 1, 1) as at:
        await at.begins()
        words = [f"--daemon={at.d.socket}", "commit", "vm0", "vda", "--and", "vm1", "vda"]
        words += ["--keep-overlay", "--json", "--freeze", "agent"]
        one = await run(*words, "--agent", at.agents["vm0"].path)
        assert one.status == 2
        assert "Give --agent 2 times for --freeze agent" in one.error["message"]
        sockets = [word for agent in at.agents.values() for word in ("--agent", agent.path)]
        said = await run(*words, *sockets)
        assert (said.status, said.json["action"]) == (0, "keep"), said
        assert said.json["quiesced"] > 0
        frozen = [agent.asked.count("guest-fsfreeze-freeze") for agent in at.agents.values()]
        assert frozen == [1, 1]
        await at.ends_as("keep")


# -- a daemon that ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["frozen", "held"])
@pytest.mark.parametrize("action", ["pivot", "recycle"])
@pytest.mark.parametrize("freeze", KINDS)
async def test_killed_while_frozen_it_lets_go_first(
    folder: Path, freeze: str, action: str, place: str
) -> None:
    """Before anything else is resolved on that VM, and whatever the other VM does."""
    async with hosted(folder, freeze, action, 1, 1) as at:
        first, second = at.vms
        await at.begins(
            QMPCOMMIT_DIE_IN=FROZEN[freeze] if place == "frozen" else "before job-finalize"
        )
        with suppress(OSError, http.client.HTTPException):
            await at.ask()
        await at.dies()
        assert await at.frozen(first) or await at.frozen(second)
        (folder / "places").unlink()
        second.vm.stop()
        await at.starts(QMPCOMMIT_RECOVERS="1")
        await at.goes_on(first)
        second.vm.cont()
        (group,) = (await at.d.get("/v1/groups")).json
        ended = await end_of(at.d, group["id"])
        assert ended["outcome"]["action"] == action, ended
        assert ended["outcome"]["warnings"] == []
        assert all(each["quiesced"] > 0 for each in ended["outcome"]["outcomes"])
        places = (folder / "places").read_text().splitlines()
        if not (place == "held" and action == "recycle"):
            orders = [places.index(order) for order in ORDERS if order in places]
            assert places.index(THAWS[freeze]) < min(orders), places
        elif freeze == "agent":  # over its fresh overlay it can answer, and not before
            assert places.index("after cont") < places.index(THAWS[freeze]), places
        await at.ends_as(action)


async def test_a_guest_that_the_version_before_has_quiesced_goes_on(folder: Path) -> None:
    """What it noted of a frozen guest has names."""
    async with hosted(folder, "agent", "pivot", 1, 1) as at:
        await at.begins(QMPCOMMIT_DIE_IN="before job-finalize")
        group = await at.ask()
        await at.dies()
        journal = await Journal(folder / "state" / "journal.db").open()
        ((text,),) = [row.values() for row in await journal.read("SELECT noted FROM undertakings")]
        noted = json.loads(text)
        assert noted["frozen"].keys() == {"vm0", "vm1"}
        names = ("how", "agent", "identity", "since")
        noted["frozen"] = {
            vm: {**dict(zip(names, facts, strict=True)), "step": "freeze"}
            for vm, facts in noted["frozen"].items()
        }
        sql = "UPDATE undertakings SET noted = ? WHERE id = ?"
        await journal.write(Statement(sql, (json.dumps(noted), group)))
        await journal.close()
        await at.starts()
        ended = await end_of(at.d, group)
        assert ended["outcome"]["action"] == "pivot", ended
        assert all(each["quiesced"] > 0 for each in ended["outcome"]["outcomes"])
        await at.ends_as("pivot")


@pytest.mark.parametrize("freeze", KINDS)
async def test_a_qemu_that_is_gone_needs_no_thaw(folder: Path, freeze: str) -> None:
    async with hosted(folder, freeze, "pivot", 1, 1) as at:
        first, second = at.vms
        await at.begins(QMPCOMMIT_DIE_IN="before job-finalize")
        group = await at.ask()
        await at.dies()
        second.vm.kill()
        await second.vm.ended()
        agent = at.agents[second.name]
        agent.asked.clear()
        await at.starts()
        await at.goes_on(first)
        ended = await end_of(at.d, group)
        assert (ended["state"], ended["error"]["type"]) == ("failed", "GroupSplit"), ended
        assert "problems" not in ended["error"]
        assert "guest-fsfreeze-thaw" not in agent.asked
        at.vms.remove(second)
        await second.leave()
        agent.frozen = 0
        await at.ends_as("pivot")
        assert_disk(second.chains[0].top, second.chains[0].pictures[-1])


async def test_an_agent_that_does_not_answer_at_the_start_is_asked_again(folder: Path) -> None:
    async with hosted(folder, "agent", "pivot", 1, 1) as at:
        await at.begins(QMPCOMMIT_DIE_IN="before job-finalize")
        group = await at.ask()
        await at.dies()
        agent = at.agents["vm1"]
        agent.instead["guest-fsfreeze-thaw"] = [None]
        await at.starts()
        ended = await end_of(at.d, group)
        assert agent.instead["guest-fsfreeze-thaw"] == []
        assert ended["outcome"]["action"] == "pivot", ended
        await at.ends_as("pivot")


@pytest.mark.parametrize("freeze", KINDS)
async def test_a_daemon_that_stops_leaves_no_guest_frozen(folder: Path, freeze: str) -> None:
    async with hosted(folder, freeze, "pivot", 1, 1) as at:
        slow = {"QMPCOMMIT_SLOW": "vm1 stop"} if freeze == "pause" else {}
        await at.begins(**slow)
        if freeze == "agent":
            at.agents["vm1"].instead["guest-fsfreeze-freeze"] = [b""]
        group = await at.ask()
        async with asyncio.timeout(30):
            while not await at.frozen(at.vms[0]):
                await asyncio.sleep(0.01)
        assert await at.d.stop() == 0
        assert not await at.frozen(at.vms[0])
        assert not await at.frozen(at.vms[1])
        await at.starts()
        ended = await end_of(at.d, group)
        assert ended["outcome"]["action"] == "pivot", ended
        await at.ends_as("pivot")


async def test_a_daemon_that_stops_tells_that_it_waits_for_an_agent(folder: Path) -> None:
    async with hosted(folder, "agent", "pivot", 1, 1) as at:
        await at.begins()
        agent = at.agents["vm1"]
        agent.instead["guest-fsfreeze-freeze"] = [b""]
        agent.instead["guest-fsfreeze-thaw"] = [None] * 100
        group = await at.ask()
        async with asyncio.timeout(30):
            while not await at.frozen(at.vms[0]):
                await asyncio.sleep(0.01)
        assert at.d.process is not None
        at.d.process.terminate()
        async with asyncio.timeout(30):
            while '"stopping_after_thaw"' not in at.d.log:
                await asyncio.sleep(0.01)
        assert at.d.process.returncode is None
        agent.instead["guest-fsfreeze-thaw"].clear()
        await at.dies()
        assert at.d.process.returncode == 0
        assert not await at.frozen(at.vms[0])
        await at.starts()
        ended = await end_of(at.d, group)
        assert ended["outcome"]["action"] == "pivot", ended
        await at.ends_as("pivot")


# -- killed at every step --------------------------------------------------------------------------


async def one_killed(
    d: Daemon, folder: Path, freeze: str, action: str, number: int, place: str
) -> None:
    """A group, a kill somewhere in it, another daemon, and the end of all."""
    place_of = folder / f"{number}"
    place_of.mkdir()
    async with hosted(place_of, freeze, action, 1, 1, names=f"vm{number}-", d=d) as at:
        await d.kill() if d.process is not None else None
        await at.begins(QMPCOMMIT_DIE_AT=str(number))
        group = None
        with suppress(OSError, http.client.HTTPException):
            group = await at.ask(f"key{number}")
        if number:
            await at.dies()
            await at.starts()
            for guest in at.vms:
                await d.connected(guest.name)
            group = group or await at.ask(f"key{number}")
        assert group is not None
        ended = await end_of(d, group)
        assert ended["state"] == "done", (place, ended)
        assert ended["outcome"]["action"] == action, (place, ended)
        await at.ends_as(action)
        for guest in at.vms:
            await d.request("DELETE", f"/v1/vms/{guest.name}")


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("action", ["pivot", "recycle"])
@pytest.mark.parametrize("freeze", KINDS)
async def test_killed_at_every_step(
    folder: Path, freeze: str, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    d = killable(folder)
    try:
        await one_killed(d, folder, freeze, action, 0, "")
        places = places_of(folder)
        assert {FROZEN[freeze], THAWS[freeze]} <= set(places)
        tried = chosen(len(places))
        for number in tried:
            place = places[number - 1]
            try:
                await one_killed(d, folder, freeze, action, number, place)
            except BaseException:
                print(f"killed at {number}: {place}\n{d.log[-8000:]}")
                raise
    finally:
        if d.process is not None:
            await d.kill()
    with capsys.disabled():
        print(f" {freeze}: {told(len(places), len(tried))}", end="")
