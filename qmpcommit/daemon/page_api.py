"""The daemon's page, ``/ui``: files of the package, and what they need beside the API.

They are plain HTML, CSS and JavaScript modules, and name no other host. `HEADERS` has a browser
hold them to that.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, NamedTuple

from fastapi import FastAPI, Header, Response
from fastapi.responses import JSONResponse

import qmpcommit
from qmpcommit import manual
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.rights import ASKER

_JS, _TEXT = "text/javascript; charset=utf-8", "text/plain; charset=utf-8"

FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "app.js": _JS,
    "ask.js": _JS,
    "data.js": _JS,
    "dom.js": _JS,
    "manual.js": _JS,
    "show.js": _JS,
    "vms.js": _JS,
    "work.js": _JS,
}
"""The files of the page, below ``/ui/``, and their types."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Cache-Control": "no-cache, private",  # asked for again, and answered with 304
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""What goes with each of them."""

IfNoneMatch = Annotated[str | None, Header()]


class _File(NamedTuple):
    body: bytes
    kind: str
    tag: str


def _made(body: bytes, kind: str) -> _File:
    return _File(body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


@cache
def _file(name: str) -> _File:
    """One of `FILES`, also where the program is a zip file."""
    assert __spec__ is not None
    path = os.path.join(os.path.dirname(__file__), "page", name)
    return _made(__spec__.loader.get_data(path), FILES[name])  # type: ignore[union-attr]


@cache
def _topic(name: str) -> _File:
    return _made(manual.page(name).encode(), _TEXT)


def routes(app: FastAPI, engine: Engine) -> None:
    """Add them to the app; its OpenAPI document is of the API alone."""

    def serve(path: str, read: Callable[[str], _File], name: str) -> None:
        async def get(if_none_match: IfNoneMatch = None) -> Response:
            found = read(name)
            headers = {**HEADERS, "ETag": found.tag}
            if if_none_match is not None and found.tag in if_none_match:
                return Response(status_code=304, headers=headers)
            return Response(found.body, media_type=found.kind, headers=headers)

        app.add_api_route(path, get, methods=["GET"], name=path, include_in_schema=False)

    serve("/ui", _file, "index.html")
    for name in FILES:
        if name != "index.html":
            serve(f"/ui/{name}", _file, name)
    for topic in manual.TOPICS:
        serve(f"/ui/manual/{topic}.md", _topic, topic)

    @app.get("/ui/manual.json", include_in_schema=False)
    async def topics() -> Response:
        """The manual's topics, in their order, with their titles."""
        found = [{"name": name, "title": manual.title(name)} for name in manual.TOPICS]
        return JSONResponse(found, headers=HEADERS)

    @app.get("/ui/asker.json", include_in_schema=False)
    async def asker() -> Response:
        """Who looks at the page, on which VMs they may decide, and what time it is here."""
        who = ASKER.get()
        names = sorted(engine.registry.vms)
        told: dict[str, Any] = {
            "who": "" if who is None else who.who,
            "role": "admin" if who is None else who.role,
            "operates": [name for name in names if who is None or who.may("operate", [name])],
            "host": socket.gethostname(),
            "version": qmpcommit.__version__,
            "time": time.time(),
        }
        return JSONResponse(told, headers={**HEADERS, "Cache-Control": "no-store"})
