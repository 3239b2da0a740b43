"""The disks of a group commit: what is asked of each, and checked before anything is sent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from qmpcommit.block.chain import Disk
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.pending import group_job_id
from qmpcommit.commit.policy import AnyPolicy, AskedPolicy, PolicyCall, Recycle, parse_policy
from qmpcommit.commit.request import GroupOptions, Request
from qmpcommit.commit.stale_layers import Around, Hooks
from qmpcommit.commit.together import Together
from qmpcommit.errors import InvalidRequest, PolicyRequired

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM

_ONE_OVERLAY = "give each disk a Recycle of its own: each needs its own overlay"


def check_shared(policy: object, disks: int) -> None:
    """Raise `InvalidRequest` where one policy would lay one fresh overlay over several disks."""
    if disks > 1 and isinstance(policy, Recycle):
        raise InvalidRequest(_ONE_OVERLAY)


class GroupCommitOptions(GroupOptions, Hooks, total=False):
    """What `GroupCommit` takes for all members."""


class GroupMember(NamedTuple):
    """One disk of a group: `policy` is its own, `options` are those of `Session.commit`."""

    vm: VM
    disk: str
    policy: AskedPolicy | None = None
    options: Mapping[str, Any] = {}


Named: TypeAlias = (
    tuple["VM", str]
    | tuple["VM", str, AskedPolicy | None]
    | tuple["VM", str, AskedPolicy | None, Mapping[str, Any]]
)
"""A disk of a group as callers may name it; a `GroupMember` is one of these."""


def member_of(named: object) -> GroupMember:
    """A member from a tuple of its beginning; raises `InvalidRequest` for anything else."""
    if not isinstance(named, (tuple, list)) or not 2 <= len(named) <= len(GroupMember._fields):
        raise InvalidRequest(
            f"a disk of a group is named by a tuple (vm, disk) or (vm, disk, policy), not {named!r}"
        )
    vm, disk, *more = named
    if not isinstance(disk, (str, os.PathLike, Disk)):
        raise InvalidRequest(f"{disk!r} is no disk; name one in each tuple: (vm, disk)")
    return GroupMember(vm, str(disk), *more)


def policy_of(member: GroupMember, policy: AnyPolicy | PolicyCall | None) -> AnyPolicy | PolicyCall:
    """Its own, or the one that is given to all; raises `PolicyRequired`, or `InvalidRequest`."""
    if policy is not None and member.policy is not None:
        raise InvalidRequest(
            f"give {member.disk} a policy of its own, or the group one for all, not both"
        )
    try:
        return policy or parse_policy(member.policy)
    except PolicyRequired as error:
        error.add(vm=member.vm.name, disk=member.disk)
        raise


def requested(disk: str, **options: Any) -> Request:
    """What is asked for a disk; raises `InvalidRequest` for what is nothing."""
    try:
        return Request(disk, **options)
    except TypeError as error:
        raise InvalidRequest(f"a group commit takes no such option: {error}") from None


def override_of(member: GroupMember, options: Mapping[str, Any]) -> Any:
    """The checks whose refusal does not count for it; `options` are those of all members."""
    return member.options.get("override", options.get("override", ()))


async def prepare_members(
    members: Sequence[GroupMember],
    policies: Sequence[AnyPolicy | PolicyCall],
    options: Mapping[str, Any],
    *,
    group: str,
    meet: Callable[[int], Awaitable[str | None]],
) -> tuple[CommitJob, ...]:
    """Their commits, checked; nothing is sent. Raises what `Session.commit` raises before that.

    `options` are those of all members, `group` is the id that the jobs' names have, and `meet` the
    barrier at which each waits, by its number, while its disk is held.
    """
    sessions = list(dict.fromkeys(member.vm for member in members))
    seen = dict(zip(sessions, await asyncio.gather(*(vm.look() for vm in sessions)), strict=True))
    jobs = []
    together = Together()
    for number, member in enumerate(members):
        job_id = group_job_id(member.disk, group, number + 1, len(members))
        own = {**options, **member.options}
        claim = own.pop("claim", None)
        around = {name: own.pop(name) for name in Around._fields if name in own}
        request = requested(member.disk, policy=policies[number], job_id=job_id, **own)
        if request.only_if is not None or request.timeout is not None:
            raise InvalidRequest("only_if and timeout are a group's, not one disk's")
        around |= {"barrier": partial(meet, number), "together": together}
        job = await member.vm.prepare(
            request, Around(**around), held=True, seen=seen[member.vm], claim=claim
        )
        if not job.plan.two_phase:
            raise InvalidRequest(
                f"{job.plan.disk} of {member.vm.name}: only active layers can be committed at"
                " one instant; commit an intermediate layer by itself. Nothing was sent"
            )
        jobs.append(job)
    _check_apart(members, policies, jobs)
    return tuple(jobs)


def _check_apart(
    members: Sequence[GroupMember],
    policies: Sequence[AnyPolicy | PolicyCall],
    jobs: Sequence[CommitJob],
) -> None:
    known: dict[tuple[VM, str], str] = {}
    overlays: set[tuple[int | None, str]] = set()
    for member, job, policy in zip(members, jobs, policies, strict=True):
        if isinstance(policy, Recycle):
            overlay = _place_of(policy.overlay, member.vm)
            if overlay in overlays:
                raise InvalidRequest(f"{_ONE_OVERLAY}, not {policy.overlay}. Nothing was sent")
            overlays.add(overlay)
        disk = job.plan.disk
        place = (member.vm, disk.root)
        if place in known:
            raise InvalidRequest(
                f"{known[place]} and {member.disk} are the same disk of {member.vm.name}; name it"
                " once. Nothing was sent"
            )
        known[place] = member.disk


def _place_of(overlay: str, vm: VM) -> tuple[int | None, str]:
    """Which file that is: QEMUs of this host share theirs."""
    here = vm.peer_pid is not None
    return None if here else id(vm), os.path.realpath(os.path.join(vm.cwd or "/", overlay))
