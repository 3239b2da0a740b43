"""A group whose process died is settled: all of its jobs are finalized, or all are cancelled.

Each by itself, over losses of its VM. Guests that stand still go on before anything else; but those
whose disks are recycled and finalized when all of their fresh overlays lie.

Rests on ``query-jobs``, and on what `thaw` and `unmark` rest on.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.ledger import files_of, load_state, plan_of, resumed_of
from qmpcommit.commit.outcome import Timings
from qmpcommit.commit.phases import State, Verdict
from qmpcommit.commit.policy import Hold
from qmpcommit.commit.resuming import repay
from qmpcommit.commit.stale_layers import Barrier
from qmpcommit.errors import (
    CommandRefused,
    ConnectError,
    DeadlineExceeded,
    MonitorLost,
    QmpCommitError,
    VMGone,
)
from qmpcommit.group.noted import NotedGroup, NotedMember, Shown, Way, resume, shown_of
from qmpcommit.group.outcome import GroupOutcome, MemberEnd, error_of, outcome_of
from qmpcommit.guest.marks import mark_of_group, unmark
from qmpcommit.guest.run_state import HOW, THAW_PATIENCE, How, go_on, thaw
from qmpcommit.qmp.process import is_same, process_identity
from qmpcommit.tasks import stop, to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM
    from qmpcommit.group.book import Book
    from qmpcommit.log import Log

HEAD_START = 0.2
"""Seconds that a guest's thaw gets before the jobs are ended that hold its disks."""

LAST_WORD = 0.5
"""Seconds that a guest's QEMU gets to let it go on where nobody waits any more."""

_AWAY = (ConnectError, MonitorLost, VMGone)
_UNSEEN = (Verdict.VM_GONE, Verdict.MONITOR_LOST)


class Settling(ABC):
    """Settles one group, once or again, as its `book` says; its subclasses know where its VMs are.

    `problems` are for people to read, beside its end; `shown` is what was seen of its members, and
    `undone` that they are cancelled although all were to be finalized: one had been cancelled by
    somebody before the first was. `called` is what held the disks, and `key` what the notes call a
    VM.
    """

    called: ClassVar[str]

    def __init__(
        self, known_as: str, book: Book, log: Log, freeze: How | None, agents: Mapping[str, Any]
    ) -> None:
        self.book, self.log, self._known_as = book, log, known_as
        self._freeze, self._agents = freeze, agents
        self._numbers: dict[str, list[int]] = {}
        self._settled: dict[int, asyncio.Event] = {}
        self._paused: dict[str, float] = {}
        self.undone = False
        self.shown: list[Shown] = []
        self.problems: list[str] = []

    @abstractmethod
    async def _jobs(self, key: str) -> tuple[str, list[dict[str, Any]]] | None:
        """Which process answers for a VM, and its ``query-jobs``; None where it can't be asked."""

    @abstractmethod
    def _reach(self, key: str) -> AbstractAsyncContextManager[VM]:
        """Hold on to a VM; raises `ConnectError` or `MonitorLost` where it is away."""

    @abstractmethod
    async def _back(self, number: int, error: QmpCommitError) -> None:
        """Wait until a member's VM is back; raises its commit's end where it does not come."""

    @abstractmethod
    def _hooks(self, number: int) -> Mapping[str, Any]:
        """What `VM.resume` is to be given for a member beside what was noted."""

    # -- the way ----------------------------------------------------------------------------------

    @property
    def noted(self) -> NotedGroup:
        """As the book has it; less that all are to be finalized, where that can't be."""
        noted = self.book.as_noted
        return noted._replace(finalize=False) if self.undone else noted

    @property
    def finalizes(self) -> bool:
        """Whether all jobs are to be finalized, and can be as far as was seen."""
        return bool(self.book.noted.get("finalize")) and self.noted.finalizes

    async def way(self, *, look: bool = False) -> Way:
        """How it goes on: by its notes alone where these are enough, unless it is to `look`."""
        noted = self.noted
        many = len(noted.members)
        way = resume(noted, [Shown.AWAY] * many)
        if not look and way is resume(noted, [Shown.NOTHING] * many):
            return way
        keys = list(dict.fromkeys(member.vm for member in noted.members))
        listed = dict(zip(keys, await asyncio.gather(*map(self._jobs, keys)), strict=True))
        self.shown = [_shown(member, listed[member.vm]) for member in noted.members]
        way = resume(self.noted, self.shown)
        if self.finalizes and way is Way.CANCEL:
            shown = [each.name for each in self.shown]
            self.log.warning("cancelled_before", shown=shown)
            self.undone = True  # whatever is seen of it later
        return way

    # -- the jobs ---------------------------------------------------------------------------------

    async def settle(self, way: Way) -> list[MemberEnd]:
        """End all jobs that were begun: finalize them, or cancel them; and let the guests go on.

        Whoever cancels it leaves the jobs as they are, and no guest paused, as far as can be.
        """
        self.log.info("settling", finalize=way is Way.FINALIZE)
        members = self.noted.members
        self._settled = {n: asyncio.Event() for n, member in enumerate(members) if member.begun}
        waiting = {m.vm for m in members if m.begun and m.recycles and way is Way.FINALIZE}
        guests = self._letting_go(members, waiting)
        jobs: list[asyncio.Task[MemberEnd]] = []
        try:
            if first := [going for key, going in guests.items() if key not in waiting]:
                # First of all; but a thaw may write to a disk that is held, and waits for it then.
                await asyncio.wait(first, timeout=HEAD_START)
            for number in self._settled:
                settling = self._settle_one(number, members[number].vm, way)
                jobs.append(asyncio.create_task(settling))
            ends = await asyncio.gather(*jobs)
            await asyncio.gather(*guests.values())
        finally:
            await asyncio.gather(*map(stop, (*jobs, *guests.values())))
        stood = self.book.as_noted.quiesced
        return [
            _stood_still(end, self._paused.get(key), stood.get(key))
            for number, end in zip(self._settled, ends, strict=True)
            for key in [members[number].vm]
        ]

    async def _settle_one(self, number: int, key: str, way: Way) -> MemberEnd:
        """One member, by itself."""
        settled = self._settled[number]
        if way is Way.FINALIZE and _is_settled(load_state(self.book.member(number)["state"])):
            settled.set()
        try:
            while True:
                try:
                    async with self._reach(key) as vm:
                        end = await self._attempt(vm, number, way)
                except QmpCommitError as error:  # its VM went away just now
                    end = self._noted_end(number, way, error)
                if not isinstance(end.error, _AWAY):
                    return end
                try:
                    await self._back(number, end.error)
                except QmpCommitError as error:
                    return end._replace(error=error)
        finally:
            settled.set()

    async def _attempt(self, vm: VM, number: int, way: Way) -> MemberEnd:
        job = await self.take_up(vm, number, way=way)
        settling = asyncio.create_task(self._tell_when_settled(job, number))
        try:
            await job.ended()
            await settling
        finally:
            await stop(settling)
            if not job.done:
                await job.detach()
        state = job.state
        return MemberEnd(job.plan, state, job.timings, job.outcome, job.error, state.ordered)

    async def _tell_when_settled(self, job: CommitJob, number: int) -> None:
        await job.settled()
        if _is_settled(job.state):
            self._settled[number].set()

    async def take_up(
        self, vm: VM, number: int, barrier: Barrier | None = None, *, way: Way = Way.FOLLOW
    ) -> CommitJob:
        """One member that was begun; one that is followed stays READY until its group decides."""
        noted, ledger = self.book.member(number), self.book.of(number)
        resumed = resumed_of(noted, same_vm=_is_same(vm, noted), alone=False)
        resumed = resumed._replace(undoes=way is Way.CANCEL, finalizes=way is Way.FINALIZE)
        await repay(vm, noted, ledger)
        more = {**self._hooks(number), "ledger": ledger}
        plan = plan_of(noted, Hold())
        return await vm.resume(plan, resumed, files=files_of(noted), barrier=barrier, **more)

    def _noted_end(self, number: int, way: Way, error: QmpCommitError) -> MemberEnd:
        """Of one whose job could not be taken up."""
        noted = self.book.member(number)
        resumed = resumed_of(noted, same_vm=None, alone=False)
        state, times = resumed.state, Timings(**resumed.times)
        if way is Way.FINALIZE and state.running:  # `relieve` may have done so, which notes nothing
            state = state._replace(barrier=state.barrier._replace(prepared=True))
        return MemberEnd(plan_of(noted, Hold()), state, times, None, error, state.ordered)

    # -- the guests -------------------------------------------------------------------------------

    async def guests_go_on(self, *, still: bool = False) -> None:
        """Let all guests go on; with `still` those only that stand still, by what was noted."""
        going = self._letting_go(self.noted.members, still=still).values()
        try:
            await asyncio.gather(*going)
        finally:
            await asyncio.gather(*map(stop, going))

    def _letting_go(
        self, members: Sequence[NotedMember], waiting: Collection[str] = (), *, still: bool = False
    ) -> dict[str, asyncio.Task[None]]:
        """By their VMs; those that are `waiting` go on when their disks are settled."""
        begun = [m for m in members if m.begun and (m.noted.get("stopped") or not still)]
        return {
            key: asyncio.create_task(self._goes_on(key, waits=key in waiting))
            for key in dict.fromkeys([*(member.vm for member in begun), *self.book.frozen])
        }

    async def relieve(self, key: str, vm: VM) -> None:
        """First of all on a VM that was just connected: its guest goes on, what is held is ended.

        For whoever settles, or is about to; it returns within a second or so. Raises what
        `Monitor.execute` raises.
        """
        if self.finalizes:
            await self.way()
        going = asyncio.create_task(self._goes_on_at_once(key, vm))
        try:
            await asyncio.wait([going], timeout=HEAD_START)
            await self._end_held(key, vm)
            await going
        finally:
            await stop(going)

    async def _goes_on_at_once(self, key: str, vm: VM) -> None:
        mine = self._mine(key).values()
        waits = any(member.recycles for member in mine) and self.finalizes
        if waits or not (mine or key in self.book.frozen):
            return
        try:
            await self._let_go_on(key, vm, patience=0.0)
        except QmpCommitError as error:  # who settles it tries it again
            self.log.warning("thaw_failed", vm=vm.name, error=error.message)

    async def _end_held(self, key: str, vm: VM) -> None:
        jobs = await vm.execute("query-jobs")
        held = {str(job.get("id")) for job in jobs if job.get("status") == "pending"}
        mine = {member.noted["plan"]["job_id"] for member in self._mine(key).values()}
        order = "job-finalize" if self.finalizes else "job-cancel"
        for job_id in sorted(held & mine):
            self.log.warning("held_its_disk", vm=vm.name, job=job_id, sending=order)
            with suppress(CommandRefused):  # somebody else was first
                await vm.execute(order, {"id": job_id})

    def _mine(self, key: str) -> dict[int, NotedMember]:
        """The members of a VM that were begun, by their numbers."""
        if not self._numbers:
            for number, member in enumerate(self.noted.members):
                self._numbers.setdefault(member.vm, []).append(number)
        mine = {number: NotedMember(key, self.book.member(number)) for number in self._numbers[key]}
        return {number: member for number, member in mine.items() if member.begun}

    async def _goes_on(self, key: str, *, waits: bool) -> None:
        """One guest, over losses of its VM."""
        since = asyncio.get_running_loop().time()
        try:
            for number in self._mine(key):
                if waits:
                    await self._settled[number].wait()
            while True:
                try:
                    async with self._reach(key) as vm:
                        await self._let_go_on(key, vm, since=since)
                    return
                except _AWAY as error:
                    away = error
                try:
                    await self._back(self._numbers[key][0], away)
                except QmpCommitError as error:
                    if error is away and not isinstance(error, VMGone):
                        raise  # nobody knows
                    self.book.goes_on_again(key)  # with its QEMU the guest has gone
                    return
        except QmpCommitError as error:
            self.log.warning("thaw_failed", vm=key, error=error.message)
            self.problems.append(error.message)
        except asyncio.CancelledError:
            await to_the_end(self._last_word(key))
            raise

    async def _last_word(self, key: str) -> None:
        if any(member.noted.get("stopped") for member in self._mine(key).values()):
            with suppress(QmpCommitError, TimeoutError):
                async with asyncio.timeout(LAST_WORD), self._reach(key) as vm:
                    await self._let_go_on(key, vm)

    async def _let_go_on(
        self, key: str, vm: VM, *, patience: float = THAW_PATIENCE, since: float | None = None
    ) -> None:
        """One that stands still for this group, if it does; safe to repeat."""
        loop = asyncio.get_running_loop()
        paused = [
            number
            for number, member in self._mine(key).items()
            if member.noted.get("stopped") and _is_same(vm, member.noted) is not False
        ]
        if paused:
            try:
                remark = await go_on(vm)
            except DeadlineExceeded as error:
                vm.drop()  # it is silent
                raise MonitorLost(error.message) from error
            if remark:
                self.log.warning("guest_stays_paused", vm=vm.name, why=remark)
                self.problems.append(remark)
            for number in paused:
                with suppress(Exception):  # it goes on, and is continued again at the worst
                    await self.book.of(number).note("cont")
            if since is not None:
                self._paused[key] = loop.time() - since
                if self._freeze == "pause":
                    self.book.goes_on_again(key, self._paused[key])
        guest = self.book.frozen.get(key)
        if guest is not None:
            self.log.warning("guest_left_frozen", vm=vm.name, how=guest.how)
        if guest is not None and not guest.is_gone(vm):
            agent = self._agents.get(key) or guest.agent
            await thaw(vm, guest.how, agent, patience=patience, ran=True)
            self.book.goes_on_again(key, time.time() - guest.since)
        elif guest is not None:
            self.book.goes_on_again(key)  # with its QEMU the guest has gone
        for how in HOW:  # a mark is set before anything is noted, and stays until all is
            await unmark(vm, mark_of_group(self._known_as), how)

    # -- the end ----------------------------------------------------------------------------------

    def end_of(
        self, way: Way, ends: Sequence[MemberEnd], wanted: str
    ) -> GroupOutcome | QmpCommitError:
        """What the group came to that was settled; `wanted` is who wanted no end."""
        finalized = way is Way.FINALIZE
        complete = len(ends) == len(self.noted.members)
        statuses = {end.outcome.status if end.outcome is not None else None for end in ends}
        done = statuses == {"completed"}
        if complete and (done or (wanted and statuses == {"cancelled"})):
            by = self.book.as_noted.by or "another client" if done else wanted
            return outcome_of(self._known_as, ends, by=by)
        why = ""
        if not finalized:
            why = f"the {self.called} that held its disks ended before all were decided"
        error = error_of(ends, why=why, culprit=None, finalized=finalized, problems=self.problems)
        assert error is not None
        return error


def _shown(member: NotedMember, listed: tuple[str, list[dict[str, Any]]] | None) -> Shown:
    """What QEMU shows of a member."""
    if listed is None:
        return Shown.AWAY
    identity, jobs = listed
    if not member.begun:
        return Shown.NOTHING
    if is_same(member.noted.get("identity", ""), identity) is False:
        return Shown.GONE
    job_id = member.noted["plan"]["job_id"]
    return shown_of(next((job for job in jobs if job.get("id") == job_id), None))


def _is_settled(state: State) -> bool:
    """Whether QEMU has done its part, seen with one's own eyes."""
    return state.finished and state.verdict not in _UNSEEN


def _is_same(vm: VM, noted: Mapping[str, Any]) -> bool | None:
    return is_same(noted.get("identity", ""), process_identity(vm.peer_pid))


def _stood_still(end: MemberEnd, paused: float | None, quiesced: float | None) -> MemberEnd:
    """The end of one, with for how long its guest was seen to wait."""
    outcome = end.outcome
    if outcome is None:
        return end
    if outcome.action == "recycle" and paused is not None:
        outcome = replace(outcome, guest_paused=paused)
    return end._replace(outcome=replace(outcome, quiesced=quiesced))
