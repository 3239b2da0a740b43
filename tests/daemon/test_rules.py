"""Flatten rules: chains that pass a limit are brought down, a promise at a time."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.chain import Disk, Image
from qmpcommit.cycles.flatten import next_step
from qmpcommit.daemon.steps import STEP_PREFIX, hands_off, is_for, passed, pause, request_of
from qmpcommit.wire.rules import Flatten
from tests.daemon.daemons import Daemon, daemon
from tests.daemon.kill_sweep import killable
from tests.ground.images import Chain, assert_disk, create, make_chain
from tests.ground.machines import Machine, Style, machine, storage_daemon
from tests.ground.places import chosen, told

RULE = '[[flatten]]\nvm = "web*"\nevery = 0.2\n'


async def until(d: Daemon, number: int, right: Callable[[Any], bool]) -> Any:
    """Look at a rule until what it shows is right."""
    async with asyncio.timeout(60):
        while True:
            rules = (await d.get("/v1/rules")).json
            if right(rules[number]):
                return rules[number]
            await asyncio.sleep(0.02)


def layers(number: int) -> Callable[[Any], bool]:
    """Whether all disks have come to so many layers, and to rest."""

    def right(rule: Any) -> bool:
        disks = rule["disks"]
        return bool(disks) and all(
            disk["layers"] == number and disk["state"] == "within" for disk in disks
        )

    return right


def in_state(state: str) -> Callable[[Any], bool]:
    """Whether the rule's only disk is in this state."""
    return lambda rule: [disk["state"] for disk in rule["disks"]] == [state]


async def commits(d: Daemon) -> list[Any]:
    """All commits, the first first."""
    return list(reversed((await d.get("/v1/commits")).json))


@asynccontextmanager
async def host(
    folder: Path, chain: Chain, rule: str, style: Style = "blockdev"
) -> AsyncIterator[tuple[Daemon, Machine]]:
    """A daemon with a rule, and a VM called web1."""
    async with storage_daemon(folder, chain, style=style) as vm:
        config = f'{RULE}{rule}\n[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n'
        async with daemon(folder, config) as d:
            yield d, vm


@pytest.mark.parametrize("keep", [1, 2, 3])
async def test_a_long_chain_comes_down(folder: Path, keep: int) -> None:
    chain = make_chain(folder, 4)
    async with host(folder, chain, f"keep = {keep}\ndepth = 3\ndelete = true") as (d, vm):
        rule = await until(d, 0, layers(keep))
        done = await commits(d)
        metrics = (await d.get("/metrics")).body.decode()
        await vm.quit()
    assert rule["next_look"] > rule["last_look"]
    assert rule["last_result"]
    assert [commit["state"] for commit in done] == ["done"] * (4 - keep)
    assert all(commit["job_id"].startswith(STEP_PREFIX) for commit in done)
    actions = [commit["outcome"]["action"] for commit in done]
    assert actions == (["none", "none", "pivot"] if keep == 1 else ["none"] * (4 - keep))
    for earlier, later in pairwise(done):
        assert earlier["ended"] <= later["created"], "two steps at once"
    assert f'qmpcommit_flatten_steps_total{{result="done",rule="0"}} {4 - keep}.0' in metrics
    assert_disk(chain.base, chain.pictures[4 - keep])
    assert len(list(folder.glob("*.qcow2"))) == keep
    if keep > 1:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_chain_within_its_limits_is_left_as_it_is(folder: Path) -> None:
    chain = make_chain(folder, 3)
    limits = 'keep = 1\ndepth = 3\noverlay_size = "1GiB"'
    async with host(folder, chain, limits) as (d, vm):
        first = await until(d, 0, layers(3))
        await until(d, 0, lambda rule: rule["last_look"] > first["last_look"])
        assert await commits(d) == []
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_overlays_that_have_grown_are_merged(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with host(folder, chain, 'keep = 1\noverlay_size = "2MiB"') as (d, vm):
        await until(d, 0, layers(1))
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_only_the_disks_that_are_meant(folder: Path) -> None:
    chain, other = folder / "a", folder / "b"
    chain.mkdir()
    other.mkdir()
    mine = make_chain(chain, 3)
    theirs = make_chain(other, 3, names=("one", "two", "three", "four"))
    rule = '[[flatten]]\nvm = "web1"\ndisk = "vdb"\nkeep = 1\ndepth = 1\nevery = 0.2\n'
    async with machine(folder, mine, theirs) as vm:
        config = f'{rule}[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n'
        async with daemon(folder, config) as d:
            await until(d, 0, layers(1))
            assert {commit["disk"] for commit in await commits(d)} == {"vdb"}
            disks = (await d.get("/v1/vms/web1/disks")).json
        await vm.quit()
    assert [len(disk["chain"]) for disk in disks] == [3, 1]
    assert_disk(mine.top, mine.pictures[-1])
    assert_disk(theirs.base, theirs.pictures[-1])


async def test_two_disks_of_a_vm_come_down_one_after_the_other(folder: Path) -> None:
    chains = []
    for name in ("a", "b"):
        (folder / name).mkdir()
        names = [f"{name}{n}" for n in range(4)]
        chains.append(make_chain(folder / name, 4, names=names))
    rule = f"{RULE}keep = 2\ndepth = 2\n{RULE}keep = 1\ndepth = 2\n"  # the first rule that comes
    async with machine(folder, *chains) as vm:
        async with daemon(folder, f'{rule}[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n') as d:
            await until(d, 0, lambda rule: bool(rule["disks"]) and all(
                disk["layers"] <= 2 and disk["state"] == "within" for disk in rule["disks"]
            ))  # fmt: skip
            await until(d, 1, lambda rule: bool(rule["disks"]) and all(
                disk["layers"] <= 2 and disk["state"] == "within" for disk in rule["disks"]
            ))  # fmt: skip
            done = await commits(d)
            active = [disk["chain"][0]["filename"] for disk in
                      (await d.get("/v1/vms/web1/disks")).json]  # fmt: skip
        await vm.quit()
    assert {commit["state"] for commit in done} == {"done"}
    for earlier, later in pairwise(done):
        assert earlier["ended"] <= later["created"], "two steps at once on one VM"
    for chain, path in zip(chains, active, strict=True):
        assert_disk(Path(path), chain.pictures[-1])


async def test_a_window_is_left_alone(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with storage_daemon(folder, chain) as vm, qc.Session.connect(vm.qmp2) as session:
        config = f'{RULE}keep = 1\ndepth = 2\n[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n'
        d = Daemon(folder, config)
        try:
            async with session.snapshot(["top"]) as window:
                await d.start()
                seen = await until(d, 0, in_state("left-alone"))
                assert "window" in seen["disks"][0]["why"]
                await until(d, 0, lambda rule: rule["last_look"] > seen["last_look"])
                assert await commits(d) == []
                asked = {"disk": window["top"].node_name, "top": 2, "base": 3}
                refused = await d.post("/v1/vms/web1/commits", asked)
                assert refused.status == 409
                assert "held by a snapshot window" in refused.json["detail"]
            await until(d, 0, layers(1))
        finally:
            await d.kill()
        await session.release()
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_disk_that_a_client_commits_is_left_alone(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with storage_daemon(folder, chain) as vm:
        vms = f'[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n'
        d = Daemon(folder, vms)
        await d.start()
        try:
            await d.connected("web1")
            held = await d.commit("web1", disk="top", base=1, policy={"kind": "hold"})
            await d.until(held, "ready")
            await d.stop()
            d.config = f"{RULE}keep = 1\ndepth = 1\n{vms}"
            await d.start()
            await until(d, 0, in_state("left-alone"))
            await d.until(held, "ready")
            assert len(await commits(d)) == 1
            await d.post(f"/v1/commits/{held}/decision", {"action": "pivot"})
            await until(d, 0, layers(1))
        finally:
            await d.kill()
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_fails_is_tried_more_and_more_seldom(folder: Path) -> None:
    chain = make_chain(folder, 3)
    other = folder / "other"
    other.mkdir()
    create(other / "top.qcow2", None, backing=chain.base)
    second = Chain([other / "top.qcow2"], [chain.pictures[0]])
    async with (
        storage_daemon(other, second, style="implicit") as neighbour,
        host(folder, chain, "keep = 1\ndepth = 2", "implicit") as (d, vm),
    ):
        seen = await until(d, 0, lambda rule: any(disk["failures"] >= 2 for disk in rule["disks"]))
        (disk,) = seen["disks"]
        assert disk["state"] == "backing-off"
        assert disk["why"]
        metrics = (await d.get("/metrics")).body.decode()
        assert 'qmpcommit_flatten_failing_disks{rule="0"} 1.0' in metrics
        assert "flatten_failed" in d.log
        await neighbour.quit()
        await until(d, 0, layers(1))
        metrics = (await d.get("/metrics")).body.decode()
        assert 'qmpcommit_flatten_failing_disks{rule="0"} 0.0' in metrics
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_steps_are_told_as_events(folder: Path) -> None:
    chain = make_chain(folder, 2)
    async with host(folder, chain, "keep = 1\ndepth = 1") as (d, vm):
        await until(d, 0, layers(1))
        await d.stop()
        await vm.quit()
    journal = sqlite3.connect(folder / "state/journal.db")
    try:
        told = journal.execute("SELECT data FROM events WHERE kind = 'flatten'").fetchall()
    finally:
        journal.close()
    assert [json.loads(data)["state"] for (data,) in told] == ["promised", "done"]


@pytest.mark.timeout(900)
async def test_killed_at_every_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the rule has promised and done, another daemon brings the chain down."""

    async def one(number: int) -> None:
        place = folder / str(number)
        place.mkdir()
        chain = make_chain(place, 3)
        async with storage_daemon(place, chain) as vm:
            d.config = f'{RULE}keep = 1\ndepth = 1\n[[vm]]\nname = "web{number}"\nqmp = "{vm.qmp}"'
            d.environment["QMPCOMMIT_DIE_AT"] = str(number)
            process = await d.launch()
            if number:
                async with asyncio.timeout(60):
                    await process.wait()
                assert process.returncode == -9, f"{number}: {d.log[-4000:]}"
                d.environment["QMPCOMMIT_DIE_AT"] = "0"
                await d.start()
            else:
                await d.serving()
            await until(d, 0, layers(1))
            assert await vm.execute("query-jobs") == []
            await d.kill()
            await vm.quit()
        assert_disk(chain.base, chain.pictures[-1])

    d = killable(folder)
    try:
        await one(0)
        places = (folder / "places").read_text().splitlines()
        last = max(n for n, place in enumerate(places) if "UPDATE commits" in place)
        tried = chosen(last + 1)
        for number in tried:
            await one(number)
    finally:
        if d.process is not None and d.process.returncode is None:
            await d.kill()
    with capsys.disabled():
        print(f" {told(last + 1, len(tried))}", end="")


# -- decisions without I/O ------------------------------------------------------------------------

SOME = Disk(
    name="vda",
    device="drive0",
    root="root",
    chain=tuple(Image(f"n{n}", f"/{n}.qcow2", "qcow2", allocated_size=100) for n in range(4)),
)


def rule_of(**members: Any) -> Flatten:
    return Flatten(vm="*", keep=2, **members)


def test_limits_are_passed_by_more_than_them() -> None:
    assert passed(rule_of(depth=3), SOME)
    assert not passed(rule_of(depth=4), SOME)
    assert passed(rule_of(overlay_size=299), SOME)
    assert not passed(rule_of(overlay_size=300), SOME), "the bottom layer does not count"


@pytest.mark.parametrize("name", ["vda", "drive0", "root", "v*", "drive?"])
def test_a_disk_is_meant_by_any_of_its_names(name: str) -> None:
    assert is_for(rule_of(depth=3, disk=name), SOME)
    assert not is_for(rule_of(depth=3, disk=f"{name}x"), SOME)


def test_steps_go_from_the_bottom_up() -> None:
    assert [next_step(n, 2) for n in (1, 2)] == [None, None]
    step = next_step(4, 2)
    assert step is not None
    request = request_of(rule_of(depth=3), SOME, step)
    assert (request.top, request.base, request.policy) == ("/2.qcow2", "/3.qcow2", None)
    active = next_step(2, 1)
    assert active is not None
    assert active.policy == qc.Pivot()


def test_hands_off_what_is_in_use() -> None:
    assert hands_off(SOME, []) == ""
    assert "abc" in hands_off(SOME, ["abc"])
    assert "job1" in hands_off(replace(SOME, jobs=("job1",)), [])


def test_pauses_double_up_to_a_limit() -> None:
    rule = rule_of(depth=3, every=60)
    assert [pause(rule, n) for n in (1, 2, 3)] == [60, 120, 240]
    assert pause(rule, 1000) == 3600
    assert pause(rule_of(depth=3, every=7200), 9) == 7200
