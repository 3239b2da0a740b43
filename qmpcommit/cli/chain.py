"""``qmpcommit chain``: the disks and their backing chains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.columns import LAYER_HEADS, check_format, format_option
from qmpcommit.cli.completing import complete_disk, complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qmpcommit.block.chain import Disk
    from qmpcommit.cli.running import Run
    from qmpcommit.client.vm import RemoteVM


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("disk", shell_complete=complete_disk, required=False)
@click.option("--dot", is_flag=True, help="Print a Graphviz graph (| dot -Tsvg).")
@format_option(LAYER_HEADS)
@click.option(
    "--override",
    metavar="CHECK",
    multiple=True,
    help="With 'stale', a layer that is stale is no failure.",
)
@common
def chain(
    qmp: str,
    disk: str | None,
    *,
    dot: bool,
    columns: list[str] | None,
    override: tuple[str, ...],
    **given: Any,
) -> Answer:
    """The disks of a VM and their backing chains, active layer first.

    Layers are numbered as --base and --top of 'qmpcommit commit' take them. With DISK, only
    that disk. The exit status is 1 where a disk has a layer that an earlier commit has made stale.
    """
    options = Options.of(**given)
    check_format(columns, dot=dot, json=options.as_json)
    if override:
        from qmpcommit.commit.checks import check_override

        check_override(override)
    from qmpcommit.cli.running import run

    answer = run(options, lambda running: _chain(running, qmp, disk, dot, columns))
    return answer._replace(status=0) if "stale" in override else answer


async def _chain(
    running: Run, qmp: str, disk: str | None, dot: bool, columns: list[str] | None
) -> Answer:
    from qmpcommit.block.chain import find_disk, read_disks
    from qmpcommit.block.identity import all_told_where
    from qmpcommit.cli.held import tell_of_held, warn_of_held
    from qmpcommit.cli.left import tell_of_left
    from qmpcommit.cli.open_windows import tell_of_windows
    from qmpcommit.cli.owners import tell, tell_of_owners
    from qmpcommit.cli.show import disks_dot, disks_text
    from qmpcommit.cli.tables import draw
    from qmpcommit.session import Session

    async with running.vm(qmp) as vm:
        if isinstance(vm, Session):
            graph = await vm.graph()
            disks = all_told_where(graph, vm.peer_pid, read_disks(graph))
            if disk is not None:
                disks = [find_disk(disks, disk, vm=vm.name, cwd=vm.cwd)]
            windows = tell_of_windows(disks, qmp, cwd=vm.cwd, graph=graph)
            windows["held"] = tell_of_owners(disks, graph)
            windows["left"] = await tell_of_left(vm, qmp)
        else:
            disks = await vm.disks() if disk is None else [await vm.disk(disk)]
            windows = tell_of_windows(disks, (await vm.info()).qmp)
            names = {each.name for each in disks}
            windows["held"] = tell([each for each in await vm.owners() if each["disk"] in names])
        held = await tell_of_held(vm, qmp)
        if not isinstance(vm, Session) and any(each.jobs for each in disks):
            held = await _held_jobs(vm)
            warn_of_held(held)
    dumped = [each.model_dump(mode="json") for each in disks]
    windows["stale"] = tell_of_stale(disks)
    status = 1 if windows["stale"] else 0
    data = {"vm": vm.name, "disks": dumped, "pending": held, **windows}
    if dot:
        return Answer(data, disks_dot(vm.name, disks), status, quiet=running.options.quiet)
    return Answer(
        data,
        disks_text(disks, columns=columns),
        status,
        quiet=running.options.quiet,
        draw=lambda: draw(lambda width: disks_text(disks, width, columns)),
    )


def tell_of_stale(disks: Iterable[Disk]) -> list[dict[str, str]]:
    """A line each on standard error; the member ``stale`` of the JSON."""
    from qmpcommit.cli.telling import echo
    from qmpcommit.commit.checks.layers import stale_text

    found = [(disk, image) for disk in disks for image in disk.chain if image.stale]
    for disk, image in found:
        echo(f"qmpcommit: {disk}: {stale_text(image)}", err=True)
    return [
        {"disk": disk.name, "filename": image.filename, "by": image.stale} for disk, image in found
    ]


async def _held_jobs(vm: RemoteVM) -> list[dict[str, str]]:
    """Those that are not the daemon's own: it ends its own, and no others."""
    from qmpcommit.commit.pending import what_to_do
    from qmpcommit.names import JOB_PREFIX

    names = [
        str(job["device"])
        for job in await vm.jobs()
        if job["status"] == "pending" and job["commit"] is None
    ]
    ours = sorted(name for name in names if name.startswith(JOB_PREFIX))
    qmp = (await vm.info()).qmp if ours else ""
    return [{"id": name, "next": what_to_do(name, qmp)} for name in ours]
