"""Requests that are given up while the journal is slow: what they began is done all the same."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemons import Daemon, daemon
from tests.ground.daemons import many_disks
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine

SLOW = '[limits]\nrequest_time = "500ms"\ncommits = 1\n'


@asynccontextmanager
async def host(folder: Path, more: str = "") -> AsyncIterator[tuple[Daemon, Machine, Chain]]:
    """A daemon and a VM with two disks, which are whole in the end."""
    chains = make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))
    async with (
        many_disks(folder / "qemu", *chains, exports=False) as qemu,
        daemon(folder, f'{SLOW}{more}\n[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        yield d, qemu, chains[0]
        assert '"bug"' not in d.log
        assert await d.stop() == 0
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@contextmanager
def locked(d: Daemon) -> Iterator[None]:
    """Nothing can be written to the journal, which waits."""
    with closing(sqlite3.connect(d.folder / "state" / "journal.db", isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        yield
        held.execute("ROLLBACK")


async def until(d: Daemon, path: str, **wanted: Any) -> Any:
    """Wait until what is there has these members."""
    async with asyncio.timeout(30):
        while True:
            found = (await d.get(path)).json
            if wanted.items() <= found.items():
                return found
            await asyncio.sleep(0.01)


async def test_a_window_is_opened_and_closed(folder: Path) -> None:
    asked = {"disks": ["top"], "lease": 600}
    async with host(folder) as (d, _, _):
        with locked(d):
            late = await d.post("/v1/vms/web1/windows", asked, Idempotency_Key="one")
            assert (late.status, late.json["title"]) == (503, "Too slow")
        async with asyncio.timeout(30):
            while not (windows := (await d.get("/v1/windows?state=open")).json):
                await asyncio.sleep(0.01)
        path = f"/v1/windows/{windows[0]['id']}"
        again = await d.post("/v1/vms/web1/windows", asked, Idempotency_Key="one")
        assert (again.status, again.json["id"]) == (201, windows[0]["id"])
        with locked(d):
            assert (await d.request("DELETE", path)).status == 503
        await until(d, path, state="done")
        commit = await d.commit("web1", disk="top", policy={"kind": "keep"})
        assert (await d.end_of(commit))["state"] == "done"


async def test_a_commit_is_decided(folder: Path) -> None:
    async with host(folder) as (d, _, chain):
        commit = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await d.until(commit, "ready")
        with locked(d):
            asked = d.post(f"/v1/commits/{commit}/decision", {"action": "pivot"})
            assert (await asked).status == 503
        assert (await d.end_of(commit))["outcome"]["action"] == "pivot"
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_group_is_decided(folder: Path) -> None:
    asked = {"members": [{"vm": "web1", "disk": "top"}], "policy": {"kind": "hold"}}
    async with host(folder) as (d, _, _):
        group = (await d.post("/v1/groups", asked)).json["id"]
        await until(d, f"/v1/groups/{group}", phase="ready")
        with locked(d):
            asked = {"action": "keep"}
            assert (await d.post(f"/v1/groups/{group}/decision", asked)).status == 503
        ended = await until(d, f"/v1/groups/{group}", state="done")
        assert ended["outcome"]["action"] == "keep"


async def test_a_queued_commit_is_cancelled_once(folder: Path) -> None:
    async with host(folder) as (d, _, _):
        first = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await d.until(first, "ready")
        second = await d.commit("web1", disk="top2", policy={"kind": "keep"})
        with locked(d):
            cancelling = [d.request("DELETE", f"/v1/commits/{second}") for _ in range(3)]
            assert {answer.status for answer in await asyncio.gather(*cancelling)} == {503}
        await until(d, f"/v1/commits/{second}", state="cancelled")
        with sqlite3.connect(d.folder / "state" / "journal.db") as journal:
            told = "SELECT count(*) FROM events WHERE commit_id = ? AND data LIKE '%cancelled%'"
            assert journal.execute(told, (second,)).fetchone() == (1,)
        await d.post(f"/v1/commits/{first}/decision", {"action": "keep"})
        assert (await d.end_of(first))["outcome"]["action"] == "keep"


async def test_a_round_is_run(folder: Path) -> None:
    cycle = (
        '[[cycle]]\nvm = "web1"\ndisk = "top"\nevery = "1h"\nkeep_if = ["true"]\nguest = "stop"\n'
    )
    async with host(folder, cycle) as (d, _, _):
        with locked(d):
            late = await d.post("/v1/vms/web1/cycles", {"disk": "top"}, Idempotency_Key="one")
            assert late.status == 503
        async with asyncio.timeout(30):
            while not (last := (await d.get("/v1/cycles")).json[0]["last"]):
                await asyncio.sleep(0.01)
        assert last["ended"]
        again = await d.post("/v1/vms/web1/cycles", {"disk": "top"}, Idempotency_Key="one")
        assert again.json["id"] == last["id"]


async def test_a_vm_is_forgotten_and_gets_no_commit_meanwhile(folder: Path) -> None:
    async with host(folder) as (d, qemu, _):
        assert (await d.post("/v1/vms", {"name": "web2", "qmp": qemu.qmp2})).status == 201
        await d.connected("web2")
        with locked(d):
            assert (await d.request("DELETE", "/v1/vms/web2")).status == 503
            asked = {"disk": "top", "policy": {"kind": "keep"}}
            assert (await d.post("/v1/vms/web2/commits", asked)).status == 404
        async with asyncio.timeout(30):
            while "web2" in [vm["name"] for vm in (await d.get("/v1/vms")).json]:
                await asyncio.sleep(0.01)
        assert 'vm="web2"' not in (await d.get("/metrics")).body.decode()
        assert (await d.get("/v1/commits")).json == []


async def test_a_vm_is_added_once(folder: Path) -> None:
    async with daemon(folder) as d:
        made = {}
        for name in ("a", "b", "c"):
            new = [{"name": name, "qmp": f"/run/{number}"} for number in range(8)]
            answers = await asyncio.gather(*(d.post("/v1/vms", each) for each in new))
            (made[name],) = [answer.json["qmp"] for answer in answers if answer.status == 201]
            assert {answer.status for answer in answers} == {201, 409}
        await d.kill()
        await d.start()
        assert {vm["name"]: vm["qmp"] for vm in (await d.get("/v1/vms")).json} == made


@pytest.mark.parametrize("kind", ["commits", "groups"])
async def test_of_two_decisions_one_counts(kind: str, folder: Path) -> None:
    asked = {"members": [{"vm": "web1", "disk": "top"}], "policy": {"kind": "hold"}}
    async with host(folder) as (d, _, _):
        if kind == "groups":
            path = f"/v1/groups/{(await d.post('/v1/groups', asked)).json['id']}"
        else:
            path = f"/v1/commits/{await d.commit('web1', disk='top', policy={'kind': 'hold'})}"
        await until(d, path, phase="ready")
        with locked(d):
            for action in ("keep", "pivot"):
                late = await d.post(f"{path}/decision", {"action": action})
                assert late.status == 503
        ended = await until(d, path, state="done")
        assert ended["outcome"]["action"] == "keep"
        with closing(sqlite3.connect(d.folder / "state" / "journal.db")) as journal:
            told = {
                "commits": "SELECT decision FROM commits",
                "groups": "SELECT json_extract(noted, '$.decision') FROM undertakings",
            }
            assert journal.execute(told[kind]).fetchall() == [("keep",)]
