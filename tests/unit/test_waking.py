"""A signal that comes when the command is about to wait for an event wakes it."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from typing import Any

import pytest

from qmpcommit import log
from qmpcommit.cli import signals
from qmpcommit.cli.options import Answer, Options
from qmpcommit.cli.running import Run, run


def test_a_signal_between_the_last_look_for_one_and_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes in the call that waits, as Python does not take it there."""
    monkeypatch.setattr(log, "threshold", log.threshold)  # which a command raises, and others read
    taken: list[int] = []

    async def work(running: Run) -> Answer:
        loop: Any = asyncio.get_running_loop()
        heard = asyncio.Event()
        running.on_signal = lambda times: heard.set()
        waits = loop._selector.select

        def waiting(timeout: float | None = None) -> Any:
            loop._selector.select = waits
            # What C code does between the look and the system call: only the flag is set.
            fd = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(fd)
            taken.append(fd)
            if fd != -1:
                os.write(fd, b"\0")
                assert select.select([loop._selector.fileno()], [], [], 20)[0]
            loop.call_soon_threadsafe(running.interrupt, signal.SIGTERM)
            return waits(timeout)

        loop._selector.select = waiting
        await heard.wait()
        return Answer({}, "")

    run(Options.of(as_json=False, quiet=True, verbose=0, timeout=None), work)
    assert taken[0] != -1
    assert signal.set_wakeup_fd(-1) == -1
    signals.deliver(signals._interrupt)
