"""The signals that end a command, and what is written where its terminal has gone.

Ctrl-C, SIGTERM, SIGHUP (the terminal was closed) and SIGQUIT all end it in the same way; SIGQUIT
says first where all threads and tasks are. A process that was started with SIGHUP or SIGQUIT
ignored, as by ``nohup``, goes on ignoring it.
"""

from __future__ import annotations

import faulthandler
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
INTERRUPTED = 130
SAYING = 1
"""Seconds that what is said in the end has, where nobody reads it and a signal comes."""

_NEVER_IGNORED = (signal.SIGINT, signal.SIGTERM)


def listen() -> None:
    """From now on these signals raise `KeyboardInterrupt`, until `deliver` says otherwise."""
    global _take  # noqa: PLW0603  (a process has one disposition of its signals)
    _take = _interrupt
    for number in ENDING:
        if number in _NEVER_IGNORED or signal.getsignal(number) is not signal.SIG_IGN:
            faulthandler.unregister(number)
            signal.signal(number, lambda number, frame: _take(number))
            if number is signal.SIGQUIT and sys.stderr is not None:
                with suppress(OSError, ValueError):  # a stream that is no file
                    faulthandler.register(number, file=sys.stderr, chain=True)


def deliver(take: Callable[[int], None]) -> None:
    """Have the signals' numbers given to `take`, in the main thread, between two bytecodes."""
    global _take  # noqa: PLW0603
    _take = take


@contextmanager
def waking(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """While this lasts a signal wakes the loop, also one that comes when it is about to wait.

    Python takes a signal between two bytecodes, and there is none between the last look for one
    and the wait for the next event, which may never come.
    """
    import socket

    ours, wakes = socket.socketpair()
    with ours, wakes:
        ours.setblocking(False)
        wakes.setblocking(False)
        before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        loop.add_reader(ours, ours.recv, 64)
        try:
            yield
        finally:
            loop.remove_reader(ours)
            signal.set_wakeup_fd(before)


def let_say() -> None:
    """What was asked is over and only its end is said: that is not broken off, nor waited for."""
    deliver(_hurry)


def go_on() -> None:
    """What was said was not the end: signals interrupt again, one that came meanwhile now."""
    deliver(_interrupt)
    if signal.alarm(0):
        raise KeyboardInterrupt


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt


def _hurry(number: int) -> None:
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(INTERRUPTED))
    signal.alarm(SAYING)


_take: Callable[[int], None] = _interrupt


class _Standing(io.FileIO):
    """A file that takes what is written also where nobody is there any more to read it."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:  # EPIPE, or EIO of a terminal that was closed
            written = None
        # None also where a reader who does not block us has fallen behind.
        return len(memoryview(data).cast("B")) if written is None else written


def keep_stderr() -> None:
    """Standard error raises nothing from now on: the end of a terminal must not end a clean-up."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return
    with suppress(OSError, ValueError, AttributeError):
        raw = _Standing(sys.stderr.fileno(), "wb", closefd=False)
        sys.stderr.flush()
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=sys.stderr.encoding,
            errors="backslashreplace",
            line_buffering=True,
        )


def tasks_of(loop: asyncio.AbstractEventLoop) -> str:
    """Where each task of a loop waits, from its own coroutine down to what that awaits."""
    from asyncio import all_tasks

    said = []
    for task in sorted(all_tasks(loop), key=lambda task: task.get_name()):
        said.append(f"Task {task.get_name()}:\n")
        said += [f"  {line}\n" for line in _awaits(task.get_coro())]
    return "".join(said)


def _awaits(awaited: Any) -> Iterator[str]:
    while awaited is not None:
        kind = next((k for k in ("cr", "ag", "gi") if hasattr(awaited, f"{k}_frame")), None)
        if kind is None:
            yield repr(awaited)
            return
        frame, code = getattr(awaited, f"{kind}_frame"), getattr(awaited, f"{kind}_code")
        if frame is not None:
            yield _place(code, frame.f_lineno)
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")


def _place(code: CodeType, line: int) -> str:
    return f'File "{code.co_filename}", line {line} in {code.co_qualname}'
