"""Snapshot windows that are kept open by a lease, and closed when it ends.

A window is in the journal before its first QMP command, and each step of its opening and closing
before it is taken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from qmpcommit.commit.claim import Claim
from qmpcommit.daemon.engine import Engine, key_row
from qmpcommit.daemon.journal import Statement
from qmpcommit.daemon.keeping import error_dict
from qmpcommit.daemon.kinds import Kind
from qmpcommit.daemon.leased_window import LeasedWindow, Part
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.window_closing import Closing, release
from qmpcommit.daemon.window_opening import Opening
from qmpcommit.daemon.window_watch import Orphan, Watch
from qmpcommit.errors import (
    JobConflict,
    QmpCommitError,
    QueueFull,
    WindowError,
    WindowNotFound,
)
from qmpcommit.guest.run_state import thaw
from qmpcommit.log import Log
from qmpcommit.session import Session
from qmpcommit.window.claims import claim_all_again, closable
from qmpcommit.window.records import NotedWindow
from qmpcommit.wire.window import WindowMember, WindowRequest, WindowView

HAND_OVER = 1.0
"""Seconds that a window which is being opened gets when the daemon stops."""


class Windows(Kind[LeasedWindow]):
    """All windows of the daemon."""

    of, called, missing = LeasedWindow, "window", WindowNotFound
    hint, bug = "; GET /v1/windows lists them", WindowError

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.watch = Watch(engine, self.live)
        self._opening = Opening(engine)
        self._closing = Closing(engine, self._opening)
        self._adopting = asyncio.Lock()
        self._log = Log()
        engine.keeper.claim_of = self._claim_of

    # -- the story --------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the windows of a former daemon."""
        await super().recover()
        for window in self.live.values():
            window.found_again = True

    async def on_up(self, vm: VM) -> None:
        """Let a guest go on that a former daemon held; then see which windows there are."""
        session = vm.session
        assert session is not None
        here = [
            (window, part)
            for window in self.live.values()
            for part in window.parts
            if part.vm == vm.name
        ]
        for window, part in here:
            if window.found_again and part.held is not None:
                try:
                    await thaw(session, part.held, part.agent, patience=0.0)
                except QmpCommitError as error:  # it is tried again when the window is recovered
                    part.log.warning("thaw_failed", error=str(error))
        for _, part in here:
            if part.is_open and (not part.claims or part.claimed_in != vm.identity):
                await self._claim_again(part, session)
                part.claimed_in = vm.identity
        await self.watch.came(vm)

    async def _claim_again(self, part: Part, session: Session) -> None:
        """What a former daemon had claimed, or this one in a QEMU that has ended."""
        for former in part.claims.values():
            former.abandon()
        part.claims = {}
        with suppress(QmpCommitError):
            part.claims = await claim_all_again(session, part.frozen)

    def _claim_of(self, promise: Promise) -> Claim | None:
        """What holds the disk of a commit that closes a window."""
        for window in self.live.values():
            for part in window.parts:
                for asked, job_id in part.jobs.items():
                    if (part.vm, job_id) == (promise.vm, promise.job_id):
                        return part.claims.get(asked)
        return None

    def busy(self, vm: str) -> list[str]:
        """The windows that are not closed."""
        live = self.live.values()
        return [window.id for window in live if vm in [part.vm for part in window.parts]]

    def start(self) -> None:
        """Go on with all of them."""
        super().start()
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
        metrics, now = self._engine.metrics, time.time()
        metrics.open_age.clear()
        opened: dict[str, float] = {}
        for window in self.live.values():
            for vm in window.vms if window.state == "open" else ():
                opened[vm] = min(window.created, opened.get(vm, now))
        for vm, since in opened.items():
            metrics.open_age.labels(vm).set(max(0.0, now - since))

    # -- what clients ask for ---------------------------------------------------------------------

    async def open(
        self, request: WindowRequest, key: str | None, fingerprint: str
    ) -> tuple[LeasedWindow, bool]:
        """A window that is open; and whether its key had been given before.

        Raises what `open_window` raises, and what `Engine.keyed` and `Engine.check_room` do.
        """
        make = partial(self._make, request, key, fingerprint)
        window, again = await self._engine.once(key, fingerprint, self.find, make)
        await window.opened.wait()
        if window.failure is not None:
            raise window.failure
        if window.state == "opening" or (
            window.undo and not window.ended
        ):  # which it is for the next daemon
            raise QueueFull("the daemon is stopping; ask the next one")
        return window, again

    async def _make(
        self, request: WindowRequest, key: str | None, fingerprint: str
    ) -> LeasedWindow:
        self._engine.check_room()
        for vm in request.disks:
            self._engine.vm(vm)
        window = LeasedWindow.new(request, self._journal)
        window.state = "opening"
        await self.promise(window, *key_row(key, fingerprint, window.id))
        return window

    async def find(self, known_as: str) -> LeasedWindow:
        """The window with that id, or of that name; raises `WindowNotFound`."""
        names = {part.name: each.id for each in self.live.values() for part in each.parts}
        return await super().find(names.get(known_as, known_as))

    def view_of(self, row: Mapping[str, Any]) -> WindowView:
        """One that has ended as the API shows it, from its row; raises ValueError."""
        return self.of.load(row, self._journal).view()

    async def _load(self, row: Mapping[str, Any]) -> LeasedWindow:
        window = await super()._load(row)
        window.opened.set()
        return window

    async def renew(self, window_id: str, seconds: float | None) -> LeasedWindow:
        """Its lease ends so many seconds from now; raises `JobConflict` where it is too late."""
        return await self._engine.shielded(self._renew(window_id, seconds))

    async def _renew(self, window_id: str, seconds: float | None) -> LeasedWindow:
        window = await self.find(window_id)
        async with window.lock:
            if window.state not in ("opening", "open"):
                raise JobConflict(
                    f"the lease of window {window_id} can't be renewed: it is {window.state}",
                    vm=window.vm,
                )
            await window.renew(seconds or window.request.lease)
            window.changed.set()
        return window

    async def close(self, window_id: str) -> LeasedWindow:
        """Have it closed, which is durable when this returns; an orphan too."""
        return await self._engine.shielded(self._close(window_id))

    async def _close(self, window_id: str) -> LeasedWindow:
        try:
            window = await self.find(window_id)
        except WindowNotFound:
            async with self._adopting:
                orphan = self.watch.orphan(window_id)
                if orphan is None:
                    return await self.find(window_id)  # another request took it up, or raises
                return await self._adopt(orphan)
        async with window.lock:
            if window.state == "opening":
                await window.renew(0.0)
                window.changed.set()
            elif window.state == "open":
                await window.move("closing")
                window.changed.set()
        return window

    async def _adopt(self, orphan: Orphan) -> LeasedWindow:
        """A window that nobody here opened becomes one of ours, which is closing.

        Raises `JobConflict` where its owner lives.
        """
        self._engine.check_room()
        async with self._engine.registry.use(self._engine.vm(orphan.vm), wait=1.0) as session:
            _, held = await closable(session, orphan.disks.values(), ())
        for conflict in held:
            raise conflict
        members = [WindowMember(vm=orphan.vm, disk=disk) for disk in orphan.disks]
        request = WindowRequest(members=members, lease=1.0)
        window = LeasedWindow.new(request, self._journal)
        window.state = "closing"
        window.expires = window.created
        noted = NotedWindow(orphan.name, orphan.disks)
        window.parts[0].know(name=orphan.name, window=noted, cwd=orphan.cwd, step="open")
        await self.promise(window)
        return window

    # -- the life of one --------------------------------------------------------------------------

    async def _see_through(self, window: LeasedWindow) -> None:
        try:
            await super()._see_through(window)
        finally:
            window.opened.set()

    async def _run(self, window: LeasedWindow) -> None:
        if window.state == "opening":
            await self._opening.open(window)
        if window.undo is None:
            window.opened.set()
        if window.state == "open":
            await self._until_lease_ends(window)
        outcomes = await self._closing.close(window)
        if window.undo is not None:
            raise window.failure or WindowError(window.undo["message"])
        await window.end("done", outcome={"outcomes": outcomes})
        window.log.info("window_done")

    async def _after(self, window: LeasedWindow) -> None:
        window.opened.set()
        self.watch.forget(window)
        for part in window.parts:
            await release(self._engine, part)

    async def _fail(self, window: LeasedWindow, error: QmpCommitError) -> None:
        undo = window.undo
        if undo is not None and error is not window.failure and undo["message"] != str(error):
            why = (
                f"the window on {window.vm} did not open on all of its VMs, and what it had begun"
                f" could not all be undone: {error}"
            )
            error = WindowError(why, **error.facts)
        error.add(vm=window.vm)
        window.failure = error
        window.log.warning("window_failed", error=type(error).__name__, why=str(error))
        opening = window.state == "opening" or undo is not None
        # One that was never open may be asked for again with the same key.
        sql = "DELETE FROM keys WHERE commit_id = ?"
        beside = [Statement(sql, (window.id,))] if opening else []
        await window.end("failed", error=error_dict(error), beside=beside)

    async def _until_lease_ends(self, window: LeasedWindow) -> None:
        while window.state == "open":
            window.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, window.left)):
                    await window.changed.wait()
            async with window.lock:
                if window.state == "open" and window.left <= 0:
                    window.log.info("lease_ended")
                    await window.move("closing")
