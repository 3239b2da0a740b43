"""Rounds of the daemon's cycles through the library's client and the command, and the rules."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.client.cycle import begin
from tests.cli.command import end, run, start
from tests.daemon.daemons import Daemon
from tests.daemon.test_cycles import host
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine


@asynccontextmanager
async def gated(folder: Path) -> AsyncIterator[tuple[Daemon, Machine, Chain, Path]]:
    """A daemon whose `keep_if` waits until somebody opens this file for writing."""
    gate = folder / "gate"
    os.mkfifo(gate)
    command = f'["cat", "{gate}"]'
    chain = make_chain(folder)
    async with host(folder, chain, keep_if=command, timeout='"1h"') as (d, vm):
        yield d, vm, chain, gate


async def let_through(gate: Path) -> None:
    """Have the command say that the changes are kept."""
    (await asyncio.to_thread(gate.open, "wb")).close()


async def running(d: Daemon) -> str:
    """The id of the round that runs."""
    async with asyncio.timeout(30):
        while True:
            (shown,) = (await d.get("/v1/cycles")).json
            if shown["running"] is not None:
                return str(shown["running"]["id"])
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("keep", [True, False])
async def test_a_round_by_the_client(folder: Path, keep: bool) -> None:
    chain = make_chain(folder)
    answer = '["true"]' if keep else '["false"]'
    async with host(folder, chain, keep_if=answer, delete="true") as (d, vm):
        async with qc.Client(d.socket) as client:
            (before,) = await client.cycles()
            assert (before.cycle.vm, before.cycle.disk, before.cycle.every) == ("web1", "vda", 3600)
            assert (before.running, before.last, before.last_kept) == (None, None, None)
            ended = await client.vm("web1").cycle("vda")
            assert (ended.result, ended.state) == ("kept" if keep else "discarded", "done")
            assert [(each.vm, each.disk) for each in ended.disks] == [("web1", "vda")]
            assert (ended.disks[0].overlay, ended.disks[0].commit) == (ended.overlay, ended.commit)
            assert (ended.commit is not None) == keep
            (after,) = await client.cycles()
            assert (after.running, after.last) == (None, ended)
            assert (after.last_kept is not None) == keep
        await vm.quit()
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1 if keep else 0])
    assert ended.overlay is not None
    assert_disk(Path(ended.overlay), chain.pictures[-1 if keep else 0])


async def test_a_round_that_can_not_be_run_raises_the_librarys_errors(folder: Path) -> None:
    chain = make_chain(folder)
    async with host(folder, chain, keep_if='["no-such-command"]') as (d, vm):
        async with qc.Client(d.socket) as client:
            web1 = client.vm("web1")
            with pytest.raises(qc.CommitFailed, match="Nothing was changed") as failed:
                await web1.cycle("vda")
            assert (failed.value.vm, failed.value.disk) == ("web1", "vda")
            with pytest.raises(qc.InvalidRequest, match=r"no \[\[cycle\]\] for vdb"):
                await web1.cycle("vdb")
            with pytest.raises(qc.VMNotFound):
                await client.vm("web9").cycle("vda")
        await vm.quit()
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])


async def test_the_wait_goes_on_over_a_restart_and_never_runs_a_second_round(folder: Path) -> None:
    async with gated(folder) as (d, vm, chain, gate):
        async with qc.Client(d.socket) as client:
            web1 = client.vm("web1")
            waiting = asyncio.create_task(web1.cycle("vda", idempotency_key="once"))
            round_id = await running(d)
            with pytest.raises(qc.JobConflict):
                await web1.cycle("vda")
            await d.kill()
            await d.start()
            assert (await begin(web1, "vda", "once")).id == round_id
            while not waiting.done():  # the killed daemon's command waits there too
                with suppress(OSError):
                    os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
                await asyncio.sleep(0.01)  # nobody tells who waits at a gate
            ended = await waiting
            assert (ended.id, ended.result) == (round_id, "kept")
            assert await web1.cycle("vda", idempotency_key="once") == ended
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_round_is_waited_for_by_the_daemon(folder: Path) -> None:
    async with gated(folder) as (d, vm, chain, gate):
        answer = await d.post("/v1/vms/web1/cycles", {"disk": "vda"})
        path = f"/v1/cycles/{answer.json['id']}"
        assert (await d.get(f"{path}?wait=0.01")).json["ended"] is None
        assert (await d.get(f"{path}?wait=26")).status == 422
        waiting = asyncio.create_task(d.get(f"{path}?wait=25"))
        await let_through(gate)
        assert (await waiting).json["result"] == "kept"
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[-1])


async def test_the_rules_are_typed(folder: Path) -> None:
    chain = make_chain(folder, 2)
    async with host(folder, chain) as (d, vm):
        await d.stop()
        d.config += '[[flatten]]\nvm = "web*"\nkeep = 2\ndepth = 3\nevery = 0.1\n'
        await d.start()
        async with qc.Client(d.socket) as client, asyncio.timeout(30):
            while not (await client.rules())[0].disks:
                await asyncio.sleep(0.02)
            (rule,) = await client.rules()
        assert (rule.kind, rule.number, rule.rule.depth) == ("flatten", 0, 3)
        assert [(disk.vm, disk.disk, disk.layers) for disk in rule.disks] == [("web1", "vda", 2)]
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
async def test_a_round_by_the_command(folder: Path, keep: bool) -> None:
    chain = make_chain(folder)
    async with host(folder, chain, keep_if='["true"]' if keep else '["false"]') as (d, vm):
        said = await run(f"--daemon={d.socket}", "cycle", "web1", "vda", "--json")
        assert (said.status, said.err) == (0 if keep else 3, "")
        assert said.json["result"] == ("kept" if keep else "discarded")
        again = await run(f"--daemon={d.socket}", "cycle", "web1:vda")
        assert again.status == said.status
        assert again.out.startswith(f"{said.json['result']}: ")
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1 if keep else 0])
    assert_disk(Path(said.json["overlay"]), chain.pictures[-1 if keep else 0])


async def test_the_command_refuses_what_the_configuration_says(folder: Path) -> None:
    async with gated(folder) as (d, vm, _, _):
        through = f"--daemon={d.socket}"
        for more in (["--keep-if", "true"], ["--reset"], ["--delete"], ["--overlay", "/o"]):
            said = await run(through, "cycle", "web1", "vda", *more)
            assert (said.status, "[[cycle]]" in said.err) == (2, True), said
        for words in (["web1"], ["web1", "vda", "vdb"]):
            assert (await run(through, "cycle", *words)).status == 2
        assert (await run("cycle", vm.qmp2, "vda")).status == 2
        said = await run(through, "cycle", "web1", "vdb", "--json")
        assert (said.status, said.error["type"]) == (2, "InvalidRequest")
        said = await run(through, "cycle", "web9", "vda", "--json")
        assert (said.status, said.error["type"]) == (4, "VMNotFound")
        assert (await d.get("/v1/cycles")).json[0]["last"] is None
        await vm.quit()


async def test_ctrl_c_leaves_the_round_with_the_daemon(folder: Path) -> None:
    async with gated(folder) as (d, vm, chain, gate):
        process = await start(f"--daemon={d.socket}", "cycle", "web1", "vda", "--json")
        round_id = await running(d)
        process.send_signal(signal.SIGINT)
        said = await end(process)
        assert (said.status, said.error["type"]) == (130, "Interrupted")
        assert "goes on with it" in said.error["message"]
        late = await run(f"--daemon={d.socket}", "cycle", "web1", "vda", "--json")
        assert (late.status, late.error["type"]) == (1, "JobConflict")
        await let_through(gate)
        assert (await d.get(f"/v1/cycles/{round_id}?wait=25")).json["result"] == "kept"
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])
