"""Who decides for a group, and what is carried and refused with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.daemons import many_disks
from tests.ground.images import MIB, assert_disk, make_chain, two_chains
from tests.ground.machines import machine
from tests.ground.nbd import Nbd
from tests.ground.proxy import Strike, let_pass, proxy
from tests.ground.sessions import lost, runs, thaws_once

TWO = ["top", "top2"]


@asynccontextmanager
async def two_disks(folder: Path, *, layers: int = 2) -> AsyncIterator[tuple[qc.Session, Any]]:
    """A session with a daemon that has two chains; both bases and tops are read at the end."""
    chains = (
        make_chain(folder, layers),
        make_chain(folder, layers, names=("base2", "mid2", "low2", "top2")),
    )
    async with many_disks(folder / "a", *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        yield vm, chains
        assert await vm.execute("query-jobs") == []
        exports = {e["node-name"] for e in await vm.execute("query-block-exports")}
        await vm.close()
        await qemu.quit()
    for chain in chains:
        active = chain.base if chain.base.stem in exports else chain.top
        assert_disk(active, chain.pictures[-1])


async def test_a_policy_for_all_is_asked_once_when_all_are_ready(folder: Path) -> None:
    asked: list[qc.GroupReady] = []

    async def policy(ready: qc.Ready) -> qc.Keep:
        assert isinstance(ready, qc.GroupReady)
        asked.append(ready)
        jobs = await vm.execute("query-jobs")
        assert [job["status"] for job in jobs] == ["ready", "ready"]
        return qc.Keep()

    async with two_disks(folder) as (vm, _):
        outcome = await vm.commit_group(TWO, policy=policy)
        assert outcome.action == "keep"
    (ready,) = asked
    assert [member.disk for member in ready.members] == TWO
    assert ready.environment()["QMPCOMMIT_DISK"] == "top\ntop2"
    assert ready.bytes_committed == sum(member.bytes_committed for member in ready.members) > 0


async def test_each_disk_may_have_its_own(folder: Path) -> None:
    async with two_disks(folder) as (vm, chains):
        outcome = await vm.commit_group({"top": qc.Pivot(), "top2": qc.Keep()})
        assert (outcome.action, outcome.status) == ("mixed", "completed")
        assert [each.action for each in outcome.outcomes] == ["pivot", "keep"]
    assert_disk(chains[1].base, chains[1].pictures[-1])


async def test_one_that_aborts_aborts_all(folder: Path) -> None:
    async with two_disks(folder) as (vm, _):
        check = qc.Check(["false"], failed=qc.Abort())
        outcome = await vm.commit_group({"top": qc.Pivot(), "top2": check})
        assert (outcome.action, outcome.status) == ("abort", "cancelled")
        assert outcome.decided_by == "check failed"
        assert [each.action for each in outcome.outcomes] == ["abort", "abort"]
        rehearsed = await vm.commit_group(TWO, policy=qc.Abort())
        assert (rehearsed.action, rehearsed.instant) == ("abort", None)


@pytest.mark.parametrize("decision", ["pivot", "keep", "abort"])
async def test_a_hold_is_decided_by_the_caller(decision: str, folder: Path) -> None:
    async with two_disks(folder) as (vm, _):
        group = qc.GroupCommit([(vm, disk) for disk in TWO], policy=qc.Hold())
        await group.start()
        await group.ready()
        getattr(group, decision)()
        outcome = await group.wait()
        assert (outcome.action, outcome.decided_by) == (decision, "caller")
        with pytest.raises(qc.JobConflict):
            group.pivot()


async def test_a_decision_before_ready_is_refused_and_harmless(folder: Path) -> None:
    async with two_disks(folder) as (vm, _):
        members = [(vm, disk) for disk in TWO]
        group = qc.GroupCommit(members, policy=qc.Hold(0.0, qc.Keep()))
        with pytest.raises(qc.NotReady):
            group.pivot()
        outcome = await group.run()
        assert (outcome.action, outcome.decided_by) == ("keep", "hold expired")


async def test_a_policy_that_raises_cancels_all(folder: Path) -> None:
    async def broken(ready: qc.Ready) -> qc.Pivot:
        raise LookupError("no such ticket")

    async with two_disks(folder) as (vm, _):
        with pytest.raises(qc.GroupFailed, match="no such ticket") as failed:
            await vm.commit_group(TWO, policy=broken)
        assert isinstance(failed.value.__cause__, LookupError)


async def test_another_client_that_decides_for_one_of_them(folder: Path) -> None:
    """It can't be undone by us where it finalizes too, but all others are cancelled."""
    async with two_disks(folder) as (vm, _):
        group = qc.GroupCommit([(vm, disk) for disk in TWO], policy=qc.Hold())
        await group.start()
        await group.ready()
        await vm.execute("job-complete", {"id": group.jobs[0].id})
        with pytest.raises(qc.GroupFailed, match="another client decided"):
            await group.wait()


@pytest.mark.parametrize("how", ["pivots", "keeps"])
async def test_another_client_that_ends_one_of_them_too_splits_it(how: str, folder: Path) -> None:
    """Held back from us until it was final, so that nothing can be cancelled any more."""
    chains = two_chains(folder)
    async with (
        many_disks(folder / "a", *chains) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path, name="web1") as vm,
    ):
        group = qc.GroupCommit([(vm, disk) for disk in TWO], policy=qc.Hold())
        await group.start()
        await group.ready()
        between.to_client = lambda message: "hold"
        async with qc.Session.connect(qemu.qmp2) as other:
            job = {"id": group.jobs[0].id}
            with other.events("BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED") as heard:
                if how == "pivots":
                    await other.execute("job-complete", job)
                else:
                    await other.execute("block-job-cancel", {"device": job["id"]})
                await anext(heard)
                await other.execute("job-finalize", job)
                await anext(heard)
        between.to_client = let_pass
        between.release()
        with pytest.raises(qc.GroupSplit, match="another client had ended one") as split:
            await group.wait()
        error = split.value
        done = error.pivoted if how == "pivots" else error.kept
        assert (done, error.not_pivoted) == (["top of web1"], ["top2 of web1"])
        assert len([*error.pivoted, *error.kept, *error.not_kept, *error.unknown]) == 1
        assert "first failure" not in error.message
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()
    assert_disk(chains[0].base, chains[0].pictures[-1])
    for chain in chains[how == "pivots" :]:
        assert_disk(chain.top, chain.pictures[-1])


def can_be_decided(group: qc.GroupCommit) -> bool:
    try:
        group.check_ready()
    except qc.JobConflict:
        return False
    return True


async def test_a_decision_stands_while_a_monitor_is_away(folder: Path) -> None:
    chains = two_chains(folder)

    async def policy(ready: qc.Ready) -> qc.Keep:
        await between.refuse()
        await lost(vm)
        return qc.Keep()

    async with (
        many_disks(folder / "a", *chains) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path) as vm,
    ):
        group = qc.GroupCommit([(vm, disk) for disk in TWO], policy=policy)
        await group.start()
        await group.ready()
        async with asyncio.timeout(20):
            while can_be_decided(group):
                await asyncio.sleep(0.001)
        with pytest.raises(qc.JobConflict, match="decided already"):
            group.pivot()
        await between.open()
        assert (await group.wait()).action == "keep"
        await vm.close()
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])
        assert_disk(chain.top, chain.pictures[-1])


async def test_an_abort_while_it_is_sent_meets_those_too_that_come_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_disks(folder) as (vm, _):
        launch, aborted = vm.launch, asyncio.Event()

        async def slow(job: qc.CommitJob, **more: Any) -> qc.CommitJob:
            if job is group.jobs[1]:
                await aborted.wait()
                return await launch(job, **more)
            started = await launch(job, **more)
            group.abort()
            aborted.set()
            return started

        monkeypatch.setattr(vm, "launch", slow)
        group = qc.GroupCommit([(vm, disk) for disk in TWO], policy=qc.Hold())
        outcome = await group.run()
        assert (outcome.action, outcome.decided_by) == ("abort", "caller")
        assert [each.action for each in outcome.outcomes] == ["abort", "abort"]


async def test_who_runs_it_is_called_when_all_are_ready(folder: Path) -> None:
    def at_ready() -> None:
        called.append([job.phase.value for job in group.jobs])
        group.pivot()

    called: list[list[str]] = []
    async with two_disks(folder) as (vm, chains):
        group = qc.GroupCommit([(vm, disk) for disk in TWO], policy=qc.Hold(), delete=True)
        outcome = await group.run(at_ready)
        assert called == [["ready", "ready"]]
        assert [each.deleted for each in outcome.outcomes] == [[str(c.top)] for c in chains]
        assert not any(chain.top.exists() for chain in chains)


async def test_an_address_that_is_given_twice_is_connected_once(folder: Path) -> None:
    """QEMU serves one client at a time."""
    chains = two_chains(folder)
    async with many_disks(folder / "a", *chains) as qemu:
        outcome = await qc.commit_group([(qemu.qmp, disk) for disk in TWO], policy=qc.Keep())
        assert [each.vm for each in outcome.outcomes] == [qemu.qmp, qemu.qmp]
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


async def test_bitmaps_are_carried_in_the_hold(folder: Path) -> None:
    async with two_disks(folder) as (vm, _):
        for disk in TWO:
            await vm.execute("block-dirty-bitmap-add", {"node": disk, "name": "b"})
        await vm.commit_group(TWO, policy=qc.Pivot())
        nodes = {n["node-name"]: n for n in await vm.execute("query-named-block-nodes")}
        for base in ("base", "base2"):
            assert [b["name"] for b in nodes[base]["dirty-bitmaps"]] == ["b"]


async def test_a_long_chain_and_a_shallow_commit(folder: Path) -> None:
    async with two_disks(folder, layers=4) as (vm, chains):
        outcome = await vm.commit_group(TWO, policy=qc.Keep(), shallow=True)
        assert [each.base.filename for each in outcome.outcomes] == [
            str(chain.files[2]) for chain in chains
        ]


async def test_what_a_group_can_not_be(folder: Path) -> None:
    async with two_disks(folder, layers=3) as (vm, _):
        refusals: list[tuple[type[Exception], Any, dict[str, Any]]] = [
            (qc.InvalidRequest, [], {"policy": qc.Pivot()}),
            (qc.PolicyRequired, TWO, {}),
            (qc.InvalidRequest, {"top": qc.Pivot()}, {"policy": qc.Pivot()}),
            (qc.InvalidRequest, ["top", str(folder / "top.qcow2")], {"policy": qc.Pivot()}),
            (qc.InvalidRequest, ["top", "top"], {"policy": qc.Pivot()}),
            (qc.InvalidRequest, "top", {"policy": qc.Pivot()}),
            (qc.InvalidRequest, [3], {"policy": qc.Pivot()}),
            (qc.InvalidRequest, TWO, {"policy": qc.Pivot(), "top": 1}),
            (qc.InvalidRequest, TWO, {"policy": qc.Pivot(), "frobnicate": 1}),
            (qc.InvalidRequest, TWO, {"policy": qc.Pivot(), "hold_limit": -1}),
            (qc.ChainError, {"top": qc.Recycle("f"), "top2": qc.Pivot()}, {}),
            (qc.InvalidRequest, TWO, {"policy": qc.Recycle("f")}),
            (qc.InvalidRequest, TWO, {"policy": qc.Keep(), "delete": True}),
            (qc.InvalidRequest, {"top": qc.Abort(), "top2": qc.Keep()}, {"stale": "rename"}),
            (qc.InvalidRequest, TWO, {"policy": qc.Pivot(), "override": ["everything"]}),
            (qc.OnlyIfFailed, TWO, {"policy": qc.Pivot(), "only_if": ["false"]}),
            (qc.DiskNotFound, ["top", "nothing"], {"policy": qc.Pivot()}),
        ]
        for refused, disks, options in refusals:
            with pytest.raises(refused) as raised:
                await vm.commit_group(disks, **options)
            if isinstance(raised.value, qc.PolicyRequired):
                assert (raised.value.vm, raised.value.disk) == (vm.name, "top")
            assert await vm.execute("query-jobs") == []
        late: dict[str, Any] = {"only_if": ["sleep", "0.5"], "timeout": 0.05}
        with vm.events("JOB_STATUS_CHANGE") as begun:
            with pytest.raises(qc.DeadlineExceeded, match=r"within 0\.05 s, so nothing was sent"):
                await vm.commit_group(TWO, policy=qc.Pivot(), **late)
            await vm.execute("query-jobs")
        assert [event async for event in begun] == []


async def test_how_the_disks_of_a_group_can_be_named(folder: Path) -> None:
    async with two_disks(folder) as (vm, _):
        for outcome in (
            await vm.commit_group([("top", qc.Keep()), ("top2", {"kind": "keep"})]),
            await qc.commit_group({(vm, "top"): qc.Keep(), (vm, "top2"): qc.Keep()}),
            await qc.commit_group(((vm, disk) for disk in TWO), policy=qc.Keep()),
        ):
            assert [each.disk for each in outcome.outcomes] == TWO
            assert outcome.action == "keep"
        wrongs: list[Any] = [[vm], [(vm,)], [(vm, TWO)], [(None, "top")], {"top": qc.Keep()}]
        for wrong in wrongs:
            with pytest.raises(qc.InvalidRequest):
                await qc.commit_group(wrong, policy=qc.Keep())


async def test_one_that_qemu_refuses_cancels_the_others(folder: Path) -> None:
    first, second = two_chains(folder)
    extra = ["-blockdev", f"driver=file,node-name=f2,filename={second.base},read-only=on",
             "-blockdev", "driver=qcow2,node-name=base2,file=f2,read-only=on",
             "-blockdev", f"driver=qcow2,node-name=top2,file.driver=file,"
             f"file.filename={second.top},backing=base2",
             "-device", "virtio-blk-pci,drive=top2,id=vdb"]  # fmt: skip
    async with machine(folder, first, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.CommitFailed, match="read-only"):
            await vm.commit_group(["vda", "vdb"], policy=qc.Pivot(), override=["read-only-base"])
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()
    for chain in (first, second):
        assert_disk(chain.top, chain.pictures[-1])


async def test_disks_of_a_running_guest_are_recycled_together(folder: Path) -> None:
    """One pause for all, which ends when the last of the fresh overlays lies."""
    chains = two_chains(folder)
    fresh = [folder / "fresh.qcow2", folder / "fresh2.qcow2"]
    async with machine(folder, *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await vm.execute("cont")
        with vm.events("STOP", "RESUME", "BLOCK_JOB_COMPLETED") as heard:
            outcome = await vm.commit_group(
                {"vda": qc.Recycle(str(fresh[0])), "vdb": qc.Recycle(str(fresh[1]))}
            )
        assert (outcome.action, outcome.warnings) == ("recycle", [])
        names = [event.name async for event in heard]
        assert names == ["STOP", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_COMPLETED", "RESUME"]
        for each, path in zip(outcome.outcomes, fresh, strict=True):
            assert each.active is not None
            assert each.active.filename == str(path)
            assert each.guest_paused is not None
            assert each.guest_paused > 0
        assert await runs(vm)
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()
    for chain, path in zip(chains, fresh, strict=True):
        assert_disk(chain.base, chain.pictures[-1])
        assert_disk(path, chain.pictures[-1])


@pytest.mark.parametrize("daemon", [False, True])
async def test_a_guest_that_does_not_run_is_not_let_go(daemon: bool, folder: Path) -> None:
    chains = two_chains(folder)
    fresh = [folder / "fresh.qcow2", folder / "fresh2.qcow2"]
    there = many_disks(folder / "a", *chains, exports=False) if daemon else machine(folder, *chains)
    disks = TWO if daemon else ["vda", "vdb"]
    async with there as qemu, qc.Session.connect(qemu.qmp) as vm:
        with vm.events("STOP", "RESUME") as heard:
            outcome = await vm.commit_group(
                {disk: qc.Recycle(str(path)) for disk, path in zip(disks, fresh, strict=True)}
            )
        assert [event async for event in heard] == []
        assert outcome.action == "recycle"
        assert not any("paused" in warning for warning in outcome.warnings)
        assert [each.guest_paused for each in outcome.outcomes] == [None, None]
        await vm.close()
        await qemu.quit()
    for path, chain in zip(fresh, chains, strict=True):
        assert_disk(path, chain.pictures[-1])


async def test_a_guest_that_does_not_go_on_at_once_is_let_go_on_again(folder: Path) -> None:
    chain = make_chain(folder)
    fresh = folder / "fresh.qcow2"
    async with (
        machine(folder, chain, running=True) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path, name="web1") as vm,
    ):
        between.to_qemu = refused = Strike("cont", "refuse", times=2)
        outcome = await vm.commit_group({"vda": qc.Recycle(str(fresh))})
        assert refused.met == 2
        assert not any("paused" in warning for warning in outcome.warnings)
        assert await runs(qemu)
        await vm.close()
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])


async def test_a_guest_that_can_not_be_let_go_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thaws_once(monkeypatch)
    chain = make_chain(folder)
    fresh = folder / "fresh.qcow2"
    async with (
        machine(folder, chain, running=True) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path, name="web1") as vm,
    ):
        between.to_qemu = Strike("cont", "refuse")
        outcome = await vm.commit_group({"vda": qc.Recycle(str(fresh))})
        assert outcome.action == "recycle"
        warning, *_ = outcome.warnings  # what the checks found comes after it
        assert "guest of web1 may be paused still" in warning
        assert "refused by the proxy" in warning
        assert not await runs(qemu)
        await vm.close()
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])


class Notes:
    """A ledger that remembers when the guest ran."""

    def __init__(self, vm: qc.Session, fails: str = "") -> None:
        self.steps: list[tuple[str, bool]] = []
        self._vm, self._fails = vm, fails

    async def note(self, step: str, state: Any = None, **facts: Any) -> None:
        running = await runs(self._vm)
        self.steps.append((step, running))
        if step == self._fails:
            raise OSError("the journal is full")

    def moved(self, state: Any) -> None:
        pass


@pytest.mark.parametrize("fails", ["", "stop", "cont"])
async def test_the_pause_of_recycles_is_noted_for_each_around_it(folder: Path, fails: str) -> None:
    chains = two_chains(folder)
    async with machine(folder, *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await vm.execute("cont")
        notes = [Notes(vm), Notes(vm, fails)]
        group = qc.GroupCommit(
            (vm, disk, qc.Recycle(str(folder / f"fresh-{disk}")), {"ledger": ledger})
            for disk, ledger in zip(["vda", "vdb"], notes, strict=True)
        )
        if fails == "stop":
            with pytest.raises(qc.GroupFailed, match="journal is full"):
                await group.run()
        else:
            assert (await group.run()).action == "recycle"
            for ledger in notes:
                steps = [step for step, _ in ledger.steps]
                assert steps.index("stop") < steps.index("freeze") < steps.index("thaw")
                assert steps.index("thaw") < steps.index("cont")
                assert ("stop", True) in ledger.steps
                assert ("cont", True) in ledger.steps
        assert await runs(vm)
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()
    for number, chain in enumerate(chains):
        fresh = folder / f"fresh-vd{'ab'[number]}"
        assert_disk(chain.top if fails == "stop" else fresh, chain.pictures[-1])


async def test_a_guest_goes_on_after_a_group_of_recycles_that_failed(folder: Path) -> None:
    chains = two_chains(folder)
    async with machine(folder, *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await vm.execute("cont")

        async def full(jobs: Any) -> None:
            raise OSError("the journal is full")

        with pytest.raises(qc.GroupFailed, match="journal is full"):
            await vm.commit_group(
                {"vda": qc.Recycle(str(folder / "f1")), "vdb": qc.Recycle(str(folder / "f2"))},
                on_decision=full,
            )
        assert await runs(vm)
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_deadline_cancels_all(folder: Path) -> None:
    chains = two_chains(folder, bulk=33 * MIB)
    async with many_disks(folder / "a", *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.DeadlineExceeded, match="cancelled"):
            await vm.commit_group(TWO, policy=qc.Pivot(), bandwidth=MIB, timeout=0.5)
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_write_waits_for_the_end_of_the_hold(folder: Path) -> None:
    """What is written while all are held is in no base, and is on the disk afterwards."""
    chains = two_chains(folder)
    written: list[asyncio.Task[None]] = []
    async with many_disks(folder / "a", *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        nbd = await Nbd.connect(qemu.nbd, "top")

        async def write(jobs: Any) -> None:
            written.append(asyncio.create_task(nbd.write(9 * MIB, b"late" * 128)))
            await vm.execute("query-jobs")
            assert not written[0].done()

        await vm.commit_group(TWO, policy=qc.Keep(), on_decision=write)
        await written[0]
        await nbd.flush()
        await nbd.close()
        await vm.close()
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])
    chains[0].pictures[-1].write(9 * MIB, b"late" * 128)
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])
