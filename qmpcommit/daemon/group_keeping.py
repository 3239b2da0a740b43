"""Keeps one group: drives it, waits for its VMs, settles it after a restart, and journals its end.

It is settled as one that goes on from a ledger: its row is its `Book`. One that is cancelled since
nobody could follow it is begun again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from qmpcommit.commit.request import DiskOptions
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.keeping import error_dict
from qmpcommit.daemon.promised_group import Group
from qmpcommit.errors import (
    ConnectError,
    DeadlineExceeded,
    MonitorLost,
    QmpCommitError,
    VMGone,
)
from qmpcommit.group.book import FreezeNotes
from qmpcommit.group.members import GroupMember
from qmpcommit.group.noted import Way
from qmpcommit.group.outcome import GroupOutcome, MemberEnd, is_clean
from qmpcommit.group.resume import ResumableGroup
from qmpcommit.group.settling import Settling
from qmpcommit.qmp.process import is_alive
from qmpcommit.session import Session
from qmpcommit.tasks import stop, to_the_end

MAX_TRIES = 3
"""How often a group is begun that was cancelled because nobody could follow it."""

MEETING = 1.0
"""Seconds that a VM gets to be connected too, before others of its group are finalized."""

_AWAY = (ConnectError, MonitorLost)


class GroupKeeping(Settling):
    """Keeps one group."""

    called = "daemon"

    def __init__(self, engine: Engine, group: Group) -> None:
        super().__init__(group.id, group, group.log, group.request.freeze, {})
        self._engine, self._keeper, self._registry = engine, engine.keeper, engine.registry
        self._group = group

    async def keep(self) -> None:
        """One that has left the queue, to its end."""
        group = self._group
        for promise in group.members:
            promise.decides = self._registry.clearing.decides
            if promise.request.policy is not None and promise.request.policy.held:
                promise.decision = group.decision
        tries = 0
        while True:
            way = await self._goes_on_by()
            if way in (Way.BEGIN, Way.FOLLOW):
                if group.frozen:  # it is to be quiesced anew
                    await self.first(self.guests_go_on(still=True))
                if await self._drive(way):
                    return
                continue
            ends = await self.settle(way)
            tries += 1
            clean = all(is_clean(end) for end in ends)
            left = group.left
            late = tries >= MAX_TRIES or (left is not None and left <= 0)
            wanted = way is Way.FINALIZE or self.undone or group.decision == "abort"
            if wanted or late or not clean:
                await self._conclude(way, ends)
                return
            group.log.info("begin_again", tries=tries)
            group.torn = False
            forgetting = [promise.forgetting() for promise in group.members]
            await group.move("running", beside=forgetting, finalize=False)

    async def _goes_on_by(self) -> Way:
        group = self._group
        if (group.torn or group.decision == "abort") and not self.finalizes:
            return Way.CANCEL
        return await self.way()

    # -- driven -----------------------------------------------------------------------------------

    async def _drive(self, way: Way) -> bool:
        """Send or take up its jobs, and see their end; False where it has to be looked at again."""
        group, again = self._group, way is Way.FOLLOW
        async with AsyncExitStack() as stack:
            try:
                sessions = await self.sessions(stack)
            except _AWAY as lost:
                await self._wait_for_vms(lost)
                return False
            if await self._goes_on_by() is not way:
                return False
            left = group.left
            if left is not None and left <= 0:
                if not again:
                    raise late(group)
                group.torn = True
                return False
            commit = self.made(sessions, timeout=left)
            group.commit = commit
            outcome: GroupOutcome | None = None
            error: QmpCommitError | None = None
            try:
                outcome = await self._follow(commit, sessions, again=again)
            except QmpCommitError as failed:
                if group.handed_over:
                    await asyncio.Event().wait()  # the next daemon goes on
                error = failed
                group.torn = self._interrupted(commit, error, again=again)
            finally:
                group.commit = None
                for promise in group.members:
                    promise.job = None
                await to_the_end(commit.leave())
                for name in sessions if not group.handed_over else ():
                    group.goes_on_again(name, commit.quiesced.get(name))
        if not group.torn:
            await self.guests_go_on(still=True)  # whose monitor was lost when they were to
            await self.end(outcome=outcome, error=error, ends=commit.ends)
        return not group.torn

    async def _follow(
        self, commit: ResumableGroup, sessions: Mapping[str, Session], *, again: bool
    ) -> GroupOutcome:
        group = self._group
        if again:
            take_up = self.take_up
            resuming = [
                partial(take_up, sessions[promise.vm], number)
                for number, promise in enumerate(group.members)
            ]
            await commit.take_up(resuming)
        else:
            for promise in group.members:
                promise.identity = self._registry.vms[promise.vm].identity
            await commit.start()
        for promise, job in zip(group.members, commit.jobs, strict=True):
            promise.job = job
        self._engine.schedule()
        if group.decision == "abort":  # which came while they were being started
            commit.abort()
        return await commit.wait()

    async def sessions(self, stack: AsyncExitStack, *, wait: float = 0.0) -> dict[str, Session]:
        """Its VMs, held for as long as the stack is; raises what `Registry.reach` raises."""
        return {
            name: await stack.enter_async_context(self._registry.reach(name, wait=wait))
            for name in dict.fromkeys(promise.vm for promise in self._group.members)
        }

    def made(
        self, sessions: Mapping[str, Session], *, timeout: float | None = None
    ) -> ResumableGroup:
        """The group as the library drives it."""
        group = self._group
        request, rate = group.request, self._keeper.rate
        running = group.state == "running"
        members = []
        for promise in group.members:
            asked = vars(promise.request.asked)
            options = {name: asked[name] for name in DiskOptions.__annotations__}
            if running:
                promise.rate = rate(promise)
                options["bandwidth"] = promise.rate or None
            options |= self._keeper.around(promise)
            policy = None if request.policy is not None else promise.decided_policy()
            members.append(GroupMember(sessions[promise.vm], promise.disk, policy, options))
        agents = request.sockets(sessions)
        latest = max(group.members, key=lambda promise: promise.ready or 0)
        commit = ResumableGroup(
            members,
            policy=None if request.policy is None else latest.decided_policy(),
            hold_limit=request.hold_limit,
            timeout=timeout,
            only_if=request.only_if,
            freeze=request.freeze,
            agents={sessions[name]: agent for name, agent in agents.items() if name in sessions},
            freeze_notes={vm: FreezeNotes(group, vm, name) for name, vm in sessions.items()},
            on_decision=lambda jobs: group.finalize(commit.decided_by),
            known_as=group.id,
        )
        return commit

    def _interrupted(self, commit: ResumableGroup, error: QmpCommitError, *, again: bool) -> bool:
        """Whether some member's end is not known, or it failed for what a restart had left."""
        ends = zip(commit.ends, self._group.members, strict=False)
        if any(_is_unsure(end, promise.identity) for end, promise in ends):
            return True
        decided = self.finalizes or self._group.decision == "abort"
        if decided or isinstance(error, DeadlineExceeded):
            return isinstance(error, _AWAY)
        return isinstance(error, _AWAY) or (again and commit.state.culprit is not None)

    async def _wait_for_vms(self, error: QmpCommitError) -> None:
        """Until a VM that is away answers; where it does not come back, the others are let go."""
        group, vms = self._group, self._registry.vms
        members = enumerate(group.members)
        away = [n for n, p in members if p.vm not in vms or not vms[p.vm].up.is_set()]
        try:
            await self.first(self._back(away[0] if away else 0, error))
        except QmpCommitError:
            if not group.begun:
                raise
            group.torn = True

    async def first(self, *waits: Coroutine[Any, Any, object]) -> None:
        """Until one of these ends, or the group was aborted."""
        changed = self._group.changed.wait()
        tasks = [asyncio.ensure_future(wait) for wait in (*waits, changed)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                await stop(task)

    # -- settled ----------------------------------------------------------------------------------

    async def _jobs(self, key: str) -> tuple[str, list[dict[str, Any]]] | None:
        """A VM that is not connected gets a moment for that."""
        vm = self._registry.vms.get(key)
        try:
            async with asyncio.timeout(MEETING):
                if vm is None or (vm.connect != "keep" and not vm.up.is_set()):
                    return None
                await vm.up.wait()
                assert vm.session is not None
                return vm.identity, await vm.session.execute("query-jobs")
        except (QmpCommitError, TimeoutError):
            return None

    def _reach(self, key: str) -> AbstractAsyncContextManager[Session]:
        return self._registry.reach(key)

    async def _back(self, number: int, error: QmpCommitError) -> None:
        """Until its VM answers again; raises its end where it is gone for good."""
        await self._keeper.wait_for_vm(self._group.members[number], error)

    def _hooks(self, number: int) -> Mapping[str, Any]:
        return self._keeper.around(self._group.members[number])

    # -- its end ----------------------------------------------------------------------------------

    async def _conclude(self, way: Way, ends: Sequence[MemberEnd]) -> None:
        """Its end, after its members were settled one by one."""
        group = self._group
        wanted = "caller" if group.decision == "abort" else ""
        outcomes = [end.outcome for end in ends if end.outcome is not None]
        completed = any(outcome.status == "completed" for outcome in outcomes)
        if wanted and way is Way.CANCEL and not completed and len(outcomes) < len(group.members):
            await self.end(ends=ends)
            return
        end = self.end_of(way, ends, wanted)
        if isinstance(end, GroupOutcome):
            await self.end(outcome=end, ends=ends)
        else:
            await self.end(error=end, ends=ends)

    async def end(
        self,
        *,
        outcome: GroupOutcome | None = None,
        error: QmpCommitError | None = None,
        ends: Sequence[MemberEnd] = (),
    ) -> None:
        """Its end and its members', durable together; without an outcome or an error, cancelled."""
        group, metrics = self._group, self._engine.metrics
        for seconds in group.as_noted.quiesced.values():
            metrics.quiesced.observe(seconds)
        problems = self.problems
        if outcome is not None and problems:
            new = [problem for problem in problems if problem not in outcome.warnings]
            outcome = replace(outcome, warnings=[*new, *outcome.warnings])
        elif error is not None and problems:
            error.add(problems=problems)
        by_job = {end.plan.job_id: end for end in ends}
        endings = []
        for promise in group.members:
            end = by_job.get(promise.job_id)
            own: Any = end.error if end is not None else None
            if end is not None and end.outcome is not None:
                endings.append(promise.ending("done", end.outcome, None))
                self._keeper.count(promise, end.outcome)
                if end.outcome.held is not None and end.outcome.status == "completed":
                    metrics.held.observe(end.outcome.held)
            elif own is not None or error is not None:
                why = own if isinstance(own, QmpCommitError) else error
                why = why or QmpCommitError(repr(own))
                endings.append(promise.ending("failed", None, error_dict(why)))
            else:
                endings.append(promise.ending("cancelled", None, None))
        state = "failed" if error is not None else "done" if outcome is not None else "cancelled"
        how = type(error).__name__ if error is not None else outcome.action if outcome else state
        metrics.groups.labels(how).inc()
        group.log.info("group_ended", how=how)
        await group.end(
            state,
            outcome=outcome.model_dump(mode="json") if outcome is not None else None,
            error=error_dict(error) if error is not None else None,
            beside=[end.statement for end in endings],
            events=[end.event for end in endings],
        )
        for promise, ending in zip(group.members, endings, strict=True):
            promise.ended_as(ending)


def _is_unsure(end: MemberEnd, identity: str) -> bool:
    """Whether its job may be in QEMU still, and the monitor has to come back to tell."""
    if isinstance(end.error, _AWAY):
        return True
    return isinstance(end.error, VMGone) and is_alive(identity)


def late(group: Group) -> DeadlineExceeded:
    """The error of one whose time is up before it could begin."""
    return DeadlineExceeded(
        f"the group {group.id} could not begin within {group.request.timeout:g} s. Nothing was sent"
    )
