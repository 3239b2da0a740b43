"""Doing something for a window on a VM whose monitor comes and goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qmpcommit.block.chain import Disk
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.leased_window import Part
from qmpcommit.errors import ConnectError, MonitorLost, VMGone, WindowError
from qmpcommit.qmp.process import is_alive
from qmpcommit.session import Session
from qmpcommit.window.records import Frozen
from qmpcommit.window.remains import disk_over, left_of

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


async def writer_of(engine: Engine, part: Part, session: Session, each: Frozen) -> Disk | None:
    """The disk that writes to this overlay; raises where it holds data and none does."""
    _, graph = await session.look()
    disk = disk_over(graph, each.overlay)
    if disk is not None:
        return disk
    remains = await left_of(session, each.overlay)
    if not remains:
        return None
    vm = engine.registry.vms.get(part.vm)
    before, now = part.identity, vm.identity if vm is not None else ""
    anew = f"{part.vm} was started anew; " if before and now and before != now else ""
    what = "; ".join(each.message for each in remains)
    raise WindowError(f"{anew}no disk of {part.vm} writes to this overlay: {what}", vm=part.vm)
