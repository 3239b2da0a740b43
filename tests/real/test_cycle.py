"""The golden cycle on a real QEMU: what deserves it goes into the base, what does not is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

import qmpcommit as qc
from qmpcommit.cycles import discarding
from tests.ground.images import Chain, assert_disk, create, make_chain
from tests.ground.machines import machine, storage_daemon
from tests.ground.sessions import files, runs
from tests.real.killed_discard import killed_at

YES, NO = ["true"], ["false"]


@pytest.mark.parametrize("style", ["blockdev", "drive"])
async def test_what_deserves_it_is_carried_into_the_base(folder: Path, style: Any) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, style=style, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        done = await vm.cycle("vda", keep_if=YES, guest="reset", delete=True)
        assert done.result == "kept"
        assert done.kept is not None
        assert done.kept.action == "recycle"
        assert await files(vm) == [Path(done.overlay), chain.base]
        assert await runs(qemu)
        await qemu.quit()
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(Path(done.overlay), chain.pictures[-1])


@pytest.mark.parametrize("style", ["blockdev", "drive"])
@pytest.mark.parametrize("delete", [True, False])
async def test_what_does_not_is_thrown_away(folder: Path, style: Any, delete: bool) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, style=style, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        done = await vm.cycle("vda", keep_if=NO, guest="reset", delete=delete)
        assert done.result == "discarded"
        assert done.discarded is not None
        assert (done.discarded.former, done.discarded.deleted) == (str(chain.top), delete)
        assert done.discarded.warnings == ()
        assert await files(vm) == [Path(done.overlay), chain.base]
        assert await runs(qemu)
        await qemu.quit()
    assert chain.top.exists() is not delete
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(Path(done.overlay), chain.pictures[0])


@pytest.mark.parametrize("answer", [True, False], ids=["keep", "discard"])
async def test_only_what_was_asked_about_is_kept_or_discarded(folder: Path, answer: bool) -> None:
    """Somebody else lays an overlay of his own meanwhile, and knows nothing of claims."""
    chain = make_chain(folder)
    theirs = create(folder / "theirs.qcow2", None, backing=chain.top)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:

        async def keep_if(ready: qc.Ready) -> bool:
            file = {"driver": "file", "filename": str(theirs)}
            node = {"driver": "qcow2", "node-name": "theirs", "file": file, "backing": None}
            await vm.execute("blockdev-add", node)
            both = {"node": ready.top.node_name, "overlay": "theirs"}
            await vm.execute("blockdev-snapshot", both)
            return answer

        with pytest.raises(qc.ChainError, match="when it was asked whether") as told:
            await vm.cycle("vda", keep_if=keep_if)
        assert "Nothing was changed" in str(told.value)
        assert await files(vm) == [theirs, chain.top, chain.base]
        assert not list(folder.glob("*.cycle-*"))
        await qemu.quit()
    assert_disk(theirs, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[0])


async def test_never_under_a_running_guest_without_a_word(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        with pytest.raises(qc.VMStateError, match="reset or to be left stopped"):
            await vm.discard("vda")
        with pytest.raises(qc.InvalidRequest, match="'reset' or"):
            await vm.discard("vda", guest="now")  # type: ignore[call-overload]
        assert await files(vm) == [chain.top, chain.base]
        assert await runs(qemu)
        done = await vm.discard("vda", guest="stop")
        assert (await qemu.execute("query-status"))["status"] == "paused"
        again = await vm.discard("vda")  # it does not run now
        assert again.former == done.overlay
        await qemu.quit()
    assert_disk(Path(again.overlay), chain.pictures[0])


async def test_a_qemu_that_ends_when_its_guest_is_reset_has_discarded(folder: Path) -> None:
    """As with ``-no-reboot``: which file to boot is told, and which one never again."""
    chain = make_chain(folder)
    async with (
        machine(folder, chain, running=True, extra=["-no-reboot"]) as qemu,
        qc.Session.connect(qemu.qmp, patience=5) as vm,
    ):
        with pytest.raises((qc.MonitorLost, qc.VMGone), match="is: if QEMU has ended") as caught:
            await vm.discard("vda", guest="reset", delete=True)
        await qemu.ended()
    (fresh,) = folder.glob("*.cycle-*")
    assert f"boot {fresh} (vda), and never {chain.top}" in caught.value.message
    assert_disk(fresh, chain.pictures[0])
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])


async def forgets(ready: qc.Ready) -> Any:
    """Test something, and return nothing of it."""


async def test_a_plain_function_may_answer(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        done = await vm.cycle("vda", keep_if=lambda ready: ready.disk != "vda")
        assert done.result == "discarded"
        await qemu.quit()
    assert_disk(Path(done.overlay), chain.pictures[0])


@pytest.mark.parametrize("command", [["sh", "-c", "exit 127"], ["sh", "-c", "kill -9 $$"]])
async def test_no_answer_changes_nothing(folder: Path, command: list[str]) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.CommitFailed, match="no answer"):
            await vm.cycle("vda", keep_if=command)
        with pytest.raises(qc.CommitFailed, match="could not be run"):
            await vm.cycle("vda", keep_if=["/no/such/program"])
        with pytest.raises(qc.CommitFailed, match="took longer"):
            await vm.cycle("vda", keep_if=["sleep", "60"], timeout=0.05)
        with pytest.raises(qc.CommitFailed, match="answered None") as forgot:
            await vm.cycle("vda", keep_if=forgets)
        for neither in ("no", 0, qc.Keep()):
            answers: Any = AsyncMock(return_value=neither)
            with pytest.raises(qc.CommitFailed, match="it must answer True or False"):
                await vm.cycle("vda", keep_if=answers)
        assert (forgot.value.vm, forgot.value.disk) == (vm.name, "vda")
        assert await files(vm) == [chain.top, chain.base]
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_rounds_follow_each_other(folder: Path) -> None:
    chain = make_chain(folder)
    answers = [True, False, True]
    asked: list[qc.Ready] = []

    async def keep_if(ready: qc.Ready) -> bool:
        asked.append(ready)
        return answers[len(asked) - 1]

    results = []
    async with (
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        rounds = vm.cycle("vda", every=0, keep_if=keep_if, guest="reset", delete=True)
        async for done in rounds:
            results.append(done.result)
            if len(results) == len(answers):
                break
        assert results == ["kept", "discarded", "kept"]
        assert [ready.base.filename for ready in asked] == [str(chain.base)] * 3
        assert asked[1].top.filename != str(chain.top)
        assert await files(vm) == [Path(done.overlay), chain.base]
        await qemu.quit()
    assert sorted(folder.glob("*.qcow2")) == sorted([chain.base, Path(done.overlay)])
    assert_disk(Path(done.overlay), chain.pictures[-1])


async def test_an_export_or_a_chain_without_overlay_is_refused(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.ChainError, match="exported"):
            await vm.discard("top")
        await qemu.quit()
    alone = Chain(chain.files[:1], chain.pictures[:1])
    async with machine(folder, alone) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.ChainError, match="no overlay"):
            await vm.cycle("vda", keep_if=YES)
        await qemu.quit()


@pytest.mark.parametrize("step", ["lay", "reopen", "close", "guest", "exchanged"])
async def test_one_that_was_killed_is_finished_by_the_next(folder: Path, step: str) -> None:
    chain = make_chain(folder)

    async with (
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        with killed_at(step):
            await vm.discard("vda", guest="reset")
        before = await files(vm)
        assert before[-1] == chain.base
        done = await vm.discard("vda", guest="reset")
        assert await files(vm) == [Path(done.overlay), chain.base]
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(Path(done.overlay), chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("relative", [False, True])
async def test_a_round_finishes_a_discard_that_was_killed_and_asks_nobody(
    folder: Path, relative: bool
) -> None:
    chain = make_chain(folder, relative=relative)
    opened = chain
    if relative:  # as QEMU shows them; the fresh overlay's header names the base absolutely
        opened = Chain([path.relative_to(folder) for path in chain.files], chain.pictures)

    async with (
        machine(folder, opened, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        with killed_at("reopen"):
            await vm.discard("vda", guest="reset")
        done = await vm.cycle("vda", keep_if=["false; exit 126"], guest="reset")
        assert done.result == "discarded"
        assert done.discarded is not None
        assert done.discarded.former == str(chain.top)
        assert await files(vm) == [Path(done.overlay), chain.base]
        assert await runs(qemu)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(folder / done.overlay, chain.pictures[0])


async def test_an_overlay_whose_file_is_gone_is_not_taken_for_a_discards(folder: Path) -> None:
    """It is discarded as any overlay is: what lies below it is whole, and is not thrown away."""
    chain = make_chain(folder)

    async with (
        machine(folder, chain, running=True) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        with killed_at("reopen"):
            await vm.discard("vda", guest="reset")
        laid = (await files(vm))[0]
        laid.unlink()
        done = await vm.discard("vda", guest="reset")
        assert done.former == str(laid)
        assert await files(vm) == [Path(done.overlay), chain.top, chain.base]
        await qemu.quit()
    assert_disk(Path(done.overlay), chain.pictures[-1])


async def test_a_disk_with_a_job_has_no_round(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold(), job_id="qmpcommit-theirs")
        await job.ready()
        for do in (vm.discard("vda"), vm.cycle("vda", keep_if=YES)):
            with pytest.raises(qc.JobConflict, match="has a block job already: qmpcommit-theirs"):
                await do
        await job.abort()
        assert await files(vm) == [chain.top, chain.base]
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_the_next_overlay_may_be_named(folder: Path) -> None:
    chain = make_chain(folder)
    named = folder / "next.qcow2"
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        done = await vm.discard("vda", overlay=named)
        assert done.overlay == str(named)
        assert await files(vm) == [named, chain.base]
        await vm.close()
        await qemu.quit()
    assert_disk(named, chain.pictures[0])


async def test_an_overlay_that_is_not_seen_here_is_not_called_deleted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discarding, "identify", lambda path, pid: None)
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        done = await vm.discard("vda", delete=True)
        assert (done.deleted, [str(chain.top) in text for text in done.warnings]) == (False, [True])
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(Path(done.overlay), chain.pictures[0])
