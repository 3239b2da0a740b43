"""Groups of the daemon, from the client library and from the command."""

from __future__ import annotations

import asyncio
import signal
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import COMMAND, ENVIRONMENT, run
from tests.daemon.test_groups import served, until


async def test_the_client_commits_a_group_over_a_restart(folder: Path) -> None:
    async with served(folder, 1, 1) as (d, host):
        members: list[Any] = [(m["vm"], m["disk"]) for m in host.members]
        async with qc.Client(d.socket) as client:
            group = await client.commit_group(members, policy=qc.Hold())
            waiting = asyncio.create_task(group.wait())
            await until(d, group.id, "ready")
            with pytest.raises(qc.InvalidRequest, match="lives in this process"):
                await client.commit_group(members, policy=lambda ready: None)  # type: ignore[arg-type]
            await d.kill()
            await d.start()
            await until(d, group.id, "ready")
            await (await client.group(group.id)).pivot()
            outcome = await waiting
            assert (outcome.action, outcome.group) == ("pivot", group.id)
            with pytest.raises(qc.JobConflict):
                await group.abort()
            assert [each.id for each in await client.groups()] == [group.id]
            with pytest.raises(qc.CommitNotFound):
                await client.group("0123abcd")
            with pytest.raises(qc.DiskNotFound):
                await client.commit_group([("vm0", "nothing")], policy=qc.Keep())
        await host.ends_as("pivot")


async def test_a_request_that_is_given_up_leaves_no_group(folder: Path) -> None:
    async with served(folder, 2) as (d, host):
        async with qc.Client(d.socket) as client:
            members: list[Any] = [(client.vm(m["vm"]), m["disk"], qc.Hold()) for m in host.members]
            asking = asyncio.create_task(client.commit_group(members))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            for group in await client.groups():
                while not group.done:
                    await group.refresh()
                assert group.view.outcome is None or group.view.outcome.action == "abort"
        assert await host.jobs() == []
        await host.ends_as("abort")


@pytest.mark.parametrize("decision", ["pivot", "keep-overlay", "abort"])
async def test_the_command_is_as_without_a_daemon(decision: str, folder: Path) -> None:
    shown = []
    for through in (False, True):
        place = folder / str(through)
        place.mkdir()
        async with served(place, 1, 1) as (d, host):
            first, second = host.members
            names = [vm.qmp for vm in host.vms]
            words = []
            if through:
                words, names = [f"--daemon={d.socket}"], ["vm0", "vm1"]
            else:
                assert await d.stop() == 0  # QEMU serves one client a monitor
            said = await run(
                *words, "commit", names[0], first["disk"], "--and", names[1], second["disk"],
                f"--{decision}", "--json",
            )  # fmt: skip
            assert said.status == 0, said
            assert said.json["action"] == decision.removesuffix("-overlay")
            shown.append(_plain(said.json))
            assert await host.jobs() == []
            await host.ends_as(said.json["action"])
    assert shown[0] == shown[1]


def _plain(value: Any) -> Any:
    """What is the same from one run to the next: the members, and the words in them."""
    if isinstance(value, dict):
        words = ("status", "action", "disk", "decided_by", "hook", "converge", "node_name")
        return {name: each if name in words else _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return type(value).__name__


async def test_ctrl_c_has_the_daemon_cancel_all(folder: Path) -> None:
    async with served(folder, 2, bulk=24 << 20) as (d, host):
        words = [f"--daemon={d.socket}", "commit", "vm0", *(m["disk"] for m in host.members)]
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *words, "--pivot", "--bandwidth", "1MiB", stdout=PIPE, stderr=PIPE,
            env=ENVIRONMENT,
        )  # fmt: skip
        async with asyncio.timeout(30):
            while len(await host.jobs()) < 2:
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            _, err = await process.communicate()
        assert process.returncode == 130
        assert b"all jobs were cancelled; no disk was pivoted or kept" in err
        assert await host.jobs() == []
        await host.ends_as("abort")


async def test_a_disk_that_is_not_there(folder: Path) -> None:
    async with served(folder, 2) as (d, host):
        daemon = f"--daemon={d.socket}"
        disk = host.members[0]["disk"]
        said = await run(daemon, "commit", "vm0", disk, "nothing", "--pivot", "--json")
        assert (said.status, said.error["type"]) == (4, "DiskNotFound")
        said = await run(daemon, "commit", "vm0", disk, "v0d1", "--pivot", "--dry-run", "--json")
        assert said.status == 0
        assert len(said.json["plans"]) == 2
        assert await host.jobs() == []
        assert (await d.get("/v1/groups")).json == []
