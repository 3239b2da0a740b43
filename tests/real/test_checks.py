"""The checks before the first byte, each in the situation that it is for, on a real QEMU.

Where it is cheap, the twin shows what QEMU does without the check. The plans are QEMU's own
chains; the commits of the twins are sent bare, so that nothing else has a say.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block import files
from qmpcommit.block.chain import find_disk, read_disks
from qmpcommit.commit.checks import Finding, check_commit, refuse
from qmpcommit.commit.plan import plan_commit
from qmpcommit.commit.request import Request
from tests.ground.images import MIB, Chain, Picture, Write, create, make_chain, run, write
from tests.ground.loop_device import loop_device
from tests.ground.machines import machine, storage_daemon
from tests.ground.qemu import QEMU


async def look(vm: qc.Session, disk: str = "vda", **request: Any) -> dict[str, list[Finding]]:
    """All findings of a commit of this disk, by name."""
    graph = await vm.graph()
    found = find_disk(read_disks(graph), disk, vm=vm.name)
    policy = None if request.get("top") else qc.Keep()
    plan = plan_commit(vm.name, found, Request(disk, policy, **request))
    findings = await asyncio.to_thread(check_commit, graph, plan, pid=vm.peer_pid, cwd=vm.cwd)
    sorted_: dict[str, list[Finding]] = {}
    for finding in findings:
        sorted_.setdefault(finding.name, []).append(finding)
    return sorted_


async def refused(vm: qc.Session, **request: Any) -> dict[str, Finding]:
    """The checks that refuse, with what they say."""
    found = await look(vm, **request)
    return {f.name: f for all_ in found.values() for f in all_ if f.level == "refuse"}


async def bare_commit(vm: qc.Session, **arguments: Any) -> str:
    """What a commit without checks ends with: "READY", or QEMU's error."""
    with vm.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") as events:
        try:
            await vm.execute("block-commit", {"job-id": "j", "device": "top", **arguments})
        except qc.CommandRefused as error:
            return error.desc
        event = await anext(events)
        if event.name == "BLOCK_JOB_READY":
            await vm.execute("job-cancel", {"id": "j"})
            await anext(events)
            return "READY"
        return str(getattr(event, "error", "") or event.name)


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[Path]:
    """A small file system in memory."""
    place = folder / "mnt"
    place.mkdir()
    options = f"size={size}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        run("umount", "-l", place)


@contextlib.asynccontextmanager
async def foreign(path: Path, *options: str, fmt: str = "qcow2") -> AsyncIterator[int]:
    """Another process that has the image open."""
    process = await asyncio.create_subprocess_exec(
        QEMU.io, *options, *(["-f", fmt] if fmt else []), str(path),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    try:
        await process.stdout.readuntil(b"qemu-io> ")
        yield process.pid
    finally:
        await process.communicate(b"quit\n")


@contextlib.asynccontextmanager
async def running(folder: Path, *options: str) -> AsyncIterator[qc.Session]:
    """A VM whose disk ``vda`` has these ``-blockdev``s."""
    extra = [word for option in options for word in ("-blockdev", option)]
    extra += ["-device", "virtio-blk-pci,drive=top,id=vda"]
    async with machine(folder, extra=extra) as qemu, qc.Session.connect(qemu.qmp) as vm:
        yield vm


def qcow2(name: str, path: Path, more: str = "") -> str:
    return f"driver=qcow2,node-name={name},file.driver=file,file.filename={path}{more}"


# -- nothing to complain about --------------------------------------------------------------------


@pytest.mark.parametrize("style", ["blockdev", "implicit", "drive"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_a_sound_chain_is_all_ok(style: Any, fmt: str, folder: Path) -> None:
    chain = make_chain(folder, 3, fmt=fmt)
    async with (
        machine(folder, chain, style=style, fmt=fmt) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        for request in ({}, {"shallow": True}, {"top": 1}):
            found = await look(vm, **request)
            assert {f.level for all_ in found.values() for f in all_} == {"ok"}, found
        numbers = found["free-space"][0].numbers
        assert numbers["needed"] <= 8 * MIB < numbers["free"]


async def test_a_storage_daemon_with_relative_names(folder: Path) -> None:
    chain = make_chain(folder, 3, relative=True)
    async with (
        storage_daemon(folder, chain, style="implicit") as daemon,
        qc.Session.connect(daemon.qmp) as vm,
    ):
        found = await look(vm, disk="top")
        assert {f.level for all_ in found.values() for f in all_} == {"ok"}, found


async def test_after_a_keep_and_after_another_layers_commit(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        assert await bare_commit(vm) == "READY"
        assert await refused(vm) == {}
        assert await bare_commit(vm, **{"top-node": "mid"}) == "BLOCK_JOB_COMPLETED"
        (finding,) = (await look(vm))["base-shared"]  # mid is left over
        assert finding.level == "note"
        assert "the node 'mid'" in finding.message
        assert await bare_commit(vm) == "READY"
        await vm.execute("blockdev-del", {"node-name": "mid"})
        (finding,) = (await look(vm))["base-shared"]
        assert finding.level == "ok"


# -- room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_a_file_system_that_is_too_small(fmt: str, folder: Path) -> None:
    with mounted(folder, 6 * MIB) as place:
        base = create(place / f"base.{fmt}", 64 * MIB, fmt=fmt)
        top = create(folder / "top.qcow2", None, backing=base, backing_fmt=fmt)
        write(top, [Write(0, 16 * MIB, 0x11)])
        made = f"driver={fmt},node-name=base,file.driver=file,file.filename={base}"
        async with running(folder, made, qcow2("top", top, ",backing=base")) as vm:
            found = await refused(vm)
            assert list(found) == ["free-space"]
            numbers = found["free-space"].numbers
            assert numbers["free"] <= 6 * MIB < 16 * MIB <= numbers["needed"] <= 18 * MIB
            assert str(numbers["needed"]) in found["free-space"].message
            with pytest.raises(qc.NoSpace, match=r"make room for .*override 'free-space'"):
                refuse(list(found.values()))
            assert "No space left" in await bare_commit(vm)  # without the check
            run("mount", "-o", "remount,size=32M", place)
            assert await refused(vm) == {}
            assert await bare_commit(vm) == "READY"


async def test_a_base_that_is_full_already_needs_nothing(folder: Path) -> None:
    with mounted(folder, 18 * MIB) as place:
        base = create(place / "base.qcow2", 16 * MIB)
        write(base, [Write(0, 16 * MIB, 0x11)])
        top = create(folder / "top.qcow2", None, backing=base)
        write(top, [Write(0, 16 * MIB, 0x22)])
        options = qcow2("base", base), qcow2("top", top, ",backing=base")
        async with running(folder, *options) as vm:
            assert await refused(vm) == {}
            assert await bare_commit(vm) == "READY"


async def test_a_qcow2_on_a_block_device(folder: Path) -> None:
    disk = folder / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 8 * MIB)
    with loop_device(disk) as device:
        run(QEMU.img, "create", "-q", "-f", "qcow2", device, str(64 * MIB))
        run(QEMU.io, "-f", "qcow2", "-c", "write 0 4M", device)
        header = files.read_header(str(device))
        assert header is not None
        end = run(QEMU.img, "check", "--output=json", "-f", "qcow2", device)
        assert f'"image-end-offset": {files.used_end(str(device), header)}' in end
        top = folder / "top.qcow2"
        create(top, None, backing=device)
        write(top, [Write(8 * MIB, 8 * MIB, 0x11)])
        base = f"driver=qcow2,node-name=base,file.driver=host_device,file.filename={device}"
        async with running(folder, base, qcow2("top", top, ",backing=base")) as vm:
            found = await refused(vm)
            assert list(found) == ["free-space"]
            assert "block device" in found["free-space"].message
            assert 3 * MIB < found["free-space"].numbers["free"] < 4 * MIB
            assert "No space left" in await bare_commit(vm)


async def test_a_qcow2_that_fills_its_block_device_needs_nothing(folder: Path) -> None:
    """What it has allocated is counted; what it shares with a snapshot is not its own."""
    disk, top = folder / "disk", folder / "top.qcow2"
    disk.write_bytes(b"")
    os.truncate(disk, 8 * MIB)
    with loop_device(disk) as device:
        run(QEMU.img, "create", "-q", "-f", "qcow2", device, str(7 * MIB))
        run(QEMU.io, "-f", "qcow2", "-c", "write 0 7M", device)
        header = files.read_header(str(device))
        assert header is not None
        os.truncate(disk, files.used_end(str(device), header))  # a device of its very size
        run("losetup", "-c", device)
        create(top, None, backing=device)
        write(top, [Write(0, 7 * MIB, 0x11)])
        base = f"driver=qcow2,node-name=base,file.driver=host_device,file.filename={device}"
        async with running(folder, base, qcow2("top", top, ",backing=base")) as vm:
            assert await refused(vm) == {}
            assert await bare_commit(vm) == "READY"
        os.truncate(disk, 9 * MIB)
        run("losetup", "-c", device)
        run(QEMU.img, "snapshot", "-c", "s", device)
        async with running(folder, base, qcow2("top", top, ",backing=base")) as vm:
            found = await refused(vm)
            assert found["free-space"].numbers["needed"] > 7 * MIB


async def test_a_raw_device_that_has_grown_under_qemu(folder: Path) -> None:
    disk, top = folder / "disk", folder / "top.qcow2"
    disk.write_bytes(b"")
    os.truncate(disk, 4 * MIB)
    with loop_device(disk) as device:
        create(top, 8 * MIB, backing=device, backing_fmt="raw")
        write(top, [Write(6 * MIB, MIB, 0x11)])
        base = f"driver=raw,node-name=base,file.driver=host_device,file.filename={device}"
        async with running(folder, base, qcow2("top", top, ",backing=base")) as vm:
            assert list(await refused(vm)) == ["size"]
            os.truncate(disk, 8 * MIB)
            run("losetup", "-c", device)
            assert await refused(vm) == {}
            outcome = await (await vm.commit("vda", policy=qc.Pivot())).wait()
            assert outcome.action == "pivot"
        picture = Picture(8 * MIB)
        picture.fill(6 * MIB, MIB, 0x11)
        assert disk.read_bytes() == bytes(picture.data)


async def test_a_raw_base_on_a_smaller_device(folder: Path) -> None:
    disk = folder / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 8 * MIB)
    with loop_device(disk) as device:
        assert files.device_size(str(device)) == 8 * MIB
        top = create(folder / "top.qcow2", 16 * MIB, backing=device, backing_fmt="raw")
        base = f"driver=raw,node-name=base,file.driver=host_device,file.filename={device}"
        async with running(folder, base, qcow2("top", top, ",backing=base")) as vm:
            found = await refused(vm)
            assert list(found) == ["size"]
            assert found["size"].numbers == {"base": 8 * MIB, "needed": 16 * MIB}
            with pytest.raises(qc.NoSpace):
                refuse(list(found.values()))
            assert await bare_commit(vm) == "Invalid argument"  # that is all QEMU says


async def test_a_slice_of_a_raw_file_can_not_grow(folder: Path) -> None:
    base = folder / "base"
    base.write_bytes(bytes(16 * MIB))
    top = create(folder / "top.qcow2", 16 * MIB, backing=base, backing_fmt="raw")
    part = f"driver=raw,size={8 * MIB},node-name=base,file.driver=file,file.filename={base}"
    async with running(folder, part, qcow2("top", top, ",backing=base")) as vm:
        assert list(await refused(vm)) == ["size"]
        assert "not supported" in await bare_commit(vm)


async def test_a_smaller_base_that_grows_is_a_note(folder: Path) -> None:
    base = create(folder / "base.qcow2", 16 * MIB)
    top = create(folder / "top.qcow2", 64 * MIB, backing=base)
    async with running(folder, qcow2("base", base), qcow2("top", top, ",backing=base")) as vm:
        (finding,) = (await look(vm))["size"]
        assert (finding.level, finding.numbers["needed"]) == ("note", 64 * MIB)
        assert await bare_commit(vm) == "READY"
        assert (await vm.disk("vda")).chain[1].virtual_size == 64 * MIB


# -- others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["blockdev", "implicit"])
async def test_two_overlays_on_one_base(style: Any, folder: Path) -> None:
    chain = make_chain(folder)
    other = create(folder / "other.qcow2", None, backing=chain.base)
    more = ",backing=base" if style == "blockdev" else ""
    extra = ["-blockdev", qcow2("other", other, more)]
    extra += ["-device", "virtio-blk-pci,drive=other,id=vdb"]
    async with (
        machine(folder, chain, style=style, extra=extra) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        found = await refused(vm)
        assert list(found) == ["base-shared"]
        assert "'other'" in found["base-shared"].message
        assert "vdb" in found["base-shared"].message
        assert str(other) in found["base-shared"].message
        error = await bare_commit(vm)
        words = ("Permission conflict", "Conflicts with use", 'Failed to get "write" lock')
        assert any(each in error for each in words), error


async def test_a_base_that_is_exported(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
        await vm.execute("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "backup", "node-name": "base"}
        await vm.execute("block-export-add", export)
        found = await refused(vm)
        assert list(found) == ["base-shared"]
        assert "export 'backup'" in found["base-shared"].message
        await vm.execute("block-export-del", {"id": "backup"})
        assert await refused(vm) == {}


async def test_a_base_that_another_process_has_open(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        assert files.image_locks(str(chain.base), qemu.pid) == files.Locks("own")
        assert files.image_locks(str(chain.base), None) == files.Locks("unknown")
        assert files.image_locks(str(chain.base), os.getpid()) == files.Locks("unknown")
        async with foreign(chain.base, "-r") as pid:
            found = await refused(vm)
            assert list(found) == ["base-shared"]
            assert f"(process {pid})" in found["base-shared"].message
            assert 'Failed to get "write" lock' in await bare_commit(vm)
        async with foreign(chain.base, "-r", "-U"):  # it has said that it does not mind
            assert await refused(vm) == {}
        assert await refused(vm) == {}
        assert await bare_commit(vm) == "READY"
    assert files.image_locks(str(chain.base), qemu.pid) == files.Locks("none")


async def test_looking_takes_no_lock(folder: Path) -> None:
    """Nobody else is kept from a file that is being looked at."""
    chain = make_chain(folder)
    stop = False

    def look_on() -> int:
        count = 0
        while not stop:
            files.image_locks(str(chain.base), os.getpid())
            files.read_header(str(chain.base))
            count += 1
        return count

    looking = asyncio.create_task(asyncio.to_thread(look_on))
    try:
        for _ in range(5):
            async with foreign(chain.base):
                pass
    finally:
        stop = True
    assert await looking > 10


# -- the base can't be written --------------------------------------------------------------------


async def test_a_base_on_a_read_only_file_system(folder: Path) -> None:
    with mounted(folder, 16 * MIB) as place:
        base = create(place / "base.qcow2", 64 * MIB)
        top = create(folder / "top.qcow2", None, backing=base)
        run("mount", "-o", "remount,ro", place)
        async with running(folder, qcow2("top", top)) as vm:
            found = await refused(vm)
            assert list(found) == ["read-only-base"]
            assert "mounted read-only" in found["read-only-base"].message
            assert "Read-only file system" in await bare_commit(vm)
            run("mount", "-o", "remount,rw", place)
            assert await refused(vm) == {}
            assert await bare_commit(vm) == "READY"


async def test_a_base_on_a_read_only_device(folder: Path) -> None:
    disk = folder / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 8 * MIB)
    with loop_device(disk, "-r") as device:
        top = create(folder / "top.qcow2", 8 * MIB, backing=device, backing_fmt="raw")
        async with running(folder, qcow2("top", top)) as vm:
            found = await refused(vm)
            assert list(found) == ["read-only-base"]
            assert "block device is read-only" in found["read-only-base"].message
            assert await bare_commit(vm) != "READY"


@pytest.mark.parametrize("form", ["options", "json"])
async def test_a_file_node_that_was_declared_read_only(form: str, folder: Path) -> None:
    chain = make_chain(folder)
    file = f"driver=file,node-name=base-file,read-only=on,filename={chain.base}"
    if form == "json":
        file = (
            '{"driver": "file", "node-name": "base-file", "read-only": true,'
            f' "filename": "{chain.base}"}}'
        )
    base = "driver=qcow2,node-name=base,read-only=on,file=base-file"
    async with running(folder, file, base, qcow2("top", chain.top, ",backing=base")) as vm:
        found = await refused(vm)
        assert list(found) == ["read-only-base"]
        assert "blockdev-reopen" in found["read-only-base"].message
        assert "read-only" in await bare_commit(vm)
        with contextlib.suppress(qc.CommandRefused):  # 6.1 and later; then as the message says
            reopened = {"driver": "file", "node-name": "base-file", "filename": str(chain.base)}
            layer = {"driver": "qcow2", "node-name": "base", "file": "base-file"}
            options = [{**node, "read-only": False} for node in (reopened, layer)]
            await vm.execute("blockdev-reopen", {"options": options})
            assert await refused(vm) == {}
            assert await bare_commit(vm) == "READY"


async def test_a_read_only_node_that_qemu_reopens_itself(folder: Path) -> None:
    chain = make_chain(folder)
    base = qcow2("base", chain.base, ",read-only=on,file.node-name=base-file")
    async with running(folder, base, qcow2("top", chain.top, ",backing=base")) as vm:
        assert (await vm.disk("vda")).chain[1].read_only
        (finding,) = (await look(vm))["read-only-base"]
        assert finding.level == "ok"
        assert await bare_commit(vm) == "READY"


async def test_a_file_node_of_which_nothing_is_known(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, Chain([chain.base], chain.pictures[:1])) as qemu:
        other = create(folder / "other.qcow2", 64 * MIB)
        over = create(folder / "over.qcow2", None, backing=other)
        async with qc.Session.connect(qemu.qmp) as vm:
            for options in (
                {"driver": "file", "node-name": "f", "filename": str(other), "read-only": True},
                {"driver": "qcow2", "node-name": "other", "file": "f", "read-only": True},
                {"driver": "qcow2", "node-name": "over", "backing": "other",
                 "file": {"driver": "file", "filename": str(over)}},
            ):  # fmt: skip
                await vm.execute("blockdev-add", options)
            export = {"type": "nbd", "id": "e", "node-name": "over", "writable": True}
            address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
            await vm.execute("nbd-server-start", {"addr": address})
            await vm.execute("block-export-add", export)
            (finding,) = (await look(vm, disk="over"))["read-only-base"]
            assert finding.level == "note"
            assert "read-only=on of its own" in finding.message


# -- what the layers are --------------------------------------------------------------------------


async def test_a_base_that_is_marked_corrupt(folder: Path) -> None:
    chain = make_chain(folder)
    with chain.base.open("r+b") as file:
        file.seek(79)  # the last byte of the incompatible features
        file.write(b"\x02")
    header = files.read_header(str(chain.base))
    assert header is not None
    assert header.corrupt
    async with running(folder, qcow2("top", chain.top)) as vm:
        found = await refused(vm)
        assert list(found) == ["corrupt"]
        assert "qemu-img check" in found["corrupt"].message
        assert await bare_commit(vm) == "READY"  # QEMU writes to it all the same


async def test_an_encrypted_overlay_on_a_plain_base(folder: Path) -> None:
    """Without the check, plain text lands in the base."""
    secret = ("-object", "secret,id=s0,data=secret")
    base = create(folder / "base.qcow2", 16 * MIB)
    top = folder / "top.qcow2"
    key = ("--object", "secret,id=s0,data=secret")
    done = subprocess.run(
        [QEMU.img, "create", "-q", *key, "-f", "qcow2", "-b", base, "-F", "qcow2",
         "-o", "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10", top],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no LUKS: {done.stderr}")
    options = ["-blockdev", qcow2("base", base)]
    luks = ",encrypt.format=luks,encrypt.key-secret=s0,backing=base"
    options += ["-blockdev", qcow2("top", top, luks)]
    options += ["-device", "virtio-blk-pci,drive=top,id=vda"]
    async with (
        machine(folder, extra=(*secret, *options)) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        found = await refused(vm)
        assert list(found) == ["encrypted"]
        assert f"{top}: luks, {base}: not encrypted" in found["encrypted"].message
        assert await bare_commit(vm) == "READY"


async def test_a_chain_that_was_rebased_on_disk(folder: Path) -> None:
    chain = make_chain(folder, 3)
    other = create(folder / "other.qcow2", 64 * MIB)
    low = chain.files[1]
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        assert await refused(vm) == {}
        header = files.read_header(str(low))
        assert header is not None
        assert (header.backing, header.backing_format) == (str(chain.base), "qcow2")
        rebased = folder / "rebased.qcow2"
        create(rebased, 64 * MIB, backing=other)
        with low.open("r+b") as file:  # qemu-img rebase would want the lock that QEMU has
            file.write(rebased.read_bytes()[:65536])
        found = await refused(vm)
        assert list(found) == ["on-disk-backing"]
        assert f"'{other}'" in found["on-disk-backing"].message
        assert str(chain.base) in found["on-disk-backing"].message
        assert await refused(vm, shallow=True) == {}
        assert await bare_commit(vm) == "READY"  # QEMU does not look


@pytest.mark.parametrize("name", ["base.qcow2", "link.qcow2", "./base.qcow2", "json"])
async def test_other_names_of_the_same_file(name: str, folder: Path) -> None:
    base = create(folder / "base.qcow2", 64 * MIB)
    (folder / "link.qcow2").symlink_to("base.qcow2")
    if name == "json":
        name = f'json:{{"driver": "qcow2", "file.driver": "file", "file.filename": "{base}"}}'
    top = create(folder / "top.qcow2", None, backing=name)
    async with running(folder, qcow2("base", base), qcow2("top", top, ",backing=base")) as vm:
        assert await refused(vm) == {}


async def test_a_base_that_was_replaced_on_disk(folder: Path) -> None:
    """QEMU opens it anew by its name, and would write into the other file."""
    chain = make_chain(folder)
    async with (
        machine(folder, chain, style="implicit") as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        chain.base.rename(folder / "away.qcow2")
        create(chain.base, 64 * MIB)
        found = await look(vm)
        (space,) = found["free-space"]
        assert space.level == "note"
        assert "another file open" in space.message
        (replaced,) = found["replaced-file"]
        assert (replaced.level, replaced.final) == ("refuse", True)
        assert str(folder / "away.qcow2") in replaced.message  # where QEMU's own file is now
        other = chain.base.read_bytes()
        with pytest.raises(qc.ChainError, match=r"another file now.*Nothing was sent"):
            await vm.commit("vda", policy=qc.Pivot(), override=["replaced-file"])
        assert chain.base.read_bytes() == other
