"""What has to hold before a commit is sent, beside its plan: abilities, bitmaps, ``only_if``."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from qmpcommit.block.bitmaps import Carrying, busy_bitmaps, lethal, plan_carrying
from qmpcommit.block.chain import check_nameable
from qmpcommit.block.graph import BlockGraph
from qmpcommit.block.identity import OpenFiles, names_are_ours, told_where
from qmpcommit.commit.hook import PivotCommand
from qmpcommit.commit.objections import may_pivot
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import (
    Keep,
    Ready,
    Recycle,
    check_told,
    fresh_of,
    is_answer,
    no_answer,
    run_command,
)
from qmpcommit.errors import (
    ChainError,
    CommandRefused,
    CommitFailed,
    InvalidRequest,
    JobConflict,
    NoSpace,
    OnlyIfFailed,
)
from qmpcommit.qmp.monitor import Monitor

ONLY_IF_TIMEOUT = 60.0
"""Seconds that an ``only_if`` command gets."""


async def check_abilities(
    monitor: Monitor, plan: Plan, status: str | None, *, cwd: str | None, private: bool
) -> None:
    """What the policy needs of QEMU and of the VM: better known now than at READY.

    `status` is the VM's (None: a storage daemon, which runs no guest), `private` whether nobody
    else can reach what it exports.
    """
    for recycle in fresh_of(plan.policy):
        _check_recycle(plan, recycle, status, cwd, private)
        if names_are_ours(monitor.peer_pid):
            _check_folder(plan, recycle, cwd)
    masks = "backing-mask-protocol" in plan.arguments
    if not isinstance(plan.policy, Keep) and not masks:
        return
    features = await monitor.features()
    if masks and not features.has_argument("block-commit", "backing-mask-protocol"):
        raise InvalidRequest(
            f"QEMU of {plan.vm} has no backing-mask-protocol for block-commit (QEMU 9.0 and"
            " newer have). Nothing was sent",
            vm=plan.vm,
            disk=plan.disk.name,
        )
    if isinstance(plan.policy, Keep) and not features.has_argument("block-job-cancel", "force"):
        raise CommitFailed(
            f"QEMU of {plan.vm} has no block-job-cancel with 'force', the only way to keep"
            " the overlay active; pivot instead. Nothing was sent",
            vm=plan.vm,
            disk=plan.disk.name,
        )


async def check_overlays(monitor: Monitor, plan: Plan, graph: BlockGraph) -> None:
    """Whether a fresh overlay can follow the disk's as is asked; raises `ChainError`."""
    for recycle in fresh_of(plan.policy):
        await check_follows(monitor, plan, graph, recycle.asked)


async def check_free(monitor: Monitor, plan: Plan, cwd: str | None) -> None:
    """Whether its file can be made and opened as is asked, as far as that can be told.

    Raises `InvalidRequest`, or `NoSpace`. Better known before the base is written to
    than at READY.
    """
    for recycle in fresh_of(plan.policy):
        from qmpcommit.commit.overlay.fresh import FreshOverlay  # which most commits do not need

        overlay = FreshOverlay(monitor, plan, recycle.overlay, cwd, asked=recycle.asked)
        where: dict[str, object] = {"vm": plan.vm, "disk": plan.disk.name}
        obstacle = await overlay.obstacle()
        if obstacle is not None:
            raise InvalidRequest(f"{obstacle}. Nothing was sent", **where)
        full = await overlay.without_room()
        if full is not None:
            raise NoSpace(f"{full}. Nothing was sent", **where)


async def check_follows(
    monitor: Monitor, plan: Plan, graph: BlockGraph, asked: OverlayOptions, *, lasting: bool = True
) -> None:
    """Raise `ChainError` where an overlay like the plan's top can't lie over its base.

    Or where QEMU has no such secret, as far as it tells (``qom-list``).
    """
    top, base = plan.top.node_name, plan.base.node_name
    from qmpcommit.commit.overlay.like import unfit

    why = unfit(graph, top, base, asked, lasting=lasting)
    if why is None and asked.secret is not None:
        with suppress(CommandRefused):  # it has none, or does not tell
            objects = await monitor.execute("qom-list", {"path": "/objects"})
            if asked.secret not in [each.get("name") for each in objects]:
                why = f"QEMU has no secret object '{asked.secret}': add it with object-add"
    if why is not None:
        raise ChainError(
            f"no fresh overlay can be laid over {plan.disk} of {plan.vm}: {why}. Nothing was sent",
            hint="--overlay-secret ID says which secret" if "(overlay_secret)" in why else None,
            vm=plan.vm,
            disk=plan.disk.name,
        )


def check_bitmaps(graph: BlockGraph, plan: Plan) -> None:
    """Refuse what QEMU would die of where it closes the stale layers; raises `JobConflict`."""
    if not may_pivot(plan.policy):
        return
    nodes = [node.raw for node in graph.nodes.values()]
    why = lethal(busy_bitmaps(nodes, plan.closed_by_qemu))
    if why:
        raise JobConflict(
            f"{plan.disk} of {plan.vm} can't be committed now: {why}. Nothing was sent",
            vm=plan.vm,
            disk=plan.disk.name,
        )


async def check_job_id(monitor: Monitor, plan: Plan) -> None:
    """Refuse a caller's job id that a job has already (``query-jobs``); raises `JobConflict`.

    QEMU would refuse it as well. But if its reply were lost, that job would be taken for ours.
    """
    for job in await monitor.execute("query-jobs"):
        if job.get("id") == plan.job_id:
            raise JobConflict(
                f"there is a {job.get('type')} job '{plan.job_id}' on {plan.vm} already, which is"
                f" '{job.get('status')}': give another job id, or none. Nothing was sent",
                vm=plan.vm,
                disk=plan.disk.name,
                job_id=plan.job_id,
            )


def _check_recycle(
    plan: Plan, recycle: Recycle, status: str | None, cwd: str | None, private: bool
) -> None:
    where = {"vm": plan.vm, "disk": plan.disk.name}
    if status is None and plan.disk.exports and not private:
        raise ChainError(
            f"{plan.disk} of {plan.vm} can't be recycled: it is exported"
            f" ({', '.join(plan.disk.exports)}), and nothing could hold its clients back while"
            " the fresh overlay is laid. Nothing was sent",
            **where,
        )
    check_nameable(plan.base, plan.vm, plan.disk.name)
    path = os.path.join(cwd or os.getcwd(), recycle.overlay)
    if os.path.lexists(path):
        raise InvalidRequest(
            f"{recycle.overlay} exists already; a fresh overlay needs a new file. Nothing was sent",
            **where,
        )


def _check_folder(plan: Plan, recycle: Recycle, cwd: str | None) -> None:
    """Where QEMU sees other files than we do it is asked, see `FreshOverlay.obstacle`."""
    path = os.path.join(cwd or os.getcwd(), recycle.overlay)
    try:
        found = os.stat(os.path.dirname(path))
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except OSError:
        return  # QEMU is asked, who may look there
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise InvalidRequest(
            f"there is no folder {os.path.dirname(path)} for the fresh overlay. Nothing was sent",
            vm=plan.vm,
            disk=plan.disk.name,
        )


def carrying_of(graph: BlockGraph, plan: Plan) -> Carrying | None:
    """The bitmaps to carry; None where there are none. Raises `JobConflict` for busy ones."""
    layers = [image.node_name for image in (plan.top, *plan.between)]
    carrying = plan_carrying(graph, layers, plan.base.node_name)
    if carrying.busy:
        raise JobConflict(
            f"{plan.disk} of {plan.vm} can't be committed with its bitmaps now:"
            f" {', '.join(carrying.busy)} is busy with another job (a backup?). Wait for it, or"
            " commit without carrying bitmaps (carry_bitmaps=False). Nothing was sent",
            vm=plan.vm,
            disk=plan.disk.name,
        )
    return carrying if carrying.names or carrying.problems else None


def told(plan: Plan, graph: BlockGraph, pid: int | None, opened: OpenFiles | None = None) -> Plan:
    """The plan, with a warning where a name does not lead to QEMU's file from here; looks at it.

    `opened` are QEMU's files where they were looked at just now.
    """
    opened = OpenFiles.of(graph, pid, cwd=graph.cwd) if opened is None else opened
    top, base = (told_where(graph, opened, image) for image in (plan.top, plan.base))
    return replace(plan, top=top, base=base)


def check_commands(plan: Plan, on_pivot: object) -> None:
    """Raise `ChainError` where a command that runs later would be told another file's name."""
    if getattr(plan.policy, "runs", False) or isinstance(on_pivot, PivotCommand):
        try:
            check_told(plan.vm, plan.base, plan.top)
        except ChainError as error:
            raise ChainError(f"{error.message}. Nothing was sent", disk=plan.disk.name) from None


async def ask_whether(command: Sequence[str], plan: Plan) -> None:
    """Run ``only_if``; raises `OnlyIfFailed` where it does not succeed, or can't be run."""
    ready = Ready(plan.vm, plan.disk.name, plan.job_id, plan.base, plan.top)
    try:
        status = await run_command(command, ready.environment(), ONLY_IF_TIMEOUT)
    except OSError as error:
        raise OnlyIfFailed(
            f"only_if could not be run: {' '.join(command)}: {error.strerror}. Nothing was sent",
            vm=plan.vm,
            disk=plan.disk.name,
            command=list(command),
        ) from error
    if status != 0:
        how = "took too long"
        if status is not None:
            how = f"ended with status {status}" if is_answer(status) else no_answer(status)
        raise OnlyIfFailed(
            f"{plan.disk} of {plan.vm} was not committed, because {' '.join(command)} {how}."
            " Nothing was sent",
            vm=plan.vm,
            disk=plan.disk.name,
            command=list(command),
            exit_status=status,
        )
