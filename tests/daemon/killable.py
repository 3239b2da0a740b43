"""The daemon, killed by SIGKILL at its n-th step.

Steps count from when the first commit, group, round, window or adoption is asked for. A step is
what the journal or QEMU is told, and each file that goes: there is a place to die before it and one
after it. ``QMPCOMMIT_DIE_AT`` is the number of the place (0: never), all passed are written to the
file ``QMPCOMMIT_PLACES``. ``QMPCOMMIT_DIE_IN`` is a place's name. With ``QMPCOMMIT_RECOVERS`` steps
count from the start: those of a recovery, before anything is asked for. ``QMPCOMMIT_REFUSES`` is a
VM and a QMP command that it refuses, as QEMU does what it can't do; ``QMPCOMMIT_SLOW`` one that
takes half a second longer; ``QMPCOMMIT_BUG`` one that meets a defect of ours;
``QMPCOMMIT_HANGS`` one at which the process, whose id comes third, is stopped. A QEMU gets
``QMPCOMMIT_PATIENCE`` seconds to answer a command.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import qmpcommit.cli.main
from qmpcommit.daemon.cycles import Cycles
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.groups import Groups
from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.promised_group import Group
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.windows import Windows
from qmpcommit.errors import CommandRefused
from qmpcommit.qmp.agent import Agent
from qmpcommit.session import Session

DIE_AT = int(os.environ["QMPCOMMIT_DIE_AT"])
DIE_IN = os.environ.get("QMPCOMMIT_DIE_IN")
PLACES = os.environ["QMPCOMMIT_PLACES"]
REFUSES = os.environ.get("QMPCOMMIT_REFUSES", "").split()
SLOW = os.environ.get("QMPCOMMIT_SLOW", "").split()
BUG = os.environ.get("QMPCOMMIT_BUG", "").split()
HANGS = os.environ.get("QMPCOMMIT_HANGS", "").split()
PATIENCE = os.environ.get("QMPCOMMIT_PATIENCE")


class Counter:
    """How many places were passed; nothing is counted before a commit was asked for."""

    asked = "QMPCOMMIT_RECOVERS" in os.environ
    passed = 0


def place(name: str) -> None:
    """Somewhere to die."""
    if not Counter.asked:
        return
    Counter.passed += 1
    with open(PLACES, "a") as file:
        file.write(f"{' '.join(name.split())}\n")  # a line each, by which they are counted
    if Counter.passed == DIE_AT or name == DIE_IN:
        os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, label: Callable[..., str]) -> None:
    """Places before and after each call of a method."""
    call = getattr(owner, name)

    async def counted(*args: Any, **more: Any) -> Any:
        what = label(*args)
        if "query" in what:  # a question changes nothing, and others ask at any time
            return await call(*args, **more)
        place(f"before {what}")
        answer = await call(*args, **more)
        place(f"after {what}")
        return answer

    setattr(owner, name, counted)


def unlink(*args: Any, **more: Any) -> None:
    """``os.unlink`` with places."""
    place("before unlink")
    UNLINK(*args, **more)
    place("after unlink")


async def execute(self: Session, command: str, *args: Any, **more: Any) -> Any:
    """`Session.execute`, of which one may be refused, and one is slow."""
    if [self.name, command] == SLOW:
        await asyncio.sleep(0.5)
    if [self.name, command] == HANGS[:2]:
        os.kill(int(HANGS[2]), signal.SIGSTOP)
        HANGS.clear()
    if [self.name, command] == BUG:
        raise ZeroDivisionError(command)
    if [self.name, command] == REFUSES:
        raise CommandRefused(f"{command} refused", command=command, desc="it won't",
                             error_class="GenericError")  # fmt: skip
    return await EXECUTE(self, command, *args, **more)


def new_session(self: VM) -> Session:
    """`VM.new_session`, of less patience."""
    session = NEW_SESSION(self)
    if PATIENCE is not None:
        session.command_timeout = float(PATIENCE)
    return session


def counted_from(owner: Any, name: str) -> None:
    """From the first call of this method on it counts."""
    call = getattr(owner, name)

    async def counted(*args: Any, **more: Any) -> Any:
        Counter.asked = True
        return await call(*args, **more)

    setattr(owner, name, counted)


UNLINK, EXECUTE, NEW_SESSION = os.unlink, Session.execute, VM.new_session
VM.new_session = new_session  # type: ignore[method-assign]
os.unlink = unlink
counted_from(Engine, "take")
counted_from(Engine, "take_up")
counted_from(Groups, "take")
counted_from(Cycles, "begin")
counted_from(Windows, "open")
around(Journal, "write", lambda self, *statements: f"journal {statements[0].sql[:32]}")
around(Group, "finalize", lambda self, by: "finalize")
around(Agent, "freeze", lambda self: "guest-fsfreeze-freeze")
around(Agent, "thaw", lambda self: "guest-fsfreeze-thaw")
Session.execute = execute  # type: ignore[method-assign, assignment]
around(Session, "execute", lambda self, command, *rest: str(command))
qmpcommit.cli.main.main()
