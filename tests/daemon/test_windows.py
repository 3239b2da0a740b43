"""Snapshot windows over the API: held open by a lease, closed when it ends, whatever happens."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import run as qmpcommit
from tests.daemon.daemons import Daemon, daemon
from tests.ground.images import MIB, Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.nbd import Nbd
from tests.ground.proxy import Strike, proxy

OTHERS = ("base2", "mid2", "low2", "top2")


@asynccontextmanager
async def host(
    folder: Path, *chains: Chain, config: str = "", guest: bool = False
) -> AsyncIterator[tuple[Daemon, Machine]]:
    """A daemon and a VM called web1: a machine that runs, or a storage daemon of one disk."""
    made = (
        machine(folder, *chains, style="implicit", running=True)
        if guest
        else storage_daemon(folder, chains[0], style="implicit")
    )
    async with made as vm:
        config = f'{config}\n[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n'
        async with daemon(folder, config) as d:
            await d.connected("web1")
            yield d, vm


async def opened(d: Daemon, key: str = "", **asked: Any) -> Any:
    """A window that is open."""
    headers = {"Idempotency_Key": key} if key else {}
    answer = await d.post("/v1/vms/web1/windows", asked, **headers)
    assert answer.status == 201, answer.body
    return answer.json


async def closed(d: Daemon, window: str) -> None:
    """Ask to close it."""
    answer = await d.request("DELETE", f"/v1/windows/{window}")
    assert answer.status == 202, answer.body


async def end_of(d: Daemon, window: str) -> Any:
    """How a window ended."""
    async with asyncio.timeout(60):
        while True:
            answer = await d.get(f"/v1/windows/{window}?wait=5")
            assert answer.status == 200, answer.body
            if answer.json["ended"]:
                return answer.json


def overlays(folder: Path) -> list[Path]:
    """The files of windows that are there."""
    return sorted(folder.rglob("*qmpcommit-window*"))


async def test_all_disks_stand_still_until_it_is_closed(folder: Path) -> None:
    chains = make_chain(folder), make_chain(folder, names=OTHERS)
    async with host(folder, *chains, guest=True) as (d, vm):
        window = await opened(d, disks=["vda", "vdb"], freeze="pause", lease=600)
        assert window["state"] == "open"
        assert window["quiesced"] > 0
        assert window["expires"] >= window["created"] + 600
        frozen = window["disks"]
        assert [frozen[f"vd{x}"]["filename"] for x in "ab"] == [str(c.top) for c in chains]
        assert overlays(folder) == sorted(Path(each["overlay"]) for each in frozen.values())
        for chain in chains:
            assert_disk(chain.top, chain.pictures[-1])
        metrics = (await d.get("/metrics")).body.decode()
        assert 'qmpcommit_windows{state="open"} 1.0' in metrics
        assert 'qmpcommit_window_age_seconds{disk="vdb",vm="web1"}' in metrics
        size = frozen["vda"]["size"]
        assert size > 0
        assert f'qmpcommit_window_overlay_bytes{{disk="vda",vm="web1"}} {float(size)}' in metrics
        assert (await d.get("/v1/windows?vm=web1&state=open")).json == [window]
        await closed(d, window["id"])
        ended = await end_of(d, window["id"])
        assert ended["state"] == "done", ended
        assert [outcome["action"] for outcome in ended["outcomes"]] == ["pivot", "pivot"]
        commits = [(await d.get(f"/v1/commits/{i}")).json["state"] for i in ended["commits"]]
        assert commits == ["done", "done"]
        assert overlays(folder) == []
        events = await told(d)
        assert [event["state"] for event in events] == ["opening", "open", "closing", "done"]
        assert (await vm.execute("query-status"))["status"] == "running"
        metrics = (await d.get("/metrics")).body.decode()
        assert "qmpcommit_window_age_seconds{" not in metrics
        await vm.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def told(d: Daemon) -> list[Any]:
    """The events of windows, from the journal."""
    with sqlite3.connect(d.folder / "state" / "journal.db") as journal:
        rows = journal.execute("SELECT data FROM events WHERE kind = 'window' ORDER BY id")
        return [json.loads(data) for (data,) in rows]


async def test_what_the_guest_writes_meanwhile_is_merged_when_the_lease_ends(folder: Path) -> None:
    chain = make_chain(folder)
    after = chain.pictures[-1].copy()
    async with host(folder, chain) as (d, vm):
        async with await Nbd.connect(vm.nbd, "top") as guest:
            window = await opened(d, disks=["top"], lease=600)
            await guest.write(5 * MIB, b"\xaa" * MIB)
            after.write(5 * MIB, b"\xaa" * MIB)
            assert_disk(chain.top, chain.pictures[-1])
            path = f"/v1/windows/{window['id']}"
            renewed = await d.post(f"{path}/lease", {"seconds": 900})
            assert renewed.status == 200
            assert renewed.json["expires"] > window["expires"] + 200
            again = await d.post(f"{path}/lease", {})
            assert again.json["expires"] < renewed.json["expires"] - 200
            await d.post(f"{path}/lease", {"seconds": 0.2})
            ended = await end_of(d, window["id"])
            assert ended["state"] == "done", ended
            late = await d.post(f"{path}/lease", {"seconds": 60})
            assert (late.status, late.json["type"]) == (409, "urn:qmpcommit:JobConflict")
            await guest.write(7 * MIB, b"\xbb" * MIB)
            after.write(7 * MIB, b"\xbb" * MIB)
        await vm.quit()
    assert_disk(chain.top, after)
    assert overlays(folder) == []


async def test_a_key_opens_one_window_whatever_happens(folder: Path) -> None:
    chain = make_chain(folder)
    async with host(folder, chain) as (d, vm):
        asked = {"disks": ["top"], "lease": 600}
        both = await asyncio.gather(opened(d, "k1", **asked), opened(d, "k1", **asked))
        assert both[0]["id"] == both[1]["id"]
        await d.kill()
        await d.start()
        await d.connected("web1")
        again = await d.post("/v1/vms/web1/windows", asked, Idempotency_Key="k1")
        assert (again.status, again.json["id"]) == (201, both[0]["id"])
        assert again.headers["idempotent-replay"] == "true"
        other = await d.post("/v1/vms/web1/windows", {"disks": ["base"]}, Idempotency_Key="k1")
        assert (other.status, other.json["type"]) == (422, "urn:qmpcommit:KeyReused")
        assert len((await d.get("/v1/windows")).json) == 1
        refused = await d.post("/v1/vms/web1/windows", asked, Idempotency_Key="k2")
        assert (refused.status, refused.json["type"]) == (404, "urn:qmpcommit:DiskNotFound")
        await closed(d, both[0]["id"])
        assert (await end_of(d, both[0]["id"]))["state"] == "done"
        late = await opened(d, "k2", **asked)  # what was refused has not used its key up
        await closed(d, late["id"])
        assert (await end_of(d, late["id"]))["state"] == "done"
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert overlays(folder) == []


async def test_what_can_not_be_opened_is_told(folder: Path) -> None:
    chain = make_chain(folder)
    async with host(folder, chain) as (d, vm):
        for asked, status, kind in [
            ({"disks": ["none"]}, 404, "DiskNotFound"),
            ({"disks": []}, 422, "InvalidRequest"),
            ({"disks": ["top"], "freeze": "agent"}, 422, "InvalidRequest"),
            ({"disks": ["top"], "lease": 86401}, 422, "InvalidRequest"),
            ({"disks": ["top"], "overlay_dir": "/does/not/exist"}, 409, "CommitFailed"),
        ]:
            answer = await d.post("/v1/vms/web1/windows", asked)
            told = (answer.status, answer.json["type"])
            assert told == (status, f"urn:qmpcommit:{kind}"), answer.json
        assert (await d.post("/v1/vms/none/windows", {"disks": ["top"]})).status == 404
        for method in ("GET", "DELETE"):
            answer = await d.request(method, "/v1/windows/0123")
            assert (answer.status, answer.json["type"]) == (404, "urn:qmpcommit:WindowNotFound")
        states = [window["state"] for window in (await d.get("/v1/windows")).json]
        assert set(states) == {"failed"}
        await vm.quit()
    assert overlays(folder) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_job_that_begins_at_the_same_instant_is_a_conflict(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as vm, proxy(folder, vm.qmp) as between:
        between.to_qemu = Strike("transaction", "hold")
        async with daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{between.path}"\n') as d:
            await d.connected("web1")
            opening = asyncio.create_task(d.post("/v1/vms/web1/windows", {"disks": ["top"]}))
            await between.held.wait()
            async with qc.Session.connect(vm.qmp2) as session:
                await session.execute("block-commit", {"job-id": "theirs", "device": "top"})
                job = await session.adopt("theirs")
                await job.ready()
                between.release()
                answer = await opening
                assert answer.status == 409, answer.json
                assert answer.json["type"] == "urn:qmpcommit:JobConflict"
                assert job.id in answer.json["detail"]
                await job.keep()
                await job.wait()
        await vm.quit()
    assert overlays(folder) == []
    assert_disk(chain.base, chain.pictures[-1])


async def test_one_that_nobody_here_opened_is_listed_and_can_be_closed(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain, style="implicit") as vm:
        async with qc.Session.connect(vm.qmp) as session:
            window = await session.open_window(["top"])
        limits = "[limits]\nwindow_size = 1\nwindow_age = 0.01\n"
        config = f'[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n{limits}'
        async with daemon(folder, config) as d:
            await d.connected("web1")
            (orphan,) = (await d.get("/v1/windows?vm=web1&state=orphan")).json
            assert (orphan["id"], orphan["vm"]) == (window.name, "web1")
            (disk,) = orphan["disks"].values()
            assert disk["overlay"] == window["top"].overlay
            assert (await d.get(f"/v1/windows/{window.name}")).json["state"] == "orphan"
            metrics = (await d.get("/metrics")).body.decode()
            assert 'qmpcommit_windows{state="orphan"} 1.0' in metrics
            assert f'qmpcommit_window_overlay_bytes{{disk="{disk["disk"]}",vm="web1"}}' in metrics
            assert '"orphan_window"' in d.log
            async with asyncio.timeout(30):
                while '"window_large"' not in d.log or '"window_old"' not in d.log:
                    await d.get("/healthz")
            answers = await asyncio.gather(
                *(d.request("DELETE", f"/v1/windows/{window.name}") for _ in range(3))
            )
            assert [answer.status for answer in answers] == [202] * 3
            assert len({answer.json["id"] for answer in answers}) == 1
            ended = await end_of(d, answers[0].json["id"])
            assert ended["state"] == "done", ended
            assert (await d.get("/v1/windows?state=orphan")).json == []
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert overlays(folder) == []


async def test_a_commit_that_another_client_began_on_it_is_left_alone_and_told(
    folder: Path,
) -> None:
    chain = make_chain(folder)
    async with host(folder, chain) as (d, vm):
        window = await opened(d, disks=["top"])
        async with qc.Session.connect(vm.qmp2) as session:
            (disk,) = window["disks"].values()
            nodes = {"device": disk["node_name"], "base-node": "top"}
            await session.execute("block-commit", {"job-id": "theirs", **nodes})
            job = await session.adopt("theirs")
            await job.ready()
            await closed(d, window["id"])
            ended = await end_of(d, window["id"])
            assert ended["state"] == "failed"
            assert "has a block job already: theirs" in ended["error"]["message"]
            assert "no instant's image" in ended["error"]["message"]
            await job.keep()
            assert (await job.wait()).action == "keep"
        answer = await d.request("DELETE", f"/v1/windows/{window['name']}")
        assert (await end_of(d, answer.json["id"]))["state"] == "done"
        await vm.quit()
    assert overlays(folder) == []
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_its_lease_goes_on_over_a_restart(folder: Path, how: str) -> None:
    chain = make_chain(folder)
    async with host(folder, chain) as (d, vm):
        window = await opened(d, disks=["top"], lease=600)
        await (d.kill() if how == "kill" else d.stop())
        await d.start()
        await d.connected("web1")
        again = (await d.get(f"/v1/windows/{window['id']}")).json
        assert again == window
        assert (await d.get("/v1/windows?state=orphan")).json == []
        await d.post(f"/v1/windows/{window['id']}/lease", {"seconds": 1})
        await d.kill()
        await d.start()
        assert (await end_of(d, window["id"]))["state"] == "done"
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert overlays(folder) == []


async def test_a_vm_that_comes_back_without_the_overlay_is_told_precisely(folder: Path) -> None:
    chain = make_chain(folder)
    config = f'[[vm]]\nname = "web1"\nqmp = "{folder}/qmp"\n'
    async with daemon(folder, config) as d:
        async with storage_daemon(folder, chain, style="implicit") as vm:
            await d.connected("web1")
            window = await opened(d, disks=["top"], lease=600)
            async with await Nbd.connect(vm.nbd, "top") as guest:
                await guest.write(5 * MIB, b"\xaa" * MIB)
            after = chain.pictures[-1].copy()
            after.write(5 * MIB, b"\xaa" * MIB)
            await vm.quit()
        overlay = Path(window["disks"]["top"]["overlay"])
        async with storage_daemon(folder, chain, style="implicit") as vm:
            await closed(d, window["id"])
            ended = await end_of(d, window["id"])
            assert ended["state"] == "failed"
            assert ended["error"]["overlays"] == [str(overlay)]
            assert "was started anew" in ended["error"]["message"]
            await vm.quit()
    assert_disk(overlay, after)
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_vm_that_comes_back_with_the_overlay_goes_on(folder: Path) -> None:
    chain = make_chain(folder)
    config = f'[[vm]]\nname = "web1"\nqmp = "{folder}/qmp"\n'
    async with daemon(folder, config) as d:
        async with storage_daemon(folder, chain, style="implicit") as vm:
            await d.connected("web1")
            window = await opened(d, disks=["top"], lease=600)
            async with await Nbd.connect(vm.nbd, "top") as guest:
                await guest.write(5 * MIB, b"\xaa" * MIB)
            await vm.quit()
        await closed(d, window["id"])
        overlay = Path(window["disks"]["top"]["overlay"])
        async with asyncio.timeout(30):
            while not (await d.get(f"/v1/windows/{window['id']}")).json["problem"]:
                pass
        grown = Chain([*chain.files, overlay], [])
        async with machine(folder, grown, style="drive", running=True) as vm:
            ended = await end_of(d, window["id"])
            assert ended["state"] == "done", ended
            await vm.quit()
    after = chain.pictures[-1].copy()
    after.write(5 * MIB, b"\xaa" * MIB)
    assert_disk(chain.top, after)
    assert overlays(folder) == []


async def test_a_vm_that_does_not_come_back_is_given_up(folder: Path) -> None:
    chain = make_chain(folder)
    config = f'[[vm]]\nname = "web1"\nqmp = "{folder}/qmp"\n[limits]\ngone_after = "300ms"\n'
    async with daemon(folder, config) as d:
        async with storage_daemon(folder, chain, style="implicit") as vm:
            await d.connected("web1")
            window = await opened(d, disks=["top"], lease=600)
            await vm.quit()
        assert (await d.get(f"/v1/windows/{window['id']}")).json["state"] == "open"
        await closed(d, window["id"])
        ended = await end_of(d, window["id"])
        overlay = window["disks"]["top"]["overlay"]
        assert ended["error"]["overlays"] == [overlay]
        assert "did not come back" in ended["error"]["message"]
    assert_disk(Path(overlay), chain.pictures[-1])


async def test_the_library_and_the_command_hold_one_open_through_the_daemon(folder: Path) -> None:
    chain = make_chain(folder)
    async with host(folder, chain, guest=True) as (d, vm):
        async with qc.Client(d.socket) as client:
            web1 = client.vm("web1")
            asked = {"detect-zeroes": "on"}
            opening = web1.snapshot(["vda"], freeze="pause", lease=3, overlay_options=asked)
            async with opening as window:
                (disk,) = await vm.execute("query-block")
                assert disk["inserted"]["detect_zeroes"] == "on"
                assert window["vda"].filename == str(chain.top)
                assert window.quiesced
                before = (await d.get("/v1/windows?state=open")).json[0]["expires"]
                async with asyncio.timeout(30):
                    while (await d.get("/v1/windows?state=open")).json[0]["expires"] == before:
                        pass
                assert_disk(chain.top, chain.pictures[-1])
            assert [outcome.action for outcome in window.outcomes] == ["pivot"]
            early = web1.snapshot(["vda"])
            await early.__aenter__()
            (seen,) = (await d.get("/v1/windows?state=open")).json
            await closed(d, seen["id"])
            with pytest.raises(qc.WindowError, match="closed before"):
                await early.__aexit__(None, None, None)
            with pytest.raises(qc.DiskNotFound):
                async with web1.snapshot(["none"]):
                    pass
        line = ("--daemon", d.socket, "window", "web1", "vda", "--json")
        said = await qmpcommit(*line, "--", "sh", "-c", f"cp {{vda}} {folder}/copy.qcow2; exit 7")
        assert said.status == 7, said.err
        assert said.json["outcomes"][0]["action"] == "pivot"
        assert_disk(folder / "copy.qcow2", chain.pictures[-1])
        assert (await qmpcommit("--daemon", d.socket, "window", "--close", "web1")).status == 2
        assert [w["state"] for w in (await d.get("/v1/windows?state=open")).json] == []
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert overlays(folder) == []
