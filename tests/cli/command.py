"""The command as users run it: a process of its own, and what it said."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ground.complaints import WATCHED, complaints

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "qmpcommit.cli.main"]
ENVIRONMENT = {**os.environ, **WATCHED, "PYTHONPATH": str(ROOT)}


@dataclass
class Said:
    """How a process ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be exactly one JSON object."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> Any:
        """The error that ``--json`` printed."""
        assert set(self.json) == {"error"}
        assert self.err == ""
        return self.json["error"]


def qmpcommit(*words: object, **more: str) -> Said:
    """Run the command to its end; `more` are environment variables."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, **more},
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert not complaints(done.stderr)
    return Said(done.returncode, done.stdout, done.stderr)


async def start(
    *words: object, cwd: Path | None = None, more: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    """Start the command, in the folder `cwd` if there is one, with `more` in its environment."""
    return await asyncio.create_subprocess_exec(
        *COMMAND,
        *map(str, words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**ENVIRONMENT, **(more or {})},
        cwd=cwd,
    )


async def end(process: asyncio.subprocess.Process) -> Said:
    """Wait for its end."""
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    assert not complaints(err.decode())
    return Said(process.returncode, out.decode(), err.decode())


async def run(*words: object, cwd: Path | None = None) -> Said:
    """Run the command beside the test's own tasks."""
    return await end(await start(*words, cwd=cwd))


async def run_out_of_time(*words: object) -> Said:
    """Run it with a deadline that comes when it has a job; a later one on a busy machine."""
    for seconds in (1, 4, 16):
        said = await run(*words, "--timeout", f"{seconds}s", "--json")
        assert (said.status, said.error["type"]) == (1, "DeadlineExceeded"), said
        if "job_id" in said.error:
            return said
    raise AssertionError(f"it had no job: {said.error}")


async def taken(process: asyncio.subprocess.Process, number: int) -> None:
    """Wait until the process has taken a signal that was sent to it."""
    async with asyncio.timeout(20):
        while _pending(process.pid) >> (number - 1) & 1:
            await asyncio.sleep(0.001)  # the kernel tells nobody


def _pending(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("ShdPnd:"):
            return int(line.split()[1], 16)
    return 0


def _its_terminal() -> None:
    """As a shell does for what it runs in the foreground."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


async def on_a_terminal(
    *words: object,
    columns: int = 120,
    answers: Sequence[tuple[str, str | Callable[[], Awaitable[str]]]] = (),
    **more: str,
) -> Said:
    """Run it with a terminal for both of its outputs; `more` are environment variables.

    Each of `answers` is a text that is awaited, after what was seen before, and what is typed then,
    or what is awaited to know that.
    """
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *map(str, words), stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=_its_terminal,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": str(columns), **more},
    )  # fmt: skip
    os.close(theirs)
    loop = asyncio.get_running_loop()
    seen, over = bytearray(), asyncio.Event()
    left, place = list(answers), 0
    thinking: set[asyncio.Task[None]] = set()

    async def think(answer: Callable[[], Awaitable[str]]) -> None:
        os.write(ours, (await answer()).encode())

    def read() -> None:
        nonlocal place
        try:
            seen.extend(os.read(ours, 65536))
            while left and (found := seen.find(left[0][0].encode(), place)) >= 0:
                place = found + len(left[0][0].encode())
                answer = left.pop(0)[1]
                if isinstance(answer, str):
                    os.write(ours, answer.encode())
                else:
                    thinking.add(loop.create_task(think(answer)))
        except OSError:  # how a terminal says that nobody writes any more
            loop.remove_reader(ours)
            over.set()

    loop.add_reader(ours, read)
    try:
        async with asyncio.timeout(60):
            await over.wait()
            status = await process.wait()
            await asyncio.gather(*thinking)
    finally:
        loop.remove_reader(ours)
        os.close(ours)
    assert not left, (left, seen.decode())
    return Said(status, seen.decode(), "")
