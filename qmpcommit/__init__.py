"""Live block commit over QMP, both phases of it.

The public names; each is loaded when it is first used, so that importing the package costs
next to nothing. ``__init__.pyi`` tells them to type checkers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOMES = {
    "block.chain": "Disk Image",
    "client.events": "DaemonEvent",
    "client.group": "RemoteGroup",
    "client.host": "Client",
    "client.job": "RemoteJob",
    "client.vm": "RemoteOptions RemoteVM",
    "commit.stale_layers": "Stall",
    "commit.converge": "ConvergeReport",
    "cycles.discarding": "Discarded",
    "cycles.run": (
        "CycleOptions DiscardOptions KeepAllIf KeepIf Round SessionCycleOptions cycle discard"
    ),
    "commit.pace": "Converge",
    "group.run": "CommitGroupOptions GroupCommit commit_group",
    "group.members": "GroupMember",
    "group.outcome": "GroupOutcome",
    "group.policy": "AskedGroupPolicy GroupReady",
    "commit.file_ledger": "FileLedger",
    "commit.job": "CommitJob",
    "commit.ledger": "Ledger add_note",
    "commit.outcome": "CommitOutcome JobProgress Timings",
    "commit.pending": "resolve_pending",
    "commit.phases": "Phase",
    "commit.plan": "Plan",
    "commit.steering": "JobNow",
    "guest.hold": "Quiet freeze",
    "guest.run_state": "thaw",
    "window.run": "new_window_name",
    "window.group": "snapshot",
    "window.overlays": "LaidOverlay Snapshot",
    "window.records": "Frozen GroupWindow NotedWindow OpenWindow Window",
    "commit.policy": (
        "Abort AskedPolicy Check Decision Hold Keep Pivot Policy PolicyValue Ready Recycle"
    ),
    "commit.vm": "SessionOptions",
    "errors": (
        "ChainError CommandRefused CommitFailed ConnectError DeadlineExceeded DiskNotFound"
        " GroupFailed GroupSplit InvalidRequest JobConflict JobNotFound MonitorBusy MonitorLost"
        " NoSpace NotReady OnlyIfFailed PolicyRequired ProtocolViolation QmpCommitError"
        " QuiesceFailed VMGone VMStateError WindowError WindowNotFound"
        " CommitNotFound DaemonError DaemonLost DaemonUnreachable KeyReused QueueFull VMNotFound"
        " JobDetached OperationError RemoteJobDetached RequestError SessionClosed"
    ),
    "offline_session": "offline",
    "preloading": "preload",
    "qmp.events": "Event UnknownEvent",
    "recovery.doing": "recover",
    "recovery.findings": "Finding Recovered",
    "recovery.resume": "Outcomes resume",
    "session": "Session",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

_FORMER = {
    **dict.fromkeys(("close_window", "open_window", "recover_window"), "window.run"),
    "quiesced": "guest.hold",
}
"""Functions that are methods of a session now, or have another name; with their former homes."""

_MODULES = ("client", "events")

__all__ = ["__version__", "commit", *_MODULES, *_HOME]  # noqa: PLE0604  (all of them are strings)

__version__ = "0.1.0"


class _Front(ModuleType):
    """This module, whose `commit` is the call whatever is imported, and in whatever order."""

    @property
    def commit(self) -> Any:
        from qmpcommit.commit.vm import commit

        return self.__dict__.get("_commit", commit)

    @commit.setter
    def commit(self, value: Any) -> None:
        """What a program's test puts there; the import of the package of that name does nothing."""
        if not isinstance(value, ModuleType):
            self.__dict__["_commit"] = value

    @commit.deleter
    def commit(self) -> None:
        self.__dict__.pop("_commit", None)


sys.modules[__name__].__class__ = _Front


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if name in _MODULES:
        return import_module(f"qmpcommit.{name}")
    if name in _FORMER:
        from warnings import warn

        new = "qmpcommit.freeze" if name == "quiesced" else f"vm.{name}"
        now = f"qmpcommit.{name}(vm, ...) is {new}(...) now, and goes with the next version"
        warn(now, DeprecationWarning, stacklevel=2)
        return getattr(import_module(f"qmpcommit.{_FORMER[name]}"), name)
    if home is None:
        raise AttributeError(f"module 'qmpcommit' has no attribute {name!r}")
    value = getattr(import_module(f"qmpcommit.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
