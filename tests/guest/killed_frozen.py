"""The command, killed by SIGKILL when its guest's file systems have just been frozen."""

from __future__ import annotations

import os
import signal
from typing import Any

import qmpcommit.cli.main
from qmpcommit.qmp.agent import Agent

FREEZE = Agent.freeze


async def freeze(self: Agent, **more: Any) -> int:
    """`Agent.freeze`, and nothing after it."""
    await FREEZE(self, **more)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives")


Agent.freeze = freeze  # type: ignore[method-assign]
qmpcommit.cli.main.main()
