"""Where guest agents are reached: by one VM's socket, or by those of several."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

V = TypeVar("V")

Sockets = Mapping[V, str | os.PathLike[str]]
"""The sockets of guest agents, by their VMs (`Session`s, or whatever stands for one)."""

Agents: TypeAlias = str | os.PathLike[str] | Mapping[Any, str | os.PathLike[str]]
"""The socket of a VM's guest agent, or those of several VMs' by their sessions or names."""


def socket_of(agents: Agents | None, vm: object) -> str | os.PathLike[str] | None:
    """The socket of this VM's agent; None where none was given."""
    return agents.get(vm) if isinstance(agents, Mapping) else agents


def sockets_of(agents: Agents | None, vm: V) -> Sockets[V]:
    """The same, by the VM."""
    socket = socket_of(agents, vm)
    return {} if socket is None else {vm: socket}
