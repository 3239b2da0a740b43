"""Who comes second is told of the first, who is another program; and who is dead is passed over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import qmpcommit as qc
from qmpcommit.commit.claim import take
from qmpcommit.window.claims import tag_of
from tests.cli.command import run, start
from tests.ground.images import assert_disk, create, make_chain
from tests.ground.machines import machine


async def test_no_command_works_on_a_disk_in_anothers_window(folder: Path) -> None:
    chain = make_chain(folder, 3)
    cycle = ("--keep-if", "true", "--reset")
    async with machine(folder, chain) as qemu:
        lines: list[tuple[Any, ...]] = [
            ("commit", qemu.qmp2, "vda", "--shallow", "--pivot"),
            ("commit", qemu.qmp2, "vda", "--top", "1"),
            ("commit", qemu.qmp2, "vda", "--keep-overlay", "--dry-run"),
            ("flatten", qemu.qmp2, "vda", "--keep", "1"),
            ("cycle", qemu.qmp2, "vda", *cycle),
            ("window", qemu.qmp2, "vda", "--", "true"),
            ("window", "--close", qemu.qmp2),
        ]
        async with qc.Session.connect(qemu.qmp) as vm, vm.snapshot(["vda"]):
            before = await qemu.execute("query-block")
            for line in lines:
                said = await run(line[0], "--json", *line[1:])
                assert said.status == 1, line
                error = said.json["error"]
                assert error["type"] == "JobConflict", line
                assert "held by a snapshot window of" in error["message"], line
                assert error["owner"]["pid"] == os.getpid()
                assert error["owner"]["alive"]
            assert await qemu.execute("query-block") == before
            for command in ("chain", "jobs"):
                said = await run(command, qemu.qmp2, "--json")
                (held,) = said.json["held"]
                assert (held["disk"], held["work"], held["alive"]) == (
                    "vda", "a snapshot window", True,
                )  # fmt: skip
                assert f"(process {os.getpid()})" in said.err
        said = await run("chain", qemu.qmp2, "--json")
        assert (said.json["held"], said.err) == ([], "")
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_what_another_window_has_made_so_far_is_not_called_cleared(folder: Path) -> None:
    """Who opens it holds the disk, and has laid no overlay yet."""
    chain = make_chain(folder)
    window = "20261129T120000Z-0123abcd"
    overlay = create(folder / f"top.qmpcommit-window-{window}.qcow2", 1 << 20)
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            opening = await take(vm, await vm.disk("vda"), "window", tag=tag_of(window))
            said = await run("window", "--close", "--json", qemu.qmp2)
            assert (said.status, said.json["closed"], said.json["cleared"]) == (0, [], [])
            said = await run("window", "--close", qemu.qmp2)
            assert f"left to whoever opened that window, who is alive: {overlay}" in said.out
            assert overlay.exists()
            await opening.release()
        said = await run("window", "--close", "--json", qemu.qmp2)
        assert said.json["cleared"] == [str(overlay)]
        assert not overlay.exists()
        await qemu.quit()


async def test_what_a_killed_owner_held_is_anybodys(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        hold = await start("commit", qemu.qmp, "vda", "--hold")
        async with qc.Session.connect(qemu.qmp2) as vm:
            with vm.events("BLOCK_JOB_READY") as ready:
                if not any(job.status == "ready" for job in await vm.query_jobs()):
                    await anext(ready)
            (job,) = await vm.query_jobs()
        hold.kill()
        await hold.wait()
        said = await run("chain", qemu.qmp2, "--json")
        assert "which has ended: whoever comes next takes it over" in said.err
        assert (await run("keep", qemu.qmp2, job.id)).status == 0
        assert (await run("chain", qemu.qmp2, "--json")).json["held"] == []
        assert (await run("commit", qemu.qmp2, "vda", "--pivot")).status == 0
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_an_override_that_there_is_not_is_wrong_usage(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        for line in (
            ("flatten", qemu.qmp, "vda", "--keep", "2"),
            ("cycle", qemu.qmp, "vda", "--keep-if", "true", "--reset"),
            ("window", "--close", qemu.qmp),
        ):
            said = await run(*line, "--override", "nothing")
            assert (said.status, "there is no check 'nothing'" in said.err) == (2, True), said.err
            assert (await run(*line, "--override", "claim")).status in (0, 3)
        await qemu.quit()
