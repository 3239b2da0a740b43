"""Closing a window: each overlay is committed back by one of the daemon's ordinary commits.

Their jobs' ids are noted first, so that a daemon which is started again finds them and asks for
nothing twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from qmpcommit.block.chain import Disk
from qmpcommit.commit.claim import release_all
from qmpcommit.commit.policy import Pivot
from qmpcommit.daemon.children import promised
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.journal import JournalFull
from qmpcommit.daemon.leased_window import LeasedWindow, Part
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.window_opening import Opening
from qmpcommit.daemon.window_reach import AGAIN, AWAY, ask, nothing, writer_of
from qmpcommit.errors import QmpCommitError, QueueFull, WindowError
from qmpcommit.tasks import all_ended
from qmpcommit.window.claims import claim_all_again, clear_named, disturbances
from qmpcommit.window.records import Frozen
from qmpcommit.window.remains import merge_back, new_own_job, own_jobs
from qmpcommit.wire.commit import CommitRequest

ROUNDS = 3
"""How often the commit of an overlay is asked for that ends otherwise than in a pivot."""

Outcomes = dict[str, list[dict[str, Any]]]
"""What the commits on each VM came to."""


class _Ends(NamedTuple):
    """What became of the overlays on one VM: of some the commits' outcomes, why others stay."""

    outcomes: list[dict[str, Any]]
    failed: dict[str, QmpCommitError]


class Closing:
    """Closes windows on the VMs of an engine."""

    def __init__(self, engine: Engine, opening: Opening) -> None:
        self._engine, self._opening = engine, opening

    async def close(self, window: LeasedWindow) -> Outcomes:
        """Close it on each of its VMs, whatever the others come to.

        Raises `WindowError` that names the overlays which stay.
        """
        rate = window.request.bandwidth
        looks = window.undo is None  # else nobody has read anything in it
        closing = [self._close(part, rate, looks=looks) for part in window.parts]
        ended = zip(window.parts, await all_ended(closing), strict=True)
        ends: dict[Part, _Ends] = dict(ended)
        outcomes = {part.vm: end.outcomes for part, end in ends.items()}
        failed = [overlay for end in ends.values() for overlay in end.failed]
        disturbed = "; ".join(text for part in window.parts for text in part.disturbed)
        why = [_what_stays(part, end.failed) for part, end in ends.items() if end.failed]
        if disturbed:
            why.append(
                f"what was read in the window on {window.vm} is no instant's image: {disturbed}."
                " Read it again"
            )
        if why:
            raise WindowError(
                ". ".join(why if failed else [*why, "The window is closed"]),
                vm=window.vm,
                overlays=failed,
                outcomes=[outcome for each in outcomes.values() for outcome in each],
                closed=outcomes,
            )
        return outcomes

    async def _look(self, part: Part) -> None:
        """Whether its disks stood still all the time, before it is closed."""
        if not part.is_open or part.jobs:
            return
        with suppress(QmpCommitError):  # which closing it says better
            found = await ask(self._engine, part, lambda vm: disturbances(vm, part.as_opened))
            if found:
                part.know(disturbed=found)

    async def _claim(self, part: Part) -> None:
        """Of a window that was taken up, or that others had opened."""
        missing = {asked: each for asked, each in part.frozen.items() if asked not in part.claims}
        if not missing:
            return
        with suppress(QmpCommitError):  # which each of its overlays says better
            claims = await ask(self._engine, part, lambda vm: claim_all_again(vm, missing))
            part.claims = {**claims, **part.claims}  # it may have been connected meanwhile

    async def _close(self, part: Part, rate: int | None, *, looks: bool) -> _Ends:
        """On one VM, where its guest goes on first if it was not let go on."""
        if looks:
            await self._look(part)
        if not part.is_open:
            try:
                laid = await self._opening.recover(part)
            except QmpCommitError as error:
                return _Ends([], {each.overlay: error for each in part.frozen.values()})
            if not laid:
                part.closed = True
                return _Ends([], {})
        frozen = part.frozen
        await self._claim(part)
        if not part.jobs:
            await part.note("close", jobs={asked: _job_id(each) for asked, each in frozen.items()})
        merging = (self._merge(part, asked, each, rate) for asked, each in frozen.items())
        ends = await all_ended(merging, QmpCommitError)
        failed = {
            each.overlay: end
            for each, end in zip(frozen.values(), ends, strict=True)
            if isinstance(end, QmpCommitError)
        }
        part.closed = not failed
        if part.closed:
            await release(self._engine, part)
        return _Ends([end for end in ends if isinstance(end, dict)], failed)

    async def _merge(
        self, part: Part, asked: str, each: Frozen, rate: int | None
    ) -> dict[str, Any] | None:
        """One overlay by a promise; None where no disk writes to it any more."""
        error: QmpCommitError | None = None
        writer = partial(writer_of, self._engine, part, each=each)
        for _ in range(ROUNDS):
            promise = await promised(self._engine, part.vm, part.jobs[asked])
            if promise is None:
                disk = await ask(self._engine, part, writer)
                if disk is None:
                    return None
                if self._is_being_merged(disk, each):
                    merging = partial(
                        merge_back, each=each, bandwidth=rate, claim=part.claims.get(asked)
                    )
                    merged = await ask(self._engine, part, merging)
                    return None if merged is None else merged.model_dump(mode="json")
                promise = await self._take(part, asked, each, rate)
            await part.note("merge", commits=list(dict.fromkeys([*part.commits, promise.id])))
            await promise.over.wait()
            if not promise.ended:
                raise asyncio.CancelledError  # the daemon stops
            outcome = promise.outcome or {}
            if outcome.get("action") == "pivot":
                return outcome
            why = (promise.error or {}).get("message") or f"it ended with {outcome.get('action')}"
            error = WindowError(f"commit {promise.id}: {why}", vm=part.vm)
            part.log.warning("window_not_merged", disk=each.disk, why=str(error))
            await part.note("close", jobs={**part.jobs, asked: _job_id(each)})
        assert error is not None
        if await ask(self._engine, part, writer) is None:
            return None
        raise error

    def _is_being_merged(self, disk: Disk, each: Frozen) -> bool:
        """Whether the window's commit is there, and nobody owns it: an undoing was cut off."""
        owned = {promise.job_id for promise in self._engine.live.values()}
        return any(job not in owned for job in own_jobs(disk, each.overlay))

    async def _take(self, part: Part, asked: str, each: Frozen, rate: int | None) -> Promise:
        request = CommitRequest(
            disk=each.overlay,
            policy=Pivot(),
            shallow=True,
            delete=True,
            bandwidth=rate,
            job_id=part.jobs[asked],
        )
        while True:
            try:
                promise, _ = await self._engine.take(part.vm, request, None, "")
            except (QueueFull, JournalFull, *AWAY) as error:
                part.problem = str(error)
                await ask(self._engine, part, nothing)
                await asyncio.sleep(AGAIN)
            else:
                part.problem = ""
                return promise


async def release(engine: Engine, part: Part) -> None:
    """Its disks are anybody's; safe to repeat."""
    claims, part.claims = list(part.claims.values()), {}
    if not claims and part.released:
        return
    try:
        async with engine.registry.use(engine.vm(part.vm)) as session:
            await release_all(claims, session)
            await clear_named(session, part.name)
            part.released = True
    except QmpCommitError:  # it is away, and takes them with it where it has ended
        for claim in claims:
            claim.abandon()


def _what_stays(part: Part, failed: Mapping[str, QmpCommitError]) -> str:
    what = "; ".join(f"{overlay}: {error!s}" for overlay, error in failed.items())
    return (
        f"the window {part.name} on {part.vm} could not be closed. It stays, and was not deleted,"
        f" since it may hold the newest data: {what}"
    )


def _job_id(each: Frozen) -> str:
    return new_own_job(each.overlay, each.node_name)
