"""Many disks, of one VM or of several, committed at one instant: all of them or none.

Each member is a commit of its own whose end QEMU holds back (``auto-finalize`` off). When all are
READY all are decided; QEMU then brings each to PENDING and holds its disk's I/O. When all are
held, all are finalized, as close together as can be; if one does not get there, all are cancelled
and QEMU undoes what was decided. `machine` is the machine, this drives it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, assert_never

from qmpcommit.callback import Failed, Notes, ask, going_up, said_of
from qmpcommit.commit.checks import check_override
from qmpcommit.commit.claim import let_go, take_for
from qmpcommit.commit.facts import Choice
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.objections import may_pivot, refuse_idle
from qmpcommit.commit.phases import Verdict
from qmpcommit.commit.policy import (
    Abort,
    AnyPolicy,
    AskedPolicy,
    Decision,
    Keep,
    Pivot,
    Settled,
    parse_policy,
)
from qmpcommit.commit.preconditions import ask_whether
from qmpcommit.commit.request import what_of_stale
from qmpcommit.errors import (
    CommitFailed,
    DeadlineExceeded,
    InvalidRequest,
    JobConflict,
    NotReady,
    QmpCommitError,
)
from qmpcommit.group import machine
from qmpcommit.group.book import GroupBook, options_noted, policy_noted
from qmpcommit.group.guests import Guests
from qmpcommit.group.machine import GroupAction, GroupFact, Stage
from qmpcommit.group.members import (
    GroupCommitOptions,
    Named,
    check_shared,
    member_of,
    override_of,
    policy_of,
    prepare_members,
    requested,
)
from qmpcommit.group.outcome import GroupOutcome, MemberEnd, error_of, outcome_of
from qmpcommit.group.policy import AskedGroupPolicy, Deciding
from qmpcommit.guest.hold import Hold, check_sockets, noted_in
from qmpcommit.guest.marks import mark_of_group, thaw_all_abandoned
from qmpcommit.guest.run_state import LIMIT, How
from qmpcommit.guest.sockets import Sockets
from qmpcommit.tasks import stop, to_the_end
from qmpcommit.units import parse_seconds

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.vm import VM

HOLD_LIMIT = 2.0
"""Seconds that disks may be held, if the caller does not say."""

OnDecision = Callable[[Sequence[str]], Awaitable[object]]
"""Awaited, with the jobs' ids, after all disks are held and before the first is finalized."""


class CommitGroupOptions(GroupCommitOptions, total=False):
    """What `commit_group` hands on to `GroupCommit`."""

    policy: AskedGroupPolicy | None
    hold_limit: float
    freeze: How | None
    on_decision: OnDecision | None
    known_as: str | None


class GroupCommit:
    """A group commit under way.

    `members` are `GroupMember`s or tuples of their beginning; give each its policy, or one
    `policy` to all, which is then asked once, when all are READY. Where one comes to `Abort` all
    are cancelled. `hold_limit` is for how many seconds disks may be held, and guests paused before
    that; `timeout` for how many all of it may take before it is cancelled; `only_if` is asked once,
    before anything is sent.
    `freeze` quiesces the guests of all its VMs for the instant, for ten seconds at most, from when
    all are READY until their own disks have ended: it freezes their file systems through their
    agents' sockets in `agents`, by their session ("agent"), or pauses their vCPUs ("pause"). All
    stand still before the first disk is held; if one can't be quiesced all are cancelled.
    `freeze_notes` are told of a VM's freeze and thaw before they are sent.
    `on_decision` is awaited while all disks are held, before the first job is finalized: what
    it writes down tells a recovery that they all have to be. With a `ledger` each step of all
    disks is noted in that one before it is taken, and ``qc.resume(ledger, vms)`` goes on where this
    was killed. Whatever these or a policy end with,
    or if one takes longer than `hold_limit`, all are cancelled, and it is the ``__cause__`` of the
    `GroupFailed` (`qmpcommit.callback` has the rule). `known_as` is the group's id (eight
    hexadecimal digits), by default a random one. `options` are those of `Session.commit`, for
    all members.

    ``await GroupCommit(...).run()`` is all of it; `start`, `ready`, `wait` are its parts, and
    `pivot`, `keep` and `abort` decide for a group whose policy is `Hold`.
    """

    def __init__(
        self,
        members: Iterable[Named],
        *,
        policy: AskedGroupPolicy | None = None,
        hold_limit: float = HOLD_LIMIT,
        freeze: How | None = None,
        agents: Sockets[Any] | None = None,
        freeze_notes: Mapping[VM, Notes] | None = None,
        on_decision: OnDecision | None = None,
        known_as: str | None = None,
        **options: Unpack[GroupCommitOptions],
    ) -> None:
        self.members = [member_of(member) for member in members]
        self.id = known_as or os.urandom(4).hex()
        self.jobs: tuple[CommitJob, ...] = ()
        self._policy = None if policy is None else parse_policy(policy)
        self._policies = [policy_of(member, self._policy) for member in self.members]
        once = requested(
            "", only_if=options.pop("only_if", None), timeout=options.pop("timeout", None)
        )
        self._only_if, self._timeout = once.only_if, once.timeout
        ledger = options.pop("ledger", None)
        self._options: dict[str, Any] = {**options}
        self._on_decision = on_decision
        self._check_members(agents or {}, freeze)
        self.book = None if ledger is None else self._noted_in(ledger)
        hold_limit = parse_seconds(hold_limit, "hold limit")
        self.state = machine.begin(
            len(self.members),
            hold_limit,
            freezes=freeze is not None,
            records=on_decision is not None or ledger is not None,
        )
        self._freeze, self._agents = freeze, dict(agents or {})
        self._freeze_notes = self.book.freezes() if self.book is not None else freeze_notes or {}
        self._freezes = Guests(LIMIT, self._is_quiet, self._is_not_quiet)
        self._pauses = Guests(None, lambda vm: None, self._is_not_paused)
        self._decisions: dict[int, Settled] = {}
        self._asking: asyncio.Task[None] | None = None
        self._following: list[asyncio.Task[None]] = []
        self._recording: asyncio.Task[None] | None = None
        self._pausing: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._subscriptions: list[Any] = []
        self._deciding = Deciding(self._policy, self._policies, self._decided, self._policy_failed)
        self._gate = asyncio.Event()
        self._refusal: str | None = None
        self._late = self._told = False
        self._cause: BaseException | None = None
        self._by = ""

    def __repr__(self) -> str:
        over = ", ".join(f"{member.disk} of {member.vm.name}" for member in self.members)
        return f"<GroupCommit {self.id} over {over}, {self.state.stage.value}>"

    def _check_members(self, agents: Sockets[Any], freeze: How | None) -> None:
        if not self.members:
            raise InvalidRequest("a group commit needs at least one disk")
        check_sockets(freeze, (member.vm for member in self.members), dict(agents))
        check_shared(self._policy, len(self.members))
        self._check_options()

    def _noted_in(self, ledger: Ledger) -> GroupBook:
        """Have each member's steps noted in the one ledger of the group."""
        if any(member.options.get("ledger") is not None for member in self.members):
            raise InvalidRequest("give the group a ledger, or each of its disks its own, not both")
        book = GroupBook(ledger, self.members, self.id)
        self.members = [
            member._replace(options={**member.options, "ledger": book.of(number)})
            for number, member in enumerate(self.members)
        ]
        return book

    async def _begin_notes(self) -> None:
        """What is asked is noted before anything is sent; raises `CommitFailed`."""
        if self.book is None:
            return
        asked = {
            "policy": policy_noted(self._policy),
            "asks": self._policy is not None and not isinstance(self._policy, AnyPolicy),
            "policies": None if self._policy else [policy_noted(each) for each in self._policies],
            "options": [options_noted(member, self._options) for member in self.members],
            "hold_limit": self.state.hold_limit,
            "freeze": self._freeze,
            "agents": {
                self.book.keys[vm]: os.fspath(agent)
                for vm, agent in self._agents.items()
                if vm in self.book.keys
            },
            "timeout": self._timeout,
            "only_if": None if self._only_if is None else list(self._only_if),
            "since": time.time(),
        }
        try:
            await self.book.begin(self.members, asked)
        except CommitFailed as error:
            vms = ", ".join(self.book.keys.values())
            raise CommitFailed(
                f"the group commit over {vms} did not begin: {error.message}. Nothing was sent",
                error=error.error,
            ) from error.__cause__

    def _check_options(self) -> None:
        """Refuse what would have no effect: on a member, or on any where it is asked of all."""
        policies = [self._policy or own for own in self._policies]
        for asked, concerned in (
            (self._options, policies),
            *((m.options, [policy]) for m, policy in zip(self.members, policies, strict=True)),
        ):
            stale = what_of_stale(bool(asked.get("delete")), asked.get("stale"))
            reached = next(filter(may_pivot, concerned), concerned[0])
            refuse_idle(reached, stale=stale, on_pivot=asked.get("on_pivot"))
            check_override(asked.get("override") or ())

    # -- what a caller sees -----------------------------------------------------------------------

    async def run(self, at_ready: Callable[[], object] | None = None) -> GroupOutcome:
        """From start to end; a cancellation cancels all jobs first. Raises what `wait` raises.

        `at_ready` is called when all are READY.
        """
        await self.start()
        return await self._see_through(at_ready)

    async def _see_through(self, at_ready: Callable[[], object] | None = None) -> GroupOutcome:
        try:
            if at_ready is not None:
                await self.ready()
                try:
                    at_ready()
                except BaseException:
                    await to_the_end(self.abandon("who was told that all are READY failed"))
                    raise
            return await self.wait()
        except asyncio.CancelledError:
            await to_the_end(self.abandon("interrupted"))
            raise

    async def start(self) -> None:
        """Check all, then send all; if one is refused the others are cancelled.

        Raises what `Session.commit` raises. If this is cancelled, so are the jobs.
        """
        if self._timeout is not None:
            self._call_later(self._timeout, self._time_is_up)
        jobs: tuple[CommitJob, ...] = ()
        try:
            await self._thaw_abandoned()
            jobs = await self.prepare()
            await self._claim(jobs)
            if self._only_if is not None:
                await ask_whether(self._only_if, jobs[0].plan)
            if self._late:
                raise DeadlineExceeded(f"{self.state.why}, so nothing was sent")
            await self._begin_notes()
            self.jobs = jobs
            await self._launch()
        except BaseException:
            await to_the_end(self.abandon("one of its jobs could not be started"))
            await let_go(*jobs)
            raise
        if self.state.stage is Stage.CANCELLING:
            self._cancel(self.state.why)  # those too that were not there before

    async def ready(self) -> None:
        """Wait until all members are READY; raises what `wait` raises where one gets not there."""
        for job in self.jobs:
            if not await job.reached():
                await self.wait()  # which raises what came of all of them

    async def wait(self) -> GroupOutcome:
        """The outcome, where all ended as decided.

        Raises `GroupFailed` where all were cancelled because one of them failed or the hold took
        too long, `DeadlineExceeded` likewise, `GroupSplit` where a QEMU was lost after the
        decision. Cancelling the wait cancels nothing: see `abandon`.
        """
        await asyncio.wait(self._following)
        await self._clear()
        finalized = self.state.stage is Stage.OVER and not self.state.why and not self._refusal
        ends = self.ends
        error = error_of(
            ends,
            why=self.state.why or self._refusal or "",
            culprit=self.state.culprit,
            finalized=finalized,
            timeout=self._timeout if self._late else None,
            problems=[*self._pauses.problems, *self._freezes.problems],
        )
        meant = self._meant_to_abort and all(end.outcome is not None for end in ends)
        if error is not None and (finalized or not meant or not _none_done(ends)):
            if self._cause is not None:
                error.__cause__ = self._cause
            if self._stood_still:
                error.add(quiesced=max(self._stood_still.values()))
            await self._note_end(error=error.as_json())
            raise going_up(error)
        outcome = self._outcome(ends)
        self._tell_of_warnings(outcome)
        await self._note_end(outcome=outcome.model_dump(mode="json"))
        return outcome

    def _tell_of_warnings(self, outcome: GroupOutcome) -> None:
        """Log once what the jobs have not: each of them logs its own."""
        told = {warning for job in self.jobs if job.outcome for warning in job.outcome.warnings}
        log = self.members[0].vm.log.bind(group=self.id)
        for warning in outcome.warnings if not self._told else ():
            if warning not in told:
                log.warning("outcome_warning", warning=warning)
        self._told = True

    async def _note_end(self, **how: Any) -> None:
        """It is over, unless somebody has to look at a job whose monitor was lost."""
        lost = (Verdict.MONITOR_LOST, None)
        if self.book is not None and all(job.state.verdict not in lost for job in self.jobs):
            for vm, seconds in self._stood_still.items():
                self.book.goes_on_again(self.book.keys[vm], seconds)
            await self.book.end(**how)

    def pivot(self) -> None:
        """Decide for the bases, at once; raises `NotReady` or `JobConflict`, as a job does."""
        self._call(Pivot())

    def keep(self) -> None:
        """Decide for the overlays; as `pivot`."""
        self._call(Keep())

    def abort(self) -> None:
        """Cancel all jobs by force, unless they are being finalized already."""
        self._by = self._by or "caller"
        self._tell(machine.Stop("it was aborted"))

    async def abandon(self, why: str) -> None:
        """Cancel all jobs, unless they are being finalized, and see them end; bounded in time."""
        self._tell(machine.Stop(why))
        await asyncio.gather(*(job.abandon() for job in self.jobs))
        if self._following:
            await asyncio.wait(self._following)
        await self._clear()
        await self._note_end()

    # -- start ------------------------------------------------------------------------------------

    async def _thaw_abandoned(self) -> None:
        """A guest that a killed run has left frozen can't be frozen again."""
        if self._freeze is not None:
            await thaw_all_abandoned({member.vm for member in self.members}, self._agents)

    async def prepare(self) -> tuple[CommitJob, ...]:
        """Check all members, and send nothing; raises what `start` raises before that."""
        return await prepare_members(
            self.members, self._policies, self._options, group=self.id, meet=self._meet
        )

    async def _claim(self, jobs: Sequence[CommitJob]) -> None:
        """All disks are ours before the first job is sent."""
        # That all of it is on this VM its claims tell: whoever finds some of it knows the rest.
        tag = self.id if len({member.vm for member in self.members}) == 1 else ""
        for member, job in zip(self.members, jobs, strict=True):
            override = override_of(member, self._options)
            await take_for(member.vm, job, "group", override=override, tag=tag)

    async def _launch(self) -> None:
        self._watch_links()
        starting = [
            asyncio.create_task(member.vm.launch(job, override=override_of(member, self._options)))
            for member, job in zip(self.members, self.jobs, strict=True)
        ]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                await stop(task)  # which cancels its job
            raise
        self._follow_all()

    def _watch_links(self) -> None:
        for vm in dict.fromkeys(member.vm for member in self.members):
            link = partial(self._link, vm)
            self._subscriptions.append(vm.subscribers.add(lambda message: None, link))

    def _follow_all(self) -> None:
        self._following = [
            asyncio.create_task(self._follow(number), name=f"member {job.id}")
            for number, job in enumerate(self.jobs)
        ]
        self._asking = asyncio.create_task(self._deciding.ask(self.jobs), name=f"group {self.id}")

    # -- the members ------------------------------------------------------------------------------

    async def _follow(self, number: int) -> None:
        """One member's end."""
        await self.jobs[number].ended()
        self._tell(machine.Ended(number))

    async def _meet(self, number: int) -> str | None:
        """The barrier: this member's disk is held; wait for the others."""
        self._tell(machine.Pending(number))
        await self._gate.wait()
        return self._refusal

    def _link(self, vm: VM, up: bool) -> None:
        for number, member in enumerate(self.members):
            if member.vm is vm:
                self._tell(machine.Back(number) if up else machine.Lost(number))

    def _decided(self, number: int, settled: Settled) -> None:
        self._by = settled.by
        self._decisions[number] = settled
        if isinstance(settled.decision, Abort):
            self._tell(machine.Stop("it was aborted"))
        else:
            self._tell(machine.Ready(number))

    def _policy_failed(self, error: BaseException) -> None:
        self._cause = error
        self._tell(machine.Stop(f"the policy failed ({said_of(error)})"))

    def check_ready(self) -> None:
        """Raises `NotReady` or `JobConflict` where nothing can be decided now."""
        decided = self._deciding.called or len(self._decisions) == len(self.members)
        if self.state.stage is not Stage.GATHERING or decided:
            raise JobConflict(f"the group commit {self.id} is decided already, or has ended")
        if not self.jobs or not all(job.state.phase.value == "ready" for job in self.jobs):
            raise NotReady(
                f"the group commit {self.id} is not READY: not all of its disks are copied yet."
                " It goes on; decide again when all are"
            )

    def _call(self, decision: Decision) -> None:
        self.check_ready()
        self._deciding.call(decision)

    # -- the machine ------------------------------------------------------------------------------

    def _tell(self, fact: GroupFact) -> None:
        loop = asyncio.get_running_loop()
        before = self.state
        self.state, actions = machine.step(before, fact, loop.time())
        if self.state.deadline is not None and before.deadline is None:
            left = self.state.deadline - loop.time()
            self._call_later(left, partial(self._tell, machine.Tick()))
        for action in actions:
            match action:
                case GroupAction.QUIESCE:
                    self._quiesce()
                case GroupAction.DECIDE:
                    self._decide()
                case GroupAction.RECORD:
                    self._record()
                case GroupAction.FINALIZE:
                    self._gate.set()
                case GroupAction.CANCEL:
                    self._cancel(self.state.why)
                case _:
                    assert_never(action)

    def _recycles(self) -> dict[VM, list[CommitJob]]:
        """The jobs that are to be recycled, of each VM that has such."""
        recycles: dict[VM, list[CommitJob]] = {}
        for number, settled in self._decisions.items():
            if settled.decision.leaves == "fresh":
                recycles.setdefault(self.members[number].vm, []).append(self.jobs[number])
        return recycles

    def _quiesce(self) -> None:
        guests: dict[VM, list[CommitJob]] = {}
        for member, job in zip(self.members, self.jobs, strict=True):
            guests.setdefault(member.vm, []).append(job)
        # Their recycles pause these anyway, before the first disk is held, and for longer.
        paused = [vm for vm in self._recycles() if self._freeze == "pause"]
        # Before its file systems are thawed, a guest that a recycle has paused has to go on.
        holds = {vm: self._hold(vm) for vm in guests if vm not in paused}
        self._freezes.begin(holds, guests, self._pauses.goes_on)
        for vm in paused:
            self._is_quiet(vm)

    def _hold(self, vm: VM) -> Hold:
        assert self._freeze is not None
        how, agent = self._freeze, self._agents.get(vm)
        note = noted_in(self._freeze_notes.get(vm), vm, how, agent)
        return Hold(vm, how, mark_of_group(self.id), agent=agent, note=note)

    def _is_quiet(self, vm: VM) -> None:
        for number, member in enumerate(self.members):
            if member.vm is vm:
                self._tell(machine.Quiesced(number))

    def _is_not_quiet(self, vm: VM, why: str, error: Exception | None) -> None:
        if self.state.stage in (Stage.FREEZING, Stage.DECIDED):
            self._cause = error
        if self.state.stage in (Stage.RECORDING, Stage.FINALIZING) and error is None:
            told = "before all of its disks had ended. They show the one instant all the same"
            self._freezes.problems.append(f"{vm.name}: {why}, {told}")
        first = next(n for n, member in enumerate(self.members) if member.vm is vm)
        self._tell(machine.NotQuiesced(first, why))

    def _is_not_paused(self, vm: VM, why: str, error: Exception | None) -> None:
        self._tell(machine.Stop(f"a guest could not be paused ({error})"))

    def _decide(self) -> None:
        recycles = self._recycles()
        if recycles:
            self._pausing = asyncio.ensure_future(self._pause_first(recycles))
        else:
            self._send_decisions()

    async def _pause_first(self, recycles: Mapping[VM, Sequence[CommitJob]]) -> None:
        limit = self.state.hold_limit
        late = f"not all disks could be held within {limit:g} s of the guests' pause"
        # A paused guest waits as one does whose disk is held, and for no longer.
        self._call_later(limit, partial(self._tell, machine.Stop(late)))
        try:
            await self._pauses.pause(recycles, mark_of_group(self.id))
        except Exception as error:  # a ledger's own too
            self._tell(machine.Stop(f"a guest could not be paused ({error})"))
        if self.state.stage is Stage.DECIDED:
            self._send_decisions()

    def _send_decisions(self) -> None:
        for number, job in enumerate(self.jobs):
            job.decide(*self._decisions[number])

    def _record(self) -> None:
        self._recording = asyncio.ensure_future(self._written_down())

    async def _written_down(self) -> None:
        """Have the decision written down before the first job is finalized; or cancel all."""
        jobs = [job.id for job in self.jobs]
        try:
            if self._on_decision is not None:
                await ask(self._on_decision, jobs, limit=self.state.hold_limit)
            if self.book is not None:
                await self.book.finalize(self._by)
        except (Failed, CommitFailed) as failed:
            self._cause = failed.cause if isinstance(failed, Failed) else failed.__cause__
            self._tell(machine.Recorded(str(failed)))
        else:
            await self._tell_ended_meanwhile()
            self._tell(machine.Recorded())

    async def _tell_ended_meanwhile(self) -> None:
        """Another client may have cancelled a member, and its end be unheard (``query-jobs``)."""
        vms = list(dict.fromkeys(member.vm for member in self.members))
        try:
            async with asyncio.timeout(self.state.hold_limit):
                answers = await asyncio.gather(*(vm.query_jobs() for vm in vms))
        except (QmpCommitError, TimeoutError):
            return  # a monitor that is lost now has its members looked up when it is back
        pending = {
            (vm, job.id)
            for vm, jobs in zip(vms, answers, strict=True)
            for job in jobs
            if job.status == "pending"
        }
        for number, (member, job) in enumerate(zip(self.members, self.jobs, strict=True)):
            if (member.vm, job.id) not in pending:
                self._tell(machine.Ended(number))

    def _cancel(self, why: str) -> None:
        self._refusal = why
        by = self._by if self._meant_to_abort else "group"
        for job in self.jobs:
            if not job.done:
                job.decide(Abort(), by)
        self._gate.set()
        self._freezes.give_up()
        self._pauses.give_up()
        if self._asking is not None:
            self._asking.cancel()

    @property
    def _meant_to_abort(self) -> bool:
        """Whether a policy or the caller wanted no end."""
        aborts = any(isinstance(each.decision, Abort) for each in self._decisions.values())
        return self.state.why == "it was aborted" and (aborts or self._by == "caller")

    def _time_is_up(self) -> None:
        self._late = True
        self._tell(machine.Stop(f"it did not end within {self._timeout:g} s"))

    def _call_later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(max(0.0, seconds), call))

    async def _clear(self) -> None:
        """Leave nothing behind."""
        for timer in self._timers:
            timer.cancel()
        for subscription in self._subscriptions:
            subscription.close()
        for task in (self._asking, self._recording, self._pausing):
            if task is not None:
                await stop(task)
        await self._pauses.over()
        await self._freezes.over()

    def _outcome(self, ends: Sequence[MemberEnd]) -> GroupOutcome:
        paused = self._pauses.seconds
        quiesced = self._stood_still
        ends = [
            end._replace(
                outcome=replace(
                    end.outcome,
                    guest_paused=paused.get(member.vm, end.outcome.guest_paused),
                    quiesced=quiesced.get(member.vm),
                )
            )
            if end.outcome is not None
            else end
            for member, end in zip(self.members, ends, strict=True)
        ]
        outcome = outcome_of(self.id, ends, by=self._by)
        noted = self.book.problems if self.book is not None else ()
        warnings = [*self._pauses.problems, *self._freezes.problems, *noted, *outcome.warnings]
        return replace(outcome, warnings=warnings)

    @property
    def _stood_still(self) -> dict[VM, float]:
        """For how many seconds the guests were quiesced that go on again, where that was asked."""
        if self._freeze == "pause":  # also who was paused for a recycle
            return {**self._pauses.seconds, **self._freezes.seconds}
        return dict(self._freezes.seconds)

    @property
    def ends(self) -> list[MemberEnd]:
        """How each member has ended, as far as it has."""
        return [self._end(number) for number in range(len(self.jobs))]

    def _end(self, number: int) -> MemberEnd:
        job = self.jobs[number]
        settled = self._decisions.get(number)
        return MemberEnd(
            plan=job.plan,
            state=job.state,
            timings=job.timings,
            outcome=job.outcome,
            error=job.error,
            choice=Choice(settled.decision.kind) if settled is not None else None,
        )


def _none_done(ends: Sequence[MemberEnd]) -> bool:
    return all(end.done() is False for end in ends)


NamedAnywhere: TypeAlias = (
    Named
    | tuple[str | os.PathLike[str], str]
    | tuple[str | os.PathLike[str], str, AskedPolicy | None]
    | tuple[str | os.PathLike[str], str, AskedPolicy | None, Mapping[str, Any]]
)
"""The same with a monitor's address in the place of a session."""


async def commit_group(
    members: Iterable[NamedAnywhere] | Mapping[tuple[Any, str], AskedPolicy],
    *,
    agents: Sockets[Any] | None = None,
    **options: Unpack[CommitGroupOptions],
) -> GroupOutcome:
    """Commit disks of several VMs at one instant: all of them or none.

    `members` are tuples of a session (or a monitor's address, which is connected for it), a disk
    and, unless one `policy` is given to all, a policy, which a mapping gives to ``(vm, disk)`` as
    well; `agents` has the guest agents' sockets by these sessions or addresses. `options` are those
    of `GroupCommit`. Raises what `GroupCommit.start` and `GroupCommit.wait` raise; a cancellation
    cancels all.
    """
    from qmpcommit.commit.vm import VM

    async with AsyncExitStack() as stack:
        opened: dict[str, VM] = {}
        named = []
        if isinstance(members, Mapping):
            members = [(*member_of(place)[:2], policy) for place, policy in members.items()]
        for member in map(member_of, members):
            vm: Any = member.vm
            if not isinstance(vm, VM):
                if not isinstance(vm, (str, os.PathLike)):
                    raise InvalidRequest(f"{vm!r} is no session, and no monitor's address")
                address = os.fspath(vm)
                if address not in opened:
                    opened[address] = await stack.enter_async_context(VM.connect(address))
                vm = opened[address]
            named.append(member._replace(vm=vm))
        sockets: dict[Any, str | os.PathLike[str]] = {
            vm if isinstance(vm, VM) else opened.get(os.fspath(vm), vm): socket
            for vm, socket in (agents or {}).items()
        }
        return await GroupCommit(named, agents=sockets, **options).run()
