"""Jobs of ours that hold a disk's I/O in PENDING with nobody there to end them.

A client that is killed between the decision and the end leaves them, and a guest whose disk
hangs. Whether they were to be finalized only that client knew, or its journal: cancelling is
always safe, for it undoes the decision and leaves every overlay active and whole.

Rests on ``query-jobs``, ``job-cancel`` and ``job-finalize``.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpcommit.block.chain import read_disks
from qmpcommit.commit.recycle import interrupted_recycles
from qmpcommit.errors import ChainError, JobConflict, JobNotFound, QmpCommitError
from qmpcommit.guest import marks as freeze_marks
from qmpcommit.names import JOB_PREFIX

if TYPE_CHECKING:
    from qmpcommit.block.graph import BlockGraph
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.commit.vm import VM

_GROUP = re.compile(r"-([0-9a-f]{8})\.(\d+)of(\d+)$")


class GroupPlace(NamedTuple):
    """What a job's id tells of its group: which, and the how manieth of how many it is."""

    group: str
    number: int
    members: int


def group_job_id(disk: str, group: str, number: int, members: int) -> str:
    """The id of one job of a group; `group` is eight hexadecimal digits."""
    name = re.sub(r"[^A-Za-z0-9._-]", "", disk)[-32:] or "disk"
    return f"{JOB_PREFIX}{name}-{group}.{number}of{members}"


def place_of(job_id: str) -> GroupPlace | None:
    """Where in its group a job is; None for a job that is in none of ours."""
    found = _GROUP.search(job_id) if job_id.startswith(JOB_PREFIX) else None
    return GroupPlace(found[1], int(found[2]), int(found[3])) if found else None


def what_to_do(job_id: str, qmp: str) -> str:
    """What a person should know and do about a job found PENDING."""
    return f"{_held_text(job_id)}. {_ends(qmp)}"


def _ends(qmp: str) -> str:
    return f"If whoever started it is gone: {recovers(qmp)} ends it"


def _held_text(job_id: str) -> str:
    place = place_of(job_id)
    text = "holds its disk's I/O until it is ended, and the guest's disk hangs meanwhile"
    if place is not None:
        text += (
            f". It is {place.number} of {place.members} of group {place.group}, which is ended as"
            " one: name the VMs of all"
        )
    return text


def recovers(qmp: str) -> str:
    """What a person types where a death has left something on a VM."""
    return f"'qmpcommit recover {shlex.quote(qmp)}'"


async def resolve_pending(
    vm: VM, *, finalize: bool = False, grace: float = 0.5, owned: Collection[str] = ()
) -> list[CommitOutcome]:
    """End commits of ours that hold a disk and that nobody follows any more.

    They are cancelled, or with `finalize` ended as they had been decided; so is a job whose
    group has a job on this VM that was finalized, for that was the group's decision. Jobs of
    this session and those `owned` are left alone, and so is one that is not PENDING any more
    after `grace` seconds, since somebody else is at it. Returns their outcomes; raises what
    `Monitor.execute` raises.
    """
    before = _held(await vm.execute("query-jobs"), _owned(vm, owned))
    if not before:
        return []
    if grace:
        await asyncio.sleep(grace)
    listed = await vm.execute("query-jobs")
    held = _held(listed, _owned(vm, owned)) & before
    ended = _finalized_groups(listed)
    jobs: list[CommitJob] = []
    for job_id in sorted(held):
        place = place_of(job_id)
        ends = finalize or (place is not None and place.group in ended)
        with suppress(JobNotFound):
            jobs.append(await vm.adopt(job_id, pending="finalize" if ends else "cancel"))
    return [await job.wait() for job in jobs]


def _owned(vm: VM, owned: Collection[str]) -> set[str]:
    return {*owned, *(job.id for job in vm.jobs)}


def _held(jobs: Iterable[Mapping[str, Any]], owned: Collection[str]) -> set[str]:
    return {
        str(job["id"])
        for job in jobs
        if job.get("type") == "commit"
        and job.get("status") == "pending"
        and str(job.get("id")).startswith(JOB_PREFIX)
        and job.get("id") not in owned
    }


def _finalized_groups(jobs: Iterable[Mapping[str, Any]]) -> set[str]:
    """Groups of which a job has ended without an error: all of them had been held then."""
    places = [
        place_of(str(job.get("id")))
        for job in jobs
        if job.get("status") == "concluded" and not job.get("error")
    ]
    return {place.group for place in places if place is not None}


async def held_jobs(vm: VM, qmp: str) -> list[dict[str, str]]:
    """The jobs of ours that are PENDING, each with what to do about it."""
    held = _held(await vm.execute("query-jobs"), _owned(vm, ()))
    return [{"id": job_id, "next": what_to_do(job_id, qmp)} for job_id in sorted(held)]


async def name_pending(vm: VM, conflict: JobConflict) -> JobConflict:
    """The same conflict, or one that says so where the job in the way holds its disk.

    And where a guest is quiesced, as a group that was killed leaves it beside its jobs.
    """
    job_id, qmp, text = str(conflict.job_id), str(vm.address or "QMP"), conflict.message
    hint = conflict.hint
    with suppress(QmpCommitError):
        if job_id in _held(await vm.execute("query-jobs"), ()):
            text = (
                f"{conflict.disk} of {conflict.vm} has a commit that was left PENDING: job {job_id}"
                f" {_held_text(job_id)}. Nothing was sent"
            )
            hint = _ends(qmp)
        graph = await vm.graph()
        for mark in freeze_marks.marks_among(graph.nodes):
            text += f". And {mark.message}"
            hint = freeze_marks.what_to_do(mark, qmp)
        if recovers(qmp) not in (hint or "") and await _is_left(vm, graph, str(conflict.disk)):
            text += ". Whoever began that is gone"
            hint = f"{recovers(qmp)} says what is left"
    return JobConflict(text, hint=hint, **conflict.facts)


async def _is_left(vm: VM, graph: BlockGraph, name: str) -> bool:
    """Whether whoever held this disk has died."""
    from qmpcommit.commit.claim import lives, owner_in

    disks = [disk for disk in read_disks(graph) if disk.name == name]
    owners = [owner_in(graph, disk) for disk in disks]
    return any(owner is not None and lives(owner) is False for owner in owners)


def tell_of_recycles(error: ChainError, graph: BlockGraph, qmp: str) -> ChainError:
    """The same error, or one that says so where an interrupted recycle may be its cause."""
    told = "; ".join(each["next"] for each in interrupted_recycles(graph, qmp))
    return ChainError(error.message, hint=told, **error.facts) if told else error
