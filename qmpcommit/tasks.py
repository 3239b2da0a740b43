"""What asyncio leaves to the careful: finishing something although one is cancelled."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


class Awaited(Coroutine[Any, Any, T]):
    """Something to wait for that may be left unawaited: `begin` is called when somebody waits.

    It can be awaited again and again, and a task takes it as the coroutine that it is; each task
    that runs it begins it anew, also where another runs it or has run it.
    """

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._begin = begin
        self._begun: dict[asyncio.Task[Any] | None, Coroutine[Any, Any, T]] = {}

    def __await__(self) -> Generator[Any, None, T]:
        return self._begin().__await__()

    def send(self, value: Any, /) -> Any:
        """Called by the task that runs it."""
        return self._step(lambda begun: begun.send(value))

    def throw(self, *error: Any) -> Any:
        """Called by the task that runs it, as when it is cancelled."""
        return self._step(lambda begun: begun.throw(*error))

    def close(self) -> None:
        """Called where it is given up."""
        while self._begun:
            self._begun.popitem()[1].close()

    def _step(self, step: Callable[[Coroutine[Any, Any, T]], Any]) -> Any:
        task = asyncio.current_task()
        begun = self._begun.get(task)
        if begun is None:
            begun = self._begun[task] = self._begin()
        try:
            return step(begun)
        except BaseException:  # it has ended, also where it has an answer
            self._begun.pop(task, None)
            raise


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await work that must not be left half done; a cancellation is raised when it has ended.

    The work itself has to be bounded in time.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # the cancellation is the news; what the work said was logged by it
        raise cancelled
    return task.result()


async def all_ended(works: Iterable[Awaitable[T]], *expected: type[E]) -> list[T | E]:
    """What all came to, side by side, when the last has ended: an answer, or an `expected` error.

    Raises the first of any other error.
    """
    ends: list[Any] = await asyncio.gather(*works, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, expected):
            raise end
    return ends


async def all_of(*work: Awaitable[Any]) -> list[Any]:
    """What each of these gives, which run at once; the first error when all of them have ended."""
    return await all_ended(work)


async def stop(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it is over, whatever it says."""
    task.cancel()
    await to_the_end(_over(task))


async def _over(task: asyncio.Task[Any]) -> None:
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def kill(process: asyncio.subprocess.Process, *, group: bool = False) -> None:
    """Kill a child that has not ended, or its process group, and wait until it has."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            # Process.kill would ask for its status first, and take that from who waits for it.
            (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        await to_the_end(process.wait())
