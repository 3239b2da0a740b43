"""What killed processes leave of windows, each by itself: what goes, what stays and is named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.chain import Disk
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.guest import run_state
from qmpcommit.window import remains as window_remains
from qmpcommit.window.remains import new_own_job, own_jobs, remains_of
from tests.ground.images import (
    MIB,
    Chain,
    Write,
    assert_disk,
    create,
    make_chain,
    two_chains,
    write,
)
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.sessions import files, runs, thaws_once
from tests.real.test_agent import fake_agent

NUMBER = "0123abcd"
NAME = f"20240102T030405Z-{NUMBER}"


def overlay_of(chain: Chain, name: str = NAME) -> Path:
    return chain.top.with_name(f"{chain.top.stem}.qmpcommit-window-{name}.qcow2")


def overlays(folder: Path) -> list[Path]:
    return list(folder.glob("*.qmpcommit-window-*"))


async def nodes(vm: qc.Session) -> list[str]:
    """Our nodes that are there."""
    found = await vm.execute("query-named-block-nodes", flat=True)
    return [each["node-name"] for each in found if each["node-name"].startswith("qmp")]


def forget(window: qc.Window) -> None:
    """As if the process that opened it had been killed."""
    for claim in window.claims.values():
        claim.abandon()


@asynccontextmanager
async def running(folder: Path, **more: Any) -> AsyncIterator[tuple[Machine, qc.Session, Chain]]:
    """A VM that runs and shows its chain's picture at the end, with nothing of ours in it."""
    chain = make_chain(folder)
    async with machine(folder, chain, running=True, **more) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            yield qemu, vm, chain
            assert await runs(vm)
            assert await nodes(vm) == []
            assert await vm.execute("query-jobs") == []
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


# -- a guest that is quiesced ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pause", "agent"])
async def test_a_guest_that_a_killed_owner_left_quiesced_goes_on(
    folder: Path, how: run_state.How
) -> None:
    marker = f"qmpcommit-w{NUMBER}-{'paused' if how == 'pause' else 'frozen'}"
    async with running(folder) as (_, vm, _), fake_agent(folder) as agent:
        for recover in (True, False):
            await vm.execute("blockdev-add", {"driver": "null-co", "node-name": marker})
            if how == "pause":
                await vm.execute("stop")
            else:
                agent.frozen = 2
            (told,) = remains_of(await vm.graph())
            assert told.what == marker
            assert "for a window, and perhaps still is" in told.message
            if recover:
                noted = qc.NotedWindow(NAME, {}, how, agent.path)
                assert await vm.recover_window(noted) is None
            else:
                assert await vm.close_windows(agents=agent.path) == []
            assert not agent.frozen
            assert await runs(vm)
            assert remains_of(await vm.graph()) == []


async def test_a_frozen_guest_whose_agent_is_not_known_is_told(folder: Path) -> None:
    marker = f"qmpcommit-w{NUMBER}-frozen"
    async with running(folder) as (_, vm, _), fake_agent(folder) as agent:
        agent.frozen = 2
        await vm.execute("blockdev-add", {"driver": "null-co", "node-name": marker})
        with pytest.raises(qc.WindowError, match="--agent SOCKET") as failed:
            await vm.close_windows()
        assert failed.value.facts["remains"] == [marker]
        assert agent.frozen
        await vm.close_windows(agents=agent.path)
        assert not agent.frozen


async def test_a_guest_that_can_not_be_marked_is_quiesced_nevertheless(folder: Path) -> None:
    async with running(folder) as (_, vm, _):
        name = f"qmpcommit-w{NUMBER}-paused"  # somebody has a drive of that name: QEMU refuses
        drive = {"command-line": f"drive_add 0 if=none,driver=null-co,id={name}"}
        assert "OK" in await vm.execute("human-monitor-command", drive)
        window = await vm.open_window(["vda"], freeze="pause", name=NAME)
        assert window.quiesced is not None
        assert await runs(vm)
        assert name not in await nodes(vm)
        await vm.close_window(window)
    assert overlays(folder) == []


async def test_a_cancellation_while_a_guest_is_marked_leaves_no_mark(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(folder) as (_, vm, _):
        execute, marked = vm.execute, asyncio.Event()

        async def late(command: str, arguments: Any = None, **more: Any) -> Any:
            answer = await execute(command, arguments, **more)
            if command == "blockdev-add" and arguments["driver"] == "null-co":
                assert any(name.endswith("-paused") for name in await nodes(vm))
                marked.set()
                await asyncio.Event().wait()
            return answer

        monkeypatch.setattr(vm, "execute", late)
        opening = asyncio.create_task(vm.open_window(["vda"], freeze="pause"))
        await marked.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    assert overlays(folder) == []


async def test_a_window_whose_guest_can_not_be_frozen_leaves_nothing(folder: Path) -> None:
    async with running(folder) as (_, vm, _):
        with pytest.raises(qc.QuiesceFailed, match="can't be reached"):
            await vm.open_window(["vda"], freeze="agent", agents=folder / "nobody")
    assert overlays(folder) == []


async def test_the_mark_stays_where_a_guest_can_not_be_thawed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(folder) as (_, vm, _), fake_agent(folder) as agent:
        agent.instead["guest-fsfreeze-thaw"] = [None] * 1000
        with monkeypatch.context() as patched:
            thaws_once(patched)
            with pytest.raises(qc.QuiesceFailed, match="may still be frozen"):
                await vm.open_window(["vda"], freeze="agent", agents=agent.path, name=NAME)
        assert await nodes(vm) == [f"qmpcommit-w{NUMBER}-frozen"]
        agent.instead.clear()
        agent.frozen = 2
        assert await vm.close_windows(agents=agent.path) == []
        assert not agent.frozen
    assert overlays(folder) == []


# -- a window that can't be opened ----------------------------------------------------------------


async def test_what_can_not_be_undone_hides_neither_the_reason_nor_the_other_disks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = two_chains(folder)
    async with machine(folder, *chains) as qemu, qc.Session.connect(qemu.qmp) as vm:
        execute = vm.execute

        async def refusing(command: str, arguments: Any = None, **more: Any) -> Any:
            if command == "transaction":
                raise qc.CommandRefused("no transactions today")
            return await execute(command, arguments, **more)

        tried: list[int] = []
        undo = FreshOverlay.undo

        async def failing(self: FreshOverlay) -> None:
            tried.append(1)
            if len(tried) == 1:
                raise qc.MonitorLost("lost for a moment")
            await undo(self)

        with monkeypatch.context() as patched:
            patched.setattr(vm, "execute", refusing)
            patched.setattr(FreshOverlay, "undo", failing)
            with pytest.raises(qc.CommandRefused, match="no transactions today"):
                await vm.open_window(["vda", "vdb"], name=NAME)
        assert overlays(folder) == [overlay_of(chains[0])]
        assert await vm.close_windows() == []
        await qemu.quit()
    assert overlays(folder) == []
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("cancelled", [True, False])
async def test_an_overlay_that_was_laid_and_stays_is_told(
    folder: Path, cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation stays one, and says it in a note."""

    async def full(*args: Any, **more: Any) -> qc.CommitJob:
        raise qc.NoSpace("the base's file system is full")

    class Notes:
        async def note(self, step: str, **facts: Any) -> None:
            if step == "open":
                laid.set()
                if not cancelled:
                    raise OSError("no such journal")
                await asyncio.Event().wait()

    async with running(folder) as (_, vm, chain):
        laid = asyncio.Event()
        with monkeypatch.context() as patched:
            patched.setattr(vm, "commit", full)
            opening = asyncio.create_task(vm.open_window(["vda"], name=NAME, ledger=Notes()))
            await laid.wait()
            if cancelled:
                opening.cancel()
            with pytest.raises(asyncio.CancelledError if cancelled else qc.WindowError) as raised:
                await opening
        told = "".join(raised.value.__notes__) if cancelled else str(raised.value)
        assert "file system is full" in told
        assert str(overlay_of(chain)) in told
        assert [outcome.action for outcome in await vm.close_windows()] == ["pivot"]
    assert overlays(folder) == []


# -- an overlay that is in use --------------------------------------------------------------------


async def test_a_commit_that_a_killed_process_began_is_taken_up(folder: Path) -> None:
    async with running(folder) as (qemu, vm, _):
        window = await vm.open_window(["vda"], name=NAME)
        forget(window)
        async with qc.Session.connect(qemu.qmp2) as killed:
            job_id = f"qmpcommit-w{NUMBER}-0-00000001"
            job = await killed.commit(
                window["vda"].overlay, policy=qc.Hold(), shallow=True, job_id=job_id
            )
            await job.ready()
            await job.detach()
        (outcome,) = await vm.close_windows()
        assert (outcome.action, outcome.job_id) == ("pivot", job_id)
        assert outcome.deleted == [window["vda"].overlay]
    assert overlays(folder) == []


async def test_a_commit_of_an_overlay_that_is_kept_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(folder) as (_, vm, _):
        window = await vm.open_window(["vda"], name=NAME)
        overlay, job_id = window["vda"].overlay, f"qmpcommit-w{NUMBER}-0-00000001"
        job = await vm.commit(
            overlay, policy=qc.Hold(), shallow=True, job_id=job_id, claim=window.claims["vda"]
        )
        await job.ready()
        look, looked = vm.look, asyncio.Event()

        async def seen() -> Any:
            found = await look()
            looked.set()
            return found

        monkeypatch.setattr(vm, "look", seen)
        closing = asyncio.create_task(vm.close_window(window))
        await looked.wait()
        await job.keep()
        (outcome,) = await closing
        assert outcome.action == "pivot"
        assert outcome.job_id != job.id
    assert overlays(folder) == []


async def test_a_commit_that_another_client_began_is_left_alone_and_told(folder: Path) -> None:
    """It has written to the file that was to stand still, which is told to the end."""
    async with running(folder) as (_, vm, chain):
        window = await vm.open_window(["vda"])
        overlay = window["vda"]
        with vm.events("BLOCK_JOB_READY") as heard:
            arguments = {"device": overlay.node_name, "base-node": chain.top.stem}
            await vm.execute("block-commit", {"job-id": "theirs", **arguments})
            await anext(heard)
        with pytest.raises(qc.WindowError, match=r"no instant's image.* works on vda: theirs"):
            await vm.close_window(window)
        with pytest.raises(qc.WindowError, match="theirs"):
            await vm.close_windows()
        with vm.events("BLOCK_JOB_COMPLETED") as heard:
            await vm.execute("block-job-cancel", {"device": "theirs"})
            await anext(heard)
        with pytest.raises(qc.WindowError, match="no instant's image") as told:
            await vm.close_window(window)
        (outcome,) = window.outcomes
        assert told.value.facts["outcomes"] == [outcome.model_dump(mode="json")]
        assert outcome.deleted == [overlay.overlay]
    assert overlays(folder) == []


@pytest.mark.parametrize("node", ["qmpcommit-w0123abcd-1-top", "theirs"])
def test_the_jobs_of_a_window_are_told_from_others(node: str) -> None:
    overlay = f"top.qmpcommit-window-{NAME}.1.qcow2"
    own = {new_own_job(overlay, node) for _ in range(2)}
    assert len(own) == 2
    others = ("qmpcommit-vda-0123abcd", "qmpcommit-w00000000-1-0123abcd", "backup")
    disk = Disk(name="vda", jobs=(*others, *own))
    assert set(own_jobs(disk, overlay)) == own


async def test_who_always_decides_otherwise_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(folder) as (_, vm, _):
        window = await vm.open_window(["vda"])
        commit = vm.commit

        async def kept(overlay: str, **more: Any) -> qc.CommitJob:
            return await commit(overlay, policy=qc.Keep(), shallow=True, claim=more["claim"])

        with monkeypatch.context() as patched:
            patched.setattr(vm, "commit", kept)
            with pytest.raises(qc.WindowError, match="3 times without a pivot") as failed:
                await vm.close_window(window)
        assert failed.value.overlays == [window["vda"].overlay]
        assert [each.overlay for each in await vm.windows()] == [window["vda"].overlay]
        await vm.close_window(window)
    assert overlays(folder) == []


async def test_a_bug_is_not_told_as_a_window_that_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: Any, **more: Any) -> qc.CommitJob:
        raise ZeroDivisionError

    async with running(folder) as (_, vm, _):
        window = await vm.open_window(["vda"])
        with monkeypatch.context() as patched:
            patched.setattr(vm, "commit", broken)
            with pytest.raises(ZeroDivisionError):
                await vm.close_window(window)
        await vm.close_window(window)
    assert overlays(folder) == []


# -- what nobody uses -----------------------------------------------------------------------------


async def test_an_overlay_that_was_pivoted_away_from_goes(folder: Path) -> None:
    """As where a process is killed between its pivot and the deletion."""
    async with running(folder) as (_, vm, chain):
        window = await vm.open_window(["vda"])
        forget(window)
        overlay = window["vda"]
        with vm.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") as heard:
            await vm.execute(
                "block-commit",
                {"job-id": "theirs", "device": overlay.node_name, "base-node": chain.top.stem},
            )
            await anext(heard)
            await vm.execute("job-complete", {"id": "theirs"})
            await anext(heard)
        while await vm.execute("query-jobs"):
            await asyncio.sleep(0.01)
        (left,) = remains_of(await vm.graph())
        assert left.what == overlay.node_name
        assert overlay.overlay in left.message
        assert await vm.close_windows() == []
    assert overlays(folder) == []


async def test_an_overlay_of_a_disk_that_was_unplugged_is_left_alone(folder: Path) -> None:
    """It may hold the newest data, and can be plugged in again."""
    chain, other = two_chains(folder)
    async with machine(folder, chain, other, device="scsi-hd") as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            window = await vm.open_window(["vda"])
            overlay = window["vda"]
            with vm.events("DEVICE_DELETED") as gone:
                await vm.execute("device_del", {"id": "vda"})
                await anext(gone)
            with pytest.raises(qc.WindowError, match="unplugged, and is left alone") as failed:
                await vm.close_window(window)
            assert failed.value.facts["overlays"] == [overlay.overlay]
            with pytest.raises(qc.WindowError, match="unplugged, and is left alone") as failed:
                await vm.close_windows()
            assert failed.value.facts["remains"] == [overlay.overlay]
            assert Path(overlay.overlay).exists()
            device = {"driver": "scsi-hd", "id": "again", "drive": overlay.node_name}
            await vm.execute("device_add", device)
            (outcome,) = await vm.close_windows()
            assert outcome.action == "pivot"
        await qemu.quit()
    assert overlays(folder) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_an_overlay_that_somebody_has_laid_one_over_is_told_to_stay(folder: Path) -> None:
    async with running(folder) as (_, vm, chain):
        window = await vm.open_window(["vda"])
        overlay, theirs = window["vda"].overlay, folder / "theirs.qcow2"
        await vm.execute("blockdev-snapshot-sync", {
            "node-name": window["vda"].node_name, "snapshot-file": str(theirs),
            "snapshot-node-name": "theirs"})  # fmt: skip
        with pytest.raises(qc.WindowError, match=rf"--top {overlay} --shallow --delete") as failed:
            await vm.close_window(window)
        assert failed.value.facts["overlays"] == [overlay]
        merged = await vm.commit("vda", top=overlay, shallow=True, delete=True)
        assert (await merged.wait()).deleted == [overlay]
        assert await files(vm) == [theirs, chain.top, chain.base]
    assert overlays(folder) == []
    assert_disk(theirs, chain.pictures[-1])


async def test_an_overlay_with_data_that_lies_over_nothing_is_closed_and_named(
    folder: Path,
) -> None:
    async with running(folder) as (_, vm, chain):
        lost = overlay_of(chain)
        create(lost, 64 * MIB)
        write(lost, [Write(0, 512, 7)])
        await vm.execute("blockdev-add", opened(lost))
        with pytest.raises(qc.WindowError, match="newest data") as failed:
            await vm.close_windows()
        assert failed.value.facts["remains"] == [str(lost)]
        assert await nodes(vm) == []
    assert lost.exists()


async def test_an_overlay_that_somebody_uses_stays_open_and_is_told(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        used = overlay_of(chain)
        create(used, 64 * MIB)
        await vm.execute("blockdev-add", opened(used))
        export = {"type": "nbd", "id": "theirs", "node-name": f"qmpcommit-w{NUMBER}-0-top"}
        await vm.execute("block-export-add", export)
        with pytest.raises(qc.WindowError, match="stays open: theirs uses it"):
            await vm.close_windows()
        assert used.exists()
        with vm.events("BLOCK_EXPORT_DELETED") as gone:
            await vm.execute("block-export-del", {"id": "theirs"})
            await anext(gone)
        assert await vm.close_windows() == []
        await qemu.quit()
    assert overlays(folder) == []
    assert_disk(chain.top, chain.pictures[-1])


def opened(path: Path) -> dict[str, Any]:
    """As a window opens its overlay, before it is laid."""
    file = {"driver": "file", "filename": str(path)}
    node = f"qmpcommit-w{NUMBER}-0-top"
    return {"driver": "qcow2", "node-name": node, "backing": None, "file": file}


async def test_files_of_a_vm_of_another_host_are_left_alone(folder: Path, free_port: int) -> None:
    async with running(folder, tcp=free_port) as (_, vm, chain):
        there = create(overlay_of(chain), 64 * MIB)
        assert await vm.close_windows() == []
    assert there.exists()


# -- jobs -----------------------------------------------------------------------------------------


async def create_in(vm: qc.Session, job: str, options: dict[str, Any]) -> None:
    """As a process does that is killed before the end of the creation."""
    await vm.execute("blockdev-create", {"job-id": job, "options": options})


async def test_the_creation_that_a_killed_process_left_is_ended(folder: Path) -> None:
    other = f"qmpcommit-w{NUMBER[::-1]}-0-create-file"
    async with running(folder) as (_, vm, chain):
        made = overlay_of(chain)
        file = {"driver": "file", "filename": str(made), "size": 0}
        with vm.events("JOB_STATUS_CHANGE") as changes:
            await create_in(vm, f"qmpcommit-w{NUMBER}-0-create-file", file)
            await create_in(vm, other, {**file, "filename": str(folder / "other")})
            ended = 0
            async for change in changes.raw():
                ended += change["status"] == "concluded"
                if ended == 2:
                    break
        frozen = qc.Frozen("vda", str(chain.top), str(made), f"qmpcommit-w{NUMBER}-0-top")
        noted = qc.NotedWindow(NAME, {"vda": frozen})
        assert await vm.recover_window(noted) is None
        assert not made.exists()
        assert [job["id"] for job in await vm.execute("query-jobs")] == [other]
        assert await vm.close_windows() == []


@asynccontextmanager
async def creating(folder: Path, speed: int) -> AsyncIterator[qc.Session]:
    """A VM that creates an overlay on slow storage; its owner was killed."""
    chain = make_chain(folder)
    slow = create(folder / "slow", 0, fmt="raw")
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        limits = {"bps-total": speed}
        group = {"qom-type": "throttle-group", "id": "tg", "limits": limits}
        await vm.execute("object-add", group)
        file = {"driver": "file", "filename": str(slow)}
        node = {"driver": "throttle", "node-name": "slow", "throttle-group": "tg", "file": file}
        await vm.execute("blockdev-add", node)
        options = {"driver": "qcow2", "file": "slow", "size": 8 * MIB, "preallocation": "full"}
        await create_in(vm, f"qmpcommit-w{NUMBER}-0-create-qcow2", options)
        assert [job["status"] for job in await vm.execute("query-jobs")] == ["running"]
        yield vm
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("recover", [True, False])
async def test_a_creation_under_way_is_waited_for(folder: Path, recover: bool) -> None:
    """QEMU is not asked for its nodes before: it dies of that while it opens what it creates."""
    async with creating(folder, 16 * MIB) as vm:
        if recover:
            frozen = qc.Frozen("vda", "", f"x.qmpcommit-window-{NAME}.qcow2", "")
            assert await vm.recover_window(qc.NotedWindow(NAME, {"vda": frozen})) is None
        else:
            assert await vm.close_windows() == []
        assert await vm.execute("query-jobs") == []


async def test_a_creation_that_does_not_end_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_remains, "CREATION", 0.2)
    async with creating(folder, 64 * 1024) as vm:
        job = f"qmpcommit-w{NUMBER}-0-create-qcow2"
        with pytest.raises(qc.WindowError, match=r"after 0\.2 s .*create-qcow2") as failed:
            await vm.close_windows()
        assert failed.value.facts["remains"] == [job]
        assert [each["status"] for each in await vm.execute("query-jobs")] == ["running"]
