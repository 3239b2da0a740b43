"""Which windows are open, how old and how large they are, whoever opened them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from qmpcommit.commit.claim import clear_dead, owners_of
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.leased_window import LeasedWindow, path_of, shown
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.sizes import SIZES, allocated
from qmpcommit.errors import QmpCommitError
from qmpcommit.log import Log
from qmpcommit.tasks import stop
from qmpcommit.window.records import Frozen
from qmpcommit.window.run import age_of
from qmpcommit.wire.window import WindowView

AT_ONCE = 4
"""How many VMs that were just connected are looked at at once."""

EVERY = 5.0
"""Seconds between two looks at the overlays' files."""

LATE = 60.0
"""Seconds for which a window may stay open after its lease before that is warned of."""

LOOK = 5.0
"""Seconds that a VM gets to tell its windows."""


class Orphan(NamedTuple):
    """A window that was found on a VM; `disks` by the disks' names."""

    vm: str
    name: str
    disks: dict[str, Frozen]
    cwd: str | None

    def view(self) -> WindowView:
        """As the API shows it."""
        age = age_of(self.name)
        return WindowView(
            id=self.name,
            vm=self.vm,
            state="orphan",
            name=self.name,
            created=None if age is None else time.time() - age,
            disks=shown(self.disks, self.cwd),
            problem="nobody here opened it: DELETE it to have it closed, once its owner is gone",
        )


class Seen(NamedTuple):
    """One overlay as metrics show it; `late` for how long its lease is over."""

    vm: str
    window: str
    disk: str
    path: str
    age: float
    late: float


class Watch:
    """Looks at windows: those that are held open (`live`), and those found at connecting."""

    def __init__(self, engine: Engine, live: Mapping[str, LeasedWindow]) -> None:
        self._engine, self._live = engine, live
        self._found: dict[str, list[Orphan]] = {}
        self._warned: set[tuple[str, str, str]] = set()
        self._newcomers: dict[str, None] = {}
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._log = Log()

    def start(self) -> None:
        """Begin to warn."""
        self._task = asyncio.create_task(self._watch(), name="windows' watch")

    async def stop(self) -> None:
        """Warn no more."""
        if self._task is not None:
            await stop(self._task)

    async def came(self, vm: VM) -> None:
        """A VM was connected: it is looked at soon, a few at a time, or now if it goes at once."""
        if vm.connect == "on-demand":
            await self.look_at(vm)
        else:
            self._newcomers[vm.name] = None
            self._came.set()

    async def look_at(self, vm: VM) -> None:
        """See which windows are open on a VM that is connected; nothing is changed."""
        session = vm.session
        if session is None:
            return
        try:
            async with asyncio.timeout(LOOK):
                found: dict[str, dict[str, Frozen]] = {}
                for each in await session.windows():
                    frozen = Frozen(each.disk, each.filename, each.overlay, each.node_name)
                    found.setdefault(each.window, {})[each.disk] = frozen
                await clear_dead(session, await owners_of(session))
                cwd = session.cwd
                self._found[vm.name] = [Orphan(vm.name, n, d, cwd) for n, d in found.items()]
        except (QmpCommitError, TimeoutError):
            pass  # what was seen last counts
        except Exception as error:  # a bug of ours must end neither the watch nor the connection
            self._log.warning("bug", vm=vm.name, error=repr(error))
        for orphan in self.orphans(vm.name):
            if self._first(vm.name, orphan.name, "orphan"):
                overlays = [each.overlay for each in orphan.disks.values()]
                self._log.warning(
                    "orphan_window", vm=vm.name, window=orphan.name, overlays=overlays
                )

    async def look_again(self, vm: str | None) -> None:
        """See what became of orphans, and what is new on this VM; only where it is connected."""
        names = {vm} if vm is not None else {name for name, found in self._found.items() if found}
        known = self._engine.registry.vms
        connected = [known[n] for n in names if n in known and known[n].state == "connected"]
        await asyncio.gather(*(self.look_at(each) for each in connected))

    def orphans(self, vm: str | None = None) -> list[Orphan]:
        """Windows that are none of ours."""
        ours = {part.name for window in self._live.values() for part in window.parts}
        return [
            orphan
            for name, found in self._found.items()
            if name in self._engine.registry.vms and vm in (None, name)
            for orphan in found
            if orphan.name not in ours
        ]

    def orphan(self, name: str) -> Orphan | None:
        """The orphan of that name."""
        return next((each for each in self.orphans() if each.name == name), None)

    def forget(self, window: LeasedWindow) -> None:
        """One has ended; where it could not be closed, it is an orphan as it was found."""
        for part in window.parts:
            found = [each for each in self._found.get(part.vm, ()) if each.name != part.name]
            if window.state == "failed" and part.is_open and not part.closed:
                disks = {each.disk: each for each in part.frozen.values()}
                found.append(Orphan(part.vm, part.name, disks, part.cwd))
            self._found[part.vm] = found

    def gauge(self) -> None:
        """The gauges, as it is now."""
        metrics = self._engine.metrics
        for gauge in (metrics.windows, metrics.window_age, metrics.window_size):
            gauge.clear()
        for window in self._live.values():
            metrics.windows.labels(window.state).inc()
        for _ in self.orphans():
            metrics.windows.labels("orphan").inc()
        for seen in self._overlays():
            size = SIZES.get(seen.path)
            metrics.window_age.labels(seen.vm, seen.disk).set(seen.age)
            if size is not None:
                metrics.window_size.labels(seen.vm, seen.disk).set(size)

    def _overlays(self) -> Iterator[Seen]:
        for window in self._live.values():
            if window.state in ("open", "closing"):
                age = time.time() - window.created
                for part in window.parts:
                    for each in part.frozen.values():
                        path = path_of(each, part.cwd)
                        yield Seen(part.vm, part.name, each.disk, path, age, -window.left)
        for orphan in self.orphans():
            for each in orphan.disks.values():
                age = age_of(orphan.name) or 0.0
                path = path_of(each, orphan.cwd)
                yield Seen(orphan.vm, orphan.name, each.disk, path, age, 0.0)

    async def _watch(self) -> None:
        while True:
            await self.look_again(None)
            overlays = list(self._overlays())
            for gone in SIZES.keys() - {seen.path for seen in overlays}:
                SIZES.pop(gone, None)
            for seen in overlays:
                size = await asyncio.to_thread(allocated, seen.path)
                self._warn(seen, size or 0)
            await self._greet_newcomers(asyncio.get_running_loop().time() + EVERY)

    async def _greet_newcomers(self, until: float) -> None:
        """Look at VMs that were just connected, a few at a time, until that time of the loop."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while True:
                    await self._came.wait()
                    self._came.clear()
                    while self._newcomers:
                        names = list(self._newcomers)[:AT_ONCE]
                        known = self._engine.registry.vms
                        await asyncio.gather(*(self.look_at(known[n]) for n in names if n in known))
                        for name in names:
                            self._newcomers.pop(name, None)
        if self._newcomers:
            self._came.set()

    def _warn(self, seen: Seen, size: int) -> None:
        limits = self._engine.config.limits
        facts = {"vm": seen.vm, "disk": seen.disk, "window": seen.window, "overlay": seen.path}
        if seen.late > LATE and self._first(seen.path, "", "late"):
            self._log.warning("window_outlived_its_lease", late=round(seen.late), **facts)
        if seen.age > limits.window_age and self._first(seen.path, "", "old"):
            self._log.warning("window_old", age=round(seen.age), size=size, **facts)
        if limits.window_size and size > limits.window_size and self._first(seen.path, "", "large"):
            self._log.warning("window_large", age=round(seen.age), size=size, **facts)

    def _first(self, *what: str) -> bool:
        """Whether this is warned of for the first time."""
        key = (what[0], what[1], what[2])
        new = key not in self._warned
        self._warned.add(key)
        return new
