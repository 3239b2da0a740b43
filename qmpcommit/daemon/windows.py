"""Snapshot windows that are kept open by a lease, and closed when it ends.

A window is in the journal before its first QMP command, and each step of its opening before it
is taken. It is closed by the daemon's ordinary commits, whose jobs' ids are noted first, so that
a daemon which is started again finds them and asks for nothing twice.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from qmpcommit.commit.plan import JOB_PREFIX
from qmpcommit.commit.policy import Pivot
from qmpcommit.commit.quiesce import thaw
from qmpcommit.commit.window import new_window_name, open_window, recover_window
from qmpcommit.commit.window_records import Frozen, NotedWindow
from qmpcommit.commit.window_remains import clear, disk_over
from qmpcommit.daemon.engine import Engine, key_row
from qmpcommit.daemon.keeping import error_dict
from qmpcommit.daemon.leased_window import LeasedWindow
from qmpcommit.daemon.models import CommitRequest
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.registry import VM, is_alive
from qmpcommit.daemon.window_models import WindowRequest
from qmpcommit.daemon.window_watch import Orphan, Watch
from qmpcommit.errors import (
    ConnectError,
    DeadlineExceeded,
    JobConflict,
    MonitorLost,
    QmpCommitError,
    QueueFull,
    VMGone,
    WindowError,
    WindowNotFound,
)
from qmpcommit.journal import JournalFull, Statement
from qmpcommit.log import Log
from qmpcommit.session import Session

T = TypeVar("T")

ROUNDS = 3
"""How often the commit of an overlay is asked for that ends otherwise than in a pivot."""

AGAIN = 0.5
"""Seconds between two tries where a VM is away or nothing can be promised."""

HAND_OVER = 1.0
"""Seconds that a window which is being opened gets when the daemon stops."""

_AWAY = (ConnectError, MonitorLost, VMGone)


class Windows:
    """All windows of the daemon; a `Story` of the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.live: dict[str, LeasedWindow] = {}
        self.watch = Watch(engine, self.live)
        self._adopting = asyncio.Lock()
        self._log = Log()

    # -- the story --------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the windows of a former daemon."""
        sql = (
            "SELECT * FROM undertakings WHERE kind = 'window'"
            " AND state IN ('opening', 'open', 'closing') ORDER BY created, rowid"
        )
        for row in await self._engine.journal.read(sql):
            try:
                window = LeasedWindow.load(row, self._engine.journal)
            except ValueError as error:  # written by another version: said, and left as it is
                self._log.warning("window_unreadable", window=row["id"], why=str(error))
                continue
            window.found_again = True
            self.live[window.id] = window

    async def on_up(self, vm: VM) -> None:
        """Let a guest go on that a former daemon held; then see which windows there are."""
        session = vm.session
        assert session is not None
        for window in list(self.live.values()):
            if window.vm == vm.name and window.found_again and window.held is not None:
                try:
                    agent = window.noted.get("agent")
                    await thaw(session, window.held, agent, patience=0.0)
                except QmpCommitError as error:  # it is tried again when the window is recovered
                    window.log.warning("thaw_failed", error=error.message)
        await self.watch.came(vm)

    def owned(self, vm: str) -> set[str]:
        """The jobs that close windows belong to promises."""
        return set()

    def busy(self, vm: str) -> list[str]:
        """The windows that are not closed."""
        return [window.id for window in self.live.values() if window.vm == vm]

    def start(self) -> None:
        """Go on with all of them."""
        for window in self.live.values():
            self._launch(window)
        self.watch.start()

    async def stop(self) -> None:
        """Hand over: what is open stays so, and what is being opened is undone."""
        tasks = [window.task for window in self.live.values() if window.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=HAND_OVER)
        for window in self.live.values():
            window.opened.set()
            window.over.set()
        await self.watch.stop()

    def gauge(self) -> None:
        """Bring the gauges up to date."""
        self.watch.gauge()

    # -- what clients ask for ---------------------------------------------------------------------

    async def open(
        self, vm: str, request: WindowRequest, key: str | None, fingerprint: str
    ) -> tuple[LeasedWindow, bool]:
        """A window that is open; and whether its key had been given before.

        Raises what `open_window` raises, and what `Engine.keyed` and `Engine.check_room` do.
        """
        async with self._engine.keyed(key, fingerprint) as known:
            if known is not None:
                window = await self.get(known)
            else:
                self._engine.check_room()
                self._engine.vm(vm)
                window = LeasedWindow(vm, request, self._engine.journal)
                window.state = "opening"
                window.noted = {"name": new_window_name()}
                window.expires = window.created + request.lease
                await self._promise(window, *key_row(key, fingerprint, window.id))
        await window.opened.wait()
        if window.failure is not None:
            raise window.failure
        if window.state == "opening":  # which it is for the next daemon
            raise QueueFull("the daemon is stopping; ask the next one")
        return window, known is not None

    async def _promise(self, window: LeasedWindow, *beside: Statement) -> None:
        self.live[window.id] = window
        try:
            statements = [window.insertion(), *beside]
            await self._engine.journal.write(*statements, events=[window.event()])
        except BaseException:
            del self.live[window.id]
            raise
        self._launch(window)

    async def get(self, window_id: str) -> LeasedWindow:
        """The window with that id, or of that name; raises `WindowNotFound`."""
        window = self.live.get(window_id)
        for each in self.live.values():
            if window is None and each.name == window_id:
                window = each
        if window is not None:
            return window
        sql = "SELECT * FROM undertakings WHERE kind = 'window' AND id = ?"
        rows = await self._engine.journal.read(sql, window_id)
        if not rows:
            raise WindowNotFound(f"there is no window '{window_id}'; GET /v1/windows lists them")
        window = LeasedWindow.load(rows[0], self._engine.journal)
        window.opened.set()
        return window

    async def renew(self, window_id: str, seconds: float | None) -> LeasedWindow:
        """Its lease ends so many seconds from now; raises `JobConflict` where it is too late."""
        window = await self.get(window_id)
        async with window.lock:
            if window.state not in ("opening", "open"):
                raise JobConflict(
                    f"the lease of window {window_id} can't be renewed: it is {window.state}",
                    vm=window.vm,
                )
            await window.renew(time.time() + (seconds or window.request.lease))
            window.changed.set()
        return window

    async def close(self, window_id: str) -> LeasedWindow:
        """Have it closed, which is durable when this returns; an orphan too."""
        try:
            window = await self.get(window_id)
        except WindowNotFound:
            async with self._adopting:
                orphan = self.watch.orphan(window_id)
                if orphan is None:
                    return await self.get(window_id)  # another request took it up, or raises
                return await self._adopt(orphan)
        async with window.lock:
            if window.state == "opening":
                await window.renew(time.time())
                window.changed.set()
            elif window.state == "open":
                await window.move("closing")
                window.changed.set()
        return window

    async def _adopt(self, orphan: Orphan) -> LeasedWindow:
        """A window that nobody here opened becomes one of ours, which is closing."""
        self._engine.check_room()
        request = WindowRequest(disks=list(orphan.disks), lease=1.0)
        window = LeasedWindow(orphan.vm, request, self._engine.journal)
        window.state = "closing"
        noted = NotedWindow(orphan.name, orphan.disks)
        window.noted = {
            "name": orphan.name,
            "window": noted.model_dump(mode="json"),
            "cwd": orphan.cwd,
        }
        window.expires = window.created
        await self._promise(window)
        return window

    # -- the life of one --------------------------------------------------------------------------

    def _launch(self, window: LeasedWindow) -> None:
        window.task = asyncio.create_task(self._live(window), name=f"window {window.id}")

    async def _live(self, window: LeasedWindow) -> None:
        """One window to its end."""
        try:
            if window.state == "opening":
                await self._open(window)
            window.opened.set()
            if window.state == "open":
                await self._until_lease_ends(window)
            outcomes = await self._close(window)
            await window.end("done", outcome={"outcomes": outcomes})
            window.log.info("window_done", name=window.name)
        except QmpCommitError as error:
            await self._fail(window, error)
        except Exception as error:  # a bug of ours must not leave a window without an end
            window.log.warning("bug", error=repr(error))
            await self._fail(window, WindowError(f"internal error: {error!r}", vm=window.vm))
        finally:
            window.opened.set()
        self.live.pop(window.id, None)
        self.watch.forget(window)

    async def _fail(self, window: LeasedWindow, error: QmpCommitError) -> None:
        error.add(vm=window.vm)
        window.failure = error
        window.log.warning("window_failed", error=type(error).__name__, why=error.message)
        opening = window.state == "opening"
        # One that was never open may be asked for again with the same key.
        sql = "DELETE FROM keys WHERE commit_id = ?"
        beside = [Statement(sql, (window.id,))] if opening else []
        await window.end("failed", error=error_dict(error), beside=beside)

    async def _open(self, window: LeasedWindow) -> None:
        lost: QmpCommitError | None = None
        if not window.found_again:
            try:
                await self._begin(window)
            except (DeadlineExceeded, *_AWAY) as error:
                if window.laid is None:
                    raise  # nothing was sent
                lost = error
                window.log.info("window_looked_for", why=error.message)
        if window.noted.get("step") != "open":
            if window.laid is None:
                raise lost or WindowError(
                    f"the daemon ended before it opened the window on {window.vm}; nothing was"
                    " sent. Ask again",
                    vm=window.vm,
                )
            await self._recover(window, lost)
        window.found_again = False
        async with window.lock:
            await window.move("open")

    async def _begin(self, window: LeasedWindow) -> None:
        vm, asked = self._engine.vm(window.vm), window.request
        async with self._engine.registry.use(vm, wait=1.0) as session:
            window.noted = {**window.noted, "identity": vm.identity, "cwd": session.cwd}
            await open_window(
                session,
                asked.disks,
                overlay_dir=asked.overlay_dir,
                freeze=asked.freeze,
                agent=asked.agent,
                name=window.name,
                ledger=window,
            )

    async def _recover(self, window: LeasedWindow, lost: QmpCommitError | None) -> None:
        """What was laid is open; of what was not, nothing is left. The guest goes on first."""
        noted = window.laid
        assert noted is not None
        found = await self._ask(window, lambda session: recover_window(session, noted))
        if found is None:
            raise lost or WindowError(
                f"the window on {window.vm} was not opened, for the daemon ended meanwhile. The"
                " guest goes on, and nothing is left of the window. Ask again",
                vm=window.vm,
            )
        laid = replace(noted, disks=dict(found))
        await window.note("open", window=laid)

    async def _until_lease_ends(self, window: LeasedWindow) -> None:
        while window.state == "open":
            window.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, window.left)):
                    await window.changed.wait()
            async with window.lock:
                if window.state == "open" and window.left <= 0:
                    window.log.info("lease_ended", name=window.name)
                    await window.move("closing")

    # -- closing ----------------------------------------------------------------------------------

    async def _close(self, window: LeasedWindow) -> list[dict[str, Any]]:
        """Commit all overlays back; raises `WindowError` that names those which stay."""
        frozen = window.frozen
        if not window.jobs:
            await window.note(
                "close", jobs={asked: _job_id(each) for asked, each in frozen.items()}
            )
        merging = (self._merge(window, asked, each) for asked, each in frozen.items())
        ends = await asyncio.gather(*merging, return_exceptions=True)
        outcomes = [end for end in ends if isinstance(end, dict)]
        failed: list[tuple[Frozen, QmpCommitError]] = []
        for each, end in zip(frozen.values(), ends, strict=True):
            if isinstance(end, QmpCommitError):
                failed.append((each, end))
            elif isinstance(end, BaseException):
                raise end
        if failed:
            what = "; ".join(f"{each.overlay}: {error.message}" for each, error in failed)
            raise WindowError(
                f"the window {window.name} on {window.vm} could not be closed. It stays, and was"
                f" not deleted, since it may hold the newest data: {what}",
                vm=window.vm,
                overlays=[each.overlay for each, _ in failed],
                outcomes=outcomes,
            )
        return outcomes

    async def _merge(self, window: LeasedWindow, asked: str, each: Frozen) -> dict[str, Any] | None:
        """One overlay by a promise; None where no disk writes to it any more."""
        error: QmpCommitError | None = None
        for _ in range(ROUNDS):
            promise = await self._promised(window, asked)
            if promise is None:
                if not await self._ask(window, lambda vm: self._is_laid(window, vm, each)):
                    return None
                promise = await self._take(window, asked, each)
            commits = [*window.noted.get("commits", ()), promise.id]
            await window.note("merge", commits=list(dict.fromkeys(commits)))
            await promise.over.wait()
            if not promise.ended:
                raise asyncio.CancelledError  # the daemon stops
            outcome = promise.outcome or {}
            if outcome.get("action") == "pivot":
                return outcome
            why = (promise.error or {}).get("message") or f"it ended with {outcome.get('action')}"
            error = WindowError(f"commit {promise.id}: {why}", vm=window.vm)
            window.log.warning("window_not_merged", disk=each.disk, why=error.message)
            await window.note("close", jobs={**window.jobs, asked: _job_id(each)})
        assert error is not None
        if not await self._ask(window, lambda vm: self._is_laid(window, vm, each)):
            return None
        raise error

    async def _promised(self, window: LeasedWindow, asked: str) -> Promise | None:
        """The commit that was asked for already, perhaps by a former daemon."""
        job_id = window.jobs[asked]
        for promise in self._engine.live.values():
            if (promise.vm, promise.job_id) == (window.vm, job_id):
                return promise
        sql = "SELECT id FROM commits WHERE vm = ? AND job_id = ?"
        rows = await self._engine.journal.read(sql, window.vm, job_id)
        return await self._engine.commit(rows[0]["id"]) if rows else None

    async def _take(self, window: LeasedWindow, asked: str, each: Frozen) -> Promise:
        request = CommitRequest(
            disk=each.overlay,
            policy=Pivot(),
            shallow=True,
            delete=True,
            bandwidth=window.request.bandwidth,
            job_id=window.jobs[asked],
        )
        while True:
            try:
                promise, _ = await self._engine.take(window.vm, request, None, "")
            except (QueueFull, JournalFull, *_AWAY) as error:
                window.problem = error.message
                await self._ask(window, _nothing)
                await asyncio.sleep(AGAIN)
            else:
                window.problem = ""
                return promise

    async def _is_laid(self, window: LeasedWindow, session: Session, each: Frozen) -> bool:
        """Whether a disk writes to this overlay; raises where it holds data and none does."""
        _, graph = await session.look()
        if disk_over(graph, each.overlay) is not None:
            return True
        remains = await clear(session, [each.overlay])
        if not remains:
            return False
        vm = self._engine.registry.vms.get(window.vm)
        before, now = window.noted.get("identity"), vm.identity if vm is not None else ""
        anew = f"{window.vm} was started anew; " if before and now and before != now else ""
        what = "; ".join(each.message for each in remains)
        raise WindowError(
            f"{anew}no disk of {window.vm} writes to this overlay: {what}", vm=window.vm
        )

    async def _ask(self, window: LeasedWindow, work: Callable[[Session], Awaitable[T]]) -> T:
        """Do something on the VM's session, over losses of its monitor.

        Raises `VMGone` where the VM does not come back within the configured time.
        """
        since = time.monotonic()
        limit = self._engine.config.limits.gone_after
        while True:
            try:
                vm = self._engine.registry.vms.get(window.vm)
                if vm is None:
                    raise ConnectError(f"no VM is called '{window.vm}' at the moment")
                async with self._engine.registry.use(vm, wait=1.0) as session:
                    answer = await work(session)
                window.problem = ""
                return answer
            except _AWAY as error:
                window.problem = f"{window.vm} is away: {error.message}"
                gone = not is_alive(str(window.noted.get("identity") or ""))
                if gone and time.monotonic() - since > limit:
                    raise VMGone(
                        f"{window.vm} is gone, and did not come back within {limit:g} s. Start it"
                        " with the overlay as its disk, for that is the newest; the window is then"
                        " listed as an orphan, and DELETE closes it",
                        vm=window.vm,
                    ) from error
            await asyncio.sleep(AGAIN)


async def _nothing(session: Session) -> None:
    """Only see that the VM is there."""


def _job_id(each: Frozen) -> str:
    stem = each.node_name.removesuffix("-top")
    stem = stem if stem.startswith(JOB_PREFIX) else f"{JOB_PREFIX}window"
    return f"{stem}-{os.urandom(4).hex()}"
