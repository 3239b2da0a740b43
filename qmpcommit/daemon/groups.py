"""Groups: disks of one VM or of several that the daemon commits at one instant, all or none.

Each member is a promise of its own, whose steps are noted as a single commit's are. What the
group adds is one note, durable while all disks are held and before the first job is finalized:
that all of them are to be. A daemon that finds it finalizes what is held still; one that does
not cancels it, which QEMU undoes, and begins the group again. Guests that were paused for recycles
go on when that is right: see `qmpcommit.group.settling`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

from qmpcommit.daemon.asked import check_asked
from qmpcommit.daemon.engine import key_row
from qmpcommit.daemon.group_keeping import GroupKeeping, late
from qmpcommit.daemon.keeping import storage_of
from qmpcommit.daemon.kinds import Kind
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.promised_group import Group
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.undertaking import ENDED
from qmpcommit.errors import InvalidRequest, JobConflict, NotReady, QmpCommitError
from qmpcommit.group.resume import HAND_OVER
from qmpcommit.tasks import stop
from qmpcommit.wire.group import GroupRequest, GroupView

LAST_WORDS = 0.2
"""Seconds that a group which has just ended gets to say so before the daemon stops."""


class Groups(Kind[Group]):
    """The groups of one daemon."""

    of, called = Group, "group"

    # -- what the engine calls --------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the groups that have not ended, with their members."""
        for group in await self._unended():
            by_id = {p.id: p for p in self._engine.live.values() if p.group == group.id}
            group.members = _members(group, by_id)
            if len(group.members) != len(group.request.members):
                group.log.warning("group_unreadable", why="not all of its members can be read")
                continue
            group.keeping = GroupKeeping(self._engine, group)
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
            group.keeping
            for group in self.live.values()
            if group.commit is None
            and group.keeping is not None
            and group.state == "running"
            and any(promise.vm == vm.name for promise in group.members)
        ]
        await asyncio.gather(*(keeping.relieve(vm.name, session) for keeping in waiting))

    async def stop(self) -> None:
        """Hold no disk any more; what is not decided stays in QEMU for the next daemon."""
        groups = list(self.live.values())
        for group in groups:
            group.handed_over = True
        driven = [group.commit for group in groups if group.commit is not None]
        await asyncio.gather(*(commit.hand_over() for commit in driven))
        settling = [g.task for g in groups if _finalizes(g) and g.commit is None and g.task]
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
        keeping = GroupKeeping(engine, group)
        async with AsyncExitStack() as stack:
            sessions = await keeping.sessions(stack, wait=1.0)
            jobs = await keeping.made(sessions).prepare()
            for promise, job in zip(group.members, jobs, strict=True):
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
        group.keeping = keeping
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
        if _finalizes(group):
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
        assert group.keeping is not None
        if await self._turn(group, group.keeping):
            await group.keeping.keep()

    async def _fail(self, group: Group, error: QmpCommitError) -> None:
        assert group.keeping is not None
        await group.keeping.end(error=error)

    async def _turn(self, group: Group, keeping: GroupKeeping) -> bool:
        """Wait in the queue; False where it ended there."""
        if group.state == "running":
            return True
        try:
            async with asyncio.timeout(group.left):
                await keeping.first(*(p.may_run.wait() for p in group.members[:1]))
        except TimeoutError:
            raise late(group) from None
        if group.decision == "abort":
            await keeping.end()
            return False
        leaving = [promise.leaving() for promise in group.members]
        told = [promise.event() for promise in group.members]
        await group.move("running", beside=leaving, events=told)
        return True

    async def _after(self, group: Group) -> None:
        self._engine.ended(*group.members)


def _members(group: Group, known: Mapping[str, Promise]) -> list[Promise]:
    return [known[name] for name in group.noted.get("commits", ()) if name in known]


def _finalizes(group: Group) -> bool:
    return group.keeping is not None and group.keeping.finalizes
