"""A request that nobody waits for any more: what the daemon has promised meanwhile is undone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from qmpcommit.errors import DaemonLost, QmpCommitError
from qmpcommit.tasks import stop, to_the_end

TAKING_BACK = 5.0
"""Seconds that a request that was cancelled is waited for, to take its promise back."""

T = TypeVar("T")


async def wanted(
    asking: Coroutine[Any, Any, T],
    undo: Callable[[T], Awaitable[object]],
    unanswered: Callable[[], DaemonLost],
) -> T:
    """What `asking` gives; where this is cancelled, `undo` is awaited with what it gave.

    Where that is not known the cancellation's cause says so: it is `unanswered` if the daemon
    did not answer in time.
    """
    task = asyncio.create_task(asking)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        doubt = await to_the_end(_take_back(task, undo, unanswered))
        if doubt is not None:
            raise asyncio.CancelledError from doubt
        raise


async def _take_back(
    asking: asyncio.Task[T],
    undo: Callable[[T], Awaitable[object]],
    unanswered: Callable[[], DaemonLost],
) -> DaemonLost | None:
    """Why it may have been promised nevertheless."""
    try:
        async with asyncio.timeout(TAKING_BACK):
            await asyncio.wait({asking})
            await undo(asking.result())
    except DaemonLost as doubt:
        return doubt
    except QmpCommitError:
        pass  # it was refused, or has ended already
    except TimeoutError:
        await stop(asking)
        return unanswered()
    return None
