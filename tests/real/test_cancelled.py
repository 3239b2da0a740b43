"""The stories people commit for, cancelled at each of their steps in turn, leave nothing behind.

No task, socket, job, node or file that no disk uses, and no guest that stands still.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.request import Request
from qmpcommit.commit.stale_layers import Around
from tests.ground.cancelling import STEPS, ends_before, settle, small, sockets
from tests.ground.images import MIB, Picture, assert_disk
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.sessions import runs

NUMBERS = count()


def _picture(*, thrown_away: bool) -> Picture:
    """What the disk shows in the end."""
    picture = Picture(4 * MIB)
    if not thrown_away:
        picture.fill(0, MIB, 0x11)
    return picture


@asynccontextmanager
async def ground(folder: Path, kind: str) -> AsyncIterator[list[Machine]]:
    """One storage daemon, one machine whose guest runs, or two of these."""
    async with AsyncExitStack() as stack:
        made = []
        for number in range(2 if kind == "machines" else 1):
            place = folder / str(number)
            place.mkdir()
            chain = small(place)
            one = storage_daemon(place, chain) if kind == "daemon" else (
                machine(place, chain, style="implicit", running=True)
            )  # fmt: skip
            made.append(await stack.enter_async_context(one))
        yield made


async def _window(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        disk = (await vm.disks())[0].name
        async with vm.snapshot([disk]):
            await vm.windows()


async def _paused_window(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm, vm.snapshot(["vda"], freeze="pause"):
        pass


async def _in_pieces(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        window = await vm.open_window(["vda"])
        await vm.close_window(window)


async def _recovered(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        window = await vm.open_window(["vda"], freeze="pause")
        try:
            noted = qc.NotedWindow(window.name, dict(window), freeze="pause")
            assert await vm.recover_window(noted) is not None
        finally:
            await vm.close_window(window)


async def _windows_of_two(qemus: list[Machine]) -> None:
    async with (
        qc.Session.connect(qemus[0].qmp) as one,
        qc.Session.connect(qemus[1].qmp) as other,
        qc.snapshot([(one, "vda"), (other, "vda")]),
    ):
        pass


async def _group_of_two(qemus: list[Machine]) -> None:
    await qc.commit_group([(each.qmp, "vda") for each in qemus], policy=qc.Keep())


async def _frozen_group_of_two(qemus: list[Machine]) -> None:
    members = [(each.qmp, "vda") for each in qemus]
    await qc.commit_group(members, policy=qc.Keep(), freeze="pause")


async def _frozen_cycle(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        how: Any = {"guest": "reset", "delete": True, "freeze": "pause"}
        await vm.cycle("vda", keep_if=["true"], **how)


async def _paused(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm, qc.freeze(vm, "pause"):
        await vm.query_status()
        await vm.query_block()


async def _thawed(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        try:
            await vm.execute("stop")
            await qc.thaw(vm, "pause")
        finally:
            await vm.execute("cont")


async def _pivot(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        disk = await vm.disk("vda")
        if len(disk.chain) < 2:
            await _overlaid(vm, disk)
        job = await vm.commit("vda", policy=qc.Hold(), delete=True)
        await job.ready()
        await job.pivot()


async def _recycle_by_hand(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        fresh = _beside(await vm.disk("vda"))
        job = await vm.commit("vda", policy=qc.Hold(), delete=True)
        await job.ready()
        await job.recycle(fresh)


async def _recycle(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        fresh = _beside(await vm.disk("vda"))
        job = await vm.commit("vda", policy=qc.Recycle(fresh), delete=True)
        await job.wait()


async def _overlay(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        await vm.overlay(["vda"], freeze="pause")


async def _discard(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        await vm.discard("vda", guest="reset", delete=True)


async def _discard_of_two(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as one, qc.Session.connect(qemus[1].qmp) as other:
        await qc.discard([(one, "vda"), (other, "vda")], guest="reset", delete=True)


async def _cycle_of_two(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as one, qc.Session.connect(qemus[1].qmp) as other:
        disks = [(one, "vda"), (other, "vda")]
        await qc.cycle(disks, keep_if=["true"], guest="reset", delete=True)


async def _cycle(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        await vm.cycle("vda", keep_if=["true"], guest="reset", delete=True)


async def _discarding_cycles(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        rounds = vm.cycles("vda", every=60, keep_if=["false"], guest="reset", delete=True)
        try:
            await anext(rounds)
        finally:
            await rounds.aclose()  # type: ignore[attr-defined]


async def _flatten(qemus: list[Machine]) -> None:
    async with qc.Session.connect(qemus[0].qmp) as vm:
        disk = await vm.disk("export0")
        if len(disk.chain) < 3:
            await _overlaid(vm, disk)
        steps = vm.flatten("export0", keep=2, delete=True)
        try:
            async for _ in steps:
                pass
        finally:
            await steps.aclose()


async def _overlaid(vm: qc.Session, disk: qc.Disk) -> None:
    assert disk.active is not None
    names = {"snapshot-file": _beside(disk), "snapshot-node-name": f"n{next(NUMBERS)}"}
    await vm.execute("blockdev-snapshot-sync", {"node-name": disk.active.node_name, **names})


def _beside(disk: qc.Disk) -> str:
    assert disk.active is not None
    return str(Path(disk.active.filename).parent / f"fresh-{next(NUMBERS)}.qcow2")


async def test_a_commit_that_is_given_up_before_its_first_step(folder: Path) -> None:
    """Whoever waits for it is told so; that nothing was sent is seen in QEMU and on the disks."""
    chain = small(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            for wait in (qc.CommitJob.wait, qc.CommitJob.ready, qc.CommitJob.started):
                job = await vm.prepare(Request("top", qc.Pivot()), Around())
                waiting = asyncio.create_task(wait(job))
                job.start(lambda: None)
                await job.detach()
                with pytest.raises(qc.MonitorLost, match="Nothing was sent"):
                    await waiting
                assert isinstance(job.error, qc.MonitorLost)
            assert await vm.execute("query-jobs") == []
        await qemu.quit()
    assert_disk(chain.base, Picture(4 * MIB))
    assert_disk(chain.top, _picture(thrown_away=False))


STORIES = [
    ("daemon", _window),
    ("daemon", _flatten),
    ("machine", _window),
    ("machine", _paused_window),
    ("machine", _in_pieces),
    ("machine", _paused),
    ("machine", _recovered),
    ("machine", _thawed),
    ("machine", _pivot),
    ("machine", _recycle),
    ("machine", _recycle_by_hand),
    ("machine", _overlay),
    ("machine", _discard),
    ("machine", _cycle),
    ("machine", _discarding_cycles),
    ("machines", _windows_of_two),
    ("machines", _group_of_two),
    ("machines", _frozen_group_of_two),
    ("machine", _frozen_cycle),
    ("machines", _discard_of_two),
    ("machines", _cycle_of_two),
]


async def at_rest(qemu: Machine, other: qc.Session) -> None:
    """Nothing of ours is left in it, and no file that it does not use."""
    assert await other.execute("query-jobs") == []
    (disk,) = await other.disks()
    used = {node for node in (await other.graph()).nodes if node.startswith("qmpcommit-")}
    if disk.name == "vda":
        assert await runs(other)
    assert await other.windows() == []
    mine = {image.node_name for image in disk.chain if image.node_name.startswith("qmpcommit-")}
    assert used == mine | {node.removesuffix("-top") + "-file" for node in mine}
    files = {Path(image.filename).name for image in disk.chain}
    assert {path.name for path in qemu.folder.glob("*.qcow2")} == files


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "story"), STORIES)
async def test_cancelled_at_every_step(
    kind: str, story: Callable[[list[Machine]], Coroutine[Any, Any, None]], folder: Path
) -> None:
    async with ground(folder, kind) as qemus, AsyncExitStack() as stack:
        others = [await stack.enter_async_context(qc.Session.connect(q.qmp2)) for q in qemus]
        before = (asyncio.all_tasks(), sockets())
        for step in range(1, STEPS):
            over = await ends_before(story(qemus), step)
            await settle()
            assert (asyncio.all_tasks(), sockets()) == before, step
            for qemu, other in zip(qemus, others, strict=True):
                await at_rest(qemu, other)
            if over:
                break
        assert step > 5
        for qemu, other in zip(qemus, others, strict=True):
            (disk,) = await other.disks()
            assert disk.active is not None
            await other.close()
            await qemu.quit()
            assert_disk(Path(disk.active.filename), _picture(thrown_away="discard" in str(story)))
