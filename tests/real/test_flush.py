"""What was committed survives a QEMU that is killed the moment after: it was flushed."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.block.flush import filter_name, flush
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine, storage_daemon


def open_as(style: str, folder: Path, chain: Chain) -> AbstractAsyncContextManager[Machine]:
    match style:
        case "storage daemon":
            return storage_daemon(folder, chain)
        case "drive" | "implicit":
            return machine(folder, chain, style=style)
        case "iothread":
            return machine(folder, chain, iothread=True)
    return machine(folder, chain)


STYLES = ["blockdev", "iothread", "drive", "implicit", "storage daemon"]


@pytest.mark.parametrize("style", STYLES)
async def test_an_intermediate_layer(folder: Path, style: str) -> None:
    chain = make_chain(folder, 3)
    async with open_as(style, folder, chain) as vm, qc.Session.connect(vm.qmp) as session:
        disk = (await session.disks())[0].name
        job = await session.commit(disk, top=1, base=2, delete=True)
        outcome = await job.wait()
        vm.process.kill()
        await vm.ended()
        assert outcome.warnings == []
        assert outcome.deleted == [str(chain.files[1])]
        assert outcome.held is None
    assert_disk(chain.files[0], chain.pictures[1])
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep()], ids=["pivot", "keep"])
@pytest.mark.parametrize("style", STYLES)
async def test_an_active_layer(folder: Path, style: str, policy: qc.Pivot | qc.Keep) -> None:
    chain = make_chain(folder, 3)
    async with open_as(style, folder, chain) as vm, qc.Session.connect(vm.qmp) as session:
        disk = (await session.disks())[0].name
        await (await session.commit(disk, policy=policy)).wait()
        vm.process.kill()
        await vm.ended()
    assert_disk(chain.files[0], chain.pictures[-1])


async def test_where_it_can_not_be_flushed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that still has the data stays, and a warning says so."""

    async def refused(*_: object) -> None:
        raise qc.CommandRefused("no", command="blockdev-add", desc="there is no filter")

    monkeypatch.setattr("qmpcommit.commit.in_pending.flush", refused)
    chain = make_chain(folder, 3)
    async with machine(folder, chain) as vm, qc.Session.connect(vm.qmp) as session:
        outcome = await (await session.commit("vda", top=1, base=2, delete=True)).wait()
        assert outcome.deleted == []
        (warning,) = outcome.warnings
        assert "there is no filter" in warning
        assert str(chain.files[1]) in warning
        await vm.quit()
    assert_disk(chain.files[0], chain.pictures[1])
    assert_disk(chain.files[1], chain.pictures[1])


async def test_what_a_killed_flush_has_left_is_in_nobodys_way(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with machine(folder, chain) as vm, qc.Session.connect(vm.qmp) as session:
        name = filter_name("base")
        over = {"driver": "copy-on-read", "node-name": name, "file": "base"}
        await session.execute("blockdev-add", over)
        outcome = await (await session.commit("vda", top=2, base=3)).wait()
        assert outcome.warnings == []
        assert name not in (await session.graph()).nodes
        outcome = await (await session.commit("vda", policy=qc.Pivot())).wait()
        await vm.quit()
    assert_disk(chain.files[0], chain.pictures[-1])


async def test_recover_closes_it_and_leaves_the_layers_below_alone(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with machine(folder, chain) as vm, qc.Session.connect(vm.qmp) as session:
        name = filter_name("base")
        over = {"driver": "copy-on-read", "node-name": name, "file": "base"}
        await session.execute("blockdev-add", over)
        recovered = await session.recover()
        assert [(each.what, each.result) for each in recovered.findings] == [
            (name, "it was closed")
        ]
        assert recovered.left == ()
        assert name not in (await session.graph()).nodes
        await vm.quit()
    assert_disk(chain.files[-1], chain.pictures[-1])


async def test_a_node_that_is_not_there(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as vm, qc.Session.connect(vm.qmp) as session:
        with pytest.raises(qc.CommandRefused):
            await flush(session, "nobody")
        assert not [node for node in (await session.graph()).nodes if "flush" in node]
        await vm.quit()
