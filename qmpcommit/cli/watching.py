"""``--watch``: the same table again and again, until Ctrl-C or the deadline."""

from __future__ import annotations

import errno
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qmpcommit.cli.options import Answer
from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run

F = TypeVar("F", bound=Callable[..., Any])

EVERY = 1.0
"""Seconds between two looks."""

watch_option = click.option(
    "--watch", is_flag=True, help="Show it again and again, until Ctrl-C or --timeout."
)


def check_watch(watch: bool, as_json: bool) -> None:
    """Raise `click.UsageError` where one object is asked for."""
    if watch and as_json:
        raise click.UsageError("--json is one object, and --watch is many: leave one of them out")


async def watched(
    running: Run, look: Callable[[], Awaitable[Answer]], *, every: float = EVERY
) -> Answer:
    """Look until it is over; the last answer, which was shown already.

    On a terminal each look takes the place of the one before; elsewhere it is written where it
    differs from that. Whoever ends it has got what was asked for: that is status 0.
    """
    import asyncio

    over = asyncio.Event()

    def end(times: int = 0) -> None:
        over.set()

    running.on_signal, running.on_deadline = end, end
    ends = asyncio.create_task(over.wait(), name="the end of a watch")
    before: str | None = None
    answer = Answer({}, "", quiet=True)
    try:
        while not over.is_set():
            looking = asyncio.ensure_future(look())
            await asyncio.wait({looking, ends}, return_when=asyncio.FIRST_COMPLETED)
            if not looking.done():
                looking.cancel()
                await asyncio.wait({looking})
                break
            answer = looking.result()
            if not running.options.quiet:
                before = _show(answer, before)
            await asyncio.wait({ends}, timeout=every)
    finally:
        ends.cancel()
    return answer._replace(quiet=True)


def _show(answer: Answer, before: str | None) -> str:
    """Write it; what was written. Raises `OSError` where it can't be."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")
    if sys.stdout.isatty() and answer.draw is not None:
        sys.stdout.write("\x1b[H\x1b[2J" if before is None else "\x1b[H\x1b[J")
        answer.draw()
    elif answer.text != before:
        echo(answer.text if before is None else f"\n{answer.text}")
    return answer.text
