"""Commits asked of the running daemon, on real storage daemons."""

from __future__ import annotations

from pathlib import Path

from tests.daemon.daemons import daemon
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon


async def test_a_pivot_over_http(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        ended = await d.end_of(await d.commit("web1", disk="top", policy={"kind": "pivot"}))
        assert ended["state"] == "done"
        assert ended["outcome"]["action"] == "pivot"
        assert ended["outcome"]["invalidated"] == [str(chain.top)]
        assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_disk_that_is_not_there_is_refused_before_it_is_promised(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        answer = await d.post("/v1/vms/web1/commits", {"disk": "x", "policy": {"kind": "pivot"}})
        assert answer.status == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json["error"]["candidates"]
        answer = await d.post("/v1/vms/web1/commits", {"disk": "top"})
        assert answer.status == 422
        assert answer.json["type"] == "urn:qmpcommit:PolicyRequired"
        assert (await d.get("/v1/commits")).json == []


async def test_a_plan_sends_nothing_and_a_phase_can_be_waited_for(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        asked = {"disk": "top", "policy": {"kind": "hold"}}
        plan = (await d.post("/v1/vms/web1/plans", asked)).json
        assert (plan["vm"], plan["top"]["filename"]) == ("web1", str(chain.top))
        assert {finding["name"] for finding in plan["findings"]} >= {"free-space"}
        assert (await d.get("/v1/commits")).json == []
        assert await qemu.execute("query-jobs") == []
        commit = await d.commit("web1", **asked)
        seen = []
        phase = ""
        while phase != "ready":
            phase = (await d.get(f"/v1/commits/{commit}?wait=20&phase={phase}")).json["phase"]
            seen.append(phase)
        assert seen == sorted(set(seen), key=["", "starting", "copying", "ready"].index)
        await d.post(f"/v1/commits/{commit}/decision", {"action": "pivot"})
        assert (await d.end_of(commit))["outcome"]["action"] == "pivot"
        assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])
