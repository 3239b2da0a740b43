"""``qmpcommit cycle``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer, Options, common

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run

OTHERWISE = 3
"""The exit status where the changes were thrown away."""


@click.command()
@click.argument("qmp")
@click.argument("disk")
@click.option(
    "--keep-if",
    metavar="CMD",
    required=True,
    help="Exit status 0 keeps the changes, 1 to 125 throws them away; any other changes nothing.",
)
@click.option("--overlay", metavar="FILE", help="The next overlay, or a folder for it.")
@click.option("--reset", "guest", flag_value="reset", help="Reset the guest after a discard.")
@click.option("--stop", "guest", flag_value="stop", help="Leave the guest stopped after a discard.")
@click.option("--delete", is_flag=True, help="Delete the former overlay.")
@common
def cycle(
    qmp: str,
    disk: str,
    *,
    keep_if: str,
    overlay: str | None,
    guest: Any,
    delete: bool,
    **given: Any,
) -> Answer:
    """Ask CMD whether the overlay's changes are good: carry them into the base, or discard them.

    CMD learns VM, disk, base and top from QMPCOMMIT_* variables. Either way DISK goes on with an
    empty overlay. A guest that runs has the discarded disk in its memory, so say --reset or
    --stop. The exit status is 0 where the changes were kept, and 3 where they were discarded.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    request = {
        "keep_if": ["/bin/sh", "-c", keep_if],
        "overlay": overlay,
        "guest": guest,
        "delete": delete,
    }
    return run(options, lambda running: _cycle(running, qmp, disk, request))


async def _cycle(running: Run, qmp: str, disk: str, request: dict[str, Any]) -> Answer:
    async with running.connect(qmp) as vm:
        done = await vm.cycle(disk, **request)
    data = done.model_dump(mode="json")
    if done.kept is not None:
        text = f"kept: {done.kept.base.filename} has the changes, {done.overlay} begins empty"
        return Answer(data, text, quiet=running.options.quiet)
    assert done.discarded is not None
    gone = "is deleted" if done.discarded.deleted else "must not be booted again"
    text = (
        f"discarded: {done.discarded.former} {gone}, {done.overlay} begins empty over"
        f" {done.discarded.base.filename}"
    )
    return Answer(data, text, status=OTHERWISE, quiet=running.options.quiet)
