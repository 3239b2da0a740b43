"""Every public coroutine, cancelled at each of its steps in turn, leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.request import Request
from qmpcommit.commit.stale_layers import Around
from tests.ground.cancelling import STEPS, ends_before, listeners, settle, small, sockets
from tests.ground.images import make_chain
from tests.ground.machines import Machine, storage_daemon
from tests.ground.qemu import QEMU
from tests.ground.sessions import lost

Call = Callable[[qc.Session, Machine], Awaitable[Any]]


@asynccontextmanager
async def held(vm: qc.Session) -> AsyncIterator[qc.CommitJob]:
    """A job that is READY and stays so."""
    job = await vm.commit("export0", policy=qc.Hold())
    await job.ready()
    try:
        yield job
    finally:
        await job.abort()


async def _progress(job: qc.CommitJob) -> None:
    steps = job.progress(every=0.01)
    try:
        for _ in range(3):
            await anext(steps)
    finally:
        await steps.aclose()  # type: ignore[attr-defined]


ASKING: dict[str, Call] = {
    "disks": lambda vm, _: vm.disks(),
    "disk": lambda vm, _: vm.disk("export0"),
    "graph": lambda vm, _: vm.graph(),
    "plan": lambda vm, _: vm.plan("export0", policy=qc.Pivot()),
    "execute": lambda vm, _: vm.execute("query-version"),
    "set_write_threshold": lambda vm, _: vm.set_write_threshold("top", 0),
    "look": lambda vm, _: vm.look(),
    "query_block_exports": lambda vm, _: vm.query_block_exports(),
    "query_block_jobs": lambda vm, _: vm.query_block_jobs(),
    "query_jobs": lambda vm, _: vm.query_jobs(),
    "query_named_block_nodes": lambda vm, _: vm.query_named_block_nodes(),
    "query_qmp_schema": lambda vm, _: vm.query_qmp_schema(),
    "query_version": lambda vm, _: vm.query_version(),
    "close_windows": lambda vm, _: vm.close_windows(),
    "prepare": lambda vm, _: vm.prepare(Request("export0", qc.Keep()), Around()),
    "recover": lambda vm, _: vm.recover(),
    "recover_several": lambda vm, _: qc.recover([vm]),
    "resolve_pending": lambda vm, _: qc.resolve_pending(vm),
}


@pytest.mark.parametrize("name", ASKING)
async def test_asking(name: str, folder: Path) -> None:
    async with storage_daemon(folder, small(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:

        async def work() -> None:
            await ASKING[name](vm, qemu)

        before = (asyncio.all_tasks(), listeners(vm), sockets())
        for step in range(1, STEPS):
            over = await ends_before(work(), step)
            await settle()
            assert (asyncio.all_tasks(), listeners(vm), sockets()) == before, step
            assert (await vm.execute("query-version"))["qemu"]  # and it is of use still
            if over:
                break
        assert step > 1


async def _connect(qemu: Machine) -> None:
    vm = await qc.Session.connect(qemu.qmp)
    await vm.close()


async def _opened(qemu: Machine) -> None:
    vm = qc.Session.connect(qemu.qmp)
    try:
        await vm.open()
        await vm.features()
    finally:
        await vm.close()


async def _lost(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        vm.drop()
        await lost(vm)
        await vm.restore()
        assert vm.connected


async def _open(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp):
        pass


async def _one_call(qemu: Machine) -> None:
    await qc.commit(qemu.qmp, "export0", policy=qc.Keep())


async def _commit(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Keep())
        await job.wait()


async def _abort(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Hold())
        await job.ready()
        await job.abort()


async def _group(qemu: Machine) -> None:
    await qc.commit_group([(qemu.qmp, "export0")], policy=qc.Keep())


async def _in_steps(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.prepare(Request("export0", qc.Keep()), Around())
        await vm.launch(job)
        await job.started()
        await job.settled()
        await job.wait()


async def _by_hand(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Hold())
        await job.ready()
        await job.keep()


async def _given_up(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Hold())
        await job.abandon()
        other = await vm.commit("export0", policy=qc.Hold())
        await other.cancel()


async def _steered(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Hold())
        await vm.set_bandwidth(job.id, "1MiB")
        await vm.pause_job(job.id)
        await vm.resume_job(job.id)
        await job.abort()


async def _group_of_a_session(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        await vm.commit_group({"export0": qc.Keep()})


def _of_one(vm: qc.Session, policy: qc.Policy) -> qc.GroupCommit:
    return qc.GroupCommit([qc.GroupMember(vm, "export0", policy)])


async def _group_in_steps(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        group = _of_one(vm, qc.Keep())
        await group.prepare()
        await group.start()
        await group.ready()
        await group.wait()


async def _group_run(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        await _of_one(vm, qc.Keep()).run()


async def _group_given_up(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        group = _of_one(vm, qc.Hold())
        await group.start()
        await group.abandon("nobody wants it")


WHOLE: list[Callable[[Machine], Coroutine[Any, Any, None]]] = [
    _connect,
    _open,
    _one_call,
    _commit,
    _abort,
    _group,
    _opened,
    _lost,
    _in_steps,
    _by_hand,
    _given_up,
    _steered,
    _group_of_a_session,
    _group_in_steps,
    _group_run,
    _group_given_up,
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("work", WHOLE)
async def test_from_start_to_end(
    work: Callable[[Machine], Coroutine[Any, Any, None]], folder: Path
) -> None:
    daemon = storage_daemon(folder, small(folder))
    async with daemon as qemu, qc.Session.connect(qemu.qmp2) as other:
        before = (asyncio.all_tasks(), sockets())
        for step in range(1, STEPS):
            over = await ends_before(work(qemu), step)
            await settle()
            assert (asyncio.all_tasks(), sockets()) == before, step
            assert await other.execute("query-jobs") == [], step
            if over:
                break
        assert step > 1


IN_A_JOB: dict[str, Callable[[qc.CommitJob], Coroutine[Any, Any, Any]]] = {
    "ready": lambda job: job.ready(),
    "reached": lambda job: job.reached(),
    "wait": lambda job: job.wait(),
    "ended": lambda job: job.ended(),
    "progress": _progress,
    "set_bandwidth": lambda job: job.set_bandwidth("1MiB"),
    "note": lambda job: job.note("nothing"),
    "let_go": lambda job: job.let_go(),
    "started": lambda job: job.started(),
}


@pytest.mark.parametrize("name", IN_A_JOB)
async def test_with_a_job(name: str, folder: Path) -> None:
    async with storage_daemon(folder, small(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with held(vm) as job:
            before = (asyncio.all_tasks(), listeners(vm), sockets(), len(job._waiters))
            for step in range(1, STEPS):
                over = await ends_before(IN_A_JOB[name](job), step)
                await settle()
                now = (asyncio.all_tasks(), listeners(vm), sockets(), len(job._waiters))
                assert now == before, step
                assert job.phase.value == "ready"
                if over or name in ("wait", "ended"):
                    break  # it waits for ever
        assert await vm.execute("query-jobs") == []


async def test_adopt(folder: Path) -> None:
    async with (
        storage_daemon(folder, small(folder)) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        qc.Session.connect(qemu.qmp2) as other,
        held(vm) as job,
    ):
        before = (asyncio.all_tasks(), listeners(other), sockets())
        for step in range(1, STEPS):
            taken: list[qc.CommitJob] = []

            async def work(taken: list[qc.CommitJob] = taken) -> None:
                taken.append(await other.adopt(job.id))
                await taken[0].seen()

            over = await ends_before(work(), step)
            for each in taken:
                await each.detach()
            await settle()
            assert (asyncio.all_tasks(), listeners(other), sockets()) == before, step
            (seen,) = await other.execute("query-jobs")
            assert seen["status"] == "ready"
            if over:
                break
        assert step > 1


async def _detached(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Hold())
        await job.ready()
        await job.detach()


async def _released(qemu: Machine) -> None:
    vm = await qc.Session.connect(qemu.qmp)
    try:
        await vm.commit("export0", policy=qc.Hold())
    finally:
        await vm.release()


async def _resumed(qemu: Machine) -> None:
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Hold())
        await job.ready()
        await job.detach()
        again = await vm.resume(job.plan, Resumed(job.state))
        await again.detach()


async def _noted(qemu: Machine) -> None:
    ledger = qc.FileLedger(Path(qemu.qmp).with_name("ledger"))
    ledger.remove()
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Hold(), ledger=ledger)
        await job.ready()
        await job.detach()
        again = await vm.resume(ledger)
        await again.detach()
        assert await ledger.noted()
        await ledger.note("cont")


async def _resumed_to_its_end(qemu: Machine) -> None:
    ledger = qc.FileLedger(Path(qemu.qmp).with_name("ledger"))
    ledger.remove()
    async with qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("export0", policy=qc.Hold(), ledger=ledger)
        await job.ready()
        await job.detach()
    outcome = await qc.resume(ledger, qemu.qmp, policy=qc.Keep())
    assert isinstance(outcome, qc.CommitOutcome)
    assert outcome.action == "keep"


LEAVING = [_detached, _released, _resumed, _noted, _resumed_to_its_end]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("work", LEAVING)
async def test_what_is_left_in_qemu_on_purpose_can_be_taken_up(
    work: Callable[[Machine], Coroutine[Any, Any, None]], folder: Path
) -> None:
    daemon = storage_daemon(folder, small(folder))
    async with daemon as qemu, qc.Session.connect(qemu.qmp2) as other:
        before = (asyncio.all_tasks(), sockets())
        left = 0
        for step in range(1, STEPS):
            over = await ends_before(work(qemu), step)
            await settle()
            assert (asyncio.all_tasks(), sockets()) == before, step
            for each in await other.execute("query-jobs"):
                left += 1
                await (await other.adopt(each["id"])).abort()
            assert await other.execute("query-jobs") == [], step
            if over:
                break
        assert step > 1
        assert left


@pytest.mark.timeout(300)
async def test_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was not told to quit is not waited for."""
    monkeypatch.setattr("qmpcommit.offline_session.STOP_TIMEOUT", 20.0)
    chain = make_chain(folder)
    program = QEMU.daemon or "qemu-storage-daemon"

    async def work() -> None:
        async with qc.offline(chain.top, program=program) as vm:
            await vm.disks()

    before = (asyncio.all_tasks(), sockets())
    for step in range(1, STEPS):
        async with asyncio.timeout(15):
            over = await ends_before(work(), step)
        await settle()
        assert (asyncio.all_tasks(), sockets()) == before, step
        if over:
            break
    assert step > 1
