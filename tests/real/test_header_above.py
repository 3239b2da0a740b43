"""The overlay above the merged layers can't be written: refused, for QEMU would crash over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.qcow2 import name_room
from qmpcommit.commit.overlays_above import OverlaysAbove
from tests.ground.images import (
    LAYERS,
    MIB,
    Chain,
    Write,
    assert_disk,
    create,
    make_chain,
    run,
    write,
)
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.qemu import QEMU
from tests.real.test_checks import foreign, qcow2, running

ABOVE = "header-above"


@asynccontextmanager
async def opened(folder: Path, chain: Chain) -> AsyncIterator[tuple[Machine, qc.Session]]:
    """A storage daemon that opened the layers below by their headers."""
    async with (
        storage_daemon(folder, chain, style="implicit") as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):
        yield daemon, vm


async def refused(vm: qc.Session, disk: str, why: str, **options: Any) -> None:
    """Both the commit below its second layer and the flattening are; nothing is changed."""
    before = (await vm.disk(disk)).chain
    with pytest.raises(qc.ChainError, match=why) as told:
        await vm.commit(disk, top=2, **options)
    assert ABOVE in str(told.value.facts["checks"])
    with pytest.raises(qc.ChainError, match=why):
        await vm.flatten(disk, keep=3)
    assert (await vm.disk(disk)).chain == before
    assert await vm.execute("query-jobs") == []


def alone(path: Path) -> str:
    """The image without its backing files, for ``--image-opts``."""
    return f"driver=qcow2,file.driver=file,file.filename={path},backing="


@pytest.mark.parametrize("how", ["removed", "replaced", "read by another"])
async def test_a_file_that_qemu_would_have_to_open_again(how: str, folder: Path) -> None:
    chain = make_chain(folder, 4)
    above, aside = chain.files[2], folder / "aside"
    async with opened(folder, chain) as (_, vm), AsyncExitStack() as reading:
        if how == "read by another":
            await reading.enter_async_context(
                foreign(Path(alone(above)), "-r", "--image-opts", fmt="")
            )
            await refused(vm, "top", "locked by another process")
            await reading.aclose()
        else:
            above.rename(aside)
            if how == "replaced":
                create(above, None, backing=chain.files[1])
            why = "no file has the name" if how == "removed" else "is another file now than"
            await refused(vm, "top", why)
            aside.rename(above)
        outcome = await (await vm.commit("top", top=2)).wait()  # nothing stands in the way now
        assert outcome.action == "none"
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize(
    "how", ["beside", "inside", "node", "added", "format", "nested", "twice", "sibling"]
)
async def test_a_node_that_stays_read_only(how: str, folder: Path) -> None:
    """Declared so beside its name or in its overlay's options; one that is reopened is not."""
    chain = make_chain(folder, 4)
    base, mid, low, top = chain.files
    here = ",read-only=on,backing=mid"
    if how in ("beside", "sibling"):
        here += ",file.read-only=on,file.node-name=low-file"
    elif how == "inside":
        here += ",file.read-only=on"
    nodes = [qcow2("base", base), qcow2("mid", mid, ",backing=base"), qcow2("low", low, here)]
    if how == "nested":  # a raw node lies between, and has its mode from the overlay's
        nested = f"file.driver=raw,file.file.driver=file,file.file.filename={low}"
        nodes[2] = f"driver=qcow2,node-name=low,read-only=on,backing=mid,{nested}"
    if how == "node":
        nodes[2:] = [f"driver=file,node-name=f,filename={low},read-only=on",
                     "driver=qcow2,node-name=low,read-only=on,backing=mid,file=f"]  # fmt: skip
    over = "mid" if how == "sibling" else "low"
    async with running(folder, *nodes, qcow2("top", top, f",backing={over}")) as vm:
        if how == "sibling":  # its own overlay is written as well
            found = (await vm.plan("vda", top=1)).findings
            assert [f.level for f in found if f.name == ABOVE] == ["refuse"]
            return
        if how == "added":  # a second overlay; as its options can't be seen QEMU itself is asked
            more = create(folder / "more.qcow2", None, backing=mid)
            own = {"driver": "file", "node-name": "f", "filename": str(more), "read-only": True}
            node = {"driver": "qcow2", "node-name": "n", "read-only": True, "file": own}
            await vm.execute("blockdev-add", {**node, "backing": "mid"})
            with pytest.raises(
                qc.ChainError, match=r"QEMU can't open \S+ \(node 'n'\) for writing"
            ):
                await vm.commit("vda", top=2)
            return
        if how == "twice":
            file = {"driver": "file", "filename": str(low)}
            node = {"driver": "qcow2", "node-name": "more", "read-only": True, "file": file}
            await vm.execute("blockdev-add", {**node, "backing": None})
            await refused(vm, "vda", "has it open once more, as more")
            await vm.execute("blockdev-del", {"node-name": "more"})
        elif how not in ("format", "nested"):
            await refused(vm, "vda", "was opened with read-only=on")
            return
        outcome = await (await vm.commit("vda", top=2)).wait()
        assert outcome.action == "none"


def deep(folder: Path, length: int) -> Path:
    """A folder in it such that the path of a file "b" there has so many bytes."""
    while (missing := length - 2 - len(str(folder))) > 0:
        folder /= "x" * (min(missing - 1, 200) if missing != 202 else 199)
        folder.mkdir()
    return folder


async def test_what_was_replaced_meanwhile_is_not_read_instead(folder: Path) -> None:
    """What was opened for writing stays so where its name leads to another file by then."""
    chain = make_chain(folder, 4)
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        plan, graph = await vm.plan("vda", top=2), await vm.graph()
        above = OverlaysAbove(vm, plan, vm.cwd)
        assert await above.open(graph) is None
        (node,) = above.opened
        chain.files[2].rename(folder / "aside")
        create(chain.files[2], 64 * MIB)
        await above.close()
        assert not (await vm.graph()).nodes[node].raw["ro"]
        await qemu.quit()


@pytest.mark.parametrize(
    ("options", "most"),
    [((), 1023), (("cluster_size=512",), 376), (("cluster_size=512", "compat=0.10"), 416)],
)
async def test_a_name_for_which_there_is_no_room(
    options: tuple[str, ...], most: int, folder: Path
) -> None:
    """The longest one is written; one more byte is refused, and a relative name is the way out."""
    given = [word for option in options for word in ("-o", option)]
    for length in (most, most + 1):
        place = folder / str(length)
        place.mkdir()
        base = create(deep(place, length) / "b", 16 * MIB)
        assert len(str(base)) == length
        mid, top = create(place / "m", None, backing=base.relative_to(place)), place / "t"
        run(QEMU.img, "create", "-q", "-f", "qcow2", *given, "-b", mid, "-F", "qcow2", top)
        assert name_room(str(top), "qcow2") == most
        async with opened(folder, Chain([base, mid, top], [])) as (_, vm):
            if length > most:
                with pytest.raises(qc.ChainError, match=f"has room for {most}") as told:
                    await vm.commit("t", top=1, override=[ABOVE])
                assert "keep_relative" in str(told.value)
            job = await vm.commit("t", top=1, keep_relative=length > most)
            assert (await job.wait()).action == "none"
        run(QEMU.img, "info", "--backing-chain", top)


async def until_held(vm: qc.Session, job_id: str) -> None:
    """Wait until the job is PENDING."""
    while {j["id"]: j["status"] for j in await vm.execute("query-jobs")}[job_id] != "pending":
        await asyncio.sleep(0.01)


async def test_nothing_is_opened_any_more_for_a_job_that_somebody_else_has_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, order, opening = make_chain(folder, 3), list[str](), asyncio.Event()
    opens = OverlaysAbove.open

    async def hangs(above: OverlaysAbove, *graph: Any) -> str | None:
        if above._rehearsal:
            return await opens(above, *graph)
        opening.set()
        try:
            await asyncio.Event().wait()
        finally:
            order.append("opened")
        return None

    async def close(above: OverlaysAbove) -> None:
        order.append("closed")

    async with opened(folder, chain) as (daemon, vm):
        job = await vm.commit("export0", top=1)
        monkeypatch.setattr(OverlaysAbove, "open", hangs)
        monkeypatch.setattr(OverlaysAbove, "close", close)
        await asyncio.wait_for(opening.wait(), 20)
        await vm.execute("job-cancel", {"id": job.id})
        assert (await job.wait()).action == "abort"
        assert order == ["opened", "closed"]
        await daemon.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize(
    ("how", "program"),
    [
        ("removed", "iothread"),
        ("removed", "daemon"),
        ("replaced", "machine"),
        ("read by another", "machine"),
        ("read by another", "daemon"),
        ("taken up", "machine"),
    ],
)
async def test_what_comes_in_between_cancels_the_job(how: str, program: str, folder: Path) -> None:
    chain = make_chain(folder, 4)
    write(chain.files[1], [Write(8 * MIB, 24 * MIB, 0x55)])  # more than goes through at once
    above, aside = chain.files[2], folder / "aside"
    starting = (
        storage_daemon(folder, chain, style="implicit")
        if program == "daemon"
        else machine(folder, chain, style="implicit", iothread=program == "iothread")
    )
    async with starting as qemu, qc.Session.connect(qemu.qmp) as vm, AsyncExitStack() as reading:
        (disk,) = await vm.disks()
        before = [image.filename for image in disk.chain]
        if how == "taken up":
            layers = {"top-node": disk.chain[2].node_name, "base-node": disk.chain[3].node_name}
            more = {"auto-finalize": False, "auto-dismiss": False}
            await vm.execute("block-commit", {"job-id": "j", "device": disk.root, **layers, **more})
            await until_held(vm, "j")
            above.rename(aside)
            job = await vm.adopt("j")
        else:
            job = await vm.commit(disk.name, top=2, bandwidth="1MiB")
            if how != "read by another":
                above.rename(aside)
            if how == "replaced":
                stranger = create(above, MIB).read_bytes()
            if how == "read by another":
                locker = foreign(Path(alone(above)), "-r", "--image-opts", fmt="")
                await reading.enter_async_context(locker)
            await vm.execute("block-job-set-speed", {"device": job.id, "speed": 0})
        with pytest.raises(qc.CommitFailed, match=f"valid only under {chain.files[1]}"):
            await job.wait()
        assert [image.filename for image in (await vm.disks())[0].chain] == before
        await reading.aclose()
        if how == "replaced":
            assert above.read_bytes() == stranger, "QEMU wrote into another file"
        if aside.exists():
            aside.rename(above)
        outcome = await (await vm.commit(disk.name, top=2)).wait()
        assert outcome.action == "none"
        assert (await vm.disks())[0].chain[1].read_only
        await qemu.quit()
    picture = chain.pictures[-1].copy()
    overlaid = [w for layer in LAYERS[2:] for w in layer]
    picture.fill(8 * MIB, 24 * MIB, 0x55)
    for w in overlaid:
        picture.fill(w.offset, w.length, w.pattern)
    assert_disk(chain.top, picture)
