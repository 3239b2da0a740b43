"""The VMs of one host: configured, discovered or added, each with its session.

A VM is kept connected, or connected only while something needs it. Lost connections come back
with capped, jittered backoff; monitors that hung when they were tried last go through a gate of
their own, so that they don't keep those that work waiting.
"""

from __future__ import annotations

import asyncio
import glob
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Literal

from qmpcommit.daemon.clearing import Clearing
from qmpcommit.daemon.config import Config, Discover
from qmpcommit.errors import ConnectError, QmpCommitError
from qmpcommit.log import Log
from qmpcommit.qmp.process import process_identity
from qmpcommit.session import Session
from qmpcommit.tasks import stop, to_the_end
from qmpcommit.wire.values import Connect, check_address, check_name

Origin = Literal["config", "discovered", "api"]
State = Literal["connected", "connecting", "away", "idle"]

BACKOFF = (0.2, 30.0)
"""Seconds of the first pause before a retry, and of the longest."""


SLOW = 1.0
"""Seconds after which an attempt that has failed is one of a monitor that hangs."""


class VM:
    """One VM; `session` is there while it is connected, `error` says why it is not.

    `unresolved` tells that what has to be done first, when it is connected, has not been done; it
    is shown as connected when it has.
    """

    def __init__(self, name: str, qmp: str, connect: Connect, origin: Origin) -> None:
        self.name, self.qmp, self.connect, self.origin = name, qmp, connect, origin
        self.state: State = "connecting" if connect == "keep" else "idle"
        self.session: Session | None = None
        self.error: QmpCommitError | None = None
        self.away_since = time.monotonic()
        self.last_identity = ""
        self.up = asyncio.Event()
        self.lost = asyncio.Event()
        self.unresolved = False
        self.users = 0
        self.keeper: asyncio.Task[None] | None = None
        self.opening = asyncio.Lock()

    def new_session(self) -> Session:
        """A session that is not connected yet."""
        return Session.connect(self.qmp, name=self.name, patience=5.0)

    @property
    def identity(self) -> str:
        """Which QEMU process answers: its id and when it began; empty where nobody can tell."""
        session = self.session
        return process_identity(session.peer_pid) if session is not None else ""

    def link(self, up: bool) -> None:
        """The session's connection came or went."""
        if up:
            self.last_identity = self.identity
            self.state, self.error = "connecting" if self.unresolved else "connected", None
            self.lost.clear()
            self.up.set()
        else:
            self.away_since = time.monotonic()
            self.state = "away"
            self.up.clear()
            self.lost.set()


class Registry:
    """All VMs by name.

    `on_up` is awaited each time a VM was connected, before anybody else uses the connection;
    `on_change` is called when a VM comes, goes, or changes its state.
    """

    def __init__(
        self,
        config: Config,
        on_up: Callable[[VM], Awaitable[object]],
        on_change: Callable[[VM, str], object],
    ) -> None:
        self.vms: dict[str, VM] = {}
        self._config = config
        self._on_up, self._on_change = on_up, on_change
        connects = config.limits.connects
        self._quick = asyncio.Semaphore(connects)
        self._hung = asyncio.Semaphore(max(1, connects // 4))
        self.clearing = Clearing()
        self._finder: asyncio.Task[None] | None = None
        self._passed_over: set[str] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self.log = Log()

    def start(self) -> None:
        """Add what is configured and begin to look for others."""
        for vm in self._config.vm:
            self.add(vm.name, vm.qmp, vm.connect, "config")
        if self._config.discover:
            self.discover()
            self._finder = asyncio.create_task(self._find(), name="discovery")

    async def exchange(self, config: Config) -> None:
        """Go on by another configuration: VMs come and go, and are met elsewhere."""
        self._config = config
        self._quick = asyncio.Semaphore(config.limits.connects)
        self._hung = asyncio.Semaphore(max(1, config.limits.connects // 4))
        wanted = {vm.name: vm for vm in config.vm}
        for known in list(self.vms.values()):
            new = wanted.get(known.name)
            if new is not None and (new.qmp, new.connect) == (known.qmp, known.connect):
                known.origin = "config"
            elif new is not None or known.origin == "config":
                await self.remove(known.name)
        for vm in config.vm:
            if vm.name not in self.vms:
                self.add(vm.name, vm.qmp, vm.connect, "config")
        if config.discover and self._finder is None:
            self._finder = asyncio.create_task(self._find(), name="discovery")

    async def close(self) -> None:
        """Let go of all VMs; jobs stay in QEMU as they are."""
        if self._finder is not None:
            await stop(self._finder)
        for vm in list(self.vms.values()):
            if vm.keeper is not None:
                vm.keeper.cancel()
        await asyncio.gather(*(self._drop(vm) for vm in self.vms.values()))
        if self._closing:
            await asyncio.wait(self._closing)

    # -- coming and going -------------------------------------------------------------------------

    def add(self, name: str, qmp: str, connect: Connect, origin: Origin) -> VM:
        """Make a VM known, under a name that is free."""
        assert name not in self.vms
        vm = self.vms[name] = VM(name, qmp, connect, origin)
        if connect == "keep":
            vm.keeper = asyncio.create_task(self._keep(vm), name=f"keeper of {name}")
        self._on_change(vm, "added")
        return vm

    async def remove(self, name: str) -> None:
        """Forget a VM, where it is known."""
        vm = self.vms.pop(name, None)
        if vm is not None:
            await self._drop(vm)
            self._on_change(vm, "removed")

    async def _drop(self, vm: VM) -> None:
        if vm.keeper is not None:
            await stop(vm.keeper)
            vm.keeper = None
        await self._hang_up(vm)

    async def _hang_up(self, vm: VM) -> None:
        session, vm.session = vm.session, None
        if session is not None:
            await session.release()
        if vm.up.is_set():
            vm.link(False)

    async def _find(self) -> None:
        while True:
            await asyncio.sleep(self._config.discover_every)
            self._take_up(await asyncio.to_thread(self._look))

    def discover(self) -> None:
        """Take up the sockets that have appeared, and let go of those that have vanished."""
        self._take_up(self._look())

    def _look(self) -> dict[str, tuple[str, Discover]]:
        """The sockets that are there now, by the names of their VMs."""
        found: dict[str, tuple[str, Discover]] = {}
        for rule in self._config.discover:
            for path in sorted(glob.glob(rule.glob)):
                name = name_of(rule.glob, path)
                with suppress(ValueError):
                    check_name(name)
                    check_address(path)
                    first, _ = found.setdefault(name, (path, rule))
                    if first != path and path not in self._passed_over:
                        self._passed_over.add(path)
                        self.log.warning("name_taken", vm=name, qmp=path, taken_by=first)
        return found

    def _take_up(self, found: dict[str, tuple[str, Discover]]) -> None:
        for name, (path, rule) in found.items():
            if name not in self.vms:
                self.add(name, path, rule.connect, "discovered")
        for vm in list(self.vms.values()):
            there = vm.name in found and found[vm.name][0] == vm.qmp
            if vm.origin == "discovered" and not there and not vm.users:
                task = asyncio.create_task(self.remove(vm.name), name=f"farewell to {vm.name}")
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    # -- connections ------------------------------------------------------------------------------

    async def _keep(self, vm: VM) -> None:
        """Hold one VM's connection."""
        pause = BACKOFF[0]
        gate = self._quick
        while True:
            took = 0.0
            try:
                async with gate:
                    began = time.monotonic()
                    try:
                        await self._open(vm)
                    finally:
                        took = time.monotonic() - began
            except QmpCommitError as error:
                self._failed(vm, error)
            except Exception as error:  # a bug of ours must not leave a VM without its keeper
                self.log.warning("bug", vm=vm.name, error=repr(error))
                self._failed(vm, QmpCommitError(f"internal error: {error!r}"))
            else:
                pause = BACKOFF[0]
                await vm.lost.wait()
                self._on_change(vm, "lost")
                took = 0.0
            gate = self._hung if took > SLOW else self._quick
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, BACKOFF[1])

    def _failed(self, vm: VM, error: QmpCommitError) -> None:
        told = vm.session is not None and vm.session.breach  # once, and by the monitor
        if vm.error is None and not told:
            self.log.info("vm_away", vm=vm.name, why=error.message)
        vm.state, vm.error = "away", error.again()

    async def _open(self, vm: VM) -> Session:
        """Connect where that is not so; `on_up` has run when this returns."""
        async with vm.opening:
            session = vm.session
            if session is None:
                session = vm.session = vm.new_session()
                session.gate = self.clearing
                session.subscribers.add(lambda message: None, vm.link)
            if vm.unresolved or not vm.up.is_set() or not session.connected:
                vm.unresolved = True  # until it is done: whoever comes next does it again
                await session.open()
                with session.sensible("query-jobs"):
                    await self._on_up(vm)
                vm.unresolved = False
                if vm.up.is_set():
                    vm.state, vm.error = "connected", None
                    self._on_change(vm, "connected")
            return session

    @asynccontextmanager
    async def use(self, vm: VM, *, wait: float = 0.0) -> AsyncIterator[Session]:
        """A connected session, held for the length of the block.

        A VM that is kept connected is waited for up to `wait` seconds; one that is not, is
        connected now. Raises `ConnectError`, `MonitorBusy` or `MonitorLost`.
        """
        vm.users += 1
        try:
            if vm.connect == "keep" and not vm.up.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await vm.up.wait()
                if not vm.up.is_set():
                    if vm.error is not None:
                        raise vm.error.again()
                    raise ConnectError(
                        f"{vm.name} is not connected yet; try again", vm=vm.name, address=vm.qmp
                    )
            try:
                session = await self._open(vm)
            except QmpCommitError as error:
                self._failed(vm, error)
                raise
            yield session
        finally:
            vm.users -= 1
            if vm.connect == "on-demand" and not vm.users:
                await to_the_end(self._hang_up(vm))
                vm.state = "idle"

    @asynccontextmanager
    async def reach(self, name: str, *, wait: float = 0.0) -> AsyncIterator[Session]:
        """The VM of that name, as `use` has it; raises what that raises, also where none is."""
        vm = self.vms.get(name)
        if vm is None:
            raise ConnectError(f"no VM is called '{name}' at the moment", vm=name)
        async with self.use(vm, wait=wait) as session:
            yield session


def name_of(pattern: str, path: str) -> str:
    """The VM's name: what the first ``*`` of the pattern stands for in the path."""
    for part, found in zip(pattern.split("/"), path.split("/"), strict=False):
        if "*" in part:
            before, _, after = part.partition("*")
            shape = f"{re.escape(before)}(.*){re.escape(after)}"
            match = re.fullmatch(shape, found)
            return match[1] if match else found
    return os.path.basename(path)
