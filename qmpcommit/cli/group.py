"""``qmpcommit commit`` with several disks: one instant for all of them, or none is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer, Interrupted
from qmpcommit.cli.show import outcome_text, show_seconds

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.group import GroupCommit
    from qmpcommit.commit.group_outcome import GroupOutcome
    from qmpcommit.commit.policy import AnyPolicy

Named = Sequence[tuple[str, str]]
"""Pairs of a monitor and a disk."""

_ALONE = {
    "top": "--top",
    "filter_node_name": "--filter-node-name",
    "keep_relative": "--keep-relative",
    "backing_mask_protocol": "--backing-mask-protocol",
}


def check_group(request: Mapping[str, Any], *, offline: bool, dry_run: bool) -> None:
    """What several disks can't have; raises `click.UsageError`."""
    wrong = [option for name, option in _ALONE.items() if request[name]]
    policy = getattr(request["policy"], "kind", "")
    if policy in ("hold", "recycle"):
        wrong.append(f"--{policy}")
    wrong += ["--offline"] if offline else []
    wrong += ["--dry-run"] if dry_run else []
    if wrong:
        raise click.UsageError(f"{wrong[0]} is for one disk, not for several")


async def commit_group(
    running: Run, named: Named, request: Mapping[str, Any], hold_limit: float
) -> Answer:
    """Commit them at one instant; Ctrl-C and the deadline cancel all."""
    from qmpcommit.commit.group import GroupCommit
    from qmpcommit.session import Session

    options = {name: value for name, value in request.items() if name not in ("disk", *_ALONE)}
    async with AsyncExitStack() as stack:
        vms: dict[str, Session] = {}
        for qmp, _ in named:
            if qmp not in vms:
                vms[qmp] = await stack.enter_async_context(running.connect(qmp))
        group = GroupCommit(
            [(vms[qmp], disk) for qmp, disk in named],
            hold_limit=hold_limit,
            timeout=running.remaining,
            **options,
        )
        outcome = await _run(running, group)
    return Answer(
        outcome.model_dump(mode="json"),
        group_text(outcome),
        status=_status(request["policy"], outcome),
        quiet=running.options.quiet,
    )


async def _run(running: Run, group: GroupCommit) -> GroupOutcome:
    """The group to its end; it bounds itself in time, so only signals are seen to here."""
    working = asyncio.create_task(group.run())
    running.on_deadline = lambda: None
    running.on_signal = lambda times: _interrupt(working, times)
    await asyncio.wait({working})
    if working.cancelled():
        sent = "all jobs were cancelled; no disk was pivoted or kept" if group.jobs else ""
        finalized = any(job.outcome and job.outcome.action != "abort" for job in group.jobs)
        if finalized:
            sent = "the disks had been decided already and were committed, all of them"
        raise Interrupted(f"interrupted; {sent or 'nothing was sent'}")
    return working.result()


def _interrupt(working: asyncio.Task[GroupOutcome], times: int) -> None:
    if times == 1:  # what a second one would leave is a guest whose disks hang
        working.cancel()


def _status(policy: AnyPolicy, outcome: GroupOutcome) -> int:
    if any(each.hook == "failed" for each in outcome.outcomes):
        return 1
    if outcome.decided_by in ("check failed", "hold expired"):
        return 3
    asked = policy.kind
    return 3 if asked in ("pivot", "keep", "abort") and outcome.action != asked else 0


def group_text(outcome: GroupOutcome) -> str:
    """Each disk's own end, and how long they were held for the one instant."""
    lines = [outcome_text(each) for each in outcome.outcomes]
    if outcome.status == "completed" and outcome.held is not None:
        many = len(outcome.outcomes)
        held = show_seconds(outcome.held)
        lines.append(f"One instant for {many} disks; their I/O was held for at most {held}.")
    return "\n".join(lines)
