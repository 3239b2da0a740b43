"""The daemon, which notes the heaviest thing that its loop has done at one go.

QMPCOMMIT_WEIGH is the file. Each line is JSON: the CPU time in seconds, and what was called, of
whatever took longer than all before it since the last SIGUSR1. A collection of garbage is no part
of what it happens in; what it would have to look through is told with each beginning.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import time
from typing import Any

import qmpcommit.cli.main


class Scales:
    """Weighs each callback."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  (as long as the process)
        self._most, self._collected, self._since = 0.0, 0.0, 0.0
        self._run = asyncio.Handle._run
        signal.signal(signal.SIGUSR1, self.begin)
        gc.callbacks.append(self.collects)

    def begin(self, *_: Any) -> None:
        self._most = 0.0
        told = {"kept": gc.get_freeze_count(), "watched": len(gc.get_objects())}
        self._file.write(json.dumps(told) + "\n")

    def collects(self, phase: str, info: dict[str, int]) -> None:
        now = time.thread_time()
        if phase == "start":
            self._since = now
        else:
            self._collected += now - self._since

    def take_place(self) -> None:
        """Of what runs a callback."""
        weigh = self.weigh
        asyncio.Handle._run = lambda self: weigh(self)  # type: ignore[method-assign]  # noqa: PLW0108

    def weigh(self, handle: asyncio.Handle) -> None:
        before, collected = time.thread_time(), self._collected
        self._run(handle)
        took = time.thread_time() - before - (self._collected - collected)
        if took > self._most:
            self._most = took
            self._file.write(json.dumps({"seconds": took, "what": told(handle)}) + "\n")


def told(handle: asyncio.Handle) -> str:
    """What is called: of a task its name, and what it runs."""
    callback = getattr(handle, "_callback", None)
    task = getattr(callback, "__self__", None)
    if isinstance(task, asyncio.Task):
        return f"{task.get_name()}: {getattr(task.get_coro(), '__qualname__', '')}"
    return repr(callback)


if __name__ == "__main__":
    Scales(os.environ["QMPCOMMIT_WEIGH"]).take_place()
    qmpcommit.cli.main.main()
