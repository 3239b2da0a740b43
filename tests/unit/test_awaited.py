"""Something to wait for: dropped, awaited twice, run and cancelled by a task."""

from __future__ import annotations

import asyncio

import pytest

from qmpcommit.tasks import Awaited


async def test_it_may_be_dropped_awaited_twice_and_run_by_a_task() -> None:
    begun: list[int] = []

    async def work() -> int:
        begun.append(1)
        await asyncio.sleep(0)
        return len(begun)

    Awaited(work).close()  # nobody waits for it, and nobody complains
    waiting = Awaited(work)
    assert (await waiting, await waiting) == (1, 2)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(Awaited(work))
        second = group.create_task(Awaited(work))
    assert {first.result(), second.result()} == {4}
    assert "Awaited" in repr(first)
    async with asyncio.TaskGroup() as group:  # the same by two tasks at a time
        tasks = [group.create_task(waiting), group.create_task(waiting)]
    assert [task.result() for task in tasks] == [6, 6]
    assert await asyncio.create_task(waiting) == await waiting - 1 == 7


async def test_a_task_that_is_cancelled_cancels_it() -> None:
    heard = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            heard.set()
            raise

    task = asyncio.create_task(Awaited(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heard.is_set()
    never = asyncio.create_task(Awaited(work))
    never.cancel()  # before its first step
    with pytest.raises(asyncio.CancelledError):
        await never
