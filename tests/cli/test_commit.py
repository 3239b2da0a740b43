"""The command on a real QEMU; each test ends by reading the disks."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path

import pytest

from tests.cli.command import end, on_a_terminal, run, run_out_of_time, start, taken
from tests.ground.images import MIB, Chain, assert_disk, make_chain, read
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.proxy import Strike, proxy

BULK = 33 * MIB
SLOW = ("--bandwidth", "1MiB")  # with BULK, READY is half a minute away


async def job_of(qemu: Machine, *statuses: str) -> str:
    """The id of the one block job, once it has one of these statuses."""
    async with asyncio.timeout(20):
        while True:
            for job in await qemu.execute("query-block-jobs"):
                if job["status"] in statuses:
                    return str(job["device"])
            await asyncio.sleep(0.02)


async def no_jobs(qemu: Machine) -> None:
    """Nothing is left in QEMU."""
    assert await qemu.execute("query-jobs") == []


def assert_pivoted(chain: Chain) -> None:
    """The base shows the disk."""
    assert_disk(chain.base, chain.pictures[-1])


def assert_kept(chain: Chain) -> None:
    """Both show the disk."""
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


def assert_untouched(chain: Chain) -> None:
    """Nothing was written anywhere."""
    for path, picture in zip(chain.files, chain.pictures, strict=True):
        assert_disk(path, picture)


# -- decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "quiet", "json"])
async def test_pivot(form: str, folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        words = {"text": [], "quiet": ["--quiet"], "json": ["--json"]}[form]
        said = await run("commit", qemu.qmp, "vda", "--pivot", *words)
        assert (said.status, said.err) == (0, "")
        if form == "json":
            assert (said.json["status"], said.json["action"]) == ("completed", "pivot")
            assert said.json["active"]["filename"] == str(chain.base)
            assert said.json["invalidated"] == [str(chain.top)]
        elif form == "text":
            assert f"The guest now writes to {chain.base}" in said.out
            assert f"never boot it again: {chain.top}" in said.out
        else:
            assert said.out == ""
        await no_jobs(qemu)
        await qemu.quit()
    assert_pivoted(chain)


async def test_keep(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, chain.top, "--keep-overlay")
        assert said.status == 0
        assert f"goes on writing to {chain.top}" in said.out
        await no_jobs(qemu)
        await qemu.quit()
    assert_kept(chain)


async def test_abort(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--abort", "--json")
        assert said.status == 0
        assert (said.json["status"], said.json["action"]) == ("cancelled", "abort")
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize(
    ("command", "status", "action"), [("exit 0", 0, "pivot"), ("exit 7", 3, "keep")]
)
async def test_check(command: str, status: int, action: str, folder: Path) -> None:
    chain = make_chain(folder)
    note = folder / "note"
    async with machine(folder, chain) as qemu:
        check = f'echo "$QMPCOMMIT_DISK $QMPCOMMIT_BASE" >{note}; echo noise; {command}'
        said = await run("commit", qemu.qmp, "vda", "--check", check, "--json")
        assert said.status == status
        assert said.json["action"] == action
        assert note.read_text() == f"vda {chain.base}\n"
        assert said.err == "noise\n"
        await no_jobs(qemu)
        await qemu.quit()
    (assert_pivoted if action == "pivot" else assert_kept)(chain)


async def test_a_hold_that_runs_out_keeps(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--hold", "0.2", "--json")
        assert said.status == 3
        assert (said.json["action"], said.json["decided_by"]) == ("keep", "hold expired")
        await no_jobs(qemu)
        await qemu.quit()
    assert_kept(chain)


async def test_a_policy_as_json(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        policy = json.dumps({"kind": "check", "command": ["true"], "passed": {"kind": "keep"}})
        said = await run("commit", qemu.qmp, "vda", "--policy", policy, "--json")
        assert said.status == 0
        assert said.json["decided_by"] == "check passed"
        await qemu.quit()
    assert_kept(chain)


async def test_a_check_that_could_not_be_run_decides_nothing(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--check", "no-such-command", "--json")
        assert (said.status, said.json["error"]["type"]) == (1, "CommitFailed")
        assert "127" in said.json["error"]["message"]
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_rehearsal_of_a_layer_below_is_refused(folder: Path) -> None:
    chain = make_chain(folder, 3)
    images = {file: read(file) for file in chain.files}
    async with machine(folder, chain) as qemu:
        for policy in (["--abort"], ["--keep-overlay"], ["--hold", "1"], ["--check", "true"]):
            said = await run("commit", qemu.qmp, "vda", "--top", "1", "--delete", *policy, "--json")
            assert (said.status, said.error["type"]) == (2, "InvalidRequest")
        await no_jobs(qemu)
        await qemu.quit()
    said = await run("commit", "--offline", chain.top, "--top", "1", "--abort")
    assert said.status == 2
    assert {file: read(file) for file in chain.files} == images


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 1", 3), ("exit 127", 1)])
async def test_only_if(command: str, status: int, folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--pivot", "--only-if", command, "--json")
        assert said.status == status
        if status:
            assert said.error["type"] == "OnlyIfFailed"
            assert "Nothing was sent" in said.error["message"]
        await no_jobs(qemu)
        await qemu.quit()
    (assert_untouched if status else assert_pivoted)(chain)


async def test_layers_below_the_active_one_need_no_policy(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--top", "1", "--shallow", "--json")
        assert (said.status, said.json["action"]) == (0, "none")
        assert said.json["invalidated"] == [str(chain.files[2])]
        said = await run("commit", qemu.qmp, "vda", "--top", "0", "--shallow", "--json")
        assert (said.status, said.error["type"]) == (2, "PolicyRequired")
        await qemu.quit()
    assert_disk(chain.files[1], chain.pictures[2])
    assert_disk(chain.top, chain.pictures[3])


# -- what is not there, and what is in the way ----------------------------------------------------


async def test_not_found_and_not_possible(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, extra=["-device", "ide-cd,id=cd0"]) as qemu:
        said = await run("commit", qemu.qmp, "vdz", "--pivot", "--json")
        assert (said.status, said.error["type"]) == (4, "DiskNotFound")
        assert "vda" in said.error["candidates"]
        said = await run("pivot", qemu.qmp, "nosuchjob", "--json")
        assert (said.status, said.error["type"]) == (4, "JobNotFound")
        said = await run("commit", qemu.qmp, "vda", "--pivot", "--base", "nolayer", "--json")
        assert (said.status, said.error["type"]) == (1, "ChainError")
        said = await run("commit", qemu.qmp, "cd0", "--pivot", "--json")
        assert (said.status, said.error["type"]) == (1, "ChainError")
        await no_jobs(qemu)
        await qemu.quit()
        said = await run("commit", qemu.qmp, "vda", "--pivot", "--json")
        assert (said.status, said.error["type"]) == (4, "ConnectError")
    assert_untouched(chain)


async def test_the_chain_and_an_empty_drive(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain, extra=["-device", "ide-cd,id=cd0"]) as qemu:
        said = await run("chain", qemu.qmp)
        assert said.status == 0
        places = [said.out.index(str(path)) for path in reversed(chain.files)]
        assert places == sorted(places)
        assert "cd0" in said.out
        assert "  empty\n" in said.out
        assert "64 MiB" in said.out
        found = (await run("chain", qemu.qmp, "vda", "--json")).json
        assert found["vm"] == qemu.qmp
        (disk,) = found["disks"]
        names = [image["filename"] for image in disk["chain"]]
        assert names == [str(path) for path in reversed(chain.files)]
        assert (await run("jobs", qemu.qmp)).out == "no block jobs\n"
        assert (await run("jobs", qemu.qmp, "--json")).json["jobs"] == []
        await qemu.quit()
    assert_untouched(chain)


# -- the second phase from elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize("decision", ["pivot", "keep", "abort"])
async def test_a_ready_job_is_ended_from_elsewhere(decision: str, folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        holding = await start("commit", qemu.qmp, "vda", "--hold", "--json")
        job = await job_of(qemu, "ready")
        said = await run("jobs", qemu.qmp2)
        assert "vda   commit  READY  100" in said.out
        assert f"qmpcommit pivot|keep|abort {qemu.qmp2} {job}" in said.out
        (entry,) = (await run("jobs", qemu.qmp2, "--json")).json["jobs"]
        assert (entry["id"], entry["disk"], entry["ready"]) == (job, "vda", True)
        assert entry["ours"]
        assert f"job {job}" in (await run("chain", qemu.qmp2)).out
        ended = await run(decision, qemu.qmp2, job, "--json")
        assert (ended.status, ended.json["action"]) == (0, decision)
        held = await end(holding)
        assert (held.status, held.json["action"]) == (0, decision)  # a hold waits for just that
        assert held.json["decided_by"] == "another client"
        await no_jobs(qemu)
        await qemu.quit()
    if decision == "abort":
        assert_disk(chain.top, chain.pictures[-1])
    else:
        (assert_pivoted if decision == "pivot" else assert_kept)(chain)


async def test_another_clients_decision_is_not_what_was_asked(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        waiting = await start("commit", qemu.qmp, "vda", "--check", "sleep 30", "--json")
        job = await job_of(qemu, "ready")
        assert (await run("keep", qemu.qmp2, job)).status == 0
        said = await end(waiting)
        assert (said.status, said.json["action"]) == (3, "keep")
        await no_jobs(qemu)
        await qemu.quit()
    assert_kept(chain)


@pytest.mark.parametrize("decision", ["pivot", "keep"])
async def test_before_ready_is_5_and_the_job_goes_on(decision: str, folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu:
        arguments = {"job_id": "theirs", "device": "top", "speed": MIB}
        await qemu.execute("block-commit", **arguments)
        said = await run(decision, qemu.qmp, "theirs", "--json")
        assert (said.status, said.error["type"]) == (5, "NotReady")
        (entry,) = (await run("jobs", qemu.qmp, "--json")).json["jobs"]
        assert (entry["id"], entry["status"], entry["ours"]) == ("theirs", "running", False)
        await qemu.execute("block-job-set-speed", device="theirs", speed=0)
        await job_of(qemu, "ready")
        assert (await run("pivot", qemu.qmp, "theirs")).status == 0
        await no_jobs(qemu)
        await qemu.quit()
    assert_pivoted(chain)


async def test_a_job_that_has_ended_is_cleared_away(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        await qemu.execute("block-commit", job_id="j", device="top", auto_dismiss=False)
        await job_of(qemu, "ready")
        await qemu.execute("job-complete", id="j")
        await job_of(qemu, "concluded")
        said = await run("jobs", qemu.qmp)
        assert f"qmpcommit abort {qemu.qmp} j" in said.out
        said = await run("abort", qemu.qmp, "j", "--json")
        assert (said.status, said.json["action"]) == (3, "pivot"), said
        await no_jobs(qemu)
        await qemu.quit()
    assert_pivoted(chain)


# -- interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("phase", ["copying", "ready"])
async def test_one_interrupt_cancels_the_job(phase: str, number: int, folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu:
        slow = SLOW if phase == "copying" else ()
        process = await start("commit", qemu.qmp, "vda", "--hold", *slow, "--json")
        job = await job_of(qemu, "running" if phase == "copying" else "ready")
        process.send_signal(number)
        said = await end(process)
        assert said.status == 130
        assert said.error["type"] == "Interrupted"
        assert said.error["job_id"] == job
        assert said.error["outcome"]["action"] == "abort"
        assert f"goes on writing to {chain.top}" in said.error["message"]
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_second_interrupt_leaves_the_job(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        between.to_qemu = Strike("job-cancel", "hold")  # so that the first one can't be carried out
        process = await start("commit", between.path, "vda", "--hold", *SLOW)
        job = await job_of(qemu, "running")
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(20):
            await between.held.wait()
        assert process.returncode is None
        process.send_signal(signal.SIGINT)
        said = await end(process)
        assert said.status == 130
        assert said.out == ""
        assert said.err.startswith("qmpcommit: interrupted twice")
        assert "was told to abort" in said.err
        assert "left running" not in said.err
        assert f"qmpcommit pivot|keep|abort {between.path} {job}" in said.err
        assert await job_of(qemu, "running") == job
        assert (await run("abort", qemu.qmp2, job)).status == 0
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_an_interrupt_after_the_decision_waits_for_it(folder: Path) -> None:
    """The pivot is ordered, and not yet done."""
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        between.to_qemu = Strike("job-complete", "hold")
        process = await start("commit", between.path, "vda", "--pivot", "--json")
        async with asyncio.timeout(20):
            await between.held.wait()
        process.send_signal(signal.SIGINT)
        await taken(process, signal.SIGINT)
        assert process.returncode is None
        between.release()
        said = await end(process)
        assert said.status == 130
        assert said.error["outcome"]["action"] == "pivot"
        assert "decided already" in said.error["message"]
        await no_jobs(qemu)
        await qemu.quit()
    assert_pivoted(chain)


async def test_an_interrupt_during_only_if_sends_nothing(folder: Path) -> None:
    chain = make_chain(folder)
    asked = folder / "asked"
    async with machine(folder, chain) as qemu:
        only_if = f"touch {asked}; sleep 30"
        process = await start("commit", qemu.qmp, "vda", "--pivot", "--only-if", only_if, "--json")
        async with asyncio.timeout(20):
            while not asked.exists():
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = await end(process)
        assert said.status == 130
        assert "nothing was sent" in said.error["message"]
        await no_jobs(qemu)
        await qemu.quit()
    assert_untouched(chain)


# -- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--pivot", *SLOW), ("--hold",)], ids=["copying", "ready"])
async def test_the_timeout_cancels_the_job(words: tuple[str, ...], folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu:
        said = await run_out_of_time("commit", qemu.qmp, "vda", *words)
        assert "still the active image" in said.error["message"]
        assert re.search(r"within (1|4|16) s:", said.error["message"]), said.error
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_the_timeout_counts_what_only_if_takes(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        words = ("--pivot", "--only-if", "sleep 30", "--timeout", "1", "--json")
        said = await run("commit", qemu.qmp, "vda", *words)
        assert (said.status, said.error["type"]) == (1, "DeadlineExceeded")
        assert "nothing was sent" in said.error["message"]
        await no_jobs(qemu)
        await qemu.quit()
    assert_untouched(chain)


async def test_the_timeout_of_a_pivot_leaves_the_job(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        await qemu.execute("block-commit", job_id="j", device="top", auto_finalize=False)
        await job_of(qemu, "ready")
        between.to_qemu = Strike("job-complete", "drop")
        said = await run_out_of_time("pivot", between.path, "j")
        assert "Job j is left running" in said.error["message"]
        assert await job_of(qemu, "ready") == "j"
        await between.refuse()
        assert (await run("pivot", qemu.qmp, "j")).status == 0
        await no_jobs(qemu)
        await qemu.quit()
    assert_pivoted(chain)


# -- what a person sees ----------------------------------------------------------------------------


async def test_a_terminal_gets_a_bar_and_a_tree(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu:
        said = await on_a_terminal("chain", qemu.qmp)
        assert said.status == 0
        assert "└── " in said.out
        words = ("--pivot", "--bandwidth", "10MiB")
        said = await on_a_terminal("commit", qemu.qmp, "vda", *words)
        assert said.status == 0
        assert " to go" in said.out
        assert "MiB/s" in said.out
        assert "The guest now writes to" in said.out
        await no_jobs(qemu)
        await qemu.quit()
    assert_pivoted(chain)


async def test_verbose_logs_to_standard_error(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "export0", "--pivot", "--json", "-v")
        assert said.status == 0
        assert said.json["action"] == "pivot"
        assert "accepted" in said.err
        assert "block-commit" in said.err
        await qemu.quit()
    assert_pivoted(chain)
