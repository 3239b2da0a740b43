"""``qmpcommit snapshot``: overlays that stay."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.completing import complete_disk, complete_monitor
from qmpcommit.cli.freezing import freezing, sockets_of, tell_of_frozen
from qmpcommit.cli.held import tell_of_held
from qmpcommit.cli.options import (
    Answer,
    Options,
    asked_of_overlay,
    common,
    here,
    overlay_asked,
    override_option,
)
from qmpcommit.cli.sections import Command
from qmpcommit.cli.telling import one_line

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.window.overlays import Snapshot


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("disks", nargs=-1, required=True, metavar="DISK...", shell_complete=complete_disk)
@click.option(
    "--overlay", metavar="FILE", help="The new overlay, or a folder for it or them; else beside."
)
@overlay_asked
@freezing
@override_option
@common
def snapshot(
    qmp: str,
    disks: tuple[str, ...],
    *,
    overlay: str | None,
    overlay_options: str | None,
    overlay_secret: str | None,
    freeze: Any,
    agents: tuple[str, ...],
    override: tuple[str, ...],
    **given: Any,
) -> Answer:
    """Lay fresh overlays over DISKs, all at one instant; they stay, and the guest goes on.

    From then on the guest writes to them, and the files below do not change any more: they hold
    one instant of all of the disks. This begins both stories: later 'qmpcommit commit QMP DISK
    --shallow --pivot' merges an overlay away again, and --keep-overlay or --recycle carries into
    the file below what was written since. Where it fails nothing is left of it.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    request = {
        "overlay": here(overlay),
        **asked_of_overlay(overlay_options, overlay_secret),
        "freeze": freeze,
        "agents": sockets_of(freeze, [qmp], agents).get(qmp),
        "override": override,
    }
    return run(options, lambda running: _snapshot(running, qmp, disks, request))


async def _snapshot(
    running: Run, qmp: str, disks: tuple[str, ...], request: dict[str, Any]
) -> Answer:
    from qmpcommit.session import Session

    options = running.options
    if options.daemon is not None and request.pop("override"):
        raise click.UsageError("--override is for a snapshot without the daemon")
    async with running.vm(qmp) as vm:
        await tell_of_held(vm, qmp, disks)
        if request["freeze"] is None and isinstance(vm, Session):  # else it is thawed first
            await tell_of_frozen(vm, qmp)
        running.so_far = (
            "what had been made was removed, unless the overlays lay already:"
            f" '{options.program} chain {shlex.quote(qmp)}' shows it"
        )
        laid = await vm.overlay(disks, **request)
    return Answer(laid.model_dump(mode="json"), _said(laid), quiet=running.options.quiet)


def _said(laid: Snapshot) -> str:
    from qmpcommit.cli.show import show_seconds

    lines = []
    for each in laid.disks:
        lines.append(
            f"{each.disk} writes to {each.overlay}; {each.filename} does not change any more"
        )
        lines += [f"  Warning: {text}." for text in each.warnings]
    if laid.quiesced is not None:
        lines.append(f"the guest stood still for {show_seconds(laid.quiesced)}")
    return "\n".join(map(one_line, lines))
