"""Tables have headings, are one rendering wherever they go, and cut nothing off."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command import on_a_terminal, qmpcommit, run
from tests.cli.test_commit import BULK, SLOW, job_of
from tests.ground.images import make_chain
from tests.ground.machines import machine


async def test_jobs_and_chain_are_tables(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu:
        begun = await run("commit", qemu.qmp, "vda", "--detach", "--json", *SLOW)
        job = begun.json["job_id"]
        said = await run("jobs", qemu.qmp)
        heads, row = said.out.splitlines()
        assert heads.split() == [
            "DISK",
            "TYPE",
            "PHASE",
            "%",
            "LEFT",
            "RATE",
            "ETA",
            "READY",
            "FOR",
            "JOB",
        ]
        assert row.split()[:3] == ["vda", "commit", "copying"]
        assert row.endswith(f"  {job}")
        assert row.split()[5:7] != ["-", "-"]
        await run("speed", qemu.qmp, job, "max")
        assert await job_of(qemu, "ready") == job
        piped = await run("jobs", qemu.qmp, "--format", "phase,percent,disk,job")
        assert [line.split() for line in piped.out.splitlines()] == [
            ["PHASE", "%", "DISK", "JOB"],
            ["READY", "100", "vda", job],
        ]
        watched = await on_a_terminal("jobs", qemu.qmp, "--watch", "--timeout", "3", columns=60)
        assert watched.status == 0
        first, *more = watched.out.replace("\r", "").split("\x1b[H\x1b[J")
        assert more
        for table in (first, *more):
            assert f"    {job}" in table.splitlines()
            assert " ".join(
                f"READY: decide with 'qmpcommit pivot|keep|abort {qemu.qmp}".split()
            ) in (" ".join(table.split()))
        layers = await run("chain", qemu.qmp, "--format", "disk,layer,file")
        assert [line.split() for line in layers.out.splitlines()] == [
            ["DISK", "LAYER", "FILE"],
            ["vda", "0", str(chain.top)],
            ["vda", "1", str(chain.base)],
        ]
        await qemu.quit()


def test_a_column_that_is_not_there() -> None:
    said = qmpcommit("jobs", "/x", "--format", "disk,percen")
    assert said.status == 2
    assert "there is no column 'percen'; there are disk, type, " in said.err
    assert "Did you mean percent?" in said.err
    assert qmpcommit("chain", "/x", "--format", "file", "--dot").status == 2
    assert qmpcommit("vms", "--watch", "--json").status == 2
