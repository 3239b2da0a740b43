"""A guest that is held still for a moment, and always goes on: `Hold` is one of those who hold it.

"agent" has QEMU's guest agent flush and freeze the guest's file systems, so that a disk is
consistent for what runs in the guest; "pause" stops the vCPUs, so that several disks stand still
at one instant; without either a disk is what a power cut would leave.

Each step is noted before it is taken, a mark in QEMU tells of it, and `HeldGuest` is what whoever
comes after a death knows of it. Several may pause one guest at the same time, each for a reason of
its own: two recycles, a window and a discard. QEMU does not count them, and the first ``cont``
would let the guest write to the disk of another. So the last one to let go continues it.

Rests on ``guest-fsfreeze-freeze`` and ``guest-fsfreeze-thaw`` of the agent, on ``query-status``,
``stop`` and ``cont`` of QMP, and on the event ``RESUME``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import ref

from qmpcommit.callback import Notes, Noting
from qmpcommit.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QmpCommitError,
    QuiesceFailed,
    VMGone,
)
from qmpcommit.former import former
from qmpcommit.guest.marks import set_mark, unmark
from qmpcommit.guest.run_state import (
    GUESTS,
    HOW,
    LIMIT,
    THAW_PATIENCE,
    Guest,
    How,
    proceed,
    run_status,
    runs,
    thaw,
)
from qmpcommit.guest.sockets import Agents, Sockets, socket_of
from qmpcommit.qmp.agent import Agent
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.qmp.process import is_same, process_identity
from qmpcommit.tasks import stop, to_the_end
from qmpcommit.units import parse_seconds


@dataclass(eq=False)
class Quiet:
    """What was quiesced: `held` if anything was, `file_systems` how many the agent froze.

    `seconds` is for how long, from sending the freeze to the answer to the thaw; None before.
    """

    how: How | None
    held: bool = False
    file_systems: int | None = None
    seconds: float | None = None


class HeldGuest(NamedTuple):
    """What is noted of a guest that is held still, or may be: how, in which QEMU, since when."""

    vm: str
    how: How
    agent: str | None
    identity: str
    since: float

    def dump(self) -> list[Any]:
        """In JSON's own types, beside the name of the VM."""
        return list(self[1:])

    @classmethod
    def load(cls, vm: str, dumped: Iterable[Any] | Mapping[str, Any]) -> HeldGuest:
        """What was dumped, or is noted by these names; raises ValueError or the like."""
        if isinstance(dumped, Mapping):
            dumped = [dumped[name] for name in cls._fields[1:]]
        return cls(vm, *dumped)

    def is_gone(self, vm: Monitor) -> bool:
        """Whether another QEMU answers, with another guest."""
        return is_same(self.identity, process_identity(vm.peer_pid)) is False


def check_how(how: object) -> None:
    """Raise `InvalidRequest` for what is no way to quiesce a guest."""
    if how not in (*HOW, None):
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


# -- one who holds a guest ------------------------------------------------------------------------


Step = Literal["hold", "release", "released"]
"""What is noted: that it is about to be held, about to be let go, and that it goes on."""

Note = Callable[[Step], Awaitable[object]]
"""Writes a step down; only "hold" may raise, for a guest does not stay held for a note."""


class Hold(Quiet):
    """One of those who hold a guest still, from `take` until `release` or `leave`.

    A mark of its `owner`, if there is one, tells of it in QEMU; `note` is told of each step.
    `paused` tells that the guest is to go on when the last of them lets go: it ran, or had been
    stopped by another one of them, or by a former process for which this one goes on. `disturbed`
    tells that it went on meanwhile: somebody else, perhaps in another process, has sent ``cont``.
    `remark` says why it was not let go on. The guest of a QEMU that has come instead is another.
    """

    def __init__(
        self,
        vm: Monitor,
        how: How = "pause",
        owner: str | None = None,
        *,
        agent: str | os.PathLike[str] | None = None,
        note: Note | None = None,
        paused: bool = False,
    ) -> None:
        super().__init__(how)
        self.paused, self.disturbed, self.expired, self.remark = paused, False, False, ""
        self.failure: QmpCommitError | None = None
        self._vm, self._pid, self._how, self._owner = vm, vm.peer_pid, how, owner
        self._agent, self._note = None if agent is None else os.fspath(agent), note
        self._since = asyncio.get_running_loop().time() if paused else None  # may be held
        self._marked = paused
        self._guest = GUESTS.setdefault(vm, Guest())
        if how == "pause":
            self._guest.holders.add(self)
        me = ref(self)

        def heard(message: Mapping[str, Any]) -> None:
            hold = me()
            if hold is not None and how == "pause" and message["event"] == "RESUME":
                hold.disturbed = True

        self._listening = vm.subscribers.add(heard)

    @property
    def here(self) -> bool:
        """Whether no other QEMU is known to answer by now."""
        now = self._vm.peer_pid
        return self._pid is None or now is None or self._pid == now

    async def ran(self) -> bool:
        """Whether the guest has to go on afterwards. Raises what `Monitor.execute` raises."""
        running = await runs(self._vm)
        self._pid = self._vm.peer_pid
        owed = self._guest.owed or any(each.paused for each in self._guest.here)
        self.paused = running or owed
        return self.paused

    async def begin(self) -> bool:
        """Note that it is about to be held; not where it stands still for another reason."""
        if self._how == "pause" and not self.paused and not await self.ran():
            return False
        if self._note is not None:
            await self._note("hold")
        self._since = asyncio.get_running_loop().time()
        return True

    async def take(self, limit: float | None = None) -> bool:
        """Hold it; whether there was anything to hold. Whatever this raises, `release` follows.

        Raises `QuiesceFailed` where that can't be done, or not within `limit` seconds, what `note`
        raises, and what `Monitor.execute` raises.
        """
        try:
            async with asyncio.timeout(limit):
                if self._how == "agent":
                    await self._freeze(limit)
                elif self._since is not None or await self.begin():
                    await self.stop()
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
        return self.held

    async def _freeze(self, limit: float | None) -> None:
        assert self._agent is not None
        async with Agent(self._agent, vm=self._vm.name) as client:
            if await client.status() != "thawed":
                raise QuiesceFailed(
                    f"the file systems of {self._vm.name}'s guest are frozen already, by somebody"
                    " else or by a run that was killed. Nothing was done; wait for it, or send"
                    f" guest-fsfreeze-thaw to the guest agent at {self._agent}",
                    agent=self._agent,
                )
            await self.begin()
            await self._mark()
            self.file_systems = await client.freeze(timeout=limit)
            self.held = True

    async def stop(self) -> None:
        """Stop its vCPUs, with a mark that tells; raises what `Monitor.execute` raises."""
        await self._mark()
        self._since = asyncio.get_running_loop().time()
        await self._vm.execute("stop")
        self.held, self.disturbed = True, False

    async def _mark(self) -> None:
        if self._owner is not None:
            before, self._marked = self._marked, True  # it may be there although this raises
            self._marked = await set_mark(self._vm, self._owner, self._how) or before

    async def release(self, *, patience: float | None = None) -> None:
        """Let go: the guest goes on, unless another one has it stand still; safe to repeat.

        It is tried again for `patience` seconds, and given up then with `QuiesceFailed`. Without
        that, it is tried once, and raises what `Monitor.execute` raises; the mark stays.
        """
        since = self._since
        if since is None:
            self.paused = False  # it was not stopped here, and goes on where that was owed
        elif self._note is not None:
            await self._note("release")
        if patience is None:
            await self.let_go()
        elif since is not None or self._how == "pause":
            await thaw(
                self._vm, self._how, self._agent, patience=patience, ran=True, let_go=self.let_go
            )
        if since is not None:
            self.seconds = asyncio.get_running_loop().time() - since
        self._since = None
        if self._marked and self._owner is not None:
            await unmark(self._vm, self._owner, self._how)
        if since is not None and self._note is not None:
            await self._note("released")

    async def give_up(self) -> str:
        """Let go of a guest that was not stopped by this one; else as `let_go`."""
        self.paused = False
        return await self.let_go()

    async def let_go(self) -> str:
        """Let go of a guest that was paused, with nothing noted; why it was not let go on."""
        if not self.paused and not self._guest.owed:
            self.leave()
            return ""
        self.paused = True  # also where that was another one's to see to
        status = await run_status(self._vm)
        if not self.here:
            self.leave()
            return f"the guest of {self._vm.name} is another one: its QEMU has ended"
        self.leave(owing=True)
        self.remark = await proceed(self._vm, status)
        return self.remark

    def leave(self, *, owing: bool = False) -> None:
        """Let go, and leave the guest as it is; with `owing` another one has to continue it."""
        self._guest.holders.discard(self)
        self._listening.close()
        if owing or not self._guest.here:
            self._guest.owed = owing

    def leave_stopped(self) -> None:
        """Let go of a guest that is to stay stopped, whoever else lets go of it."""
        for each in self._guest.holders:
            each.paused = False
        self._guest.owed = False
        self.leave()

    @asynccontextmanager
    async def within(self, limit: float | None) -> AsyncIterator[Hold]:
        """Hold it for the body, for `limit` seconds at most; see `quiesced`."""
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        clock = asyncio.get_running_loop().time
        ends = clock() + (limit or 0)
        try:
            await self.take(limit)
        except BaseException as error:
            await self._end(error)
            raise
        watch = None
        if limit is not None:
            watch = asyncio.create_task(
                self._expire(task, ends), name=f"end of a freeze of {self._vm.name}"
            )
        try:
            try:
                yield self
            except BaseException as error:
                await self._end(error, watch)
                raise
            await self._end(None, watch)
        except asyncio.CancelledError as error:
            if not self.expired or task.uncancel() > before:
                raise
            raise self._too_long(limit) from error
        except BaseException:
            if self.expired:
                task.uncancel()
            raise
        if self.expired:
            task.uncancel()
            raise self._too_long(limit)

    async def _expire(self, task: asyncio.Task[Any], ends: float) -> None:
        """At that time cancel the body and thaw, in this order and without waiting for it."""
        await asyncio.sleep(max(0.0, ends - asyncio.get_running_loop().time()))
        self.expired = True
        task.cancel()
        await self._thaw()

    async def _end(
        self, error: BaseException | None, watch: asyncio.Task[None] | None = None
    ) -> None:
        """Thaw, unless that is done; what ended the body stays the news where it was cancelled."""
        try:
            await to_the_end(self._thaw_once(watch))
        except QmpCommitError as failed:
            if not isinstance(error, asyncio.CancelledError) or self.expired:
                raise
            error.add_note(failed.message)

    async def _thaw_once(self, watch: asyncio.Task[None] | None) -> None:
        if watch is not None and self.expired:
            await watch
            return
        if watch is not None:
            await stop(watch)
        await self._thaw()

    async def _thaw(self) -> None:
        try:
            await self.release(patience=THAW_PATIENCE)
        except VMGone:
            self._vm.log.info("quiesced_vm_gone", how=self._how)
        except QmpCommitError as error:
            self._vm.log.warning("thaw_failed", how=self._how, error=error.message)
            self.failure = error
            raise
        finally:
            self.leave()

    def _too_long(self, limit: float | None) -> QmpCommitError:
        """What the body's end after the limit is: a thaw that failed is the worse news."""
        return self.failure or DeadlineExceeded(
            f"the guest of {self._vm.name} was quiesced for {limit:g} s, its limit, and goes on"
            " again; what was to be done meanwhile was cancelled. Repeat it with a larger limit,"
            " or do less while the guest stands still",
            vm=self._vm.name,
        )


@asynccontextmanager
async def quiesced(
    vm: Monitor,
    how: How | None,
    *,
    agent: str | os.PathLike[str] | None = None,
    limit: float = LIMIT,
    ledger: Notes | None = None,
    owner: str | None = None,
) -> AsyncIterator[Quiet]:
    """What `freeze` does, with the agent's socket, and a mark of this `owner` in QEMU."""
    check_how(how)
    if how == "agent" and agent is None:
        raise InvalidRequest(
            'how="agent" needs the socket of the guest agent (agents="/run/vms/web1/agent.sock")'
        )
    limit = parse_seconds(limit, "limit")
    if how is None:
        yield Quiet(how)
        return
    note = noted_in(ledger, vm, how, agent)
    async with Hold(vm, how, owner, agent=agent, note=note).within(limit) as hold:
        yield hold


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


def noted_in(
    ledger: Notes | None, vm: Monitor, how: How, agent: str | os.PathLike[str] | None
) -> Note | None:
    """Notes ``freeze`` and ``thaw``, with how that is done; None where there is no ledger."""
    noting = Noting.of(ledger, vm.log)
    if noting is None:
        return None
    facts: dict[str, Any] = {"how": how, "agent": None if agent is None else os.fspath(agent)}

    async def note(step: Step) -> None:
        if step == "hold":
            await noting.note("freeze", held=True, **facts)
        elif step == "release":  # a guest does not stay frozen because a disk is full
            await noting.note("thaw", held=True, anyway=True, **facts)

    return note
