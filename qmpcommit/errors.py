"""The one exception tree.

Everything that qmpcommit raises on purpose is a `QmpCommitError`. A message says what
happened, to which disk of which VM, what state the data is in and what to do next; the same
facts are attributes, for programs. `to_dict` is what ``--json`` and the daemon print.
"""

from __future__ import annotations

import json
from typing import ClassVar, Self


class QmpCommitError(Exception):
    """Base of all errors of this package.

    `message` is what happened and what to do next; `hint` is what a person types for that, where a
    command of ours does it: nothing for a program, which may hold the only monitor. The text of an
    error (``str``) is both. Other keyword arguments become attributes (``error.vm``,
    ``error.disk``, ``error.job_id``, ...); those that a subclass declares in `FACTS` exist always,
    as None where nothing is known, those of them that are in `LISTS` as an empty list.
    """

    FACTS: ClassVar[tuple[str, ...]] = ("vm", "disk", "job_id")
    LISTS: ClassVar[tuple[str, ...]] = ()

    vm: str | None
    disk: str | None
    job_id: str | None

    def __init__(self, message: str, **facts: object) -> None:
        hint = facts.pop("hint", None)
        self.hint = str(hint) if hint else None
        if self.hint:  # what comes from a daemon has it in its message
            message = message.removesuffix(f". {self.hint}")
        super().__init__(message)
        self.message = message
        for name in self.FACTS:
            setattr(self, name, [] if name in self.LISTS else None)
        self.facts = {}
        self.add(**facts)

    facts: dict[str, object]

    def add(self, **facts: object) -> None:
        """Bind facts that were not known where the error was raised; known ones stay."""
        for name, value in facts.items():
            if value is not None and self.facts.get(name) is None:
                self.facts[name] = value
                setattr(self, name, value)

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def __repr__(self) -> str:
        where = "".join(
            f", {name}={value!r}"
            for name in ("vm", "disk", "job_id")
            if (value := self.facts.get(name)) is not None
        )
        return f"{type(self).__name__}({self.message!r}{where})"

    def again(self) -> Self:
        """The same error for somebody else, who may add facts of their own."""
        return type(self)(self.message, hint=self.hint, **self.facts)

    def to_dict(self) -> dict[str, object]:
        """The error as JSON-ready members: ``type``, ``message`` and the known facts.

        Where there is a `hint` it is one of them, and the end of the message as well.
        """
        hint = {"hint": self.hint} if self.hint else {}
        return {"type": type(self).__name__, "message": str(self), **hint, **self.facts}

    def as_json(self) -> dict[str, object]:
        """The same of JSON's own types only."""
        described: dict[str, object] = json.loads(json.dumps(self.to_dict(), default=str))
        return described


class RequestError(QmpCommitError):
    """Base of what was asked wrongly, or at a wrong time: as things are it can't be done.

    What was asked was not begun; asked again as it is, it is refused again until something changes.
    """


class OperationError(QmpCommitError):
    """Base of what QEMU, the guest, the storage, a command or the daemon failed at.

    What was asked made sense; the message says what came of it and in which state it has left
    the data.
    """


class ConnectError(OperationError):
    """No QMP session could be opened: nothing listens there, or what does is not a monitor."""

    FACTS = ("vm", "disk", "job_id", "address")
    address: str | None


class MonitorBusy(ConnectError):
    """The monitor accepts the connection but does not greet: another client holds it."""


class MonitorLost(OperationError):
    """The monitor went away and did not come back; QEMU may still be running, and so may jobs.

    `command` is the QMP command whose reply did not come, where one was under way. `outcome` is
    that of a job which had ended by then, as JSON.
    """

    FACTS: ClassVar[tuple[str, ...]] = ("vm", "disk", "job_id", "command", "outcome")
    command: str | None
    outcome: dict[str, object] | None


class SessionClosed(MonitorLost):
    """The session was closed by its owner, perhaps while this was under way."""


class JobDetached(MonitorLost):
    """The job is no longer followed from here, by its owner's wish; it goes on in QEMU."""


class VMGone(OperationError):
    """QEMU itself has ended, or another QEMU answers at its address.

    `pivoted` is True when the pivot is known to have happened before (the base holds the
    disk), False when it is known not to have (the overlay does), None when it can't be told.
    `base` and `top` are the files of what was committed, `overlay` that of a recycle's fresh
    overlay which may be left.
    """

    FACTS = ("vm", "disk", "job_id", "pivoted", "base", "top", "overlay")
    pivoted: bool | None
    base: str | None
    top: str | None
    overlay: str | None


class CommandRefused(OperationError):
    """QEMU answered a QMP command with an error; `error_class` and `desc` are QEMU's own."""

    FACTS = ("vm", "disk", "job_id", "command", "error_class", "desc")
    command: str
    error_class: str
    desc: str

    def __init__(
        self,
        message: str,
        *,
        command: str = "",
        error_class: str = "",
        desc: str = "",
        **facts: object,
    ) -> None:
        super().__init__(message, command=command, error_class=error_class, desc=desc, **facts)


class ProtocolViolation(OperationError):
    """A reply is not what QEMU's own schema says; what answers is perhaps no QEMU."""

    FACTS = ("vm", "disk", "job_id", "command")
    command: str | None


class DiskNotFound(RequestError):
    """No disk of the VM has that name, or several have; `candidates` lists what there is."""

    FACTS = ("vm", "disk", "job_id", "candidates")
    LISTS = ("candidates",)
    candidates: list[str]


class ChainError(RequestError):
    """The backing chain does not allow what was asked (unknown layer, wrong order, no backing)."""


class PolicyRequired(RequestError, ValueError):
    """Committing the active layer needs exactly one policy: pivot, keep, or one that decides."""


class InvalidRequest(RequestError, ValueError):
    """An argument has no meaning: a malformed size, time, address or policy."""


class OnlyIfFailed(OperationError):
    """The ``only_if`` command did not succeed, so the commit was not begun."""

    FACTS = ("vm", "disk", "job_id", "command", "exit_status")
    command: list[str] | None
    exit_status: int | None


class VMStateError(RequestError):
    """The VM is in a state in which its disks are not its own to write, or may soon not be.

    `status` is its run state (``query-status``), `migration` that of its migration
    (``query-migrate``).
    """

    FACTS = ("vm", "disk", "job_id", "status", "migration")
    status: str | None
    migration: str | None


class NotReady(RequestError):
    """A pivot or keep was asked before READY; the job goes on unharmed."""


class QuiesceFailed(OperationError):
    """The guest could not be quiesced, or, where `frozen` is True, perhaps not thawed again.

    `how` is "agent" or "pause", `agent` the guest agent's socket, `desc` the agent's own text.
    """

    FACTS = ("vm", "disk", "job_id", "how", "agent", "command", "desc", "frozen")
    how: str | None
    agent: str | None
    command: str | None
    desc: str | None
    frozen: bool | None


class JobNotFound(RequestError):
    """QEMU has no block job with that id."""


class JobConflict(RequestError):
    """Another job, or another decision, is in the way.

    `owner` tells who holds the disk, where it is claimed: its ``work``, ``pid``, ``since``, ...
    `status` is that of the job, where its status is what is in the way.
    """

    FACTS = ("vm", "disk", "job_id", "owner", "status")
    owner: dict[str, object] | None
    status: str | None


class CommitFailed(OperationError):
    """The commit ended without doing what was asked; `error` is QEMU's own text, if it gave one.

    `command` is that of the caller's, as an argument list, which gave no answer.
    """

    FACTS: ClassVar[tuple[str, ...]] = ("vm", "disk", "job_id", "error", "command")
    error: str | None
    command: list[str] | None


class NoSpace(CommitFailed):
    """The storage under the base is full, or too small for what would be committed."""


class GroupFailed(CommitFailed):
    """A group commit was cancelled: none of its disks was pivoted or kept.

    `outcomes` are the members' ends in their order, as JSON: an outcome each, or an ``error``.
    `quiesced` is for how many seconds the guest stood still that did so longest, where a `freeze`
    was asked for.
    """

    FACTS: ClassVar[tuple[str, ...]] = (*CommitFailed.FACTS, "outcomes", "quiesced")
    LISTS: ClassVar[tuple[str, ...]] = ("outcomes",)
    outcomes: list[dict[str, object]]
    quiesced: float | None


class GroupSplit(GroupFailed):
    """A group commit ended on both sides, since a QEMU or a monitor was lost after the decision.

    The lists name disks (``DISK of VM``): `pivoted` and `kept` are done, `not_pivoted` and
    `not_kept` go on with their overlay, of `unknown` it can't be told from here.
    """

    LISTS = (*GroupFailed.LISTS, "pivoted", "not_pivoted", "kept", "not_kept", "unknown")
    FACTS = (*GroupFailed.FACTS, *LISTS)
    pivoted: list[str]
    not_pivoted: list[str]
    kept: list[str]
    not_kept: list[str]
    unknown: list[str]


class VMNotFound(RequestError):
    """The daemon knows no VM of that name."""


class CommitNotFound(RequestError):
    """The daemon knows no commit with that id."""


class QueueFull(OperationError):
    """The daemon takes no more commits at the moment."""


class KeyReused(RequestError):
    """The ``Idempotency-Key`` was used for another request before."""


class DaemonError(OperationError):
    """The daemon refuses this client, or what answers is no such daemon.

    `status` is the HTTP status, where there was one.
    """

    FACTS = ("vm", "disk", "job_id", "address", "status")
    address: str | None
    status: int | None


class DaemonUnreachable(ConnectError):
    """No daemon answers at that address; nothing was asked of it."""


class DaemonLost(MonitorLost):
    """The daemon went away and did not come back; what it promised goes on without this client."""

    FACTS = (*MonitorLost.FACTS, "address")
    address: str | None


class RemoteJobDetached(DaemonLost, JobDetached):
    """The daemon's commit is no longer followed from here, by its owner's wish; it goes on."""


class WindowNotFound(RequestError):
    """The daemon knows no snapshot window with that id."""


class WindowError(OperationError):
    """A snapshot window can't be opened, or not be closed; `overlays` are those still active.

    `outcomes` are those of the commits that did close their part of it, as JSON.
    """

    FACTS = ("vm", "disk", "job_id", "overlays", "outcomes")
    LISTS = ("outcomes",)
    overlays: list[str] | None
    outcomes: list[dict[str, object]]


class DeadlineExceeded(OperationError, TimeoutError):
    """It did not end in time; the message says what state that left behind.

    `command` is the QMP command that was not answered, `outcome` how the job ended all the same,
    as JSON.
    """

    FACTS = ("vm", "disk", "job_id", "command", "outcome")
    command: str | None
    outcome: dict[str, object] | None
