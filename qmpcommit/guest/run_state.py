"""Whether a guest runs, and letting one go on that was held still, whoever did it.

Several may pause one guest at the same time, each for a reason of its own: two recycles, a window
and a discard. QEMU does not count them, and the first ``cont`` would let the guest write to the
disk of another. So each is known here (`GUESTS`), and the last one to let go continues it.

Rests on ``query-status`` and ``cont``, and on ``guest-fsfreeze-thaw`` of the guest agent.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection
from typing import Literal, Protocol
from weakref import WeakKeyDictionary, WeakSet

from qmpcommit.errors import (
    CommandRefused,
    InvalidRequest,
    QmpCommitError,
    QuiesceFailed,
    VMGone,
)
from qmpcommit.qmp.agent import Agent
from qmpcommit.qmp.monitor import Monitor

How = Literal["agent", "pause"]
HOW: tuple[How, ...] = ("agent", "pause")

LIMIT = 10.0
"""Seconds for which a guest may be quiesced for a window or a group commit."""

THAW_PATIENCE = 30.0
"""Seconds for which a thaw is tried again."""

STOPPED_HERE = ("paused", "prelaunch")
"""What a running guest is in after ``stop``; the second if it was reset since.

One that stands still for another reason (an I/O error, the end of a migration, after which the
disks belong to another host) is not to be continued by whoever stopped it.
"""


class Holder(Protocol):
    """One who has a guest paused; `paused` tells that it is to go on when the last lets go."""

    paused: bool

    @property
    def here(self) -> bool:
        """Whether no other QEMU is known to answer by now."""


class Guest:
    """Those who have one guest paused; `owed` is that one who has let go had stopped it."""

    def __init__(self) -> None:
        self.holders: WeakSet[Holder] = WeakSet()
        self.owed = False

    @property
    def here(self) -> list[Holder]:
        """Those of them whose guest is that of the QEMU which answers now."""
        return [each for each in self.holders if each.here]


GUESTS: WeakKeyDictionary[Monitor, Guest] = WeakKeyDictionary()


async def runs(vm: Monitor) -> bool:
    """Whether a guest runs; a storage daemon has none. Raises what `Monitor.execute` raises."""
    try:
        return bool((await vm.execute("query-status")).get("running"))
    except CommandRefused:
        return False


async def go_on(vm: Monitor, *, ran: bool = True) -> str:
    """Continue a guest that ran and was stopped here, if it still stands still for that.

    Where it is not known that it `ran`, one that was reset since is left as it is. Else what is
    returned says why it was not continued; nothing where it is continued by the last of those who
    have it stand still. Safe to repeat; raises what `Monitor.execute` raises.
    """
    return await proceed(vm, await run_status(vm), STOPPED_HERE if ran else ("paused",))


async def run_status(vm: Monitor) -> object:
    """What ``query-status`` says. Raises what `Monitor.execute` raises."""
    return (await vm.execute("query-status")).get("status")


async def proceed(vm: Monitor, status: object, stopped: Collection[str] = STOPPED_HERE) -> str:
    """As `go_on`, for a guest of this `status` that goes on from being `stopped`."""
    guest = GUESTS.get(vm)
    if guest is not None and guest.here:
        guest.owed = True
        return ""
    if guest is not None:
        guest.owed = False
    if status in stopped:
        await vm.execute("cont")
    elif status != "running":
        vm.log.warning("not_continued", status=status)
        return f"the guest of {vm.name} was not let go on: it is '{status}' by now"
    return ""


async def thaw(
    vm: Monitor,
    how: How,
    agent: str | os.PathLike[str] | None = None,
    *,
    patience: float = THAW_PATIENCE,
    ran: bool = False,
    let_go: Callable[[], Awaitable[str]] | None = None,
) -> str:
    """Let a guest go on that was quiesced so, whoever did it; safe to repeat.

    With "agent" it is tried over new connections until the agent says that nothing is frozen,
    for `patience` seconds. With "pause" a guest that is paused is continued; one that stands
    still for another reason (an I/O error, a migration) is not touched, which is returned; one
    that was reset since is continued only if it is known that it `ran` in this QEMU; `let_go` is
    how one goes on that is held here. Raises `VMGone` where QEMU has ended, and `QuiesceFailed`
    where the guest may still be frozen.
    """
    if how == "agent" and agent is None:
        raise InvalidRequest("the socket of the guest agent is needed to thaw the guest")
    loop = asyncio.get_running_loop()
    end = loop.time() + patience
    pause = 0.05
    while True:
        try:
            async with asyncio.timeout_at(max(end, loop.time() + 1.0)):
                if agent is not None and how == "agent":
                    return await _thaw_by(agent, vm)
                return await (go_on(vm, ran=ran) if let_go is None else let_go())
        except VMGone:
            raise
        except (QmpCommitError, TimeoutError) as error:
            await _ask_whether_gone(vm)
            if loop.time() >= end:
                raise _still_frozen(vm, how, agent, error) from error
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)


async def _thaw_by(agent: str | os.PathLike[str], vm: Monitor) -> str:
    async with Agent(agent, vm=vm.name) as client:
        await client.thaw()
        status = await client.status()
    if status != "thawed":
        raise QuiesceFailed(f"the guest of {vm.name} says it is still frozen", vm=vm.name)
    return ""


async def _ask_whether_gone(vm: Monitor) -> None:
    """Raise `VMGone` where there is no guest any more."""
    try:
        async with asyncio.timeout(5.0):
            await vm.execute("query-status")
    except VMGone:
        raise
    except (QmpCommitError, TimeoutError):
        pass  # not known; the guest may be there, and frozen


def _still_frozen(
    vm: Monitor, how: How, agent: str | os.PathLike[str] | None, error: BaseException
) -> QuiesceFailed:
    if how == "agent":
        what = (
            f"the file systems of {vm.name}'s guest may still be frozen, so that its writes hang;"
            f" send guest-fsfreeze-thaw to the guest agent at {agent}, or reset the VM"
        )
    else:
        what = f"{vm.name} may still be paused; send cont to its monitor"
    return QuiesceFailed(
        f"{what}. The disks are not at risk. Last error: {error or type(error).__name__}",
        vm=vm.name,
        how=how,
        agent=None if agent is None else os.fspath(agent),
        frozen=True,
    )
