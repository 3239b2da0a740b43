"""A guest that holds still for a moment, and always goes on.

"agent" has QEMU's guest agent flush and freeze the guest's file systems, so that a disk is
consistent for what runs in the guest; "pause" stops the vCPUs, so that several disks stand still
at one instant; without either a disk is what a power cut would leave.

Rests on ``guest-fsfreeze-freeze`` and ``guest-fsfreeze-thaw`` of the agent, and on
``query-status``, ``stop`` and ``cont`` of QMP.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qmpcommit.callback import Notes, Noting
from qmpcommit.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QmpCommitError,
    QuiesceFailed,
    VMGone,
)
from qmpcommit.former import former
from qmpcommit.guest.run_state import Still, go_on
from qmpcommit.guest.sockets import Agents, Sockets, socket_of
from qmpcommit.qmp.agent import Agent
from qmpcommit.tasks import stop, to_the_end
from qmpcommit.units import parse_seconds

if TYPE_CHECKING:
    from qmpcommit.qmp.monitor import Monitor

How = Literal["agent", "pause"]
HOW: tuple[How, ...] = ("agent", "pause")

LIMIT = 10.0
"""Seconds for which a guest may be quiesced for a window or a group commit."""

THAW_PATIENCE = 30.0
"""Seconds for which a thaw is tried again."""


@dataclass
class Quiet:
    """What was quiesced: `held` if anything was, `file_systems` how many the agent froze.

    `seconds` is for how long, from sending the freeze to the answer to the thaw; None before.
    """

    how: How | None
    held: bool = False
    file_systems: int | None = None
    seconds: float | None = None


def check_how(how: object) -> None:
    """Raise `InvalidRequest` for what is no way to quiesce a guest."""
    if how not in ("agent", "pause", None):
        raise InvalidRequest(f'a guest is quiesced by "agent", "pause" or None, not {how!r}')


def check_sockets(how: How | None, vms: Iterable[Monitor], agents: Sockets[Any]) -> None:
    """Raise `InvalidRequest` where these VMs' guests can't be quiesced so for want of a socket."""
    check_how(how)
    if how == "agent":
        check_names(vm.name for vm in dict.fromkeys(vms) if vm not in agents)


def check_names(lacking: Iterable[str]) -> None:
    """Raise `InvalidRequest` where there are VMs without a guest agent's socket."""
    names = ", ".join(lacking)
    if names:
        raise InvalidRequest(
            f"freeze='agent' needs the socket of each guest agent: agents has no socket for {names}"
        )


@asynccontextmanager
async def quiesced(
    vm: Monitor,
    how: How | None,
    *,
    agent: str | os.PathLike[str] | None = None,
    limit: float = LIMIT,
    ledger: Notes | None = None,
) -> AsyncIterator[Quiet]:
    """What `freeze` does, with the socket of the agent of this VM."""
    check_how(how)
    if how == "agent" and agent is None:
        raise InvalidRequest(
            'how="agent" needs the socket of the guest agent (agents="/run/vms/web1/agent.sock")'
        )
    limit = parse_seconds(limit, "limit")
    quiet = Quiet(how)
    if how is None:
        yield quiet
        return
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    hold = _Hold(vm, quiet, how, None if agent is None else os.fspath(agent), ledger)
    ends = asyncio.get_running_loop().time() + limit
    try:
        await hold.freeze(limit)
    except BaseException as error:
        await hold.release(error)
        raise
    watch = asyncio.create_task(hold.expire(task, ends), name=f"end of a freeze of {vm.name}")
    try:
        try:
            yield quiet
        except BaseException as error:
            await hold.release(error, watch)
            raise
        await hold.release(None, watch)
    except asyncio.CancelledError as error:
        if not hold.expired or task.uncancel() > before:
            raise
        raise hold.too_long(limit) from error
    except BaseException:
        if hold.expired:
            task.uncancel()
        raise
    if hold.expired:
        task.uncancel()
        raise hold.too_long(limit)


@former(agent="agents")
def freeze(
    vm: Monitor,
    how: How | None,
    *,
    agents: Agents | None = None,
    limit: float = LIMIT,
    ledger: Notes | None = None,
) -> AbstractAsyncContextManager[Quiet]:
    """Quiesce the guest of `vm` (a `Session`) for the body, for `limit` seconds at most.

    With "agent" the guest's file systems are frozen through its agent's socket `agents`; with
    "pause" its vCPUs are stopped, if they run; with None nothing is done. The guest goes on when
    the body ends, however it ends. A body that is not done after `limit` seconds is cancelled
    and ends in `DeadlineExceeded`, and the guest goes on then, even if the body does not heed
    that. `ledger` notes each step before it is taken, so that `thaw` can follow in another
    process.

    Freeze before a disk is held PENDING, never after: a freeze flushes, and a held disk does not.

    Raises `QuiesceFailed` where the guest can't be quiesced (nobody answers, the agent refuses,
    its file systems are frozen already), then with nothing left frozen; or where it can't be
    thawed, which it says. `InvalidRequest` for "agent" without a socket.
    """
    return quiesced(vm, how, agent=socket_of(agents, vm), limit=limit, ledger=ledger)


async def thaw(
    vm: Monitor,
    how: How,
    agent: str | os.PathLike[str] | None = None,
    *,
    patience: float = THAW_PATIENCE,
    ran: bool = False,
    still: Still | None = None,
) -> None:
    """Let a guest go on that was quiesced so, whoever did it; safe to repeat.

    With "agent" it is tried over new connections until the agent says that nothing is frozen,
    for `patience` seconds. With "pause" a guest that is paused is continued; one that stands
    still for another reason (an I/O error, a migration) is not touched; one that was reset since
    is continued only if it is known that it `ran` in this QEMU; `still` is how it was held here.
    Raises `VMGone` where QEMU has ended, and `QuiesceFailed` where the guest may still be frozen.
    """
    if how == "agent" and agent is None:
        raise InvalidRequest("the socket of the guest agent is needed to thaw the guest")
    loop = asyncio.get_running_loop()
    end = loop.time() + patience
    pause = 0.05
    while True:
        try:
            async with asyncio.timeout_at(max(end, loop.time() + 1.0)):
                await _thaw_once(vm, how, agent, ran=ran, still=still)
            return
        except VMGone:
            raise
        except (QmpCommitError, TimeoutError) as error:
            await _ask_whether_gone(vm)
            if loop.time() >= end:
                raise _still_frozen(vm, how, agent, error) from error
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)


async def _thaw_once(
    vm: Monitor,
    how: How,
    agent: str | os.PathLike[str] | None,
    *,
    ran: bool,
    still: Still | None,
) -> None:
    if how == "pause":
        await (go_on(vm, ran=ran) if still is None else still.go_on())
        return
    assert agent is not None
    async with Agent(agent, vm=vm.name) as client:
        await client.thaw()
        status = await client.status()
    if status != "thawed":
        raise QuiesceFailed(f"the guest of {vm.name} says it is still frozen", vm=vm.name)


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


class _Hold:
    """One guest that is held still; whoever releases it first does."""

    def __init__(
        self, vm: Monitor, quiet: Quiet, how: How, agent: str | None, ledger: Notes | None
    ) -> None:
        self._vm, self._quiet, self._how = vm, quiet, how
        self._agent, self._ledger = agent, Noting.of(ledger, vm.log)
        self._since: float | None = None  # may be frozen since then
        self._still: Still | None = None
        self.expired = False
        self.failure: QmpCommitError | None = None

    async def freeze(self, limit: float) -> None:
        try:
            async with asyncio.timeout(limit):
                await (self._freeze(limit) if self._how == "agent" else self._pause())
        except QuiesceFailed as error:
            error.add(vm=self._vm.name, how=self._how)
            raise
        except TimeoutError as error:
            if isinstance(error, QmpCommitError):
                raise
            raise QuiesceFailed(
                f"the guest of {self._vm.name} was not quiesced within {limit:g} s; it goes on",
                vm=self._vm.name,
                how=self._how,
                agent=self._agent,
            ) from error

    async def _freeze(self, limit: float) -> None:
        assert self._agent is not None
        async with Agent(self._agent, vm=self._vm.name) as client:
            if await client.status() != "thawed":
                raise QuiesceFailed(
                    f"the file systems of {self._vm.name}'s guest are frozen already, by somebody"
                    " else or by a run that was killed. Nothing was done; wait for it, or send"
                    f" guest-fsfreeze-thaw to the guest agent at {self._agent}",
                    agent=self._agent,
                )
            await self._begin()
            self._quiet.file_systems = await client.freeze(timeout=limit)
            self._quiet.held = True

    async def _pause(self) -> None:
        self._still = Still(self._vm)
        if not await self._still.ran():
            return
        await self._begin()
        await self._still.stop()
        self._quiet.held = True

    async def _begin(self) -> None:
        """From here on something may be frozen."""
        if self._ledger is not None:
            await self._ledger.note("freeze", held=True, how=self._how, agent=self._agent)
        self._since = asyncio.get_running_loop().time()

    async def expire(self, task: asyncio.Task[Any], ends: float) -> None:
        """At that time cancel the body and thaw, in this order and without waiting for it."""
        await asyncio.sleep(max(0.0, ends - asyncio.get_running_loop().time()))
        self.expired = True
        task.cancel()
        await self._thaw()

    async def release(
        self, error: BaseException | None, watch: asyncio.Task[None] | None = None
    ) -> None:
        """Thaw, unless that is done; what ended the body stays the news where it was cancelled."""
        try:
            await to_the_end(self._release(watch))
        except QmpCommitError as failed:
            if not isinstance(error, asyncio.CancelledError) or self.expired:
                raise
            error.add_note(failed.message)

    async def _release(self, watch: asyncio.Task[None] | None) -> None:
        if watch is not None and self.expired:
            await watch
            return
        if watch is not None:
            await stop(watch)
        await self._thaw()

    async def _thaw(self) -> None:
        since, still = self._since, self._still
        if since is None:
            if still is None:
                return
            still.paused = False  # it was not stopped here
        else:
            await self._note_thaw()
        try:
            await thaw(self._vm, self._how, self._agent, ran=True, still=still)
        except VMGone:
            self._vm.log.info("quiesced_vm_gone", how=self._how)
            if still is not None:
                still.leave()
        except QmpCommitError as error:
            self._vm.log.warning("thaw_failed", how=self._how, error=error.message)
            self.failure = error
            if still is not None:
                still.leave()
            raise
        if since is not None:
            self._quiet.seconds = asyncio.get_running_loop().time() - since
        self._since = None

    async def _note_thaw(self) -> None:
        if self._ledger is not None:  # a guest does not stay frozen because a disk is full
            await self._ledger.note(
                "thaw", how=self._how, agent=self._agent, held=True, anyway=True
            )

    def too_long(self, limit: float) -> QmpCommitError:
        """What the body's end after the limit is: a thaw that failed is the worse news."""
        return self.failure or DeadlineExceeded(
            f"the guest of {self._vm.name} was quiesced for {limit:g} s, its limit, and goes on"
            " again; what was to be done meanwhile was cancelled. Repeat it with a larger limit,"
            " or do less while the guest stands still",
            vm=self._vm.name,
        )
