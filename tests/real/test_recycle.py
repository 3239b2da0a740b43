"""A recycle that is interrupted anywhere, or can't be: the guest runs, on a disk that is whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.commit.phases import State
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.recycle import Left, interrupted_recycles
from qmpcommit.commit.request import Request
from qmpcommit.commit.stale_layers import Around
from qmpcommit.names import WINDOW_MARK
from tests.ground.images import MIB, Chain, Picture, assert_disk, make_chain, run
from tests.ground.machines import Machine, machine
from tests.ground.proxy import Proxy, Strike, proxy
from tests.ground.qemu import QEMU
from tests.ground.sessions import files, lost


@dataclass
class Notes:
    """A ledger; whoever writes into it gets no further than `last`."""

    last: str
    plan: Plan | None = None
    state: State | None = None
    stopped: bool = False
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        self.plan = facts.get("plan", self.plan)
        self.state = state or self.state
        self.stopped = self.stopped or step == "stop"
        if step == self.last:
            self.reached.set()
            await asyncio.Event().wait()

    def moved(self, state: State) -> None:
        pass


@asynccontextmanager
async def killed_at(
    step: str, folder: Path, chain: Chain, fresh: Path, *, running: bool = True, refused: str = ""
) -> AsyncIterator[tuple[Machine, Notes]]:
    """A recycle whose process was killed when it had noted a step: it did and said no more."""
    notes = Notes(step)
    async with (
        machine(folder, chain, running=running) as qemu,
        proxy(folder, qemu.qmp) as between,
    ):
        between.to_qemu = Strike(refused, "refuse")
        async with qc.Session.connect(between.path, patience=0.1) as vm:
            policy = qc.Recycle(str(fresh))
            job = await vm.commit("vda", policy=policy, delete=True, ledger=notes)
            await notes.reached.wait()
            await between.refuse()
            await job.detach()
        yield qemu, notes


async def take_up(
    vm: qc.Session, notes: Notes, fresh: Path, *, ledger: Notes | None = None
) -> qc.CommitJob:
    assert notes.plan is not None
    assert notes.state is not None
    resumed = Resumed(notes.state, recycle=qc.Recycle(str(fresh)), stopped=notes.stopped)
    return await vm.resume(notes.plan, resumed, ledger=ledger)


async def nothing_left(vm: qc.Session, *expected: Path) -> None:
    """The guest runs, on these files, and nothing else of ours is there."""
    assert (await vm.query_status()).running
    assert await vm.execute("query-jobs") == []
    assert await files(vm) == list(expected)
    ours = {name for name in (await vm.graph()).nodes if name.startswith("qmpcommit-")}
    assert len(ours) == (2 if expected[0].name.startswith("fresh") else 0), ours


async def overlay_of(vm: qc.Session, fresh: Path) -> FreshOverlay:
    plan = await vm.plan("vda", policy=qc.Recycle(str(fresh)))
    return FreshOverlay(vm, plan, str(fresh), vm.cwd)


async def test_a_guest_goes_on_that_a_killed_process_had_just_stopped(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at("stop", folder, chain, fresh) as (qemu, notes):
        await qemu.execute("stop")  # as it had, when it was killed
        async with qc.Session.connect(qemu.qmp) as vm:
            outcome = await (await take_up(vm, notes, fresh)).wait()
            assert outcome.action == "recycle"
            assert outcome.guest_paused is not None
            await nothing_left(vm, fresh, chain.base)
        await qemu.quit()
    for path in (fresh, chain.base):
        assert_disk(path, chain.pictures[-1])


@pytest.mark.parametrize("step", ["freeze", "stop", "job-complete", "overlay", "thaw"])
async def test_a_recycle_whose_process_is_killed_is_ended_by_the_next(
    step: str, folder: Path
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at(step, folder, chain, fresh) as (qemu, notes):
        async with qc.Session.connect(qemu.qmp) as vm:
            assert (await vm.query_status()).running is (step in ("freeze", "stop"))
            outcome = await (await take_up(vm, notes, fresh)).wait()
            assert outcome.action == "recycle"
            assert outcome.guest_paused is not None
            await nothing_left(vm, fresh, chain.base)
        await qemu.quit()
    for path in (fresh, chain.base):
        assert_disk(path, chain.pictures[-1])


async def test_an_overlay_is_told_of_although_the_guest_went_on_before(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at("job-dismiss", folder, chain, fresh) as (qemu, notes):
        async with qc.Session.connect(qemu.qmp) as vm:
            assert (await vm.query_status()).running
            outcome = await (await take_up(vm, notes, fresh)).wait()
            assert outcome.action == "recycle"
            assert outcome.active is not None
            assert outcome.active.filename == str(fresh)
            await nothing_left(vm, fresh, chain.base)
        await qemu.quit()
    for path in (fresh, chain.base):
        assert_disk(path, chain.pictures[-1])


async def test_an_overlay_is_undone_although_the_guest_went_on_before(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at("job-dismiss", folder, chain, fresh, refused="job-complete") as (
        qemu,
        notes,
    ):
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.CommitFailed, match="refused by the proxy"):
                await (await take_up(vm, notes, fresh)).wait()
            await nothing_left(vm, chain.top, chain.base)
        await qemu.quit()
    assert not fresh.exists()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_guest_that_was_paused_goes_on_although_its_overlay_can_not_be_made_again(
    folder: Path,
) -> None:
    chain, place = make_chain(folder), folder / "place"
    place.mkdir()
    async with killed_at("stop", folder, chain, place / "fresh.qcow2") as (qemu, notes):
        await qemu.execute("stop")
        (place / "fresh.qcow2").unlink()
        place.rmdir()
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await take_up(vm, notes, place / "fresh.qcow2")
            with pytest.raises(qc.CommitFailed, match="No such file or directory"):
                await job.wait()
            await nothing_left(vm, chain.top, chain.base)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("step", ["freeze", "stop"])
async def test_a_freeze_is_made_again_once_its_monitor_is_back(step: str, folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at(step, folder, chain, fresh) as (qemu, notes):
        async with proxy(folder, qemu.qmp) as between, qc.Session.connect(between.path) as vm:
            await between.refuse()
            await lost(vm)
            job = await take_up(vm, notes, fresh)
            await between.open()
            outcome = await job.wait()
            assert outcome.action == "recycle"
            assert outcome.guest_paused is not None
            await nothing_left(vm, fresh, chain.base)
        await qemu.quit()
    for path in (fresh, chain.base):
        assert_disk(path, chain.pictures[-1])


class Cut(Notes):
    """A ledger; the line breaks once, before the guest is stopped."""

    def __init__(self, between: Proxy, vm: qc.Session) -> None:
        super().__init__("")
        self._between, self._vm = between, vm

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        if step == "stop" and not self.stopped:
            await self._between.cut()
            await lost(self._vm)
        await super().note(step, state, **facts)


async def test_a_guest_goes_on_that_was_stopped_before_its_freeze_was_made_again(
    folder: Path,
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at("freeze", folder, chain, fresh) as (qemu, notes):
        async with proxy(folder, qemu.qmp) as between, qc.Session.connect(between.path) as vm:
            job = await take_up(vm, notes, fresh, ledger=Cut(between, vm))
            outcome = await job.wait()
            assert outcome.action == "recycle"
            assert outcome.guest_paused is not None
            await nothing_left(vm, fresh, chain.base)
        await qemu.quit()
    for path in (fresh, chain.base):
        assert_disk(path, chain.pictures[-1])


async def test_a_freeze_is_not_made_in_a_qemu_that_has_come_instead(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at("stop", folder, chain, fresh) as (qemu, notes):
        vm = await qc.Session.connect(qemu.qmp)
    await lost(vm)
    async with machine(folder, chain, running=True) as qemu:
        with vm.events("STOP", "RESUME") as heard:
            job = await take_up(vm, notes, fresh)
            with pytest.raises(qc.VMGone, match="was never used: delete it") as gone:
                await job.wait()
            assert (gone.value.pivoted, gone.value.overlay) == (False, str(fresh))
            await nothing_left(vm, chain.top, chain.base)
            await vm.close()
        assert [each async for each in heard.raw()] == []
        await qemu.quit()
    assert fresh.exists()  # it is told of, and somebody else's process made it
    assert_disk(chain.top, chain.pictures[-1])


@dataclass
class AtThaw(Notes):
    """A ledger that does something before a paused guest is let go on."""

    do: Callable[[], Awaitable[object]] | None = None

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        await super().note(step, state, **facts)
        if step == "thaw" and self.do is not None:
            await self.do()


@pytest.mark.parametrize("moved", [False, True], ids=["reset", "migrated"])
async def test_a_guest_goes_on_after_a_reset_and_not_after_its_migration(
    moved: bool, folder: Path
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm, qc.Session.connect(qemu.qmp2) as other:

            async def reset() -> None:
                with other.events("RESET") as resets:
                    await other.execute("system_reset")
                    await anext(resets)

            async def migrate() -> None:
                await other.execute("migrate", {"uri": "exec:cat >/dev/null"})
                while (await other.query_status()).status != "postmigrate":
                    await asyncio.sleep(0.01)

            notes = AtThaw("", do=migrate if moved else reset)
            job = await vm.commit("vda", policy=qc.Recycle(str(fresh)), ledger=notes)
            outcome = await job.wait()
            assert outcome.action == "recycle"
            told = [text.partition("'postmigrate'")[0] for text in outcome.warnings]
            assert all(said.endswith(("it is ", "in the state ")) for said in told)
            assert len(told) == 2 * moved  # the guest stays stopped, and top is stale there
            status = (await vm.query_status()).status
            assert status == ("postmigrate" if moved else "running")
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])


async def test_a_guest_that_stood_still_before_is_not_started(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at("overlay", folder, chain, fresh, running=False) as (qemu, notes):
        async with qc.Session.connect(qemu.qmp) as vm:
            outcome = await (await take_up(vm, notes, fresh)).wait()
            assert (outcome.action, outcome.guest_paused) == ("recycle", None)
            assert not (await vm.query_status()).running
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])


async def test_an_overlay_that_is_gone_leaves_the_guest_on_the_base(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with killed_at("overlay", folder, chain, fresh) as (qemu, notes):
        assert notes.plan is not None
        await qemu.execute("blockdev-del", node_name=f"{notes.plan.job_id}-top")
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await take_up(vm, notes, fresh)
            with pytest.raises(qc.CommitFailed, match=r"no node .* any more"):
                await job.wait()
            await nothing_left(vm, chain.base)
        await qemu.quit()
    assert not fresh.exists()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_file_that_came_meanwhile_is_nobodys_to_remove(folder: Path) -> None:
    """Who is killed when it has found the file has noted nothing of it as its own."""
    chain, there = make_chain(folder), folder / "there.qcow2"
    noted: list[str] = []

    async def late(ready: qc.Ready) -> qc.Recycle:
        there.write_bytes(b"data")
        return qc.Recycle(str(there))

    class Ledger(Notes):
        async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
            noted.append(step)

    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=late, ledger=Ledger(""))
        with pytest.raises(qc.CommitFailed, match="exists already"):
            await job.wait()
        assert noted == ["block-commit", "job-cancel", "thaw", "job-dismiss"]
        assert there.read_bytes() == b"data"
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("command", ["blockdev-snapshot", "cont"])
async def test_a_reply_that_is_lost_while_the_guest_stands_still(
    command: str, folder: Path
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    cut = Strike(command, "cut after", times=1)
    async with machine(folder, chain, running=True) as qemu:
        async with proxy(folder, qemu.qmp) as between, qc.Session.connect(between.path) as vm:
            between.to_qemu = cut
            job = await vm.commit("vda", policy=qc.Recycle(str(fresh)))
            assert ((await job.wait()).action, cut.met) == ("recycle", 1)
            await nothing_left(vm, fresh, chain.base)
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])


async def test_a_creation_whose_end_is_not_told_is_asked_for(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"

    def lose(message: dict[str, Any]) -> str:
        creation = "-create-" in str(message.get("data", {}).get("id"))
        return "drop" if creation and "event" in message else "pass"

    async with machine(folder, chain, running=True) as qemu:
        async with proxy(folder, qemu.qmp) as between, qc.Session.connect(between.path) as vm:
            between.to_client = lose
            job = await vm.commit("vda", policy=qc.Recycle(str(fresh)))
            assert (await job.wait()).action == "recycle"
            await nothing_left(vm, fresh, chain.base)
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])


async def test_what_was_created_before_is_created_anew(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu, qc.Session.connect(qemu.qmp) as vm:
        overlay = await overlay_of(vm, fresh)
        with vm.events("JOB_STATUS_CHANGE") as changes:
            options = {"driver": "file", "filename": str(fresh), "size": 0}
            job = {"job-id": overlay._creation("file"), "options": options}
            await vm.execute("blockdev-create", job)
            async for change in changes.raw():
                if change["status"] == "concluded":
                    break
        await overlay.freeze(again=True)
        assert await vm.execute("query-jobs") == []
        assert "backing file" in run(QEMU.img, "info", "-U", fresh)
        await overlay.thaw()
        await overlay.undo()
        await nothing_left(vm, chain.top, chain.base)
        assert not fresh.exists()


async def test_an_overlay_that_somebody_uses_stays(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        overlay = await overlay_of(vm, fresh)
        await overlay.open()
        theirs = {"driver": "raw", "node-name": "theirs", "file": overlay.node}
        await vm.execute("blockdev-add", theirs)
        await overlay.undo()
        assert fresh.exists()
        assert overlay.node in (await vm.graph()).nodes


async def test_a_file_of_a_qemu_elsewhere_is_not_unlinked_here(
    free_port: int, folder: Path
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with (
        machine(folder, chain, tcp=free_port) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        overlay = await overlay_of(vm, fresh)
        await overlay.open()
        await overlay.undo()
        assert overlay.node not in (await vm.graph()).nodes
        assert fresh.exists()


@pytest.mark.parametrize("fmt", ["qcow2", "qed"])
async def test_its_clusters_are_as_large_as_the_former_ones(fmt: str, folder: Path) -> None:
    chain = make_chain(folder, 1)
    top, fresh = folder / f"top.{fmt}", folder / "fresh.qcow2"
    run(QEMU.img, "create", "-q", "-f", fmt, "-b", chain.base, "-F", "qcow2",
        "-o", "cluster_size=8192", top)  # fmt: skip
    nodes = [
        f"driver=qcow2,node-name=base,file.driver=file,file.filename={chain.base}",
        f"driver={fmt},node-name=top,file.driver=file,file.filename={top},backing=base",
    ]
    extra = [word for node in nodes for word in ("-blockdev", node)]
    extra += ["-device", "virtio-blk-pci,drive=top,id=vda"]
    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await (await vm.commit("vda", policy=qc.Recycle(str(fresh)))).wait()
        await vm.close()
        await qemu.quit()
    size = 8192 if fmt == "qcow2" else 65536  # QEMU's own, where there is none to go by
    assert f"cluster_size: {size}\n" in run(QEMU.img, "info", fresh)
    assert_disk(fresh, chain.pictures[-1])


async def test_an_interrupted_recycle_is_told_of_until_its_overlay_is_laid(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        window = await overlay_of(vm, folder / f"top{WINDOW_MARK}x.qcow2")
        await window.open()  # which is left to whoever looks for windows
        assert interrupted_recycles(await vm.graph()) == []
        overlay = await overlay_of(vm, fresh)
        await overlay.open()
        (found,) = interrupted_recycles(await vm.graph())
        assert (found["node"], found["overlay"]) == (overlay.node, str(fresh))
        assert "'qmpcommit recover QMP' puts that right" in found["next"]
        await vm.execute("blockdev-del", node_name=window.node)
        await (await vm.commit("vda", policy=qc.Pivot())).wait()
        for _ in range(2):  # its reply may have been lost
            await overlay.lay()
            assert interrupted_recycles(await vm.graph()) == []


@pytest.mark.parametrize("dies_at", ["stop", "job-complete", "overlay", "thaw"])
async def test_a_fresh_overlay_whose_qemu_dies_is_deleted_or_to_be_booted(
    dies_at: str, folder: Path
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu, qc.Session.connect(qemu.qmp) as vm:

        class Kills(Notes):
            async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
                if step == dies_at:
                    assert fresh.exists()
                    qemu.kill()

        job = await vm.commit("vda", policy=qc.Recycle(str(fresh)), ledger=Kills(""))
        with pytest.raises(qc.VMGone) as gone:
            await job.wait()
    if dies_at == "thaw":
        assert (gone.value.pivoted, gone.value.overlay) == (True, str(fresh))
        assert f"boot from {fresh}" in str(gone.value)
        assert_disk(fresh, chain.pictures[-1])
    else:
        assert (gone.value.overlay, fresh.exists()) == (None, False)
        assert gone.value.pivoted is {"stop": False, "job-complete": None, "overlay": True}[dies_at]
        assert_disk(chain.base if gone.value.pivoted else chain.top, chain.pictures[-1])


async def test_an_overlay_that_is_not_used_is_deleted_when_its_qemu_has_ended(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        never = await overlay_of(vm, folder / "never.qcow2")
        overlay = await overlay_of(vm, fresh)
        await overlay.open()
        assert fresh.exists()
        kept = Left(str(fresh), laid=False)
        assert await overlay.left() == kept  # QEMU lives, whatever its monitor does
        qemu.kill()
        await qemu.ended()
        assert await never.left() is None
        taken_up = await overlay_of_plan(vm, overlay)
        assert await taken_up.left() == kept
        assert fresh.exists()
        for _ in range(2):  # somebody else may be first
            assert await overlay.left() is None
            assert not fresh.exists()
        fresh.mkdir()
        assert await overlay.left() == kept
        fresh.rmdir()
    assert_disk(chain.top, chain.pictures[-1])


async def overlay_of_plan(vm: qc.Session, other: FreshOverlay) -> FreshOverlay:
    """The same, as another process has it."""
    made = FreshOverlay(vm, other._plan, other.filename, vm.cwd)
    made.restore(stopped=False)
    return made


async def test_an_overlay_is_as_large_as_the_disk_is_when_it_is_made(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    larger = Picture(128 * MIB, bytes(chain.pictures[-1].data) + bytes(64 * MIB))
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.prepare(Request("vda", qc.Recycle(str(fresh))), Around())
            await qemu.execute("block_resize", node_name="top", size=larger.size)  # by somebody
            outcome = await (await vm.launch(job)).wait()
            assert outcome.action == "recycle"
            (disk,) = await vm.disks()
            assert [image.virtual_size for image in disk.chain] == [larger.size] * 2
        await qemu.quit()
    for path in (fresh, chain.base):
        assert_disk(path, larger)


async def test_a_file_that_only_qemu_sees_is_not_overwritten(free_port: int, folder: Path) -> None:
    """Relative names count from QEMU's folder, and over TCP nobody knows that one."""
    chain, precious = make_chain(folder), folder / "fresh.qcow2"
    precious.write_bytes(b"precious")
    async with machine(folder, chain, tcp=free_port) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.InvalidRequest, match=r"exists already.*Nothing was sent"):
                await vm.commit("vda", policy=qc.Recycle("fresh.qcow2"))
            assert not [name for name in (await vm.graph()).nodes if name.startswith("qmpcommit")]
            job = await vm.commit("vda", policy=qc.Recycle("new.qcow2"))
            assert (await job.wait()).action == "recycle"
        await qemu.quit()
    assert precious.read_bytes() == b"precious"
    for path in (folder / "new.qcow2", chain.base):
        assert_disk(path, chain.pictures[-1])
