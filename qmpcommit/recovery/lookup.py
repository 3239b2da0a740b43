"""From what VMs show to what a death has left on them, in the order in which it is put right.

Pure: nothing is asked or changed here. Over several VMs the jobs of one group are one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import get_args

from qmpcommit.commit.claim import number_of, owner_in, told
from qmpcommit.guest.marks import Mark, mark_of_discard, marks_among
from qmpcommit.names import HELD_GROUP, WINDOW_MARK
from qmpcommit.recovery.findings import Decide, Finding, Kind
from qmpcommit.recovery.jobs import (
    DISCARD,
    Groups,
    creations,
    disk_of,
    ended_or_not,
    held,
    is_commit,
    pending,
)
from qmpcommit.recovery.overlays import discards, nodes_left, recycles, swapped_discards
from qmpcommit.recovery.seen import Seen
from qmpcommit.window.readers import HINT, WHAT_TO_DO, reading

ORDER: Sequence[Kind] = get_args(Kind)


def look_up(seen: Iterable[Seen], decide: Decide | None = None) -> list[Finding]:
    """All findings on these VMs, in order."""
    seen = list(seen)
    groups = Groups(seen)
    swapped = swapped_discards(seen)
    found = [each for vm in seen for each in _of(vm, groups, swapped, decide)]
    return sorted(found, key=lambda each: ORDER.index(each.kind))


def _of(
    seen: Seen, groups: Groups, swapped: Collection[str], decide: Decide | None
) -> Iterator[Finding]:
    yield from creations(seen)
    yield from pending(seen, groups, decide)
    interrupted = [*recycles(seen), *discards(seen, swapped)]
    yield from interrupted
    yield from _marks(seen, groups, stuck=[each for each in interrupted if not each.does])
    yield from ended_or_not(seen, groups, decide)
    yield from nodes_left(seen)
    yield from _windows(seen)
    yield from _throttles(seen)
    for path in () if seen.living else seen.files:  # whoever lives may have made it just now
        message = f"{path} has no byte, and was made for a fresh overlay that never began"
        yield Finding("file", seen.vm, path, message, "It is deleted")
    yield from _claims(seen)


# -- guests ---------------------------------------------------------------------------------------


def mark_is_held(seen: Seen, mark: Mark, groups: Groups) -> bool:
    """Whether whoever has the guest stand still may live."""
    digits = mark.owner[1:]
    if mark.owner[0] in "ws":
        return any(owner.tag == digits for owner in seen.living)
    if mark.owner[0] == "g":
        if groups.of(digits):
            return groups.followed(digits)
        return any(owner.verb in ("group", "cycle") for owner in seen.living)
    return any(owner.disk.startswith(digits) for owner in seen.living)


def discarded(seen: Seen, mark: Mark) -> bool:
    """Whether the guest's disk was thrown away meanwhile, so that its memory is of no disk."""
    return any(
        mark.owner == mark_of_discard(number_of(disk))
        and len(disk.chain) > 1
        and DISCARD.fullmatch(disk.chain[0].node_name) is not None
        and seen.names.get(disk.chain[0].node_name) == disk.chain[1].node_name
        for disk in seen.disks
    )


def _marks(seen: Seen, groups: Groups, stuck: Sequence[Finding]) -> Iterator[Finding]:
    for mark in marks_among(seen.graph.nodes):
        if mark_is_held(seen, mark, groups):
            continue
        message = mark.message
        if mark.how == "agent":
            yield Finding(
                "frozen",
                seen.vm,
                mark.node,
                message,
                "It is thawed through its agent (--agent SOCKET)",
            )
        elif stuck:
            yield Finding(
                "frozen",
                seen.vm,
                mark.node,
                message,
                "It stays so until its disks are whole again",
                does=False,
            )
        elif seen.status in ("paused", "prelaunch") and discarded(seen, mark):
            does = "It is reset, and goes on" if mark.resets else "It stays stopped, as was asked"
            yield Finding("frozen", seen.vm, mark.node, message, does)
        elif seen.status in ("paused", "prelaunch"):
            yield Finding("frozen", seen.vm, mark.node, message, "It goes on")
        else:
            yield Finding(
                "frozen",
                seen.vm,
                mark.node,
                message,
                f"It is '{seen.status}', and only the mark of that is removed",
            )


# -- what is open ------------------------------------------------------------------------------


def _windows(seen: Seen) -> Iterator[Finding]:
    tags = {owner.tag for owner in seen.living if owner.tag}

    def left(file: str) -> bool:
        return file.rpartition(WINDOW_MARK)[2].partition(".")[0][-8:] not in tags

    for disk in seen.disks:
        active = disk.active
        if active is None or WINDOW_MARK not in active.filename or len(disk.chain) < 2:
            continue
        if left(active.filename) and not held(seen, disk):
            message = f"a window over {disk} was left open: its guest writes to {active.filename}"
            readers = seen.readers.get(active.filename)
            if readers:
                message += f", and {reading(readers, disk.chain[1].filename)}"
            yield Finding(
                "window",
                seen.vm,
                active.filename,
                message,
                f"{WHAT_TO_DO}; {HINT}" if readers else "It is merged back, and deleted",
                does=not readers,
                disk=disk.name,
            )
    laid = {image.filename for disk in seen.disks for image in disk.chain}
    for file in seen.windows:
        if file not in laid and left(file):
            message = f"{file} is left of a window"
            yield Finding("window", seen.vm, file, message, "It is removed if nothing is lost")


def _throttles(seen: Seen) -> Iterator[Finding]:
    told = set()
    for noted in seen.limits:
        disk = next((each for each in seen.disks if noted.is_of(each, seen.graph)), None)
        if seen.living if disk is None else held(seen, disk):
            continue
        told.add(disk)
        what = f"the writes of {disk}" if disk is not None else "a disk's writes"
        yield Finding(
            "throttle",
            seen.vm,
            noted.message,
            f"{what} are held back (by {noted.message}) for a commit that was killed",
            "The limits that were there before are put back",
            disk=disk.name if disk is not None else "",
        )
    for device in seen.graph.devices:
        inserted = device.get("inserted") or {}
        group = str(inserted.get("group") or "")
        if not group.startswith(HELD_GROUP):
            continue
        name = group.removeprefix(HELD_GROUP)
        disk = next((each for each in seen.disks if each.name == name), None)
        if disk is None or disk in told or held(seen, disk):
            continue
        message = (
            f"the writes of {disk} are held back to {inserted.get('bps_wr')} bytes per second for a"
            " commit that was killed"
        )
        yield Finding(
            "throttle",
            seen.vm,
            f"device {disk.name}",
            message,
            "What limits it had before can't be known: set them with block_set_io_throttle",
            does=False,
            disk=disk.name,
        )


def _claims(seen: Seen) -> Iterator[Finding]:
    jobs = [str(job["id"]) for job in seen.jobs.values() if is_commit(job)]
    for owner in seen.dead:
        mine = next((d for d in seen.disks if owner_in(seen.graph, d) == owner), None)
        name = mine.name if mine is not None else ""
        left = "left it in QEMU on purpose" if owner.verb == "detach" else "has ended"
        message = f"{mine or 'a disk'} is held by {told(owner)}, which {left}"
        there = [job for job in jobs if mine is not None and disk_of(seen, job) == mine]
        if there:
            said = f"It is let go with job {there[0]}"
            yield Finding("claim", seen.vm, owner.node, message, said, does=False, disk=name)
        else:
            yield Finding("claim", seen.vm, owner.node, message, "It is let go", disk=name)
    for owner in seen.unsure:
        mine = next((d for d in seen.disks if owner_in(seen.graph, d) == owner), None)
        yield Finding(
            "claim",
            seen.vm,
            owner.node,
            f"{mine or 'a disk'} is held by {told(owner)}, of whom it can't be seen from here"
            " whether it lives",
            "If it is gone for certain: --override claim",
            does=False,
            disk=mine.name if mine is not None else "",
        )
