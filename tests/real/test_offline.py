"""The same commit with the VM switched off."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import run
from tests.ground.images import MIB, Picture, Write, assert_disk, create, make_chain, write
from tests.ground.images import run as run_tool
from tests.ground.loop_device import loop_device
from tests.ground.machines import machine
from tests.ground.qemu import QEMU

PROGRAM = QEMU.daemon or "qemu-storage-daemon"


def daemons(image: Path) -> list[int]:
    """The storage daemons that have this image on their command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if str(image).encode() in words and b"--blockdev" in words:
                found.append(int(name))
    return found


async def commit(image: Path, **options: Any) -> qc.CommitOutcome:
    async with qc.offline(image, program=PROGRAM) as vm:
        return await (await vm.commit("disk", **options)).wait()


@pytest.mark.parametrize("relative", [True, False])
async def test_pivot(relative: bool, folder: Path) -> None:
    chain = make_chain(folder, 3, relative=relative)
    outcome = await commit(chain.top, policy=qc.Pivot(), delete=True)
    assert (outcome.action, outcome.warnings) == ("pivot", [])
    assert outcome.active is not None
    assert outcome.active.filename == str(chain.base)
    assert outcome.deleted == [str(chain.top), str(chain.files[1])]
    assert daemons(chain.top) == []
    assert_disk(chain.base, chain.pictures[-1])


async def test_keep_and_abort_and_an_intermediate_layer(folder: Path) -> None:
    chain = make_chain(folder, 4)
    merged = await commit(chain.top, top=1, shallow=True)
    assert merged.action == "none"
    assert merged.invalidated == [str(chain.files[2])]
    kept = await commit(chain.top, policy=qc.Keep())
    assert (kept.action, kept.invalidated) == ("keep", [])
    aborted = await commit(chain.top, policy=qc.Abort())
    assert aborted.action == "abort"
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_raw_base_and_a_recycle(folder: Path) -> None:
    chain = make_chain(folder, fmt="raw")
    fresh = folder / "fresh.qcow2"
    outcome = await commit(chain.top, policy=qc.Recycle(str(fresh)))
    assert (outcome.action, outcome.base.driver) == ("recycle", "raw")
    assert (await commit(fresh, policy=qc.Keep())).bytes_committed == 0
    assert_disk(chain.base, chain.pictures[-1], fmt="raw")
    assert_disk(fresh, chain.pictures[-1])


async def test_bitmaps_are_carried_and_stored(folder: Path) -> None:
    chain = make_chain(folder)
    run_tool(QEMU.img, "bitmap", "--add", chain.top, "daily")
    await commit(chain.top, policy=qc.Pivot())
    assert "name: daily" in run_tool(QEMU.img, "info", chain.base)
    assert_disk(chain.base, chain.pictures[-1])


async def test_the_lock_of_a_running_vm_is_respected(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        with pytest.raises(qc.JobConflict, match="through that VM's monitor"):
            await commit(chain.top, policy=qc.Pivot())
        await qemu.quit()
    for path, picture in zip(chain.files, chain.pictures, strict=True):
        assert_disk(path, picture)


async def test_what_can_not_be_opened(folder: Path) -> None:
    chain = make_chain(folder)
    raw = create(folder / "x.raw", 65536, fmt="raw")
    with pytest.raises(qc.ChainError, match="no qcow2"):
        await commit(raw, policy=qc.Pivot())
    with pytest.raises(qc.ChainError, match="No such file"):
        await commit(folder / "none", policy=qc.Pivot())
    with pytest.raises(qc.ConnectError, match="not installed"):
        async with qc.offline(chain.top, program="no-such-daemon"):
            pass
    chain.base.rename(folder / "elsewhere")
    with pytest.raises(qc.ChainError, match="backing chain"):
        await commit(chain.top, policy=qc.Pivot())
    with pytest.raises(qc.ChainError, match="no backing file"):
        await commit(folder / "elsewhere", policy=qc.Pivot())
    assert daemons(chain.top) == []


async def test_a_cancelled_one_leaves_nothing(folder: Path) -> None:
    chain = make_chain(folder)
    task = asyncio.create_task(commit(chain.top, policy=qc.Hold()))
    async with asyncio.timeout(20):
        while not daemons(chain.top):
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert daemons(chain.top) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_no_daemon_outlives_us_when_we_are_killed(folder: Path) -> None:
    chain = make_chain(folder)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qmpcommit.cli.main", "commit", "--offline", str(chain.top), "--hold",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    async with asyncio.timeout(20):
        while not daemons(chain.top):
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        while daemons(chain.top):
            await asyncio.sleep(0.01)
    assert_disk(chain.top, chain.pictures[-1])


async def test_images_on_block_devices(folder: Path) -> None:
    files = [folder / "base.disk", folder / "top.disk"]
    for file in files:
        file.touch()
        os.truncate(file, 8 * MIB)
    picture = Picture(4 * MIB)
    with loop_device(files[0]) as base, loop_device(files[1]) as top:
        run_tool(QEMU.img, "create", "-q", "-f", "qcow2", base, str(picture.size))
        run_tool(QEMU.img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
        write(top, [Write(MIB, MIB, 0x11)])
        picture.fill(MIB, MIB, 0x11)
        kept = await commit(top, policy=qc.Keep())
        assert kept.action == "keep"
        pivoted = await commit(top, policy=qc.Pivot(), delete=True)
        assert (pivoted.action, pivoted.invalidated) == ("pivot", [str(top)])
        assert top.exists(), "a device is not unlinked"
        for device in (base, top):
            shown = run_tool(QEMU.img, "convert", "-f", "qcow2", device, folder / "raw")
            assert not shown
            assert (folder / "raw").read_bytes() == bytes(picture.data)


async def test_from_the_command_line(folder: Path) -> None:
    chain = make_chain(folder)
    assert (await run("commit", "--offline", chain.top)).status == 2
    assert (await run("commit", "--offline", chain.top, "vda", "--pivot")).status == 2
    assert (await run("commit", chain.top, "--pivot")).status == 2
    said = await run("commit", "--offline", chain.top, "--pivot", "--dry-run")
    assert said.status == 0
    said = await run("commit", "--offline", chain.top, "--pivot", "--json")
    assert said.status == 0
    assert said.json["action"] == "pivot"
    assert_disk(chain.base, chain.pictures[-1])
