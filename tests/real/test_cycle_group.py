"""A golden cycle over disks of two real QEMUs: all are kept at one instant, or all discarded."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.errors import CommandRefused
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.sessions import files, runs
from tests.real.killed_discard import killed_at

YES, NO = ["true"], ["false"]


class Watched(qc.Session):
    """Keeps what was sent, and refuses what it is told to: no real QEMU is known to."""

    sent: list[tuple[str, str]]
    refuses: Mapping[str, str] = {}

    async def execute(self, command: str, *more: Any, **options: Any) -> Any:
        if self.refuses.get(self.name) == command.removeprefix("x-"):
            raise CommandRefused(f"{command} refused", command=command, desc="it won't",
                                 error_class="GenericError")  # fmt: skip
        answer = await super().execute(command, *more, **options)
        self.sent.append((self.name, command.removeprefix("x-")))
        return answer


@dataclass
class Ground:
    """VM "one" has vda and vdb, "two" has vda; `disks` are all three, `chains` are theirs."""

    qemus: dict[str, Machine] = field(default_factory=dict)
    vms: dict[str, Watched] = field(default_factory=dict)
    chains: list[Chain] = field(default_factory=list)
    sent: list[tuple[str, str]] = field(default_factory=list)

    @property
    def disks(self) -> list[tuple[qc.Session, str]]:
        one, two = self.vms["one"], self.vms["two"]
        return [(one, "vda"), (one, "vdb"), (two, "vda")]

    def order(self, *commands: str) -> list[tuple[str, str]]:
        """What was sent of these, each once in a row."""
        found = [each for each in self.sent if each[1] in commands]
        return [each for at, each in enumerate(found) if at == 0 or found[at - 1] != each]

    async def now(self) -> list[list[Path]]:
        """The files of the disks, active layer first."""
        return [await files(vm, name) for vm, name in self.disks]

    async def run(self) -> list[bool]:
        """Whether the guests run."""
        return [await runs(vm) for vm in self.vms.values()]

    async def as_before(self) -> None:
        """Nothing of it is left, and the guests run on the disks that they had."""
        assert await self.now() == [[chain.top, chain.base] for chain in self.chains]
        assert await self.run() == [True, True]
        for vm in self.vms.values():
            assert not [node for node in (await vm.graph()).nodes if node.startswith("qmpcommit-")]
            assert await vm.execute("query-jobs") == []
        await self.quit()
        for chain in self.chains:
            assert not list(chain.top.parent.glob("*.cycle-*"))
            assert_disk(chain.top, chain.pictures[-1])
            assert_disk(chain.base, chain.pictures[0])

    async def begun_anew(self, fresh: list[str], layer: int) -> None:
        """Each disk goes on with an empty overlay over its base, which shows that layer."""
        pairs = list(zip(fresh, self.chains, strict=True))
        assert await self.now() == [[Path(overlay), chain.base] for overlay, chain in pairs]
        assert await self.run() == [True, True]
        await self.quit()
        for overlay, chain in pairs:
            assert_disk(chain.base, chain.pictures[layer])
            assert_disk(Path(overlay), chain.pictures[layer])

    async def quit(self) -> None:
        for qemu in self.qemus.values():
            await qemu.quit()


@asynccontextmanager
async def ground(folder: Path) -> AsyncIterator[Ground]:
    made = Ground()
    async with AsyncExitStack() as stack:
        for name, count in (("one", 2), ("two", 1)):
            place = folder / name
            place.mkdir()
            chains = [make_chain(place, names=(f"base{n}", f"top{n}")) for n in range(count)]
            made.chains += chains
            qemu = await stack.enter_async_context(machine(place, *chains, running=True))
            vm = Watched.connect(qemu.qmp, name=name)
            vm.sent = made.sent
            made.qemus[name], made.vms[name] = qemu, await stack.enter_async_context(vm)
        yield made


@pytest.mark.parametrize("delete", [True, False])
async def test_all_are_kept(folder: Path, delete: bool) -> None:
    async with ground(folder) as g:
        done = await qc.cycle(g.disks, keep_if=YES, guest="reset", delete=delete)
        assert [each.result for each in done] == ["kept"] * 3
        assert [each.kept.action for each in done if each.kept] == ["recycle"] * 3
        assert set(g.order("stop", "cont")[:2]) == {("one", "stop"), ("two", "stop")}
        await g.begun_anew([each.overlay for each in done], -1)
        assert [chain.top.exists() for chain in g.chains] == [not delete] * 3


@pytest.mark.parametrize("delete", [True, False])
async def test_all_are_discarded_before_any_guest_goes_on(folder: Path, delete: bool) -> None:
    async with ground(folder) as g:
        done = await qc.cycle(g.disks, keep_if=NO, guest="reset", delete=delete)
        assert [each.result for each in done] == ["discarded"] * 3
        ends = [each.discarded for each in done if each.discarded]
        assert [end.former for end in ends] == [str(chain.top) for chain in g.chains]
        assert [(end.vm, end.deleted, end.warnings) for end in ends] == [
            ("one", delete, ()), ("one", delete, ()), ("two", delete, ())
        ]  # fmt: skip
        shown = ("stop", "blockdev-snapshot", "blockdev-reopen", "system_reset", "cont")
        assert g.order(*shown) == [
            ("one", "stop"), ("one", "blockdev-snapshot"),
            ("two", "stop"), ("two", "blockdev-snapshot"),
            ("one", "blockdev-reopen"), ("two", "blockdev-reopen"),
            ("one", "system_reset"), ("one", "cont"), ("two", "system_reset"), ("two", "cont"),
        ]  # fmt: skip
        assert g.sent.count(("one", "system_reset")) == 1
        await g.begun_anew([each.overlay for each in done], 0)
        assert [chain.top.exists() for chain in g.chains] == [not delete] * 3


async def test_they_are_asked_once_for_all(folder: Path) -> None:
    """And the disks of one VM go round and round."""
    asked: list[qc.Ready] = []

    async def keep_if(ready: qc.Ready) -> bool:
        asked.append(ready)
        return len(asked) % 2 == 0

    async with ground(folder) as g:
        rounds = g.vms["one"].cycles(["vda", "vdb"], every=0, keep_if=keep_if, guest="reset")
        async for done in rounds:
            assert [each.result for each in done] == [["kept", "discarded"][len(asked) % 2]] * 2
            if len(asked) == 3:
                break
        first = asked[0]
        assert isinstance(first, qc.GroupReady)
        assert [member.disk for member in first.members] == ["vda", "vdb"]
        told = folder / "told"
        command = ["sh", "-c", f'echo "$QMPCOMMIT_TOP" >{told}; exit 1']
        last = await qc.cycle(g.disks, keep_if=command, guest="reset")
        tops = [each.discarded.former for each in last if each.discarded]
        assert told.read_text().split() == tops
        await g.begun_anew([each.overlay for each in last], 0)


@pytest.mark.parametrize("vm", ["one", "two"])
@pytest.mark.parametrize("refused", ["blockdev-snapshot", "blockdev-reopen"])
async def test_where_one_is_refused_none_is_discarded(folder: Path, vm: str, refused: str) -> None:
    async with ground(folder) as g:
        for each in g.vms.values():
            each.refuses = {vm: refused}
        with pytest.raises(qc.CommitFailed, match=rf"of {vm}: it won't. Nothing was discarded$"):
            await qc.discard(g.disks, guest="reset", delete=True)
        await g.as_before()


async def test_where_a_qemu_dies_the_other_goes_on_as_before(folder: Path) -> None:
    """Its disks were not begun, or are whole in their former overlay."""

    class Killing(Watched):
        async def execute(self, command: str, *more: Any, **options: Any) -> Any:
            if (self.name, command) == ("two", "blockdev-snapshot"):
                g.qemus["two"].signal(signal.SIGKILL)
                await g.qemus["two"].ended()
            return await super().execute(command, *more, **options)

    async with ground(folder) as g:
        g.vms["two"].__class__ = Killing
        with pytest.raises((qc.MonitorLost, qc.VMGone)):
            await qc.discard(g.disks, guest="reset", delete=True)
        one = g.vms["one"]
        assert [(await one.disk(name)).chain[0].filename for name in ("vda", "vdb")] == [
            str(chain.top) for chain in g.chains[:2]
        ]
        assert await runs(one)
        await g.qemus["one"].quit()
    for chain in g.chains:
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("dies", ["one", "two"])
async def test_where_a_qemu_dies_after_the_exchange_the_other_goes_on(
    folder: Path, dies: str
) -> None:
    """All are discarded by then: the other guest is reset and does not stand still."""

    class Killing(Watched):
        async def execute(self, command: str, *more: Any, **options: Any) -> Any:
            if (self.name, command) == (dies, "blockdev-del"):
                g.qemus[dies].signal(signal.SIGKILL)
                await g.qemus[dies].ended()
            return await super().execute(command, *more, **options)

    async with ground(folder) as g:
        g.vms[dies].__class__ = Killing
        with pytest.raises((qc.MonitorLost, qc.VMGone)):
            await qc.discard(g.disks, guest="reset", delete=True)
        (other,) = {"one", "two"} - {dies}
        assert await runs(g.vms[other])
        assert g.sent.count((other, "system_reset")) == 1
        left = [(vm, name) for vm, name in g.disks if vm is g.vms[other]]
        fresh = [Path((await vm.disk(name)).chain[0].filename) for vm, name in left]
        await g.qemus[other].quit()
    theirs = g.chains[:2] if other == "one" else g.chains[2:]
    for chain, overlay in zip(theirs, fresh, strict=True):
        assert not chain.top.exists()
        assert_disk(chain.base, chain.pictures[0])
        assert_disk(overlay, chain.pictures[0])


async def test_what_can_not_be_put_back_is_named(folder: Path) -> None:
    async with ground(folder) as g:
        one = g.vms["one"]
        one.refuses = {"one": "block-commit"}
        g.vms["two"].refuses = {"two": "blockdev-snapshot"}
        with pytest.raises(qc.CommitFailed) as caught:
            await qc.discard(g.disks, guest="reset")
        message = str(caught.value)
        assert "of two: it won't. Nothing was discarded. But vda of one could not be" in message
        assert f"{g.chains[0].top} is whole" in message
        assert await g.run() == [False, True]
        one.refuses = {}
        done = await one.discard(["vda", "vdb"], guest="reset")  # as it says
        assert [end.former for end in done] == [str(chain.top) for chain in g.chains[:2]]
        assert await g.run() == [True, True]
        await g.quit()
    for chain, end in zip(g.chains, done, strict=False):
        assert_disk(chain.top, chain.pictures[-1])
        assert_disk(Path(end.overlay), chain.pictures[0])


STEPS = [(step, place) for step in ("stop", "lay", "reopen") for place in range(1, 4)]


@pytest.mark.parametrize(("step", "place"), STEPS)
async def test_one_that_was_killed_is_finished_by_the_next(
    folder: Path, step: str, place: int
) -> None:
    """At the `place`-th disk's step; once an overlay is laid the next call carries all out."""
    async with ground(folder) as g:
        with killed_at(step, place):
            await qc.discard(g.disks, guest="reset", delete=True)
        done = await qc.discard(g.disks, guest="reset", delete=True)
        assert [end.former for end in done] == [str(chain.top) for chain in g.chains]
        assert [end.deleted for end in done] == [True] * 3
        for vm in g.vms.values():
            nodes = set((await vm.graph()).nodes)
            assert not nodes & {"top0", "top1"}
            assert len([node for node in nodes if node.endswith("-top")]) == len(await vm.disks())
        await g.begun_anew([end.overlay for end in done], 0)


async def test_a_disk_whose_former_overlay_somebody_closed(folder: Path) -> None:
    """Between a killed discard and the next; the others can be finished without it."""
    async with ground(folder) as g:
        with killed_at("reopen", 2):
            await qc.discard(g.disks, guest="reset")
        await g.vms["one"].execute("blockdev-del", node_name="top0")
        with pytest.raises(qc.ChainError, match="Name the other disks without it"):
            await qc.discard(g.disks, guest="reset")
        done = await qc.discard(g.disks[1:], guest="reset")
        assert [end.former for end in done] == [str(chain.top) for chain in g.chains[1:]]
        overlays = [str((await g.now())[0][0]), *(end.overlay for end in done)]
        await g.begun_anew(overlays, 0)


async def test_what_makes_no_sense_changes_nothing(folder: Path) -> None:
    async with ground(folder) as g:
        one = g.vms["one"]
        with pytest.raises(qc.InvalidRequest, match="at least one"):
            await qc.discard([], guest="reset")
        with pytest.raises(qc.InvalidRequest, match="named before"):
            await one.discard(["vda", "vda"], guest="reset")
        with pytest.raises(qc.InvalidRequest, match="is no folder, and each of 2 disks"):
            await one.discard(["vda", "vdb"], guest="reset", overlay=folder / "fresh.qcow2")
        with pytest.raises(qc.VMStateError, match="reset or to be left stopped"):
            await qc.cycle(g.disks, keep_if=NO)
        with pytest.raises(qc.CommitFailed, match=r"top0.* and .*top1.* and .*top0.*no answer"):
            await qc.cycle(g.disks, keep_if=["sh", "-c", "exit 127"], guest="stop")
        await g.as_before()


@pytest.mark.parametrize("by_hand", [False, True], ids=["recovered", "continued by hand"])
async def test_a_guest_that_does_not_go_on_is_named(folder: Path, by_hand: bool) -> None:
    async with ground(folder) as g:
        for vm in g.vms.values():
            vm.refuses = {"two": "blockdev-snapshot", "one": "cont"}
        with pytest.raises(qc.CommitFailed, match=r"guest of one may be stopped still .*'cont'"):
            await qc.discard(g.disks, guest="reset")
        assert await runs(g.vms["one"]) is False
        g.vms["one"].refuses = {}
        if by_hand:
            await g.vms["one"].execute("cont")
        (mark,) = (await g.vms["one"].recover()).findings  # which stays for whoever comes next
        assert (mark.kind, mark.done) == ("frozen", True)
        await g.as_before()


async def test_a_guest_that_a_recycle_hands_over_goes_on_where_the_discard_fails(
    folder: Path,
) -> None:
    """It stands still for both; what fails has begun nothing on its VM yet."""
    fresh = folder / "fresh.qcow2"
    async with ground(folder) as g:
        one, two = g.vms["one"], g.vms["two"]
        execute, lays, may_fail = two.execute, asyncio.Event(), asyncio.Event()

        async def failing(command: str, *more: Any, **options: Any) -> Any:
            if command == "blockdev-snapshot":
                lays.set()
                await may_fail.wait()
                g.qemus["two"].kill()
            return await execute(command, *more, **options)

        two.execute = failing  # type: ignore[method-assign]
        discarding = asyncio.ensure_future(qc.discard([(two, "vda"), (one, "vda")], guest="reset"))
        await lays.wait()
        job = await one.commit("vdb", policy=qc.Recycle(str(fresh)))
        assert (await job.wait()).action == "recycle"
        assert await runs(one) is False  # it was handed over
        may_fail.set()
        with pytest.raises((qc.VMGone, qc.MonitorLost)):
            await discarding
        assert await runs(one)
        assert await files(one, "vda") == [g.chains[0].top, g.chains[0].base]
        assert await files(one, "vdb") == [fresh, g.chains[1].base]
        await g.qemus["one"].quit()
    assert_disk(g.chains[0].top, g.chains[0].pictures[-1])
    assert_disk(fresh, g.chains[1].pictures[-1])
    assert_disk(g.chains[2].top, g.chains[2].pictures[-1])


@pytest.mark.parametrize("again", [False, True], ids=["new", "begun by a killed one"])
async def test_a_cancelled_one_ends_first(folder: Path, again: bool) -> None:
    async with ground(folder) as g:
        if again:
            with killed_at("reopen"):
                await qc.discard(g.disks, guest="reset")
        command = "system_reset" if again else "blockdev-snapshot"
        discarding = asyncio.ensure_future(qc.discard(g.disks, guest="reset"))
        async with asyncio.timeout(30):
            while ("one", command) not in g.sent:
                await asyncio.sleep(0)
        discarding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await discarding
        await g.begun_anew([str(files[0]) for files in await g.now()], 0)
