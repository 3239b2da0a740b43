"""Which file is meant, where names and open files have parted: on a real QEMU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import qmpcommit as qc
from tests.ground.images import Chain, assert_disk, create, make_chain, run
from tests.ground.machines import machine, storage_daemon


@pytest.mark.parametrize("how", ["replaced", "removed"])
async def test_a_base_whose_file_lost_its_name_is_refused_and_its_overlay_never_deleted(
    how: str, folder: Path
) -> None:
    chain = make_chain(folder, layers=3)
    base, mid, top = chain.files
    async with (
        storage_daemon(folder, chain) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        if how == "replaced":
            run("qemu-img", "convert", "-U", "-O", "qcow2", base, folder / "new")
            os.rename(folder / "new", base)
        else:
            base.unlink()
        for refused in ({"policy": qc.Keep()}, {"top": "mid"}):
            with pytest.raises(qc.ChainError, match=r"base .*replaced or removed.*\(deleted\)"):
                await vm.commit("top", **refused)
        with pytest.raises(qc.ChainError, match=r"layer .*replaced or removed"):
            await vm.commit("top", policy=qc.Pivot(), shallow=True)
        job = await vm.commit(
            "top", policy=qc.Pivot(), delete=True, override=["replaced-file", "on-disk-backing"]
        )
        outcome = await job.wait()
        assert (outcome.action, outcome.deleted) == ("pivot", [])
        assert [w for w in outcome.warnings if "may be in no other file" in w]
        await vm.close()
        await qemu.quit()
    assert mid.exists()
    if how == "replaced":
        assert_disk(top, chain.pictures[-1])


async def test_an_overlay_whose_file_was_removed_is_rescued_by_a_pivot(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        chain.top.unlink()
        create(chain.top, 1 << 20)  # another one, which nobody may delete
        outcome = await (await vm.commit("top", policy=qc.Pivot(), delete=True)).wait()
        assert (outcome.action, outcome.deleted) == ("pivot", [])
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert chain.top.exists()


async def test_two_layers_that_became_one_file_are_refused(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        chain.base.unlink()
        chain.base.hardlink_to(chain.top)
        with pytest.raises(qc.ChainError, match="same file as another layer"):
            await vm.commit("vda", policy=qc.Pivot())


async def test_names_that_count_from_qemus_folder_are_handed_out_absolute(folder: Path) -> None:
    chain = make_chain(folder, relative=True)
    opened = Chain([path.relative_to(folder) for path in chain.files], chain.pictures)
    seen: list[qc.Ready] = []

    async def policy(ready: qc.Ready) -> qc.Pivot:
        seen.append(ready)
        return qc.Pivot()

    async with storage_daemon(folder, opened) as qemu, qc.Session.connect(qemu.qmp) as vm:
        (disk,) = await vm.disks()
        assert [(image.filename, image.shown) for image in disk.chain] == [
            (str(chain.top), "top.qcow2"),
            (str(chain.base), "base.qcow2"),
        ]
        async with vm.snapshot(["top"]) as window:
            assert window["top"].filename == str(chain.top)
            assert [each.filename for each in await vm.windows()] == [str(chain.top)]
        assert not Path(window["top"].overlay).exists()
        for base in ("base.qcow2", chain.base):  # as QEMU shows it, and as it is
            plan = await vm.plan("top.qcow2", policy=qc.Keep(), base=base)
            assert plan.base.filename == str(chain.base)
        outcome = await (await vm.commit(str(chain.top), policy=policy, delete=True)).wait()
        assert outcome.active is not None
        named = {seen[0].environment()["QMPCOMMIT_BASE"], outcome.base.filename}
        assert named | {outcome.active.filename} == {str(chain.base)}
        assert outcome.invalidated == outcome.deleted == [str(chain.top)]
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_an_overlay_over_a_base_that_was_replaced_is_not_discarded(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        chain.base.rename(folder / "away.qcow2")
        with pytest.raises(qc.ChainError, match=r"replaced or removed.*away.qcow2"):
            await vm.discard("vda", guest="stop", delete=True)
        with pytest.raises(qc.ChainError, match=r"replaced or removed.*away.qcow2"):
            await vm.open_window(["vda"])
        assert [image.node_name for image in (await vm.disks())[0].chain] == ["top", "base"]
        (folder / "away.qcow2").rename(chain.base)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert sorted(folder.glob("*.qcow2")) == sorted(chain.files)


async def test_a_base_that_is_replaced_once_it_was_checked_is_not_committed_into(
    folder: Path,
) -> None:
    """QEMU has it open read-only, and would open the other one by its name to write to it."""
    chain = make_chain(folder)
    command = ["sh", "-c", 'cp "$0" "$0.new" && mv "$0.new" "$0"', str(chain.base)]
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        with pytest.raises(qc.ChainError, match=r"replaced or removed.*Nothing was sent"):
            await vm.commit("vda", policy=qc.Pivot(), only_if=command)
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("answer", ["pivot", "recycle", "keep"])
async def test_a_base_that_is_replaced_at_ready_does_not_become_the_disk(
    answer: str, folder: Path
) -> None:
    chain = make_chain(folder)
    fresh = folder / "fresh"

    async def policy(_: qc.Ready) -> qc.Pivot | qc.Recycle | qc.Keep:
        run("cp", chain.base, folder / "new")
        os.rename(folder / "new", chain.base)
        if answer == "recycle":
            return qc.Recycle(str(fresh))
        return qc.Pivot() if answer == "pivot" else qc.Keep()

    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=policy)
        told = f"{chain.base} was replaced or removed"
        if answer == "keep":
            assert told in (await job.wait()).warnings[0]
        else:
            with pytest.raises(qc.CommitFailed, match=told):
                await job.wait()
        assert [image.node_name for image in (await vm.disks())[0].chain] == ["top", "base"]
        await vm.close()
        await qemu.quit()
    assert not fresh.exists()
    assert_disk(chain.top, chain.pictures[-1])


async def test_of_an_overlay_that_lost_its_name_it_is_told_that_it_is_gone(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        chain.top.unlink()
        done = await vm.discard("vda", guest="stop")
        (told,) = done.warnings
        assert told.startswith(f"what {chain.top} held is in no file that can be found: no file")
        await qemu.quit()
    assert_disk(Path(done.overlay), chain.pictures[0])


@pytest.mark.parametrize("way", ["pivot", "recycle", "discard", "window", "flatten"])
async def test_a_throttle_over_the_base_stays_and_is_a_name_of_it(way: str, folder: Path) -> None:
    chain = make_chain(folder, layers=3)
    base, mid, top = (f"driver=qcow2,node-name={p.stem},file.driver=file,file.filename={p}"
                      for p in chain.files)  # fmt: skip
    extra = ["-object", "throttle-group,id=tg"]
    for options in (base, "driver=throttle,node-name=thr,throttle-group=tg,file=base",
                    f"{mid},backing=thr", f"{top},backing=mid",
                    "driver=throttle,node-name=beside,throttle-group=tg,file=top"):  # fmt: skip
        extra += ["-blockdev", options]
    extra += ["-device", "virtio-blk-pci,id=vda,drive=top"]
    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        (disk,) = await vm.disks()
        assert (disk.root, disk.filters, disk.chain[2].filters) == ("top", (), ("thr",))
        if way == "flatten":
            with pytest.raises(qc.ChainError, match=r"lost-filter.*throttle 'thr'.*Nothing was"):
                await vm.flatten("vda", keep=2, delete=True)
            assert len((await vm.disk("vda")).chain) == 3
            merging = await vm.commit("vda", top=1, delete=True, override=["lost-filter"])
            assert (await merging.wait()).action == "none"
        elif way == "window":
            async with vm.snapshot(["vda"]):
                pass
        else:
            policy = qc.Pivot() if way == "pivot" else qc.Recycle(str(folder / "fresh.qcow2"))
            await (await vm.commit("vda", policy=policy, base="thr", delete=True)).wait()
        if way == "discard":
            await vm.discard("vda", guest="stop", delete=True)
        now = await vm.disk("vda")
        bottom = "thr" if way == "pivot" else "base"
        assert now.chain[-1].node_name == "base"
        above = now.filters if bottom == "thr" else now.chain[-1].filters
        assert above == (() if way == "flatten" else ("thr",))
        active = Path(now.chain[0].filename)
        await vm.close()
        await qemu.quit()
    assert_disk(active, chain.pictures[-1])
