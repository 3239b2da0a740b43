"""What a commit came to."""

from __future__ import annotations

from dataclasses import field
from datetime import datetime
from typing import Any, Literal

from qmpcommit.block.chain import Image
from qmpcommit.commit.phases import Phase
from qmpcommit.values import Record, record

Action = Literal["pivot", "keep", "abort", "recycle", "none"]
UsedBy = Literal["", "guest", "export", "nothing"]


@record
class Timings(Record):
    """When what happened, aware UTC times from QEMU's own event clock where it gave one.

    `decided` is when QEMU acted on the decision; None stands for what did not happen, or
    happened before we listened.
    """

    started: datetime | None = None
    ready: datetime | None = None
    decided: datetime | None = None
    ended: datetime | None = None

    @property
    def held(self) -> float | None:
        """Seconds from the last write that got through to the end of a job held in PENDING."""
        if self.decided is None or self.ended is None:
            return None
        return (self.ended - self.decided).total_seconds()


@record
class CommitOutcome(Record):
    """The end of a commit, as confirmed by QEMU's job list and its block graph.

    `status` is ``completed`` or ``cancelled``; `action` what was really done (``none`` for an
    intermediate layer, which has no second phase); `decided_by` who decided it. `active` is the
    image that is written to now, `used_by` by whom: ``guest``, ``export`` (an NBD client's, or
    others'), ``nothing`` where no device and no export uses the disk (or the VM is off), "" where
    that is not known. `invalidated` are the files that must never be booted again,
    `deleted` those of them that were unlinked, `renamed` the new names of those that were renamed;
    `bytes_committed` is what the job copied.
    `guest_paused` is for how many seconds a recycle paused the guest; `held`
    for how many the disk's own I/O was held in PENDING, on QEMU's clock; `quiesced` for how many
    the guest stood still for it, frozen or paused, where a `freeze` was asked for; `converge`
    what was done to a guest that wrote too fast (the members of a `ConvergeReport`); `hook` how
    the hook ended that persists the VM's new disk path. `warnings` are what should be known of it,
    what the checks before it found included.
    """

    status: Literal["completed", "cancelled"]
    action: Action
    disk: str
    job_id: str
    base: Image
    top: Image
    active: Image | None
    vm: str = ""
    decided_by: str = ""
    invalidated: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    bytes_committed: int = 0
    timings: Timings = Timings()
    guest_paused: float | None = None
    held: float | None = None
    quiesced: float | None = None
    converge: dict[str, Any] | None = None
    hook: Literal["", "done", "failed"] = ""
    used_by: UsedBy = ""
    warnings: list[str] = field(default_factory=list)


@record
class JobProgress(Record):
    """How far a commit is: bytes done and to do, and the rate in bytes per second.

    `total` grows while the guest writes and may be 0 (an empty overlay), so what is left is
    ``total - current``, never a quotient. `phase` is a text as well (``phase == "ready"``), and
    ``finished`` only in the last of a commit that has ended; `status` is QEMU's own word; `pace`
    tells a job that is slow from one that is stuck.
    """

    current: int
    total: int
    bandwidth: float
    phase: Phase
    status: str = ""
    pace: Literal["moving", "slow", "stuck"] = "moving"
