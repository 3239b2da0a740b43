"""``pivot``, ``keep``, ``abort`` and ``wait``: a commit that is there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qmpcommit.cli.completing import complete_job, complete_monitor
from qmpcommit.cli.options import (
    Answer,
    Options,
    common,
    progress_option,
    shell,
    stale_of,
    stale_options,
)
from qmpcommit.cli.sections import Command

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.session import Session

F = TypeVar("F", bound=Callable[..., Any])

_WAITS = click.option("--wait", "waits", is_flag=True, help="Before READY, wait for it.")
_AFTER = (
    click.option(
        "--on-pivot",
        metavar="CMD",
        help="Run CMD by /bin/sh -c between the pivot and the deletion, as 'commit' does.",
    ),
    click.option("--no-bitmaps", is_flag=True, help="Don't carry dirty bitmaps into the base."),
)


def _after_pivot(command: F) -> F:
    for option in reversed(_AFTER):
        command = option(command)
    return stale_options(command)


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("job", shell_complete=complete_job)
@_WAITS
@_after_pivot
@progress_option
@common
def pivot(qmp: str, job: str, **given: Any) -> Answer:
    """End a READY commit: its base becomes the active image, and the overlay is invalid.

    JOB is an id that 'qmpcommit jobs' shows. Before READY nothing is done, with status 5, and
    the job goes on, unless --wait is given. Dirty bitmaps and stale layers are seen to as by
    'commit'; of a job that has ended already it is told how.
    """
    return _command("pivot", qmp, job, given)


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("job", shell_complete=complete_job)
@_WAITS
@progress_option
@common
def keep(qmp: str, job: str, **given: Any) -> Answer:
    """End a READY commit: the overlay stays active, and the base holds everything until now.

    JOB is an id that 'qmpcommit jobs' shows. Before READY nothing is done, with status 5, and
    the job goes on, unless --wait is given.
    """
    return _command("keep", qmp, job, given)


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("job", shell_complete=complete_job)
@common
def abort(qmp: str, job: str, **given: Any) -> Answer:
    """Cancel a commit by force, in either phase: the overlay stays active and whole.

    JOB is an id that 'qmpcommit jobs' shows. The base may hold part of the overlay's data
    afterwards and is then valid only under it.
    """
    return _command("abort", qmp, job, given)


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("job", shell_complete=complete_job)
@click.option(
    "--until",
    type=click.Choice(["ready", "end"]),
    default="end",
    help="Wait for READY, or for the end, which others have to decide (the default).",
)
@click.option(
    "--then",
    "choice",
    type=click.Choice(["pivot", "keep"]),
    help="At READY, pivot or keep the overlay, and wait for the end.",
)
@_after_pivot
@progress_option
@common
def wait(qmp: str, job: str, *, until: str, choice: str | None, **given: Any) -> Answer:
    """Wait for a commit that is there already, as 'commit --detach' leaves one.

    JOB is an id that 'qmpcommit jobs' shows. Without --then nothing is decided, and Ctrl-C or
    the deadline leave the job as it is. The options of 'pivot' are for --then pivot.
    """
    if choice is not None:
        return _command(choice, qmp, job, {**given, "waits": True})
    if any(given[name] for name in ("stale", "delete", "rename", "on_pivot", "no_bitmaps")):
        raise click.UsageError("--stale, --on-pivot and --no-bitmaps need --then pivot")
    return _command("", qmp, job, {**given, "until": until})


def _command(choice: str, qmp: str, job: str, given: dict[str, Any]) -> Answer:
    said = {name: given.pop(name, None) for name in ("stale", "delete", "rename")}
    stale = stale_of(said)
    after: dict[str, Any] = {name: given.pop(name, None) for name in ("on_pivot", "no_bitmaps")}
    waits, until = given.pop("waits", False), given.pop("until", "end")
    options = Options.of(**given)
    asked: dict[str, Any] = {"stale": stale}
    if after["on_pivot"] is not None:
        from qmpcommit.cli.commit import persisting

        asked["on_pivot"] = persisting(shell(after["on_pivot"], "--on-pivot"))
    if choice == "keep":
        from qmpcommit.commit.objections import refuse_idle
        from qmpcommit.commit.policy import Keep

        refuse_idle(Keep(), stale=stale, on_pivot=after["on_pivot"])
    asked["carry_bitmaps"] = choice != "abort" and not after["no_bitmaps"]
    from qmpcommit.cli.running import run

    if options.daemon is not None:
        from qmpcommit.cli import remote

        if after["on_pivot"] is not None:
            asked["on_pivot"] = shell(after["on_pivot"], "--on-pivot")  # which the daemon runs

        if not choice:
            return run(options, lambda running: remote.wait(running, qmp, job, until))
        more = asked if stale != "leave" or any(after.values()) else {}
        return run(
            options,
            lambda running: remote.decide(running, choice, qmp, job, asked=more, waits=waits),
        )
    if not choice:
        return run(options, lambda running: _wait(running, qmp, job, until))
    return run(
        options, lambda running: _decide(running, choice, qmp, job, asked=asked, waits=waits)
    )


async def _decide(
    running: Run, choice: str, qmp: str, job_id: str, *, asked: dict[str, Any], waits: bool
) -> Answer:
    from qmpcommit.cli.bar import Bar
    from qmpcommit.cli.following import Foreground
    from qmpcommit.cli.held import tell_of_held

    bar = Bar(running.options, qmp) if waits else None
    async with running.connect(qmp) as vm:
        await tell_of_held(vm, qmp, but=job_id)
        foreground = Foreground(running, vm, qmp, adopted=True)
        job = await adopt(vm, job_id, choice, **asked)
        if bar is not None:
            async with bar.of(job, job.plan.disk.name):
                await job.ready()
        order(job, choice)
        outcome = await foreground.end(job)
    return decided(running, choice, outcome)


async def adopt(vm: Session, job_id: str, choice: str, **asked: Any) -> CommitJob:
    """Take up a job that is to be ended so."""
    pending: Any = "cancel" if choice == "abort" else "finalize"
    return await vm.adopt(job_id, pending=pending, **asked)


def order(job: CommitJob, choice: str) -> None:
    """Decide a job that was taken up; raises `NotReady`, or `JobConflict` for the opposite."""
    from qmpcommit.errors import JobConflict

    try:
        if job.state.status != "pending":  # such a one is being ended already
            {"pivot": job.pivot, "keep": job.keep, "abort": job.abort}[choice]()
    except JobConflict:
        if job.state.running:
            raise  # else it had ended before, and its outcome tells how


def decided(running: Run, choice: str, outcome: CommitOutcome) -> Answer:
    """What is said of the end: status 0 where it is what was chosen."""
    from qmpcommit.cli.show import outcome_text

    merged = outcome.action == "none" and choice == "pivot"  # an intermediate layer's one end
    status = 0 if outcome.action == choice or merged else 3
    if outcome.hook == "failed":
        status = 1
    return Answer(
        outcome.model_dump(mode="json"),
        outcome_text(outcome),
        status=status,
        quiet=running.options.quiet,
    )


async def _wait(running: Run, qmp: str, job_id: str, until: str) -> Answer:
    from qmpcommit.cli.bar import Bar
    from qmpcommit.cli.following import Foreground
    from qmpcommit.cli.held import tell_of_held

    bar = Bar(running.options, qmp)
    async with running.connect(qmp) as vm:
        await tell_of_held(vm, qmp, but=job_id)
        foreground = Foreground(running, vm, qmp, adopted=True)
        job = await vm.adopt(job_id, pending="leave")
        async with bar.of(job, job.plan.disk.name):
            await job.ready()
            if until == "ready" and not job.done:
                return is_ready(running, qmp, job)
            outcome = await foreground.end(job)
    return waited(running, outcome)


def waited(running: Run, outcome: CommitOutcome) -> Answer:
    """What is said of an end that others have decided: status 3 where they have aborted it."""
    return decided(running, outcome.action if outcome.status == "completed" else "", outcome)


def is_ready(running: Run, qmp: str, job: CommitJob) -> Answer:
    """What is said of a job that is READY, and left so."""
    from qmpcommit.cli.following import take_up

    state, plan = job.state, job.plan
    on = take_up(running.options, qmp, job.id)
    return Answer(
        {
            "vm": plan.vm,
            "disk": plan.disk.name,
            "job_id": job.id,
            "phase": state.phase.value,
            "current": state.done,
            "total": state.total,
            "next": on,
        },
        f"job {job.id} on {plan.disk.name} is READY, and stays so until it is decided: '{on}'",
        quiet=running.options.quiet,
    )
