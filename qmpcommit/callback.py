"""The one way in which what the program hands in (a policy, a hook, a ledger) is called.

One rule for all of them. What such a callable ends with, whatever it raises (`SystemExit` and
`KeyboardInterrupt` too, or the `CancelledError` of a task of the program's that it awaited), is its
failure and goes to the caller as the ``__cause__`` of an error of ours; a cancellation of ours is
passed on to it, and then ours goes on. Before the point of no return what was begun is undone,
after it it is brought to its end, and the outcome's warnings tell. One that hangs is given up
where a disk is held or a guest stands still, and at the deadline; one that does not heed its
cancellation is left behind.

What is none of these and no `Exception` is nothing that a callable ends with: whoever runs the
program has thrown it in from outside, as a test's time-out does by a signal's handler. What was
begun is undone for that likewise, and then it goes up as it is to whoever waits.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from qmpcommit.errors import CommitFailed, QmpCommitError
from qmpcommit.log import Log

HEED = 5.0
HEED_HELD = 1.0
"""Seconds that a callable gets to heed its cancellation, and where something is held meanwhile."""

HELD = 2.0
"""Seconds that a note may take while a disk is held or a guest stands still."""

ANYWAY = 1.0
"""The same for the note of a step that is taken in any case, for it lets that go."""

LAST = 2.0
"""Seconds that a note has from the deadline on."""


class Failed(Exception):
    """What the program handed in has failed; `cause` is what it ended with."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(said_of(cause))
        self.cause = cause


_ITS_OWN = (Exception, asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit)


def going_up(error: BaseException) -> BaseException:
    """What is raised of an error: itself, or its cause where that was thrown in from outside."""
    cause = error.__cause__
    return error if cause is None or isinstance(cause, _ITS_OWN) else cause


def said_of(error: BaseException) -> str:
    """An error in words, for the middle of a sentence."""
    if isinstance(error, QmpCommitError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return repr(error)  # of the program's own, which knows it


async def ask(
    call: Callable[..., Any],
    *arguments: Any,
    limit: float | None = None,
    heed: float = HEED,
    **named: Any,
) -> Any:
    """What a callable of the program's gives, awaited if it is to be; raises `Failed`.

    After `limit` seconds it is cancelled and has failed (`TimeoutError`). If this is cancelled, so
    is it, and that is raised.
    """
    end: list[BaseException | None] = []

    async def calling() -> Any:
        # Nothing of it may reach the loop, which a SystemExit would end.
        try:
            answer = call(*arguments, **named)
            if inspect.isawaitable(answer):
                answer = await answer
        except BaseException as error:
            end.append(error)
            return None
        end.append(None)
        return answer

    task = asyncio.ensure_future(calling())
    try:
        async with asyncio.timeout(limit):
            await asyncio.wait({task})
    except TimeoutError:
        await _give_up(task, HEED_HELD)
        if not task.done() or not end or end[0] is not None:
            raise Failed(TimeoutError(f"it took longer than {limit:g} s")) from None
    except BaseException:
        await _give_up(task, heed)
        raise
    if not end:  # whoever cancels all tasks of a loop
        end.append(asyncio.CancelledError())
    if end[0] is not None:
        raise Failed(end[0])
    return task.result()


async def _give_up(task: asyncio.Task[Any], heed: float) -> None:
    """Cancel it, and wait a moment for it to heed that; the cancellation in hand is ours."""
    task.cancel()
    until = asyncio.get_running_loop().time() + heed
    while not task.done() and (left := until - asyncio.get_running_loop().time()) > 0:
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task}, timeout=left)


class Notes(Protocol):
    """Where steps are written down before they are taken."""

    async def note(self, step: str, **facts: Any) -> None:
        """A step is about to be taken; it is written down when this returns."""


class Noting:
    """A ledger of the program's, called by the rule; `failure` is what it failed with first.

    `problems` tell of the steps that were taken although they could not be written down.
    """

    def __init__(self, ledger: Any, log: Log) -> None:
        self._ledger, self._log = ledger, log
        self._timeout: asyncio.Timeout | None = None
        self._last = False
        self.failure: BaseException | None = None
        self.problems: list[str] = []

    @classmethod
    def of(cls, ledger: Any, log: Log) -> Noting | None:
        """Of a ledger; None where there is none."""
        return ledger if ledger is None or isinstance(ledger, Noting) else cls(ledger, log)

    async def note(
        self, step: str, *arguments: Any, held: bool = False, anyway: bool = False, **facts: Any
    ) -> None:
        """Have a step written down; raises `CommitFailed` where it can't be.

        While something is `held` no step waits for long, and least one that lets it go. For a step
        that is taken `anyway` nothing is raised.
        """
        limit = LAST if self._last else None
        if held:
            limit = ANYWAY if anyway else HELD
        try:
            try:
                async with asyncio.timeout(limit) as self._timeout:
                    heed = HEED if limit is None else HEED_HELD
                    await ask(self._ledger.note, step, *arguments, heed=heed, **facts)
            except TimeoutError:
                raise Failed(TimeoutError("it took too long")) from None
        except Failed as failed:
            self.failure = self.failure or failed.cause
            self._log.warning("not_noted", step=step, error=repr(failed.cause))
            said = f"its ledger could not note {step} ({failed})"
            if not anyway:
                raise CommitFailed(said, error=str(failed)) from failed.cause
            told = f"{said}, which was done all the same"
            if told not in self.problems:
                self.problems.append(told)
        finally:
            self._timeout = None

    def moved(self, state: Any) -> None:
        """Tell it of another phase, where it wants to know."""
        tell = getattr(self._ledger, "moved", None)
        if tell is None:
            return
        try:
            tell(state)
        except BaseException as error:  # it is only told
            self._log.warning("not_told", error=repr(error))

    def hurry(self) -> None:
        """The deadline has come, or nobody waits any more: no note takes long from now on."""
        self._last = True
        if self._timeout is not None and not self._timeout.expired():
            until = asyncio.get_running_loop().time() + LAST
            due = self._timeout.when()
            self._timeout.reschedule(until if due is None else min(due, until))
