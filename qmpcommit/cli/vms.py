"""``qmpcommit vms``: the VMs of this host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.columns import check_format, format_option, shown
from qmpcommit.cli.completing import complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command
from qmpcommit.cli.watching import check_watch, watch_option

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qmpcommit.cli.running import Run
    from qmpcommit.cli.sources import Source
    from qmpcommit.commit.rates import JobPace, Rates
    from qmpcommit.recovery.host import VMState

HEADS = {
    "vm": "VM",
    "qemu": "QEMU",
    "state": "STATE",
    "disks": "DISKS",
    "depth": "DEPTH",
    "overlays": "OVERLAYS",
    "jobs": "JOBS",
    "monitor": "MONITOR",
}
USUAL = tuple(HEADS)

NONE = (
    "no VM was found. Looked for sockets {sockets}, and for the QMP monitors of the processes that"
    " you may see. Give the sockets of others, as in: qmpcommit vms '/vms/*/qmp.sock'"
)


@click.command(cls=Command)
@click.argument("globs", shell_complete=complete_monitor, nargs=-1, metavar="[GLOB]...")
@watch_option
@format_option(HEADS)
@common
def vms(globs: tuple[str, ...], *, watch: bool, columns: list[str] | None, **given: Any) -> Answer:
    """The VMs of this host: their disks, jobs and windows, and what is wrong.

    GLOBs name the sockets of monitors. Without one, all are shown that are in the usual place
    (/run/vms/*/*.sock) or that a QEMU process serves which you may see. All are asked at the same
    time; each has 2 s, or with --timeout nine tenths of that, and one that does not answer is
    shown with why. With --daemon they are the daemon's, and GLOBs are of their names.
    """
    options = Options.of(**given)
    check_format(columns, json=options.as_json)
    check_watch(watch, options.as_json)
    from qmpcommit.cli.running import run

    return run(options, lambda running: _vms(running, globs, columns, watch=watch))


async def _vms(
    running: Run,
    globs: tuple[str, ...],
    columns: Sequence[str] | None = None,
    *,
    watch: bool = False,
) -> Answer:
    from qmpcommit.cli.watching import watched
    from qmpcommit.commit.rates import Rates

    rates, source = Rates(), source_of(running, globs)
    if watch:
        return await watched(
            running, lambda: _look(running, globs, columns, source, rates), every=source.every
        )
    return await _look(running, globs, columns, source, rates)


def source_of(running: Run, globs: tuple[str, ...]) -> Source:
    """The monitors of this host, or the daemon that is to be asked."""
    from qmpcommit.cli import sources

    if running.options.daemon is None:
        return sources.Monitors(globs, lambda: within(running))
    from qmpcommit.cli.remote import connect

    return sources.Daemon(globs, lambda: connect(running.options))


async def _look(
    running: Run,
    globs: tuple[str, ...],
    columns: Sequence[str] | None,
    source: Source,
    rates: Rates,
) -> Answer:
    from qmpcommit.cli.tables import draw
    from qmpcommit.names import SOCKETS

    found = await source.look()
    paces = paces_of(found, rates)
    quiet, daemon = running.options.quiet, running.options.daemon
    data = {
        "vms": [each.model_dump(mode="json") for each in found],
        "looked": list(globs) or ([SOCKETS, "/proc"] if daemon is None else [daemon]),
    }
    if not found and running.options.daemon is not None:
        return Answer(data, "the daemon has no such VM" if globs else "the daemon has no VM")
    if not found:
        return Answer(data, NONE.format(sockets=SOCKETS), quiet=quiet)

    def text(width: int | None) -> str:
        rows = [(_cells(each), list(_remarks(each, paces))) for each in found]
        return "\n".join(shown(HEADS, rows, width, columns=columns, usual=USUAL))

    return Answer(data, text(None), quiet=quiet, draw=lambda: draw(text))


def paces_of(found: Sequence[VMState], rates: Rates) -> dict[tuple[str, str], JobPace]:
    """How fast the jobs of these VMs are, by the VM's address and the job's id."""
    import time

    at = time.monotonic()
    paces = {
        (vm.address, job.id): rates.look(
            (vm.address, job.id), at, status=job.status, current=job.current, total=job.total,
            speed=job.speed, begun_for=job.begun_for, ready_for=job.ready_for,
        )
        for vm in found
        for job in vm.jobs
    }  # fmt: skip
    rates.forget(set(paces))
    return paces


def within(running: Run) -> float:
    """Seconds that each VM has: so many that the deadline finds all rows there."""
    from qmpcommit.recovery.monitors import WITHIN

    return WITHIN if running.remaining is None else 0.9 * running.remaining


def _cells(vm: VMState) -> dict[str, str]:
    from qmpcommit.units import show_size

    over = [show_size(each.overlay_size) if each.overlay else "-" for each in vm.disks]
    return {
        "vm": vm.name,
        "qemu": vm.qemu,
        "state": vm.status or ("no guest" if vm.asked else "not asked"),
        "disks": ", ".join(each.name for each in vm.disks),
        "depth": ", ".join(str(each.depth) for each in vm.disks),
        "overlays": ", ".join(over),
        "jobs": ", ".join(each.status for each in vm.jobs),
        "monitor": vm.address,
    }


def pace_text(pace: JobPace) -> str:
    """What is said of a job beside its bytes; "" where nothing is known."""
    from qmpcommit.cli.show import ready_text, show_seconds
    from qmpcommit.units import show_size

    if pace.ready_for is not None:
        return f", READY for {ready_text(pace.ready_for, pace.ready_bound)}"
    rate = f", {show_size(pace.rate)}/s" if pace.rate else ""
    return f"{rate}, {show_seconds(pace.eta)} to go" if pace.eta is not None else rate


def _remarks(vm: VMState, paces: Mapping[tuple[str, str], JobPace]) -> Iterator[str]:
    """What stands under a VM's row."""
    from qmpcommit.cli.show import show_seconds
    from qmpcommit.units import show_size

    for job in vm.jobs:
        on = f" on {job.disk}" if job.disk else ""
        yield (
            f"job {job.id}{on}: {job.type}, {job.status}, {show_size(job.current)} of"
            f" {show_size(job.total)}{pace_text(paces[vm.address, job.id])}"
        )
    for disk in vm.disks:
        if disk.held:
            yield f"{disk.name} is held by {disk.held}"
    for window in vm.windows:
        age = "" if window.age is None else f", open for {show_seconds(window.age)}"
        yield f"{window.disk} is in a window{age}: its guest writes to {window.overlay}"
    yield from vm.frozen
    yield from (f"WARNING: {each}" for each in vm.wrong if each not in vm.frozen)
