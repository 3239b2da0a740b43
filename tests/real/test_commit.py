"""Commits on a real QEMU; each ends by reading the disks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient, Runstate

import qmpcommit as qc
from tests.ground.images import MIB, Chain, assert_disk, create, make_chain, read
from tests.ground.machines import Machine, Style, machine, storage_daemon
from tests.ground.nbd import Nbd, Writer
from tests.ground.qemu import QEMU
from tests.ground.sessions import files

BULK = 33 * MIB
SLOW = "1MiB"  # with BULK, READY is half a minute away


async def no_jobs(vm: qc.Session) -> None:
    """Nothing of ours is left in QEMU."""
    assert await vm.query_jobs() == []


async def end(vm: qc.Session, qemu: Machine) -> None:
    """No job is left; then QEMU ends, so that its images can be read."""
    await no_jobs(vm)
    await vm.close()
    await qemu.quit()


# -- both decisions, on every kind of machine --------------------------------------------------


@contextlib.asynccontextmanager
async def any_machine(kind: str, folder: Path, chain: Chain) -> AsyncIterator[Machine]:
    options: dict[str, Any] = {
        "blockdev": {},
        "drive": {"style": "drive"},
        "implicit backing": {"style": "implicit"},
        "iothread": {"iothread": True},
        "virtio-scsi": {"device": "scsi-hd"},
        "scsi iothread": {"device": "scsi-hd", "iothread": True},
        "throttled": {"filters": ("throttle",)},
        "two filters": {"filters": ("copy-on-read", "throttle")},
    }
    if kind.startswith("storage daemon"):
        style: Style = "implicit" if "implicit" in kind else "blockdev"
        made = storage_daemon(folder, chain, style=style, export="bare" not in kind)
    else:
        made = machine(folder, chain, **options[kind])
    async with made as qemu:
        yield qemu


KINDS = [
    "blockdev",
    "drive",
    "implicit backing",
    "iothread",
    "virtio-scsi",
    "scsi iothread",
    "throttled",
    "two filters",
    "storage daemon",
    "storage daemon, implicit",
]


@pytest.mark.parametrize("kind", KINDS)
async def test_pivot(kind: str, folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with any_machine(kind, folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        name = "top" if "daemon" in kind else "vda"
        job = await vm.commit(name, policy=qc.Pivot())
        outcome = await job.wait()
        assert outcome.job_id == job.job_id == job.id
        assert (outcome.status, outcome.action) == ("completed", "pivot")
        assert outcome.base.filename == str(chain.base)
        assert outcome.top.filename == str(chain.top)
        assert outcome.active is not None
        assert outcome.active.node_name == outcome.base.node_name
        assert outcome.invalidated == [str(path) for path in reversed(chain.files[1:])]
        assert outcome.warnings == []
        assert await files(vm, "export0" if "daemon" in kind else "vda") == [chain.base]
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("kind", [*KINDS, "storage daemon, bare"])
async def test_keep(kind: str, folder: Path) -> None:
    chain = make_chain(folder)
    async with any_machine(kind, folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        name = "top" if "daemon" in kind else "vda"
        outcome = await (await vm.commit(name, policy=qc.Keep())).wait()
        assert (outcome.status, outcome.action) == ("completed", "keep")
        assert outcome.active == (await vm.disk(name)).active
        assert outcome.active is not None
        assert outcome.active.filename == str(chain.top)
        assert outcome.invalidated == []
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_chain_that_nothing_uses_is_pivoted_as_ordered(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain, export=False) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        outcome = await (await vm.commit("top", policy=qc.Pivot())).wait()
        assert outcome.action == "pivot"
        assert "no device or export" in outcome.warnings[0]
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


async def test_over_tcp_and_in_one_line(folder: Path, free_port: int) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, tcp=free_port) as qemu:
        outcome = await qc.commit(f"tcp:127.0.0.1:{free_port}", "vda", policy=qc.Pivot())
        assert outcome.action == "pivot"
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_relative_names_raw_base_and_an_empty_overlay(folder: Path) -> None:
    chain = make_chain(folder, fmt="raw", relative=True)
    empty = create(folder / "empty.qcow2", None, backing="top.qcow2")
    chain.files.append(empty)
    async with (
        machine(folder, chain, style="drive") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        assert [i.driver for i in (await vm.disk("vda")).chain] == ["qcow2", "qcow2", "raw"]
        job = await vm.commit(str(empty), policy=qc.Pivot())
        outcome = await job.wait()
        assert outcome.active is not None
        assert outcome.active.driver == "raw"
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1], fmt="raw")


# -- parts of a chain ----------------------------------------------------------------------------


async def test_shallow_and_base_and_top(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        merged = await (await vm.commit("vda", top="low", shallow=True)).wait()
        assert (merged.action, merged.decided_by) == ("none", "")
        assert merged.timings.ready is None
        assert merged.invalidated == [str(chain.files[2])]
        assert merged.active is not None
        assert merged.active.filename == str(chain.top)
        names = [image.node_name for image in (await vm.disk("vda")).chain]
        assert names == ["top", "mid", "base"]
        kept = await (await vm.commit("vda", policy=qc.Keep(), base=str(chain.files[1]))).wait()
        assert kept.base.node_name == "mid"
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(chain.files[1], chain.pictures[3])
    assert_disk(chain.top, chain.pictures[3])


async def test_an_intermediate_commit_of_several_layers(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        outcome = await (await vm.commit("vda", top=1, base=3)).wait()
        assert outcome.action == "none"
        assert outcome.invalidated == [str(chain.files[2]), str(chain.files[1])]
        assert [image.node_name for image in (await vm.disk("vda")).chain] == ["top", "base"]
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[2])
    assert_disk(chain.top, chain.pictures[3])


# -- under a guest that writes -----------------------------------------------------------------


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep(), qc.Abort()], ids=lambda p: p.kind)
async def test_no_write_is_lost_while_a_writer_goes_on(policy: Any, folder: Path) -> None:
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with await Nbd.connect(qemu.nbd, "top") as nbd, Writer(nbd, picture) as writer:
            await writer.writes(20)
            job = await vm.commit("top", policy=qc.Hold())
            await job.ready()
            await writer.writes(200)
            {"pivot": job.pivot, "keep": job.keep, "abort": job.abort}[policy.kind]()
            outcome = await job.wait()
            assert outcome.action == policy.kind
            await writer.writes(200)
        await end(vm, qemu)
    assert_disk(chain.base if policy.kind == "pivot" else chain.top, picture)


async def test_a_keep_holds_everything_up_to_its_instant(folder: Path) -> None:
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with await Nbd.connect(qemu.nbd, "top") as nbd:
            job = await vm.commit("top", policy=qc.Hold())
            await job.ready()
            await nbd.write(5 * MIB, b"before" * 1000)
            picture.write(5 * MIB, b"before" * 1000)
            at_the_instant = picture.copy()
            await job.keep()
            assert (await job.wait()).action == "keep"
            await nbd.write(5 * MIB, b"after!" * 1000)
            picture.write(5 * MIB, b"after!" * 1000)
        await end(vm, qemu)
    assert_disk(chain.base, at_the_instant)
    assert_disk(chain.top, picture)


# -- decisions ------------------------------------------------------------------------------------


async def test_a_pivot_before_ready_is_not_ready_and_the_job_goes_on(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold(), bandwidth=SLOW)
        for decide in (job.pivot, job.keep):
            with pytest.raises(qc.NotReady) as error:
                await decide()
            assert error.value.job_id == job.id
        (entry,) = await vm.query_jobs()
        assert (entry.id, entry.status) == (job.id, "running")
        await vm.execute("block-job-set-speed", {"device": job.id, "speed": 0})
        await job.ready()
        await job.pivot()
        assert (await job.wait()).action == "pivot"
        with pytest.raises(qc.JobConflict):
            job.keep()
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


async def test_progress_is_told_until_the_end(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), bandwidth=SLOW)
        seen: list[qc.JobProgress] = []
        async for status in job.progress(0.05):
            seen.append(status)
            if status.current and len(seen) < 1000 and job.state.order.decision is None:
                await job.set_bandwidth(0)
        assert seen[0].phase == "copying"
        assert [s.current for s in seen] == sorted(s.current for s in seen)
        assert {s.pace for s in seen} == {"moving"}
        last = seen[-1]
        assert [s.phase for s in seen].count(qc.Phase.FINISHED) == 1
        assert json.loads(last.model_dump_json())["phase"] == "finished"
        assert qc.JobProgress.model_validate_json(last.model_dump_json()) == last
        assert (last.phase, last.current) == ("finished", last.total)
        assert last.total == (await job.wait()).bytes_committed
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


async def test_cancel_in_the_first_phase(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), bandwidth=SLOW)
        await job.cancel()
        outcome = await job.wait()
        assert (outcome.status, outcome.action) == ("cancelled", "abort")
        assert "valid only under" in outcome.warnings[0]
        assert (await job.wait()).warnings == outcome.warnings
        await end(vm, qemu)
    assert len([e for e in caplog.records if "outcome_warning" in e.getMessage()]) == 1
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize(
    ("policy", "action", "by"),
    [
        (qc.Hold(timeout=0.1), "keep", "hold expired"),
        (qc.Hold(timeout=0, otherwise=qc.Pivot()), "pivot", "hold expired"),
        (qc.Check(["sh", "-c", 'test "$QMPCOMMIT_DISK" = vda']), "pivot", "check passed"),
        (qc.Check(["sh", "-c", "exit 3"]), "keep", "check failed"),
        (qc.Check(["sleep", "60"], timeout=0.1, failed=qc.Abort()), "abort", "check failed"),
        ({"kind": "keep"}, "keep", "policy"),
        ('{"kind": "check", "command": ["true"]}', "pivot", "check passed"),
    ],
    ids=str,
)
async def test_policies(policy: Any, action: str, by: str, folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        outcome = await (await vm.commit("vda", policy=policy)).wait()
        assert (outcome.action, outcome.decided_by) == (action, by)
        await end(vm, qemu)
    assert_disk(chain.base if action == "pivot" else chain.top, chain.pictures[-1])
    if action == "keep":
        assert_disk(chain.base, chain.pictures[-1])


async def test_a_callable_sees_what_is_ready_and_decides(folder: Path) -> None:
    chain = make_chain(folder)
    seen: list[qc.Ready] = []

    async def decide(ready: qc.Ready) -> qc.Pivot:
        seen.append(ready)
        return qc.Pivot()

    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp, name="web1") as vm:
            outcome = await (await vm.commit("vda", policy=decide)).wait()
            await no_jobs(vm)
        await qemu.quit()
    (ready,) = seen
    assert (ready.vm, ready.disk, ready.job_id) == ("web1", "vda", outcome.job_id)
    assert ready.bytes_committed == outcome.bytes_committed > 0
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize(
    "failure", [ValueError("no idea"), asyncio.CancelledError(), "nonsense"], ids=repr
)
async def test_a_policy_that_fails_aborts_and_is_the_cause(failure: Any, folder: Path) -> None:
    chain = make_chain(folder)

    async def decide(ready: qc.Ready) -> Any:
        if isinstance(failure, str):
            return failure
        raise failure

    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=decide)
        with pytest.raises(qc.CommitFailed, match="still the active image") as error:
            await job.wait()
        kind = qc.InvalidRequest if isinstance(failure, str) else type(failure)
        assert isinstance(error.value.__cause__, kind)
        assert ((await vm.disk("vda")).active or job.plan.base).node_name == "top"
        await end(vm, qemu)
    assert_disk(chain.top, chain.pictures[-1])


async def test_only_if(folder: Path) -> None:
    chain = make_chain(folder)
    before = read(chain.base)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        for command in (["false"], ["/nowhere/nothing"], ["sh", "-c", "exit 127"]):
            with pytest.raises(qc.OnlyIfFailed, match="Nothing was sent"):
                await vm.commit("vda", policy=qc.Pivot(), only_if=command)
        await vm.close()
        await qemu.quit()
        assert read(chain.base) == before
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Pivot(), only_if=["sh", "-c", "test $QMPCOMMIT_VM"])
        assert (await job.wait()).action == "pivot"
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_deadline_cancels_the_job(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit(
            "vda", policy=qc.Pivot(), bandwidth=SLOW, only_if=["sleep", "0.1"], timeout=0.5
        )
        with pytest.raises(qc.DeadlineExceeded, match=r"within 0\.5 s.*still the active image"):
            await job.wait()
        await end(vm, qemu)
    assert_disk(chain.top, chain.pictures[-1])


# -- others -----------------------------------------------------------------------------------


async def test_somebody_elses_job_is_taken_up_by_id(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with vm.events("BLOCK_JOB_READY") as ready:
            await vm.execute("block-commit", {"job-id": "theirs", "device": "top"})
            await anext(ready)
        job = await vm.adopt("theirs")
        outcome, _ = await asyncio.gather(job.wait(), job.pivot())
        assert (outcome.action, outcome.disk, outcome.job_id) == ("pivot", "vda", "theirs")
        assert (outcome.top.node_name, outcome.base.node_name) == ("top", "base")
        assert len(outcome.invalidated) == 2
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_job_left_pending_by_others_is_finalized(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        arguments = {"job-id": "j", "device": "top", "auto-finalize": False, "auto-dismiss": False}
        with vm.events("BLOCK_JOB_READY", "BLOCK_JOB_PENDING") as heard:
            await vm.execute("block-commit", arguments)
            await anext(heard)
            await vm.execute("job-complete", {"id": "j"})
            await anext(heard)
        job = await vm.adopt("j")
        outcome = await job.wait()
        assert (outcome.action, outcome.decided_by) == ("pivot", "another client")
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


async def test_adopting_what_is_not_there_or_no_commit(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.JobNotFound, match="none"):
            await vm.adopt("nothing")
        target = {"driver": "null-co", "node-name": "null", "size": 64 * MIB}
        await vm.execute("blockdev-add", target)
        mirror = {"job-id": "m", "device": "top", "target": "null", "sync": "full"}
        await vm.execute("blockdev-mirror", mirror)
        with pytest.raises(qc.JobConflict, match="mirror"):
            await vm.adopt("m")
        with pytest.raises(qc.JobConflict, match=r"block job already: m\."):
            await vm.commit("vda", policy=qc.Pivot())
        await vm.execute("job-cancel", {"id": "m"})


async def test_a_session_that_ends_cancels_its_jobs_and_leaves_others(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            await vm.commit("vda", policy=qc.Hold())
        assert await qemu.execute("query-jobs") == []
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("vda", policy=qc.Hold(), job_id="qmpcommit-mine")
            await job.ready()
            await job.detach()
            with pytest.raises(qc.MonitorLost, match="qmpcommit-mine"):
                await job.wait()
            assert "policy_failed" not in caplog.text
        async with qc.Session.connect(qemu.qmp) as vm:
            await vm.adopt("qmpcommit-mine")
        (left,) = await qemu.execute("query-jobs")
        assert (left["id"], left["status"]) == ("qmpcommit-mine", "ready")
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.adopt("qmpcommit-mine", policy=qc.Keep())
            assert (await job.wait()).action == "keep"
            await no_jobs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_cancelled_one_liner_cancels_the_job(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        task = asyncio.create_task(qc.commit(qemu.qmp, "vda", policy=qc.Hold()))
        async with qc.Session.connect(qemu.qmp2) as vm:
            with vm.events("BLOCK_JOB_READY") as ready:
                await anext(ready)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await end(vm, qemu)
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_shared_client_stays_connected(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        client = QMPClient("web1")
        await client.connect(qemu.qmp)
        async with qc.Session.over(client) as vm:
            assert vm.name == "web1"
            assert (await (await vm.commit("vda", policy=qc.Pivot())).wait()).action == "pivot"
        assert client.runstate is Runstate.RUNNING
        assert await client.execute("query-jobs") == []
        await client.disconnect()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


# -- what others do to our job --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "action"),
    [
        ("job-complete", {"id": "{}"}, "pivot"),
        ("block-job-cancel", {"device": "{}", "force": False}, "keep"),
        ("job-cancel", {"id": "{}"}, "abort"),
    ],
)
async def test_another_client_decides_under_us(
    command: str, arguments: dict[str, Any], action: str, folder: Path
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold())
        await job.ready()
        given = {k: v.format(job.id) if isinstance(v, str) else v for k, v in arguments.items()}
        await qemu.execute(command, **given)
        outcome = await job.wait()
        assert (outcome.action, outcome.decided_by) == (action, "another client")
        assert "another client" in outcome.warnings[0]
        await end(vm, qemu)
    assert_disk(chain.base if action == "pivot" else chain.top, chain.pictures[-1])


@pytest.mark.parametrize("choice", ["pivot", "keep"])
async def test_a_paused_job_is_resumed_for_its_decision(choice: str, folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold())
        await job.ready()
        with vm.events("JOB_STATUS_CHANGE") as changes:
            await qemu.execute("job-pause", id=job.id)
            while getattr(await anext(changes), "status", "") != "standby":
                pass
        await (job.pivot() if choice == "pivot" else job.keep())
        outcome = await job.wait()
        assert outcome.action == choice
        assert "paused" in outcome.warnings[0]
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


async def test_stop_cont_and_reset_do_not_matter(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold())
        for command in ("cont", "stop", "system_reset", "cont", "system_reset", "stop"):
            await qemu.execute(command)
        await job.ready()
        for command in ("cont", "system_reset", "stop", "cont"):
            await qemu.execute(command)
        await job.pivot()
        assert (await job.wait()).action == "pivot"
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("how", ["quit", "kill"])
@pytest.mark.parametrize("when", ["copying", "ready", "deciding"])
async def test_qemu_ends_under_us(how: str, when: str, folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        bandwidth = SLOW if when == "copying" else None
        job = await vm.commit("vda", policy=qc.Hold(), bandwidth=bandwidth)
        if when != "copying":
            await job.ready()
        if when == "deciding":
            qemu.signal(signal.SIGSTOP)
            job.pivot()
        if how == "kill":
            qemu.signal(signal.SIGKILL)
        else:
            qemu.signal(signal.SIGCONT)
            await qemu.quit()
        async with asyncio.timeout(20):
            if when == "deciding" and how == "quit":
                with contextlib.suppress(qc.VMGone):
                    assert (await job.wait()).action == "pivot"
            else:
                with pytest.raises(qc.VMGone) as error:
                    await job.wait()
                assert error.value.pivoted is (None if when == "deciding" else False)
                assert str(chain.top) in error.value.message
        await qemu.ended()
    assert_disk(chain.top, chain.pictures[-1])


# -- refusals ---------------------------------------------------------------------------------


async def test_refusals_send_nothing(folder: Path) -> None:
    chain = make_chain(folder, 3)
    single = make_chain(folder, 1, names=["single"])
    incoming = ("-device", "ide-cd,id=cd0")
    async with (
        machine(folder, chain, single, extra=incoming) as qemu,
        qc.Session.connect(qemu.qmp, name="web1") as vm,
    ):
        cases: list[tuple[type[qc.QmpCommitError], str, dict[str, Any]]] = [
            (qc.PolicyRequired, "vda", {}),
            (qc.PolicyRequired, "vda", {"top": "top"}),
            (qc.DiskNotFound, "vdx", {"policy": qc.Pivot()}),
            (qc.DiskNotFound, str(chain.base), {"policy": qc.Pivot()}),
            (qc.ChainError, "vda", {"policy": qc.Pivot(), "base": "nothing"}),
            (qc.ChainError, "vda", {"policy": qc.Pivot(), "top": "nothing"}),
            (qc.ChainError, "vda", {"policy": qc.Pivot(), "base": "top"}),
            (qc.ChainError, "vda", {"top": "base"}),
            (qc.ChainError, "vda", {"top": 1, "base": 0}),
            (qc.InvalidRequest, "vda", {"top": 1, "policy": qc.Abort(), "delete": True}),
            (qc.InvalidRequest, "vda", {"top": 1, "policy": qc.Hold()}),
            (qc.InvalidRequest, "vda", {"top": 1, "converge": qc.Converge(deadline=9)}),
            (qc.InvalidRequest, "vda", {"policy": qc.Keep(), "delete": True}),
            (qc.InvalidRequest, "vda", {"policy": qc.Pivot(), "override": ["everything"]}),
            (qc.ChainError, "vdb", {"policy": qc.Pivot()}),
            (qc.ChainError, "cd0", {"policy": qc.Pivot()}),
            (qc.InvalidRequest, "vda", {"policy": qc.Pivot(), "bandwidth": "fast"}),
            (qc.InvalidRequest, "vda", {"policy": qc.Pivot(), "timeout": -1}),
            (qc.InvalidRequest, "vda", {"policy": '{"kind": "privot"}'}),
            (qc.InvalidRequest, "vda", {"policy": qc.Pivot(), "only_if": "true"}),
            (qc.InvalidRequest, "vda", {"policy": qc.Pivot(), "job_id": "1bad"}),
            (qc.InvalidRequest, "vda", {"policy": qc.Pivot(), "converge": 60}),
            (qc.InvalidRequest, "vda", {"policy": qc.Pivot(), "on_pivot": ["true"]}),
            (qc.InvalidRequest, "vda", {"policy": qc.Pivot(), "on_stall": "wait"}),
        ]
        with vm.events("JOB_STATUS_CHANGE") as changes:
            for kind, disk, options in cases:
                with pytest.raises(kind):
                    await vm.commit(disk, **options)
            job = await vm.commit("vda", policy=qc.Hold())
            with pytest.raises(qc.JobConflict):
                await vm.commit("vda", policy=qc.Pivot())
            assert getattr(await anext(changes), "job_id", "") == job.id, "something was sent"
            await job.abort()
        await end(vm, qemu)
    assert_disk(chain.top, chain.pictures[-1])


async def test_qemus_own_refusal_is_a_failure_with_its_text(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        # Somebody else reads the base, so QEMU can't open it for writing.
        reader = await asyncio.create_subprocess_exec(
            QEMU.io, "-r", "-f", "qcow2", str(chain.base),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert reader.stdin
        assert reader.stdout
        await reader.stdout.readuntil(b"qemu-io> ")
        with pytest.raises(qc.ChainError, match="base-shared"):
            await vm.commit("vda", policy=qc.Pivot())
        with pytest.raises(qc.CommitFailed, match="Nothing was changed") as error:
            await vm.commit("vda", policy=qc.Pivot(), override=["base-shared"])
        assert error.value.error is not None
        assert "lock" in error.value.error
        await reader.communicate(b"quit\n")
        assert (await (await vm.commit("vda", policy=qc.Pivot())).wait()).action == "pivot"
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_long_chain(folder: Path) -> None:
    """200 layers: the replies are large and nested, and nothing breaks."""
    chain = make_chain(folder, 2)
    below = chain.top
    for number in range(198):
        below = create(folder / f"l{number}.qcow2", 64 * MIB, backing=below, unopened=True)
        chain.files.append(below)
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        disk = await vm.disk("vda")
        assert len(disk.chain) == 200
        (info,) = await vm.query_block()
        assert info.inserted is not None
        assert len(await vm.query_named_block_nodes()) == 400
        outcome = await (await vm.commit("vda", policy=qc.Pivot())).wait()
        assert len(outcome.invalidated) == 199
        await end(vm, qemu)
    assert_disk(chain.base, chain.pictures[-1])
