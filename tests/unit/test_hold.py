"""One who holds a guest still: what is noted, marked and sent, in which order, whatever fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.errors import CommandRefused, MonitorLost
from qmpcommit.guest.hold import HeldGuest, Hold
from qmpcommit.qmp.monitor import Monitor

MARK = "qmpcommit-g01234567-paused"


class Vm(Monitor):
    """A monitor with one guest; what is in `fails` is raised after the command was run."""

    def __init__(self, guest: str = "running") -> None:
        super().__init__("/nowhere", name="web1")
        self.peer_pid, self.guest = 7, guest
        self.done: list[str] = []
        self.fails: dict[str, list[Exception]] = {}

    async def execute(self, command: str, arguments: Any = None, **more: object) -> Any:
        await asyncio.sleep(0)
        if command == "query-status":
            return {"status": self.guest, "running": self.guest == "running"}
        self.done.append(command)
        if command.startswith("blockdev"):
            assert arguments["node-name"] == MARK
        else:
            self.guest = "paused" if command == "stop" else "running"
        if self.fails.get(command):
            raise self.fails[command].pop(0)
        return None

    async def note(self, step: str) -> None:
        """What a hold tells is noted among what is sent."""
        self.done.append(step)


def hold_of(vm: Vm) -> Hold:
    return Hold(vm, "pause", "g01234567", note=vm.note)


HELD = ["hold", "blockdev-add", "stop"]
RELEASED = ["release", "cont", "blockdev-del", "released"]


async def test_it_is_noted_then_marked_then_held_and_unmarked_before_it_is_forgotten() -> None:
    """A mark is there only while a note tells of it: whoever is killed leaves none alone."""
    vm = Vm()
    hold = hold_of(vm)
    assert await hold.take()
    assert vm.done == HELD
    await hold.release()
    assert vm.done == [*HELD, *RELEASED]
    assert hold.seconds is not None
    assert hold.remark == ""


@pytest.mark.parametrize("lost", ["blockdev-add", "stop"])
async def test_where_a_reply_is_lost_all_of_it_is_released(lost: str) -> None:
    vm = Vm()
    vm.fails[lost] = [MonitorLost("it was lost")]
    with pytest.raises(MonitorLost):
        async with hold_of(vm).within(None):
            pytest.fail("it is held")
    sent = [step for step in RELEASED if step != "cont" or lost == "stop"]
    assert vm.done == [*HELD[: HELD.index(lost) + 1], *sent]
    assert vm.guest == "running"


@pytest.mark.parametrize(
    "error",
    [MonitorLost("it was lost"), CommandRefused("no", error_class="GenericError", desc="no")],
)
async def test_a_guest_that_does_not_go_on_at_once_is_let_go_on_again(error: Exception) -> None:
    vm = Vm()
    async with hold_of(vm).within(None):
        vm.fails["cont"] = [error]
    assert vm.done == [*HELD, "release", "cont", *RELEASED[2:]]  # it runs by then
    assert vm.guest == "running"


async def test_the_mark_stays_where_the_guest_does() -> None:
    vm = Vm()
    hold = hold_of(vm)
    await hold.take()
    vm.fails["cont"] = [MonitorLost("it was lost")] * 2
    for _ in range(2):
        vm.guest = "paused"
        with pytest.raises(MonitorLost):
            await hold.release()
    assert "blockdev-del" not in vm.done
    vm.guest = "paused"
    await hold.release()
    assert vm.done[-3:] == RELEASED[1:]


async def test_one_that_stands_still_for_another_reason_is_left_and_that_is_told() -> None:
    vm = Vm()
    async with hold_of(vm).within(5) as hold:
        vm.guest = "io-error"
    assert "cont" not in vm.done
    assert hold.remark == "the guest of web1 was not let go on: it is 'io-error' by now"


async def test_one_that_stood_still_before_is_neither_noted_nor_marked() -> None:
    vm = Vm("paused")
    async with hold_of(vm).within(5) as hold:
        assert not hold.held
    assert (vm.done, vm.guest, hold.seconds) == ([], "paused", None)


async def test_one_that_a_former_process_has_paused_goes_on_and_its_mark_goes() -> None:
    vm = Vm("paused")
    hold = Hold(vm, "pause", "g01234567", paused=True)
    await hold.release()
    assert vm.done == ["cont", "blockdev-del"]


def test_what_is_noted_is_read_in_both_forms() -> None:
    guest = HeldGuest("web1", "agent", "/agent", "7.9", 1.5)
    named = {"how": "agent", "agent": "/agent", "identity": "7.9", "since": 1.5, "step": "thaw"}
    assert HeldGuest.load("web1", guest.dump()) == guest
    assert HeldGuest.load("web1", named) == guest
    with pytest.raises((TypeError, KeyError)):
        HeldGuest.load("web1", {"how": "agent"})
    vm = Vm()
    vm.peer_pid = None
    assert not guest.is_gone(vm)  # as far as is known


async def test_a_failed_note_holds_nobody() -> None:
    vm = Vm()

    async def full(step: str) -> None:
        raise qc.CommitFailed("no space")

    with pytest.raises(qc.CommitFailed):
        async with Hold(vm, "pause", "g01234567", note=full).within(5):
            pytest.fail("it is held")
    assert vm.done == []
