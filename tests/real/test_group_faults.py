"""A group commit that something happens to: all disks end the same way, or it is said which."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import ENVIRONMENT, run
from tests.ground.daemons import many_disks
from tests.ground.images import MIB, Chain, assert_disk, make_chain, two_chains
from tests.ground.machines import Machine, machine
from tests.ground.nbd import Nbd
from tests.ground.proxy import Strike, let_pass, proxy
from tests.ground.sessions import lost

TWO = ["top", "top2"]


async def active(vm: qc.Session, *disks: str) -> list[str]:
    """The node that each NBD export of that name uses."""
    nodes = {e["id"]: e["node-name"] for e in await vm.execute("query-block-exports")}
    return [nodes[f"export{number}"] for number, _ in enumerate(disks)]


def base_over(chain: Chain, options: str) -> list[str]:
    """``--blockdev`` options for a chain whose base's file is reached through another node."""
    base, top = chain.base, chain.top
    return [
        *("--blockdev", f"driver=file,node-name={base.stem}-file,filename={base}"),
        *("--blockdev", options.format(file=f"{base.stem}-file")),
        *("--blockdev", f"driver=qcow2,node-name={base.stem},file={base.stem}-slow"),
        *("--blockdev", f"driver=qcow2,node-name={top.stem},file.driver=file,"
          f"file.filename={top},backing={base.stem}"),
    ]  # fmt: skip


@asynccontextmanager
async def one_is_special(
    folder: Path, chains: tuple[Chain, Chain], options: str, objects: Sequence[str] = ()
) -> AsyncIterator[Machine]:
    """A daemon with both chains, the second of which has `options` under its base."""
    nodes = [*objects, *base_over(chains[1], options)]
    exports = ["--export", "nbd,id=export1,node-name=top2,name=top2,writable=on"]
    async with many_disks(folder / "a", chains[0], nodes=nodes, late=exports) as qemu:
        yield qemu


async def all_ready(group: qc.GroupCommit) -> None:
    await group.start()
    await group.ready()


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep()], ids=lambda p: p.kind)
async def test_a_base_that_fails_after_ready(policy: Any, folder: Path) -> None:
    chains = two_chains(folder, fmt="qcow2")
    # The error comes with the flush that follows the first write after READY.
    rule = (
        "driver=blkdebug,node-name=base2-slow,image={file},"
        "inject-error.0.event=flush_to_disk,inject-error.0.errno=5,inject-error.0.state=2,"
        "set-state.0.event=flush_to_disk,set-state.0.state=1,set-state.0.new_state=2"
    )
    async with (
        one_is_special(folder, chains, rule) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        await Nbd.connect(qemu.nbd, "top") as one,
        await Nbd.connect(qemu.nbd, "top2") as two,
    ):
        group = qc.GroupCommit([(vm, disk) for disk in TWO], policy=qc.Hold())
        await all_ready(group)
        for client, chain in ((one, chains[0]), (two, chains[1])):
            await client.write(5 * MIB, b"after READY " * 100)
            chain.pictures[-1].write(5 * MIB, b"after READY " * 100)
        getattr(group, policy.kind)()
        with pytest.raises(qc.GroupFailed) as failed:
            await group.wait()
        error = failed.value
        assert not isinstance(error, qc.GroupSplit)
        assert (error.disk, error.error) == ("top2", "Input/output error")
        assert "Input/output error" in error.message
        first, second = error.outcomes
        assert (first["action"], first["decided_by"]) == ("abort", "group")
        assert (second["disk"], second["error"]["type"]) == ("top2", "CommitFailed")  # type: ignore[index]
        assert await active(vm, *TWO) == TWO
        assert await vm.execute("query-jobs") == []
        await one.write(6 * MIB, b"goes on")
        chains[0].pictures[-1].write(6 * MIB, b"goes on")
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_base_that_fails_while_copying(folder: Path) -> None:
    chains = two_chains(folder)
    rule = "driver=blkdebug,node-name=base2-slow,image={file},inject-error.0.event=write_aio"
    async with one_is_special(folder, chains, rule) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.GroupFailed, match="top2"):
            await vm.commit_group(TWO, policy=qc.Pivot())
        job = await vm.commit("top2", policy=qc.Hold())
        with pytest.raises(qc.CommitFailed, match="Input/output error"):
            await job.ready()
        with pytest.raises(qc.GroupFailed, match=r"top2 .*Input/output error"):
            await all_ready(qc.GroupCommit([(vm, disk) for disk in TWO], policy=qc.Hold()))
        assert await active(vm, *TWO) == TWO
        await vm.close()
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep()], ids=lambda p: p.kind)
async def test_a_hold_over_its_limit(policy: Any, folder: Path) -> None:
    """One disk has much to flush and its base is slow: the other is not held for it."""
    chains = two_chains(folder)
    slow = ["--object", "throttle-group,id=tg,x-bps-total=1048576,x-bps-total-max=16777216"]
    rule = "driver=throttle,node-name=base2-slow,throttle-group=tg,file={file}"
    async with (
        one_is_special(folder, chains, rule, slow) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        await Nbd.connect(qemu.nbd, "top") as one,
        await Nbd.connect(qemu.nbd, "top2") as two,
    ):
        group = qc.GroupCommit([(vm, disk) for disk in TWO], policy=qc.Hold(), hold_limit=0.3)
        await all_ready(group)
        for place in range(24):
            await two.write(place * MIB, bytes([place + 1]) * MIB)
            chains[1].pictures[-1].fill(place * MIB, MIB, place + 1)
        with vm.events("BLOCK_JOB_PENDING") as pending:
            getattr(group, policy.kind)()
            await anext(pending)
            write = asyncio.create_task(one.write(7 * MIB, b"held"))
            with pytest.raises(qc.GroupFailed, match=r"top2 .* held within 0.3 s"):
                await group.wait()
            await write
            chains[0].pictures[-1].write(7 * MIB, b"held")
        assert await active(vm, *TWO) == TWO
        assert await vm.execute("query-jobs") == []
        held = group.jobs[0].outcome
        assert held is not None
        assert held.held is not None
        assert held.held >= 0.29
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@asynccontextmanager
async def two_daemons(folder: Path, chains: tuple[Chain, Chain]) -> AsyncIterator[Any]:
    async with (
        many_disks(folder / "a", chains[0]) as one,
        many_disks(folder / "b", chains[1]) as two,
        proxy(folder, two.qmp) as between,
        qc.Session.connect(one.qmp, name="one") as vm1,
        qc.Session.connect(between.path, name="two", patience=3) as vm2,
    ):
        yield one, two, between, [(vm1, "top"), (vm2, "top2")]


async def test_a_qemu_that_dies_before_the_first_finalize(folder: Path) -> None:
    chains = two_chains(folder)
    async with two_daemons(folder, chains) as (one, two, between, members):

        def kill(message: dict[str, Any]) -> str:
            if message.get("data", {}).get("status") != "pending":
                return "pass"
            two.signal(signal.SIGKILL)
            Path(between.path).unlink(missing_ok=True)
            return "cut"

        between.to_client = kill
        with pytest.raises(qc.GroupFailed) as failed:
            await qc.commit_group(members, policy=qc.Pivot())
        assert not isinstance(failed.value, qc.GroupSplit)
        assert failed.value.outcomes[1]["error"]["type"] == "VMGone"  # type: ignore[index]
        assert failed.value.outcomes[1]["error"]["pivoted"] is False  # type: ignore[index]
        assert await active(members[0][0], "top") == ["top"]
        await members[0][0].close()
        await one.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep()], ids=lambda p: p.kind)
async def test_a_qemu_that_dies_after_the_decision_is_told(policy: Any, folder: Path) -> None:
    chains = two_chains(folder)
    async with two_daemons(folder, chains) as (one, two, between, members):
        vm2 = members[1][0]

        async def decided(jobs: Sequence[str]) -> None:
            assert [job.rsplit(".")[-1] for job in jobs] == ["1of2", "2of2"]
            two.signal(signal.SIGKILL)
            await between.refuse()
            await lost(vm2)

        with pytest.raises(qc.GroupSplit) as split:
            await qc.commit_group(members, policy=policy, on_decision=decided)
        error = split.value
        assert error.unknown == []
        done, left = (
            (error.pivoted, error.not_pivoted)
            if policy.kind == "pivot"
            else (error.kept, error.not_kept)
        )
        assert (done, left) == (["top of one"], ["top2 of two"])
        assert error.outcomes[0]["action"] == policy.kind
        await members[0][0].close()
        await one.quit()
    assert_disk(chains[0].base, chains[0].pictures[-1])
    assert_disk(chains[1].top, chains[1].pictures[-1])


async def test_a_finalize_whose_reply_is_lost_with_its_qemu(folder: Path) -> None:
    """Whether it was carried out can't be known from here, and that is what is said."""
    chains = two_chains(folder)
    async with two_daemons(folder, chains) as (one, two, between, members):

        def kill(message: dict[str, Any]) -> str:
            if message.get("execute") != "job-finalize":
                return "pass"
            two.signal(signal.SIGKILL)
            Path(between.path).unlink(missing_ok=True)
            return "cut"

        between.to_qemu = kill
        with pytest.raises(qc.GroupSplit) as split:
            await qc.commit_group(members, policy=qc.Pivot())
        assert (split.value.pivoted, split.value.unknown) == (["top of one"], ["top2 of two"])
        assert "compare" in str(split.value.outcomes[1]["error"]["message"])  # type: ignore[index]
        await members[0][0].close()
        await one.quit()
    assert_disk(chains[0].base, chains[0].pictures[-1])
    assert_disk(chains[1].top, chains[1].pictures[-1])


async def test_a_monitor_that_is_lost_after_the_decision_comes_back(folder: Path) -> None:
    chains = two_chains(folder)
    async with two_daemons(folder, chains) as (one, two, between, members):
        between.to_qemu = cut = Strike("job-finalize", "cut", times=1)
        outcome = await qc.commit_group(members, policy=qc.Pivot())
        assert (outcome.action, cut.met) == ("pivot", 1)
        for vm, _ in members:
            await vm.close()
        await one.quit()
        await two.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


async def test_a_decision_that_can_not_be_written_down_is_none(folder: Path) -> None:
    chains = two_chains(folder)

    async def full(jobs: Sequence[str]) -> None:
        raise OSError("the journal is full")

    async with many_disks(folder / "a", *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.GroupFailed, match="journal is full"):
            await vm.commit_group(TWO, policy=qc.Pivot(), on_decision=full)
        assert await active(vm, *TWO) == TWO
        assert await vm.execute("query-jobs") == []


async def test_one_that_is_taken_for_left_behind_before_that_is_written_down_undoes_all(
    folder: Path,
) -> None:
    """As by a daemon that connects just then, and sees a held disk whose owner it does not know."""
    places = [folder / "1", folder / "2"]
    for place in places:
        place.mkdir()
    chains = [make_chain(place) for place in places]
    async with (
        machine(places[0], chains[0]) as one,
        machine(places[1], chains[1]) as two,
        qc.Session.connect(one.qmp) as first,
        qc.Session.connect(two.qmp) as second,
    ):

        async def slow(jobs: Sequence[str]) -> None:
            async with qc.Session.connect(one.qmp2) as other:
                (ended,) = await qc.resolve_pending(other, grace=0)
                assert (ended.job_id, ended.action) == (jobs[0], "abort")

        members = [(first, "vda"), (second, "vda")]
        with pytest.raises(qc.GroupFailed, match="it ended before any was finalized"):
            await qc.commit_group(members, policy=qc.Pivot(), on_decision=slow)
        for vm in (first, second):
            assert [len(disk.chain) for disk in await vm.disks()] == [2]
            assert await vm.execute("query-jobs") == []
            await vm.close()
        await one.quit()
        await two.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


class Countdown:
    """A proxy's hook that cancels a task at the n-th message from QEMU."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, message: dict[str, Any]) -> str:
        if self.task is not None:
            self.left -= 1
            if self.left == 0:
                self.task.cancel()
        return "pass"


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep()], ids=lambda p: p.kind)
async def test_a_cancellation_at_any_message(policy: Any, folder: Path) -> None:
    """Whatever came last, all disks stand on one side, none is held, and no job is left."""
    chains = two_chains(folder)
    sides = []
    async with (
        many_disks(folder / "a", *chains) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path) as vm,
    ):
        clients = [await Nbd.connect(qemu.nbd, disk) for disk in TWO]
        for messages in range(1, 100):
            between.to_client = countdown = Countdown(messages)
            countdown.task = asyncio.create_task(vm.commit_group(TWO, policy=policy))
            await asyncio.wait({countdown.task})
            between.to_client = let_pass
            assert await jobs(vm) == []
            sides.append(await active(vm, *TWO))
            assert sides[-1] in (TWO, ["base", "base2"])
            for client, chain in zip(clients, chains, strict=True):
                text = f"writes after {messages} ".encode()
                await client.write(9 * MIB, text)
                chain.pictures[-1].write(9 * MIB, text)
            if sides[-1] != TWO or not countdown.task.cancelled():
                break
        assert len(sides) > 20
        if policy.kind == "pivot":
            assert sides[-1] == ["base", "base2"]
        for client in clients:
            await client.flush()
            await client.close()
        await vm.close()
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base if policy.kind == "pivot" else chain.top, chain.pictures[-1])


KILLED = """
import asyncio, os, signal, sys
import qmpcommit as qc

async def decided(jobs):
    os.kill(os.getpid(), signal.SIGKILL)

members = [(sys.argv[1], "top"), (sys.argv[1], "top2")]
asyncio.run(qc.commit_group(members, policy=qc.Pivot(), on_decision=decided))
"""


@asynccontextmanager
async def left_pending(
    folder: Path, chains: tuple[Chain, Chain]
) -> AsyncIterator[tuple[Machine, Nbd]]:
    """Two jobs whose client was killed while it held their disks; and a guest of the first."""
    async with many_disks(folder / "a", *chains) as qemu:
        nbd = await Nbd.connect(qemu.nbd, "top")
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, qemu.qmp, env=ENVIRONMENT
        )
        assert await client.wait() == -signal.SIGKILL
        try:
            yield qemu, nbd
        finally:
            await nbd.close()


@pytest.mark.parametrize("finalize", [False, True])
async def test_what_a_killed_client_left_is_resolved(finalize: bool, folder: Path) -> None:
    chains = two_chains(folder)
    async with left_pending(folder, chains) as (qemu, nbd):
        async with qc.Session.connect(qemu.qmp) as vm:
            writing = asyncio.create_task(nbd.write(0, b"on"))
            held = [job["status"] for job in await vm.execute("query-jobs")]
            assert held == ["pending", "pending"]
            with pytest.raises(qc.JobConflict, match=r"left PENDING.*1 of 2 of group"):
                await vm.commit("top", policy=qc.Pivot())
            assert await qc.resolve_pending(vm, owned=[j["id"] for j in await jobs(vm)]) == []
            outcomes = await qc.resolve_pending(vm, finalize=finalize, grace=0.05)
            actions = {outcome.action for outcome in outcomes}
            assert (len(outcomes), actions) == (2, {"pivot" if finalize else "abort"})
            assert await active(vm, *TWO) == (["base", "base2"] if finalize else TWO)
            assert await jobs(vm) == []
            await writing
            await nbd.flush()
            chains[0].pictures[-1].write(0, b"on")
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base if finalize else chain.top, chain.pictures[-1])


async def jobs(vm: qc.Session) -> list[dict[str, Any]]:
    return list(await vm.execute("query-jobs"))


async def test_a_group_that_was_being_finalized_is_finalized_to_the_end(folder: Path) -> None:
    chains = two_chains(folder)
    async with left_pending(folder, chains) as (qemu, _), qc.Session.connect(qemu.qmp) as vm:
        first = (await jobs(vm))[0]["id"]
        with vm.events("BLOCK_JOB_COMPLETED") as ended:
            await vm.execute("job-finalize", {"id": first})
            await anext(ended)
        (outcome,) = await qc.resolve_pending(vm, grace=0)
        assert outcome.action == "pivot"
        assert await active(vm, *TWO) == ["base", "base2"]
        await vm.execute("job-dismiss", {"id": first})
        await vm.close()
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


async def test_the_command_names_what_was_left_and_ends_it(folder: Path) -> None:
    chains = two_chains(folder)
    async with left_pending(folder, chains) as (qemu, _):
        listed = (await run("jobs", qemu.qmp, "--json")).json["jobs"]
        assert len(listed) == 2
        listed.sort(key=lambda job: str(job["id"]))
        for job in listed:
            assert f"'qmpcommit recover {qemu.qmp}'" in job["next"]
            assert "of 2 of group" in job["next"]
        chain = await run("chain", qemu.qmp)
        assert listed[0]["id"] in chain.err
        assert (await run("chain", qemu.qmp, "--json")).json["pending"][1]["id"] == listed[1]["id"]
        refused = await run("commit", qemu.qmp, "top", "--pivot", "--json")
        assert "left PENDING" in refused.json["error"]["message"]
        undone = await run("abort", qemu.qmp, listed[0]["id"], "--json")
        assert (undone.status, undone.json["action"]) == (0, "abort")
        done = await run("pivot", qemu.qmp, listed[1]["id"], "--json")
        assert (done.status, done.json["action"]) == (0, "pivot")
        await qemu.quit()
    assert_disk(chains[0].top, chains[0].pictures[-1])
    assert_disk(chains[1].base, chains[1].pictures[-1])
