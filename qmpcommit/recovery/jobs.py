"""Jobs that nobody follows any more, and the groups that they are of; pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qmpcommit.block.chain import Disk
from qmpcommit.commit.claim import job_number, owner_in
from qmpcommit.commit.pending import GroupPlace, group_job_id, place_of
from qmpcommit.commit.rates import READY
from qmpcommit.names import JOB_PREFIX
from qmpcommit.recovery.findings import Decide, Finding, Kind
from qmpcommit.recovery.seen import Seen

CREATION = re.compile(rf"({JOB_PREFIX}.+)-create-(?:file|qcow2)")
DISCARD = re.compile(rf"{JOB_PREFIX}([cd][0-9a-f]{{8}})(?:-[0-9a-f]{{4}})?-(?:top|file)")
SNAPSHOT = re.compile(rf"{JOB_PREFIX}s[0-9a-f]{{8}}-\d+-(?:top|file)")
_WINDOW = re.compile(rf"{JOB_PREFIX}[ws]([0-9a-f]{{8}})-.*")
_RANDOM = re.compile(r"-[0-9a-f]{8}(?:\.\d+of\d+)?$")
RUNNING = ("created", "running", "paused")


def held(seen: Seen, disk: Disk) -> bool:
    """Whether somebody works on a disk who lives, or may live."""
    owner = owner_in(seen.graph, disk)
    return owner is not None and owner in seen.living


def detached(seen: Seen, disk: Disk | None) -> bool:
    """Whether who began a disk's commit has left it in QEMU on purpose."""
    owner = owner_in(seen.graph, disk) if disk is not None else None
    return owner is not None and owner.verb == "detach" and owner in seen.dead


def disk_of(seen: Seen, job_id: str) -> Disk | None:
    """The disk that a job is on, or that its name tells."""
    for disk in seen.disks:
        if job_id in disk.jobs:
            return disk
    name = _RANDOM.sub("", job_id.removeprefix(JOB_PREFIX))
    called = [d for d in seen.disks if re.sub(r"[^A-Za-z0-9._-]", "", d.name)[-32:] == name]
    return called[0] if len(called) == 1 else None


def followed(seen: Seen, job_id: str) -> bool:
    """Whether whoever began a job, or what is called by its id, may be at it still."""
    if job_id in seen.followed:
        return True
    if match := _WINDOW.fullmatch(job_id):
        return any(owner.tag == match[1] for owner in seen.living)
    disk = None if DISCARD.fullmatch(f"{job_id}-top") else disk_of(seen, job_id)
    if disk is not None:
        return held(seen, disk)
    return any(owner.verb not in ("window", "close") for owner in seen.living)


def is_commit(job: Mapping[str, Any]) -> bool:
    """Whether it is a commit of ours, or what it has become when it ended."""
    return job.get("type") == "commit" and str(job.get("id")).startswith(JOB_PREFIX)


class Groups:
    """The jobs of groups, over all VMs that are looked at."""

    def __init__(self, seen: Iterable[Seen]) -> None:
        self._jobs: dict[str, list[tuple[Seen, Mapping[str, Any], GroupPlace]]] = {}
        self._vms = list(seen)
        for vm in self._vms:
            for job_id, job in vm.jobs.items():
                place = place_of(job_id)
                if place is not None and is_commit(job):
                    self._jobs.setdefault(place.group, []).append((vm, job, place))

    def of(self, group: str) -> list[tuple[Seen, Mapping[str, Any]]]:
        """Its jobs that are seen."""
        return [(vm, job) for vm, job, _ in self._jobs.get(group, [])]

    def finalized(self, group: str) -> bool:
        """Whether one of them has ended well: all of them had been held then."""
        return any(
            job.get("status") == "concluded" and not job.get("error") for _, job in self.of(group)
        )

    def whole(self, group: str) -> bool:
        """Whether all of it is on VMs that are seen: its claims tell where it is on one alone."""
        jobs = self._jobs.get(group, [])
        return not self.unseen(group) or any(
            owner.verb in ("group", "cycle") and owner.tag == group
            for vm, _, _ in jobs
            for owner in (*vm.dead, *vm.living)
        )

    def unseen(self, group: str) -> int:
        """How many of its jobs are not seen, wherever they are, or were."""
        jobs = self._jobs.get(group, [])
        return jobs[0][2].members - len({place.number for _, _, place in jobs}) if jobs else 0

    def missing(self, group: str) -> int:
        """How many of them may be on VMs that are not looked at."""
        return 0 if self.whole(group) else self.unseen(group)

    def untold(self, group: str) -> int:
        """How many of them may be on VMs that are not looked at, and not have ended yet.

        One whose claim was left, with no job, has been dismissed, and that was its last.
        """
        jobs = self._jobs.get(group, [])
        if not jobs or self.whole(group):
            return 0
        members = jobs[0][2].members
        numbers = {*range(1, members + 1)} - {place.number for _, _, place in jobs}
        left = {
            (owner.job, disk.name)
            for vm in self._vms
            for disk in vm.disks
            if (owner := owner_in(vm.graph, disk)) is not None and owner in vm.dead and owner.job
        }
        ended = {
            number
            for number in numbers
            for job, disk in left
            if job == job_number(group_job_id(disk, group, number, members))
        }
        return len(numbers - ended)

    def never_whole(self, job_id: str) -> bool:
        """Whether others of its group were never begun, or have failed: it can't end well."""
        place = place_of(job_id)
        if place is None or not self.whole(place.group) or self.finalized(place.group):
            return False
        failed = any(job.get("status") == "concluded" for _, job in self.of(place.group))
        return failed or bool(self.unseen(place.group))

    def followed(self, group: str) -> bool:
        """Whether whoever began it may be at one of them still."""
        return any(followed(vm, str(job["id"])) for vm, job in self.of(group))


def creations(seen: Seen) -> Iterator[Finding]:
    """Those of fresh overlays' images (``blockdev-create``)."""
    for job_id in seen.jobs:
        match = CREATION.fullmatch(job_id)
        if match and not followed(seen, match[1]):
            message = f"job {job_id} has created a fresh overlay that nobody waits for any more"
            yield Finding("creation", seen.vm, job_id, message, "It is dismissed")


def pending(seen: Seen, groups: Groups, decide: Decide | None) -> Iterator[Finding]:
    """Those that hold their disks' I/O."""
    for job_id, job in seen.jobs.items():
        if not is_commit(job) or job.get("status") != "pending":
            continue
        place, disk = place_of(job_id), disk_of(seen, job_id)
        if groups.followed(place.group) if place else followed(seen, job_id):
            continue
        message = f"job {job_id} holds {disk or 'its disk'}'s I/O, and nobody is there to end it"
        what = pending_order(job_id, groups, decide)
        name = disk.name if disk is not None else ""
        if what is None:
            assert place is not None
            yield Finding(
                "pending",
                seen.vm,
                job_id,
                message,
                f"It is {place.number} of {place.members} of group {place.group}, of which"
                f" {groups.missing(place.group)} are not seen here, so that it can't be known"
                " whether they were finalized: name all of its VMs, or say what was decided"
                " (--decide keep or pivot finalizes it, --decide abort undoes its decision)",
                does=False,
                disk=name,
            )
        elif what == "job-finalize":
            why = f"group {place.group} was finalized" if place and not decide else "as decided"
            yield Finding("pending", seen.vm, job_id, message, f"It is finalized: {why}", disk=name)
        else:
            undone = "Its decision is undone: the overlay stays active and whole"
            yield Finding("pending", seen.vm, job_id, message, undone, disk=name)


def pending_order(job_id: str, groups: Groups, decide: Decide | None) -> str | None:
    """How a job that is held is ended, as all of its group; None where that can't be known."""
    place = place_of(job_id)
    if place is None:
        return "job-cancel"
    if groups.finalized(place.group):
        return "job-finalize"
    if not groups.missing(place.group):
        return "job-cancel"
    return {None: None, "abort": "job-cancel"}.get(decide, "job-finalize")


def ended_or_not(seen: Seen, groups: Groups, decide: Decide | None) -> Iterator[Finding]:
    """Those that nobody has decided, and those that have ended and are not dismissed."""
    qmp = shlex.quote(seen.address)
    for job_id, job in seen.jobs.items():
        if not is_commit(job):
            continue
        place, disk = place_of(job_id), disk_of(seen, job_id)
        if groups.followed(place.group) if place else followed(seen, job_id):
            continue
        name, status = disk.name if disk is not None else "", str(job.get("status"))
        on = f"job {job_id} on {disk or 'a disk'}"
        if status in (*READY, *RUNNING):
            ready: Kind = "ready" if status in READY else "copying"
            message = f"{on} is READY, and nobody decides it"
            if ready == "copying":
                message = f"{on} copies, and nobody decides it when it is READY"
            if detached(seen, disk):
                does = "copies" if ready == "copying" else "is READY"
                message = f"{on} {does}; it was detached, and waits to be taken up"
            if decide is None:
                said = f"Say what is to become of it: --decide pivot, keep or abort ({qmp})"
                yield Finding(ready, seen.vm, job_id, message, said, does=False, disk=name)
            elif decide != "abort" and groups.never_whole(job_id):
                said = "It is cancelled: its group was never whole, and ends all or none"
                yield Finding(ready, seen.vm, job_id, message, said, disk=name)
            elif place and decide != "abort" and groups.missing(place.group):
                said = (
                    f"It is {place.number} of {place.members} of group {place.group}: name the VMs"
                    " of all, for they end the same way"
                )
                yield Finding(ready, seen.vm, job_id, message, said, does=False, disk=name)
            else:
                yield Finding(
                    ready, seen.vm, job_id, message, f"It is ended by '{decide}'", disk=name
                )
        elif status == "concluded":
            error = f", with '{job['error']}'" if job.get("error") else ""
            message = f"{on} has ended{error}, and waits for its dismissal"
            if place and groups.untold(place.group) and not job.get("error"):
                said = (
                    f"It tells how group {place.group} was decided, of which"
                    f" {groups.untold(place.group)} of {place.members} are not seen here: name"
                    " the VMs of all, or say that it is known (--decide keep or pivot)"
                )
                if decide in (None, "abort"):
                    yield Finding(
                        "concluded", seen.vm, job_id, message, said, does=False, disk=name
                    )
                    continue
            active = disk.active.filename if disk is not None and disk.active is not None else ""
            writes = f"; {disk} writes to {active}" if active else ""
            yield Finding(
                "concluded", seen.vm, job_id, message, f"It is dismissed{writes}", disk=name
            )
