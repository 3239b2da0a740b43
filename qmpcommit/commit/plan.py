"""From a request to a checked plan, or to an error before anything is sent."""

from __future__ import annotations

import os
import re
from dataclasses import field
from typing import Any

from qmpcommit.block.chain import (
    BackingChain,
    Disk,
    Image,
    read_disks,
    read_image,
)
from qmpcommit.block.graph import BlockGraph
from qmpcommit.commit.objections import may_pivot, refuse_decision
from qmpcommit.commit.policy import Pivot, parse_policy
from qmpcommit.commit.request import Request, Stale, check_job_id
from qmpcommit.errors import ChainError, InvalidRequest, JobConflict, PolicyRequired
from qmpcommit.names import JOB_PREFIX
from qmpcommit.units import parse_size
from qmpcommit.values import Record, record

UNKNOWN = Image(node_name="", filename="(unknown)", driver="")
"""A layer of which nothing is known."""

_OURS = re.compile(rf"{JOB_PREFIX}(.+)-[0-9a-f]{{8}}(?:\.\d+of\d+)?")


@record
class Plan(Record):
    """A commit that can be sent: `arguments` are those of ``block-commit``.

    `two_phase` tells that top is the active layer. `between` are the layers that lie between
    top and base and are committed with top. `findings` are what the checks before the first
    byte found, each with a name, a level ("ok", "note", "refuse") and a message with numbers.
    """

    vm: str
    disk: Disk
    top: Image
    base: Image
    job_id: str
    two_phase: bool
    policy: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    between: tuple[Image, ...] = ()
    stale: Stale = "leave"
    findings: list[Any] = field(default_factory=list)
    keep_relative: bool = False
    carry_bitmaps: bool = True

    @property
    def stalls(self) -> bool:
        """Whether a storage error makes the job wait instead of fail."""
        return self.arguments.get("on-error") in ("stop", "enospc")

    @property
    def closed_by_qemu(self) -> list[str]:
        """The layers that QEMU may close by itself at the end: a drive's, and unnamed ones."""
        names = [image.node_name for image in (self.top, *self.between) if image.node_name]
        return [name for name in names if self.disk.device or name.startswith("#")]

    @property
    def follows_files(self) -> bool:
        """Whether the stale layers' files have to be known: to go, or to be opened for a mark."""
        if self.stale != "leave":
            return True
        closed = not self.two_phase or self.between or self.closed_by_qemu
        return may_pivot(self.policy) and bool(closed or not isinstance(self.policy, Pivot))

    @property
    def invalidated(self) -> list[str]:
        """The files that a successful pivot or merge leaves invalid, top first."""
        return [image.handed_out for image in (self.top, *self.between)]


def plan_commit(vm: str, disk: Disk, request: Request, cwd: str | None = None) -> Plan:
    """Check a request against a disk, before anything is sent.

    Raises `PolicyRequired`, `ChainError`, `JobConflict` or `InvalidRequest`.
    """
    bandwidth = parse_size(request.bandwidth or 0, "bandwidth")
    policy = request.policy
    try:
        top, base = _layers(disk, request, cwd)
        if top == 0:
            policy = parse_policy(policy)
        else:
            refuse_decision(policy, vm, disk, disk.chain[top], disk.chain[base])
        _no_job(disk)
    except (ChainError, InvalidRequest, JobConflict, PolicyRequired) as error:
        error.add(vm=vm, disk=disk.name)
        raise
    job_id = check_job_id(request.job_id) if request.job_id is not None else new_job_id(disk.name)
    chain = disk.chain
    arguments: dict[str, Any] = {
        "job-id": job_id,
        "device": disk.head or disk.root,
        "top-node": chain[top].node_name,
        "base-node": chain[base].node_name if top else chain[base].over,
        "auto-dismiss": False,
    }
    if bandwidth:
        arguments["speed"] = bandwidth
    if request.on_error is not None:
        arguments["on-error"] = request.on_error
    if request.filter_node_name is not None:
        arguments["filter-node-name"] = request.filter_node_name
    if request.backing_mask_protocol:
        arguments["backing-mask-protocol"] = True
    return Plan(
        vm=vm,
        disk=disk,
        top=chain[top],
        base=chain[base],
        job_id=job_id,
        two_phase=top == 0,
        policy=policy,
        arguments=arguments,
        between=chain[top + 1 : base],
        stale=request.leaves,
        keep_relative=request.keep_relative,
        carry_bitmaps=request.carry_bitmaps,
    )


def _layers(disk: Disk, request: Request, cwd: str | None) -> tuple[int, int]:
    chain = BackingChain(disk, cwd)
    if not disk.chain:
        raise ChainError(f"{disk} has no medium, so there is nothing to commit. Nothing was sent")
    if len(disk.chain) == 1:
        raise ChainError(
            f"{disk} has no backing file: {disk.chain[0]} is all there is, so there is nothing to"
            " commit into. Nothing was sent"
        )
    if request.shallow and request.base is not None:
        raise InvalidRequest("give shallow or a base, not both: shallow is top's own backing file")
    top = 0 if request.top is None else chain.find(request.top, "top")
    if top == len(disk.chain) - 1:
        raise ChainError(
            f"top {disk.chain[top]} is the bottom of {disk}'s chain: it has no backing file to"
            " commit into. Nothing was sent"
        )
    if request.base is not None:
        base = chain.find(request.base, "base")
    else:
        base = top + 1 if request.shallow else len(disk.chain) - 1
    if base == top:
        raise ChainError(
            f"base and top are the same layer of {disk}, {disk.chain[base]}; base must be below"
            " top. Nothing was sent"
        )
    if base < top:
        raise ChainError(
            f"base {disk.chain[base]} is not below top {disk.chain[top]} in {disk}'s chain but"
            " above it; a commit writes downwards. Nothing was sent"
        )
    return top, base


def _no_job(disk: Disk) -> None:
    if disk.jobs:
        raise JobConflict(
            f"{disk} has a block job already: {', '.join(disk.jobs)}. Wait for it, or end it."
            " Nothing was sent",
            hint="'qmpcommit jobs' shows it; 'qmpcommit pivot', 'keep' or 'abort' end a commit's"
            " second phase",
            job_id=disk.jobs[0],
        )


def new_job_id(disk: str) -> str:
    """A job id of ours, telling the disk and differing each time."""
    return f"{JOB_PREFIX}{_spelt(disk) or 'disk'}-{os.urandom(4).hex()}"


def is_named_in(job_id: str, disk: Disk) -> bool:
    """Whether a job id of ours tells of this disk; one that a caller gave tells of none."""
    found = _OURS.fullmatch(job_id)
    return found is not None and found[1] == _spelt(disk.name)


def _spelt(disk: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "", disk)[-32:]


def adopted_plan(vm: str, graph: BlockGraph, job_id: str, policy: Any) -> Plan:
    """What is known of a running job from the nodes that it holds."""
    held = graph.jobs.get(job_id)
    nodes = held.changed if held is not None else set()
    disks = [d for d in read_disks(graph) if job_id in d.jobs]
    disk = disks[0] if disks else Disk(name="?")
    source, target = (held.source, held.target) if held is not None else (None, None)
    layers = [i for i in disk.chain if i.node_name in nodes]
    source, target = graph.below_filters(source), graph.below_filters(target)
    top = read_image(graph, source) if source else None
    base = read_image(graph, target) if target else None
    top = top or (layers[0] if layers else disk.active or UNKNOWN)
    base = base or (layers[-1] if layers else disk.chain[-1] if disk.chain else UNKNOWN)
    names = [image.node_name for image in disk.chain]
    between: tuple[Image, ...] = ()
    if top.node_name in names and base.node_name in names:
        between = disk.chain[names.index(top.node_name) + 1 : names.index(base.node_name)]
    return Plan(
        vm=vm,
        disk=disk,
        top=top,
        base=base,
        job_id=job_id,
        two_phase=top.node_name not in names[1:],  # in none where it is stale
        policy=policy,
        between=between,
    )
