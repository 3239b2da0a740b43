"""Each example as its docstring says, on a real QEMU, with proof of the data."""

from __future__ import annotations

import asyncio
import os
import sys
import zipfile
from pathlib import Path

import pytest

import qmpcommit as qc
from tests.cli.command import ENVIRONMENT, ROOT, Said, end
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine
from tests.ground.sessions import runs


async def example(name: str, *words: str) -> Said:
    """Run one."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "examples" / name), *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )
    return await end(process)


async def test_embed(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await example("embed.py", qemu.qmp, "vda")
        assert (said.status, said.err) == (0, "")
        assert "event: BLOCK_JOB_READY qmpcommit-vda-" in said.out
        assert "event: BLOCK_JOB_COMPLETED qmpcommit-vda-" in said.out
        assert f"vda now writes to {chain.base}" in said.out
        assert "the guest is" in said.out
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize(
    ("minimum", "status", "action"), [("1", 0, "pivot"), ("1000000T", 3, "keep")]
)
async def test_custom_policy(minimum: str, status: int, action: str, folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await example("custom_policy.py", qemu.qmp, "vda", minimum)
        assert (said.status, said.err) == (status, "")
        assert f"{action}: vda writes to" in said.out
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    if action == "keep":
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("decision", ["pivot", "keep"])
async def test_commit_all_disks(decision: str, folder: Path) -> None:
    first = make_chain(folder, 3)
    second = make_chain(folder, 2, names=("base2", "top2"))
    alone = make_chain(folder, 1, names=("alone", "alone"))
    async with machine(folder, first, second, alone) as qemu:
        words = ["--keep"] if decision == "keep" else []
        said = await example("commit_all_disks.py", qemu.qmp, *words)
        assert said.status == 0
        assert ("outcome_warning" in said.err) is (decision == "keep")  # of the layer between
        for name in ("vda", "vdb"):
            assert f"{name}: {decision}, writes to" in said.out
        assert "vdc: no overlay, left alone" in said.out
        await qemu.quit()
    for chain in (first, second):
        assert_disk(chain.base, chain.pictures[-1])
        if decision == "keep":
            assert_disk(chain.top, chain.pictures[-1])
    assert_disk(alone.base, alone.pictures[-1])


@pytest.mark.parametrize("running", [True, False])
async def test_quiesce(running: bool, folder: Path) -> None:
    chain = make_chain(folder)
    overlay, backup = folder / "overlay.qcow2", folder / "backup.qcow2"
    async with machine(folder, chain) as qemu:
        if running:
            await qemu.execute("cont")
        said = await example("quiesce.py", qemu.qmp, "vda", str(overlay), str(backup))
        assert (said.status, said.err) == (0, "")
        assert (" ms" if running else "it did not run") in said.out
        assert f"vda: writes to {chain.top} again" in said.out
        assert await runs(qemu) is running
        await qemu.quit()
    assert not overlay.exists()
    assert_disk(backup, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


async def test_one_disk_that_fails_does_not_stop_the_others(folder: Path) -> None:
    first = make_chain(folder)
    second = make_chain(folder, 2, names=("base2", "top2"))
    async with machine(folder, first, second) as qemu:
        await qemu.execute("block-commit", job_id="theirs", device="top")
        said = await example("commit_all_disks.py", qemu.qmp)
        assert said.status == 1
        assert "vda: JobConflict" in said.out
        assert "vdb: pivot" in said.out
        await qemu.quit()
    assert_disk(second.base, second.pictures[-1])
    assert_disk(first.top, first.pictures[-1])


@pytest.mark.parametrize(
    "name",
    [
        "embed.py",
        "custom_policy.py",
        "commit_all_disks.py",
        "group_commit.py",
        "quiesce.py",
        "golden_cycle.py",
        "flatten_chain.py",
        "backup_window.py",
    ],
)
async def test_without_arguments_it_says_how_to_run_it(name: str) -> None:
    said = await example(name)
    assert said.status == 1
    assert f"python examples/{name} QMP" in said.err


@pytest.mark.parametrize("decision", ["pivot", "keep"])
async def test_group_commit(decision: str, folder: Path) -> None:
    first = make_chain(folder)
    second = make_chain(folder, 2, names=("base2", "top2"))
    async with machine(folder, first, second) as qemu:
        words = ["--keep"] if decision == "keep" else []
        said = await example("group_commit.py", f"{qemu.qmp}:vda", f"{qemu.qmp}:vdb", *words)
        assert (said.status, said.err) == (0, "")
        for name in ("vda", "vdb"):
            assert f"{name}: {decision}, writes to" in said.out
        assert "all bases show 20" in said.out
        await qemu.quit()
    for chain in (first, second):
        assert_disk(chain.base, chain.pictures[-1])


async def test_no_such_vm_is_a_line(folder: Path) -> None:
    said = await example("commit_all_disks.py", str(folder / "nothing"))
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith("ConnectError: ")


async def test_backup_window(folder: Path) -> None:
    first = make_chain(folder)
    second = make_chain(folder, names=("base2", "mid", "low", "top2"))
    backup = folder / "backup"
    backup.mkdir()
    async with machine(folder, first, second) as qemu:
        said = await example("backup_window.py", qemu.qmp, str(backup), "vda", "vdb")
        assert (said.status, said.err) == (0, "")
        assert said.out.count("takes the guest's writes again") == 2
        await qemu.quit()
    for disk, chain in (("vda", first), ("vdb", second)):
        assert_disk(backup / f"{disk}.qcow2", chain.pictures[-1])
        assert_disk(chain.top, chain.pictures[-1])


async def test_golden_cycle(folder: Path) -> None:
    chain = make_chain(folder)
    passed = folder / "passed"
    test = ("sh", "-c", f"[ -e {passed} ] || {{ touch {passed}; exit 1; }}")
    async with machine(folder, chain, running=True) as qemu:
        said = await example("golden_cycle.py", qemu.qmp, "vda", "0", "2", *test)
        assert (said.status, said.err) == (0, "")
        assert said.out.splitlines()[0].startswith(f"discarded: {chain.top}")
        assert said.out.splitlines()[1].startswith(f"kept: {chain.base}")
        await qemu.quit()
    (overlay,) = set(folder.glob("*.qcow2")) - {chain.base}
    assert_disk(overlay, chain.pictures[0])


async def test_flatten_chain(folder: Path) -> None:
    long = make_chain(folder, 4)
    short = make_chain(folder, 2, names=("base2", "top2"))
    async with machine(folder, long, short) as qemu:
        said = await example("flatten_chain.py", qemu.qmp, "2")
        assert (said.status, said.err) == (0, "")
        assert said.out.count("merged into") == 2
        assert "vdb: has 2 layers, left alone" in said.out
        assert f"{long.base} <- {long.top}\n" in said.out
        said = await example("flatten_chain.py", qemu.qmp, "2", "vda")
        assert "vda: has 2 layers, left alone" in said.out
        await qemu.quit()
    assert [path for path in long.files if path.exists()] == [long.base, long.top]
    for chain in (long, short):
        assert_disk(chain.top, chain.pictures[-1])


async def test_the_command_is_one_file(folder: Path) -> None:
    """It needs no package of the host, and unpacks what is compiled but once."""
    made = folder / "qmpcommit.pyz"
    said = await example("make_zipapp.py", str(made))
    assert said.status == 0, said.err
    home = folder / "cache"

    async def run(*words: str, **more: str) -> Said:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(made), *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(home), **more},
        )
        return await end(process)

    assert (await run("--version")).out == f"qmpcommit {qc.__version__}\n"
    (kept,) = (home / "qmpcommit").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o700
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("chain", qemu.qmp)
        assert (said.status, said.err) == (0, "")
        assert str(chain.top) in said.out
        assert [*(home / "qmpcommit").iterdir()] == [kept]
        assert (await run("chain", qemu.qmp, XDG_CACHE_HOME="/proc/none")).status == 0
        said = await run("commit", qemu.qmp, "vda", "--policy", '{"kind": "pivot"}')  # compiled
        assert said.status == 0, said.err
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    with zipfile.ZipFile(made) as archive:
        main = archive.read("__main__.py").decode()
    other = folder / "other.pyz"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("__main__.py", main.replace("MADE_FOR = [[3, ", "MADE_FOR = [[2, "))
    made = other
    said = await run("--version")
    assert (said.status, "was made for Python 2." in said.err) == (1, True)
