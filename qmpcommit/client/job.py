"""A commit that the daemon has promised, as its client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Literal

from qmpcommit.client.problems import error_from
from qmpcommit.errors import CommitFailed, DaemonError, DaemonLost, JobConflict, RemoteJobDetached

if TYPE_CHECKING:
    from qmpcommit.client.host import Client
    from qmpcommit.client.http import Reply
    from qmpcommit.commit.outcome import CommitOutcome, JobProgress
    from qmpcommit.commit.phases import Phase
    from qmpcommit.wire.commit import CommitView

HOLD = 20.0
"""Seconds that the daemon is asked to wait for news before it answers that there are none."""

_BEFORE_READY = ("", "starting", "copying")


class RemoteJob:
    """One commit of the daemon; as `CommitJob`, but for what only a process of its own can do.

    `id` is the commit's id at the daemon, `job_id` that of the job in QEMU; `view` is what was
    last seen of it. Waiting goes on over a restart of the daemon, as long as `Client.patience`
    allows, and ends with `DaemonLost` otherwise; the commit goes on in any case.
    """

    def __init__(self, client: Client, view: CommitView) -> None:
        self._client = client
        self.view = view
        self.id, self.job_id, self.vm, self.disk = view.id, view.job_id, view.vm, view.disk
        self._asking: set[asyncio.Task[Reply]] = set()
        self._left = False

    def __repr__(self) -> str:
        return f"RemoteJob({self.id!r}, vm={self.vm!r}, disk={self.disk!r}, state={self.state!r})"

    @property
    def state(self) -> str:
        """``queued``, ``running``, ``done``, ``failed`` or ``cancelled``, when last seen."""
        return self.view.state

    @property
    def phase(self) -> str:
        """Where the commit was when last seen, as `JobProgress.phase`; ``queued`` before."""
        return self.view.phase or ("queued" if self.state == "queued" else "starting")

    @property
    def done(self) -> bool:
        """Whether the outcome, or the error, is there."""
        return self.state not in ("queued", "running")

    async def refresh(self) -> CommitView:
        """Look at it again."""
        return await self._look()

    async def ready(self) -> None:
        """Wait until the second phase has begun (``BLOCK_JOB_READY``).

        Raises what `wait` raises if the job ends without it; returns at once for an
        intermediate layer that has ended, since that has no second phase.
        """
        while not self.done and self.view.phase in _BEFORE_READY:
            await self._look(HOLD, self.view.phase)
        if self.done:
            self._result()

    async def wait(self) -> CommitOutcome:
        """The outcome, or the `QmpCommitError` that the commit ended with, as the library's own.

        Cancelling the wait does not cancel the commit: see `cancel`.
        """
        while not self.done:
            await self._look(HOLD)
        return self._result()

    async def progress(self, every: float = 0.5) -> AsyncIterator[JobProgress]:
        """How far it is, now, `every` so many seconds, and once at the end."""
        from qmpcommit.commit.pace import Meter

        meter = Meter(speed=self.view.bandwidth or 0)
        clock = asyncio.get_running_loop().time
        done = total = 0
        view = await self._look()
        while not self.done and self.phase != "finished":
            seen = view.progress
            if seen is not None:
                done, total = seen.current, seen.total
            status = seen.status if seen else ""
            yield meter.read(clock(), done, total, _phase(self.phase), status)
            view = await self._look(min(every, HOLD), view.phase)
        while not self.done:  # what is stale is cleared away
            view = await self._look(HOLD)
        if view.outcome is not None:
            done = view.outcome.bytes_committed
        yield meter.last(done, max(done, total), _phase(self.phase), "null")

    async def pivot(self) -> None:
        """Decide for the base, and wait until the job has ended.

        The decision is durable before the daemon acts on it. Raises `NotReady` before READY (the
        commit goes on unharmed), `JobConflict` when the opposite is decided already or the
        commit has ended.
        """
        await self._order("pivot")

    async def keep(self) -> None:
        """Decide for the overlay; as `pivot`."""
        await self._order("keep")

    async def abort(self) -> None:
        """Cancel the commit, queued or in either phase; the overlay stays active."""
        await self._order("abort")

    cancel = abort

    async def decide(self, action: Literal["pivot", "keep", "abort"]) -> None:
        """Decide, and return when the daemon has taken it; raises as `pivot` does."""
        path = f"/v1/commits/{self.id}/decision"
        reply = await self._ask("POST", path, {"action": action})
        try:
            self._see(reply)
        except JobConflict:
            if not reply.again:
                raise
            # The first time it was heard, and the reply was lost.
            view = await self._look()
            if view.decision != action and not (action == "abort" and view.state == "cancelled"):
                raise

    async def detach(self) -> None:
        """Follow the commit no longer: whoever waits here gets `DaemonLost`, the daemon goes on."""
        self._left = True
        for task in list(self._asking):
            task.cancel()
        if self._asking:
            await asyncio.wait(set(self._asking))

    async def _order(self, action: Literal["pivot", "keep", "abort"]) -> None:
        await self.decide(action)
        while not self.done:
            await self._look(HOLD)

    async def _look(self, hold: float = 0.0, phase: str | None = None) -> CommitView:
        """See it again: at once, or within `hold` seconds when it has ended or left the phase."""
        path = f"/v1/commits/{self.id}"
        if hold:
            path += f"?wait={hold:g}" + ("" if phase is None else f"&phase={phase}")
        try:
            return self._see(await self._ask("GET", path, hold=hold))
        except DaemonError as error:
            if error.status != 503 or not hold:
                raise
            return self.view  # it is busy, and it is there

    async def _ask(
        self, method: str, path: str, body: dict[str, str] | None = None, *, hold: float = 0.0
    ) -> Reply:
        """As `Client.ask`, until `detach`."""
        if self._left:
            raise self._gone()
        task = asyncio.create_task(self._client.ask(method, path, body, hold=hold))
        self._asking.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._left and not (current is not None and current.cancelling()):
                raise self._gone() from None
            raise
        except DaemonLost as error:
            error.add(**self._where())
            raise
        finally:
            self._asking.discard(task)

    def _see(self, reply: Reply) -> CommitView:
        from qmpcommit.client.host import commit_view

        self.view = commit_view(self._client.parse(reply))
        return self.view

    def _result(self) -> CommitOutcome:
        if self.view.outcome is not None:
            return self.view.outcome
        if self.view.error is not None:
            raise error_from(self.view.error)
        raise CommitFailed(
            f"the commit of {self.disk} of {self.vm} was cancelled while it waited in the queue."
            " Nothing was sent",
            begun=False,
            **self._where(),
        )

    def _gone(self) -> RemoteJobDetached:
        return RemoteJobDetached(
            f"commit {self.id} of {self.disk} of {self.vm} is no longer followed from here; it goes"
            f" on. The daemon's commit('{self.id}') takes it up",
            **self._where(),
        )

    def _where(self) -> dict[str, object]:
        return {"vm": self.vm, "disk": self.disk, "job_id": self.job_id}


def _phase(told: str) -> Phase:
    """A phase that this version does not know is one on the way."""
    from qmpcommit.commit.phases import Phase

    return Phase(told) if told in Phase.__members__.values() else Phase.COPYING
