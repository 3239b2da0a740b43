"""The library's client of the running daemon, on real storage daemons."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.client.events import Events, Message, Parser
from tests.cli.command import ENVIRONMENT, ROOT, end
from tests.daemon.daemons import Daemon, daemon, host_of
from tests.ground.images import MIB, Chain, assert_disk, make_chain
from tests.ground.machines import Machine, storage_daemon

BULK = 33 * MIB  # more than a speed limit lets through at once


@asynccontextmanager
async def client_of(
    folder: Path, chain: Chain, config: str = "", **options: Any
) -> AsyncIterator[tuple[Daemon, Machine, qc.Client]]:
    """`host_of`, and a client of it."""
    async with host_of(folder, chain, config) as (d, qemu), qc.Client(d.socket, **options) as host:
        yield d, qemu, host


@pytest.mark.parametrize("decision", ["pivot", "keep", "abort"])
async def test_a_commit_is_decided_by_its_policy(decision: str, folder: Path) -> None:
    chain = make_chain(folder)
    async with client_of(folder, chain) as (_, qemu, host):
        job = await host.vm("web1").commit("top", policy={"kind": decision})
        outcome = await job.wait()
        assert isinstance(outcome, qc.CommitOutcome)
        assert (outcome.action, outcome.vm, outcome.job_id) == (decision, "web1", job.job_id)
        assert outcome.invalidated == ([str(chain.top)] if decision == "pivot" else [])
        assert await job.wait() == outcome  # as often as one likes
        (again,) = await host.commits(vm="web1", state="done")
        assert (again.id, again.done, await again.wait()) == (job.id, True, outcome)
        assert await qemu.execute("query-jobs") == []
    if decision != "abort":
        assert_disk(chain.base, chain.pictures[-1])
    if decision != "pivot":
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("decision", ["pivot", "keep", "abort"])
async def test_a_hold_is_decided_by_the_caller(decision: str, folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with client_of(folder, chain) as (d, qemu, host):
        vm = host.vm("web1")
        job = await vm.commit("top", policy=qc.Hold(), bandwidth="1MiB")
        await d.until(job.id, "copying")
        with pytest.raises(qc.NotReady) as not_ready:
            await job.pivot()
        assert (not_ready.value.vm, not_ready.value.job_id) == ("web1", job.job_id)
        await qemu.execute("block-job-set-speed", device=job.job_id, speed=0)
        seen = []
        async with asyncio.timeout(30):
            async for status in job.progress(0.05):
                seen.append(status)
                if status.phase == "ready":
                    break
        assert seen[-1].current == seen[-1].total >= BULK
        await job.ready()
        assert (await vm.job(job.job_id)).id == (await vm.job(job.id)).id == job.id
        (listed,) = await vm.jobs()
        assert (listed["device"], listed["commit"]) == (job.job_id, job.id)
        await {"pivot": job.pivot, "keep": job.keep, "abort": job.cancel}[decision]()
        assert job.done
        outcome = await job.wait()
        assert (outcome.action, outcome.decided_by) == (decision, "caller")
        last = [status async for status in job.progress()]
        assert [status.phase for status in last] == ["finished"]
        with pytest.raises(qc.JobConflict):
            await job.pivot()
        with pytest.raises(qc.JobNotFound):
            await vm.job(job.job_id)
    if decision != "abort":
        assert_disk(chain.base, chain.pictures[-1])
    if decision != "pivot":
        assert_disk(chain.top, chain.pictures[-1])


async def _direct(vm: qc.Session, **asked: Any) -> None:
    await (await vm.commit(**asked)).wait()


async def _remote(vm: qc.RemoteVM, **asked: Any) -> None:
    await (await vm.commit(**asked)).wait()


REFUSED: dict[str, tuple[dict[str, Any], type[qc.QmpCommitError]]] = {
    "no disk": ({"disk": "vdz", "policy": qc.Pivot()}, qc.DiskNotFound),
    "no policy": ({"disk": "top"}, qc.PolicyRequired),
    "no layer": ({"disk": "top", "policy": qc.Pivot(), "base": "nolayer"}, qc.ChainError),
    "itself": ({"disk": "top", "policy": qc.Pivot(), "base": 0}, qc.ChainError),
    "no size": ({"disk": "top", "policy": qc.Pivot(), "bandwidth": "fast"}, qc.InvalidRequest),
    "no job id": ({"disk": "top", "policy": qc.Pivot(), "job_id": "1x"}, qc.InvalidRequest),
    "two ways": (
        {"disk": "top", "policy": qc.Pivot(), "delete": True, "stale": "rename"},
        qc.InvalidRequest,
    ),
    "no time": ({"disk": "top", "policy": qc.Pivot(), "timeout": -1}, qc.InvalidRequest),
    "delete after a keep": (
        {"disk": "top", "policy": qc.Keep(), "delete": True},
        qc.InvalidRequest,
    ),
    "no check": (
        {"disk": "top", "policy": qc.Pivot(), "override": ["everything"]},
        qc.InvalidRequest,
    ),
    "an abort of a layer below": (
        {"disk": "top", "policy": qc.Abort(), "top": 1, "shallow": True, "delete": True},
        qc.InvalidRequest,
    ),
    "only if": (
        {"disk": "top", "policy": qc.Pivot(), "only_if": ["false"]},
        qc.OnlyIfFailed,
    ),
    "no room to recycle": (
        {"disk": "top", "policy": qc.Recycle("/nowhere/at/all.qcow2")},
        qc.QmpCommitError,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_errors_are_the_librarys_own(case: str, folder: Path) -> None:
    asked, kind = REFUSED[case]
    chain = make_chain(folder)
    found: list[dict[str, object]] = []
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp, name="web1") as vm:
            with pytest.raises(kind) as direct:
                await _direct(vm, **asked)
        config = f'commands = true\n[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n'
        async with daemon(folder, config) as d:
            await d.connected("web1")
            async with qc.Client(d.socket) as host:
                with pytest.raises(kind) as remote:
                    await _remote(host.vm("web1"), **asked)
        for error in (direct.value, remote.value):
            facts = {**error.to_dict(), "message": _without_ids(error)}
            facts.pop("job_id", None)
            found.append(facts)
        await qemu.quit()
    assert type(direct.value) is type(remote.value)
    for name in ("vm", "disk"):  # the daemon knows always whom it was asked about
        known = found[1].get(name)
        found[0].setdefault(name, known)
        if known is None:
            found[0].pop(name)
    assert found[0] == found[1]
    for path, picture in zip(chain.files, chain.pictures, strict=True):
        assert_disk(path, picture)


def _without_ids(error: qc.QmpCommitError) -> str:
    return error.message.replace(error.job_id or "\0", "JOB")


async def test_what_the_daemon_does_not_know_or_allow(folder: Path) -> None:
    chain = make_chain(folder)
    async with client_of(folder, chain) as (_, _, host):
        with pytest.raises(qc.VMNotFound):
            await host.vm("web2").disks()
        with pytest.raises(qc.VMNotFound, match="name"):
            host.vm(str(folder / "qmp"))
        for wrong in ("0" * 32, "x/y", ""):
            with pytest.raises(qc.CommitNotFound):
                await host.commit(wrong)
        vm = host.vm("web1")
        with pytest.raises(qc.InvalidRequest, match="commands"):
            await vm.commit("top", policy=qc.Pivot(), only_if=["true"])

        async def mine(ready: qc.Ready) -> qc.Pivot:
            return qc.Pivot()

        with pytest.raises(qc.InvalidRequest, match="Hold"):
            await vm.commit("top", policy=mine)
        with pytest.raises(qc.InvalidRequest, match="converges"):
            await vm.commit("top", policy=qc.Pivot(), converge=qc.Converge(deadline=3))
        assert await host.commits() == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_vms_disks_and_plans(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with storage_daemon(folder, chain) as qemu, daemon(folder) as d:
        async with qc.Client(d.socket) as host:
            assert await host.vms() == []
            vm = await host.add_vm("web1", qemu.qmp)
            await host.add_vm("web1", qemu.qmp)  # no second effect
            with pytest.raises(qc.JobConflict):
                await host.add_vm("web1", f"{qemu.qmp}2")
            await d.connected("web1")
            assert [(each.name, each.state) for each in await host.vms()] == [("web1", "connected")]
            assert (await vm.info()).qmp == qemu.qmp
            async with qc.Session.connect(qemu.qmp2) as direct:
                assert await vm.disks() == await direct.disks()
                asked = {"policy": qc.Pivot(), "base": 1, "job_id": "j", "carry_bitmaps": False}
                plan = await vm.plan("top", **asked)  # type: ignore[arg-type]
                wanted = await direct.plan("top", **asked)  # type: ignore[arg-type]
            assert plan.vm == "web1"
            assert (plan.arguments, plan.policy) == (wanted.arguments, wanted.policy)
            assert {f.name: f.level for f in plan.findings} == {
                f.name: f.level for f in wanted.findings
            }
            assert await vm.disk("top") == await vm.disk(str(chain.top))
            with pytest.raises(qc.DiskNotFound) as unknown:
                await vm.disk("vda")
            assert unknown.value.candidates == ["top"]
            await host.remove_vm("web1")
            with pytest.raises(qc.VMNotFound):
                await host.remove_vm("web1")
        await qemu.quit()


# -- the daemon goes and comes ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_waiting_goes_on_over_a_restart(how: str, folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with client_of(folder, chain) as (d, qemu, host):
        events = host.events()
        async with events:
            job = await host.vm("web1").commit("top", policy=qc.Pivot(), bandwidth="1MiB")
            waiting = asyncio.gather(job.wait(), job.ready(), _phases(job))
            await d.until(job.id, "copying")
            await (d.kill() if how == "killed" else d.stop())
            await qemu.execute("block-job-set-speed", device=job.job_id, speed=0)
            await d.start()
            async with asyncio.timeout(60):
                outcome, _, phases = await waiting
                assert (outcome.action, outcome.job_id) == ("pivot", job.job_id)
                assert phases[-1] == "finished"
                seen = [await anext(events)]
                while seen[-1].data.get("state") != "done":
                    seen.append(await anext(events))
        numbers = [event.id for event in seen]
        assert numbers == sorted(set(numbers))
        mine = [event.data for event in seen if event.commit == job.id]
        assert mine[0]["state"] == "queued"
        assert mine[-1]["outcome"]["action"] == "pivot"
        # What was followed over the restart is what the journal has.
        async with host.events(after=numbers[0] - 1) as all_of_them:
            async with asyncio.timeout(30):
                assert [await anext(all_of_them) for _ in seen] == seen
    assert_disk(chain.base, chain.pictures[-1])


async def _phases(job: qc.RemoteJob) -> list[str]:
    return [status.phase async for status in job.progress(0.05)]


async def test_a_commit_is_asked_for_while_the_daemon_is_replaced(folder: Path) -> None:
    chain = make_chain(folder)
    async with client_of(folder, chain) as (d, qemu, host):
        vm = host.vm("web1")
        for asked in range(1, 4):
            asking = asyncio.create_task(vm.commit("top", policy=qc.Hold()))
            for _ in range(asked - 1):
                await asyncio.sleep(0)
            await d.stop()
            await d.start()
            async with asyncio.timeout(60):
                job = await asking
                await job.ready()
                assert [each["id"] for each in await qemu.execute("query-jobs")] == [job.job_id]
                await job.abort()
            assert len(await host.commits()) == asked
    assert_disk(chain.top, chain.pictures[-1])


async def _to_the_end(events: Events) -> None:
    """What has happened already may be told of first."""
    async for _ in events:
        pass


async def test_a_daemon_that_stays_away_is_told_of(folder: Path) -> None:
    chain = make_chain(folder)
    async with client_of(folder, chain, patience=0.3) as (d, _, host):
        job = await host.vm("web1").commit("top", policy=qc.Hold())
        await job.ready()
        following = host.events(commit=job.id)
        await following.__aenter__()
        waiting = [asyncio.create_task(job.wait()), asyncio.create_task(_to_the_end(following))]
        await d.stop()
        for task in waiting:
            with pytest.raises(qc.DaemonLost, match="goes on"):
                await task
        await following.aclose()
        with pytest.raises(qc.DaemonLost):
            await job.pivot()
        with pytest.raises(qc.DaemonUnreachable) as away:
            await qc.Client(d.socket).open()
        assert away.value.address == d.socket
        await d.start()
        await job.pivot()
        assert (await job.wait()).action == "pivot"
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_client_that_dies_leaves_its_commit_with_the_daemon(folder: Path) -> None:
    chain = make_chain(folder)
    async with client_of(folder, chain) as (d, _, host):
        async with qc.Client(d.socket) as other:
            job = await other.vm("web1").commit("top", policy=qc.Hold())
            waiting = asyncio.create_task(job.wait())
            await job.ready()
            await job.detach()
            with pytest.raises(qc.DaemonLost, match=job.id):
                await waiting
        taken_up = await host.commit(job.id)
        await taken_up.keep()
        assert (await taken_up.wait()).action == "keep"
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


# -- lost replies ----------------------------------------------------------------------------------


async def _message(reader: asyncio.StreamReader) -> bytes:
    """One HTTP request or answer whose length is said."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.partition(b":")[2]))
    return head


@asynccontextmanager
async def lossy(folder: Path, target: str, lose: Callable[[bytes], bool]) -> AsyncIterator[str]:
    """A socket before the daemon's that passes requests on, and cuts before some answers."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        answers, theirs = await asyncio.open_unix_connection(target)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    request = await _message(reader)
                    theirs.write(request)
                    answer = await _message(answers)
                    if lose(request):
                        return
                    writer.write(answer)
                    await writer.drain()
        finally:
            for side in (writer, theirs):
                side.transport.abort()
            tasks.discard(task)

    path = str(folder / "lossy")
    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(set(tasks))
        await server.wait_closed()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_lost_reply_is_asked_for_again_and_starts_nothing_twice(
    times: int, folder: Path
) -> None:
    chain = make_chain(folder)
    left = {b"/commits ": times, b"/decision ": times, b"DELETE ": times}

    def lose(request: bytes) -> bool:
        line = request.partition(b"HTTP")[0]
        for part, times_left in left.items():
            if part in line and line.startswith((b"POST", b"DELETE")) and times_left:
                left[part] -= 1
                return True
        return False

    async with client_of(folder, chain) as (d, qemu, host), lossy(folder, d.socket, lose) as path:
        async with qc.Client(path) as through:
            job = await through.vm("web1").commit("top", policy=qc.Hold())
            await job.ready()
            assert [each["id"] for each in await qemu.execute("query-jobs")] == [job.job_id]
            await job.pivot()
            assert (await job.wait()).action == "pivot"
            assert [each.id for each in await host.commits()] == [job.id]
            await through.add_vm("web2", f"{folder}/nothing")
            await through.remove_vm("web2")
        assert not any(left.values())
        assert [vm.name for vm in await host.vms()] == ["web1"]
    assert_disk(chain.base, chain.pictures[-1])


async def test_an_idempotency_key_of_the_callers_own(folder: Path) -> None:
    chain = make_chain(folder)
    async with client_of(folder, chain) as (d, _, host):
        vm = host.vm("web1")
        first = await vm.commit("top", policy=qc.Keep(), idempotency_key="mine")
        await first.wait()
        await d.stop()
        await d.start()
        again = await vm.commit("top", policy=qc.Keep(), idempotency_key="mine")
        assert (again.id, again.done) == (first.id, True)
        with pytest.raises(qc.KeyReused):
            await vm.commit("top", policy=qc.Pivot(), idempotency_key="mine")
        assert len(await host.commits()) == 1
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_request_that_is_cancelled_leaves_no_commit(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with client_of(folder, chain) as (_, qemu, host):
        vm = host.vm("web1")
        for rounds in range(12):
            asking = asyncio.create_task(vm.commit("top", policy=qc.Pivot(), bandwidth="1MiB"))
            for _ in range(rounds * 3):
                await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            for job in await host.commits():
                with suppress(qc.CommitFailed):
                    assert (await job.wait()).action == "abort"
        assert await qemu.execute("query-jobs") == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_cancelled_request_to_a_daemon_that_hangs_says_that_it_is_not_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpcommit.client.taking_back.TAKING_BACK", 0.2)
    chain = make_chain(folder)
    async with client_of(folder, chain) as (d, _, host):
        assert d.process is not None
        d.process.send_signal(signal.SIGSTOP)
        asking = asyncio.create_task(host.vm("web1").commit("top", policy=qc.Keep()))
        await asyncio.sleep(0)  # it is under way
        asking.cancel()
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await asking
        assert isinstance(cancelled.value.__cause__, qc.DaemonLost)
        d.process.send_signal(signal.SIGCONT)
        for job in await host.commits():
            await job.wait()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_queued_commit_is_cancelled(folder: Path) -> None:
    chain = make_chain(folder)
    other = folder / "other"
    other.mkdir()
    second = make_chain(other)
    config = f'[limits]\ncommits = 1\n[[vm]]\nname = "web2"\nqmp = "{other}/qmp"\n'
    async with storage_daemon(other, second), client_of(folder, chain, config) as (d, _, host):
        await d.connected("web2")
        first = await host.vm("web1").commit("top", policy=qc.Hold())
        await first.ready()
        queued = await host.vm("web2").commit("top", policy=qc.Pivot())
        assert (queued.state, queued.phase, queued.view.position) == ("queued", "queued", 1)
        with pytest.raises(qc.NotReady):
            await queued.keep()
        phases = asyncio.create_task(_phases(queued))
        await queued.cancel()
        for waiting in (queued.wait, queued.ready):
            with pytest.raises(qc.CommitFailed, match="Nothing was sent"):
                await waiting()
        assert (await phases)[-1] == "finished"
        await first.keep()
        assert (await first.wait()).action == "keep"
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(second.base, second.pictures[0])
    assert_disk(second.top, second.pictures[-1])


# -- access ----------------------------------------------------------------------------------------


async def test_over_tcp_with_a_token(folder: Path, free_port: int) -> None:
    token = "0123456789abcdef"
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    listen = f'[listen]\ntcp = "127.0.0.1:{free_port}"\ntoken_file = "{folder}/token"\n'
    async with daemon(folder, listen):
        address = f"tcp:127.0.0.1:{free_port}"
        async with qc.Client(address, token=token) as host:
            assert await host.vms() == []
        for wrong in (None, "wrong"):
            with pytest.raises(qc.DaemonError, match="token") as refused:
                await qc.Client(address, token=wrong).open()
            assert refused.value.status == 401


async def test_what_is_no_daemon(folder: Path) -> None:
    answers = [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"",
    ]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[0])
        writer.close()
        await writer.wait_closed()

    path = str(folder / "other")
    async with await asyncio.start_unix_server(serve, path):
        for kind in (qc.DaemonError, qc.DaemonError, qc.DaemonUnreachable, qc.DaemonUnreachable):
            client = qc.Client(path)
            with pytest.raises(kind):
                await client.open()
            await client.close()
            answers.pop(0)
    for wrong in ("", "tcp:nowhere", "/" + "x" * 200):
        with pytest.raises(qc.InvalidRequest, match="daemon"):
            qc.Client(wrong)
    if os.geteuid():
        os.chmod(path, 0)
        with pytest.raises(qc.DaemonUnreachable, match="group"):
            await qc.Client(path).open()


# -- the example -----------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [False, True], ids=["its own", "one that it finds"])
async def test_the_example(found: bool, folder: Path) -> None:
    chain = make_chain(folder)
    async with client_of(folder, chain) as (d, _, host):
        if found:
            job = await host.vm("web1").commit("top", policy=qc.Hold())
            await job.ready()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(ROOT / "examples" / "daemon_client.py")),
            *(d.socket, "web1", "top", "keep" if found else "pivot"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=ENVIRONMENT,
        )
        said = await end(process)
        assert (said.status, said.err) == (0, "")
        assert "top of web1 is READY" in said.out
        assert ": done finished" in said.out
        assert f"now writes to {chain.top if found else chain.base}" in said.out
        (job,) = await host.commits()
        assert (await job.wait()).action == ("keep" if found else "pivot")
    assert_disk(chain.base, chain.pictures[-1])


# -- without a daemon ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_server_sent_events_in_pieces(size: int) -> None:
    text = (
        b": hello\nid: 4\n\n: still here\n\n"
        b"id: 5\nevent: commit\ndata: {\"a\":\ndata: 1}\n\n"
        b"event: vm\r\nid: 7\r\ndata:x\r\n\r\n"
        b"id: 8\nevent: cut"
    )  # fmt: skip
    parser, found = Parser(), []
    for at in range(0, len(text), size):
        found += parser.feed(text[at : at + size])
    assert found == [Message("5", "commit", '{"a":\n1}'), Message("7", "vm", "x")]
    assert json.loads(found[0].data) == {"a": 1}
    assert parser.last == "8"
