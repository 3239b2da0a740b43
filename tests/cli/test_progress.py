"""``--progress``: a bar, lines or nothing, of all that commits."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.cli.command import end, on_a_terminal, run, start
from tests.cli.test_commit import BULK, SLOW
from tests.daemon.daemons import daemon
from tests.ground.images import MIB, assert_disk, make_chain, two_chains
from tests.ground.machines import Machine, machine


async def faster(qemu: Machine) -> None:
    """Have all jobs copy without a limit."""
    for job in await qemu.execute("query-block-jobs"):
        await qemu.execute("block-job-set-speed", device=job["device"], speed=0)


async def test_lines_where_no_terminal_is(folder: Path) -> None:
    first, second = two_chains(folder, bulk=BULK)
    async with machine(folder, first, second) as qemu:
        words = ("commit", qemu.qmp, "vda", "vdb", "--pivot", "--progress", "plain", *SLOW)
        group = await start(*words)
        assert group.stderr is not None
        async with asyncio.timeout(30):
            lines = [(await group.stderr.readline()).decode() for _ in range(2)]
        for line, disk in zip(sorted(lines), ("vda", "vdb"), strict=True):
            assert line.startswith(f"qmpcommit: {disk}: "), line
            assert "%, " in line
            assert line.endswith(" to go\n"), line
        await faster(qemu)
        said = await end(group)
        assert said.status == 0, said.err
        quiet = await run("flatten", qemu.qmp, "vda", "--keep", "1")
        assert quiet.err == ""
        await qemu.quit()
    assert_disk(first.base, first.pictures[-1])


async def test_lines_of_a_daemons_group(folder: Path) -> None:
    first, second = two_chains(folder, bulk=BULK)
    text = f'[[vm]]\nname = "web1"\nqmp = "{folder}/qmp"\n'
    async with machine(folder, first, second) as qemu, daemon(folder, text) as d:
        await d.connected("web1")
        words = ("commit", "web1", "vda", "vdb", "--pivot", "--progress", "plain", *SLOW)
        group = await start(f"--daemon={d.socket}", *words)
        assert group.stderr is not None
        async with asyncio.timeout(30):
            lines = sorted([(await group.stderr.readline()).decode() for _ in range(2)])
        for line, disk in zip(lines, ("vda", "vdb"), strict=True):
            assert line.startswith(f"qmpcommit: {disk}: "), line
        await faster(qemu)
        said = await end(group)
        assert said.status == 0, said.err
        await qemu.quit()
    assert_disk(second.base, second.pictures[-1])


async def test_a_bar_of_a_flatten_and_none_of_it(folder: Path) -> None:
    chain = make_chain(folder, 3, bulk=BULK)
    async with machine(folder, chain) as qemu:
        words = ("flatten", qemu.qmp, "vda", "--keep", "1", "--bandwidth", str(16 * MIB))
        said = await on_a_terminal(*words)
        assert said.status == 0
        assert "vda " in said.out
        assert "━" in said.out
        assert "%, " in said.out
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
