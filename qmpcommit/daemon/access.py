"""Who may use the API, and how much of it: rights, and bounds.

`Gate` is the ASGI layer around the API that refuses strangers, large bodies, slow requests and too
many at once, each with a problem document.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from qmpcommit.daemon.config import Config
from qmpcommit.daemon.connections import problem
from qmpcommit.daemon.metrics import Metrics
from qmpcommit.daemon.origin import foreign
from qmpcommit.daemon.rights import ASKER, Asker, Askers
from qmpcommit.log import Log

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

STREAMS = ("/v1/events",)


class TooLarge(HTTPException):
    """A request's body is longer than it may be; FastAPI answers it where it reads the body."""

    def __init__(self, size: int) -> None:
        super().__init__(413, f"a request has at most {size} bytes")


class Gate:
    """What every request passes before it reaches the API."""

    def __init__(self, app: App, config: Config, askers: Askers, metrics: Metrics) -> None:
        self._app, self.askers, self._metrics = app, askers, metrics
        self.limits = config.limits
        self._requests = 0
        self._log = Log()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, scope["method"], self._metrics)
        asker = await self._asker(scope)
        refusal = self._refusal(scope, asker)
        if refusal is not None:
            await answer.problem(*refusal)
            return
        ASKER.set(asker)  # of this request's task alone, and of what is begun by it
        if scope["method"] == "HEAD":  # what is answered has no body, and HTTP sees to that
            if scope["path"] in STREAMS:
                await answer.empty([(b"content-type", b"text/event-stream")])
                return
            scope = {**scope, "method": "GET"}
        self._requests += 1
        body = _Body(receive, self.limits.request_size)
        try:
            if scope["path"] in STREAMS:
                await self._app(scope, receive, answer)
                return
            async with asyncio.timeout(self.limits.request_time):
                await self._app(scope, body, answer)
        except asyncio.CancelledError:
            # The daemon stops, and this request has waited long enough.
            await answer.problem(503, "Stopping", "the daemon is stopping; ask the next one")
        except TimeoutError:
            seconds = self.limits.request_time
            if body.more:
                what = f"the request was not sent within {seconds:g} s"
                await answer.problem(408, "Too slow", what)
            else:
                what = f"it could not be answered within {seconds:g} s"
                await answer.problem(503, "Too slow", what)
        finally:
            self._requests -= 1
            if scope["path"] not in STREAMS:
                answer.took()
            if scope["method"] not in ("GET", "OPTIONS") and asker is not None:
                told = {"method": scope["method"], "path": scope["path"], "status": answer.status}
                self._log.info("asked", **told, **asker.told())

    async def _asker(self, scope: Scope) -> Asker | None:
        peer = scope.get("state", {}).get("peer")
        if peer is not None:
            return await self.askers.peer(peer)
        host, port = scope.get("client") or ("", 0)
        return self.askers.bearer(_header(scope, b"authorization"), f"{host}:{port}")

    def _refusal(self, scope: Scope, asker: Asker | None) -> tuple[int, str, str] | None:
        peer = scope.get("state", {}).get("peer")
        stranger = foreign(scope["headers"], tcp=peer is None)
        if stranger is not None:
            return 403, "Forbidden", stranger
        if asker is None and peer is not None:
            return 403, "Forbidden", f"user {peer.uid} may not use this daemon"
        if asker is None:
            return 401, "Unauthorized", "give the daemon's token: Authorization: Bearer TOKEN"
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > self.limits.request_size:
            return 413, "Too large", f"a request has at most {self.limits.request_size} bytes"
        if self._requests >= self.limits.requests:
            return 503, "Busy", f"{self.limits.requests} requests are being answered already"
        return None


class _Body:
    """Receives, no more than so many bytes; `more` tells that the client has not sent it all."""

    def __init__(self, receive: Receive, size: int) -> None:
        self._receive, self._size = receive, size
        self._left = size
        self._whole = False
        self.more = False

    async def __call__(self) -> Message:
        self.more = not self._whole
        message = await self._receive()
        self.more = bool(message.get("more_body"))
        self._whole = not self.more
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise TooLarge(self._size)
        return message


class _Answer:
    """Sends, and knows whether the answer has begun."""

    def __init__(self, send: Send, method: str, metrics: Metrics) -> None:
        self._send, self._method, self._metrics = send, method, metrics
        self._begun = False
        self._since = time.monotonic()
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self.status = message["status"]
            self._metrics.requests.labels(self._called, str(self.status)).inc()
        await self._send(message)

    @property
    def _called(self) -> str:
        return self._method if self._method in ("GET", "POST", "DELETE") else "other"

    def took(self) -> None:
        """It is answered."""
        seconds = time.monotonic() - self._since
        self._metrics.request_seconds.labels(self._called).observe(seconds)

    async def empty(self, headers: list[tuple[bytes, bytes]]) -> None:
        """An answer without a body."""
        await self({"type": "http.response.start", "status": 200, "headers": headers})
        await self({"type": "http.response.body", "body": b""})

    async def problem(self, status: int, title: str, detail: str) -> None:
        """A problem document, where nothing was answered yet."""
        if self._begun:
            return
        headers, body = problem(status, title, detail)
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""
