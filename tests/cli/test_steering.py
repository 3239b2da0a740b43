"""A job that runs is made slower or faster, is paused and goes on, whoever began it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import run
from tests.cli.test_commit import BULK, SLOW, assert_kept, job_of, no_jobs
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import Machine, machine

MIB = 1 << 20


async def shown(qemu: Machine) -> dict[str, Any]:
    """The one block job."""
    (job,) = await qemu.execute("query-block-jobs")
    assert isinstance(job, dict)
    return job


async def test_a_commit_is_steered_to_its_end(folder: Path) -> None:
    chain = make_chain(folder, 3, bulk=BULK)
    async with machine(folder, chain) as qemu:
        begun = await run("commit", qemu.qmp, "vda", "--hold", "--detach", "--json", *SLOW)
        job = begun.json["job_id"]
        said = await run("speed", qemu.qmp, job, "2MiB", "--json")
        assert (said.status, said.json["speed"], said.json["changed"]) == (0, 2 * MIB, True)
        assert (await shown(qemu))["speed"] == 2 * MIB
        again = await run("speed", qemu.qmp, job, "2097152")
        assert again.status == 0
        assert again.out.startswith(f"job {job} copies at most 2 MiB/s: commit, running, ")

        paused = await run("pause", qemu.qmp, job, "--json")
        assert (paused.status, paused.json["paused"], paused.json["changed"]) == (0, True, True)
        assert await job_of(qemu, "paused") == job
        twice = await run("pause", qemu.qmp, job)
        assert twice.status == 0
        assert twice.out.startswith(f"job {job} is paused already: commit, paused, ")
        assert f"'qmpcommit resume {qemu.qmp} {job}'" in twice.out
        before = (await shown(qemu))["offset"]
        fast = await run("speed", qemu.qmp, job, "max")
        assert fast.out.startswith(f"job {job} copies as fast as the storage does: commit, paused,")
        assert (await shown(qemu))["offset"] == before  # no limit, and nothing is copied

        resumed = await run("resume", qemu.qmp, job, "--json")
        assert (resumed.status, resumed.json["paused"], resumed.json["changed"]) == (0, False, True)
        assert await job_of(qemu, "ready") == job  # one resume ends both pauses
        further = await run("resume", qemu.qmp, job)
        assert further.status == 0
        assert further.out.startswith(f"job {job} was not paused, and goes on: commit, ready, ")
        assert (await run("keep", qemu.qmp, job)).status == 0
        await no_jobs(qemu)
        await qemu.quit()
    assert_kept(chain)


@pytest.mark.parametrize("words", [("speed", "1MiB"), ("pause",), ("resume",)])
async def test_a_job_that_is_not_there(words: tuple[str, ...], folder: Path) -> None:
    verb, *more = words
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        none = await run(verb, qemu.qmp, "nothing", *more)
        assert (none.status, none.out) == (4, "")
        assert "no block job 'nothing' (its block jobs: none)" in none.err
        begun = await run("commit", qemu.qmp, "vda", "--hold", "--detach", "--json")
        said = await run(verb, qemu.qmp, "nothing", *more, "--json")
        assert (said.status, said.error["type"]) == (4, "JobNotFound")
        assert f"(its block jobs: {begun.json['job_id']})" in said.error["message"]
        await qemu.quit()


async def test_somebody_elses_job_that_is_held_is_left_as_it_is(folder: Path) -> None:
    """A backup can be steered too; what is PENDING takes no order, and says so."""
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await qemu.execute(
            "drive-backup", job_id="theirs", device="top", sync="full", auto_finalize=False,
            target=str(folder / "copy"), format="raw", speed=1,
        )  # fmt: skip
        now = await vm.pause_job("theirs")
        assert (now.type, now.paused) == ("backup", True)
        now = await vm.resume_job("theirs")
        assert not now.paused
        await qemu.execute("block-job-cancel", device="theirs")
        await qemu.execute(
            "block-commit", job_id="held", device="top", base_node="base", auto_finalize=False
        )
        assert await job_of(qemu, "ready") == "held"
        await qemu.execute("block-job-complete", device="held")
        assert await job_of(qemu, "pending") == "held"
        for order in (vm.pause_job("held"), vm.resume_job("held"), vm.set_bandwidth("held", MIB)):
            with pytest.raises(qc.JobConflict, match="is 'pending', and") as refused:
                await order
            assert refused.value.facts["status"] == "pending"
        with pytest.raises(qc.InvalidRequest):
            await vm.set_bandwidth("held", "much")
        await qemu.execute("job-finalize", id="held")
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
