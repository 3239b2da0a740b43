"""Whatever ends a command from outside: no job, window or guest that is paused is left by it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.cli.command import COMMAND, ENVIRONMENT, end, start, taken
from tests.cli.test_commit import BULK, SLOW, job_of, no_jobs
from tests.ground.images import assert_disk, make_chain, two_chains
from tests.ground.machines import Machine, machine
from tests.ground.proxy import Strike, proxy
from tests.ground.sessions import runs


async def until_it_ends(process: asyncio.subprocess.Process) -> int:
    """Its exit status."""
    async with asyncio.timeout(40):
        return await process.wait()


async def active_file(qemu: Machine) -> str:
    """What the first disk writes to."""
    (device,) = await qemu.execute("query-block")
    return str(device["inserted"]["file"])


async def window_is_open(qemu: Machine, process: asyncio.subprocess.Process, top: Path) -> None:
    """Wait until the guest writes elsewhere, and the command's own program runs."""
    async with asyncio.timeout(20):
        while await active_file(qemu) == str(top) or not children(process.pid):
            await asyncio.sleep(0.02)


def children(pid: int) -> list[int]:
    """A process's own, but for the one that ends them with it."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            if b"qmpcommit-watchdog" not in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


# -- a hang-up -------------------------------------------------------------------------------------


async def test_a_hang_up_closes_the_window(folder: Path) -> None:
    """Its program is told so too: this one ignores Ctrl-C."""
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        program = ("sh", "-c", "trap '' INT; trap 'kill $!; exit 7' HUP; sleep 60 & wait")
        process = await start("window", qemu.qmp, "vda", "--", *program)
        await window_is_open(qemu, process, chain.top)
        async with asyncio.timeout(20):
            while not (shell := children(process.pid)) or not children(shell[0]):
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        said = await end(process)
        assert said.status == 7, said.err
        assert await active_file(qemu) == str(chain.top)
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_who_ignored_hang_ups_goes_on_ignoring_them(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        process = await asyncio.create_subprocess_exec(
            "nohup", *COMMAND, "commit", qemu.qmp, "vda", "--hold", "--json",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=ENVIRONMENT,
        )  # fmt: skip
        job = await job_of(qemu, "ready")
        process.send_signal(signal.SIGHUP)
        decided = await start("pivot", qemu.qmp2, job)
        assert (await end(decided)).status == 0
        assert (await end(process)).json["action"] == "pivot"
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_further_signals_of_an_end_do_not_leave_the_job(folder: Path) -> None:
    """Whoever stops a service sends several, and a terminal that closes too."""
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        between.to_qemu = Strike("job-cancel", "hold", times=1)
        process = await start("commit", between.path, "vda", "--pivot", *SLOW, "--json")
        await job_of(qemu, "running")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            await between.held.wait()
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            process.send_signal(number)
            await taken(process, number)
        between.release()
        said = await end(process)
        assert (said.status, said.error["outcome"]["action"]) == (130, "abort")
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_sigquit_says_where_all_tasks_are_and_cancels_the_job(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        process = await start("commit", qemu.qmp, "vda", "--hold")
        job = await job_of(qemu, "ready")
        process.send_signal(signal.SIGQUIT)
        said = await end(process)
        assert said.status == 130
        assert "Current thread" in said.err
        assert f"Task commit {job}:" in said.err
        assert "in Driver._next_fact" in said.err
        assert "interrupted, and the job was cancelled" in said.err
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


# -- a terminal that goes --------------------------------------------------------------------------


@asynccontextmanager
async def in_a_terminal(*words: object) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """The command as the first process of a terminal's session, as over ssh; and our end of it."""
    ours, theirs = pty.openpty()

    def take_it() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = await asyncio.create_subprocess_exec(
        *COMMAND, *map(str, words), stdin=theirs, stdout=theirs, stderr=theirs,
        env={**ENVIRONMENT, "TERM": "xterm"}, preexec_fn=take_it,
    )  # fmt: skip
    os.close(theirs)
    loop = asyncio.get_running_loop()

    def read() -> None:
        with suppress(OSError):
            os.read(ours, 65536)

    loop.add_reader(ours, read)
    try:
        yield process, ours
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def close(terminal: int) -> None:
    """As when its window is closed, or the line is lost."""
    asyncio.get_running_loop().remove_reader(terminal)
    os.close(terminal)


@pytest.mark.parametrize("words", [("--pivot", *SLOW), ("--hold", "-vv")], ids=["copying", "ready"])
async def test_no_job_is_left_by_a_terminal_that_goes(words: tuple[str], folder: Path) -> None:
    """Also where it writes to it: each line of the log then fails."""
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu:
        async with in_a_terminal("commit", qemu.qmp, "vda", *words) as (process, terminal):
            await job_of(qemu, "ready" if "--hold" in words else "running")
            close(terminal)
            assert await until_it_ends(process) == 130
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_nohup_goes_on_without_its_terminal(folder: Path) -> None:
    """What it says is lost with it, and nothing else."""
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu:
        line = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *COMMAND]
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *line, "commit", qemu.qmp, "vda", "--hold", "-vv",
            stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        job = await job_of(qemu, "ready")
        os.close(ours)
        assert (await end(await start("pivot", qemu.qmp2, job))).status == 0
        assert await until_it_ends(process) == 1  # its outcome could not be said
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_no_window_is_left_by_a_terminal_that_goes(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        words = ("window", qemu.qmp, "vda", "-vv", "--", "sleep", "60")
        async with in_a_terminal(*words) as (process, terminal):
            await window_is_open(qemu, process, chain.top)
            close(terminal)
            await until_it_ends(process)
        assert await active_file(qemu) == str(chain.top)
        await no_jobs(qemu)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_no_guest_is_left_paused_by_a_terminal_that_goes(folder: Path) -> None:
    """All disks of the group are held and its guest is paused, for one disk is not PENDING yet."""
    chains = two_chains(folder)
    async with (
        machine(folder, *chains, running=True) as qemu,
        proxy(folder, qemu.qmp) as between,
    ):
        between.to_qemu = Strike("job-complete", "hold", times=1)
        words = ("commit", between.path, "vda", "vdb", "--pivot", "--freeze", "pause", "-vv")
        async with in_a_terminal(*words, "--hold-limit", "30") as (process, terminal):
            async with asyncio.timeout(20):
                await between.held.wait()
            assert not await runs(qemu)
            close(terminal)
            await taken(process, signal.SIGHUP)
            between.release()
            await until_it_ends(process)
        assert await runs(qemu)
        await no_jobs(qemu)
        devices = await qemu.execute("query-block")
        assert [each["inserted"]["file"] for each in devices] == [str(c.top) for c in chains]
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_an_interrupt_while_all_is_imported_has_its_status(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qmpcommit", "jobs", "nowhere",
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    _, said = await process.communicate()
    assert (process.returncode, said) == (130, b"")
