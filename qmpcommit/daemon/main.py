"""``qmpcommitd``: from the command line to a served API, and back to an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO, cast

import uvicorn

from qmpcommit import log
from qmpcommit.daemon import (
    adopting,
    cycle_api,
    group_api,
    losses,
    page_api,
    rule_api,
    steering_api,
    systemd,
    window_api,
)
from qmpcommit.daemon.access import Gate
from qmpcommit.daemon.api import create_app
from qmpcommit.daemon.config import Config
from qmpcommit.daemon.connections import Doors, PeerProtocol
from qmpcommit.daemon.cycles import Cycles
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.findings import Findings, examine, open_to_others
from qmpcommit.daemon.forgetting import forget_old
from qmpcommit.daemon.groups import Groups
from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.logs import configure_log, on_a_terminal
from qmpcommit.daemon.metrics import Metrics
from qmpcommit.daemon.reload import Reloading
from qmpcommit.daemon.rights import Askers, group_id
from qmpcommit.daemon.rules import Rules
from qmpcommit.daemon.windows import Windows
from qmpcommit.errors import InvalidRequest
from qmpcommit.tasks import stop

PREDECESSOR = 10.0
"""Seconds that a former daemon, which is being stopped, gets to let go of the state folder."""

GRACE = 0.3
"""Seconds that open requests get when the daemon stops."""

BACKLOG = 1024
"""Connections that may wait to be accepted; of those to TCP no more than are `AT_ONCE`."""

AT_ONCE = 64
"""Connections that are accepted before one of them is looked at."""

KEEP_ALIVE = 75
"""Seconds that a connection is kept which asks for nothing more."""


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are the daemon's own."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        for sock in sockets or ():
            if sock.family == socket.AF_UNIX:
                sock.listen(BACKLOG)  # it is accepted few at once, but who comes has its place

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def serve(
    config: Config, source: str, seconds: float | None = None, wrong: Sequence[str] = ()
) -> None:
    """Run the daemon until it is told to end, or so many seconds; raises `QmpCommitError`.

    The configuration is read from `source` again when SIGHUP comes. What is `wrong` with it, and
    will fail only when it is needed, is logged.
    """
    configure_log(config)
    for what in wrong:
        log.Log().warning("configuration_wrong", what=what)
    sys.setswitchinterval(0.0005)  # the journal's thread must not wait for a busy loop
    asyncio.run(_serve(config, source, seconds))


def check(config: Config) -> Findings:
    """What can be known of a configuration without serving; raises `QmpCommitError`."""
    Askers(config)
    if config.listen.group is not None:
        group_id(config.listen.group)
    return examine(config)


async def _serve(config: Config, source: str, seconds: float | None) -> None:
    loop = asyncio.get_running_loop()
    ending, reading = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, ending.set)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        # Of a terminal that closes it is the end; else somebody wants the configuration read.
        loop.add_signal_handler(signal.SIGHUP, (ending if on_a_terminal() else reading).set)
    if seconds is not None:
        loop.call_later(seconds, ending.set)
    with await _lock(Path(config.state), ending):
        journal = await Journal(Path(config.state, "journal.db")).open()
        try:
            await _run(config, source, journal, ending, reading)
        finally:
            await journal.close()  # its thread would keep a process alive that failed


async def _run(
    config: Config,
    source: str,
    journal: Journal,
    ending: asyncio.Event,
    reading: asyncio.Event,
) -> None:
    metrics = Metrics()
    engine = Engine(config, journal, metrics)
    groups, rules = Groups(engine), Rules(engine)
    cycles = Cycles(engine, groups)
    windows = Windows(engine)
    engine.stories = (*engine.stories, groups, windows, rules, cycles)
    given = systemd.listening()
    sockets = _listen(config, given)
    ours = _file_of(config.listen.socket)
    app = create_app(engine)
    adopting.routes(app, engine)
    rule_api.routes(app, rules)
    losses.routes(app, journal)
    cycle_api.routes(app, cycles)
    group_api.routes(app, groups)
    window_api.routes(app, engine, windows)
    page_api.routes(app, engine)
    steering_api.routes(app, engine)
    gate, doors = Gate(app, config, Askers(config), metrics), Doors.of(config.limits)
    settings = uvicorn.Config(
        gate,
        http=cast("type[asyncio.Protocol]", partial(PeerProtocol, doors=doors)),
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
        backlog=AT_ONCE,
    )
    server = _Server(settings)

    forgetting = asyncio.create_task(forget_old(config, journal), name="forgetting")

    def take(new: Config, askers: Askers) -> None:
        nonlocal forgetting
        gate.askers, gate.limits = askers, new.limits
        doors.exchange(new.limits)
        forgetting.cancel()
        forgetting = asyncio.create_task(forget_old(new, journal), name="forgetting")

    gc.freeze()  # 75,000 objects that stay: to look through them all would take 50 ms
    await engine.start()
    serving = asyncio.create_task(server.serve(sockets=sockets), name="http")
    others = [
        asyncio.create_task(systemd.watch(), name="watchdog"),
        asyncio.create_task(_measure_lag(metrics), name="lag"),
        asyncio.create_task(Reloading(source, engine, take, reading).run(), name="reloading"),
    ]
    serving.add_done_callback(lambda task: ending.set())
    log.Log().info("serving", sockets=[str(sock.getsockname()) for sock in sockets])
    systemd.notify("READY=1")
    await ending.wait()
    systemd.notify("STOPPING=1")
    log.Log().info("stopping", commits=len(engine.live))
    await _stop(engine, server, serving)
    for task in (*others, forgetting):
        await stop(task)
    if not given and ours is not None and _file_of(config.listen.socket) == ours:
        os.unlink(config.listen.socket)


async def _stop(engine: Engine, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """The state is flushed first; open requests end with it."""
    await engine.stop()
    server.should_exit = True
    with suppress(TimeoutError):
        async with asyncio.timeout(GRACE):
            await asyncio.shield(serving)
    if not serving.done():
        server.force_exit = True
        await stop(serving)


async def _measure_lag(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        before = loop.time()
        await asyncio.sleep(1.0)
        late = max(0.0, loop.time() - before - 1.0)
        metrics.loop_lag.set(late)
        metrics.loop_lags.observe(late)


# -- who and where --------------------------------------------------------------------------------


async def _lock(state: Path, ending: asyncio.Event) -> TextIO:
    """The state folder belongs to one daemon; one that is stopping is waited for."""
    try:
        lock = await asyncio.to_thread(_open_lock, state)
    except OSError as error:
        raise InvalidRequest(f"the state folder {state} can't be used: {error.strerror}") from None
    deadline = asyncio.get_running_loop().time() + PREDECESSOR
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if asyncio.get_running_loop().time() > deadline or ending.is_set():
                lock.close()
                raise InvalidRequest(
                    f"another qmpcommitd uses the state folder {state}; stop it first"
                ) from None
            await asyncio.sleep(0.05)


def _open_lock(state: Path) -> TextIO:
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    told = open_to_others(state)
    if told is None:
        state.chmod(0o700)  # made by another version, or by hand, for a journal alone
    elif told:
        log.Log().warning("state_not_private", what=told)
    lock = open(  # noqa: SIM115  (it is held for as long as the daemon runs)
        state / "lock", "a+", opener=partial(os.open, mode=0o600)
    )
    with suppress(PermissionError):  # another user's
        os.fchmod(lock.fileno(), 0o600)
    return lock


def _listen(config: Config, given: list[socket.socket]) -> list[socket.socket]:
    """The Unix socket, where systemd has given none, and the loopback one where it is wanted."""
    sockets = list(given) or [_listen_unix(config)]
    if config.listen.tcp is not None and all(s.family == socket.AF_UNIX for s in sockets):
        host, _, port = config.listen.tcp.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host.strip("[]"), int(port)))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise InvalidRequest(f"can't listen on {config.listen.tcp}: {why}") from None
        sockets.append(sock)
    for sock in sockets:
        sock.setblocking(False)
        sock.listen(BACKLOG)  # who comes before the journal is read waits
    return sockets


def _listen_unix(config: Config) -> socket.socket:
    path = config.listen.socket
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise InvalidRequest(f"{path} is there already, and is no socket")
            if _is_served(path):
                raise InvalidRequest(
                    f"somebody listens on {path} already, perhaps another qmpcommitd: stop it"
                    " first, or give this one another socket (listen.socket)"
                )
            os.unlink(path)  # left behind
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        if config.listen.group is not None:
            os.chown(path, -1, group_id(config.listen.group))
        os.chmod(path, int(config.listen.mode, 8))
    except OSError as error:
        sock.close()
        raise InvalidRequest(f"can't listen on {path}: {error.strerror or error}") from None
    return sock


def _is_served(path: str) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except BlockingIOError:
            return True  # more than it can accept at the moment
        except OSError:
            return False
    return True


def _file_of(path: str) -> tuple[int, int] | None:
    """What tells a file from another one that comes to its place."""
    with suppress(OSError):
        found = os.lstat(path)
        return found.st_dev, found.st_ino
    return None
