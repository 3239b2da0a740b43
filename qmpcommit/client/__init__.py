"""The daemon's client: a host with many VMs, and commits that survive whoever asked for them.

``from qmpcommit.client import Client``; it needs h11, which the extra "cli" brings.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmpcommit.client.events import DaemonEvent as DaemonEvent
    from qmpcommit.client.events import Events as Events
    from qmpcommit.client.group import RemoteGroup as RemoteGroup
    from qmpcommit.client.host import Client as Client
    from qmpcommit.client.job import RemoteJob as RemoteJob
    from qmpcommit.client.vm import RemoteGroupOptions as RemoteGroupOptions
    from qmpcommit.client.vm import RemoteOptions as RemoteOptions
    from qmpcommit.client.vm import RemoteVM as RemoteVM

DEFAULT_SOCKET = "/run/qmpcommit/qmpcommitd.sock"
"""Where the daemon listens, where nothing else is said."""


def default_daemon() -> str:
    """The daemon that is asked where none is named: $QMPCOMMIT_DAEMON, else `DEFAULT_SOCKET`."""
    return os.environ.get("QMPCOMMIT_DAEMON") or DEFAULT_SOCKET


_HOMES = {
    "events": "DaemonEvent Events",
    "group": "RemoteGroup",
    "host": "Client",
    "job": "RemoteJob",
    "vm": "RemoteGroupOptions RemoteOptions RemoteVM",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qmpcommit.client' has no attribute {name!r}")
    return getattr(import_module(f"qmpcommit.client.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
