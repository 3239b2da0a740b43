"""A snapshot window over two VMs: one instant, all or none; each ends by reading the disks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import run as qmpcommit
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.proxy import Proxy, Strike, proxy
from tests.ground.sessions import runs, time_to_go_too_far

STEPS = ("stop", "transaction", "cont")
LIMIT = 30.0
OFFSET, PATTERN = 8 << 20, 0x77


@dataclass
class Two:
    """Two running VMs, each behind a proxy that knows in which order things were said to both."""

    qemus: list[Machine] = field(default_factory=list)
    between: list[Proxy] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)
    vms: list[qc.Session] = field(default_factory=list)
    said: list[tuple[int, str]] = field(default_factory=list)
    _asked: dict[tuple[int, Any], str] = field(default_factory=dict)

    @property
    def disks(self) -> list[tuple[qc.Session, str]]:
        return [(vm, "vda") for vm in self.vms]

    def heard(self, number: int, message: dict[str, Any]) -> str:
        """A command to one of them, or the answer to one."""
        if message.get("execute") in STEPS:
            self._asked[number, message["id"]] = message["execute"]
            self.said.append((number, message["execute"]))
        elif step := self._asked.get((number, message.get("id"))):
            self.said.append((number, f"{step} done"))
        return "pass"

    def listen(self) -> None:
        for number, each in enumerate(self.between):
            each.to_qemu = each.to_client = partial(self.heard, number)

    async def die(self, number: int) -> None:
        """A dead QEMU listens no more."""
        self.qemus[number].kill()
        await self.between[number].refuse()

    @asynccontextmanager
    async def dying(self, number: int, command: str) -> AsyncIterator[None]:
        """In the block this QEMU dies when it is sent this command."""
        ends: list[asyncio.Task[None]] = []

        def fate(message: dict[str, Any]) -> str:
            if message.get("execute") != command:
                return "pass"
            ends.append(asyncio.create_task(self.die(number)))
            return "drop"

        self.between[number].to_qemu = fate
        yield
        await ends[0]

    async def nothing_left(self, number: int) -> None:
        """Its guest runs on the disk that it had."""
        vm = self.vms[number]
        assert [len(disk.chain) for disk in await vm.disks()] == [2]
        assert await runs(vm)
        nodes = await vm.execute("query-named-block-nodes", flat=True)
        assert not [each for each in nodes if each["node-name"].startswith("qmpcommit-")]
        assert await vm.execute("query-jobs") == []
        assert not list(self.chains[number].top.parent.glob("*qmpcommit-window*"))

    async def untouched(self, *numbers: int) -> None:
        """They are as they were, and their disks show what they showed."""
        for number in numbers:
            await self.nothing_left(number)
            await self.qemus[number].quit()
            assert_disk(self.chains[number].top, self.chains[number].pictures[-1])


@asynccontextmanager
async def two(folder: Path) -> AsyncIterator[Two]:
    made = Two()
    pids: dict[str, int] = {}
    behind = pytest.MonkeyPatch()
    behind.setattr("qmpcommit.qmp.monitor.peer_pid", lambda sock: pids.get(sock.getpeername()))
    async with AsyncExitStack() as stack:
        stack.callback(behind.undo)
        for name in ("one", "two"):
            place = folder / name
            place.mkdir()
            made.chains.append(make_chain(place, relative=True))
            qemu = await stack.enter_async_context(
                machine(place, made.chains[-1], style="implicit", running=True)
            )
            made.qemus.append(qemu)
            made.between.append(await stack.enter_async_context(proxy(place, qemu.qmp)))
            pids[made.between[-1].path] = qemu.pid
            vm = qc.Session.connect(made.between[-1].path, name=name)
            made.vms.append(await stack.enter_async_context(vm))
        made.listen()
        yield made


async def write_in(vm: qc.Session) -> None:
    """What the guest writes, and flushes."""
    for line in (f"write -P {PATTERN} {OFFSET} 64k", "flush"):
        command = f'qemu-io -d /machine/peripheral/vda/virtio-backend "{line}"'
        said = await vm.execute("human-monitor-command", {"command-line": command})
        assert not said.strip(), said


async def test_no_overlay_is_laid_before_all_stand_still_and_none_goes_on_before_all_are_laid(
    folder: Path,
) -> None:
    async with two(folder) as here, asyncio.timeout(LIMIT):
        late = here.between[1]
        passing = late.to_client

        def slow(message: dict[str, Any]) -> str:
            before = len(here.said)
            passing(message)
            return "hold" if len(here.said) > before else "pass"

        late.to_client = slow

        async def go_on() -> None:
            while True:
                await late.held.wait()
                await time_to_go_too_far(here.vms[0])
                late.release()

        going_on = asyncio.create_task(go_on())
        async with qc.snapshot(here.disks) as window:
            going_on.cancel()
            late.to_client = passing
            assert len(window) == 2
            for vm, chain in zip(here.vms, here.chains, strict=True):
                assert window[vm, "vda"].filename == str(chain.top)
                await write_in(vm)
                assert_disk(chain.top, chain.pictures[-1])
            assert [vm for vm, _ in window] == here.vms
        steps = [said for said in here.said if said[1] != "cont done"]
        places = {said: number for number, said in enumerate(steps)}
        for number in (0, 1):
            for other in (0, 1):
                assert places[number, "stop done"] < places[other, "transaction"]
                assert places[number, "transaction done"] < places[other, "cont"]
        assert all(each.outcomes[0].action == "pivot" for each in window.of.values())
        for number in (0, 1):
            here.chains[number].pictures[-1].fill(OFFSET, 65536, PATTERN)
        await here.untouched(0, 1)


async def test_one_vm_that_is_not_fit_leaves_nothing_on_the_other(folder: Path) -> None:
    async with two(folder) as here:
        (first, second), (_, own) = here.vms, here.disks
        for disks, error in (
            ([(first, "vda"), (second, "nope")], qc.DiskNotFound),
            ([(first, "vda"), own, own], qc.WindowError),
            ([], qc.WindowError),
        ):
            with pytest.raises(error):
                async with qc.snapshot(disks):
                    pytest.fail("it is open")
        with pytest.raises(qc.InvalidRequest, match="stand still"):
            async with qc.snapshot(here.disks, freeze=None):  # type: ignore[arg-type]
                pytest.fail("it is open")
        with pytest.raises(qc.InvalidRequest, match="bandwidth"):
            async with qc.snapshot(here.disks, bandwidth="fast"):
                pytest.fail("it is open")
        with pytest.raises(qc.InvalidRequest, match="no socket for one, two"):
            async with qc.snapshot(here.disks, freeze="agent"):
                pytest.fail("it is open")
        await here.untouched(0, 1)


@pytest.mark.parametrize("step", ["stop", "transaction", "cont"])
async def test_one_vm_that_refuses_leaves_nothing_on_the_other(folder: Path, step: str) -> None:
    async with two(folder) as here:
        here.between[1].to_qemu = refused = Strike(step, "refuse", times=1)
        if step == "cont":  # a guest that could not be let go on is tried again
            async with qc.snapshot(here.disks):
                pass
        else:
            with pytest.raises(qc.QmpCommitError, match="refused by the proxy"):
                async with qc.snapshot(here.disks):
                    pytest.fail("it is open")
        assert refused.met
        await here.untouched(0, 1)


async def test_one_qemu_that_dies_while_it_opens_leaves_nothing_on_the_other(
    folder: Path,
) -> None:
    async with two(folder) as here, asyncio.timeout(LIMIT):
        async with here.dying(1, "transaction"):
            with pytest.raises((qc.MonitorLost, qc.VMGone)):
                async with qc.snapshot(here.disks):
                    pytest.fail("it is open")
        await here.untouched(0)
    assert_disk(here.chains[1].top, here.chains[1].pictures[-1])


async def test_cancelled_at_any_message_it_leaves_nothing(folder: Path) -> None:
    async def window(here: Two) -> None:
        async with qc.snapshot(here.disks):
            pass

    async with two(folder) as here:
        for last in count(1):
            story = asyncio.create_task(window(here))
            heard = count(1)

            def cancel(
                message: dict[str, Any],
                story: asyncio.Task[None] = story,
                last: int = last,
                heard: Iterator[int] = heard,
            ) -> str:
                if next(heard) == last:
                    story.cancel()
                return "pass"

            for each in here.between:
                each.to_client = cancel
            async with asyncio.timeout(LIMIT):
                await asyncio.wait({story})
            here.listen()
            for number in (0, 1):
                await here.nothing_left(number)
            if not story.cancelled():
                break
        await story
        assert last > 50
        await here.untouched(0, 1)


async def test_where_one_vm_dies_in_it_the_other_s_window_is_closed(folder: Path) -> None:
    async with two(folder) as here, asyncio.timeout(LIMIT):
        overlays: list[str] = []

        async def window_in_which_one_dies() -> None:
            async with qc.snapshot(here.disks) as window:
                await write_in(here.vms[1])
                overlays.append(window[here.vms[1], "vda"].overlay)
                await here.die(1)

        with pytest.raises(qc.WindowError) as caught:
            await window_in_which_one_dies()
        assert caught.value.overlays == overlays
        await here.untouched(0)
    assert_disk(here.chains[1].top, here.chains[1].pictures[-1])
    here.chains[1].pictures[-1].fill(OFFSET, 65536, PATTERN)
    assert_disk(Path(overlays[0]), here.chains[1].pictures[-1])


async def test_a_bug_that_meets_one_vm_does_not_keep_the_other_s_window_open(
    folder: Path,
) -> None:
    async def broken(*args: Any, **more: Any) -> Any:
        raise ZeroDivisionError

    async with two(folder) as here, asyncio.timeout(LIMIT):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(ZeroDivisionError):
            async with qc.snapshot(here.disks):
                patched.setattr(here.vms[1], "commit", broken)
        assert await here.vms[0].windows() == []
        assert len(await here.vms[1].close_windows()) == 1
        await here.untouched(0, 1)


async def test_the_command_over_two_vms(folder: Path) -> None:
    async with two(folder) as here:
        for vm in here.vms:
            await vm.close()
        one, other = (qemu.qmp for qemu in here.qemus)
        for each in here.between:
            await each.refuse()
        copies = [chain.top.parent / "copy.qcow2" for chain in here.chains]
        said = await qmpcommit(
            "window", one, "vda", "--and", other, "vda", "--freeze", "pause", "--json", "--",
            "sh", "-c", f"cp {{1.vda}} '{copies[0]}' && cp {{2.vda}} '{copies[1]}' && exit 7",
        )  # fmt: skip
        assert said.status == 7
        for each, chain in zip(said.json["windows"], here.chains, strict=True):
            assert [disk["filename"] for disk in each["disks"]] == [str(chain.top)]
            assert [outcome["action"] for outcome in each["outcomes"]] == ["pivot"]
            assert each["quiesced"] > 0
        for qemu, chain, copy in zip(here.qemus, here.chains, copies, strict=True):
            await qemu.quit()
            assert_disk(chain.top, chain.pictures[-1])
            assert_disk(copy, chain.pictures[-1])


async def test_several_vms_have_one_instant_only_while_they_stand_still(folder: Path) -> None:
    sockets = "Give --agent 2 times for --freeze agent"
    for more, why in (
        ((), "only while their guests stand still"),
        (("--freeze", "agent", "--agent", "one"), sockets),
        (("--freeze", "pause", "--agent", "x"), sockets),
    ):
        said = await qmpcommit("window", "one", "vda", "--and", "two", "vda", *more, "--", "true")
        assert said.status == 2
        assert why in said.err
