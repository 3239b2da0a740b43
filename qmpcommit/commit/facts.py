"""What a commit's state machine hears and what it answers: facts in, actions out.

Frozen values without behaviour. Facts come from QEMU's events, from what it answers when asked,
from its replies to commands, from the monitor's connection, from whoever decides, and from the
clock; actions are what the driver then owes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Choice(StrEnum):
    """What can be decided."""

    PIVOT = "pivot"
    KEEP = "keep"
    ABORT = "abort"


class Command(StrEnum):
    """What can be sent, by what it does."""

    START = "block-commit"
    PIVOT = "job-complete"
    KEEP = "block-job-cancel"
    ABORT = "job-cancel"
    RESUME = "job-resume"
    FINALIZE = "job-finalize"
    DISMISS = "job-dismiss"


class Where(StrEnum):
    """What the disk was found to use when the block graph was read back."""

    BASE = "base"
    TOP = "top"
    MERGED = "merged"  # intermediate layer: no longer in the chain
    OTHER = "other"  # neither: somebody changed the chain
    UNUSED = "unused"  # no device or export uses the disk, so nothing can be seen


# -- facts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """``JOB_STATUS_CHANGE`` for our job."""

    status: str


@dataclass(frozen=True, slots=True)
class BecameReady:
    """``BLOCK_JOB_READY``, with the bytes copied by then."""

    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """``BLOCK_JOB_COMPLETED`` or ``BLOCK_JOB_CANCELLED``, or a concluded job found by asking.

    `done` and `total` are bytes, `error` QEMU's text where it failed.
    """

    cancelled: bool
    error: str | None = None
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class JobSeen:
    """One entry of ``query-jobs``; `auto_finalize` from ``query-block-jobs`` where asked."""

    status: str
    done: int = 0
    total: int = 0
    error: str | None = None
    auto_finalize: bool = True


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to `Ask`: the job, or None where QEMU knows no such job."""

    job: JobSeen | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """QEMU returned success for a command."""

    command: Command


@dataclass(frozen=True, slots=True)
class Refused:
    """QEMU returned an error for a command; `final` when repeating it can't help."""

    command: Command
    error: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The connection was lost, or time was up, before a command's reply."""

    command: Command


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision: by the policy, the caller, a deadline or an interrupt."""

    choice: Choice
    by: str


@dataclass(frozen=True, slots=True)
class GraphRead:
    """What the disk uses, after the end."""

    where: Where


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The monitor went away."""


@dataclass(frozen=True, slots=True)
class LinkBack:
    """The monitor is back; `same_vm` False when another process answers now."""

    same_vm: bool | None = None


@dataclass(frozen=True, slots=True)
class LinkDead:
    """The monitor does not come back: QEMU has ended (`vm_gone`), or it can't be told."""

    vm_gone: bool


@dataclass(frozen=True, slots=True)
class ShuttingDown:
    """``SHUTDOWN``: from now on COMPLETED may be QEMU's own way to end a job."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed with no news."""


Fact = (
    StatusChanged
    | BecameReady
    | Ended
    | Answered
    | Accepted
    | Refused
    | Unanswered
    | Decided
    | GraphRead
    | LinkLost
    | LinkBack
    | LinkDead
    | ShuttingDown
    | Tick
)


# -- actions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send this command; its answer is a fact."""

    command: Command


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask ``query-jobs`` about our job (`Answered`)."""


@dataclass(frozen=True, slots=True)
class Consult:
    """Ask the policy (`Decided`)."""


@dataclass(frozen=True, slots=True)
class ReadGraph:
    """Read the block graph back (`GraphRead`)."""


@dataclass(frozen=True, slots=True)
class Relink:
    """Bring the monitor back (`LinkBack` or `LinkDead`)."""


@dataclass(frozen=True, slots=True)
class Finish:
    """It is over; the state holds the verdict."""


Action = Send | Ask | Consult | ReadGraph | Relink | Finish
