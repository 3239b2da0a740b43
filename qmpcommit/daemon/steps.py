"""What a flatten rule does to a disk, and where it leaves a disk alone: decisions without I/O."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

from qmpcommit.block.chain import Disk, Image, find_disk, qdev_id
from qmpcommit.commit.claim import Owner, lives, told
from qmpcommit.commit.plan import Plan
from qmpcommit.cycles.flatten import Step, next_step
from qmpcommit.daemon.promise import Promise
from qmpcommit.errors import DiskNotFound, JobConflict
from qmpcommit.names import JOB_PREFIX, WINDOW_MARK
from qmpcommit.units import show_size
from qmpcommit.wire.commit import CommitRequest
from qmpcommit.wire.rules import Flatten

STEP_PREFIX = f"{JOB_PREFIX}flatten-"
"""How the ids of the jobs of all rules begin."""

PRIORITY = -100
"""Whatever a client asks for goes first."""

LONGEST = 3600.0
"""Seconds of the longest pause after failures, where a rule does not look more seldom anyway."""

_LONG_NAME = 4096


def is_for(rule: Flatten, disk: Disk) -> bool:
    """Whether the rule's pattern matches one of the names of this disk."""
    names = (disk.name, disk.device, disk.qdev, qdev_id(disk.qdev), disk.root, *disk.exports)
    return any(fnmatchcase(name, rule.disk) for name in names if name)


def overlay_size(disk: Disk) -> int:
    """The bytes allocated by the layers above the bottom one, as far as they are known."""
    return sum(image.allocated_size or 0 for image in disk.chain[:-1])


def passed(rule: Flatten, disk: Disk) -> str:
    """Which limit of the rule this disk's chain has passed, in words; "" for none."""
    layers, size = len(disk.chain), overlay_size(disk)
    if rule.depth is not None and layers > rule.depth:
        return f"it has {layers} layers, more than {rule.depth}"
    if rule.overlay_size is not None and size > rule.overlay_size:
        limit = show_size(rule.overlay_size)
        return f"its overlays take {show_size(size)}, more than {limit}"
    return ""


def step_of(rule: Flatten, disk: Disk) -> Step | None:
    """The next step for this disk; None where it has few enough layers."""
    return next_step(len(disk.chain), rule.keep)


def has_cycle(disk: Disk, names: Iterable[str]) -> bool:
    """Whether one of `names`, which cycles have for disks of this VM, means this disk."""
    for name in names:
        with suppress(DiskNotFound):
            find_disk([disk], name, vm="")
            return True
    return False


def hands_off(
    disk: Disk, held_by: Iterable[str], owner: Owner | None = None, *, cycles: Iterable[str] = ()
) -> str:
    """Why this disk is left alone, in words; "" where it is not.

    `held_by` are the ids of commits that clients have promised for it, `owner` is who has claimed
    it, and `cycles` are the names that cycles have for disks of this VM.
    """
    if has_cycle(disk, cycles):
        return "it has a cycle, which says what goes into its base"
    if any(WINDOW_MARK in image.filename for image in disk.chain):
        return "it is in a window"
    if disk.jobs:
        return f"it has a block job ({', '.join(disk.jobs)})"
    if owner is not None and lives(owner) is not False:
        return f"it is held by {told(owner)}"
    if owner is not None:
        return f"it was left by {told(owner)}, which has ended: see qmpcommit recover"
    commits = ", ".join(held_by)
    return f"it has a commit that has not ended ({commits})" if commits else ""


def commits_of(
    promises: Iterable[Promise], vm: str, disk: Disk, disks: Sequence[Disk]
) -> list[str]:
    """The ids of those of `promises` that are for this disk."""
    found = []
    for promise in promises:
        if promise.vm == vm:
            with suppress(DiskNotFound):
                if find_disk(disks, promise.disk, vm=vm).root == disk.root:
                    found.append(promise.id)
    return found


def pause(rule: Flatten, failures: int) -> float:
    """Seconds until a disk is tried again after so many failures in a row."""
    return min(rule.every * 2.0 ** min(failures - 1, 60), max(LONGEST, rule.every))


def request_of(rule: Flatten, disk: Disk, step: Step) -> CommitRequest:
    """The commit of one step; its layers are named by their files, for places may shift."""
    return CommitRequest(
        disk=disk.name,
        top=_name(disk.chain[step.top]),
        base=_name(disk.chain[step.base]),
        policy=step.policy,
        bandwidth=rule.bandwidth,
        delete=rule.delete,
        keep_relative=rule.keep_relative and step.top > 0,
        priority=PRIORITY,
        job_id=f"{STEP_PREFIX}{os.urandom(4).hex()}",
    )


def refuse_in_window(plan: Plan) -> None:
    """Raise `JobConflict` where a window is open on the disk: what it shows must stand still."""
    if any(WINDOW_MARK in image.filename for image in plan.disk.chain):
        raise JobConflict(
            f"{plan.disk} of {plan.vm} is not flattened while it is in a window; it is tried"
            " again later. Nothing was sent",
            vm=plan.vm,
            disk=plan.disk.name,
        )


def _name(image: Image) -> str:
    return image.filename if len(image.filename) <= _LONG_NAME else image.node_name
