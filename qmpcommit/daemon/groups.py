"""Groups: disks of one VM or of several that the daemon commits at one instant, all or none.

Each member is a promise of its own, whose steps are noted as a single commit's are. What the
group adds is one note, durable while all disks are held and before the first job is finalized:
that all of them are to be. A daemon that finds it finalizes what is held still; one that does
not cancels it, which QEMU undoes, and begins the group again. Guests that were paused for recycles
go on when that is right: see `group_guests`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.policy import Hold
from qmpcommit.commit.request import DiskOptions
from qmpcommit.commit.stale_layers import Barrier
from qmpcommit.daemon.asked import check_asked
from qmpcommit.daemon.engine import Engine, key_row
from qmpcommit.daemon.group_ends import is_unsure
from qmpcommit.daemon.group_frozen import FreezeNotes, Frozen
from qmpcommit.daemon.group_guests import Guests, let_go_on, paused_for
from qmpcommit.daemon.group_settling import Settling
from qmpcommit.daemon.keeping import storage_of
from qmpcommit.daemon.kinds import Kind
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.promised_group import Group
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.undertaking import ENDED
from qmpcommit.errors import (
    CommandRefused,
    ConnectError,
    DeadlineExceeded,
    InvalidRequest,
    JobConflict,
    MonitorLost,
    NotReady,
    QmpCommitError,
)
from qmpcommit.group.members import GroupMember
from qmpcommit.group.noted import Shown, Way, resume, shown_of
from qmpcommit.group.outcome import GroupOutcome, is_clean
from qmpcommit.group.resume import HAND_OVER, ResumableGroup
from qmpcommit.session import Session
from qmpcommit.tasks import stop, to_the_end
from qmpcommit.wire.group import GroupRequest, GroupView

MAX_TRIES = 3
"""How often a group is begun that was cancelled because nobody could follow it."""

HEAD_START = 0.2
"""Seconds that a guest's thaw gets before the jobs are ended that hold its disks."""

MEETING = 1.0
"""Seconds that a VM gets to be connected too, before others of its group are finalized."""

LAST_WORDS = 0.2
"""Seconds that a group which has just ended gets to say so before the daemon stops."""

_AWAY = (ConnectError, MonitorLost)


class Groups(Kind[Group]):
    """The groups of one daemon."""

    of, called = Group, "group"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._keeper = engine.keeper
        self._guests = Guests(engine.registry, engine.keeper)
        self._frozen = Frozen(engine.registry, engine.keeper)
        self._settling = Settling(engine, self._guests, self._frozen, self._ended)

    # -- what the engine calls --------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the groups that have not ended, with their members."""
        for group in await self._unended():
            by_id = {p.id: p for p in self._engine.live.values() if p.group == group.id}
            group.members = _members(group, by_id)
            if len(group.members) != len(group.request.members):
                group.log.warning("group_unreadable", why="not all of its members can be read")
                continue
            self.live[group.id] = group
            entries = [self._engine.entry(promise) for promise in group.members]
            if group.state == "running":
                for promise, entry in zip(group.members, entries, strict=True):
                    self._engine.scheduler.resume(entry)
                    promise.may_run.set()
            else:
                self._engine.scheduler.add(*entries)

    async def on_up(self, vm: VM) -> None:
        """Guests go on, and what is held on a VM that was away is ended, as it was noted."""
        session = vm.session
        assert session is not None
        waiting = [
            group
            for group in self.live.values()
            if group.commit is None
            and group.state == "running"
            and any(promise.vm == vm.name for promise in group.members)
        ]
        here = (vm.name, vm.identity)
        for group in waiting:
            await self._look_at(group)
            if not group.finalizes:  # else it would write to its bases before all are laid over
                for paused in paused_for(p for p in group.members if (p.vm, p.identity) == here):
                    await let_go_on(session, paused)
        if not waiting:
            return
        thawing = [
            asyncio.create_task(self._frozen.at_once(group, vm, session)) for group in waiting
        ]
        try:
            # First of all; but a thaw may write to a disk that is held, and waits for it then.
            await asyncio.wait(thawing, timeout=HEAD_START)
            await self._end_held(waiting, vm, session)
            await asyncio.gather(*thawing)
        finally:
            await asyncio.gather(*map(stop, thawing))

    async def _look_at(self, group: Group) -> None:
        """Whether all of it can be finalized, where it is not known that any may have been.

        The VMs that are not connected get a moment for that.
        """
        if not group.in_doubt:
            return
        shown = await asyncio.gather(*(self._shown(promise) for promise in group.members))
        if group.in_doubt and resume(group.as_noted, shown) is Way.CANCEL:
            group.log.warning("cancelled_before", shown=[each.name for each in shown])
            group.undone = True

    async def _shown(self, promise: Promise) -> Shown:
        vm = self._engine.registry.vms.get(promise.vm)
        try:
            async with asyncio.timeout(MEETING):
                if vm is None or (vm.connect != "keep" and not vm.up.is_set()):
                    return Shown.AWAY
                await vm.up.wait()
                assert vm.session is not None
                jobs = await vm.session.execute("query-jobs")
        except (QmpCommitError, TimeoutError):
            return Shown.AWAY
        if vm.identity != promise.identity:
            return Shown.GONE
        return shown_of(next((job for job in jobs if job.get("id") == promise.job_id), None))

    async def _end_held(self, groups: Iterable[Group], vm: VM, session: Session) -> None:
        jobs = await session.execute("query-jobs")
        held = {str(job.get("id")) for job in jobs if job.get("status") == "pending"}
        for group in groups:
            mine = {p.job_id for p in group.members if p.vm == vm.name and p.begun}
            group.torn = group.torn or bool(held & mine)
            for job_id in sorted(held & mine):
                order = "job-finalize" if group.finalizes else "job-cancel"
                group.log.warning("held_its_disk", vm=vm.name, job=job_id, sending=order)
                with suppress(CommandRefused):  # somebody else was first
                    await session.execute(order, {"id": job_id})

    async def stop(self) -> None:
        """Hold no disk any more; what is not decided stays in QEMU for the next daemon."""
        groups = list(self.live.values())
        for group in groups:
            group.handed_over = True
        driven = [group.commit for group in groups if group.commit is not None]
        await asyncio.gather(*(commit.hand_over() for commit in driven))
        settling = [g.task for g in groups if g.finalizes and g.commit is None and g.task]
        if settling:
            await asyncio.wait(settling, timeout=HAND_OVER)
        tasks = {group.task for group in groups if group.task is not None}
        if any(commit.stage == "over" for commit in driven):
            await asyncio.wait(tasks, timeout=LAST_WORDS)
        jobs = [p.job for group in groups for p in group.members if p.job is not None]
        for group in groups:
            if group.frozen:  # an agent that does not answer is asked for a while
                group.log.warning("stopping_after_thaw", vms=sorted(group.frozen))
        await asyncio.gather(*(stop(task) for task in tasks))
        await asyncio.gather(*(job.detach() for job in jobs))

    def gauge(self) -> None:
        """How many have not ended, by where they are."""
        gauge = self._engine.metrics.groups_live
        gauge.clear()
        for group in self.live.values():
            gauge.labels(self.phase(group) or group.state).inc()

    # -- what the API calls -----------------------------------------------------------------------

    async def take(
        self, request: GroupRequest, key: str | None, fingerprint: str
    ) -> tuple[Group, bool]:
        """A durable group for a request; and whether its key had been given before.

        Raises what `Engine.take` raises, and `InvalidRequest` for more members than may ever run
        together.
        """
        make = partial(self._promise, request, key, fingerprint)
        return await self._engine.once(key, fingerprint, self.find, make)

    async def _promise(self, request: GroupRequest, key: str | None, fingerprint: str) -> Group:
        engine = self._engine
        known_as = os.urandom(4).hex()
        asked = request.requests(known_as)
        engine.check_room_for(asked)
        check_asked(asked)
        vms = {member.vm: engine.vm(member.vm) for member in request.members}
        group = Group(",".join(sorted(vms)), request, self._journal, known_as=known_as)
        group.state = "queued"
        for member, each in zip(request.members, asked, strict=True):
            promise = Promise(
                os.urandom(16).hex(), member.vm, each, each.job_id or "", journal=self._journal,
                metrics=engine.metrics, group=group.id,
            )  # fmt: skip
            group.members.append(promise)
        group.noted = {**group.noted, "commits": [promise.id for promise in group.members]}
        async with AsyncExitStack() as stack:
            sessions = await self._sessions(stack, group, wait=1.0)
            for promise, job in zip(
                group.members, await self._made(group, sessions, {}).prepare(), strict=True
            ):
                session = sessions[promise.vm]
                engine.places.check_commit(vms[promise.vm], session, job.plan, promise.request)
                cwd = session.cwd
                promise.storage = await asyncio.to_thread(storage_of, job.plan, cwd)
        entries = [engine.entry(promise) for promise in group.members]
        limit = engine.scheduler.impossible(entries)
        if limit is not None:
            raise InvalidRequest(
                f"this group has {len(entries)} members, which have to run together, and the"
                f" daemon's limit is {limit}: raise it, or commit fewer at once. Nothing was sent"
            )
        engine.check_room_for(asked)  # others may have come meanwhile
        beside = [group.insertion(), *key_row(key, fingerprint, group.id)]
        await engine.promised(group.members, beside, [group.event()])
        self.live[group.id] = group
        engine.scheduler.add(*entries)
        self.launch(group)
        engine.schedule()
        return group

    async def _load(self, row: Mapping[str, Any]) -> Group:
        group = await super()._load(row)
        rows = (await self.members_of([group.id])).get(group.id, [])
        return self._with_members(group, rows)

    async def members_of(self, groups: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """The rows of the commits of these groups, by their group."""
        sql = "SELECT * FROM commits WHERE in_group IN (SELECT value FROM json_each(?))"
        found: dict[str, list[dict[str, Any]]] = {}
        for row in await self._journal.read(sql, json.dumps(groups)) if groups else ():
            found.setdefault(row["in_group"], []).append(row)
        return found

    def _with_members(self, group: Group, rows: Sequence[Mapping[str, Any]]) -> Group:
        known = {r["id"]: Promise.load(r, self._journal, self._engine.metrics) for r in rows}
        group.members = _members(group, known)
        return group

    def view_of(self, row: Mapping[str, Any], commits: Sequence[Mapping[str, Any]]) -> GroupView:
        """One that has ended as the API shows it, from its rows; raises ValueError."""
        group = self._with_members(self.of.load(row, self._journal), commits)
        return GroupView.model_validate(self.facts_of(group))

    def facts_of(self, group: Group) -> dict[str, Any]:
        """What the API shows of a group as it is now, for `GroupView`."""
        return {
            "id": group.id,
            "state": group.state,
            "phase": self.phase(group),
            "members": [
                {"vm": p.vm, "disk": p.disk, "commit": p.id, "job_id": p.job_id}
                for p in group.members
            ],
            "created": group.created,
            "position": self.position(group),
            "ended": group.ended,
            "decision": group.decision,
            "asked_by": group.noted.get("asked"),
            "request": group.request.model_dump(mode="json", exclude_unset=True),
            "outcome": group.outcome,
            "error": group.error,
        }

    def phase(self, group: Group) -> str:
        """Where it is: `ResumableGroup.stage`, or ``recovering``; empty while it waits."""
        if group.state != "running":
            return ""
        if group.commit is None:
            return "recovering" if group.begun else "copying"
        return group.commit.stage

    def position(self, group: Group) -> int | None:
        """Its place in the queue, from 1; None where it does not wait."""
        return self._engine.position(group.members[0]) if group.members else None

    async def decide(self, group_id: str, action: str) -> Group:
        """Carry out a decision, durable before it is answered.

        Raises `NotReady`, `JobConflict` or `CommitNotFound`.
        """
        group = await self.find(group_id)
        if group.state in ENDED:
            raise JobConflict(f"the group {group_id} has ended already; its outcome tells how")
        if group.finalizes:
            raise JobConflict(f"the group {group_id} is being finalized already: it was decided")
        if action != "abort":
            if group.commit is None:
                raise NotReady(f"the group {group_id} is not READY; it goes on, ask again")
            group.commit.check_ready()
        await self._engine.shielded(self._carry_out(group, action))
        return group

    async def _carry_out(self, group: Group, action: str) -> None:
        async with group.deciding:
            if action != "abort" and group.commit is not None:
                group.commit.check_ready()  # another request may have been first
            await group.decide(action)
            commit = group.commit
            if action == "abort":
                group.changed.set()
                if commit is not None:
                    commit.abort()
            elif commit is not None:
                with suppress(NotReady, JobConflict):  # it has moved on meanwhile
                    (commit.pivot if action == "pivot" else commit.keep)()

    # -- running ----------------------------------------------------------------------------------

    async def _run(self, group: Group) -> None:
        if await self._turn(group):
            await self._keep(group)

    async def _fail(self, group: Group, error: QmpCommitError) -> None:
        await self._settling.end(group, error=error)

    async def _turn(self, group: Group) -> bool:
        """Wait in the queue; False where it ended there."""
        if group.state == "running":
            return True
        left = group.left
        try:
            async with asyncio.timeout(left):
                await self._first(*(p.may_run.wait() for p in group.members[:1]), of=group)
        except TimeoutError:
            raise _late(group) from None
        if group.decision == "abort":
            await self._settling.end(group)
            return False
        leaving = [promise.leaving() for promise in group.members]
        told = [promise.event() for promise in group.members]
        await group.move("running", beside=leaving, events=told)
        return True

    async def _keep(self, group: Group) -> None:
        tries = 0
        for promise in group.members:
            promise.decides = self._engine.registry.clearing.decides
            if isinstance(promise.request.policy, Hold):
                promise.decision = group.decision
        while True:
            if group.goes_on:
                if group.frozen:  # it is to be quiesced anew
                    await self._first(self._frozen.go_on(group), of=group)
                if group.goes_on and await self._drive(group):
                    return
                continue
            await self._look_at(group)
            ends = await self._settling.settle(group)
            tries += 1
            clean = all(is_clean(end) for end in ends)
            left = group.left
            if group.finalizes or group.undone or not clean or group.decision == "abort":
                await self._settling.conclude(group, ends)
                return
            if tries >= MAX_TRIES or (left is not None and left <= 0):
                await self._settling.conclude(group, ends)
                return
            group.log.info("begin_again", tries=tries)
            group.torn = False
            forgetting = [promise.forgetting() for promise in group.members]
            await group.move("running", beside=forgetting, finalize=False)

    async def _drive(self, group: Group) -> bool:
        """Send or take up its jobs, and see their end; False where it has to be looked at again."""
        async with AsyncExitStack() as stack:
            try:
                sessions = await self._sessions(stack, group)
            except _AWAY as error:
                await self._wait_for_vms(group, error)
                return False
            identities = {name: self._engine.registry.vms[name].identity for name in sessions}
            again = group.begun
            if again and any(identities[p.vm] != p.identity for p in group.members):
                group.torn = True
            left = group.left
            if left is not None and left <= 0:
                if not again:
                    raise _late(group)
                group.torn = True
            if not group.goes_on:
                return False
            commit = self._made(group, sessions, identities, timeout=left)
            group.commit = commit
            try:
                outcome = await self._follow(group, commit, sessions, identities)
            except QmpCommitError as error:
                if group.handed_over:
                    await asyncio.Event().wait()  # the next daemon goes on
                group.torn = _interrupted(group, commit, error, again=again)
                if not group.torn:
                    await self._let_go(group)
                    await self._settling.end(group, error=error, ends=commit.ends)
                return not group.torn
            finally:
                group.commit = None
                for promise in group.members:
                    promise.job = None
                await to_the_end(commit.leave())
                for name in identities if not group.handed_over else ():
                    group.goes_on_again(name, commit.quiesced.get(name))
        await self._let_go(group)
        await self._settling.end(group, outcome=outcome, ends=commit.ends)
        return True

    async def _let_go(self, group: Group) -> None:
        """Its guests, whose monitor was lost when they were to go on."""
        guests = paused_for(group.members)
        await asyncio.gather(*(self._guests.go_on(paused, settled=False) for paused in guests))

    async def _follow(
        self,
        group: Group,
        commit: ResumableGroup,
        sessions: Mapping[str, Session],
        identities: Mapping[str, str],
    ) -> GroupOutcome:
        if group.begun:
            resuming = [partial(self._resume, p, sessions[p.vm]) for p in group.members]
            await commit.take_up(resuming)
        else:
            for promise in group.members:
                promise.identity = identities[promise.vm]
            await commit.start()
        for promise, job in zip(group.members, commit.jobs, strict=True):
            promise.job = job
        self._engine.schedule()
        if group.decision == "abort":  # which came while they were being started
            commit.abort()
        return await commit.wait()

    async def _resume(self, promise: Promise, session: Session, barrier: Barrier) -> CommitJob:
        """Take up one that was not decided yet; while it is READY its group decides."""
        await self._keeper.repay(promise, session)
        plan, noted, files = promise.resumed(promise.identity)
        object.__setattr__(plan, "policy", Hold())
        around = self._keeper.around(promise)
        return await session.resume(plan, noted, files=files, barrier=barrier, **around)

    async def _sessions(
        self, stack: AsyncExitStack, group: Group, *, wait: float = 0.0
    ) -> dict[str, Session]:
        registry, sessions = self._engine.registry, {}
        for name in dict.fromkeys(promise.vm for promise in group.members):
            vm = registry.vms.get(name)
            if vm is None:
                raise ConnectError(f"no VM is called '{name}' at the moment", vm=name)
            sessions[name] = await stack.enter_async_context(registry.use(vm, wait=wait))
        return sessions

    def _made(
        self,
        group: Group,
        sessions: Mapping[str, Session],
        identities: Mapping[str, str],
        *,
        timeout: float | None = None,
    ) -> ResumableGroup:
        """The group as the library drives it."""
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
            freeze_notes={
                sessions[name]: FreezeNotes(group, name, identity)
                for name, identity in identities.items()
            },
            on_decision=lambda jobs: group.finalize(commit.decided_by),
            known_as=group.id,
        )
        return commit

    async def _wait_for_vms(self, group: Group, error: QmpCommitError) -> None:
        """Until a VM that is away answers; where it does not come back, the others are let go."""
        vms = self._engine.registry.vms
        away = [p for p in group.members if p.vm not in vms or not vms[p.vm].up.is_set()]
        try:
            promise = (away or group.members)[0]
            await self._first(self._keeper.wait_for_vm(promise, error), of=group)
        except QmpCommitError:
            if not group.begun:
                raise
            group.torn = True

    async def _first(self, *waits: Coroutine[Any, Any, object], of: Group) -> None:
        """Until one of these ends, or the group was aborted."""
        tasks = [asyncio.ensure_future(wait) for wait in (*waits, of.changed.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                await stop(task)

    def _ended(self, group: Group) -> None:
        del self.live[group.id]
        self._engine.ended(*group.members)


def _members(group: Group, known: Mapping[str, Promise]) -> list[Promise]:
    return [known[name] for name in group.noted.get("commits", ()) if name in known]


def _interrupted(
    group: Group, commit: ResumableGroup, error: QmpCommitError, *, again: bool
) -> bool:
    """Whether the end of some member is not known, or it failed for what a restart had left."""
    if any(
        is_unsure(end, promise) for end, promise in zip(commit.ends, group.members, strict=False)
    ):
        return True
    if group.finalizes or group.decision == "abort" or isinstance(error, DeadlineExceeded):
        return isinstance(error, _AWAY)
    return isinstance(error, _AWAY) or (again and commit.state.culprit is not None)


def _late(group: Group) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the group {group.id} could not begin within {group.request.timeout:g} s. Nothing was sent"
    )
