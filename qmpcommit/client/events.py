"""The daemon's server-sent events, followed over lost connections and restarts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlencode

from qmpcommit.client.http import Connection, Lost
from qmpcommit.client.problems import problem, sensible, transient
from qmpcommit.errors import DaemonError
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from qmpcommit.client.host import Client

SILENCE = 45.0
"""Seconds without a byte after which a stream counts as lost; the daemon speaks every 15 s."""

LONGEST = 1 << 24
"""Bytes that one event may have; no commit's outcome comes near to it."""

BEGINNING = "following"
"""The kind of the first event of a stream, which tells where it begins."""

_FOLLOWING = "its events are followed no longer"


@record
class DaemonEvent(Record):
    """One change of state, as the daemon has it in its journal.

    `id` grows; ``Client.events(after=id)`` goes on behind it. `kind` is ``commit``, ``group``,
    ``window``, ``cycle``, ``flatten`` or ``vm``, `at` seconds since 1970, `commit` a commit's id,
    `data` all that is told: for a commit its ``state`` and ``phase``, and in the end its
    ``outcome`` or ``error``.
    """

    id: int
    kind: str
    at: float
    vm: str
    commit: str | None
    data: dict[str, Any]


class Message(NamedTuple):
    """One message of a stream of server-sent events."""

    id: str
    event: str
    data: str


class Parser:
    """Server-sent events from bytes, without I/O; `last` is the last id that was told."""

    def __init__(self) -> None:
        self.last: str | None = None
        self._rest = b""
        self._event, self._data = "", list[str]()
        self._size = 0

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete now; raises `DaemonError` for one without an end."""
        self._size += len(data)
        if self._size > LONGEST:
            raise DaemonError(
                f"what follows as events has none within {LONGEST >> 20} MiB: it is no qmpcommitd"
            )
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = []
        for raw in lines:
            line = raw.removesuffix(b"\r").decode(errors="replace")
            if not line:
                self._size = len(self._rest)
                if self._data:
                    text = "\n".join(self._data)
                    found.append(Message(self.last or "", self._event or "message", text))
                self._event, self._data = "", []
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "id" and "\0" not in value:
                self.last = value
            elif name == "event":
                self._event = value
            elif name == "data":
                self._data.append(value)
        return found


class Events:
    """The events of a daemon, as an async iterator that does not end by itself.

    A lost connection is made again, and the stream goes on behind the last event, so that none
    is missed and none comes twice. ``async with`` (or the first event asked for) opens it;
    leaving the block, or `aclose`, ends it. Raises `DaemonUnreachable`, `DaemonLost` or
    `DaemonError`.
    """

    def __init__(
        self,
        client: Client,
        *,
        after: int | None,
        vm: str | None,
        commit: str | None,
        kinds: Sequence[str] = (),
    ) -> None:
        self._client = client
        self.last = after
        filters = [("vm", vm), ("commit", commit), *(("kind", kind) for kind in kinds)]
        self._filter = [(name, value) for name, value in filters if value]
        self._connection: Connection | None = None
        self._body: AsyncIterator[bytes] | None = None
        self._parser = Parser()
        self._found: list[Message] = []
        self._closed = False
        self._tries = client.tries(_FOLLOWING)

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> DaemonEvent:
        while not self._found:
            if self._closed:
                raise StopAsyncIteration
            if self._body is None:
                await self._open()
            try:
                assert self._body is not None
                async with asyncio.timeout(SILENCE):
                    data = await anext(self._body)
            except (Lost, StopAsyncIteration, TimeoutError) as ended:
                await self._hang_up()
                await self._tries.failed(Lost(ended, connected=True))
                continue
            except BaseException:
                await self._hang_up()  # what was read of an event is read again
                raise
            self._tries = self._client.tries(_FOLLOWING)
            try:
                found = self._parser.feed(data)
            except DaemonError:
                await self._hang_up()
                raise
            self._found = [each for each in found if each.event != BEGINNING]
            if not self._found and self._parser.last is not None:
                self.last = _number(self._parser.last, self.last)  # where the stream begins
        message = self._found.pop(0)
        self.last = _number(message.id, self.last)
        return _event(message)

    async def aclose(self) -> None:
        """Follow no longer; safe to repeat."""
        self._closed = True
        await self._hang_up()

    async def _open(self) -> None:
        query = urlencode(self._filter)
        path = f"/v1/events?{query}" if query else "/v1/events"
        while self._body is None and not self._closed:
            headers = {"accept": "text/event-stream"}
            if self.last is not None:
                headers["last-event-id"] = str(self.last)
            try:
                reply, connection = await self._client.wire.stream(
                    path, headers, timeout=self._client.timeout
                )
            except Lost as lost:
                await self._tries.failed(lost)
                continue
            if connection is not None:
                self._client.met = True
                self._connection, self._body = connection, connection.body()
                self._parser, self._found = Parser(), []
            elif transient(reply):
                await self._tries.failed(Lost("it has too many requests", connected=True))
            else:
                raise problem(reply, self._client.wire.address)

    async def _hang_up(self) -> None:
        connection, self._connection, self._body = self._connection, None, None
        if connection is not None:
            with suppress(OSError):
                await self._client.wire.drop(connection)


def _number(text: str, otherwise: int | None) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else otherwise


def _event(message: Message) -> DaemonEvent:
    number = _number(message.id, None)
    with sensible("event"):
        data = json.loads(message.data)
        at = float(data.pop("at", 0.0))
        data.pop("time", None)
        commit = str(data["id"]) if message.event == "commit" else None
        return DaemonEvent(number or 0, message.event, at, str(data.get("vm", "")), commit, data)
