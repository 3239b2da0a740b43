"""A coroutine that is cancelled at its n-th step, and what it has left behind then."""

from __future__ import annotations

import asyncio
import os
import types
from collections.abc import Coroutine, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import qmpcommit as qc
from tests.ground.images import MIB, Chain, Write, create, write

STEPS = 2000
"""More than any of them has."""


@types.coroutine
def _cancelled_at(work: Coroutine[Any, Any, Any], step: int) -> Generator[Any, Any, Any]:
    """Runs it, and cancels its task while it waits for the `step`-th time."""
    thrown: BaseException | None = None
    done = 0
    while True:
        try:
            waits = work.send(None) if thrown is None else work.throw(thrown)
        except StopIteration as stop:
            return stop.value
        thrown = None
        done += 1
        if done == step:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        try:
            yield waits
        except BaseException as error:
            thrown = error


async def ends_before(work: Coroutine[Any, Any, Any], step: int) -> bool:
    """Whether it ended before it could be cancelled there."""

    async def run() -> None:
        await _cancelled_at(work, step)

    task = asyncio.create_task(run())
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
    return not task.cancelled()


def sockets() -> int:
    """How many this process has open."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return found


def listeners(vm: qc.Session) -> int:
    """How many subscriptions a session has."""
    return len(vm.subscribers._subscriptions)


async def settle() -> None:
    """What has been told to end has ended."""
    for _ in range(3):
        await asyncio.sleep(0)


def small(folder: Path) -> Chain:
    """A chain that is committed in no time."""
    files = [folder / "base.qcow2", folder / "top.qcow2"]
    create(files[0], 4 * MIB)
    create(files[1], 4 * MIB, backing=files[0])
    write(files[1], [Write(0, MIB, 0x11)])
    return Chain(files, [])
