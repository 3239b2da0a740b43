"""Places at which a process kills itself: before and after each step that changes something."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmpcommit.qmp.agent import Agent
from qmpcommit.session import Session


def places(write_to: str, die_at: int, die_in: str = "") -> Callable[[str], None]:
    """Has `Session` and `Agent` pass places, each named in the file; at the n-th the process dies.

    Or at the first that is called so.
    Answers with what passes one more place.
    """
    if "COVERAGE_FILE" in os.environ:
        _measure()
    passed = 0
    execute, freeze, thaw = Session.execute, Agent.freeze, Agent.thaw

    def place(name: str) -> None:
        nonlocal passed
        passed += 1
        with open(write_to, "a") as file:
            file.write(f"{name}\n")
        if passed == die_at or name == die_in:
            os.kill(os.getpid(), signal.SIGKILL)

    async def executing(self: Session, command: str, arguments: Any = None, **more: Any) -> Any:
        if command.startswith(("query-", "x-debug", "qom-get", "qom-list")):
            return await execute(self, command, arguments, **more)
        place(f"before {command}")
        answer = await execute(self, command, arguments, **more)
        place(f"after {command}")
        return answer

    async def freezing(self: Agent, **more: Any) -> Any:
        place("before guest-fsfreeze-freeze")
        answer = await freeze(self, **more)
        place("after guest-fsfreeze-freeze")
        return answer

    async def thawing(self: Agent) -> Any:
        place("before guest-fsfreeze-thaw")
        answer = await thaw(self)
        place("after guest-fsfreeze-thaw")
        return answer

    Session.execute = executing  # type: ignore[method-assign, assignment]
    Agent.freeze, Agent.thaw = freezing, thawing  # type: ignore[method-assign]
    return place


def _measure() -> None:
    """What a process runs that ends by itself is counted, for those that measure."""
    import coverage

    settings = Path(__file__).parents[2] / "pyproject.toml"
    measured = coverage.Coverage(data_suffix=True, config_file=str(settings))
    measured.start()

    def ended() -> None:
        measured.stop()
        measured.save()

    atexit.register(ended)
