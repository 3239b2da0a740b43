"""Names of NBD exports: what QEMU shows of one, and what a header may say to mean it.

QEMU puts the URI of an NBD node together without escaping anything, so that what it shows is no
name that opens where the export or the socket's path has a space, ``%``, ``?`` or ``#``, where the
export begins with a slash, or the host is an IPv6 address.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_UNIX = "nbd+unix://"
_TCP = "nbd://"


class Export(NamedTuple):
    """One export of one NBD server: of a Unix socket's `path`, or of `host` and `port`."""

    path: str = ""
    host: str = ""
    port: str = ""
    name: str = ""

    @property
    def uri(self) -> str:
        """The plain name by which every QEMU opens it; "" where there is none.

        Newer ones decode a socket's path twice, older ones once.
        """
        if set(self.path) & set("%&;#?="):
            return ""
        from urllib.parse import quote  # which takes time, and few disks have such a name

        name = quote(self.name, safe="" if self.name.startswith("/") else "/")
        if self.path:
            return f"{_UNIX}/{name}?socket={quote(self.path, safe='/')}"
        host = f"[{self.host}]" if ":" in self.host else quote(self.host)
        return f"{_TCP}{host}:{self.port}/{name}"

    @property
    def options(self) -> dict[str, Any]:
        """It as QEMU's block options."""
        server = {"type": "unix", "path": self.path} if self.path else {
            "type": "inet", "host": self.host, "port": self.port
        }  # fmt: skip
        return {"driver": "nbd", "server": server, "export": self.name}


def shown_export(text: str) -> Export | None:
    """The export of a node that QEMU shows so; None for what is no such name."""
    if text.startswith(_UNIX):
        name, found, path = text.removeprefix(_UNIX).rpartition("?socket=")
        return Export(path=path, name=name[1:]) if found else None
    if text.startswith(_TCP):
        where, _, name = text.removeprefix(_TCP).partition("/")
        host, _, port = where.rpartition(":")
        return Export(host=host, port=port, name=name) if port.isdigit() else None
    return None


def written_export(text: str) -> Export | None:
    """The export that a header's (or a person's) name means; None for what is no NBD name."""
    if text.startswith("nbd:") and not text.startswith(_TCP):
        where, _, name = text.removeprefix("nbd:").partition(":exportname=")
        if where.startswith("unix:"):
            return Export(path=where.removeprefix("unix:"), name=name)
        host, _, port = where.rpartition(":")
        return Export(host=_bare(host), port=port, name=name)
    if text[:3].lower() != "nbd":
        return None
    from urllib.parse import parse_qs, unquote, urlsplit

    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "localhost", str(parts.port or 10809)
    except ValueError:
        return None
    name = unquote(parts.path.lstrip("/"))
    if parts.scheme == "nbd+unix":
        (path,) = parse_qs(parts.query).get("socket") or [""]
        return Export(path=path, name=name) if path else None
    if parts.scheme in ("nbd", "nbd+tcp"):
        return Export(host=host, port=port, name=name)
    return None


def export_of(options: Mapping[str, Any]) -> Export | None:
    """The export that block options of the driver ``nbd`` mean, nested or dotted."""
    server = options.get("server")
    given = dict(server) if isinstance(server, Mapping) else {}
    for key, value in options.items():
        given[key.removeprefix("server.")] = value
    name = str(given.get("export") or "")
    if given.get("path"):
        return Export(path=str(given["path"]), name=name)
    if given.get("host"):
        return Export(host=str(given["host"]), port=str(given.get("port") or 10809), name=name)
    return None


def _bare(host: str) -> str:
    return host.removeprefix("[").removesuffix("]")


def json_options(text: str) -> dict[str, Any]:
    """The options in a ``json:`` name, nested; none where it is no such name, or cut off."""
    if not text.startswith("json:"):
        return {}
    try:
        found = json.loads(text.removeprefix("json:"))
    except ValueError:
        return {}
    return _nested(found) if isinstance(found, dict) else {}


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """``{"file.driver": x}`` as ``{"file": {"driver": x}}``, as QEMU takes both."""
    made: dict[str, Any] = {}
    for key, value in options.items():
        at = made
        *outer, last = key.split(".")
        for part in outer:
            inner = at.setdefault(part, {})
            at = inner if isinstance(inner, dict) else {}
        at[last] = _nested(value) if isinstance(value, Mapping) else value
    return made
