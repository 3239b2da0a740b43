"""``speed``, ``pause`` and ``resume``: a job that runs, whoever began it."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.completing import complete_job, complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.client.vm import RemoteVM
    from qmpcommit.commit.steering import JobNow
    from qmpcommit.session import Session


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("job", shell_complete=complete_job)
@click.argument("speed")
@common
def speed(qmp: str, job: str, *, speed: str, **given: Any) -> Answer:
    """Change how fast a job copies: SPEED bytes per second at most, as in 50MiB.

    0 or max is no limit. JOB is an id that 'qmpcommit jobs' shows, of any block job, whoever
    began it.
    """
    from qmpcommit.units import parse_size

    rate = 0 if speed == "max" else parse_size(speed, "speed")
    return _command(qmp, given, lambda vm: vm.set_bandwidth(job, rate), _speed_text)


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("job", shell_complete=complete_job)
@common
def pause(qmp: str, job: str, **given: Any) -> Answer:
    """Have a job copy nothing until 'qmpcommit resume'; the guest goes on.

    JOB is an id that 'qmpcommit jobs' shows, of any block job, whoever began it. Pauses do not
    add up: QEMU refuses a second one, and one 'resume' ends the pause of whoever paused it. A job
    that is paused already stays so, with status 0.
    """
    return _command(qmp, given, lambda vm: vm.pause_job(job), _pause_text)


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("job", shell_complete=complete_job)
@common
def resume(qmp: str, job: str, **given: Any) -> Answer:
    """Have a job go on that was paused, or that full or broken storage has stopped.

    JOB is an id that 'qmpcommit jobs' shows, of any block job, whoever paused it. One that runs
    goes on running, with status 0.
    """
    return _command(qmp, given, lambda vm: vm.resume_job(job), _resume_text)


def _command(
    qmp: str,
    given: dict[str, Any],
    ask: Callable[[Session | RemoteVM], Awaitable[JobNow]],
    text: Callable[[JobNow, str, str], str],
) -> Answer:
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    async def work(running: Run) -> Answer:
        async with running.vm(qmp) as vm:
            now = await ask(vm)
        said = text(now, options.program, qmp)
        return Answer(now.model_dump(mode="json"), said, quiet=options.quiet)

    return run(options, work)


def _speed_text(now: JobNow, program: str, qmp: str) -> str:
    from qmpcommit.units import show_size

    rate = f"at most {show_size(now.speed)}/s" if now.speed else "as fast as the storage does"
    return f"job {now.job_id} copies {rate}: {_where(now, program, qmp)}"


def _pause_text(now: JobNow, program: str, qmp: str) -> str:
    already = "" if now.changed else " already"
    return (
        f"job {now.job_id} is paused{already}: {_where(now, program, qmp)}. What the guest writes"
        f" meanwhile is copied after '{program} resume {shlex.quote(qmp)} {now.job_id}'"
    )


def _resume_text(now: JobNow, program: str, qmp: str) -> str:
    goes = "goes on" if now.changed else "was not paused, and goes on"
    if now.paused:
        goes = "is resumed, and QEMU itself holds it yet"
    return f"job {now.job_id} {goes}: {_where(now, program, qmp)}"


def _where(now: JobNow, program: str, qmp: str) -> str:
    """What it does now; `program` and `qmp` are what shows that again."""
    from qmpcommit.units import show_size

    if now.status == "null":
        return f"it has ended right now; '{program} chain {shlex.quote(qmp)}' shows what it left"
    left = show_size(now.total - now.current)
    return (
        f"{now.type}, {now.status}, {show_size(now.current)} of {show_size(now.total)}, {left} left"
    )
