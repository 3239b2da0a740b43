"""From the daemon's problem documents back to the errors that the library raises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from qmpcommit import errors
from qmpcommit.client.http import Reply
from qmpcommit.errors import DaemonError, InvalidRequest, QmpCommitError
from qmpcommit.qmp.address import Address

_PREFIX = "urn:qmpcommit:"
_ELSEWHERE = {"JournalError": "qmpcommit.daemon.journal", "JournalFull": "qmpcommit.daemon.journal"}
_RESERVED = frozenset(dir(QmpCommitError)) | {"message", "facts", "self"}


@contextmanager
def sensible(what: str) -> Iterator[None]:
    """What has another shape than the daemon's answers have is told as a `DaemonError`."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DaemonError(
            f"what the daemon shows is no {what}: {error!r:.500}. Perhaps something else answers"
            " at its address, or a daemon of another version"
        ) from None


def error_from(described: Mapping[str, Any]) -> QmpCommitError:
    """The error with these JSON members, of its own class where that is known here."""
    kind = _class(str(described.get("type", "")))
    facts = {
        str(name): value
        for name, value in described.items()
        if name not in ("type", "message") and str(name) not in _RESERVED
    }
    return kind(str(described.get("message", "the daemon does not say why")), **facts)


def problem(reply: Reply, address: Address) -> QmpCommitError:
    """The error that an answer tells of, which is none of success."""
    document = reply.json
    if reply.status >= 500 and not isinstance(document, dict):
        return DaemonError(
            f"the daemon at {address} failed on this request (HTTP {reply.status}); its log says"
            " why. See what it lists before anything is asked again",
            address=str(address),
            status=reply.status,
        )
    if not isinstance(document, dict):
        return DaemonError(
            f"what answers at {address} is no qmpcommitd: it says HTTP {reply.status}, and nothing"
            " that qmpcommitd says",
            address=str(address),
            status=reply.status,
        )
    described = document.get("error")
    if isinstance(described, dict):
        return error_from(described)
    detail = str(document.get("detail") or document.get("title") or f"HTTP {reply.status}")
    if document.get("type") == f"{_PREFIX}InvalidRequest":
        return InvalidRequest(f"the daemon understands the request otherwise: {detail}")
    return DaemonError(
        f"the daemon at {address} refuses: {detail}", address=str(address), status=reply.status
    )


def transient(reply: Reply) -> bool:
    """Whether the daemon was too busy to look at the request, or to answer in time, or stops."""
    if reply.status != 503:
        return False
    document = reply.json
    return isinstance(document, dict) and document.get("type") == f"{_PREFIX}http:503"


def _class(name: str) -> type[QmpCommitError]:
    home = import_module(_ELSEWHERE[name]) if name in _ELSEWHERE else errors
    found = getattr(home, name, None)
    if isinstance(found, type) and issubclass(found, QmpCommitError):
        return found
    return QmpCommitError
