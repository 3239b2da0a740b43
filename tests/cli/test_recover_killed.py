"""The command is killed at any step of what it does; then one ``recover --yes`` puts it right."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.qcow2 import bitmap_names
from qmpcommit.names import STALE_MARK
from tests.cli.command import ENVIRONMENT, run
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.places import STRIDE, first
from tests.ground.qemu import QEMU
from tests.real.test_recover_killed import KILLED, World

pytestmark = pytest.mark.timeout(3600)

KILLABLE = [sys.executable, "-m", "tests.cli.killable_command"]

COMMANDS: dict[str, tuple[str, ...]] = {
    "pivot": ("commit", "{a}", "vda", "--pivot"),
    "keep": ("commit", "{a}", "vda", "--keep-overlay"),
    "abort": ("commit", "{a}", "vda", "--abort"),
    "check": ("commit", "{a}", "vda", "--check", "true"),
    "hold": ("commit", "{a}", "vda", "--hold", "0"),
    "recycle": ("commit", "{a}", "vda", "--recycle", "{folder}/a/fresh.qcow2"),
    "group": ("commit", "{a}", "vda", "vdb", "--keep-overlay", "--freeze", "pause"),
    "group recycle": ("commit", "{a}", "vda", "vdb", "--recycle", "{folder}/a/{{disk}}.qcow2"),
    "window": ("window", "{a}", "vda", "vdb", "--freeze", "pause", "--", "true"),
    "keep round": ("cycle", "{a}", "vda", "--keep-if", "true", "--reset"),
    "flatten": ("flatten", "{a}", "vda", "--keep", "1"),
    "two VMs pivot": ("commit", "{a}:vda", "{b}:vda", "--pivot"),
    "two VMs window": ("window", "{a}", "vda", "--and", "{b}", "vda", "--freeze", "pause", "--",
                       "true"),
    "two VMs discard": ("cycle", "{a}:vda", "{b}:vda", "--keep-if", "false", "--reset"),
}  # fmt: skip
"""What is typed, for the VMs a and b; what is left at READY is aborted."""

ENDS = (0, 3, KILLED)
"""Status 3 is that of a round which was not kept."""


class Typed(World):
    """Put right by the command, too."""

    async def put_right(self, vms: Sequence[qc.Session], decide: Any) -> None:
        said = await run("recover", *(q.qmp2 for q in self.qemus), "--yes", "--decide", decide)
        print(said.out, said.err)
        assert said.status == 0


async def killed(folder: Path, words: Sequence[str], place: int) -> tuple[int, str]:
    """Run the command until it dies at that place: its status, and the last place it passed."""
    passed = folder / "places"
    passed.unlink(missing_ok=True)
    typed = [*KILLABLE, str(place), str(passed), *words]
    process = await asyncio.create_subprocess_exec(
        *typed, env=ENVIRONMENT, stdin=asyncio.subprocess.DEVNULL
    )
    status = await asyncio.wait_for(process.wait(), 120)
    return status, passed.read_text().splitlines()[-1] if passed.exists() else ""


@pytest.mark.parametrize("work", COMMANDS)
async def test_killed_anywhere_the_command_is_recovered(folder: Path, work: str) -> None:
    count = 0
    for place in itertools.count(first(), STRIDE):
        world = Typed(folder / f"at-{place}", work, running=True)
        async with world.begin():
            named = dict(zip("ab", (qemu.qmp for qemu in world.qemus), strict=False))
            words = [word.format(folder=world.folder, **named) for word in COMMANDS[work]]
            status, last = await killed(world.folder, words, place)
            print(f"{work}: killed at {place}: {last}, {status}")
            assert status in ENDS
            await world.recovered("abort")
        shutil.rmtree(world.folder)
        if status != KILLED:
            break
        count += 1
    print(f"{work} x every {STRIDE}. step: {count} run, {count} held")


async def private_daemon_ended(chain: Chain) -> None:
    """It holds the files' locks until then."""
    async with asyncio.timeout(20):
        while subprocess.run(
            [QEMU.img, "info", chain.top], capture_output=True, check=False
        ).returncode:
            await asyncio.sleep(0.01)


async def test_killed_anywhere_offline_it_is_typed_again(folder: Path) -> None:
    """Its private daemon ends with it, and there is no monitor to recover.

    Where it was killed when all was done, it is told so, and does nothing.
    """
    count = 0
    for place in itertools.count(first(), STRIDE):
        at = folder / f"at-{place}"
        at.mkdir()
        chain = make_chain(at, 3)
        words = ["commit", "--offline", str(chain.top), "--pivot"]
        status, last = await killed(at, words, place)
        print(f"offline: killed at {place}: {last}, {status}")
        assert status in ENDS
        await private_daemon_ended(chain)
        assert_disk(chain.base if status == 0 else chain.top, chain.pictures[-1])
        if status == 0:
            break
        done = STALE_MARK in bitmap_names(str(chain.top))
        again = await run(*words)
        assert again.status == (1 if done else 0), again.err
        assert ("an earlier commit has merged it" in again.err) is done
        assert_disk(chain.base, chain.pictures[-1])
        count += 1
    print(f"offline x every {STRIDE}. step: {count} run, {count} held")
