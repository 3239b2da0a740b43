"""Jobs are steered, and overlays laid that stay, through the daemon and its client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import run
from tests.daemon.test_client import client_of
from tests.ground.images import MIB, assert_disk, make_chain
from tests.ground.machines import Machine
from tests.hostile.test_rights import house

BULK = 33 * MIB  # more than a speed limit lets through at once


async def shown(qemu: Machine) -> dict[str, Any]:
    (job,) = await qemu.execute("query-block-jobs")
    assert isinstance(job, dict)
    return job


@pytest.mark.parametrize("by", ["command", "client"])
async def test_a_commit_is_steered(by: str, folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with client_of(folder, chain) as (d, qemu, host):
        vm = host.vm("web1")
        job = await vm.commit("top", policy=qc.Hold(), bandwidth="1MiB")
        while not await vm.jobs():
            await asyncio.sleep(0.01)

        async def steer(*words: str) -> dict[str, Any]:
            if by == "command":
                what, *speed = words
                said = await run(f"--daemon={d.socket}", what, "web1", job.job_id, *speed, "--json")
                assert said.status == 0, said.err
                return dict(said.json)
            if words[0] == "speed":
                return (await vm.set_bandwidth(job.job_id, words[1])).model_dump()
            return (
                await (vm.pause_job if words[0] == "pause" else vm.resume_job)(job.job_id)
            ).model_dump()

        now = await steer("speed", "2MiB")
        assert (now["speed"], (await shown(qemu))["speed"]) == (2 * MIB, 2 * MIB)
        now = await steer("pause")
        assert (now["paused"], now["changed"]) == (True, True)
        assert (await steer("pause"))["changed"] is False
        assert (await shown(qemu))["paused"] is True
        assert (await steer("resume"))["paused"] is False
        await steer("speed", "0")
        await job.ready()
        await job.keep()
        assert (await job.wait()).action == "keep"
        with pytest.raises(qc.JobNotFound, match="no block job 'nothing'"):
            await vm.pause_job("nothing")
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("by", ["command", "client"])
async def test_overlays_are_laid_that_stay(by: str, folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with client_of(folder, chain) as (d, _, host):
        vm = host.vm("web1")
        if by == "command":
            words = ("snapshot", "web1", "top", "--overlay", fresh, "--json")
            said = await run(f"--daemon={d.socket}", *words)
            assert said.status == 0, said.err
            (laid,) = said.json["disks"]
        else:
            snapshot = await vm.overlay(["top"], overlay=fresh)
            assert isinstance(snapshot.disks[0].overlay, str)
            laid = snapshot.disks[0].model_dump()
        assert (laid["overlay"], laid["filename"]) == (str(fresh), str(chain.top))
        assert [i.filename for i in (await vm.disks())[0].chain][:2] == [str(fresh), str(chain.top)]
        with pytest.raises(qc.QmpCommitError, match="exists already"):
            await vm.overlay([str(fresh)], overlay=fresh)
        assert (await (await vm.commit(str(fresh), policy=qc.Pivot(), shallow=True)).wait()).action
    assert_disk(chain.top, chain.pictures[-1])


async def test_rights_and_folders_count(folder: Path, free_port: int) -> None:
    access = f'overlays = ["{folder}/web1"]'
    async with house(folder, free_port, access) as h:
        for vm, who, status in (("web1", "reader", 403), ("db1", "webs", 404)):
            lay: dict[str, Any] = {"disks": ["top"]}
            assert (await h.ask(who, "POST", f"/v1/vms/{vm}/overlays", lay))[0] == status
            path = f"/v1/vms/{vm}/jobs/j/steering"
            assert (await h.ask(who, "POST", path, {"action": "pause"}))[0] == status
        (folder / "web1" / "out").symlink_to(folder / "db1")
        for place in (folder / "db1" / "x.qcow2", folder / "db1", folder / "web1" / "out"):
            lay = {"disks": ["top"], "overlay": str(place)}
            status, said = await h.ask("webs", "POST", "/v1/vms/web1/overlays", lay)
            assert (status, "may not be an overlay" in said["detail"]) == (422, True), said
        lay = {"disks": ["top"], "freeze": "agent", "agent": "/etc/passwd"}
        status, said = await h.ask("webs", "POST", "/v1/vms/web1/overlays", lay)
        assert (status, "may not be a guest agent's socket" in said["detail"]) == (422, True), said
        for wrong in ({"action": "speed"}, {"action": "pause", "bandwidth": 1}, {"action": "end"}):
            assert (await h.ask("webs", "POST", "/v1/vms/web1/jobs/j/steering", wrong))[0] == 422
        lay = {"disks": ["top"], "overlay": str(folder / "web1" / "x.qcow2")}
        assert (await h.ask("webs", "POST", "/v1/vms/web1/overlays", lay))[0] == 201


async def test_overlays_are_not_asked_for_again_where_the_answer_is_lost(folder: Path) -> None:
    asked: list[bytes] = []

    async def lose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"POST"):
            body = json.dumps({"status": "ok", "version": qc.__version__}).encode()
            head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(body) + body)
            await writer.drain()
        else:
            asked.append(head)
        writer.close()

    server = await asyncio.start_unix_server(lose, folder / "d.sock")
    async with server, qc.Client(folder / "d.sock", patience=5) as host:
        with pytest.raises(qc.DaemonLost, match="may have been done"):
            await host.vm("web1").overlay(["vda"])
    assert len(asked) == 1
