"""HTTP/1.1 to the daemon: h11, which does no I/O, on asyncio's streams.

Connections are kept alive and used again. Whatever breaks one is a `Lost`; whether a request that
broke may be sent again is the caller's to know.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

try:
    import h11
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "the daemon's client needs the package h11: pip install 'qmpcommit[cli]'", name="h11"
    ) from None

from qmpcommit.errors import InvalidRequest
from qmpcommit.qmp.address import Address

CONNECTING = 5.0
"""Seconds that the daemon gets to accept a connection."""

_CHUNK = 1 << 16
_LARGEST = 1 << 26
_IDLE = 8


class Lost(Exception):
    """A connection failed; `connected` tells whether the request may have arrived."""

    def __init__(self, why: object, *, connected: bool) -> None:
        said = why.strerror if isinstance(why, OSError) else None
        super().__init__(said or str(why) or type(why).__name__)
        self.connected = connected
        self.denied = isinstance(why, PermissionError)


class Reply(NamedTuple):
    """An answer; `again` tells that the request had perhaps arrived before, unanswered."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    again: bool = False

    @property
    def json(self) -> Any:
        """The body's value; None where it is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Connection:
    """One connection, and the one request on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 18)

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Connect; raises `Lost`."""
        try:
            async with asyncio.timeout(CONNECTING):
                sock = await address.open()
            return cls(*await asyncio.open_connection(sock=sock))
        except (OSError, TimeoutError) as error:
            raise Lost(error, connected=False) from None

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> h11.Response:
        """Send a request; the head of its answer. Raises `Lost`."""
        fields = [(name.lower(), value) for name, value in headers.items()]
        if body is not None:
            fields.append(("content-type", "application/json"))
            fields.append(("content-length", str(len(body))))
        try:
            request = h11.Request(method=method, target=path, headers=fields)
        except h11.LocalProtocolError as error:
            raise InvalidRequest(f"this can't be asked over HTTP: {error}") from None
        parts = [request, *([h11.Data(body)] if body else []), h11.EndOfMessage()]
        self._writer.write(b"".join(self._h11.send(part) or b"" for part in parts))
        try:
            await self._writer.drain()
            while not isinstance(event := await self._next(), h11.Response):
                pass  # an interim answer
        except OSError as error:
            raise Lost(error, connected=True) from None
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's body, as it comes; raises `Lost`."""
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def _next(self) -> Any:
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                self._h11.receive_data(await self._reader.read(_CHUNK))
        except (OSError, h11.RemoteProtocolError) as error:
            raise Lost(error, connected=True) from None
        if isinstance(event, h11.ConnectionClosed):
            raise Lost("it hung up", connected=True)
        return event

    def renew(self) -> bool:
        """Make ready for another request; whether that is possible."""
        try:
            self._h11.start_next_cycle()
        except h11.ProtocolError:
            return False
        return not self._reader.at_eof()

    def abort(self) -> None:
        """Hang up at once."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Hang up, and see it done."""
        self.abort()
        with suppress(OSError):
            await self._writer.wait_closed()


class Wire:
    """All connections to one daemon."""

    def __init__(self, address: Address, token: str | None) -> None:
        self.address = address
        self._headers = {"host": "localhost"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()

    async def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None,
        *,
        timeout: float,
    ) -> Reply:
        """One request and its whole answer, within so many seconds; raises `Lost`."""
        try:
            async with asyncio.timeout(timeout):
                connection = await self._take()
                try:
                    head = await connection.ask(method, path, {**self._headers, **headers}, body)
                    content = await _whole(connection)
                except BaseException:
                    await self._drop(connection)
                    raise
        except TimeoutError:
            raise Lost(f"it did not answer within {timeout:g} s", connected=True) from None
        self._busy.discard(connection)
        if len(self._idle) < _IDLE and connection.renew():
            self._idle.append(connection)
        else:
            await connection.close()
        return Reply(head.status_code, _fields(head), content)

    async def stream(
        self, path: str, headers: Mapping[str, str], *, timeout: float
    ) -> tuple[Reply, Connection | None]:
        """A request whose answer does not end; the connection is None where it was refused."""
        try:
            async with asyncio.timeout(timeout):
                connection = await self._take()
                try:
                    head = await connection.ask("GET", path, {**self._headers, **headers}, None)
                    if head.status_code == 200:
                        return Reply(200, _fields(head), b""), connection
                    content = await _whole(connection)
                except BaseException:
                    await self._drop(connection)
                    raise
        except TimeoutError:
            raise Lost(f"it did not answer within {timeout:g} s", connected=True) from None
        await self._drop(connection)
        return Reply(head.status_code, _fields(head), content), None

    async def drop(self, connection: Connection) -> None:
        """Hang up a stream."""
        await self._drop(connection)

    async def close(self) -> None:
        """Hang up everything."""
        while self._idle or self._busy:
            connections = [*self._idle, *self._busy]
            self._idle, self._busy = [], set()
            for connection in connections:
                await connection.close()

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection._reader.at_eof():
                await connection.close()  # the daemon hung up meanwhile
                continue
            self._busy.add(connection)
            return connection
        connection = await Connection.open(self.address)
        self._busy.add(connection)
        return connection

    async def _drop(self, connection: Connection) -> None:
        self._busy.discard(connection)
        await connection.close()


async def _whole(connection: Connection) -> bytes:
    """An answer's body, of bounded size."""
    content = bytearray()
    async for part in connection.body():
        content += part
        if len(content) > _LARGEST:
            raise Lost("its answer is too large", connected=True)
    return bytes(content)


def _fields(head: h11.Response) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
