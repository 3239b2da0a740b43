"""Which pages of a browser may ask: none but the daemon's own.

A browser sends requests for whatever page it shows, to this host's loopback addresses too. What it
can't do for a stranger's page is to name another ``Host`` than the one that the page asked for,
or to leave out the ``Origin`` of what changes something.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LOOPBACK = re.compile(r"(?:localhost|127\.\d+\.\d+\.\d+|\[::1\])(?::\d+)?")


def foreign(headers: Sequence[tuple[bytes, bytes]], *, tcp: bool) -> str | None:
    """Why a request with these headers is refused; None where it is not.

    Over TCP the host of a request without a token must be a loopback one: a stranger's name that
    leads here (DNS rebinding) is not; who has a token may have come through a proxy. A page that
    asks, over whatever leads to the Unix socket, must come from that same host.
    """
    tokened = any(name == b"authorization" for name, _ in headers)
    hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
    for host in hosts:
        if tcp and not tokened and not _LOOPBACK.fullmatch(host):
            return f"this port answers as 127.0.0.1, [::1] and localhost, and not as '{host:.80}'"
    for name, value in headers:
        if name == b"origin":
            scheme, _, origin = value.decode("latin-1").lower().partition("://")
            ours = scheme in ("http", "https") and [origin] == hosts
            if not ours or not _LOOPBACK.fullmatch(origin):
                return f"a page of '{value.decode('latin-1'):.80}' may not ask this daemon"
    return None
