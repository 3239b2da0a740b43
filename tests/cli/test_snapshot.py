"""``qmpcommit snapshot``: overlays that stay, over all disks at one instant, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.guest.marks import mark_of_snapshot, set_mark
from qmpcommit.window.overlays import _plan
from tests.cli.command import run
from tests.ground.images import MIB, assert_disk, make_chain, two_chains
from tests.ground.machines import Machine, machine
from tests.ground.sessions import runs

DEVICE = "/machine/peripheral/{}/virtio-backend"


async def writes(qemu: Machine, disk: str, pattern: int) -> None:
    """The guest writes 64 KiB at 5 MiB, and flushes them."""
    for what in (f"write -P {pattern} 5M 64k", "flush"):
        line = f'qemu-io -d {DEVICE.format(disk)} "{what}"'
        said = await qemu.execute("human-monitor-command", command_line=line)
        assert not said, said


async def test_the_guest_writes_to_overlays_of_one_instant(folder: Path) -> None:
    first, second = two_chains(folder)
    after = [chain.pictures[-1].copy() for chain in (first, second)]
    (folder / "fresh").mkdir()
    async with machine(folder, first, second, running=True) as qemu:
        await qemu.execute("block-dirty-bitmap-add", node="top", name="daily", persistent=True)
        await writes(qemu, "vda", 1)
        after[0].write(5 * MIB, bytes([1]) * 65536)
        said = await run(
            "snapshot", qemu.qmp, "vda", "vdb", "--overlay", folder / "fresh", "--freeze", "pause",
            "--json",
        )  # fmt: skip
        assert said.status == 0, said.err
        assert said.json["quiesced"] > 0
        assert await runs(qemu)
        files = [Path(disk["overlay"]) for disk in said.json["disks"]]
        assert [file.parent for file in files] == [folder / "fresh"] * 2
        assert [disk["filename"] for disk in said.json["disks"]] == [
            str(first.top),
            str(second.top),
        ]
        before = first.top.read_bytes(), second.top.read_bytes()
        for disk, picture in zip(("vda", "vdb"), after, strict=True):
            await writes(qemu, disk, 9)
            picture.write(5 * MIB, bytes([9]) * 65536)
        assert (first.top.read_bytes(), second.top.read_bytes()) == before
        async with qc.Session.connect(qemu.qmp) as vm:
            assert not await vm.execute("query-jobs")
            graph = await vm.graph()
            assert not graph.claims
            active = (await vm.disk("vda")).chain[0]
            (bitmap,) = graph.nodes[active.node_name].raw["dirty-bitmaps"]
            assert (bitmap["name"], bitmap["count"]) == ("daily", 65536)
        merged = await run("commit", qemu.qmp, "vda", "--shallow", "--pivot", "--delete")
        assert merged.status == 0, merged.err
        await qemu.quit()
    assert not files[0].exists()
    assert_disk(first.top, after[0])
    assert_disk(files[1], after[1])


async def test_one_that_can_not_be_laid_leaves_nothing_of_any(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_chains(folder)
    sent: list[dict[str, Any]] = []
    execute = qc.Session.execute

    async def one_more(vm: qc.Session, command: str, arguments: Any = None, **more: Any) -> Any:
        if command == "transaction":  # which QEMU refuses as a whole, for the last of it
            sent.append(arguments)
            absent = {"type": "blockdev-snapshot", "data": {"node": "absent", "overlay": "absent"}}
            arguments = {"actions": [*arguments["actions"], absent]}
        return await execute(vm, command, arguments, **more)

    async with machine(folder, first, second, running=True) as qemu:
        files = set(folder.iterdir())
        async with qc.Session.connect(qemu.qmp) as vm:
            nodes = set((await vm.graph()).nodes)
            monkeypatch.setattr(qc.Session, "execute", one_more)
            with pytest.raises(qc.CommandRefused, match="absent"):
                await vm.overlay(["vda", "vdb"], freeze="pause")
            monkeypatch.undo()
            (actions,) = (each["actions"] for each in sent)
            assert [each["type"] for each in actions] == ["blockdev-snapshot"] * 2
            graph = await vm.graph()
            assert set(graph.nodes) == nodes
            assert not graph.claims
            with pytest.raises(qc.InvalidRequest, match="is no folder"):
                await vm.overlay(["vda", "vdb"], overlay=folder / "one")
            with pytest.raises(qc.InvalidRequest, match="named twice"):
                await vm.overlay(["vda", "top"])
        assert await runs(qemu)
        assert set(folder.iterdir()) == files
        await qemu.quit()
    assert_disk(first.top, first.pictures[-1])


async def test_what_a_killed_one_has_made_is_removed_and_never_laid(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        nodes = set((await vm.graph()).nodes)
        plan = _plan(vm, await vm.disk("vda"), "qmpcommit-s0123abcd-0")
        made = FreshOverlay(vm, plan, str(folder / "fresh.qcow2"), vm.cwd)
        await made.open()
        (finding,) = (await vm.recover()).findings
        assert finding.done, finding
        assert finding.message.startswith("a snapshot was interrupted")
        assert not (folder / "fresh.qcow2").exists()
        assert set((await vm.graph()).nodes) == nodes
        assert len((await vm.disk("vda")).chain) == 2
        await qemu.quit()


async def test_where_qemu_dies_while_they_are_laid_the_files_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started from the overlay, the VM has what its guest wrote, whether it lay or not."""
    chain = make_chain(folder)
    execute = qc.Session.execute
    async with machine(folder, chain, running=True) as qemu:

        async def dies(self: qc.Session, command: str, *given: Any, **more: Any) -> Any:
            answer = await execute(self, command, *given, **more)
            if command == "transaction":
                await writes(qemu, "vda", 9)
                qemu.kill()
                await qemu.ended()
                return await execute(self, "query-status")
            return answer

        async with qc.Session.connect(qemu.qmp) as vm:
            monkeypatch.setattr(qc.Session, "execute", dies)
            with pytest.raises(qc.WindowError, match=r"start the VM from .*, not from ") as told:
                await vm.overlay(["vda"], overlay=folder / "new.qcow2")
        monkeypatch.undo()
    assert told.value.overlays == [str(folder / "new.qcow2")]
    chain.pictures[-1].write(5 * MIB, bytes([9]) * 65536)
    assert_disk(folder / "new.qcow2", chain.pictures[-1])


async def test_a_killed_snapshots_pause_is_called_so(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            assert await set_mark(vm, mark_of_snapshot("0123abcd"), "pause")
            await vm.execute("stop")
            found = (await vm.recover(look_only=True)).findings
            assert [each.message for each in found] == [
                "the guest was paused for a snapshot, and perhaps still is"
            ]
            assert (await vm.recover()).findings[0].done
        assert await runs(qemu)
        await qemu.quit()
