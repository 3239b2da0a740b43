"""One QMP monitor: a connection over ``qemu.qmp``, its events, its loss and its return.

A `Monitor` outlives the connections that carry it. Subscribers are registered on the monitor,
not on a connection, and every connection has its listener before its socket is opened, so no
event falls between. A command that was sent when the connection broke raises `MonitorLost`
and is never sent again: whether QEMU ran it is for the caller to ask.

Rests on the QMP specification (``docs/interop/qmp-spec``) and on `qemu.qmp.QMPClient`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine, Generator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypedDict

from qemu.qmp import ConnectError as QemuConnectError
from qemu.qmp import ExecInterruptedError, QMPClient, Runstate
from qemu.qmp.error import QMPError
from qemu.qmp.qmp_client import ExecuteError

from qmpcommit.errors import (
    CommandRefused,
    ConnectError,
    DeadlineExceeded,
    MonitorBusy,
    MonitorLost,
    SessionClosed,
    VMGone,
)
from qmpcommit.log import Log
from qmpcommit.qmp.address import Address, is_socket, peer_pid
from qmpcommit.qmp.client import Client, Tap, client_pid, dispose, hang_up, new_client
from qmpcommit.qmp.creations import Creations, is_creation
from qmpcommit.qmp.process import is_qemu, is_seen_ended, process_identity
from qmpcommit.qmp.queries import Queries, check_form
from qmpcommit.qmp.reading import Breach
from qmpcommit.qmp.subscriptions import EventStream, Subscribers
from qmpcommit.tasks import stop, to_the_end

PUT_OFF = (0.5, 60.0)
"""Seconds for which what breaks QMP's bounds is not asked: the first time, and at most.

What keeps to them for so long as the latter begins anew."""

STEADY = 5.0
"""Seconds after which a connection that came back is not taken for one that breaks at once."""

NODES = "query-named-block-nodes"

WITHOUT_PID = (
    "no file is deleted, free space and locks are not checked, QEMU's working directory is not"
    " known, and its end looks like a lost monitor: give Session.over its pid"
)
"""What a session over a client that is not ours lacks where it can't tell QEMU's process."""


class MonitorOptions(TypedDict, total=False):
    """What a `Monitor` takes beside its address."""

    name: str | None
    timeout: float
    command_timeout: float
    patience: float
    client: QMPClient | None
    pid: int | None


class Monitor(Queries):
    """A QMP monitor, connected when it is entered (``async with``) or awaited.

    `timeout` bounds, in seconds, each attempt to connect up to the greeting;
    `command_timeout` each command's reply; `patience` how long a lost monitor may take to
    come back. `name` is what logs and errors call the VM, `pid` is the process that is known to
    answer a shared `client`.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None,
        *,
        name: str | None = None,
        timeout: float = 5.0,
        command_timeout: float = 30.0,
        patience: float = 30.0,
        client: QMPClient | None = None,
        pid: int | None = None,
    ) -> None:
        self.address = Address.parse(address) if address is not None else None
        self.name = name or (
            str(self.address) if self.address else (client and client.name) or "vm"
        )
        self.timeout = timeout
        self.command_timeout = command_timeout
        self.patience = patience
        self.log = Log(vm=self.name)
        self.peer_pid: int | None = pid
        self.shutting_down = False
        self.awaits: Literal["", "answer", "room", "greeting"] = ""
        self._shared, self._told_peer = client, (pid, process_identity(pid))
        self._peer, self._blind = self._told_peer[1], False
        self._client: QMPClient | None = None
        self._sock: socket.socket | None = None
        self._tap = Tap(self._dispatch)
        self.subscribers = Subscribers()
        self._watchers: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False
        self._back_at: float | None = None  # since when it is back, and has answered nothing
        self._trying_since = 0.0
        self._put_off, self._not_before, self.breach = 0.0, 0.0, ""
        self._still = asyncio.Lock()  # no creation begins while QEMU is asked for its nodes
        self._creations = Creations()
        if client is not None:
            client.register_listener(self._tap)

    def __repr__(self) -> str:
        at = f", address={str(self.address)!r}" if self.address is not None else ""
        state = "closed" if self._closed else "connected" if self.connected else "not connected"
        return f"<{type(self).__name__} {self.name!r}{at}, {state}>"

    # -- life -------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect and negotiate; does nothing where connected.

        Raises `ConnectError` (nothing there, or no monitor) or `MonitorBusy` (accepted, but
        not greeted within `timeout`).
        """
        async with self._opening:
            if self._closed:
                raise self._was_closed()
            if self.connected:
                pass
            elif self._shared is not None:
                await self._attach()
            elif self._not_before > asyncio.get_running_loop().time():
                raise self._misbehaved(self._not_before - asyncio.get_running_loop().time())
            else:
                await self._connect_unless_closed()
        return self

    def _was_closed(self) -> SessionClosed:
        return SessionClosed(f"the session with {self.name} was closed", vm=self.name)

    async def _connect_unless_closed(self) -> None:
        """Connect; who closes us meanwhile ends that, or it would hold the monitor for ever."""
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        self._connecting = asyncio.create_task(self._connect_past_events())
        try:
            await self._connecting
        except asyncio.CancelledError:
            if self._closed and task.cancelling() == before:
                raise self._was_closed() from None
            raise
        finally:
            self._connecting = None

    def __await__(self) -> Generator[Any, None, Self]:
        return self.open().__await__()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect (a shared client stays connected); safe to repeat, bounded, never raises."""
        await to_the_end(self._close())

    async def _close(self) -> None:
        self._closed = True
        if self._connecting is not None:
            await stop(self._connecting)
        self.subscribers.end()
        client, self._client = self._client, None
        if self._shared is not None:
            with suppress(ValueError, QMPError):
                self._shared.remove_listener(self._tap)
            for task in list(self._watchers):
                await stop(task)
        elif client is not None:
            await dispose(client, self._sock)
        if self._watchers:
            await asyncio.wait(self._watchers)  # each ends with its connection

    @property
    def connected(self) -> bool:
        """Whether a command could be sent now."""
        return self._client is not None and self._client.runstate is Runstate.RUNNING

    async def _attach(self) -> None:
        """Follow a client that its owner has connected."""
        client = self._shared
        assert client is not None
        if client.runstate is not Runstate.RUNNING:
            raise ConnectError(
                f"the shared QMPClient of {self.name} is not connected; connect it first",
                vm=self.name,
            )
        self._client = client
        self._creations.forget()
        self._see_peer(client)
        self._start(self._follow(client))

    def _see_peer(self, client: QMPClient) -> None:
        """Which process answers; where the socket does not tell, the one that we were told of."""
        told, identity = self._told_peer
        if told and process_identity(told) != identity:
            told = None  # it has ended: another one has taken its place
        pid = told or client_pid(client)
        if pid != self.peer_pid:
            self._features = None
        self.peer_pid = pid
        # The end of a proxy or a launcher, which made the socket, is not QEMU's.
        self._peer = process_identity(pid) if told or is_qemu(pid) else ""
        if pid is None and not self._blind:
            self._blind = True
            self.log.warning("qemu_process_unknown", without=WITHOUT_PID)

    async def _connect_past_events(self) -> None:
        """Connect, once more if the handshake failed.

        QEMU can send an event before its greeting, or between greeting and capabilities, to a
        client that comes while a job moves; `qemu.qmp` takes that for a foreign protocol. And it
        sends the rest of a long reply whose client has gone to the next one that comes.
        """
        try:
            await self._connect(again=True)
        except ConnectError as error:
            if not isinstance(error.__cause__, QMPError):
                raise
            await self._connect()

    async def _connect(self, *, again: bool = False) -> None:
        """Connect; what breaks the bounds in the handshake is not noted if it is tried `again`."""
        address = self.address
        assert address is not None
        client = new_client(f"qmpcommit.{os.getpid()}", self._tap)
        self._creations.forget()
        sock: socket.socket | None = None
        noted = True
        self.awaits = "answer"
        try:
            async with asyncio.timeout(self.timeout):
                sock = await address.open(self._queue_is_full)
                pid = peer_pid(sock)
                self.awaits = "greeting"
                with suppress(AssertionError):  # qemu.qmp's, where it is lost as it is made
                    await client.connect(sock)
        except TimeoutError as error:
            raise self.unanswered(self.timeout) from error
        except OSError as error:
            raise self._unreachable(error.strerror or str(error), error) from error
        except QemuConnectError as error:
            noted = not again
            raise self._no_monitor(Breach(client.breach) if client.breach else error.exc) from error
        except (QMPError, ValueError, RecursionError) as error:
            raise self._no_monitor(error) from error
        finally:
            self.awaits = ""
            if noted:
                self._note(client, 0.0)
            if client.runstate is not Runstate.RUNNING and sock is not None:
                client.let_go(sock)
        if client.runstate is not Runstate.RUNNING:
            await dispose(client, sock)
            raise self._unreachable("it greeted, and hung up", EOFError())
        if self._features is not None and pid != self.peer_pid:
            self._features = None
        self._client, self._sock, self.peer_pid = client, sock, pid
        self._start(self._watch(client, sock))
        self._tell(True)
        self.log.debug("connected", address=str(address), pid=pid)

    def _queue_is_full(self) -> None:
        self.awaits = "room"

    def unanswered(self, seconds: float) -> ConnectError:
        """The error of a connection that is being opened for so long: what it `awaits`."""
        if self.awaits not in ("room", "greeting"):
            return self._unreachable("no answer", TimeoutError())
        what = "accepts connections but sent no QMP greeting"
        if self.awaits == "room":
            what = "has others waiting, and took no connection more"
        return MonitorBusy(
            f"{self.address} {what} within {seconds:g} s: another client holds this monitor (QEMU"
            " serves one at a time), or QEMU is stopped, or this is no monitor. Close the"
            " other client, or give QEMU a second monitor (another -qmp"
            " unix:PATH,server=on,wait=off) and use that. Nothing was sent",
            vm=self.name,
            address=str(self.address),
        )

    def _unreachable(self, why: str, error: Exception) -> ConnectError:
        path = self.address.path if self.address else None
        hint = "start the VM, or correct the address"
        if isinstance(error, FileNotFoundError):
            hint = "no such socket: start the VM with -qmp, or correct the path"
        elif isinstance(error, PermissionError):
            hint = "run this as the user that runs QEMU"
        elif isinstance(error, (ConnectionRefusedError, NotADirectoryError)) and path:
            hint = "nothing listens on this socket any more: the VM has ended"
            if not is_socket(path):
                hint = "that is no socket: give the path after QEMU's -qmp unix:"
        return ConnectError(
            f"can't connect to the monitor at {self.address}: {why} ({hint})",
            vm=self.name,
            address=str(self.address),
        )

    def _note(self, client: Client, lasted: float) -> None:
        """Remember how what answers has broken the bounds, and for how long it is not asked."""
        if lasted > PUT_OFF[1]:
            self._put_off, self.breach = 0.0, ""
        if client.breach:
            first = not self._put_off
            self.breach = client.breach
            self._put_off = min(2 * self._put_off or PUT_OFF[0], PUT_OFF[1])
            self._not_before = asyncio.get_running_loop().time() + self._put_off
            if first:
                self.log.warning("monitor_put_off", address=str(self.address), why=client.breach)

    def _misbehaved(self, seconds: float) -> ConnectError:
        return ConnectError(
            f"what listens at {self.address} is not asked for {seconds:.1f} s more: {self.breach}."
            " Give the socket of QEMU's -qmp option, and restart QEMU where it is one",
            vm=self.name,
            address=str(self.address),
        )

    def _no_monitor(self, cause: BaseException) -> ConnectError:
        what = "it closed the connection" if isinstance(cause, (EOFError, OSError)) else str(cause)
        what = what.splitlines()[0][:200] if what else type(cause).__name__
        return ConnectError(
            f"what listens at {self.address} is not a QMP monitor: {what}. Give the socket of"
            " QEMU's -qmp option (not that of a guest agent, a console or HMP)",
            vm=self.name,
            address=str(self.address),
        )

    # -- loss and return --------------------------------------------------------------------------

    def _start(self, watching: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(watching, name=f"link of {self.name}")
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    def _tell(self, up: bool) -> None:
        if up:
            self.shutting_down = False
        else:
            self._creations.forget()
        self.subscribers.link(up)

    async def _watch(self, client: Client, sock: socket.socket) -> None:
        """Tell subscribers when a connection of ours ends, and clear it away."""
        clock = asyncio.get_running_loop().time
        began = clock()
        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()
        if self._client is client:
            self._note(client, clock() - began)
            if not self.breach:
                self.log.info("monitor_lost", shutting_down=self.shutting_down)
            self._client = None
            self._tell(False)
            await dispose(client, sock)

    async def _follow(self, client: QMPClient) -> None:
        """Tell subscribers of each end and return of a connection that is not ours."""
        up = True
        while True:
            if up is not (client.runstate is Runstate.RUNNING):
                up = not up
                if up:
                    self._see_peer(client)
                self._tell(up)
                if not up and self.subscribers.none:
                    self._client = None  # nobody cares; the next command follows it again
                    return
            await client.runstate_changed()

    async def restore(self, was: int | None = None) -> bool | None:
        """Bring a lost connection back, within `patience` seconds.

        Returns whether the same process answers (None where the system can't tell). That is the
        last one, or the one whose `peer_pid` was `was`: another caller may have brought it back
        before. Raises `VMGone` when nothing listens there any more, `MonitorLost` when something
        does but does not greet, or breaks again and again before it has answered a command.
        """
        loop = asyncio.get_running_loop()
        back_at, self._back_at = self._back_at, None
        again = back_at is not None and loop.time() - back_at < STEADY
        if not again:
            self._trying_since = loop.time()
        give_up = self._trying_since + self.patience
        refused_since: float | None = None
        pause = 0.02
        before = self.peer_pid if was is None else was
        if again and not self.connected:
            if loop.time() > give_up:
                raise MonitorLost(
                    f"the monitor of {self.name} came back again and again for"
                    f" {self.patience:g} s, and broke each time before it answered anything",
                    vm=self.name,
                )
            await asyncio.sleep(_between(0.05, 0.1))
        while not self.connected:
            try:
                await self.open()
                self._back_at = loop.time()
                break
            except ConnectError as error:
                now = loop.time()
                if self._shared is not None and is_seen_ended(self._peer):
                    raise VMGone(
                        f"QEMU of {self.name} has ended: its process {self.peer_pid} is gone",
                        vm=self.name,
                    ) from error
                if isinstance(error.__cause__, (FileNotFoundError, ConnectionRefusedError)):
                    refused_since = refused_since or now
                    if self.shutting_down or now - refused_since > 2.0:
                        raise VMGone(
                            f"QEMU of {self.name} has ended: nothing listens at {self.address}"
                            " any more",
                            vm=self.name,
                        ) from error
                else:
                    refused_since = None
                if now > give_up:
                    raise MonitorLost(
                        f"the monitor of {self.name} was lost and did not come back within"
                        f" {self.patience:g} s: {error.message}",
                        vm=self.name,
                    ) from error
            await asyncio.sleep(pause * _between(0.5, 1.0))
            pause = min(pause * 1.6, 0.5)
        return None if before is None or self.peer_pid is None else before == self.peer_pid

    def drop(self) -> None:
        """Give up a connection that no longer answers; subscribers hear of its loss."""
        if self._client is not None and self._sock is not None:  # a shared client's is not ours
            hang_up(self._sock)

    # -- commands and events ----------------------------------------------------------------------

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, **more: object
    ) -> Any:
        """Run one QMP command and return its value.

        Keyword arguments are added with ``_`` for ``-`` (``node_name=...``). A monitor that was
        lost before is connected again first. Raises `CommandRefused` with QEMU's error,
        `MonitorLost` when the connection broke before the reply (QEMU may have run it),
        `DeadlineExceeded` when no reply came within `command_timeout`, and `ProtocolViolation`
        for jobs, nodes or a status that can't be QEMU's.

        ``query-named-block-nodes`` waits for the end of each ``blockdev-create`` job, for as long:
        a QEMU (5.2 and 7.2 do, 10.0 does not) that is asked for its nodes while it opens the
        qcow2 image that it creates fails an assertion of its own, and dies with its guest.
        """
        if command == NODES:
            async with self._still:
                await self._no_creation()
                return await self._execute(command, arguments, more)
        if command == "blockdev-create":
            async with self._still:
                return await self._execute(command, arguments, more)
        return await self._execute(command, arguments, more)

    async def _no_creation(self) -> None:
        """Wait until QEMU creates no image."""
        clock = asyncio.get_running_loop().time
        end = clock() + self.command_timeout
        while not self.creates_nothing and (creating := await self._creating()):
            if clock() > end:
                raise DeadlineExceeded(
                    f"QEMU of {self.name} creates an image for more than {self.command_timeout:g} s"
                    f" ({', '.join(creating)}), and to be asked for its nodes meanwhile may kill"
                    f" it; perhaps its storage hangs. {NODES} was not sent",
                    vm=self.name,
                    command=NODES,
                )
            await asyncio.sleep(0.01)

    @property
    def creates_nothing(self) -> bool:
        """Whether QEMU has told that it creates no image, so that nothing need be asked first."""
        return self._creations.none

    async def _creating(self) -> list[str]:
        try:
            jobs = await self._execute("query-jobs", None, {})
        except CommandRefused:
            return []
        return [str(job["id"]) for job in jobs if is_creation(job)]

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, more: Mapping[str, object]
    ) -> Any:
        if not self.connected:
            first = self._shared is not None and not self._watchers
            await (self.open() if first else self.restore())
        client = self._client
        if client is None:  # it was lost, or closed, as soon as it was back
            raise (
                self._was_closed()
                if self._closed
                else MonitorLost(
                    f"the monitor of {self.name} was lost again before {command} was sent",
                    vm=self.name,
                )
            )
        given = {**(arguments or {}), **{k.replace("_", "-"): v for k, v in more.items()}}
        try:
            async with asyncio.timeout(self.command_timeout):
                value = await client.execute(command, given or None)
            self._back_at = None
        except ExecuteError as error:
            self._back_at = None
            raise CommandRefused(
                f"QEMU refused {command}: {error.error.error.desc}",
                vm=self.name,
                command=command,
                error_class=error.error.error.class_,
                desc=error.error.error.desc,
            ) from None
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"QEMU of {self.name} did not answer {command} within"
                f" {self.command_timeout:g} s; whether it will run it is unknown",
                vm=self.name,
                command=command,
            ) from error
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise MonitorLost(
                f"the monitor of {self.name} was lost while {command} was under way;"
                " QEMU may or may not have run it",
                vm=self.name,
                command=command,
            ) from error
        check_form(self.name, command, value)
        if command == "query-jobs" and client is self._client and isinstance(value, list):
            self._creations.listed(value)
        return value

    def events(self, *names: str, limit: int = 10_000) -> EventStream:
        """A stream of typed events, of these names or of all; may be made before `open`.

        A lost connection is told in it: see `EventStream`.
        """
        return EventStream(self.subscribers, frozenset(names), limit)

    def _dispatch(self, message: Mapping[str, Any]) -> None:
        if not isinstance(message.get("event"), str):
            return
        if message["event"] == "SHUTDOWN":
            self.shutting_down = True
        self._creations.heard(message)
        self.subscribers.message(message)


def _between(low: float, high: float) -> float:
    """A number at random, so that many who were lost at once come back one after the other."""
    return low + (high - low) * os.urandom(1)[0] / 255  # random itself takes time to import
