"""Whoever runs a window is killed: its command ends too, and who reads on is not disturbed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.recovery.monitors import Place
from qmpcommit.recovery.verdict import examine
from tests.cli.command import run, start
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine


async def written(path: Path, lines: int) -> list[int]:
    """The numbers in a file, once it has so many."""
    async with asyncio.timeout(30):
        while not path.exists() or len(path.read_text().split()) < lines:
            await asyncio.sleep(0.01)  # a shell tells nobody
    return [int(word) for word in path.read_text().split()]


async def ended(pid: int) -> None:
    """When a process is gone, or only waits for somebody to ask for its status."""
    async with asyncio.timeout(30):
        while Path(f"/proc/{pid}/stat").exists():
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
            await asyncio.sleep(0.01)


async def test_a_window_is_not_merged_back_under_who_reads_it_still(folder: Path) -> None:
    chain = make_chain(folder)
    pids, own = folder / "pids", folder / "own"
    program = (
        f'exec 3<"$QMPCOMMIT_FILE_vda" >{folder}/said 2>&1;'
        f" setsid sh -c 'echo $$ >>{own}; exec sleep 600' &"
        f" sleep 600 & echo $! >>{pids}; echo $$ >>{pids}; wait"
    )
    async with machine(folder, chain, running=True) as qemu:
        window = await start("window", qemu.qmp, "vda", "--", "sh", "-c", program)
        group = await written(pids, 2)
        (reader,) = await written(own, 1)
        window.kill()
        await window.wait()
        for pid in group:
            await ended(pid)
        who = f"sleep (process {reader})"
        (verdict,) = await examine([Place((qemu.qmp,))], within=30)
        (left,) = [each for each in verdict.symptoms if each.kind == "window"]
        assert (who in left.message, left.command) == (True, "")
        told = await run("recover", qemu.qmp, "--yes")
        assert (told.status, who in told.out) == (3, True), told.out
        assert "--override reader" in told.out
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.JobConflict, match=re.escape(who)):
                await vm.close_windows()
            assert len(await vm.windows()) == 1
            os.kill(reader, signal.SIGTERM)
            await ended(reader)
            done = await vm.recover()
            assert done.left == ()
            assert await vm.windows() == []
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_only_who_reads_this_window_is_in_its_way(folder: Path) -> None:
    one, two = make_chain(folder), make_chain(folder, names=("b2", "m2", "l2", "t2"))
    async with machine(folder, one, two, running=True) as qemu, qc.Session.connect(qemu.qmp) as vm:
        window = await vm.open_window(["vda", "vdb"])
        for claim in window.claims.values():
            claim.abandon()
        with one.top.open("rb") as file:
            reader = await asyncio.create_subprocess_exec("sleep", "600", stdin=file)
        found = await vm.recover(override=["claim"])
        assert [each.disk for each in found.left if each.kind == "window"] == ["vda"]
        assert [each.done for each in found.findings if each.disk == "vdb"] == [True]
        (stays,) = await vm.windows()
        assert stays.disk == "vda"
        (outcome,) = await vm.close_windows(override=["reader"])
        assert outcome.action == "pivot"
        reader.kill()
        await reader.wait()
        await qemu.quit()
    assert_disk(one.top, one.pictures[-1])
    assert_disk(two.top, two.pictures[-1])
