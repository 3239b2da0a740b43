"""What the program hands in fails in every way: nothing is held, paused or left in READY by it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.images import Chain, assert_disk, two_chains
from tests.ground.machines import Machine, machine
from tests.ground.sessions import runs

Callback = Callable[..., Awaitable[Any]]


async def cancelled(*arguments: Any, **named: Any) -> None:
    """It awaits a task of the program's that is cancelled."""
    task = asyncio.ensure_future(asyncio.Event().wait())
    asyncio.get_running_loop().call_soon(task.cancel)
    await task


async def exits(*arguments: Any, **named: Any) -> None:
    """As ``sys.exit`` does."""
    raise SystemExit(3)


async def interrupted(*arguments: Any, **named: Any) -> None:
    """As a Ctrl-C that comes just then."""
    raise KeyboardInterrupt


async def raises(*arguments: Any, **named: Any) -> None:
    """An error of the program's."""
    raise LookupError("no such row")


async def hangs(*arguments: Any, **named: Any) -> None:
    """It never ends."""
    await asyncio.Event().wait()


async def hangs_on(*arguments: Any, **named: Any) -> None:
    """It never ends, and heeds no cancellation, until the test is over."""
    while not _OVER:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)


_OVER: list[bool] = []

FAILURES: dict[Callback, type[BaseException]] = {
    cancelled: asyncio.CancelledError,
    exits: SystemExit,
    interrupted: KeyboardInterrupt,
    raises: LookupError,
}
WAYS = [*FAILURES, hangs, hangs_on]


def cause_of(way: Callback) -> type[BaseException]:
    """What the error's cause has to be."""
    return FAILURES.get(way, TimeoutError)


@asynccontextmanager
async def guests(folder: Path, *, many: int = 2) -> AsyncIterator[tuple[qc.Session, list[Chain]]]:
    """A running guest with disks; in the end it runs, without jobs, and all its disks are read."""
    chains = [*two_chains(folder)][:many]
    _OVER.clear()
    async with machine(folder, *chains, running=True) as qemu, qc.Session.connect(qemu.qmp) as vm:
        try:
            yield vm, chains
        finally:
            _OVER.append(True)
        assert await vm.execute("query-jobs") == []
        assert await runs(vm)
        active = await active_files(qemu)
        await vm.close()
        await qemu.quit()
    for chain, file in zip(chains, active, strict=True):
        assert_disk(file, chain.pictures[-1])


async def active_files(qemu: Machine) -> list[Path]:
    """What the guest's disks write to."""
    return [Path(each["inserted"]["file"]) for each in await qemu.execute("query-block")]


# -- a policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", FAILURES)
async def test_a_policy_that_fails_aborts(way: Callback, folder: Path) -> None:
    async with guests(folder, many=1) as (vm, (chain,)):
        job = await vm.commit("vda", policy=way)
        with pytest.raises(qc.CommitFailed, match=r"the policy of .* failed") as failed:
            await job.wait()
        assert isinstance(failed.value.__cause__, cause_of(way))
        assert (await vm.disk("vda")).chain[0].filename == str(chain.top)


@pytest.mark.parametrize("way", [hangs, hangs_on])
async def test_a_policy_that_hangs_is_bounded_by_the_timeout(way: Callback, folder: Path) -> None:
    async with guests(folder, many=1) as (vm, (chain,)):
        job = await vm.commit("vda", policy=way, timeout=3)
        await job.ready()
        with pytest.raises(qc.DeadlineExceeded, match="did not end within 3 s"):
            await job.wait()
        assert (await vm.disk("vda")).chain[0].filename == str(chain.top)


@pytest.mark.parametrize("way", FAILURES)
async def test_a_policy_of_a_group_that_fails_cancels_all(way: Callback, folder: Path) -> None:
    async with guests(folder) as (vm, chains):
        with pytest.raises(qc.GroupFailed, match="the policy failed") as failed:
            await vm.commit_group(["vda", "vdb"], policy=way)
        assert isinstance(failed.value.__cause__, cause_of(way))
        assert [disk.chain[0].filename for disk in await vm.disks()] == [str(c.top) for c in chains]


# -- what is thrown in from outside ----------------------------------------------------------------


class TimeIsUp(BaseException):
    """As pytest-timeout raises in whatever runs when its signal comes."""


async def interrupts(*arguments: Any, **named: Any) -> Any:
    """The signal comes while it runs."""
    signal.raise_signal(signal.SIGUSR2)


async def interrupted_in(where: str, vm: qc.Session) -> None:
    """Some work in which one callable is interrupted."""
    both = {"vda": qc.Keep(), "vdb": qc.Keep()}
    ledger: Any = SimpleNamespace(note=interrupts, moved=lambda state: None)
    match where:
        case "policy":
            await (await vm.commit("vda", policy=interrupts)).wait()
        case "ledger":
            await (await vm.commit("vda", policy=qc.Keep(), ledger=ledger)).wait()
        case "group's policy":
            await vm.commit_group(["vda", "vdb"], policy=interrupts)
        case "on_decision":
            await vm.commit_group(both, on_decision=interrupts)
        case "keep_if":
            await vm.cycle(["vda"], keep_if=interrupts, guest="reset")


@pytest.mark.parametrize("where", ["policy", "ledger", "group's policy", "on_decision", "keep_if"])
async def test_what_is_thrown_in_from_outside_undoes_all_and_goes_up(
    where: str, folder: Path
) -> None:
    def handler(number: int, frame: Any) -> None:
        raise TimeIsUp

    former = signal.signal(signal.SIGUSR2, handler)
    try:
        async with guests(folder) as (vm, chains):
            with pytest.raises(TimeIsUp):
                await interrupted_in(where, vm)
            actives = [disk.chain[0].filename for disk in await vm.disks()]
            assert actives == [str(chain.top) for chain in chains]
    finally:
        signal.signal(signal.SIGUSR2, former)


# -- a group's decision is written down ------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["keep", "recycle"])
async def test_a_decision_that_is_not_written_down_cancels_all(
    way: Callback, policy: str, folder: Path
) -> None:
    """All disks are held just then, and for the recycles the guest is paused."""
    async with guests(folder) as (vm, chains):
        policies: Any = {"vda": qc.Keep(), "vdb": qc.Keep()}
        if policy == "recycle":
            policies = {name: qc.Recycle(str(folder / f"new-{name}")) for name in policies}
        with pytest.raises(qc.GroupFailed, match="could not be written down") as failed:
            await vm.commit_group(policies, on_decision=way, hold_limit=2)
        assert isinstance(failed.value.__cause__, cause_of(way))
        assert [disk.chain[0].filename for disk in await vm.disks()] == [str(c.top) for c in chains]
        assert not list(folder.glob("new-*"))


@pytest.mark.parametrize("way", WAYS)
async def test_a_freeze_that_can_not_be_noted_is_none(way: Callback, folder: Path) -> None:
    class Notes:
        note = staticmethod(way)

    async with guests(folder) as (vm, chains):
        group = qc.GroupCommit(
            [(vm, "vda", qc.Keep()), (vm, "vdb", qc.Keep())],
            freeze="pause",
            freeze_notes={vm: Notes()},  # type: ignore[dict-item]
            timeout=15,
        )
        with pytest.raises(qc.GroupFailed, match="could not be quiesced") as failed:
            await group.run()
        assert failed.value.__cause__ is not None
        assert [disk.chain[0].filename for disk in await vm.disks()] == [str(c.top) for c in chains]


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", FAILURES)
async def test_a_hook_that_fails_deletes_nothing(way: Callback, folder: Path) -> None:
    async with guests(folder, many=1) as (vm, (chain,)):
        job = await vm.commit("vda", policy=qc.Pivot(), delete=True, on_pivot=way)
        outcome = await job.wait()
        assert (outcome.action, outcome.hook, outcome.deleted) == ("pivot", "failed", [])
        assert any("on_pivot failed" in warning for warning in outcome.warnings)
        assert chain.top.exists()


@pytest.mark.parametrize("way", [*FAILURES, hangs])
async def test_a_judge_that_fails_changes_nothing(way: Callback, folder: Path) -> None:
    async with guests(folder, many=1) as (vm, (chain,)):
        with pytest.raises(qc.CommitFailed, match="keep_if failed") as failed:
            await vm.cycle("vda", keep_if=way, guest="reset", timeout=2)
        assert isinstance(failed.value.__cause__, cause_of(way))
        assert (await vm.disk("vda")).chain[0].filename == str(chain.top)


# -- a ledger --------------------------------------------------------------------------------------

UNDONE = {"block-commit", "job-complete", "job-finalize", "freeze", "stop"}
"""Steps before which nothing has happened that can't be undone."""


class Failing:
    """A ledger that fails in some way when it is to note one step, and remembers all."""

    def __init__(self, step: str = "", way: Callback = raises) -> None:
        self.steps: list[str] = []
        self._step, self._way = step, way

    async def note(self, step: str, state: Any = None, **facts: Any) -> None:
        self.steps.append(step)
        if step == self._step:
            await self._way()

    def moved(self, state: Any) -> None:
        raise LookupError("it is only told")


async def recycle(vm: qc.Session, folder: Path, ledger: Failing) -> qc.CommitOutcome:
    """A recycle that carries a bitmap, so that its disk is held too."""
    job = await vm.commit(
        "vda", policy=qc.Recycle(str(folder / "new")), ledger=ledger, delete=True, timeout=20
    )
    return await job.wait()


STEPS = [
    "block-commit", "freeze", "stop", "job-complete", "job-finalize", "overlay", "thaw",
    "job-dismiss", "clear-away",
]  # fmt: skip


async def with_bitmap(vm: qc.Session) -> None:
    """So that something is to be done in PENDING."""
    node = (await vm.disk("vda")).chain[0].node_name
    await vm.execute("block-dirty-bitmap-add", {"node": node, "name": "b", "persistent": True})


async def test_these_are_all_steps(folder: Path) -> None:
    async with guests(folder, many=1) as (vm, _):
        await with_bitmap(vm)
        ledger = Failing()
        outcome = await recycle(vm, folder, ledger)
        assert list(dict.fromkeys(ledger.steps)) == STEPS
        assert not outcome.warnings


@pytest.mark.parametrize("way", [raises, cancelled, exits, hangs_on])
@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_can_not_be_noted(step: str, way: Callback, folder: Path) -> None:
    """Before the pivot it is not taken, and all is undone; after it, it is taken all the same."""
    async with guests(folder, many=1) as (vm, (chain,)):
        await with_bitmap(vm)
        ledger = Failing(step, way)
        if step in UNDONE:
            with pytest.raises(qc.QmpCommitError) as failed:
                await recycle(vm, folder, ledger)
            assert "ledger could not note" in failed.value.message or way is hangs_on
            if way is not hangs_on:
                assert isinstance(failed.value, qc.CommitFailed)
                assert isinstance(failed.value.__cause__, cause_of(way))
            assert (await vm.disk("vda")).chain[0].filename == str(chain.top)
            assert not (folder / "new").exists()
        elif way is not hangs_on or step in ("overlay", "thaw"):
            outcome = await recycle(vm, folder, ledger)
            assert outcome.action == "recycle"
            assert any(step in warning for warning in outcome.warnings)
            assert chain.top.exists() == (step == "clear-away")
