"""A stale overlay tells itself that it is one, and is refused by whoever finds it later."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.qcow2 import bitmap_names
from qmpcommit.names import MARKING, STALE_MARK
from tests.cli.command import run as command
from tests.ground.images import Chain, assert_disk, make_chain, run
from tests.ground.machines import machine
from tests.ground.qemu import QEMU

F_OFD_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)


def marked(path: Path) -> bool:
    return STALE_MARK in bitmap_names(str(path))


async def pivot(vm: qc.Session, disk: str = "vda", **options: Any) -> qc.CommitOutcome:
    return await (await vm.commit(disk, **{"policy": qc.Pivot(), **options})).wait()


async def stale(folder: Path, **options: Any) -> Chain:
    """A chain whose overlay is stale; the VM that has pivoted is off."""
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        outcome = await pivot(vm, **options)
        assert outcome.action in ("pivot", "keep", "abort")
        await vm.close()
        await qemu.quit()
    return chain


@pytest.mark.parametrize("style", ["blockdev", "drive", "implicit"])
async def test_what_a_pivot_leaves_says_so_and_is_whole(style: Any, folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain, style=style) as qemu, qc.Session.connect(qemu.qmp) as vm:
        outcome = await pivot(vm)
        assert outcome.warnings == []
        names = [str(node.node_name) for node in await vm.query_named_block_nodes()]
        assert not [name for name in names if name.startswith(MARKING)]
        await vm.close()
        await qemu.quit()
    assert [marked(path) for path in chain.files] == [False, True, True]
    for path in chain.files:
        run(QEMU.img, "check", "-q", path)
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize(
    ("policy", "there"), [(qc.Keep(), False), (qc.Abort(), False), (qc.Pivot(), True)]
)
async def test_only_what_is_stale_is_marked(policy: Any, there: bool, folder: Path) -> None:
    chain = await stale(folder, policy=policy)
    assert marked(chain.top) is there
    assert not marked(chain.base)


async def test_what_a_recycle_and_a_merge_leave_is_marked(folder: Path) -> None:
    chain = make_chain(folder, 3)
    fresh = folder / "fresh.qcow2"
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await pivot(vm, policy=None, top=1, shallow=True)
        await pivot(vm, policy=qc.Recycle(overlay=str(fresh)))
        await vm.close()
        await qemu.quit()
    assert [marked(path) for path in (*chain.files, fresh)] == [False, True, True, False]


async def test_what_somebody_begins_to_use_meanwhile_is_not_marked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder)
    theirs = folder / "theirs.qcow2"
    run(QEMU.img, "create", "-q", "-f", "qcow2", "-b", chain.top, "-F", "qcow2", theirs)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        execute = vm._execute

        async def others_are_faster(command: str, *more: Any) -> Any:
            if command == "blockdev-del" and more[0]["node-name"] == "top":
                await qemu.execute(
                    "blockdev-add", driver="qcow2", backing="top", node_name="theirs",
                    file={"driver": "file", "filename": str(theirs)},
                )  # fmt: skip
            return await execute(command, *more)

        monkeypatch.setattr(vm, "_execute", others_are_faster)
        (warning,) = (await pivot(vm)).warnings
        assert "node top stays open" in warning
        await vm.close()
        await qemu.quit()
    assert not marked(chain.top)


async def test_what_somebody_else_has_open_is_not_written_to(folder: Path) -> None:
    """Nor is it a failure; the lock is one of QEMU's, of a reader that lets nobody write."""
    chain = make_chain(folder, 3)
    with chain.files[1].open("rb") as reader:
        async with (
            machine(folder, chain, style="drive") as qemu,
            qc.Session.connect(qemu.qmp) as vm,
        ):
            job = await vm.commit("vda", policy=qc.Hold())
            await job.ready()
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
            fcntl.fcntl(reader, F_OFD_SETLK, lock)
            await job.pivot()
            assert (await job.wait()).warnings == []
            await vm.close()
            await qemu.quit()
    assert [marked(path) for path in chain.files] == [False, False, True]


async def test_another_file_of_that_name_is_not_marked(folder: Path) -> None:
    chain = make_chain(folder, 3)
    middle, aside = chain.files[1], folder / "aside.qcow2"
    async with machine(folder, chain, style="drive") as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold())
        await job.ready()
        os.rename(middle, aside)
        run(QEMU.img, "create", "-q", "-f", "qcow2", middle, "64M")
        before = middle.read_bytes()
        await job.pivot()
        await job.wait()
        await vm.close()
        await qemu.quit()
    assert middle.read_bytes() == before
    assert marked(chain.top)


async def test_a_mark_is_no_bitmap_to_carry(folder: Path) -> None:
    """A commit that is had although its overlay is stale leaves no stale base."""
    chain = await stale(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        assert (await vm.disk("vda")).chain[0].bitmaps == ()
        assert (await vm.disk("vda")).chain[0].stale == "header"
        await pivot(vm, override=["stale"])
        assert [i.stale for i in (await vm.disk("vda")).chain] == [""]
        await vm.close()
        await qemu.quit()
    assert not marked(chain.base)


async def test_a_stale_layer_is_refused_and_chain_tells(folder: Path) -> None:
    chain = await stale(folder)
    before = chain.base.read_bytes()
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.ChainError, match=r"\[stale\].*is stale.*Start the VM from"):
                await pivot(vm)
        shown = await command("chain", qemu.qmp, "--json")
        assert shown.status == 1
        assert shown.json["stale"] == [{"disk": "vda", "filename": str(chain.top), "by": "header"}]
        assert "is stale" in shown.err
        assert "STALE" in (await command("chain", qemu.qmp)).out
        assert (await command("chain", qemu.qmp, "--override", "stale")).status == 0
        await qemu.quit()
    assert chain.base.read_bytes() == before


async def test_offline_refuses_it_too_unless_that_is_overridden(folder: Path) -> None:
    chain = await stale(folder)
    words = ("commit", "--offline", chain.top, "--pivot")
    refused = await command(*words)
    assert (refused.status, "[stale]" in refused.err) == (1, True)
    assert (await command(*words, "--override", "stale")).status == 0
    run(QEMU.img, "bitmap", "--remove", chain.top, STALE_MARK)
    assert (await command(*words)).status == 0


async def test_a_name_that_a_rename_gave_is_refused(folder: Path) -> None:
    await stale(folder, stale="rename")
    (renamed,) = folder.glob("*.stale-*")
    assert marked(renamed)
    run(QEMU.img, "bitmap", "--remove", renamed, STALE_MARK)
    refused = await command("commit", "--offline", renamed, "--pivot")
    assert (refused.status, "its name says so" in refused.err) == (1, True)
