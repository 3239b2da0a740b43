"""Convergence around a scripted monitor: whatever fails, the guest gets back what it had."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

import qmpcommit as qc
from qmpcommit.block.throttle import (
    DEVICE_NAMES,
    NO_LIMITS,
    DeviceThrottle,
    Throttle,
    noted_limits,
    put_back,
    put_back_by,
)
from qmpcommit.commit import converge as module
from qmpcommit.commit.converge import ConvergeReport, converge, query_job, set_bandwidth
from qmpcommit.commit.facts import Choice
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.pace import MIB, Advice, Converge, Pace, Sample
from qmpcommit.commit.phases import Order, Phase, State
from qmpcommit.commit.resuming import paused_goes_on
from qmpcommit.commit.vm import VM
from qmpcommit.errors import CommandRefused, DeadlineExceeded, MonitorLost, VMGone
from qmpcommit.qmp.monitor import Monitor

FORMER = {name: NO_LIMITS[limit] for name, limit in DEVICE_NAMES.items()}
LOST = MonitorLost("the monitor was lost")
SILENT = DeadlineExceeded("QEMU did not answer")
GONE = VMGone("QEMU has ended")


def refused(desc: str, error_class: str = "GenericError") -> CommandRefused:
    return CommandRefused(f"QEMU refused it: {desc}", error_class=error_class, desc=desc)


class Vm(Monitor):
    """A monitor with one disk and one guest; what is in `fails` comes instead of a reply.

    In `lost` are errors that come although the command was run.
    """

    def __init__(self) -> None:
        super().__init__("/nowhere", name="web1")
        self.peer_pid = 7
        self.up = True
        self.same: bool | None = True
        self.drops = 0
        self.guest: str | None = "running"
        self.limits: dict[str, Any] = dict(FORMER)
        self.objects: dict[str, Any] = {}
        self.marks: list[str] = []
        self.job: dict[str, Any] | None = {
            "id": "j", "status": "running", "current-progress": 0, "total-progress": 100 * MIB,
        }  # fmt: skip
        self.fails: dict[str, list[Exception]] = {}
        self.lost: dict[str, list[Exception]] = {}
        self.when: dict[str, Callable[[], object]] = {}
        self.said: Counter[str] = Counter()
        self._told = asyncio.Condition()

    @property
    def connected(self) -> bool:
        return self.up

    async def restore(self, was: int | None = None) -> bool | None:
        self.up = True
        return self.same

    def drop(self) -> None:
        self.drops += 1
        self.up = False

    async def execute(self, command: str, arguments: Any = None, **more: object) -> Any:
        await asyncio.sleep(0)
        self.said[command] += 1
        try:
            if self.fails.get(command):
                raise self.fails[command].pop(0)
            reply = getattr(self, f"_{command.replace('-', '_')}")(arguments)
            if command in self.when:
                self.when[command]()
            if self.lost.get(command):
                raise self.lost[command].pop(0)
            return reply
        finally:
            async with self._told:
                self._told.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what is true after a command."""
        async with asyncio.timeout(10), self._told:
            await self._told.wait_for(condition)

    @property
    def held(self) -> int:
        """Bytes per second that the guest may write; 0: as many as it likes."""
        return int(self.limits["bps_wr"])

    def _query_jobs(self, _: Any) -> Any:
        return [{"id": "another"}, *([self.job] if self.job else [])]

    def _query_block(self, _: Any) -> Any:
        return [{"device": "", "qdev": "vda", "inserted": {"node-name": "top", **self.limits}}]

    def _query_named_block_nodes(self, _: Any) -> Any:
        marks = [{"node-name": name, "drv": "null-co", "file": "null-co://"} for name in self.marks]
        return [{"node-name": "top", "drv": "qcow2", "file": "/i/top"}, *marks]

    def _blockdev_add(self, arguments: Any) -> Any:
        self.marks.append(arguments["node-name"])

    def _blockdev_del(self, arguments: Any) -> Any:
        self.marks.remove(arguments["node-name"])

    def _query_block_exports(self, _: Any) -> Any:
        return []

    def _x_debug_query_block_graph(self, _: Any) -> Any:
        raise refused("not found", "CommandNotFound")

    def _block_set_io_throttle(self, arguments: Any) -> Any:
        group = arguments.get("group")
        self.limits = {name: arguments[name] for name in FORMER}
        if group:
            self.limits["group"] = group
        if self.limits == {**FORMER, **({"group": group} if group else {})}:
            self.limits = dict(FORMER)  # a device without limits is in no group

    def _qom_list(self, _: Any) -> Any:
        return [{"name": name, "type": "child<throttle-group>"} for name in self.objects]

    def _qom_get(self, arguments: Any) -> Any:
        name = arguments["path"].removeprefix("/objects/")
        if name not in self.objects:
            raise refused(f"Path '{arguments['path']}' was not found")
        return self.objects[name]["limits"]

    def _object_add(self, arguments: Any) -> Any:
        if arguments["id"] in self.objects:
            raise refused("attempt to add duplicate property")
        self.objects[arguments["id"]] = arguments

    def _object_del(self, arguments: Any) -> Any:
        if self.objects.pop(arguments["id"], None) is None:
            raise refused("object not found")

    def _query_status(self, _: Any) -> Any:
        if self.guest is None:
            raise refused("not found", "CommandNotFound")
        return {"running": self.guest == "running", "status": self.guest}

    def _stop(self, _: Any) -> Any:
        self.guest = "paused"

    def _cont(self, _: Any) -> Any:
        self.guest = "running"


class Job:
    """What `converge` sees of a commit."""

    def __init__(self, *, qdev: str = "vda") -> None:
        self.id = "j"
        self.plan = SimpleNamespace(arguments={}, disk=qc.Disk("vda", qdev=qdev))
        self.state = State(two_phase=True, phase=Phase.COPYING)
        self.done = False
        self._changed = asyncio.Event()
        self._round = asyncio.Semaphore(0)

    @property
    def phase(self) -> Phase:
        return self.state.phase

    def become(self, phase: Phase, decision: Choice | None = None) -> None:
        self.state = self.state._replace(phase=phase, order=Order(decision))
        self._changed.set()

    def end(self) -> None:
        self.become(Phase.ENDED, self.state.order.decision)

    async def rounds(self, count: int) -> None:
        """Wait until it was watched so many times more."""
        async with asyncio.timeout(10):
            while not self._round.locked():
                await self._round.acquire()
            for _ in range(count + 1):
                await self._round.acquire()

    async def _until(self, condition: Callable[[], bool]) -> None:
        self._round.release()
        while not self.done and not condition():
            self._changed.clear()
            await self._changed.wait()


class Adviser:
    """Says what a `Controller` could, in this order, the last for ever; `begun` counts them."""

    def __init__(self, *limits: int | None, alone: float = 99.0) -> None:
        self.advice: list[Advice] = []
        before: int | None = None
        for limit in limits:
            slower = limit is not None and (before is None or limit < before)
            do: Any = "nothing" if limit == before else "throttle" if slower else "relax"
            self.advice.append(Advice(do, limit, Pace.NOT_CONVERGING, 99.0, alone))
            before = limit
        self.advice.append(Advice("nothing", before, Pace.NOT_CONVERGING, 99.0, alone))
        self.begun = 0
        self.forgot = 0
        self.fed: list[tuple[int, int | None]] = []

    def feed(self, sample: Sample, limit: int | None) -> Advice:
        self.fed.append((sample.remaining, limit))
        return self.advice.pop(0) if len(self.advice) > 1 else self.advice[0]

    def forget(self) -> None:
        self.forgot += 1


class Notes:
    """A ledger."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        self.steps.append(step)

    def moved(self, state: State) -> None:
        pass


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch) -> Vm:
    monkeypatch.setattr(module, "LINGER", 0.0)
    return Vm()


@pytest.fixture
def advise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Adviser]:
    def give(*limits: int | None, alone: float = 99.0) -> Adviser:
        adviser = Adviser(*limits, alone=alone)

        def begin(*_: Any, **__: Any) -> Adviser:
            adviser.begun += 1
            return adviser

        monkeypatch.setattr(module, "Controller", begin)
        return adviser

    return give


def watch(
    vm: Vm,
    job: Job,
    *,
    pause: float = 0.0,
    every: float = 0.001,
    until: Any = "over",
    note: Any = None,
    ledger: Any = None,
) -> asyncio.Task[ConvergeReport]:
    config = Converge(5, every=every, pause=pause)
    work = converge(cast("CommitJob", job), vm, config, until=until, note=note, ledger=ledger)
    return asyncio.create_task(work)


async def over(watching: asyncio.Task[ConvergeReport]) -> ConvergeReport:
    async with asyncio.timeout(10):
        return await watching


# -- limits --------------------------------------------------------------------------------------


async def test_a_guest_is_let_go_when_the_storage_is_stuck(vm: Vm, advise: Any) -> None:
    adviser = advise(MIB, None)
    job, ledger = Job(), Notes()
    watching = watch(vm, job, ledger=ledger)
    await vm.until(lambda: vm.said["block_set_io_throttle"] == 2)
    assert vm.limits == FORMER
    await vm.until(lambda: len(adviser.fed) == 3)
    assert [limit for _, limit in adviser.fed] == [None, MIB, None]
    job.end()
    report = await over(watching)
    assert [limit for _, limit in report.steps] == [MIB, None]
    assert (report.restored, report.remark) == (True, "")
    assert ledger.steps == ["throttle", "unthrottle"]


async def test_a_guest_is_let_go_when_nobody_decides_and_held_again_for_the_flush(
    vm: Vm, advise: Any
) -> None:
    adviser = advise(MIB)
    job = Job()
    watching = watch(vm, job)
    await vm.until(lambda: vm.held == MIB)
    job.become(Phase.READY)
    await vm.until(lambda: vm.held == 0)
    assert adviser.begun == 1
    adviser.advice.insert(0, Advice("throttle", 2 * MIB, Pace.SLOW, 99.0, 99.0))
    job.become(Phase.DECIDED, Choice.PIVOT)
    await vm.until(lambda: vm.held == 2 * MIB)
    assert adviser.begun == 2, "the flush is judged by itself"
    job.end()
    report = await over(watching)
    assert [limit for _, limit in report.steps] == [MIB, None, 2 * MIB]
    assert (report.verdict, report.restored, vm.limits) == ("ended", True, FORMER)


async def test_a_guest_stays_held_while_a_decision_may_come_at_once(
    vm: Vm, advise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINGER", 1000.0)
    advise(MIB)
    job = Job()
    watching = watch(vm, job)
    await vm.until(lambda: vm.held == MIB)
    job.become(Phase.READY)
    await job.rounds(3)
    assert vm.held == MIB
    job.end()
    assert (await over(watching)).restored


async def test_where_nothing_can_hold_the_guest_that_is_told_once(vm: Vm, advise: Any) -> None:
    advise(MIB, 2 * MIB, MIB)
    job, told = Job(qdev=""), list[ConvergeReport]()
    watching = watch(vm, job, note=told.append)
    await job.rounds(4)
    job.end()
    report = await over(watching)
    assert report.remark.startswith("nothing can hold back the writes to vda")
    assert (vm.said["block_set_io_throttle"], report.steps, report.restored) == (0, (), True)
    assert vm.said["query-named-block-nodes"] == 1
    assert told == [report]


async def test_a_monitor_lost_while_the_guest_is_let_go_fails_nothing(vm: Vm, advise: Any) -> None:
    advise(MIB)
    job = Job()
    watching = watch(vm, job)
    await vm.until(lambda: vm.held == MIB)
    vm.fails["query-block"] = [LOST]
    job.become(Phase.READY)
    await vm.until(lambda: vm.held == 0)
    job.end()
    report = await over(watching)
    assert (report.restored, report.remark) == (True, "")


async def test_a_limit_whose_reply_was_lost_is_lifted_when_nobody_decides(
    vm: Vm, advise: Any
) -> None:
    advise(MIB)
    vm.lost["block_set_io_throttle"] = [LOST]
    job = Job()
    watching = watch(vm, job)
    await vm.until(lambda: vm.held == MIB)
    job.become(Phase.READY)
    await vm.until(lambda: vm.held == 0)
    job.end()
    assert (await over(watching)).restored


async def test_limits_that_somebody_else_sets_are_theirs_for_good(vm: Vm, advise: Any) -> None:
    advise(MIB, None, MIB, None)
    theirs = {**FORMER, "bps_wr": 77}
    job, ledger = Job(), Notes()
    watching = watch(vm, job, ledger=ledger)
    await vm.until(lambda: vm.held == MIB)
    vm.limits = dict(theirs)
    asked = vm.said["query-jobs"]
    await vm.until(lambda: vm.said["query-jobs"] == asked + 9)
    job.end()
    report = await over(watching)
    assert vm.limits == theirs
    assert report.remark.count("somebody else has changed the limits") == 1
    assert not report.restored, "or nobody would be told of it"
    assert report.repair is not None
    assert ledger.steps == ["throttle"]


async def test_limits_that_qemu_takes_and_does_not_have_are_told(vm: Vm, advise: Any) -> None:
    job, watching = await held(vm, advise)
    vm.when["block_set_io_throttle"] = lambda: vm.limits.update(iops=5)
    job.become(Phase.READY)
    await job.rounds(2)
    job.end()
    report = await over(watching)
    assert "QEMU took the former limits, and shows others" in report.remark
    assert not report.restored


async def test_the_former_limits_are_noted_in_qemu_while_others_are_set(
    vm: Vm, advise: Any
) -> None:
    vm.lost["object-add"] = [LOST]
    vm.limits = {**FORMER, "bps": 9 * MIB, "bps_max": 10 * MIB, "group": "theirs: all"}
    former = dict(vm.limits)
    vm.when["block_set_io_throttle"] = lambda: noted.append(len(vm.objects))
    noted = list[int]()
    job = Job()
    advise(None, MIB, 2 * MIB)
    watching = watch(vm, job)
    await vm.until(lambda: vm.held == 2 * MIB)
    job.end()
    assert (await over(watching)).restored
    assert (vm.limits, vm.objects) == (former, {})
    assert set(noted) == {1}


async def held_by_the_dead(vm: Vm) -> Throttle:
    """The writes are held back by a process that will never put the former limits back."""
    throttle = DeviceThrottle(vm, qc.Disk("vda", qdev="vda"))
    await throttle.limit(2 * MIB)
    assert vm.held == 2 * MIB
    return throttle


@pytest.mark.parametrize("by", ["note", "repair", "the next that holds them"])
@pytest.mark.parametrize("group", ["", "theirs: all", "ä"])
@pytest.mark.parametrize("limits", [{"bps_wr": 9 * MIB, "iops": 7}, {"bps": 9 * MIB}])
async def test_the_limits_before_a_death_come_back(
    by: str, group: str, limits: dict[str, int], vm: Vm
) -> None:
    vm.limits = {**FORMER, **limits, **({"group": group} if group else {})}
    former = dict(vm.limits)
    repair = (await held_by_the_dead(vm)).repair()
    assert repair is not None
    if by == "note":
        (noted,) = await noted_limits(vm)
        assert await put_back(vm, noted) == "the limits that it had before are back"
    elif by == "repair":
        assert await put_back_by(vm, repair)
        assert not await put_back_by(vm, repair)
    else:
        throttle = DeviceThrottle(vm, qc.Disk("disk0", qdev="vda"))
        await throttle.read()
        assert await throttle.restore() == ""
    assert (vm.limits, vm.objects) == (former, {})


async def test_limits_that_somebody_sets_after_a_death_stay(vm: Vm) -> None:
    await held_by_the_dead(vm)
    vm.limits = theirs = {**FORMER, "bps_wr": 77}
    (noted,) = await noted_limits(vm)
    assert "somebody else has changed the limits" in await put_back(vm, noted)
    assert (vm.limits, vm.objects) == (theirs, {})


async def test_limits_of_a_disk_that_is_gone_are_forgotten(vm: Vm) -> None:
    await held_by_the_dead(vm)
    (noted,) = await noted_limits(vm)
    vm.fails["query-block"] = [refused("gone", "DeviceNotFound")]
    assert "is gone" in await put_back(vm, noted)
    assert vm.objects == {}


async def test_limits_that_qemu_does_not_take_stay_noted(vm: Vm) -> None:
    await held_by_the_dead(vm)
    vm.when["block_set_io_throttle"] = lambda: vm.limits.update(iops=5)
    (noted,) = await noted_limits(vm)
    with pytest.raises(qc.CommitFailed, match="shows others"):
        await put_back(vm, noted)
    assert vm.objects


# -- looks that fail -------------------------------------------------------------------------------


async def test_what_goes_wrong_at_a_look_is_told_and_the_next_look_comes(
    vm: Vm, advise: Any
) -> None:
    adviser = advise()
    vm.fails["query-jobs"] = [refused("no such thing"), LOST, SILENT, refused("no such thing")]
    job = Job()
    vm.job = {"id": "j", "status": "running"}
    watching = watch(vm, job)
    await vm.until(lambda: vm.said["query-jobs"] == 5)
    assert adviser.fed == []
    vm.job = {**vm.job, "current-progress": 40, "total-progress": 50}
    await vm.until(lambda: bool(adviser.fed))
    assert (adviser.forgot, adviser.fed[0]) == (5, (10, None))
    job.end()
    report = await over(watching)
    refusal, nonsense = report.remark.split("; ", 1)
    assert refusal == "QEMU refused it: no such thing"
    assert "what web1 answered to query-jobs is not what QEMU's schema says" in nonsense
    assert (report.remaining_first, report.remaining_last) == (10, 10)


async def test_while_the_monitor_is_away_nothing_is_asked(vm: Vm, advise: Any) -> None:
    adviser = advise()
    vm.up = False
    job = Job()
    watching = watch(vm, job)
    await job.rounds(3)
    assert (adviser.forgot >= 3, +vm.said) == (True, Counter())
    vm.up = True
    await vm.until(lambda: bool(adviser.fed))
    job.end()
    assert (await over(watching)).remark == ""


@pytest.mark.parametrize("status", [None, "paused", "created"])
async def test_a_job_that_does_not_run_is_not_judged(
    status: str | None, vm: Vm, advise: Any
) -> None:
    adviser = advise(MIB)
    vm.job = {**(vm.job or {}), "status": status} if status else None
    job = Job()
    watching = watch(vm, job)
    await vm.until(lambda: vm.said["query-jobs"] == 2)
    job.end()
    assert (await over(watching)).remark == ""
    assert (adviser.fed, adviser.forgot, vm.limits) == ([], 2, FORMER)


async def test_the_end_of_qemu_is_the_end(vm: Vm, advise: Any) -> None:
    advise()
    vm.fails["query-jobs"] = [GONE]
    report = await over(watch(vm, Job()))
    assert (report.remark, report.restored) == ("QEMU has ended", True)
    assert report.verdict == "converging"


# -- the pause -------------------------------------------------------------------------------------


def decided() -> Job:
    job = Job()
    job.become(Phase.DECIDED, Choice.PIVOT)
    return job


async def test_the_guest_is_paused_for_the_flush_and_goes_on(vm: Vm, advise: Any) -> None:
    advise(alone=0.1)
    job, ledger = decided(), Notes()
    watching = watch(vm, job, pause=9, ledger=ledger)
    vm.when["stop"] = lambda: marked.append(len(vm.marks))
    marked = list[int]()
    await vm.until(lambda: vm.guest == "paused")
    job.end()
    report = await over(watching)
    assert vm.guest == "running"
    assert (report.paused is not None, report.remark) == (True, "")
    assert ledger.steps == ["stop", "cont"]
    assert (marked, vm.marks) == ([1], [])


async def test_a_guest_whose_pause_outlived_its_process_goes_on(vm: Vm, advise: Any) -> None:
    advise(alone=0.1)
    job = decided()
    watching = watch(vm, job, pause=9)
    await vm.until(lambda: vm.guest == "paused")
    left = list(vm.marks)
    job.end()
    await over(watching)
    vm.guest, vm.marks = "paused", left
    await paused_goes_on(cast("VM", vm), qc.Disk("disk0", qdev="vda"))
    assert (vm.guest, vm.marks) == ("running", [])


async def test_a_pause_is_as_long_as_it_may_be_and_there_is_but_one(vm: Vm, advise: Any) -> None:
    adviser = advise(alone=0.001)
    job = decided()
    watching = watch(vm, job, pause=0.01)
    await vm.until(lambda: vm.said["cont"] == 1)
    fed = len(adviser.fed)
    await vm.until(lambda: len(adviser.fed) == fed + 3)
    assert vm.said["stop"] == 1
    job.end()
    report = await over(watching)
    assert report.remark == "the last flush did not end in the 0.01 s of the guest's pause"


@pytest.mark.parametrize("guest", ["paused", None])
async def test_a_guest_that_does_not_run_is_not_paused(
    guest: str | None, vm: Vm, advise: Any
) -> None:
    advise(alone=0.1)
    vm.guest = guest
    job = decided()
    watching = watch(vm, job, pause=9)
    await vm.until(lambda: vm.said["query-status"] == 2)
    job.end()
    report = await over(watching)
    assert (vm.said["stop"], vm.said["cont"], report.paused) == (0, 0, 0.0)
    assert (vm.guest, report.remark) == (guest, "")


async def test_a_job_that_ends_while_it_is_looked_at_pauses_nobody(vm: Vm, advise: Any) -> None:
    advise(alone=0.1)
    job = decided()
    vm.when["query-jobs"] = job.end
    report = await over(watch(vm, job, pause=9))
    assert (vm.said["stop"], report.verdict) == (0, "ended")


async def test_a_guest_that_somebody_let_go_on_is_not_continued(vm: Vm, advise: Any) -> None:
    advise(alone=0.1)
    job = decided()
    watching = watch(vm, job, pause=9)
    await vm.until(lambda: vm.guest == "paused")
    vm.guest = "running"
    job.end()
    assert (await over(watching)).paused is not None
    assert vm.said["cont"] == 0


@pytest.mark.parametrize("error", [LOST, SILENT])
async def test_a_guest_whose_pause_was_not_confirmed_goes_on_at_once(
    error: Exception, vm: Vm, advise: Any
) -> None:
    advise(alone=0.1)
    vm.lost["stop"] = [error]
    job = decided()
    watching = watch(vm, job, pause=9, every=1000)
    await vm.until(lambda: vm.said["cont"] == 1)
    assert (vm.guest, job.phase) == ("running", Phase.DECIDED)
    job.end()
    report = await over(watching)
    assert (report.paused is not None, report.remark) == (True, "")


async def test_a_guest_that_could_not_be_continued_is_at_the_next_look(vm: Vm, advise: Any) -> None:
    advise(alone=0.1)
    vm.fails["cont"] = [LOST, SILENT]
    job = decided()
    watching = watch(vm, job, pause=0.1)
    await vm.until(lambda: vm.said["cont"] == 3)
    assert (vm.guest, job.phase) == ("running", Phase.DECIDED)
    job.end()
    assert (await over(watching)).paused is not None


# -- the end ---------------------------------------------------------------------------------------


async def held(vm: Vm, advise: Any, until: Any = "over") -> tuple[Job, asyncio.Task[Any]]:
    advise(MIB)
    job = Job()
    watching = watch(vm, job, until=until)
    await vm.until(lambda: vm.held == MIB)
    return job, watching


@pytest.mark.parametrize("error", [LOST, SILENT])
async def test_the_limits_are_put_back_past_losses_of_the_monitor(
    error: Exception, vm: Vm, advise: Any
) -> None:
    job, watching = await held(vm, advise)
    vm.fails["query-block"] = [error, error]
    job.end()
    report = await over(watching)
    assert (report.restored, report.remark, vm.limits) == (True, "", FORMER)
    assert vm.drops == (2 if error is SILENT else 0), "who does not answer is hung up on"


@pytest.mark.parametrize(("error", "tries"), [(LOST, 3), (refused("no"), 1), (GONE, 1)])
async def test_limits_that_can_not_be_put_back_are_told_with_their_repair(
    error: Any, tries: int, vm: Vm, advise: Any
) -> None:
    job, watching = await held(vm, advise)
    asked = vm.said["query-block"]
    vm.fails["query-block"] = [error] * 9
    job.end()
    report = await over(watching)
    assert (report.restored, report.remark) == (False, error.message)
    assert vm.said["query-block"] - asked == tries
    assert report.repair is not None
    assert report.repair["execute"] == "block_set_io_throttle"
    assert report.repair["arguments"]["bps_wr"] == 0


@pytest.mark.parametrize("how", ["at once", "later"])
async def test_another_qemu_at_the_monitor_keeps_its_limits(how: str, vm: Vm, advise: Any) -> None:
    job, watching = await held(vm, advise)
    if how == "later":
        vm.peer_pid = 8
    else:
        vm.up, vm.same = False, False
    said = vm.said["block_set_io_throttle"]
    job.end()
    report = await over(watching)
    assert not report.restored
    assert "another QEMU answers" in report.remark
    assert vm.said["block_set_io_throttle"] == said


@pytest.mark.parametrize(
    ("until", "phase", "verdict"),
    [
        ("ready", Phase.READY, "ready"),
        ("ready", Phase.ENDED, "ended"),
        ("over", Phase.ENDED, "ended"),
    ],
)
async def test_the_verdict_tells_how_far_it_came(
    until: str, phase: Phase, verdict: str, vm: Vm, advise: Any
) -> None:
    job, watching = await held(vm, advise, until)
    job.become(phase)
    report = await over(watching)
    assert (report.verdict, report.ready_after is not None) == (verdict, phase is Phase.READY)
    assert (report.restored, vm.limits) == (True, FORMER)


async def test_a_job_that_was_ready_and_ends_as_the_guest_is_let_go_was_ready(
    vm: Vm, advise: Any
) -> None:
    job, watching = await held(vm, advise, "ready")
    vm.when["query-block"] = job.end
    job.become(Phase.READY)
    assert (await over(watching)).verdict == "ready"
    assert job.phase is Phase.ENDED


async def test_the_bandwidth_of_a_job_that_qemu_refuses_is_its_refusal(vm: Vm) -> None:
    vm.fails["block-job-set-speed"] = [refused("busy"), refused("gone", "DeviceNotActive")]
    with pytest.raises(CommandRefused, match="busy"):
        await set_bandwidth(vm, "j", MIB)
    with pytest.raises(qc.JobNotFound, match="bandwidth was not changed"):
        await set_bandwidth(vm, "j", MIB)
    assert await query_job(vm, "nobody") is None
