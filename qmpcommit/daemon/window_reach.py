"""Doing something for a window on a VM whose monitor comes and goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.leased_window import Part
from qmpcommit.errors import ConnectError, MonitorLost, VMGone
from qmpcommit.qmp.process import is_alive
from qmpcommit.session import Session

T = TypeVar("T")

AGAIN = 0.5
"""Seconds between two tries where a VM is away or nothing can be promised."""

AWAY = (ConnectError, MonitorLost, VMGone)


async def ask(engine: Engine, part: Part, work: Callable[[Session], Awaitable[T]]) -> T:
    """Do something on the VM's session, over losses of its monitor.

    Raises `VMGone` where the VM does not come back within the configured time.
    """
    since = time.monotonic()
    limit = engine.config.limits.gone_after
    while True:
        try:
            vm = engine.registry.vms.get(part.vm)
            if vm is None:
                raise ConnectError(f"no VM is called '{part.vm}' at the moment")
            async with engine.registry.use(vm, wait=1.0) as session:
                answer = await work(session)
            part.problem = ""
            return answer
        except AWAY as error:
            part.problem = f"{part.vm} is away: {error.message}"
            if not is_alive(part.identity) and time.monotonic() - since > limit:
                raise VMGone(
                    f"{part.vm} is gone, and did not come back within {limit:g} s. Start it with"
                    " the overlay as its disk, for that is the newest; the window is then listed"
                    " as an orphan, and DELETE closes it",
                    vm=part.vm,
                ) from error
        await asyncio.sleep(AGAIN)


async def nothing(session: Session) -> None:
    """Only see that the VM is there."""
