"""What a commit's state machine hears and what it answers: facts in, actions out.

Frozen values without behaviour. Facts come from QEMU's events, from what it answers when asked,
from its replies to commands, from the monitor's connection, from whoever decides, and from the
clock; actions are what the driver then owes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Choice(StrEnum):
    """What can be decided."""

    PIVOT = "pivot"
    KEEP = "keep"
    ABORT = "abort"
    RECYCLE = "recycle"  # a pivot, and a fresh overlay before the guest can write


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

    BASE = "base"  # or an overlay that others have laid over it
    TOP = "top"  # the same
    MERGED = "merged"  # intermediate layer: no longer in the chain, over a base that is
    OTHER = "other"  # neither: somebody changed the chain
    UNUSED = "unused"  # no device or export uses the disk, so nothing can be seen
    IDLE = "idle"  # the same, and none did when it was planned: nobody writes to it


class Use(StrEnum):
    """What the disk was found to use while the job was there."""

    USED = "used"  # what the job copies; or nobody uses any of it
    STALE = "stale"  # a layer below: somebody had pivoted before the job began
    UNKNOWN = "unknown"  # the job holds nothing any more, so that this may be its own end


# -- facts ----------------------------------------------------------------------------------------


class Looked(NamedTuple):
    """The disk and its VM are as they have to be for what is sent next, or `error` says why not."""

    error: str | None = None


class Checked(NamedTuple):
    """Whether the job that was begun copies what the disk uses; `what` it uses where not."""

    use: Use
    what: str = ""


class StatusChanged(NamedTuple):
    """``JOB_STATUS_CHANGE`` for our job."""

    status: str


class BecameReady(NamedTuple):
    """``BLOCK_JOB_READY``, with the bytes copied by then."""

    done: int = 0
    total: int = 0


class Ended(NamedTuple):
    """``BLOCK_JOB_COMPLETED`` or ``BLOCK_JOB_CANCELLED``, or a concluded job found by asking.

    `done` and `total` are bytes, `error` QEMU's text where it failed.
    """

    cancelled: bool
    error: str | None = None
    done: int = 0
    total: int = 0


class JobSeen(NamedTuple):
    """One job as QEMU lists it; `auto_finalize` and `io_status` where they were asked for."""

    status: str
    done: int = 0
    total: int = 0
    error: str | None = None
    auto_finalize: bool = True
    io_status: str = "ok"


class Answered(NamedTuple):
    """The answer to `Ask`: the job, or None where QEMU knows no such job."""

    job: JobSeen | None


class Accepted(NamedTuple):
    """QEMU returned success for a command."""

    command: Command


class Refused(NamedTuple):
    """QEMU returned an error for a command; `final` when repeating it can't help."""

    command: Command
    error: str
    final: bool = False


class Unnoted(NamedTuple):
    """A command was not sent, for it could not be written down; `error` says why."""

    command: Command
    error: str


class Unanswered(NamedTuple):
    """The connection was lost, or time was up, before a command's reply."""

    command: Command


class Decided(NamedTuple):
    """A decision: by the policy, the caller, a deadline or an interrupt."""

    choice: Choice
    by: str


class GraphRead(NamedTuple):
    """What the disk uses, after the end."""

    where: Where


class Prepared(NamedTuple):
    """What had to be done while the disk's I/O waits is done, or `error` says why not."""

    error: str | None = None


class Frozen(NamedTuple):
    """The guest is paused and a fresh overlay is open, or `error` says why not."""

    error: str | None = None


class Overlaid(NamedTuple):
    """The fresh overlay lies over the base, or `error` says why not."""

    error: str | None = None


class LinkBack(NamedTuple):
    """The monitor is back; `same_vm` False when another process answers now."""

    same_vm: bool | None = None


class LinkDead(NamedTuple):
    """The monitor does not come back: QEMU has ended (`vm_gone`), or it can't be told."""

    vm_gone: bool


class News(StrEnum):
    """Facts that need no words."""

    LINK_LOST = "the monitor went away"
    SHUTTING_DOWN = "SHUTDOWN: from now on COMPLETED may be QEMU's own way to end a job"
    TICK = "time has passed with no news"
    RELIEVED = "the cause of a stall is gone, says its owner"
    THAWED = "the guest runs again, if it ran before"


Fact = (
    Looked
    | Checked
    | StatusChanged
    | BecameReady
    | Ended
    | Answered
    | Accepted
    | Refused
    | Unnoted
    | Unanswered
    | Decided
    | GraphRead
    | Prepared
    | Frozen
    | Overlaid
    | LinkBack
    | LinkDead
    | News
)


# -- actions -----------------------------------------------------------------------------------


class Duty(StrEnum):
    """What the driver owes beside commands; each is answered by a fact."""

    LOOK = "look whether the disk is as it was planned (Looked)"
    CHECK = "look whether the disk uses what the job copies (Checked)"
    ASK = "ask query-jobs about our job (Answered)"
    CONSULT = "ask the policy (Decided)"
    READ_GRAPH = "read the block graph back (GraphRead)"
    PREPARE = "the disk's I/O waits: do what must be done before the end is final (Prepared)"
    STALL = "the storage failed and the job waits: tell its owner (RELIEVED)"
    FREEZE = "open a fresh overlay and pause the guest (Frozen)"
    OVERLAY = "lay the fresh overlay over the base (Overlaid)"
    THAW = "let the guest run again (THAWED)"
    RELINK = "bring the monitor back (LinkBack or LinkDead)"
    FINISH = "nothing more: the state holds the verdict"


Action = Command | Duty
"""A command to send, whose answer is a fact, or another duty."""
