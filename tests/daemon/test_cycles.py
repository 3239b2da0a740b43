"""Golden cycles: an overlay's changes go into the base, or are thrown away, round after round."""

from __future__ import annotations

import asyncio
import http.client
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.overlay.place import new_overlay
from qmpcommit.daemon.cycle_times import until_next
from qmpcommit.wire.cycle import Cycle
from tests.daemon.daemons import Daemon, daemon
from tests.daemon.kill_sweep import killable
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.places import chosen, told
from tests.ground.sessions import runs


def config_of(vm: Machine, name: str = "web1", **members: str) -> str:
    """A configuration with one VM, and a cycle for its vda."""
    given = {"keep_if": '["true"]', "guest": '"reset"', "every": '"1h"', "disk": '"vda"', **members}
    lines = "\n".join(f"{key} = {value}" for key, value in given.items())
    return f'[[vm]]\nname = "{name}"\nqmp = "{vm.qmp}"\n[[cycle]]\nvm = "{name}"\n{lines}\n'


@asynccontextmanager
async def host(folder: Path, chain: Chain, **members: str) -> AsyncIterator[tuple[Daemon, Machine]]:
    """A daemon with a cycle for the vda of web1, whose guest runs."""
    async with (
        machine(folder, chain, running=True) as vm,
        daemon(folder, config_of(vm, **members)) as d,
    ):
        await d.connected("web1")
        yield d, vm


async def ask(d: Daemon, vm: str = "web1", disk: str = "vda", **headers: str) -> str:
    """Ask for a round; its id."""
    answer = await d.post(f"/v1/vms/{vm}/cycles", {"disk": disk}, **headers)
    assert answer.status == 202, answer.body
    assert answer.headers["location"] == f"/v1/cycles/{answer.json['id']}"
    return str(answer.json["id"])


async def end_of(d: Daemon, round_id: str) -> Any:
    """Wait for a round's end."""
    async with asyncio.timeout(60):
        while True:
            seen = (await d.get(f"/v1/cycles/{round_id}")).json
            if seen["ended"]:
                return seen
            await asyncio.sleep(0.02)


async def layers(d: Daemon, vm: str = "web1") -> list[Path]:
    """The files of the only disk's chain, active layer first."""
    (disk,) = (await d.get(f"/v1/vms/{vm}/disks")).json
    return [Path(image["filename"]) for image in disk["chain"]]


async def test_changes_that_deserve_it_go_into_the_base(folder: Path) -> None:
    chain = make_chain(folder, 2)
    seen = folder / "seen"
    command = f"""["sh", "-c", "echo $QMPCOMMIT_VM $QMPCOMMIT_DISK $QMPCOMMIT_TOP > {seen}"]"""
    async with host(folder, chain, keep_if=command, delete="true") as (d, vm):
        ended = await end_of(d, await ask(d))
        assert (ended["state"], ended["result"]) == ("done", "kept")
        assert (await d.get(f"/v1/commits/{ended['commit']}")).json["outcome"][
            "action"
        ] == "recycle"
        active, base = await layers(d)
        assert await runs(vm)
        (shown,) = (await d.get("/v1/cycles")).json
        metrics = (await d.get("/metrics")).body.decode()
        await vm.quit()
    assert seen.read_text().split() == ["web1", "vda", str(chain.top)]
    assert (shown["running"], shown["last"]["id"]) == (None, ended["id"])
    assert shown["last_kept"] >= ended["created"]
    assert 'qmpcommit_cycle_rounds_total{disk="vda",result="kept",vm="web1"} 1.0' in metrics
    assert "qmpcommit_cycle_kept_age_seconds" in metrics
    assert (str(active), base) == (ended["overlay"], chain.base)
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(active, chain.pictures[-1])


@pytest.mark.parametrize("delete", [True, False])
async def test_changes_that_do_not_are_thrown_away(folder: Path, delete: bool) -> None:
    chain = make_chain(folder, 2)
    aside = folder / "aside"
    aside.mkdir()
    more = {"delete": str(delete).lower(), "overlay_dir": f'"{aside}"'}
    async with host(folder, chain, keep_if='["false"]', **more) as (d, vm):
        ended = await end_of(d, await ask(d))
        assert (ended["state"], ended["result"]) == ("done", "discarded")
        assert ended["warnings"] == []
        active, base = await layers(d)
        assert await runs(vm)
        (shown,) = (await d.get("/v1/cycles")).json
        await vm.quit()
    assert shown["last_kept"] is None
    assert (active.parent, base) == (aside, chain.base)
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(active, chain.pictures[0])
    assert chain.top.exists() is not delete
    if not delete:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_guest_stays_stopped_where_that_is_asked(folder: Path) -> None:
    chain = make_chain(folder, 2)
    async with host(folder, chain, keep_if='["false"]', guest='"stop"') as (d, vm):
        assert (await end_of(d, await ask(d)))["result"] == "discarded"
        assert (await vm.execute("query-status"))["status"] == "paused"
        active, _ = await layers(d)
        await vm.quit()
    assert_disk(active, chain.pictures[0])


NO_ANSWER = {
    '["no-such-command"]': "could not be run",
    '["sh", "-c", "exit 126"]': "status 126",
    '["sh", "-c", "kill -9 $$"]': "status -9",
    '["sleep", "1000"]': "longer than 0.2 s",
}


@pytest.mark.parametrize("command", NO_ANSWER)
async def test_a_command_that_does_not_answer_changes_nothing(folder: Path, command: str) -> None:
    chain = make_chain(folder, 2)
    timeout = "0.2" if "sleep" in command else "60"
    async with host(folder, chain, keep_if=command, timeout=timeout) as (d, vm):
        ended = await end_of(d, await ask(d))
        assert ended["state"] == "failed"
        assert NO_ANSWER[command] in ended["error"]["message"]
        assert await layers(d) == [chain.top, chain.base]
        assert "cycle_failed" in d.log
        await vm.quit()
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])


async def test_rounds_come_by_themselves_and_never_two_at_once(folder: Path) -> None:
    chain = make_chain(folder, 2)
    async with host(folder, chain, every='"300ms"', delete="true") as (d, vm):
        first: Any = None
        async with asyncio.timeout(60):
            while first is None or (await d.get("/v1/cycles")).json[0]["last"] in (None, first):
                first = first or (await d.get("/v1/cycles")).json[0]["last"]
                await asyncio.sleep(0.02)
        (shown,) = (await d.get("/v1/cycles")).json
        assert shown["next_round"] > first["created"]
        commits = list(reversed((await d.get("/v1/commits?state=done")).json))
        assert await d.stop() == 0
        d.config = config_of(vm)  # what was under way ends, and nothing new comes
        await d.start()
        async with asyncio.timeout(60):
            while (await d.get("/v1/cycles")).json[0]["running"] is not None:
                await asyncio.sleep(0.02)
        active, _ = await layers(d)
        rounds = (await d.get("/v1/cycles")).json, (await d.get("/v1/commits")).json[:2]
        await vm.quit()
    assert list(folder.glob("*.cycle-*")) == [active], f"former overlays were left: {rounds}"
    assert len(commits) >= 2
    assert all(a["ended"] <= b["created"] for a, b in pairwise(commits))
    assert ".cycle-" not in active.name.replace(".cycle-", "", 1), "names grow by each round"
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(active, chain.pictures[-1])


async def test_a_round_under_way_is_the_only_one(folder: Path) -> None:
    chain = make_chain(folder, 2)
    gate = folder / "gate"
    os.mkfifo(gate)
    async with host(folder, chain, keep_if=f'["cat", "{gate}"]', timeout='"1h"') as (d, vm):
        round_id = await ask(d, Idempotency_Key="once")
        again = await d.post("/v1/vms/web1/cycles", {"disk": "vda"})
        assert (again.status, again.json["type"]) == (409, "urn:qmpcommit:JobConflict")
        assert await ask(d, Idempotency_Key="once") == round_id
        (shown,) = (await d.get("/v1/cycles")).json
        assert shown["running"]["id"] == round_id
        # What was answered with 202 is kept over a restart: the command is asked again.
        assert await d.stop() == 0
        await d.start()
        writing = await asyncio.to_thread(gate.open, "wb")
        writing.close()
        assert (await end_of(d, round_id))["result"] == "kept"
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_only_what_is_configured_and_free(folder: Path) -> None:
    chain = make_chain(folder, 2)
    async with host(folder, chain, keep_if='["false"]') as (d, vm):
        assert (await d.post("/v1/vms/web9/cycles", {"disk": "vda"})).status == 404
        assert (await d.post("/v1/vms/web1/cycles", {"disk": "vdb"})).status == 422
        assert (await d.get("/v1/cycles/abc")).status == 404
        held = await d.commit("web1", disk="vda", policy={"kind": "hold"})
        await d.until(held, "ready")
        refused = await end_of(d, await ask(d))
        assert "left alone" in refused["error"]["message"]
        await d.request("DELETE", f"/v1/commits/{held}")
        await d.end_of(held)
        refused = await end_of(d, await ask(d))  # READY was reached: the base has the data
        assert "holds part of" in refused["error"]["message"]
        kept = await d.commit("web1", disk="vda", policy={"kind": "keep"})
        assert (await d.end_of(kept))["outcome"]["action"] == "keep"
        async with (
            qc.Session.connect(vm.qmp2) as session,
            session.snapshot(["vda"]),
        ):
            refused = await end_of(d, await ask(d))
            assert "window" in refused["error"]["message"]
        assert (await end_of(d, await ask(d)))["result"] == "discarded"
        active, _ = await layers(d)
        await vm.quit()
    assert_disk(active, chain.pictures[-1])


async def test_an_exported_disk_is_not_exchanged(folder: Path) -> None:
    chain = make_chain(folder, 2)
    async with (
        storage_daemon(folder, chain) as vm,
        daemon(folder, config_of(vm, disk='"top"', keep_if='["false"]')) as d,
    ):
        refused = await end_of(d, await ask(d, disk="top"))
        assert "exported" in refused["error"]["message"]
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])


# -- killed at every step -------------------------------------------------------------------------


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("keep", [False, True], ids=["discard", "keep"])
async def test_killed_at_every_step(
    folder: Path, keep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another daemon ends the round; the guest runs, on a chain that is whole, and only once."""

    async def one(number: int) -> None:
        place, name = folder / str(number), f"web{number}"
        place.mkdir()
        chain = make_chain(place, 2)
        async with machine(place, chain, running=True) as vm:
            answer = '["true"]' if keep else '["false"]'
            d.config = config_of(vm, name, keep_if=answer, delete="true")
            d.environment["QMPCOMMIT_DIE_AT"] = str(number)
            await d.start()
            await d.connected(name)
            with suppress(OSError, http.client.HTTPException):
                await d.post(f"/v1/vms/{name}/cycles", {"disk": "vda"}, Idempotency_Key=name)
            if number:
                assert d.process is not None
                async with asyncio.timeout(60):
                    await d.process.wait()
                d.environment["QMPCOMMIT_DIE_AT"] = "0"
                await d.start()
                await d.connected(name)
                await ask(d, name, Idempotency_Key=name)
            round_id = await ask(d, name, Idempotency_Key=name)
            ended = await end_of(d, round_id)
            assert ended["state"] == "done", ended
            assert ended["result"] == ("kept" if keep else "discarded")
            files = await layers(d, name)
            assert [str(path) for path in files] == [ended["overlay"], str(chain.base)]
            assert await runs(vm), "the guest was left paused"
            assert await vm.execute("query-jobs") == []
            nodes = await vm.execute("query-named-block-nodes", flat=True)
            assert "top" not in {node["node-name"] for node in nodes}
            await d.kill()
            await vm.quit()
        assert not chain.top.exists()
        assert sorted(place.glob("*.qcow2")) == sorted(files)
        picture = chain.pictures[-1 if keep else 0]
        assert_disk(chain.base, picture)
        assert_disk(files[0], picture)

    d = killable(folder)
    place = ""
    try:
        await one(0)
        places = (folder / "places").read_text().splitlines()
        last = max(n for n, place in enumerate(places) if "UPDATE undertakings" in place)
        tried = chosen(last)
        for number in tried:
            place = places[number - 1]
            await one(number)
    except BaseException:
        print(f"killed {place}\n{d.log[-6000:]}")
        raise
    finally:
        if d.process is not None and d.process.returncode is None:
            await d.kill()
    with capsys.disabled():
        print(f" {told(last, len(tried))}", end="")


# -- times and names ------------------------------------------------------------------------------


def cycle_of(**members: Any) -> Cycle:
    return Cycle(vm="web1", disk="vda", keep_if=("true",), guest="reset", **members)


def test_a_round_at_a_time_of_the_day() -> None:
    now = datetime(2026, 1, 15, 2, 59, 30).astimezone().timestamp()
    assert until_next(cycle_of(at="03:00"), now) == 30
    assert until_next(cycle_of(at="02:59"), now) == 86400 - 30
    assert until_next(cycle_of(at="03:00"), now + 30) == 86400, "the one that is just over"
    assert until_next(cycle_of(every=5), now) == 5


def test_overlays_are_called_as_the_first_one_was() -> None:
    first = new_overlay("/vms", "/vms/scratch.qcow2")
    assert first.startswith("/vms/scratch.cycle-2")
    second = new_overlay("/vms", first)
    assert second.startswith("/vms/scratch.cycle-2")
    assert second.count(".cycle-") == 1
    assert second != first
    assert new_overlay("/o", first).startswith("/o/scratch.cycle-")
