"""Processes of Python that begin with everything imported: forks of one that has done so.

A sweep that kills a process at each of its steps starts thousands of them, and each would spend
most of its life on imports.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tests.cli.command import ENVIRONMENT, ROOT

MOST = 1 << 18
"""Bytes of one request: its words and its environment."""

LIBRARY = ("qmpcommit", "tests.ground.killing")
"""Modules that are imported, with all that they export."""

DAEMON = (*LIBRARY, "qmpcommit.cli.main", "qmpcommit.daemon.main")

STATUS = 8
"""Bytes of a process id, and of an exit status, as a forked process is told of."""


class Forked:
    """A process, as `asyncio.subprocess.Process` shows one, and what it has said on stderr."""

    def __init__(self, pid: int, told: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._told = told
        _Forks.running.add(pid)

    async def wait(self) -> int:
        """Its exit status when it has ended; less than 0: the signal that ended it."""
        if self.returncode is None:
            told = await asyncio.get_running_loop().sock_recv(self._told, STATUS)
            if self.returncode is None:
                assert told, "the process that forks has ended"
                self.returncode = int.from_bytes(told, "big", signed=True)
                self._told.close()
                _Forks.running.discard(self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """SIGKILL, SIGTERM, ..., unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


class Ended(NamedTuple):
    """A process that has ended."""

    status: int
    said: str


def start(
    module: str,
    *words: str,
    output: int,
    environment: Mapping[str, str] = ENVIRONMENT,
    imported: Sequence[str] = LIBRARY,
) -> Forked:
    """``python -m MODULE WORDS`` that has `imported` that already, and writes to `output`.

    A module that is imported itself has a ``main`` that is called.
    """
    forks = _Forks.one()
    asked = json.dumps([imported, module, words, dict(environment)]).encode()
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(forks.control, [asked], [theirs.fileno(), output])
    pid = ours.recv(STATUS)
    assert pid, "the process that forks has ended"
    ours.setblocking(False)
    return Forked(int.from_bytes(pid, "big"), ours)


async def run(module: str, *words: str, seconds: float = 120) -> Ended:
    """The same to its end."""
    output = os.memfd_create("said")
    try:
        process = start(module, *words, output=output)
        try:
            status = await asyncio.wait_for(process.wait(), seconds)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        said = os.pread(output, MOST, 0).decode(errors="replace")
        if status not in (0, -signal.SIGKILL):
            print(said)
        return Ended(status, said)
    finally:
        os.close(output)


def running() -> set[int]:
    """Those that have not been seen to end."""
    return set(_Forks.running)


def begin() -> None:
    """Have the process that forks; it stays until we end."""
    _Forks.one()


class _Forks:
    """The process that forks, and which forks have not ended."""

    found: _Forks | None = None
    running: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.ground.forked", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=ENVIRONMENT, cwd=ROOT,
            )  # fmt: skip

    @classmethod
    def one(cls) -> _Forks:
        if cls.found is None:
            cls.found = cls()
        return cls.found


# -- in the process that forks ---------------------------------------------------------------------


class _Asked(NamedTuple):
    imported: list[str]
    module: str
    words: list[str]
    environment: dict[str, str]


def _import(name: str) -> None:
    module = importlib.import_module(name)
    for exported in getattr(module, "__all__", ()):
        getattr(module, exported)


def _forked(control: socket.socket) -> _Asked | None:
    """Fork as asked: answers in each fork with what it is to do, and with None at the end."""
    told: dict[int, socket.socket] = {}
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakes)
    heard = [control.fileno(), woken]
    while True:
        ready, _, _ = select.select(heard, [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_of_ends(told)
            continue
        message, passed, _, _ = socket.recv_fds(control, MOST, 2)
        if not message:
            for pid in told:
                os.kill(pid, signal.SIGKILL)
            return None
        asked = _Asked(*json.loads(message))
        lifeline = socket.socket(fileno=passed[0])
        for name in asked.imported:
            _import(name)
        if pid := os.fork():
            os.close(passed[1])
            told[pid] = lifeline
            lifeline.send(pid.to_bytes(STATUS, "big"))
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (control, lifeline, *told.values()):
            each.close()
        os.close(woken)
        os.close(wakes)
        os.dup2(passed[1], 1)
        os.dup2(passed[1], 2)
        os.close(passed[1])
        return asked


def _tell_of_ends(told: dict[int, socket.socket]) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = os.waitstatus_to_exitcode(ended[1])
            with told.pop(ended[0]) as lifeline, suppress(OSError):
                lifeline.send(status.to_bytes(STATUS, "big", signed=True))


def _become(asked: _Asked) -> None:
    os.environ.clear()
    os.environ.update(asked.environment)
    sys.argv = [asked.module, *asked.words]
    module: Any = sys.modules.get(asked.module)
    if module is not None:
        module.main()
    else:
        runpy.run_module(asked.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    with socket.socket(fileno=int(sys.argv[1])) as asks:
        work = _forked(asks)
    if work is not None:
        _become(work)
