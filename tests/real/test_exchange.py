"""An overlay is exchanged for an empty one over its base, under a real QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.chain import absolute
from qmpcommit.block.identity import identify
from qmpcommit.commit.claim import take
from qmpcommit.commit.plan import Plan
from qmpcommit.cycles.exchange import Exchange, Guest, complete, exchange_all, put_back
from qmpcommit.errors import CommandRefused
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, Style, machine, storage_daemon
from tests.ground.proxy import Strike, proxy
from tests.ground.sessions import files, runs

DEVICE = "/machine/peripheral/vda/virtio-backend"


class Notes:
    """What was noted, all facts together; the process "dies" before the step `dies_at`."""

    def __init__(self, dies_at: str = "") -> None:
        self.noted: dict[str, Any] = {}
        self.steps: list[str] = []
        self._dies_at = dies_at

    async def note(self, step: str, **facts: Any) -> None:
        self.noted = {**self.noted, **facts, "step": step}
        self.steps.append(step)
        if step == self._dies_at:
            raise asyncio.CancelledError


async def plan_of(vm: qc.Session, name: str = "vda") -> Plan:
    disk = await vm.disk(name)
    return Plan(vm=vm.name, disk=disk, top=disk.chain[0], base=disk.chain[1],
                job_id="qmpcommit-c0123", two_phase=True, policy=qc.Pivot())  # fmt: skip


async def exchanged(made: Exchange) -> list[str]:
    """Carry it out, or what is left of it: its warnings."""

    async def decide(which: str) -> None:
        """A recovery goes on with what it finds."""

    await exchange_all([made], decide)
    return made.warnings


async def exchange(
    vm: qc.Session, plan: Plan, fresh: Path, notes: Notes, *, guest: Guest = "reset"
) -> list[str]:
    file = identify(absolute(plan.top, vm.cwd), vm.peer_pid)
    made = Exchange(vm, plan, str(fresh), guest=guest, note=notes.note, file=file,
                    noted=notes.noted)  # fmt: skip
    return await exchanged(made)


@pytest.mark.parametrize("style", ["blockdev", "drive", "implicit"])
async def test_the_disk_starts_again_from_its_base(folder: Path, style: Style) -> None:
    chain = make_chain(folder, 3)
    fresh = folder / "fresh.qcow2"
    async with (
        machine(folder, chain, style=style, running=True) as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        with session.events("RESET") as resets:
            assert await exchange(session, await plan_of(session), fresh, Notes()) == []
            async with asyncio.timeout(30):
                async for _ in resets.raw():
                    break
        assert await files(session) == [fresh, chain.files[1], chain.base]
        assert await runs(vm)
        await vm.quit()
    assert not chain.top.exists()
    assert_disk(chain.files[1], chain.pictures[1])
    assert_disk(fresh, chain.pictures[1])


@pytest.mark.parametrize("filters", [("throttle",), ("copy-on-read",)])
async def test_what_lies_over_the_overlay_stays(folder: Path, filters: tuple[str, ...]) -> None:
    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    async with (
        machine(folder, chain, filters=filters, running=True) as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        assert await exchange(session, await plan_of(session), fresh, Notes()) == []
        (disk,) = await session.disks()
        assert disk.filters == (f"{filters[0]}0",)
        assert disk.chain[0].filename == str(fresh)
        await vm.quit()
    assert_disk(fresh, chain.pictures[0])


async def test_a_guest_stays_stopped_where_that_is_asked(folder: Path) -> None:
    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    async with (
        machine(folder, chain, running=True) as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        await exchange(session, await plan_of(session), fresh, Notes(), guest="stop")
        assert (await vm.execute("query-status"))["status"] == "paused"
        await vm.quit()
    assert_disk(fresh, chain.pictures[0])


async def test_a_storage_daemon_has_no_guest(folder: Path) -> None:
    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    async with (
        storage_daemon(folder, chain, export=False) as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        await exchange(session, await plan_of(session, "top"), fresh, Notes())
        await vm.quit()
    assert_disk(fresh, chain.pictures[0])


async def test_a_file_that_is_there_is_not_overwritten(folder: Path) -> None:
    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    fresh.write_text("precious")
    async with (
        machine(folder, chain, running=True) as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        with pytest.raises(qc.CommitFailed, match="exists already"):
            await exchange(session, await plan_of(session), fresh, Notes())
        assert await runs(vm)
        await vm.quit()
    assert fresh.read_text() == "precious"
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("refused", ["blockdev-snapshot", "blockdev-reopen"])
async def test_what_qemu_refuses_changes_nothing(folder: Path, refused: str, running: bool) -> None:
    """A QEMU that takes all but one command: no real one is known to refuse it."""

    class Refusing(qc.Session):
        async def execute(self, command: str, *more: Any, **options: Any) -> Any:
            if command.endswith(refused):
                raise CommandRefused(f"{command} refused", command=command, desc="no",
                                     error_class="GenericError")  # fmt: skip
            return await super().execute(command, *more, **options)

    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    async with (
        machine(folder, chain, running=running) as vm,
        Refusing.connect(vm.qmp) as session,
    ):
        with pytest.raises((qc.CommitFailed, CommandRefused)):
            await exchange(session, await plan_of(session), fresh, Notes())
        assert await files(session) == [chain.top, chain.base]
        assert await runs(vm) is running
        await vm.quit()
    assert not fresh.exists()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("step", ["stop", "lay", "reopen", "close", "guest", "exchanged"])
async def test_another_process_goes_on_from_any_step(folder: Path, step: str) -> None:
    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as vm:
        async with qc.Session.connect(vm.qmp) as session:
            notes = Notes(step)
            plan = await plan_of(session)
            file = identify(absolute(plan.top, session.cwd), session.peer_pid)
            with suppress(asyncio.CancelledError):
                await exchange(session, plan, fresh, notes)
            assert notes.steps[-1] == step
        async with qc.Session.connect(vm.qmp) as session:
            after = Notes()
            after.noted = notes.noted
            made = Exchange(session, plan, str(fresh), guest="reset", note=after.note, file=file,
                            noted=notes.noted)  # fmt: skip
            assert await exchanged(made) == []
            assert await files(session) == [fresh, chain.base]
            nodes = (await session.graph()).nodes
        assert "top" not in nodes
        assert await runs(vm)
        assert await vm.execute("query-jobs") == []
        await vm.quit()
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(fresh, chain.pictures[0])


async def test_what_was_done_before_its_last_note_is_not_done_again(folder: Path) -> None:
    """The guest went on, and the old overlay is deleted: it is neither reset nor looked for."""
    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"

    class Forgetful(Notes):
        async def note(self, step: str, **facts: Any) -> None:
            if step == "exchanged":
                raise asyncio.CancelledError
            await super().note(step, **facts)

    async with machine(folder, chain, running=True) as vm:
        async with qc.Session.connect(vm.qmp) as session:
            notes = Forgetful()
            plan = await plan_of(session)
            file = identify(absolute(plan.top, session.cwd), session.peer_pid)
            with suppress(asyncio.CancelledError):
                await exchange(session, plan, fresh, notes)
        assert not chain.top.exists()
        async with qc.Session.connect(vm.qmp) as session:
            with session.events("RESET", "STOP", "RESUME") as heard:
                again = Notes()
                made = Exchange(session, plan, str(fresh), guest="reset", note=again.note,
                                file=file, noted=notes.noted)  # fmt: skip
                assert await exchanged(made) == []
            # A guest that finds nothing to boot resets itself, however often.
            assert [each async for each in heard.raw() if not each.get("guest")] == []
            assert again.steps[-1] == "exchanged"
            assert await files(session) == [fresh, chain.base]
        assert await runs(vm)
        await vm.quit()
    assert_disk(fresh, chain.pictures[0])


@pytest.mark.parametrize("other", ["a job", "another chain"])
async def test_what_others_do_to_the_disk_meanwhile_is_seen_first(other: str, folder: Path) -> None:
    chain = make_chain(folder, 2)
    async with (
        machine(folder, chain, running=True) as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        plan = await plan_of(session)
        job = await session.commit("vda", policy=qc.Hold(), job_id="qmpcommit-theirs")
        await job.ready()
        why = r"it has a block job \(qmpcommit-theirs\)"
        if other == "another chain":
            await job.pivot()
            why = "its chain is another one by now"
        with pytest.raises(qc.ChainError, match=f"{why}. Nothing was discarded"):
            await exchange(session, plan, folder / "fresh.qcow2", Notes())
        if other == "a job":
            await job.abort()
        assert await runs(vm)
        await session.close()
        await vm.quit()
    assert not (folder / "fresh.qcow2").exists()
    assert_disk(chain.top if other == "a job" else chain.base, chain.pictures[-1])


async def test_a_qemu_that_knows_only_the_older_command_is_asked_with_that(folder: Path) -> None:
    """As QEMU before 6.1 does; a newer one plays it here."""

    class Older(qc.Session):
        async def execute(
            self, command: str, arguments: Mapping[str, object] | None = None, **more: object
        ) -> Any:
            if command == "blockdev-reopen":
                raise CommandRefused("no such command", command=command, desc="no such command",
                                     error_class="CommandNotFound")  # fmt: skip
            if command == "x-blockdev-reopen":
                asked.append(command)
                try:
                    return await super().execute("blockdev-reopen", {"options": [arguments]})
                except CommandRefused as error:
                    if error.error_class != "CommandNotFound":
                        raise
            return await super().execute(command, arguments, **more)

    asked: list[str] = []
    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    async with machine(folder, chain) as vm, Older.connect(vm.qmp) as session:
        assert await exchange(session, await plan_of(session), fresh, Notes()) == []
        assert asked == ["x-blockdev-reopen"]
        assert await files(session) == [fresh, chain.base]
        await session.close()
        await vm.quit()
    assert_disk(fresh, chain.pictures[0])


async def test_what_qemu_has_is_believed_and_not_what_it_answers(folder: Path) -> None:
    class Lying(qc.Session):
        """It takes the command, and does nothing."""

        async def execute(self, command: str, *more: Any, **options: Any) -> Any:
            if command.endswith("blockdev-reopen"):
                return {}
            return await super().execute(command, *more, **options)

    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    async with (
        machine(folder, chain, running=True) as vm,
        Lying.connect(vm.qmp) as session,
    ):
        with pytest.raises(qc.CommitFailed, match="although QEMU took all commands"):
            await exchange(session, await plan_of(session), fresh, Notes())
        assert await files(session) == [chain.top, chain.base]
        assert await runs(vm)
        await session.close()
        await vm.quit()
    assert not fresh.exists()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_qemu_that_ends_when_all_is_exchanged_keeps_the_old_file(folder: Path) -> None:
    chain = make_chain(folder, 2)
    fresh = folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as vm:

        class Ending(qc.Session):
            async def execute(self, command: str, *more: Any, **options: Any) -> Any:
                answer = await super().execute(command, *more, **options)
                if command == "cont":
                    vm.kill()
                    await vm.ended()
                return answer

        async with Ending.connect(vm.qmp) as session:
            notes = Notes()
            (warning,) = await exchange(session, await plan_of(session), fresh, notes)
            assert warning.startswith(f"{chain.top} stays: ")
            assert notes.steps[-1] == "exchanged"
    assert_disk(fresh, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])


# -- what a process that was killed has begun for many, another ends for each --------------------


def again(
    vm: qc.Session, plan: Plan, fresh: Path, noted: Mapping[str, Any], notes: Notes | None = None
) -> Exchange:
    note = (notes or Notes()).note
    return Exchange(vm, plan, str(fresh), guest="reset", note=note, noted=noted)


async def killed_at(step: str, qmp: str, fresh: Path) -> tuple[Plan, dict[str, Any]]:
    """An exchange whose process noted that step and did no more: its plan, and what it noted."""
    notes = Notes(step)
    async with qc.Session.connect(qmp) as session:
        plan = await plan_of(session)
        with suppress(asyncio.CancelledError):
            made = Exchange(session, plan, str(fresh), guest="reset", note=notes.note)
            made.running = True
            await made.lay()
            await made.swap()
            await made.close()
        return plan, {"running": True, **notes.noted}


async def as_before(session: qc.Session, qemu: Machine, chain: Chain, fresh: Path) -> None:
    assert await files(session) == [chain.top, chain.base]
    assert not [name for name in (await session.graph()).nodes if name.startswith("qmpcommit-")]
    assert await session.execute("query-jobs") == []
    assert await runs(session)
    await session.close()
    await qemu.quit()
    assert not fresh.exists()
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[0])


@pytest.mark.parametrize("step", ["reopen", "close"])
async def test_after_the_decision_another_process_carries_it_out(folder: Path, step: str) -> None:
    chain, fresh = make_chain(folder, 2), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        plan, noted = await killed_at(step, qemu.qmp, fresh)
        async with qc.Session.connect(qemu.qmp) as session:
            over = again(session, plan, fresh, {"step": "exchanged"})
            made = again(session, plan, fresh, noted)
            await complete([over, made])
            assert (over.warnings, made.warnings) == ([], [])
            assert await files(session) == [fresh, chain.base]
            assert await runs(session)
            assert await session.execute("query-jobs") == []
        await qemu.quit()
    assert_disk(fresh, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])  # nobody has asked to have it deleted


@pytest.mark.parametrize("step", ["reopen", "close"])
async def test_a_guest_that_went_on_over_its_former_memory_is_told_of_by_another_process(
    folder: Path, step: str
) -> None:
    """Somebody let it go on after the former process was killed, and before it was reset."""
    chain, fresh = make_chain(folder, 2), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        plan, noted = await killed_at(step, qemu.qmp, fresh)
        if step == "reopen":  # and had done it
            async with qc.Session.connect(qemu.qmp) as session:
                await again(session, plan, fresh, noted).swap()
        await qemu.execute("cont")
        line = f'qemu-io -d {DEVICE} "write -P 85 0 64k"'
        assert not await qemu.execute("human-monitor-command", command_line=line)
        async with qc.Session.connect(qemu.qmp) as session:
            made = again(session, plan, fresh, noted)
            await complete([made])
            (warning,) = made.warnings
            assert "somebody let the guest go on before it was reset" in warning
            assert await files(session) == [fresh, chain.base]
            assert await runs(session)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])
    written = chain.pictures[0].copy()
    written.fill(0, 65536, 85)
    assert_disk(fresh, written)  # which the warning tells


async def test_what_qemu_refuses_after_the_decision_is_put_back(folder: Path) -> None:
    class Refusing(qc.Session):
        """No real QEMU is known to refuse it."""

        async def execute(self, command: str, *more: Any, **options: Any) -> Any:
            if command.endswith("blockdev-reopen"):
                raise CommandRefused(f"{command} refused", command=command, desc="it won't",
                                     error_class="GenericError")  # fmt: skip
            return await super().execute(command, *more, **options)

    chain, fresh = make_chain(folder, 2), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        plan, noted = await killed_at("reopen", qemu.qmp, fresh)
        async with Refusing.connect(qemu.qmp) as session:
            with pytest.raises(qc.CommitFailed, match=r"it won't. Nothing was discarded$"):
                await complete([again(session, plan, fresh, noted)])
            await as_before(session, qemu, chain, fresh)


@pytest.mark.parametrize("step", ["stop", "lay", "reopen"])
async def test_before_the_decision_another_process_puts_it_back(folder: Path, step: str) -> None:
    chain, fresh = make_chain(folder, 2), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        plan, noted = await killed_at(step, qemu.qmp, fresh)
        async with qc.Session.connect(qemu.qmp) as session:
            notes = Notes()
            assert await put_back([again(session, plan, fresh, noted, notes)]) == []
            assert notes.noted == {"step": "back", "running": None, "let_go": False}
            await as_before(session, qemu, chain, fresh)


async def until(vm: qc.Session, job: str, status: str) -> None:
    """Wait until the only job has come so far."""
    async with asyncio.timeout(20):
        while [(each["id"], each["status"]) for each in await vm.execute("query-jobs")] != [
            (job, status)
        ]:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("ended", [None, "job-complete", "job-cancel"], ids=str)
async def test_what_was_being_put_back_is_put_back_by_another_process(
    ended: str | None, folder: Path
) -> None:
    """The former one was killed while it committed the empty overlay, or when that had ended."""
    chain, fresh = make_chain(folder, 2), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        plan, noted = await killed_at("reopen", qemu.qmp, fresh)
        async with qc.Session.connect(qemu.qmp) as session:
            job = f"{plan.job_id}-back"
            await session.execute(
                "block-commit",
                {"job-id": job, "device": f"{plan.job_id}-top", "base-node": plan.top.node_name,
                 "auto-dismiss": False},
            )  # fmt: skip
            await until(session, job, "ready")
            if ended is not None:
                await session.execute(ended, id=job)
                await until(session, job, "concluded")
        async with qc.Session.connect(qemu.qmp) as session:
            exchange = again(session, plan, fresh, noted)
            async with await take(session, await session.disk("vda"), "disc") as exchange.claim:
                assert await put_back([exchange]) == []
            await as_before(session, qemu, chain, fresh)


async def test_a_reset_that_qemu_refuses_is_told_when_all_is_exchanged(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, running=True) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            between.to_qemu = Strike("system_reset", "refuse")
            with pytest.raises(qc.CommandRefused, match="system_reset"):
                await vm.discard("vda", guest="reset")
            fresh, *below = await files(vm)
            assert below == [chain.base]
        await qemu.quit()
    assert_disk(fresh, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])
