"""Snapshot windows and long chains, on real QEMUs; each ends by reading the disks."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.qmp.events import JobStatusChange
from tests.cli.command import run as qmpcommit
from tests.cli.command import start
from tests.ground import forked
from tests.ground.images import MIB, Chain, Picture, assert_disk, create, make_chain, read
from tests.ground.images import run as run_tool
from tests.ground.machines import machine, storage_daemon
from tests.ground.nbd import Nbd
from tests.ground.qemu import QEMU
from tests.ground.sessions import runs


def two_chains(folder: Path) -> tuple[Chain, Chain]:
    first = make_chain(folder)
    second = make_chain(folder, names=("low", "mid", "below", "second"))
    return first, second


def overlays(folder: Path) -> list[Path]:
    return list(folder.glob("*.qmpcommit-window-*"))


async def test_two_disks_stand_still_while_the_window_is_open(folder: Path) -> None:
    first, second = two_chains(folder)
    async with machine(folder, first, second, style="implicit") as vm:
        async with qc.Session.connect(vm.qmp) as session:
            async with session.snapshot(["vda", "vdb"]) as window:
                assert window["vda"].filename == str(first.top)
                assert_disk(first.top, first.pictures[-1])  # readable, without a forced share
                assert_disk(second.top, second.pictures[-1])
                seen = await session.windows()
                assert [each.disk for each in seen] == ["vda", "vdb"]
                assert all(each.age is not None and each.age >= 0 for each in seen)
                assert all(each.size for each in seen)
                with pytest.raises(qc.JobConflict, match="held by a snapshot window of this very"):
                    async with session.snapshot(disk for disk in ("vda",)):
                        pass
            assert [outcome.action for outcome in window.outcomes] == ["pivot", "pivot"]
            assert await session.windows() == []
            assert [len(disk.chain) for disk in await session.disks()] == [2, 2]
        assert overlays(folder) == []
        await vm.quit()
    assert_disk(first.top, first.pictures[-1])
    assert_disk(second.top, second.pictures[-1])


async def test_no_overlay_of_another_size_is_laid_over_a_disk(folder: Path) -> None:
    chain = make_chain(folder)
    larger = Picture(128 * MIB, bytes(chain.pictures[-1].data) + bytes(64 * MIB))

    class Resizes:
        async def note(self, step: str, **facts: object) -> None:
            if step == "lay":
                await vm.execute("block_resize", node_name="top", size=larger.size)

    async with machine(folder, chain, running=True) as vm:
        async with qc.Session.connect(vm.qmp) as session:
            with pytest.raises(qc.WindowError, match="from 67108864 to 134217728 bytes"):
                await session.snapshot(["vda"], ledger=Resizes(), freeze="pause").__aenter__()
            assert await session.windows() == []
            assert (await session.query_status()).running
            assert [len(disk.chain) for disk in await session.disks()] == [2]
        assert overlays(folder) == []
        await vm.quit()
    assert_disk(chain.top, larger)


async def test_what_the_guest_writes_meanwhile_is_merged_back(folder: Path) -> None:
    chain = make_chain(folder)
    after = chain.pictures[-1].copy()
    async with (
        storage_daemon(folder, chain, style="implicit") as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        async with await Nbd.connect(vm.nbd, "top") as guest:
            async with session.snapshot(["top"], overlay=folder) as window:
                await guest.write(5 * MIB, b"\xaa" * MIB)
                after.write(5 * MIB, b"\xaa" * MIB)
                assert_disk(Path(window["top"].filename), chain.pictures[-1])
            await guest.write(7 * MIB, b"\xbb" * MIB)
            after.write(7 * MIB, b"\xbb" * MIB)
        await vm.quit()
    assert_disk(chain.top, after)
    assert overlays(folder) == []


class Boom(Exception):
    pass


async def test_a_body_that_raises_or_is_cancelled_closes_the_window(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain, style="implicit") as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        with pytest.raises(Boom):
            async with session.snapshot(["top"]):
                raise Boom
        assert await session.windows() == []
        opened = asyncio.Event()

        async def body() -> None:
            async with session.snapshot(["top"]):
                opened.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(body())
        await opened.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert await session.windows() == []
        await vm.quit()
    assert overlays(folder) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_window_whose_qemu_is_killed_tells_how_nothing_is_lost(folder: Path) -> None:
    chain = make_chain(folder)
    now = chain.pictures[-1].copy()
    async with storage_daemon(folder, chain, style="implicit") as vm:

        async def body() -> None:
            async with qc.Session.connect(vm.qmp) as session, session.snapshot(["top"]):
                async with await Nbd.connect(vm.nbd, "top") as nbd:
                    await nbd.write(5 * MIB, b"\xaa" * MIB)
                    await nbd.flush()
                now.write(5 * MIB, b"\xaa" * MIB)
                vm.kill()
                await vm.ended()

        with pytest.raises(qc.WindowError, match="never from the one below") as failed:
            await body()
    words = str(failed.value).partition("'qmpcommit commit ")[2].split("'")[0].split()
    said = await qmpcommit("commit", *words, "--json")
    assert (said.status, said.json["deleted"]) == (0, failed.value.overlays)
    assert overlays(folder) == []
    assert_disk(chain.top, now)


async def test_one_disk_that_is_not_fit_leaves_nothing_of_the_others(folder: Path) -> None:
    first, second = two_chains(folder)
    async with machine(folder, first, second, style="implicit") as vm:
        async with qc.Session.connect(vm.qmp) as session:
            for names in (["vda", "nope"], ["vda", "vda"]):
                with pytest.raises((qc.DiskNotFound, qc.WindowError)):
                    async with session.snapshot(names):
                        pass
            with pytest.raises(qc.QmpCommitError):
                async with session.snapshot(["vda", "vdb"], overlay=folder / "not there"):
                    pass
            assert overlays(folder) == []
            assert [len(disk.chain) for disk in await session.disks()] == [2, 2]
            nodes = await session.execute("query-named-block-nodes", {"flat": True})
            assert not [n for n in nodes if n["node-name"].startswith("qmpcommit-")]
        await vm.quit()
    assert_disk(first.top, first.pictures[-1])


async def test_what_is_not_fit_for_a_window_is_told_why(folder: Path) -> None:
    chain = make_chain(folder)
    tray = ["-device", "ide-cd,id=cd0,bus=ide.0"]
    create(folder / "ro.qcow2", MIB)
    node = f"qcow2,node-name=ro,read-only=on,file.driver=file,file.filename={folder / 'ro.qcow2'}"
    tray += ["-blockdev", node, "-device", "virtio-blk-pci,drive=ro,id=ro"]
    async with machine(folder, chain, extra=tray) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("vda", policy=qc.Hold())
            for disks, error, why in (
                ("vda", qc.WindowError, "as a list"),
                ([], qc.WindowError, "at least one"),
                (["cd0"], qc.WindowError, "cd0 .*has no medium"),
                (["vda"], qc.JobConflict, job.id),
                (["ro"], qc.WindowError, "ro .*is read-only, .*can be read without a window"),
            ):
                with pytest.raises(error, match=why):
                    await vm.open_window(disks)
            await job.abort()
            with pytest.raises(qc.InvalidRequest, match="bandwidth"):
                async with vm.snapshot(["vda"], bandwidth="fast"):
                    pytest.fail("it is open")
            assert await vm.close_windows() == []
            with pytest.raises(qc.ChainError, match="is read-only"):
                await vm.overlay(["vda", "ro"])
            assert [len(disk.chain) for disk in await vm.disks()] == [2, 0, 1]
        await qemu.quit()
    assert overlays(folder) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_what_can_t_be_known_of_a_window_is_not_told(folder: Path) -> None:
    """Its overlay's file is not seen from here, or somebody gave it a name that tells no time."""
    by_hand = "top.qmpcommit-window-mine"
    chain = make_chain(folder, names=("base", by_hand))
    away = folder / "away"
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            (window,) = await vm.windows()
            assert (window.disk, window.window, window.age) == ("vda", "mine", None)
            assert window.size
            chain.top.rename(away)
            (window,) = await vm.windows()
            assert (window.overlay, window.filename) == (str(chain.top), str(chain.base))
            assert (window.age, window.size) == (None, None)
        await qemu.quit()
    assert_disk(away, chain.pictures[-1])


async def test_a_killed_owner_s_window_is_found_and_closed(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain, style="implicit") as vm:
        process = await start("window", vm.qmp, "top", "--", "sh", "-c", "echo $$; exec sleep 60")
        assert process.stdout is not None
        command = int(await process.stdout.readline())
        process.kill()
        os.kill(command, signal.SIGKILL)
        await process.wait()
        async with qc.Session.connect(vm.qmp) as session:
            (left,) = await session.windows()
            assert left.filename == str(chain.top)
        said = await qmpcommit("window", "--close", vm.qmp, "--json")
        assert said.status == 0
        assert [each["overlay"] for each in said.json["closed"]] == [left.overlay]
        await vm.quit()
    assert overlays(folder) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_the_command_passes_the_status_on(folder: Path) -> None:
    chain = make_chain(folder)
    copy = folder / "copy"
    async with storage_daemon(folder, chain, style="implicit") as vm:
        words = ("window", vm.qmp, "top", "--json", "--", QEMU.img, "convert", "-O", "raw")
        said = await qmpcommit(*words, "{top}", copy)
        assert said.status == 0
        assert said.json["disks"][0]["filename"] == str(chain.top)
        (folder / "here" / "aside").mkdir(parents=True)
        there = (
            "--overlay-dir",
            "aside",
            "--overlay-options",
            '{"discard": "unmap"}',
            "--",
            "sh",
            "-c",
            'test -n "$(ls aside)" && exit 7',
        )
        said = await qmpcommit("window", vm.qmp, "top", *there, cwd=folder / "here")
        assert said.status == 7
        said = await qmpcommit("window", vm.qmp, "top", "--", "no-such-command")
        assert said.status == 127
        assert (await qmpcommit("window", vm.qmp, "top")).status == 2
        await vm.quit()
    assert copy.read_bytes() == bytes(chain.pictures[-1].data)
    assert overlays(folder) == []
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("keep", [1, 2, 3])
async def test_a_long_chain_is_brought_down(folder: Path, keep: int) -> None:
    chain = make_chain(folder, 4)
    top = folder / "fifth.qcow2"
    create(top, None, backing=chain.top)
    whole = Chain([*chain.files, top], [*chain.pictures, chain.pictures[-1]])
    async with machine(folder, whole) as vm, qc.Session.connect(vm.qmp) as session:
        done = [outcome async for outcome in session.flatten("vda", keep=keep, delete=True)]
        assert len(done) == 5 - keep
        (disk,) = await session.disks()
        assert len(disk.chain) == keep
        active = Path(disk.chain[0].filename)
        await vm.quit()
    assert_disk(active, whole.pictures[-1])
    assert active == (chain.base if keep == 1 else top)
    left = {path for path in folder.glob("*.qcow2")}
    assert len(left) == keep


async def test_flatten_may_stop_after_any_step(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with (
        storage_daemon(folder, chain, style="implicit") as vm,
        qc.Session.connect(vm.qmp) as session,
    ):
        async for outcome in session.flatten("top", keep=1):
            assert outcome.action == "none"
            break
        assert len((await session.disk("top")).chain) == 3
        with pytest.raises(qc.InvalidRequest):
            async for _ in session.flatten("top", keep=0):
                pass
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])
    said = run_tool(QEMU.img, "check", chain.top)
    assert "No errors" in said
    assert Picture(len(read(chain.base))).size == chain.pictures[0].size


async def test_all_steps_of_a_flatten_are_awaited_at_once(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with machine(folder, chain) as vm, qc.Session.connect(vm.qmp) as session:
        done = await session.flatten("vda", keep=2)
        assert [outcome.base.filename for outcome in done] == [str(chain.base)] * 2
        assert await session.flatten("vda", keep=2) == []
        steps = session.flatten("vda", keep=1)
        assert (await anext(steps)).action == "pivot"
        await steps.aclose()
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_flatten_that_is_cancelled_leaves_no_job(folder: Path) -> None:
    chain = make_chain(folder, 3, bulk=33 * MIB)
    async with machine(folder, chain) as vm, qc.Session.connect(vm.qmp) as session:
        steps = session.flatten("vda", keep=1, bandwidth="1MiB")
        assert (await anext(steps)).action == "none"
        with session.events("JOB_STATUS_CHANGE") as events:
            second = asyncio.ensure_future(anext(steps))
            async for event in events:
                if isinstance(event, JobStatusChange) and event.status == "running":
                    break
        async for status in session.jobs[0].progress():
            if status.current:  # QEMU was asked: by now it is waited for
                break
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert await session.execute("query-jobs") == []
        assert len((await session.disk("vda")).chain) == 2
        await vm.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_recycle_of_a_disk_with_a_long_name(folder: Path) -> None:
    chain = make_chain(folder, names=("base", "mid", "low", "a-disk-with-quite-a-long-name"))
    async with qc.offline(chain.top) as vm:
        fresh = folder / "fresh.qcow2"
        job = await vm.commit("disk", policy=qc.Recycle(str(fresh)), job_id="qmpcommit-" + "x" * 40)
        assert (await job.wait()).action == "recycle"
    assert_disk(fresh, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[-1])


async def test_files_of_one_name_have_overlays_of_their_own_in_one_folder(folder: Path) -> None:
    """As disks have that are called alike, each in a folder of its own."""
    places = [folder / "a", folder / "b"]
    for place in (*places, folder / "overlays"):
        place.mkdir()
    chains = [make_chain(place) for place in places]
    async with machine(folder, *chains, style="drive", running=True) as vm:
        async with qc.Session.connect(vm.qmp) as session:
            disks = [disk.name for disk in await session.disks()]
            async with session.snapshot(disks, overlay=folder / "overlays") as window:
                assert len({each.overlay for each in window.values()}) == 2
                assert [each.window for each in await session.windows()] == [window.name] * 2
            assert [outcome.action for outcome in window.outcomes] == ["pivot", "pivot"]
            assert list((folder / "overlays").iterdir()) == []
        await vm.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("freeze", [None, "pause"])
@pytest.mark.parametrize("work", ["group keep", "recycle", "discard one"])
async def test_over_a_guest_that_a_killed_process_left_paused_it_is_not_opened(
    folder: Path, work: str, freeze: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the guest goes on first; never does it stay paused in silence."""
    monkeypatch.setattr("qmpcommit.guest.marks.GRACE", 0.3)
    chains = two_chains(folder)
    async with machine(folder, *chains, running=True) as qemu:
        places = folder / "places"
        words = [qemu.qmp, work, "0", str(places), str(folder), "after stop"]
        assert (await forked.run("tests.real.killable_work", *words)).status == -signal.SIGKILL
        async with qc.Session.connect(qemu.qmp) as vm:
            assert not await runs(vm)
            group = work == "group keep"  # whose guest goes on, and whose jobs are in the way
            why = "has a block job" if group else "Nothing was sent.*'qmpcommit recover "
            with pytest.raises(qc.JobConflict if group else qc.QuiesceFailed, match=why):
                await vm.snapshot(["vdb"], freeze=freeze).__aenter__()
            assert await runs(vm) is group
            await vm.recover(decide="abort")
            assert await runs(vm)
        await qemu.quit()
    assert not list(folder.glob("*qmpcommit-window*"))
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("device", ["virtio-blk-pci", "ide-cd"])
async def test_over_a_disk_that_is_read_only_nothing_is_laid(folder: Path, device: str) -> None:
    chain, other = make_chain(folder), make_chain(folder, names=("b2", "m2", "l2", "t2"))
    node = f"driver=qcow2,node-name=ro,read-only=on,file.driver=file,file.filename={other.top}"
    extra = ["-blockdev", f"{node},file.read-only=on", "-device", f"{device},drive=ro,id=vdb"]
    async with machine(folder, chain, extra=extra, running=True) as qemu:
        there = sorted(folder.iterdir())
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.WindowError, match=r"vdb.* is read-only.* stands still already"):
                await vm.open_window(["vda", "vdb"])
            with pytest.raises(qc.ChainError, match=r"vdb.* is read-only"):
                await vm.overlay(["vdb"])
            assert await vm.windows() == []
        assert sorted(folder.iterdir()) == there
        await qemu.quit()
