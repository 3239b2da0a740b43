"""A commit that one command begins, and another one ends."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

import qmpcommit as qc
from tests.cli.command import end, run, start
from tests.cli.test_commit import (
    BULK,
    SLOW,
    assert_kept,
    assert_pivoted,
    assert_untouched,
    job_of,
    no_jobs,
)
from tests.ground.images import make_chain
from tests.ground.machines import machine
from tests.ground.proxy import Proxy, proxy


@pytest.mark.parametrize("then", ["pivot", "keep"])
async def test_a_commit_is_left_and_waited_for(then: str, folder: Path) -> None:
    """Others are kept from its disk meanwhile, and it takes no decision by itself."""
    chain = make_chain(folder, 3, bulk=BULK)
    policy = {"pivot": "--pivot", "keep": "--hold"}[then]
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", policy, "--detach", "--json", *SLOW)
        assert said.status == 0, said.err
        job = said.json["job_id"]
        assert (said.json["disk"], said.json["base"]["filename"]) == ("vda", str(chain.base))
        assert f"wait {qemu.qmp} {job} --then pivot" in said.json["next"]
        told = await run("doctor", qemu.qmp)
        assert told.status == 0, told.out
        assert f"job {job} on vda copies; it was detached, and waits to be taken up" in told.out
        assert f"qmpcommit wait {qemu.qmp} {job}" in told.out
        told = await run("jobs", qemu.qmp)
        assert "left it in QEMU on purpose: it waits to be taken up" in told.err
        for verb, *words in (
            ("commit", "--pivot"), ("window", "--", "true"), ("flatten", "--keep", "2"),
        ):  # fmt: skip
            other = await run(verb, qemu.qmp, "vda", *words)
            assert (other.status, job in other.err) == (1, True), other.err
        early = await run("pivot", qemu.qmp, job)
        assert (early.status, "not READY" in early.err) == (5, True)
        late = await run("wait", qemu.qmp, job, "--timeout", "0.3")
        assert (late.status, "within 0.3 s" in late.err) == (1, True), late.err
        await qemu.execute("block-job-set-speed", device=job, speed=0)
        ready = await run("wait", qemu.qmp, job, "--until", "ready")
        assert ready.status == 0
        assert f"pivot|keep|abort {qemu.qmp} {job}" in ready.out
        assert await job_of(qemu, "ready") == job
        ended = await run("wait", qemu.qmp, job, "--then", then, "--json")
        assert (ended.status, ended.json["action"]) == (0, then)
        await no_jobs(qemu)
        again = await run("commit", qemu.qmp, "vda", "--keep-overlay")
        assert again.status == (1 if then == "pivot" else 0), again.err  # the base alone is left
        await qemu.quit()
    (assert_pivoted if then == "pivot" else assert_kept)(chain)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--check", "true"), "--check can't be carried out"),
        (("--hold", "5"), "a --hold with a time can't be carried out"),
        (("--abort",), "--abort can't be carried out"),
        (("--delete",), "nobody is there to delete"),
        (("--pivot", "--rename"), "nobody is there to rename"),
        (("--on-pivot", "true"), "nobody is there to on_pivot"),
        (("--converge", "5"), "hold the guest back"),
        (("--on-error", "stop"), "--on-error stop"),
        (("--top", "1"), "is not the active layer"),
        (("vdb",), "--detach is for one disk"),
    ],
)
async def test_what_nobody_would_be_there_to_do_is_refused(
    words: tuple[str, ...], why: str, folder: Path
) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", *words, "--detach")
        assert (said.status, said.out) == (2, ""), said.err
        assert why in said.err
        await no_jobs(qemu)
        await qemu.quit()
    assert_untouched(chain)


async def test_a_job_whose_command_was_killed_is_ended_as_by_itself(folder: Path) -> None:
    chain = make_chain(folder, 3, bulk=BULK)
    hook = folder / "hook"
    async with machine(folder, chain) as qemu:
        owner = await start("commit", qemu.qmp, "vda", "--pivot", *SLOW)
        job = await job_of(qemu, "running")
        owner.send_signal(signal.SIGKILL)
        await end(owner)
        await qemu.execute("block-job-set-speed", device=job, speed=0)
        said = await run("pivot", qemu.qmp, job, "--wait", "--stale=delete", "--json", "--on-pivot",
                         f"echo $QMPCOMMIT_ACTIVE >{hook}")  # fmt: skip
        assert said.status == 0, said.err
        assert said.json["hook"] == "done"
        assert said.json["deleted"] == [str(each) for each in chain.files[:0:-1]]
        assert hook.read_text().split() == [str(chain.base)]
        await no_jobs(qemu)
        await qemu.quit()
    assert not chain.top.exists()
    assert_pivoted(chain)


@pytest.mark.parametrize("order", ["pivot", "keep"])
async def test_a_job_that_concluded_without_its_command_is_told_of(
    order: str, folder: Path
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--detach", "--json")
        job = said.json["job_id"]
        await job_of(qemu, "ready")
        if order == "pivot":
            await qemu.execute("job-complete", id=job)
        else:
            await qemu.execute("block-job-cancel", device=job, force=False)
        await job_of(qemu, "concluded")
        said = await run("pivot", qemu.qmp, job, "--json")
        assert said.status == (0 if order == "pivot" else 3), said.err
        assert (said.json["disk"], said.json["action"]) == ("vda", order)
        assert said.json["top"]["filename"] == str(chain.top)
        assert said.json["invalidated"] == ([str(chain.top)] if order == "pivot" else [])
        await no_jobs(qemu)
        await qemu.quit()
    (assert_pivoted if order == "pivot" else assert_kept)(chain)


async def asks_for_its_job(between: Proxy) -> None:
    """Wait until a command has adopted a job."""
    async with asyncio.timeout(20):
        while "query-jobs" not in " ".join(between.sent).partition("query-block-jobs")[2].split():
            await asyncio.sleep(0.01)


async def test_waiting_ends_as_the_job_does(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        gone = await run("wait", qemu.qmp, "nothing")
        assert gone.status == 4
        wrong = await run("wait", qemu.qmp, "nothing", "--delete")
        assert (wrong.status, "need --then pivot" in wrong.err) == (2, True)
        wrong = await run("wait", qemu.qmp, "nothing", "--then", "keep", "--delete")
        assert (wrong.status, "nothing is stale after a keep" in wrong.err) == (2, True)
        said = await run("commit", qemu.qmp, "vda", "--detach", "--json")
        await job_of(qemu, "ready")
        waiting = await start("wait", between.path, said.json["job_id"])
        await asks_for_its_job(between)
        aborted = await run("abort", qemu.qmp2, said.json["job_id"])
        assert aborted.status == 0
        ended = await end(waiting)
        assert ended.status == 3, ended.err
        assert "aborted" in ended.out
        await no_jobs(qemu)
        await qemu.quit()
    assert_kept(chain)


async def test_ctrl_c_while_waiting_leaves_the_job(folder: Path) -> None:
    """The proxy tells when the command has asked for the job."""
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        said = await run("commit", qemu.qmp, "vda", "--detach", "--json")
        job = await job_of(qemu, "ready")
        waiting = await start("wait", between.path, said.json["job_id"])
        await asks_for_its_job(between)
        waiting.send_signal(signal.SIGINT)
        ended = await end(waiting)
        assert (ended.status, "nothing was sent" in ended.err) == (130, True)
        assert await job_of(qemu, "ready") == job
        said = await run("abort", qemu.qmp, job)
        assert said.status == 0
        await qemu.quit()
    assert_kept(chain)


async def test_who_names_the_disk_is_told_its_job(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.JobNotFound, match=r"no block job 'vda' .*its job: none$"):
            await vm.adopt("vda")
        job = await vm.commit("vda", policy=qc.Hold())
        with pytest.raises(qc.JobNotFound, match=rf"vda is a disk; its job: {job.id}$"):
            await vm.adopt("vda")
        job.abort()
        await job.wait()
        await qemu.quit()
