"""``qmpcommit pivot``, ``keep`` and ``abort``: the second phase of a job that is there already."""

from __future__ import annotations

import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer, Options, common

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.outcome import CommitOutcome


@click.command()
@click.argument("qmp")
@click.argument("job")
@common
def pivot(qmp: str, job: str, **given: Any) -> Answer:
    """End a READY commit: its base becomes the active image, and the overlay is invalid.

    JOB is an id that 'qmpcommit jobs' shows. Before READY nothing is done, with status 5, and
    the job goes on.
    """
    return _command("pivot", qmp, job, given)


@click.command()
@click.argument("qmp")
@click.argument("job")
@common
def keep(qmp: str, job: str, **given: Any) -> Answer:
    """End a READY commit: the overlay stays active, and the base holds everything until now.

    JOB is an id that 'qmpcommit jobs' shows. Before READY nothing is done, with status 5, and
    the job goes on.
    """
    return _command("keep", qmp, job, given)


@click.command()
@click.argument("qmp")
@click.argument("job")
@common
def abort(qmp: str, job: str, **given: Any) -> Answer:
    """Cancel a commit by force, in either phase: the overlay stays active and whole.

    JOB is an id that 'qmpcommit jobs' shows. The base may hold part of the overlay's data
    afterwards and is then valid only under it.
    """
    return _command("abort", qmp, job, given)


def _command(choice: str, qmp: str, job: str, given: dict[str, Any]) -> Answer:
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    if options.daemon is not None:
        from qmpcommit.cli import remote

        return run(options, lambda running: remote.decide(running, choice, qmp, job))
    return run(options, lambda running: _decide(running, choice, qmp, job))


async def _decide(running: Run, choice: str, qmp: str, job_id: str) -> Answer:
    from qmpcommit.cli.following import Foreground
    from qmpcommit.cli.held import tell_of_held
    from qmpcommit.errors import CommitFailed, JobConflict

    async with running.connect(qmp) as vm:
        await tell_of_held(vm, qmp, but=job_id)
        foreground = Foreground(running, vm, qmp, adopted=True)
        job = await vm.adopt(
            job_id,
            pending="cancel" if choice == "abort" else "finalize",
            carry_bitmaps=choice != "abort",
        )
        try:
            if job.state.status != "pending":  # such a one is being ended already
                {"pivot": job.pivot, "keep": job.keep, "abort": job.abort}[choice]()
        except JobConflict as conflict:
            if job.state.running:
                raise
            with suppress(CommitFailed):  # how it ended can't be told any more
                await foreground.end(job)  # dismisses it
            raise JobConflict(
                f"job {job_id} had ended already, and was cleared away;"
                f" 'qmpcommit chain {shlex.quote(qmp)}' shows what its disk uses now",
                **conflict.facts,
            ) from None
        outcome = await foreground.end(job)
    return decided(running, choice, outcome)


def decided(running: Run, choice: str, outcome: CommitOutcome) -> Answer:
    """What is said of the end."""
    from qmpcommit.cli.show import outcome_text

    return Answer(
        outcome.model_dump(mode="json"),
        outcome_text(outcome),
        status=0 if outcome.action == choice else 3,
        quiet=running.options.quiet,
    )
