"""What a round keeps is carried into the bases: by a commit, or by a group.

A group is for several disks, and for guests that are quiesced.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from qmpcommit.cycles.book import recycle_of
from qmpcommit.daemon.children import promised
from qmpcommit.daemon.cycle_round import Round
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.groups import Groups
from qmpcommit.daemon.journal import JournalFull
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.promised_group import Group
from qmpcommit.errors import ChainError, ConnectError, MonitorLost
from qmpcommit.wire.commit import CommitRequest
from qmpcommit.wire.group import GroupMemberRequest, GroupRequest

AGAIN = 0.5
"""Seconds between two tries to reach a VM in the middle of a round."""

T = TypeVar("T")


class Keeping:
    """Has the bases take what rounds have found good."""

    def __init__(self, engine: Engine, groups: Groups) -> None:
        self._engine, self._groups = engine, groups

    async def keep(self, found: Round) -> dict[str, Any]:
        """The round's outcome; what a former daemon has promised for it is found again."""
        group: Group | None = None
        ended: Promise | Group
        if found.request.together or found.request.freeze is not None:
            ended = group = await self._group(found)
            commits = [promise.id for promise in group.members]
        else:
            ended = await self._promise(found)
            commits = [ended.id]
        await ended.over.wait()
        told = ended.outcome or {}
        if ended.state != "done" or told.get("action") != "recycle":
            said = (ended.error or {}).get("message") or (
                "what was to carry its changes into the base was cancelled"
            )
            raise ChainError(str(said), commit=commits[0])
        warnings = list(told.get("warnings") or [])
        for each in told.get("outcomes") or []:
            warnings += [text for text in each.get("warnings") or [] if text not in warnings]
        return {
            "result": "kept",
            "commits": commits,
            "group": group.id if group is not None else None,
            "warnings": warnings,
        }

    async def _group(self, found: Round) -> Group:
        """The disks' recycles at one instant; a key of the round's own finds them again."""
        request = GroupRequest(
            members=[
                GroupMemberRequest(vm=part["vm"], disk=part["disk"], policy=recycle_of(part))
                for part in found.parts
            ],
            shallow=True,
            delete=found.request.delete,
            freeze=found.request.freeze,
            agents=found.request.sockets(found.vms),
        )
        key = f"the round {found.id} of a cycle"
        return (await self._when_there(lambda: self._groups.take(request, key, found.id)))[0]

    async def _promise(self, found: Round) -> Promise:
        """The disk's recycle, which is found again by its job's id."""
        (part,) = found.parts
        found_again = await promised(self._engine, found.vm, part["job_id"], found.created)
        if found_again is not None:
            return found_again
        request = CommitRequest(
            disk=found.disk,
            policy=recycle_of(part),
            shallow=True,
            delete=found.request.delete,
            job_id=part["job_id"],
        )
        taking = self._when_there(lambda: self._engine.take(found.vm, request, None, ""))
        return (await taking)[0]

    async def _when_there(self, take: Callable[[], Awaitable[T]]) -> T:
        """What is promised when its VMs are there: they may be connected still after a restart."""
        end = time.monotonic() + self._engine.config.limits.gone_after
        while True:
            try:
                return await take()
            except (ConnectError, MonitorLost, JournalFull):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(AGAIN)
