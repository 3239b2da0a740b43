"""``qmpcommit vms``: the VMs of this host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.completing import complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qmpcommit.cli.running import Run
    from qmpcommit.recovery.host import VMState

HEADS = ("VM", "QEMU", "STATE", "DISKS", "DEPTH", "OVERLAYS", "JOBS", "MONITOR")

NONE = (
    "no VM was found. Looked for sockets {sockets}, and for the QMP monitors of the processes that"
    " you may see. Give the sockets of others, as in: qmpcommit vms '/vms/*/qmp.sock'"
)


@click.command(cls=Command)
@click.argument("globs", shell_complete=complete_monitor, nargs=-1, metavar="[GLOB]...")
@common
def vms(globs: tuple[str, ...], **given: Any) -> Answer:
    """The VMs of this host: their disks, jobs and windows, and what is wrong.

    GLOBs name the sockets of monitors. Without one, all are shown that are in the usual place
    (/run/vms/*/*.sock) or that a QEMU process serves which you may see. All are asked at the same
    time; each has 2 s, or with --timeout nine tenths of that, and one that does not answer is
    shown with why.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    return run(options, lambda running: _vms(running, globs))


async def _vms(running: Run, globs: tuple[str, ...]) -> Answer:
    import asyncio

    from qmpcommit.cli.tables import draw
    from qmpcommit.names import SOCKETS
    from qmpcommit.recovery.host import states
    from qmpcommit.recovery.monitors import find

    places = await asyncio.to_thread(find, globs)
    found = await states(places, within=within(running))
    data = {
        "vms": [each.model_dump(mode="json") for each in found],
        "looked": list(globs) or [SOCKETS, "/proc"],
    }
    quiet = running.options.quiet
    if not found:
        return Answer(data, NONE.format(sockets=SOCKETS), quiet=quiet)
    return Answer(
        data,
        "\n".join(_lines(found, None)),
        quiet=quiet,
        draw=lambda: draw(lambda width: "\n".join(_lines(found, width))),
    )


def within(running: Run) -> float:
    """Seconds that each VM has: so many that the deadline finds all rows there."""
    from qmpcommit.recovery.monitors import WITHIN

    return WITHIN if running.remaining is None else 0.9 * running.remaining


def _lines(found: Sequence[VMState], width: int | None) -> Iterator[str]:
    from qmpcommit.cli.tables import table

    yield from table(HEADS, [(_cells(each), list(_remarks(each))) for each in found], width)


def _cells(vm: VMState) -> list[str]:
    from qmpcommit.units import show_size

    over = [show_size(each.overlay_size) if each.overlay else "-" for each in vm.disks]
    cells = [
        vm.name,
        vm.qemu,
        vm.status or ("no guest" if vm.asked else "not asked"),
        ", ".join(each.name for each in vm.disks),
        ", ".join(str(each.depth) for each in vm.disks),
        ", ".join(over),
        ", ".join(each.status for each in vm.jobs),
    ]
    return [*(cell or "-" for cell in cells), vm.address]


def _remarks(vm: VMState) -> Iterator[str]:
    """What stands under a VM's row."""
    from qmpcommit.cli.show import show_seconds
    from qmpcommit.units import show_size

    for job in vm.jobs:
        on = f" on {job.disk}" if job.disk else ""
        yield (
            f"job {job.id}{on}: {job.type}, {job.status}, {show_size(job.current)} of"
            f" {show_size(job.total)}"
        )
    for disk in vm.disks:
        if disk.held:
            yield f"{disk.name} is held by {disk.held}"
    for window in vm.windows:
        age = "" if window.age is None else f", open for {show_seconds(window.age)}"
        yield f"{window.disk} is in a window{age}: its guest writes to {window.overlay}"
    yield from vm.frozen
    yield from (f"WARNING: {each}" for each in vm.wrong if each not in vm.frozen)
