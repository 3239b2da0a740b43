"""Runs a command's coroutine under its deadline and under Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from qmpcommit import log
from qmpcommit.cli import signals
from qmpcommit.cli.options import Answer, Interrupted, Options
from qmpcommit.errors import ConnectError, DeadlineExceeded
from qmpcommit.session import Session

if TYPE_CHECKING:
    from qmpcommit.client.vm import RemoteVM

GREETING = 5.0
"""Seconds that a monitor gets to greet, where the deadline is not before."""

NOTHING = "nothing was sent"
"""What a command has done before it does anything."""


class Run:
    """One running command.

    Until there is a job, Ctrl-C, SIGTERM, SIGHUP, SIGQUIT and the deadline cancel the command's
    coroutine, and `so_far` tells what that leaves; what they do later is set with `on_signal` and
    `on_deadline`. The former is called with 1 for the first signal, with how often there was a
    Ctrl-C for each further one, and with 0 for any other: whoever closes a terminal or ends a
    service sends several of them, and leaves nobody to take up what is left. `signal` is the last
    one. `unconnected` is the error of a monitor that did not answer before the deadline.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.signals = 0
        self.signal = 0
        self._ctrl_c = 0
        self.timed_out = False
        self.so_far = NOTHING
        self.on_signal: Callable[[int], None] | None = None
        self.on_deadline: Callable[[], None] | None = None
        self.unconnected: ConnectError | None = None
        self._sessions: list[Session] = []
        self._main = asyncio.current_task()

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline; None where there is none."""
        if self.options.deadline is None:
            return None
        return max(0.0, self.options.deadline - time.monotonic())

    def connect(self, qmp: str) -> Session:
        """A session that connects when it is entered, if the deadline does not come before."""
        session = Session.connect(qmp, timeout=GREETING)
        self._sessions.append(session)
        return session

    def vm(self, name: str) -> AbstractAsyncContextManager[Session | RemoteVM]:
        """The VM with its monitor at that address, or the one that the daemon calls so."""
        if self.options.daemon is None:
            return self.connect(name)
        from qmpcommit.cli.remote import reach

        return reach(self.options, name)

    def cancel(self) -> None:
        """End the command's coroutine."""
        if self._main is not None:
            self._main.cancel()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """A signal that ends the command has come."""
        self.signals += 1
        self.signal = number
        self._ctrl_c += number == signal.SIGINT
        if number == signal.SIGQUIT and sys.stderr is not None:
            sys.stderr.write(signals.tasks_of(asyncio.get_running_loop()))
        if self.on_signal is not None:
            again = self._ctrl_c if number == signal.SIGINT and self._ctrl_c > 1 else 0
            self.on_signal(1 if self.signals == 1 else again)
        elif self.signals == 1:
            self.cancel()

    def time_is_up(self) -> None:
        """The deadline has come."""
        self.timed_out = True
        seconds = self.options.timeout or 0
        awaiting = (s.unanswered(seconds) for s in self._sessions if s.awaits)
        if self.on_deadline is not None:
            self.on_deadline()
        else:
            if self.so_far == NOTHING:  # else a line was lost, and is being made again
                self.unconnected = next(awaiting, None)
            self.cancel()

    def too_late(self, what: str) -> DeadlineExceeded:
        """The deadline's error."""
        return DeadlineExceeded(f"{what} within {self.options.timeout:g} s")


def run(options: Options, work: Callable[[Run], Coroutine[Any, Any, Answer]]) -> Answer:
    """Run a command to its answer; raises what it raises, and `Interrupted`."""
    _configure_log(options.verbose)
    return asyncio.run(_run(options, work))


async def _run(options: Options, work: Callable[[Run], Coroutine[Any, Any, Answer]]) -> Answer:
    loop = asyncio.get_running_loop()
    running = Run(options)
    if not options.verbose:
        # Of a child that it kills while it is being started asyncio says that it ended.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        loop.set_exception_handler(lambda loop, context: None)
    signals.deliver(lambda number: _pass_on(loop, running, number))
    try:
        remaining = running.remaining
        if remaining is not None:
            if not remaining:
                raise running.too_late("nothing could be done, and nothing was sent,")
            loop.call_later(remaining, running.time_is_up)
        with signals.waking(loop):
            return await work(running)
    except asyncio.CancelledError:
        if running.unconnected is not None:  # why is the news, and not that it took too long
            raise running.unconnected from None
        if running.timed_out:
            raise running.too_late(f"it was not done, and {running.so_far},") from None
        raise Interrupted(f"interrupted; {running.so_far}") from None
    finally:
        signals.let_say()


def _pass_on(loop: asyncio.AbstractEventLoop, running: Run, number: int) -> None:
    loop.call_soon_threadsafe(running.interrupt, number)


def _configure_log(verbose: int) -> None:
    # What the library warns of, the command says in its own words, so it is silent by default.
    log.threshold = logging.ERROR
    if not verbose:
        return
    log.threshold = logging.DEBUG if verbose > 1 else logging.INFO
    import structlog

    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR")
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(log.threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
