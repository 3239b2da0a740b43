"""``qmpcommit cycle``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.disks import disk_pairs
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
    progress_option,
    shell,
)
from qmpcommit.cli.sections import Command
from qmpcommit.cli.show import remarks, show_seconds

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.cycles.run import Round
    from qmpcommit.session import Session

OTHERWISE = 3
"""The exit status where the changes were thrown away."""


@click.command(cls=Command)
@click.argument("words", nargs=-1, required=True, metavar="QMP DISK... | QMP:DISK...")
@click.option(
    "--keep-if",
    metavar="CMD",
    help="Exit status 0 keeps the changes, 1 to 125 throws them away; any other changes nothing.",
)
@click.option("--overlay", metavar="FILE", help="The next overlay, or a folder for it or them.")
@overlay_asked
@click.option("--reset", "guest", flag_value="reset", help="Reset the guest after a discard.")
@click.option("--stop", "guest", flag_value="stop", help="Leave the guest stopped after a discard.")
@click.option("--delete", is_flag=True, help="Delete the former overlay.")
@freezing
@override_option
@progress_option
@common
def cycle(
    words: tuple[str, ...],
    *,
    keep_if: str | None,
    overlay: str | None,
    overlay_options: str | None,
    overlay_secret: str | None,
    guest: Any,
    delete: bool,
    freeze: Any,
    agents: tuple[str, ...],
    override: tuple[str, ...],
    **given: Any,
) -> Answer:
    """Ask CMD whether the overlay's changes are good: carry them into the base, or discard them.

    CMD learns VM, disk, base and top from QMPCOMMIT_* variables. Either way DISK goes on with an
    empty overlay. A guest that runs has the discarded disk in its memory, so say --reset or
    --stop. The exit status is 0 where the changes were kept, and 3 where they were discarded.

    Several disks end the same way, and are kept at one instant; CMD is asked once, with a line
    for each in every variable. Disks of several VMs are given as QMP:DISK. --freeze has the
    guests stand still for what is kept; a discard needs no freeze.

    With --daemon it is a round of the [[cycle]] that the daemon's configuration has for DISK,
    which says all the rest; it goes on if you leave it.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    if options.daemon is not None:
        said = overlay or overlay_options or overlay_secret
        if keep_if or said or guest or delete or freeze or agents or override:
            raise click.UsageError(
                "The [[cycle]] of the daemon's configuration says what a round does; leave"
                " --keep-if, --overlay, --overlay-options, --overlay-secret, --reset, --stop,"
                " --delete, --freeze, --agent and --override out"
            )
        vm, disk = _place(words)
        from qmpcommit.cli.remote_cycle import cycle as cycle_there

        return run(options, lambda running: cycle_there(running, vm, disk))
    if keep_if is None:
        raise click.UsageError("Missing option '--keep-if'")
    disks = disk_pairs(words, by_name=False) or [(words[0], disk) for disk in words[1:]]
    if not disks:
        raise click.UsageError("Missing argument 'DISK'")
    request = {
        "keep_if": shell(keep_if, "--keep-if"),
        "overlay": here(overlay),
        **asked_of_overlay(overlay_options, overlay_secret),
        "guest": guest,
        "delete": delete,
        "freeze": freeze,
        "override": override,
    }
    sockets = sockets_of(freeze, [qmp for qmp, _ in disks], agents)
    return run(options, lambda running: _cycle(running, disks, sockets, request))


async def _cycle(
    running: Run,
    disks: Sequence[tuple[str, str]],
    sockets: Mapping[str, str],
    request: dict[str, Any],
) -> Answer:
    import asyncio

    from qmpcommit.cli.bar import Bar
    from qmpcommit.cli.following import OwnCommits

    vms = {qmp: running.connect(qmp) for qmp, _ in disks}
    commits = OwnCommits(running, vms.values())
    try:
        async with Bar(running.options, disks[0][0]).of_all(vms.values()):
            rounds = await _round(vms, disks, sockets, request)
    except asyncio.CancelledError:
        qmp, disk = disks[0]
        chain = f"'qmpcommit chain {shlex.quote(qmp)}' shows what it writes to"
        said = f"if a discard had begun, it was brought to its end: {chain}"
        if commits.under_way:
            said = "the changes were being carried into the base, so do not discard them now"
        raise commits.error(said, vm=vms[qmp].name, disk=disk) from None
    each = [done.model_dump(mode="json") for done in rounds]
    data = each[0] if len(each) == 1 else {"result": rounds[0].result, "rounds": each}
    return Answer(
        data,
        "\n".join(map(_said, rounds)),
        status=0 if rounds[0].result == "kept" else OTHERWISE,
        quiet=running.options.quiet,
    )


async def _round(
    vms: Mapping[str, Session],
    disks: Sequence[tuple[str, str]],
    sockets: Mapping[str, str],
    request: dict[str, Any],
) -> Sequence[Round]:
    from qmpcommit.cycles.run import cycle
    from qmpcommit.guest.run_state import runs

    async with AsyncExitStack() as stack:
        for qmp, vm in vms.items():
            await stack.enter_async_context(vm)
            await tell_of_held(vm, qmp)
            if request["freeze"] is None:  # else it is thawed first
                await tell_of_frozen(vm, qmp)
            if request["guest"] is None and await runs(vm):
                raise click.UsageError(
                    f"The guest of {vm.name} runs, and what it has in memory belongs to the overlay"
                    " that would be discarded: give --reset or --stop. Nothing was changed"
                )
        agents = {vms[qmp]: socket for qmp, socket in sockets.items()}
        return await cycle([(vms[qmp], disk) for qmp, disk in disks], agents=agents, **request)


def _place(words: Sequence[str]) -> tuple[str, str]:
    """The VM and the disk; raises `click.UsageError`."""
    places = disk_pairs(words, by_name=True) or [(words[0], disk) for disk in words[1:]]
    if len(places) != 1:
        raise click.UsageError("Through the daemon give one VM and one DISK, which has a [[cycle]]")
    return places[0]


def _said(done: Round) -> str:
    if done.kept is not None:
        stood = ""
        if done.kept.quiesced is not None:
            stood = f"; the guest stood still for {show_seconds(done.kept.quiesced)}"
        base = done.kept.base.filename
        said = f"kept: {base} has the changes, {done.overlay} begins empty{stood}"
        return "\n".join([said, *remarks([done.kept])])
    assert done.discarded is not None
    gone = "is deleted" if done.discarded.deleted else "must not be booted again"
    said = (
        f"discarded: {done.discarded.former} {gone}, {done.overlay} begins empty over"
        f" {done.discarded.base.filename}"
    )
    return "\n".join([said, *(f"  Warning: {text}." for text in done.discarded.warnings)])
