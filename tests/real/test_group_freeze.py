"""Group commits and cycles whose guests stand still for the instant; each ends with the disks."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.group import run as group_run
from qmpcommit.guest import marks as freeze_marks
from qmpcommit.guest.hold import quiesced
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine, storage_daemon
from tests.ground.proxy import Strike, let_pass
from tests.ground.sessions import runs, thaws_once, time_to_go_too_far
from tests.real.test_agent import FakeAgent, fake_agent
from tests.real.test_window_group import LIMIT, Two, two

DECIDING = ("job-complete", "block-job-cancel")
STEPS = ("stop", "job-finalize", "blockdev-snapshot", "cont", *DECIDING)


def steps_of(here: Two) -> list[tuple[int, str]]:
    """From now on what is sent of it to both VMs, and what is done, in this order."""
    said: list[tuple[int, str]] = []
    asked: dict[tuple[int, Any], str] = {}

    def heard(number: int, message: dict[str, Any]) -> str:
        if message.get("execute") in STEPS:
            asked[number, message["id"]] = message["execute"]
            said.append((number, message["execute"]))
        elif step := asked.get((number, message.get("id"))):
            said.append((number, f"{step} done"))
        return "pass"

    for number, each in enumerate(here.between):
        each.to_qemu = each.to_client = partial(heard, number)
    return said


def hear(said: list[tuple[int, str]], number: int, command: str) -> None:
    """What an agent was asked for."""
    said.append((number, command))


async def unmarked(vm: qc.Session) -> bool:
    return await freeze_marks.marks(vm) == []


# -- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep()], ids=lambda p: p.kind)
async def test_all_guests_stand_still_from_ready_until_their_own_disks_have_ended(
    folder: Path, policy: Any
) -> None:
    async with two(folder) as here, asyncio.timeout(LIMIT):
        said = steps_of(here)
        late = here.between[1]
        passing = late.to_client

        def slow(message: dict[str, Any]) -> str:
            before = len(said)
            passing(message)
            return "hold" if said[before:] == [(1, "stop done")] else "pass"

        late.to_client = slow
        marks: list[list[str]] = []

        async def held(jobs: Any) -> None:
            marks.append([m.owner for vm in here.vms for m in await freeze_marks.marks(vm)])
            assert not any([await runs(qemu) for qemu in here.qemus])

        group = qc.GroupCommit(here.disks, policy=policy, freeze="pause", on_decision=held)
        going = asyncio.create_task(group.run())
        await late.held.wait()
        await time_to_go_too_far(here.vms[0])
        assert group.state.stage == "freezing"
        late.to_client = passing
        late.release()
        outcome = await going
        places = {step: number for number, step in enumerate(said)}
        decide = "job-complete" if policy.kind == "pivot" else "block-job-cancel"
        for number in (0, 1):
            for other in (0, 1):
                assert places[number, "stop done"] < places[other, decide]
            assert places[number, "job-finalize"] < places[number, "cont"]
        assert marks == [[f"g{group.id}"] * 2]
        for vm, qemu in zip(here.vms, here.qemus, strict=True):
            assert await runs(qemu)
            assert await unmarked(vm)
        stood = [each.quiesced for each in outcome.outcomes]
        assert all(stood)
        assert outcome.quiesced == max(each or 0 for each in stood)
        for qemu, chain in zip(here.qemus, here.chains, strict=True):
            await qemu.quit()
            assert_disk(chain.base, chain.pictures[-1])
            assert_disk(chain.top, chain.pictures[-1])


async def test_a_guest_that_its_owner_has_paused_stays_so_and_a_daemon_has_none(
    folder: Path,
) -> None:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    chains = make_chain(folder / "a"), make_chain(folder / "b")
    async with (
        machine(folder / "a", chains[0], style="implicit") as qemu,
        storage_daemon(folder / "b", chains[1]) as daemon,
        qc.Session.connect(qemu.qmp) as vm,
        qc.Session.connect(daemon.qmp) as other,
    ):
        members = [(vm, "vda"), (other, "top")]
        outcome = await qc.commit_group(members, policy=qc.Pivot(), freeze="pause")
        assert (outcome.action, outcome.quiesced) == ("pivot", None)
        assert not await runs(qemu)
        assert await unmarked(vm)
        assert await unmarked(other)
        for each in (vm, other):
            await each.close()
        await qemu.quit()
        await daemon.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("running", [True, False])
async def test_what_is_recycled_goes_on_only_when_its_overlay_lies(
    folder: Path, running: bool
) -> None:
    async with two(folder) as here, asyncio.timeout(LIMIT):
        if not running:
            await here.qemus[0].execute("stop")
        said = steps_of(here)
        fresh = folder / "one" / "fresh.qcow2"
        members = [(here.vms[0], "vda", qc.Recycle(str(fresh))), (here.vms[1], "vda", qc.Keep())]
        outcome = await qc.commit_group(members, freeze="pause")
        first, second = outcome.outcomes
        assert (first.action, second.action) == ("recycle", "keep")
        assert [await runs(qemu) for qemu in here.qemus] == [running, True]
        assert first.quiesced == first.guest_paused
        assert (first.quiesced is not None) is running
        assert second.quiesced
        places = {step: number for number, step in enumerate(said)}
        if running:
            assert [step for step in said if step[1] in ("stop", "cont") and not step[0]] == [
                (0, "stop"),
                (0, "cont"),
            ], "once, for both reasons"
            assert places[0, "stop done"] < places[1, "block-job-cancel"]
            assert places[0, "blockdev-snapshot done"] < places[0, "cont"]
        assert places[1, "stop done"] < places[0, "job-complete"]
        for vm in here.vms:
            assert await unmarked(vm)
        for qemu in here.qemus:
            await qemu.quit()
        for chain in here.chains:
            assert_disk(chain.base, chain.pictures[-1])
        assert_disk(fresh, here.chains[0].pictures[-1])


# -- what goes wrong ----------------------------------------------------------------------------


async def none_pivoted(here: Two) -> None:
    """All guests run on the overlays that they had, and nothing is left."""
    for vm in here.vms:
        assert await unmarked(vm)
    await here.untouched(0, 1)


async def test_one_guest_that_can_not_be_paused_has_nothing_committed(folder: Path) -> None:
    async with two(folder) as here, asyncio.timeout(LIMIT):
        said = steps_of(here)
        here.between[1].to_qemu = Strike("stop", "refuse", times=1)
        with pytest.raises(qc.GroupFailed, match=r"vda of two: its guest could not be") as caught:
            await qc.commit_group(here.disks, policy=qc.Pivot(), freeze="pause")
        assert "refused by the proxy" in caught.value.message
        assert caught.value.vm == "two"
        assert not [step for step in said if step[1] in ("job-complete", "job-finalize")]
        await none_pivoted(here)


async def test_a_freeze_over_its_limit_is_let_go_and_nothing_is_committed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_run, "LIMIT", 0.3)
    async with two(folder) as here, asyncio.timeout(LIMIT):
        late = here.between[1]
        late.to_qemu = Strike("stop", "hold")
        group = qc.GroupCommit(here.disks, policy=qc.Pivot(), freeze="pause")
        going = asyncio.create_task(group.run())
        await late.held.wait()
        while group.state.stage != "cancelling":
            await asyncio.sleep(0)
        late.to_qemu = let_pass
        late.release()
        with pytest.raises(qc.GroupFailed, match="vda of two: its guest could not be") as failed:
            await going
        assert failed.value.quiesced
        await none_pivoted(here)


async def test_a_freeze_that_reaches_its_limit_after_the_decision_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_run, "LIMIT", 0.5)
    async with two(folder) as here, asyncio.timeout(LIMIT):

        async def slow(jobs: Any) -> None:
            while not all([await runs(qemu) for qemu in here.qemus]):
                await asyncio.sleep(0.01)

        outcome = await qc.commit_group(
            here.disks, policy=qc.Pivot(), freeze="pause", on_decision=slow
        )
        assert outcome.action == "pivot"
        first, second = sorted(w for w in outcome.warnings if "show the one instant" in w)
        assert first.startswith("one: its guest stood still for 0.5 s")
        assert second.startswith("two: ")
        for qemu, chain in zip(here.qemus, here.chains, strict=True):
            await qemu.quit()
            assert_disk(chain.base, chain.pictures[-1])


async def test_a_qemu_that_takes_no_mark_is_recycled_all_the_same(folder: Path) -> None:
    deleted: list[str] = []

    def no_null(message: dict[str, Any]) -> str:
        arguments = message.get("arguments", {})
        if message.get("execute") == "blockdev-del":
            deleted.append(arguments["node-name"])
        return "refuse" if arguments.get("driver") == "null-co" else "pass"

    async with two(folder) as here, asyncio.timeout(LIMIT):
        for each in here.between:
            each.to_qemu = no_null
        vms = [vm for vm, _ in here.disks]
        files = [folder / f"fresh{number}.qcow2" for number in range(2)]
        members = [(vm, "vda", qc.Recycle(str(file)))
                   for vm, file in zip(vms, files, strict=True)]  # fmt: skip
        outcome = await qc.commit_group(members, freeze="pause")
        assert outcome.action == "recycle"
        assert deleted  # the stale overlays, and not what somebody else may have marked
        assert not [name for name in deleted if name.endswith("-paused")]
        for vm in vms:
            assert (await vm.query_status()).running
        for qemu in here.qemus:
            await qemu.quit()
    for chain, file in zip(here.chains, files, strict=True):
        assert_disk(chain.base, chain.pictures[-1])
        assert_disk(file, chain.pictures[-1])


@pytest.mark.parametrize("step", ["stop done", "job-complete"])
async def test_a_monitor_that_is_lost_while_they_stand_still(folder: Path, step: str) -> None:
    async with two(folder) as here, asyncio.timeout(LIMIT):
        said = steps_of(here)
        broken = here.between[1]
        passing, cut = broken.to_qemu, [False]

        def fate(message: dict[str, Any]) -> str:
            passing(message)
            if not cut[0] and said and said[-1] == (1, step):
                cut[0] = True
                return "cut"
            return "pass"

        broken.to_qemu = broken.to_client = fate
        with pytest.raises(qc.GroupFailed, match="two"):
            await qc.commit_group(here.disks, policy=qc.Pivot(), freeze="pause")
        assert cut == [True]
        broken.to_qemu = broken.to_client = let_pass
        await none_pivoted(here)


async def test_a_qemu_that_dies_while_they_stand_still_lets_the_other_go_on(folder: Path) -> None:
    async with two(folder) as here, asyncio.timeout(LIMIT):
        async with here.dying(1, "stop"):
            with pytest.raises(qc.GroupFailed):
                await qc.commit_group(here.disks, policy=qc.Pivot(), freeze="pause")
        assert await unmarked(here.vms[0])
        await here.untouched(0)
    assert_disk(here.chains[1].top, here.chains[1].pictures[-1])


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"freeze": "hard"}, "not 'hard'"),
        ({"freeze": "agent"}, "no socket for one, two"),
    ],
)
async def test_what_has_no_meaning_is_refused_before_anything_is_sent(
    folder: Path, more: dict[str, Any], match: str
) -> None:
    async with two(folder) as here:
        for between in here.between:
            between.sent.clear()
        with pytest.raises(qc.InvalidRequest, match=match):
            await qc.commit_group(here.disks, policy=qc.Pivot(), **more)
        with pytest.raises(qc.InvalidRequest, match=match):
            await qc.cycle(here.disks, keep_if=["true"], guest="reset", **more)
        vm = here.vms[0]
        with pytest.raises(qc.InvalidRequest, match=match.replace(", two", "")):
            await vm.commit_group(["vda"], policy=qc.Pivot(), **more)
        with pytest.raises(qc.InvalidRequest, match=match.replace(", two", "")):
            await vm.cycle("vda", keep_if=["true"], guest="reset", **more)
        assert [between.sent for between in here.between] == [[], []]
        await none_pivoted(here)


# -- an agent that does what no real one can be made to do -----------------------------------------


async def agents_of(here: Two, folder: Path, stack: AsyncExitStack) -> list[FakeAgent]:
    return [await stack.enter_async_context(fake_agent(folder / name)) for name in ("one", "two")]


@pytest.mark.parametrize("how", ["refuses", "hangs up", "says nothing"])
async def test_one_agent_that_does_not_freeze_has_nothing_committed(
    folder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_run, "LIMIT", 1.0)
    async with two(folder) as here, AsyncExitStack() as stack, asyncio.timeout(LIMIT):
        said = steps_of(here)
        first, second = await agents_of(here, folder, stack)
        answers: dict[str, bytes | None] = {
            "refuses": b'{"error": {"class": "GenericError", "desc": "not today"}}\n',
            "hangs up": None,
            "says nothing": b"",
        }
        second.instead["guest-fsfreeze-freeze"] = [answers[how]]
        agents = {vm: fake.path for vm, fake in zip(here.vms, (first, second), strict=True)}
        with pytest.raises(qc.GroupFailed, match=r"vda of two: its guest could not") as caught:
            await qc.commit_group(here.disks, policy=qc.Pivot(), freeze="agent", agents=agents)
        if how != "says nothing":  # else the first's limit comes about when its own does
            assert isinstance(caught.value.__cause__, qc.QuiesceFailed)
        if how == "refuses":
            assert "not today" in caught.value.message
        assert (first.frozen, second.frozen) == (0, 0)
        assert not [step for step in said if step[1] in ("job-complete", "job-finalize")]
        await none_pivoted(here)


async def test_a_recycled_guest_is_frozen_before_its_pause_and_thawed_when_it_goes_on(
    folder: Path,
) -> None:
    async with two(folder) as here, AsyncExitStack() as stack, asyncio.timeout(LIMIT):
        said = steps_of(here)
        fakes = await agents_of(here, folder, stack)
        for number, fake in enumerate(fakes):
            fake.heard = partial(hear, said, number)
        agents = {vm: fake.path for vm, fake in zip(here.vms, fakes, strict=True)}
        fresh = folder / "one" / "fresh.qcow2"
        members = [(here.vms[0], "vda", qc.Recycle(str(fresh))), (here.vms[1], "vda", qc.Keep())]
        paused = here.between[0]
        passing = paused.to_qemu

        def late(message: dict[str, Any]) -> str:
            passing(message)
            return "hold" if message.get("execute") == "cont" else "pass"

        paused.to_qemu = late
        going = asyncio.create_task(qc.commit_group(members, freeze="agent", agents=agents))
        await paused.held.wait()
        await time_to_go_too_far(here.vms[1])
        assert (0, "guest-fsfreeze-thaw") not in said, "no guest answers that is paused"
        paused.to_qemu = passing
        paused.release()
        first, second = (await going).outcomes
        assert first.quiesced
        assert first.guest_paused
        assert first.quiesced > first.guest_paused
        assert second.quiesced
        assert second.guest_paused is None
        places = {step: number for number, step in enumerate(said)}
        for number in (0, 1):
            assert places[number, "guest-fsfreeze-freeze"] < places[0, "stop"]
        assert places[0, "blockdev-snapshot done"] < places[0, "cont"]
        assert places[0, "cont done"] < places[0, "guest-fsfreeze-thaw"]
        assert [await runs(qemu) for qemu in here.qemus] == [True, True]
        for vm, qemu in zip(here.vms, here.qemus, strict=True):
            assert await unmarked(vm)
            await qemu.quit()
        for chain in here.chains:
            assert_disk(chain.base, chain.pictures[-1])
        assert_disk(fresh, here.chains[0].pictures[-1])


async def test_an_agent_thaws_although_the_monitor_is_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_run, "LIMIT", 600.0)  # which is not what lets it go on
    async with two(folder) as here, AsyncExitStack() as stack, asyncio.timeout(LIMIT):
        fakes = await agents_of(here, folder, stack)
        agents = {vm: fake.path for vm, fake in zip(here.vms, fakes, strict=True)}
        away = here.between[1]
        ends: list[asyncio.Task[None]] = []

        def lose(message: dict[str, Any]) -> str:
            if message.get("execute") == "job-complete":
                assert fakes[1].frozen
                ends.append(asyncio.create_task(away.refuse()))
                return "drop"
            return "pass"

        away.to_qemu = lose
        group = qc.GroupCommit(here.disks, policy=qc.Pivot(), freeze="agent", agents=agents)
        going = asyncio.create_task(group.run())
        while not ends or any(fake.frozen for fake in fakes):
            await asyncio.sleep(0.01)
        assert not going.done()
        await ends[0]
        away.to_qemu = let_pass
        await away.open()
        with pytest.raises(qc.GroupFailed, match="monitor was lost"):
            await going
        await none_pivoted(here)


async def test_a_freeze_that_is_cancelled_and_can_not_be_thawed_stays_marked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thaws_once(monkeypatch)
    async with two(folder) as here, AsyncExitStack() as stack, asyncio.timeout(LIMIT):
        (fake, _), vm = await agents_of(here, folder, stack), here.vms[0]
        refusal = b'{"error": {"class": "GenericError", "desc": "not today"}}\n'
        fake.instead["guest-fsfreeze-freeze"] = [b""]
        fake.instead["guest-fsfreeze-thaw"] = [refusal] * 9
        freezing = asyncio.Event()

        def heard(command: str) -> None:
            if command == "guest-fsfreeze-freeze":
                freezing.set()

        fake.heard = heard
        going = asyncio.create_task(
            vm.commit_group(["vda"], policy=qc.Keep(), freeze="agent", agents=fake.path)
        )
        await freezing.wait()
        going.cancel()
        await asyncio.wait({going})
        assert going.cancelled()
        (mark,) = await freeze_marks.marks(vm)
        fake.instead.clear()
        assert await freeze_marks.thaw_marked(vm, fake.path, owner=mark.owner) == []
        await none_pivoted(here)


async def test_a_guest_that_can_not_be_thawed_is_named_and_stays_marked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thaws_once(monkeypatch)
    async with two(folder) as here, AsyncExitStack() as stack, asyncio.timeout(LIMIT):
        first, second = await agents_of(here, folder, stack)
        refusal = b'{"error": {"class": "GenericError", "desc": "not today"}}\n'
        second.instead["guest-fsfreeze-thaw"] = [refusal] * 9
        agents = {vm: fake.path for vm, fake in zip(here.vms, (first, second), strict=True)}
        outcome = await qc.commit_group(here.disks, policy=qc.Keep(), freeze="agent", agents=agents)
        assert outcome.action == "keep"
        assert any("may still be frozen" in said for said in outcome.warnings)
        assert (first.frozen, second.instead["guest-fsfreeze-thaw"][:1]) == (0, [refusal])
        (mark,) = await freeze_marks.marks(here.vms[1])
        assert (mark.owner, mark.how) == (f"g{outcome.group}", "agent")
        second.instead.clear()
        second.frozen = 2  # what such an agent has not done
        monkeypatch.setattr(freeze_marks, "GRACE", 0.0)
        again = await qc.commit_group(here.disks, policy=qc.Keep(), freeze="agent", agents=agents)
        assert (again.warnings, second.frozen) == ([], 0)
        await none_pivoted(here)


async def test_a_freeze_of_somebody_alive_is_waited_for_and_not_thawed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(folder) as here, AsyncExitStack() as stack, asyncio.timeout(LIMIT):
        fakes = await agents_of(here, folder, stack)
        vm, (fake, _) = here.vms[0], fakes
        async with quiesced(vm, "agent", agent=fake.path, owner="g01234567"):
            asked = len(fake.asked)
            going = asyncio.create_task(
                vm.commit_group(["vda"], policy=qc.Keep(), freeze="agent", agents=fake.path)
            )
            looks = here.between[0].sent
            before = looks.count("query-named-block-nodes")
            while looks.count("query-named-block-nodes") < before + 3:
                await asyncio.sleep(0.01)
            assert len(fake.asked) == asked, "it is left alone"
        assert (await going).action == "keep"
        monkeypatch.setattr(freeze_marks, "GRACE", 0.0)
        await freeze_marks.set_mark(vm, "g01234567", "agent")
        with pytest.raises(qc.QuiesceFailed, match="--agent SOCKET"):
            await freeze_marks.thaw_abandoned(vm)
        await freeze_marks.unmark(vm, "g01234567", "agent")
        await none_pivoted(here)
