"""A window whose process is killed at any step, without a journal: the next one closes it."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import qmpcommit as qc
from tests.ground import forked
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.places import STRIDE, first
from tests.real.test_agent import FakeAgent, fake_agent

pytestmark = pytest.mark.timeout(900)

STEP = 64 * 1024
KILLABLE = "tests.real.killable_window"


async def killed(
    qemu: Machine, freeze: str, place: int, folder: Path, overlay_dir: str = ""
) -> tuple[int, list[str]]:
    """Run the window's process until it dies at that place: its status, the places it passed."""
    places = folder / "places"
    places.unlink(missing_ok=True)
    words = [qemu.qmp, freeze, str(place), str(places), str(place % 255 + 1), offset(place)]
    words.append(overlay_dir)
    status, _ = await forked.run(KILLABLE, *words)
    return status, places.read_text().splitlines()


def offset(place: int) -> str:
    return str(place * STEP % (60 * 1024 * 1024))


async def assert_nothing_left(vm: qc.Session, folder: Path) -> None:
    assert await vm.windows() == []
    assert (await vm.execute("query-status"))["status"] == "running"
    assert [job["id"] for job in await vm.execute("query-jobs")] == []
    nodes = await vm.execute("query-named-block-nodes", {"flat": True})
    assert [n["node-name"] for n in nodes if "qmpcommit" in str(n)] == []
    assert [len(disk.chain) for disk in await vm.disks()] == [2, 2]
    assert list(folder.glob("**/*qmpcommit-window*")) == []


async def close(vm: qc.Session, folder: Path, agent: str | None) -> list[str]:
    """Close what was left; the files that were named as staying, which then are deleted."""
    try:
        await vm.close_windows(agents=agent)
    except qc.WindowError as error:
        left = [str(path) for path in error.facts["remains"]]  # type: ignore[attr-defined]
        assert sorted(left) == sorted(str(path) for path in folder.glob("*qmpcommit-window*"))
        assert all(path in error.message for path in left)
        for path in left:
            os.unlink(path)
        return left
    return []


async def from_each_place(
    qemu: Machine, chains: list[Chain], folder: Path, freeze: str, agent: FakeAgent | None = None
) -> list[str]:
    """Die at each place in turn on the same VM, and have another process clear away."""
    pictures = [chain.pictures[-1] for chain in chains]
    seen: list[str] = []
    stayed: Counter[str] = Counter()
    place = first() - STRIDE
    status = -9
    while status == -9:
        place += STRIDE
        status, places = await killed(qemu, freeze, place, folder)
        assert status in (0, -9)
        for number, picture in enumerate(pictures):
            if f"wrote {number}" in places:
                picture.fill(int(offset(place)), STEP, place % 255 + 1)
        async with qc.Session.connect(qemu.qmp) as vm:
            left = await close(vm, folder, agent.path if agent else None)
            assert agent is None or not agent.frozen
            stayed[places[-1]] += len(left)
            await assert_nothing_left(vm, folder)
            for disk, chain in zip(await vm.disks(), chains, strict=True):
                assert disk.active is not None
                assert disk.active.filename == str(chain.top)
                remove = {"node": disk.active.node_name, "name": "kept"}
                with suppress(qc.CommandRefused):
                    await vm.execute("block-dirty-bitmap-remove", remove)
        seen.append(places[-1])
    stays = {name: count for name, count in stayed.items() if count}
    print(f"killed at {len(seen) - 1} places; an overlay's file was named as left after {stays}")
    assert stays == {}
    return seen


@pytest.mark.parametrize("freeze", ["pause", "agent"])
async def test_killed_anywhere_the_next_process_closes_it(folder: Path, freeze: str) -> None:
    chains = [make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))]
    async with machine(folder, *chains, running=True) as qemu, fake_agent(folder) as agent:
        if freeze == "pause":
            seen = await from_each_place(qemu, chains, folder, "pause")
            assert {"after stop", "before cont"} <= set(seen) or STRIDE > 1
        else:
            seen = await from_each_place(qemu, chains, folder, agent.path, agent)
            around = {"after guest-fsfreeze-freeze", "before guest-fsfreeze-thaw"}
            assert around <= set(seen) or STRIDE > 1
        await qemu.quit()
    if STRIDE == 1:
        assert {"before blockdev-create", "after transaction"} <= set(seen)
        # The last place is that of either disk's commit: which one is first differs.
        assert {"before block-commit", "after block-commit"} & set(seen)
        assert {"after block-job-complete", "after job-finalize", "before unlink"} & set(seen)
    assert len(seen) >= 60 // STRIDE
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])
        assert_disk(chain.base, chain.pictures[0])


@pytest.mark.parametrize("freeze", ["pause", "agent"])
async def test_killed_anywhere_it_is_recovered_from_what_was_noted(
    folder: Path, freeze: str
) -> None:
    chains = [make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))]
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    place, status, open_again = first() - STRIDE, -9, 0
    async with machine(folder, *chains, running=True) as qemu, fake_agent(folder) as agent:
        how = agent.path if freeze == "agent" else freeze
        while status == -9:
            place += STRIDE
            (folder / "noted").unlink(missing_ok=True)
            status, places = await killed(qemu, how, place, folder, str(elsewhere))
            for number, chain in enumerate(chains):
                if f"wrote {number}" in places:
                    chain.pictures[-1].fill(int(offset(place)), STEP, place % 255 + 1)
            async with qc.Session.connect(qemu.qmp) as vm:
                if (folder / "noted").exists():
                    noted = qc.NotedWindow.model_validate_json((folder / "noted").read_text())
                    window = await vm.recover_window(noted)
                    assert not agent.frozen
                    assert (await vm.execute("query-status"))["status"] == "running"
                    seen = await vm.windows()
                    assert {each.overlay for each in seen} == {
                        each.overlay for each in (window or {}).values()
                    }
                    if window is not None:
                        open_again += 1
                        await vm.close_window(window)
                else:  # it had claimed its disks, perhaps
                    await vm.close_windows()
                for disk in await vm.disks():
                    assert disk.active is not None
                    remove = {"node": disk.active.node_name, "name": "kept"}
                    with suppress(qc.CommandRefused):
                        await vm.execute("block-dirty-bitmap-remove", remove)
                await assert_nothing_left(vm, folder)
        await qemu.quit()
    print(f"killed at {place - 1} places, or every {STRIDE}., open again after {open_again}")
    assert open_again >= 20 // STRIDE // 2
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_frozen_guest_whose_agent_is_not_known_is_told(folder: Path) -> None:
    chains = [make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))]
    async with machine(folder, *chains, running=True) as qemu, fake_agent(folder) as agent:
        place = 0
        while not agent.frozen:
            place += 1
            async with qc.Session.connect(qemu.qmp) as vm:
                await close(vm, folder, agent.path)
            await killed(qemu, agent.path, place, folder)
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.WindowError, match="--agent SOCKET"):
                await vm.close_windows()
            assert agent.frozen
            await vm.close_windows(agents=agent.path)
            assert not agent.frozen
            await assert_nothing_left(vm, folder)
        await qemu.quit()
