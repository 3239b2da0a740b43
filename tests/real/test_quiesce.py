"""Pausing a real machine for a moment: it always goes on, however the moment ends."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.images import make_chain
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.sessions import hurried, runs, thaws_once


class Notebook:
    """Remembers what was noted, and whether the machine ran then."""

    def __init__(self, qemu: Machine) -> None:
        self.notes: list[tuple[str, dict[str, Any], bool]] = []
        self._qemu = qemu

    async def note(self, step: str, **facts: Any) -> None:
        self.notes.append((step, facts, await runs(self._qemu)))


async def test_the_vcpus_stand_still_for_the_body_and_each_step_is_noted_before(
    folder: Path,
) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        notes = Notebook(qemu)
        async with qc.freeze(vm, "pause", ledger=notes) as quiet:
            assert not await runs(qemu)
            assert quiet.held
            assert quiet.seconds is None
        assert await runs(qemu)
        assert quiet.seconds is not None
        assert quiet.seconds > 0
        facts = {"how": "pause", "agent": None}
        assert notes.notes == [("freeze", facts, True), ("thaw", facts, False)]


async def test_a_guest_that_is_reset_while_it_is_paused_goes_on(folder: Path) -> None:
    async with machine(folder, make_chain(folder), running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            with vm.events("RESET") as resets:
                async with qc.freeze(vm, "pause"):
                    await qemu.execute("system_reset")
                    await anext(resets)
                    assert (await vm.query_status()).status == "prelaunch"
        assert await runs(qemu)


async def test_a_guest_that_was_paused_before_stays_so(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with qc.freeze(vm, "pause") as quiet:
            assert not quiet.held
        assert not await runs(qemu)


async def test_a_storage_daemon_has_nothing_to_pause(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        async with qc.freeze(vm, "pause") as quiet:
            assert not quiet.held
        assert quiet.seconds is None


async def test_a_body_that_raises_leaves_the_guest_running(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        with pytest.raises(ZeroDivisionError):
            async with qc.freeze(vm, "pause"):
                raise ZeroDivisionError
        assert await runs(qemu)


async def test_a_body_that_takes_too_long_is_cancelled_and_told(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        with pytest.raises(qc.DeadlineExceeded, match=r"0\.2 s"):
            async with qc.freeze(vm, "pause", limit=0.2) as quiet:
                await asyncio.Event().wait()
        assert await runs(qemu)
        assert quiet.seconds is not None
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


async def test_the_guest_goes_on_at_the_limit_even_if_the_body_does_not_heed_it(
    folder: Path,
) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")

        async def heedless() -> None:
            async with qc.freeze(vm, "pause", limit=0.2):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    async with asyncio.timeout(20):
                        async for _ in resumed.raw():
                            break
                assert await runs(qemu)

        with vm.events("RESUME") as resumed, pytest.raises(qc.DeadlineExceeded):
            await heedless()


async def test_what_the_body_raises_at_the_limit_is_the_news(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")

        async def body() -> None:
            async with qc.freeze(vm, "pause", limit=0.2):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    raise LookupError("no such disk") from None

        with pytest.raises(LookupError, match="no such disk"):
            await body()
        assert await runs(qemu)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


async def test_cancelled_before_or_after_any_command_the_guest_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        execute = vm.execute
        left = -1

        def pass_by() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                task.cancel()

        async def counted(command: str, *given: Any) -> Any:
            pass_by()
            try:
                return await execute(command, *given)
            finally:
                pass_by()

        async def work() -> None:
            async with qc.freeze(vm, "pause"):
                await asyncio.sleep(0)

        monkeypatch.setattr(vm, "execute", counted)
        for point in itertools.count(1):
            left = point
            task = asyncio.create_task(work())
            await asyncio.wait({task})
            assert await runs(qemu), f"paused for ever when cancelled at point {point}"
            if not task.cancelled():
                task.result()
                break
        assert point == 9  # query-status, stop, query-status, cont: before and after each


async def test_what_a_killed_process_left_paused_is_thawed_and_that_can_be_repeated(
    folder: Path,
) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        await qemu.execute("stop")
        for _ in range(2):
            await qc.thaw(vm, "pause")
            assert await runs(qemu)


async def test_the_end_of_the_vm_meanwhile_is_the_bodys_to_tell(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        async with qc.freeze(vm, "pause"):
            qemu.signal(signal.SIGKILL)
            await qemu.ended()


async def test_a_note_that_fails_prevents_the_freeze_but_not_the_thaw(folder: Path) -> None:
    class Full:
        def __init__(self, last: str) -> None:
            self.last = last

        async def note(self, step: str, **facts: Any) -> None:
            if step == self.last:
                raise OSError("no space left on device")

    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        async with qc.freeze(vm, "pause", ledger=Full("thaw")):
            assert not await runs(qemu)
        assert await runs(qemu)
        with pytest.raises(qc.CommitFailed, match="no space") as caught:
            async with qc.freeze(vm, "pause", ledger=Full("freeze")):
                raise AssertionError("not frozen, and begun nevertheless")
        assert isinstance(caught.value.__cause__, OSError)
        assert await runs(qemu)


async def test_what_has_no_meaning_is_refused(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        for how, options in (("agent", {}), ("freeze", {}), ("pause", {"limit": -1})):
            with pytest.raises(qc.InvalidRequest):
                async with qc.freeze(vm, how, **options):  # type: ignore[arg-type]
                    pass
        async with qc.freeze(vm, None, limit=1) as quiet:
            assert not quiet.held


@contextmanager
def hangs(qemu: Machine, vm: qc.Session) -> Iterator[None]:
    """In the block QEMU does not answer."""
    qemu.stop()
    try:
        with hurried(vm):
            yield
    finally:
        qemu.cont()


@contextmanager
def no_patience() -> Iterator[None]:
    """In the block a thaw is tried once."""
    with pytest.MonkeyPatch.context() as patch:
        thaws_once(patch)
        yield


async def test_a_guest_that_can_not_be_thawed_is_told_with_what_to_do(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        await qemu.execute("stop")
        with pytest.raises(qc.InvalidRequest, match="socket of the guest agent"):
            await qc.thaw(vm, "agent")
        not_thawed = pytest.raises(qc.QuiesceFailed, match="may still be paused; send cont")
        with hangs(qemu, vm), not_thawed as error:
            await qc.thaw(vm, "pause", patience=0)
        assert error.value.how == "pause"
        await qc.thaw(vm, "pause")
        assert await runs(qemu)


async def test_a_body_that_was_cancelled_stays_so_where_its_thaw_fails(folder: Path) -> None:
    """What ended the body is the news; what the thaw met is a note on it."""
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute("cont")
        inside = asyncio.Event()

        async def body() -> None:
            async with qc.freeze(vm, "pause"):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(body())
        await inside.wait()
        with hangs(qemu, vm), no_patience():
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as error:
                await task
        assert "may still be paused" in error.value.__notes__[0]
        await qc.thaw(vm, "pause")
        assert await runs(qemu)


async def test_a_guest_that_is_gone_needs_no_thaw(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await vm.execute("query-status")
        await qemu.quit()
        with pytest.raises(qc.VMGone):
            await qc.thaw(vm, "agent", folder / "no agent either")


async def test_a_monitor_that_does_not_answer_is_told_and_nothing_was_paused(
    folder: Path,
) -> None:
    async with (
        machine(folder, make_chain(folder), running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        not_asked = pytest.raises(qc.DeadlineExceeded, match="did not answer query-status")
        with hangs(qemu, vm), not_asked:
            async with qc.freeze(vm, "pause"):
                pytest.fail("it is quiesced")
        assert await runs(qemu)


async def test_a_body_that_is_done_ends_in_the_thaw_that_failed(folder: Path) -> None:
    async with (
        machine(folder, make_chain(folder), running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        AsyncExitStack() as stack,
    ):

        async def body() -> None:
            async with qc.freeze(vm, "pause"):
                stack.enter_context(no_patience())
                stack.enter_context(hangs(qemu, vm))

        with pytest.raises(qc.QuiesceFailed, match="may still be paused; send cont"):
            await body()
        await stack.aclose()
        await qc.thaw(vm, "pause")
        assert await runs(qemu)
