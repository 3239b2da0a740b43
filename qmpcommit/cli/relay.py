"""What brings the daemon's page to a browser: a loopback port before the daemon's socket.

Any process of this host can connect to the port, and any page of the browser can send requests
there. So it is for one browser of the same user alone: a token that works once is exchanged for a
secret, which all paths of the page begin with. A cookie would not do: it goes to every port of a
host, and so to the servers of other users.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import h11

from qmpcommit.client.http import Lost, Wire
from qmpcommit.errors import InvalidRequest

HEAD = 10.0
"""Seconds that a request gets to arrive."""

ANSWER = 40.0
"""Seconds that the daemon gets to answer one; it gives itself 30."""

LARGEST = 1 << 16
"""Bytes of a request's body; the daemon takes no more."""

MANY = 64
"""Connections that are served at once, and as many that have not shown the secret yet."""

_STREAM = "/v1/events"
_ASKED = ("accept", "content-type", "if-none-match", "last-event-id")
_HOPS = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")
_REPLACED = ("location", "referrer-policy")
_HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
]
_LEAD = """<!doctype html><html lang="en"><title>qmpcommit</title>
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0;url={url}"><p><a href="{url}">To the page</a>
"""


def lead_to(url: str) -> str:
    """A page that leads a browser there; what it then asks for was asked by that page."""
    return _LEAD.format(url=html.escape(url))


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Asked(NamedTuple):
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class Relay:
    """Serves the daemon that `wire` leads to on 127.0.0.1; raises `InvalidRequest` on entering.

    `url` opens it, once, and `on_enter` is called then; with `port` 0 any free port is taken.
    """

    def __init__(self, wire: Wire, port: int = 0) -> None:
        self._wire, self._port = wire, port
        self._token: str | None = secrets.token_urlsafe(32)
        self._secret = secrets.token_urlsafe(32)
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        """Those that have not shown the secret yet, the oldest one first."""
        self._server: asyncio.Server | None = None
        self.url = ""
        self.on_enter: Callable[[], None] = lambda: None

    async def __aenter__(self) -> Relay:
        try:
            self._server = await asyncio.start_server(
                self._accept, "127.0.0.1", self._port, family=socket.AF_INET
            )
        except OSError as error:
            raise InvalidRequest(
                f"can't listen on 127.0.0.1:{self._port}: {os.strerror(error.errno or 0)}; give"
                " another --port"
            ) from None
        self._port = self._server.sockets[0].getsockname()[1]
        self._hosts = {f"127.0.0.1:{self._port}", f"localhost:{self._port}"}
        self.url = f"http://127.0.0.1:{self._port}/ui?token={self._token}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self._check_user(writer.get_extra_info("peername"))
        except _Refused as refused:
            _Answer(writer).problem(refused.status, str(refused))
            writer.close()
            return
        if len(self._strangers) >= MANY:  # whoever says nothing makes room for whoever comes
            self._strangers.pop(next(iter(self._strangers))).transport.abort()
        task = asyncio.create_task(self._serve(reader, writer), name="a browser's request")
        self._tasks.add(task)
        self._strangers[task] = writer
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda ended: self._strangers.pop(ended, None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, with one request on it."""
        answer = _Answer(writer)
        try:
            async with asyncio.timeout(HEAD):
                asked = await _receive(reader, answer.h11)
            await self._answer(asked, reader, answer)
        except _Refused as refused:
            answer.problem(refused.status, str(refused))
        except h11.RemoteProtocolError as error:
            answer.problem(400, str(error))
        except Lost as lost:
            answer.problem(502, f"the daemon at {self._wire.address} does not answer: {lost}")
        except (OSError, EOFError, TimeoutError, h11.LocalProtocolError):
            pass  # the browser has gone
        finally:
            writer.close()
            try:
                async with asyncio.timeout(HEAD):
                    await writer.wait_closed()
            except (OSError, TimeoutError):
                writer.transport.abort()  # it does not read what it asked for
            except asyncio.CancelledError:
                writer.transport.abort()
                raise

    async def _answer(self, asked: _Asked, reader: asyncio.StreamReader, answer: _Answer) -> None:
        self._check_host(asked)
        path, _, query = asked.target.partition("?")
        given = parse_qs(query).get("token", [""])[0] if path == "/ui" else ""
        if given and asked.method == "GET":
            self._enter(given, answer)
            return
        target = self._check_browser(asked)
        headers = {name: asked.headers[name] for name in _ASKED if name in asked.headers}
        if not all(value.isascii() for value in headers.values()):
            raise _Refused(400, "a header that the daemon reads is ASCII")
        headers.pop("content-type", None)  # JSON, and said again where there is a body
        path = unquote(target.partition("?")[0])  # as the daemon will read it
        if path == _STREAM and asked.method == "GET":
            await self._stream(target, headers, reader, answer)
            return
        body = asked.body or None
        reply = None
        if asked.method == "GET":  # over a kept connection that may have ended meanwhile
            with suppress(Lost):
                reply = await self._wire.exchange("GET", target, headers, body, timeout=ANSWER)
        reply = reply or await self._wire.exchange(
            asked.method, target, headers, body, timeout=ANSWER
        )
        answer.head(reply.status, reply.headers.items(), len(reply.body))
        answer.data(reply.body)
        await answer.end()

    def _check_user(self, peer: tuple[str, int] | None) -> None:
        """Only this user's processes, and root's; under sudo those of whoever called it."""
        uid = "" if peer is None else _uid_of(*peer, self._port)
        if uid == "":
            raise _Refused(403, "whoever asked has gone")
        allowed = {"0", str(os.geteuid()), os.environ.get("SUDO_UID")}
        if uid is not None and uid not in allowed:
            raise _Refused(403, f"user {uid} did not run this 'qmpcommit ui'")

    def _check_host(self, asked: _Asked) -> None:
        """Only by the address that was printed: no other name leads here (DNS rebinding)."""
        if asked.headers.get("host", "").lower() not in self._hosts:
            raise _Refused(403, "this port is asked by the address that 'qmpcommit ui' printed")
        origin = asked.headers.get("origin")
        same = origin is not None and origin.lower().removeprefix("http://") in self._hosts
        if (origin is not None and not same) or (origin is None and asked.method != "GET"):
            raise _Refused(403, "only the daemon's own page may ask here")
        if asked.method not in ("GET", "POST", "DELETE"):
            raise _Refused(405, f"{asked.method:.20} is not asked here")
        if asked.body and asked.headers.get("content-type", "") != "application/json":
            raise _Refused(415, "what is sent is JSON, and says so")

    def _check_browser(self, asked: _Asked) -> str:
        """What is asked of the daemon: the target behind the secret, which is checked."""
        if asked.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise _Refused(403, "only the daemon's own page may ask here")
        shown, _, rest = asked.target.removeprefix("/").partition("/")
        if not _same(shown, self._secret):
            raise _Refused(
                403, "open the address that 'qmpcommit ui' printed; it opens once, in one browser"
            )
        if len(self._tasks) - len(self._strangers) >= MANY:
            raise _Refused(503, f"{MANY} requests of this page are being answered; ask again")
        task = asyncio.current_task()
        assert task is not None
        self._strangers.pop(task, None)
        return f"/{rest}"

    def _enter(self, given: str, answer: _Answer) -> None:
        if self._token is None or not _same(given, self._token):
            raise _Refused(
                403, "this address was opened before, or is wrong: run 'qmpcommit ui' again"
            )
        self._token = None
        self.on_enter()
        body = lead_to(f"/{self._secret}/ui").encode()
        answer.head(200, [("Content-Type", "text/html; charset=utf-8"), *_HEADERS], len(body))
        answer.data(body)

    async def _stream(
        self,
        target: str,
        headers: Mapping[str, str],
        reader: asyncio.StreamReader,
        answer: _Answer,
    ) -> None:
        """An answer that does not end before the daemon or the browser does."""
        reply, connection = await self._wire.stream(target, headers, timeout=ANSWER)
        if connection is None:
            answer.head(reply.status, reply.headers.items(), len(reply.body))
            answer.data(reply.body)
            await answer.end()
            return
        answer.head(200, reply.headers.items(), None)

        async def copy() -> None:
            async for part in connection.body():
                answer.data(part)
                await answer.drain()

        copying = asyncio.create_task(copy(), name="events")
        gone = asyncio.create_task(reader.read(1), name="a browser that leaves")
        try:
            await asyncio.wait({copying, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (copying, gone):
                task.cancel()
            await asyncio.gather(copying, gone, return_exceptions=True)
            await self._wire.drop(connection)


class _Answer:
    """What is written to the browser; the connection ends with it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 14)

    def head(self, status: int, headers: Iterable[tuple[str, str]], length: int | None) -> None:
        dropped = (*_HOPS, *_REPLACED)
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        if length is not None and status != 304:
            kept.append(("Content-Length", str(length)))
        kept += [("Referrer-Policy", "no-referrer"), ("Connection", "close")]
        self._send(h11.Response(status_code=status, headers=kept))

    def data(self, part: bytes) -> None:
        self._send(h11.Data(part))

    async def drain(self) -> None:
        await self._writer.drain()

    async def end(self) -> None:
        self._send(h11.EndOfMessage())
        await self.drain()

    def problem(self, status: int, detail: str) -> None:
        """A refusal, where nothing was answered yet."""
        if self.h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        told = {"type": f"urn:qmpcommit:http:{status}", "title": "Refused", "status": status}
        body = json.dumps({**told, "detail": detail}).encode()
        self.head(status, [("Content-Type", "application/problem+json"), *_HEADERS], len(body))
        self.data(body)

    def _send(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> None:
        self._writer.write(self.h11.send(event) or b"")


async def _receive(reader: asyncio.StreamReader, connection: h11.Connection) -> _Asked:
    """A whole request; raises `_Refused`, EOFError and h11's errors."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(LARGEST)
            connection.receive_data(data)
            if not data and head is None:
                raise EOFError
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > LARGEST:
                raise _Refused(413, f"a request has at most {LARGEST} bytes")
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            target = head.target.decode("ascii")
            return _Asked(head.method.decode(), target, headers, bytes(body))
        else:
            raise EOFError


_MAPPED = int.from_bytes(b"\0\0\xff\xff", sys.byteorder)
"""What stands before an IPv4 address that a socket of IPv6 has."""


def _uid_of(host: str, port: int, to: int) -> str | None:
    """Whose socket it is that is connected from there to our port; None where nobody can tell.

    "" where it is nobody's: a process that has closed it, of whatever user, waits for no answer.
    """
    local = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
    mapped = f"{0:016X}{_MAPPED:08X}{local}"
    told = False
    for table, wanted in (("tcp", local), ("tcp6", mapped)):
        with suppress(OSError), open(f"/proc/net/{table}", encoding="ascii") as sockets:
            told = True
            for line in sockets:
                fields = line.split()
                if fields[1] == wanted and fields[2].endswith(f":{to:04X}"):
                    return "" if fields[9] == "0" else fields[7]  # without an inode it says uid 0
    return "" if told else None


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())
