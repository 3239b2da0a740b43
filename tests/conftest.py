"""What every test has: a short folder, and a look at what it left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from tests.ground import forked

# Whoever runs the tests may ignore them (nohup, a shell's background), and daemons and commands
# would inherit that.
for ignored, default in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, default)

# No test fails because the machine is busy.
BUSY = [HealthCheck.too_slow]
settings.register_profile("patient", deadline=None, suppress_health_check=BUSY)
settings.load_profile("patient")

# Fewer examples, and always the same, so that a mutant survives every run or none.
settings.register_profile(
    "mutants", max_examples=10, derandomize=True, database=None, deadline=None
)


def pytest_sessionstart() -> None:
    """What stays until the end is there before the first test."""
    forked.begin()


def pytest_collection_finish() -> None:
    """What is imported stays, and is not looked through after each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose paths are short enough for Unix sockets, in memory where there is some."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="qc-", dir=place, ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest_asyncio.fixture(autouse=True)
async def nothing_left_behind(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """No task, socket and process outlives a test, and asyncio has nothing to complain of."""
    before = _sockets(), _children()
    with _complaints() as complaints:
        yield
        await _end_of_test(before)
    assert not complaints, f"asyncio complains: {complaints}"


async def _end_of_test(before: tuple[set[str], set[int]]) -> None:
    async with asyncio.timeout(10):
        while left := asyncio.all_tasks() - {asyncio.current_task()}:
            done, _ = await asyncio.wait(left, timeout=2)
            assert done, f"tasks left behind: {left}"
    await asyncio.sleep(0)
    if sys.flags.dev_mode:
        gc.collect()  # what was forgotten speaks up now
    left_open = _sockets() - before[0]
    assert not left_open, f"sockets left open: {left_open}"
    running = {number: _command(number) for number in _children() - before[1]}
    assert not running, f"processes left behind: {running}"


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What asyncio only logs: a task destroyed while pending, an exception never retrieved."""
    heard: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("asyncio").addHandler(handler)
    try:
        yield heard
    finally:
        logging.getLogger("asyncio").removeHandler(handler)


def _sockets() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def _children() -> set[int]:
    """Processes of ours, those that have ended and are waited for by nobody included."""
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):
            found.update(map(int, Path(f"/proc/self/task/{thread}/children").read_text().split()))
    return found | forked.running()


def _command(number: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
    return "ended"


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody has at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
