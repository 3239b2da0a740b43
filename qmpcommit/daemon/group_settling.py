"""How groups end: members are settled one by one after a restart, all ends written together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qmpcommit.commit.ledger import load_state
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.group_ends import end_of, error_of
from qmpcommit.daemon.group_frozen import Frozen
from qmpcommit.daemon.group_guests import Guests, paused_for
from qmpcommit.daemon.keeping import error_dict
from qmpcommit.daemon.promise import Promise, is_settled
from qmpcommit.daemon.promised_group import Group
from qmpcommit.errors import QmpCommitError
from qmpcommit.group.noted import Way
from qmpcommit.group.outcome import GroupOutcome, MemberEnd, outcome_of
from qmpcommit.group.resuming import stood_still
from qmpcommit.tasks import stop


class Settling:
    """Ends the groups of an engine; `ended` is told of each end.

    `guests` lets go on whom a recycle has paused, `frozen` who was quiesced.
    """

    def __init__(
        self, engine: Engine, guests: Guests, frozen: Frozen, ended: Callable[[Group], object]
    ) -> None:
        self._engine, self._keeper = engine, engine.keeper
        self._guests, self._frozen = guests, frozen
        self._ended = ended

    async def settle(self, group: Group) -> list[MemberEnd]:
        """End the jobs one by one, as it was noted: finalized all of them, or cancelled."""
        group.log.info("settling", finalize=group.finalizes)
        begun = [promise for promise in group.members if promise.begun]
        for promise in begun:
            promise.settled.clear()
        waiting = {
            paused[0].vm: asyncio.create_task(self._guests.go_on(paused, settled=group.finalizes))
            for paused in paused_for(begun)
        }

        async def laid(vm: str) -> None:
            for promise in begun:
                if promise.vm == vm:
                    await promise.settled.wait()
            if vm in waiting:
                await asyncio.wait({waiting[vm]})

        thawing = asyncio.create_task(self._frozen.go_on(group, laid))
        try:
            ends = await asyncio.gather(*(self._settle_one(group, promise) for promise in begun))
            seconds = {vm: await going_on for vm, going_on in waiting.items()}
            await thawing
        finally:
            await asyncio.gather(*(stop(task) for task in (thawing, *waiting.values())))
        if group.request.freeze == "pause":
            for vm, paused in seconds.items():
                group.goes_on_again(vm, paused)
        stood = group.quiesced
        return [
            stood_still(end, seconds.get(p.vm), stood.get(p.vm))
            for p, end in zip(begun, ends, strict=True)
        ]

    async def _settle_one(self, group: Group, promise: Promise) -> MemberEnd:
        outcome, error = None, None
        promise.way = Way.FINALIZE if group.finalizes else Way.CANCEL
        if promise.way is Way.FINALIZE and is_settled(load_state(promise.noted["state"])):
            promise.settled.set()
        try:
            outcome = await self._keeper.outcome_of(promise)
        except QmpCommitError as failed:
            error = failed
        finally:
            promise.settled.set()
            promise.way = None
        return end_of(promise, outcome, error)

    async def conclude(self, group: Group, ends: Sequence[MemberEnd]) -> None:
        """Its end, after its members were settled one by one."""
        complete = len(ends) == len(group.members)
        all_done = complete and all(end.outcome is not None for end in ends)
        statuses = {end.outcome.status for end in ends if end.outcome is not None}
        aborted = group.decision == "abort" and statuses == {"cancelled"}
        if all_done and (statuses == {"completed"} or aborted):
            by = "caller" if aborted else str(group.noted.get("by", "another client"))
            await self.end(group, outcome=outcome_of(group.id, ends, by=by), ends=ends)
        elif group.decision == "abort" and not group.finalizes and "completed" not in statuses:
            await self.end(group, ends=ends)
        else:
            await self.end(group, error=error_of(group.finalizes, ends), ends=ends)

    async def end(
        self,
        group: Group,
        *,
        outcome: GroupOutcome | None = None,
        error: QmpCommitError | None = None,
        ends: Sequence[MemberEnd] = (),
    ) -> None:
        """Its end and its members', durable together; without an outcome or an error, cancelled."""
        for seconds in group.quiesced.values():
            self._engine.metrics.quiesced.observe(seconds)
        if outcome is not None and group.problems:
            outcome = replace(outcome, warnings=[*group.problems, *outcome.warnings])
        elif error is not None and group.problems:
            error.add(problems=group.problems)
        by_job = {end.plan.job_id: end for end in ends}
        endings = []
        for promise in group.members:
            end = by_job.get(promise.job_id)
            own: Any = end.error if end is not None else None
            if end is not None and end.outcome is not None:
                endings.append(promise.ending("done", end.outcome, None))
                self._keeper.count(promise, end.outcome)
                if end.outcome.held is not None and end.outcome.status == "completed":
                    self._engine.metrics.held.observe(end.outcome.held)
            elif own is not None or error is not None:
                why = own if isinstance(own, QmpCommitError) else error
                why = why or QmpCommitError(repr(own))
                endings.append(promise.ending("failed", None, error_dict(why)))
            else:
                endings.append(promise.ending("cancelled", None, None))
        state = "failed" if error is not None else "done" if outcome is not None else "cancelled"
        how = type(error).__name__ if error is not None else outcome.action if outcome else state
        self._engine.metrics.groups.labels(how).inc()
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
        self._ended(group)
