"""What a person is asked on a terminal: what becomes of a commit, before it begins or at READY."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qmpcommit.cli.explain import drawn, last_note
from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.cli.options import Options
    from qmpcommit.client.job import RemoteJob
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.plan import Plan
    from qmpcommit.commit.policy import AnyPolicy

CHOICES = ("pivot", "keep", "abort")
KEYS = {choice[0]: choice for choice in CHOICES}
READING = 0.3
"""Seconds after which a question takes its answer: a word is typed faster than that."""

OFFER = "[p]ivot, [k]eep, [a]bort or [e]xplain"


def may_ask(options: Options) -> bool:
    """Whether somebody is there who sees a question and can answer it."""
    if options.as_json or options.quiet or sys.stdin is None or sys.stderr is None:
        return False
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:  # one in the background would be stopped by its terminal
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


async def ask_policy(plans: Sequence[Plan]) -> AnyPolicy | None:
    """Ask what becomes of these disks at READY; None where that is not answered."""
    from qmpcommit.commit import policy as policies

    made: dict[str, AnyPolicy] = {
        "pivot": policies.Pivot(),
        "keep": policies.Keep(),
        "abort": policies.Abort(),
        "hold": policies.Hold(),
    }
    words = [*made, "explain"]
    echo("\n".join(_offered(plans)), err=True)
    while True:
        echo(f"{', '.join(words[:-1])} or explain? ", nl=False, err=True)
        line = await _line()
        word = line.strip().lower()
        found = [each for each in words if word and each.startswith(word)]
        if not word:
            return None
        if found == ["explain"]:
            echo("\n".join(_explained(plans)), err=True)
        elif len(found) == 1:
            return made[found[0]]
        else:
            echo(f"'{word}' is none of these; an empty line leaves it", err=True)


async def _line() -> str:
    """A line of the terminal's, which nobody waits for who is interrupted."""
    loop = asyncio.get_running_loop()
    got: asyncio.Future[str] = loop.create_future()
    read = b""

    def readable() -> None:
        nonlocal read
        data = os.read(0, 4096)
        read += data
        if (not data or b"\n" in read) and not got.done():
            got.set_result(read.decode(errors="replace"))

    loop.add_reader(0, readable)
    try:
        return await got
    finally:
        loop.remove_reader(0)


def files_of(plan: Plan) -> list[str]:
    """What the commit is about, bottom first."""
    images = (plan.base, *reversed(plan.between), plan.top)
    return [image.filename for image in images]


def tell_of_change(asked: Sequence[Plan], now: Sequence[Plan]) -> bool:
    """Say of which disks the layers are not those any more that were asked about; whether any."""
    changed = [
        plan for before, plan in zip(asked, now, strict=True) if _layers(before) != _layers(plan)
    ]
    for plan in changed:
        echo(f"qmpcommit: {plan.disk} is not as it was when you were asked; look again", err=True)
    return bool(changed)


def _layers(plan: Plan) -> list[tuple[str, str]]:
    return [(image.node_name, image.filename) for image in (plan.top, *plan.between, plan.base)]


def _offered(plans: Sequence[Plan]) -> Iterator[str]:
    for plan in plans:
        yield f"{plan.disk}: what is to become of it, when all is copied? Nothing is sent yet."
        for choice in CHOICES:
            yield f"  {choice:<7}  {last_note(choice, files_of(plan))}"
    yield "  hold     it stays READY, and you decide then"


def _explained(plans: Sequence[Plan]) -> Iterator[str]:
    for plan in plans:
        for choice in CHOICES:
            yield f"{choice}:"
            yield from drawn(choice, files_of(plan))


class Keys:
    """What is typed while a job is READY: a key for each decision, and ``y`` after it.

    A stray key decides nothing, nor does a word that is pasted, or typed for something else: each
    key has to come alone, and the ``y`` when it is asked for. `text` is what is drawn; nothing is
    read before `begin`.
    """

    def __init__(self, job: CommitJob | RemoteJob, files: Sequence[str] = ()) -> None:
        self._job, self._files = job, files
        self._asked = ""
        self._asks: asyncio.TimerHandle | None = None
        self._redraw: Callable[[], None] = lambda: None
        self._before: Any = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.text = OFFER

    def begin(self, redraw: Callable[[], None]) -> None:
        """Have the terminal give each key at once, and drop what was typed before.

        `redraw` draws `text` anew.
        """
        self._redraw = redraw
        if self._before is not None:
            return
        import termios
        import tty

        with suppress(OSError, termios.error):
            self._before = termios.tcgetattr(0)
            tty.setcbreak(0)
            asyncio.get_running_loop().add_reader(0, self._readable)

    async def end(self) -> None:
        """Have the terminal as it was."""
        if self._before is not None:
            import termios

            asyncio.get_running_loop().remove_reader(0)
            with suppress(OSError, termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, self._before)
            self._before = None
        if self._asks is not None:
            self._asks.cancel()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _readable(self) -> None:
        try:
            data = os.read(0, 64)
        except OSError:
            data = b""
        if not data:  # nobody is there any more
            asyncio.get_running_loop().remove_reader(0)
            return
        if self._asks is not None:
            self._asks.cancel()
            self._asks = None
        self._typed(data.decode(errors="replace").lower())
        self._redraw()

    def _ask_for_yes(self) -> None:
        self._asks = None
        self.text += "y for yes"
        self._redraw()

    def _typed(self, key: str) -> None:
        """What one read gave: more than one key is a word, which answers nothing."""
        if self._asked and key == "y" and self.text.endswith("y for yes"):
            self._decide(self._asked)
            self.text = f"{self._asked}: as you say"
            self._asked = ""
        elif key in KEYS and not self._asked:
            self._asked = KEYS[key]
            note = last_note(self._asked, self._files) if self._files else ""
            self.text = f"{self._asked}? {f'{note}. ' if note else ''}"
            self._asks = asyncio.get_running_loop().call_later(READING, self._ask_for_yes)
        elif key == "e" and self._files:
            for choice in CHOICES:
                echo("\n".join([f"\r\x1b[K{choice}:", *drawn(choice, self._files)]), err=True)
        else:
            self._asked, self.text = "", OFFER

    def _decide(self, choice: str) -> None:
        from qmpcommit.errors import QmpCommitError

        calls: Mapping[str, Callable[[], Any]] = {
            "pivot": self._job.pivot,
            "keep": self._job.keep,
            "abort": self._job.abort,
        }
        try:
            done = calls[choice]()
        except QmpCommitError as error:
            echo(f"\r\x1b[Kqmpcommit: {error.message}", err=True)
            return
        if asyncio.iscoroutine(done):
            task = asyncio.get_running_loop().create_task(self._ask(done))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _ask(deciding: Any) -> None:
        from qmpcommit.errors import QmpCommitError

        try:
            await deciding
        except QmpCommitError as error:
            echo(f"\r\x1b[Kqmpcommit: {error.message}", err=True)
