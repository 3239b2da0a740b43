"""``qmpcommit recover``: the way back from whatever has died."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.completing import complete_monitor
from qmpcommit.cli.options import Answer, Options, common, here
from qmpcommit.cli.sections import Command
from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.recovery.findings import Recovered

LEFT = 3
"""The exit status where something is left to do."""


@click.command(cls=Command)
@click.argument("qmps", shell_complete=complete_monitor, nargs=-1, required=True, metavar="QMP...")
@click.option(
    "--agent",
    "agents",
    multiple=True,
    metavar="SOCKET",
    help="The guest agent's socket; with several VMs one for each, in their order.",
)
@click.option(
    "--decide",
    type=click.Choice(["pivot", "keep", "abort"]),
    help="What becomes of jobs that are READY, or copy; else they are only told.",
)
@click.option("--yes", is_flag=True, help="Do it, and do not ask.")
@click.option(
    "--overlay",
    "--overlay-dir",
    "folders",
    multiple=True,
    metavar="DIR",
    help="Where else empty overlays of ours may be.",
)
@click.option(
    "--override",
    multiple=True,
    metavar="CHECK",
    help="With 'claim', also what somebody holds of whom it can't be seen whether they live; with"
    " 'reader', also windows whose file another process still reads.",
)
@common
def recover(
    qmps: tuple[str, ...],
    *,
    agents: tuple[str, ...],
    decide: Any,
    yes: bool,
    folders: tuple[str, ...],
    override: tuple[str, ...],
    **given: Any,
) -> Answer:
    """Put right what a death has left: of this command, of a program or of a daemon.

    Says what it finds on these VMs and what it will do, in order, and does it with --yes, or when
    a terminal's user says so. Name all VMs of a group, for it is resolved as one. Nothing is
    touched of whoever lives. Where a daemon has these VMs, start the daemon instead: it knows what
    it promised. Without --yes and without a terminal nothing is done. The exit status is 0 where
    nothing is left to do, and 3 where something is: it was only shown, or it needs a word
    (--decide, --agent) or a hand.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    if options.daemon is not None:
        raise click.UsageError(
            "A daemon puts right by itself what it has begun; 'recover' takes QMP monitors"
        )
    if agents and len(agents) != len(qmps):
        times = "once" if len(qmps) == 1 else f"{len(qmps)} times"
        raise click.UsageError(f"Give --agent {times}, or not at all")
    asked = {
        "decide": decide,
        "folders": [here(folder) for folder in folders],
        "override": override,
    }
    return run(options, lambda running: _recover(running, qmps, agents, asked, yes=yes))


async def _recover(
    running: Run,
    qmps: tuple[str, ...],
    agents: tuple[str, ...],
    asked: dict[str, Any],
    *,
    yes: bool,
) -> Answer:
    from qmpcommit.commit.checks import check_override
    from qmpcommit.recovery.doing import recover as put_right

    check_override(asked["override"])
    async with AsyncExitStack() as stack:
        vms = [await stack.enter_async_context(running.connect(qmp)) for qmp in dict.fromkeys(qmps)]
        asked["agents"] = dict(zip(vms, agents, strict=False))
        found = await put_right(vms, look_only=True, **asked)
        does = [each for each in found.findings if each.does]
        if not does:
            return _answer(running, found)
        if not yes and not await _agreed(running, found):
            return _answer(running, found)
        running.so_far = "what had been begun was brought to its end; run it again to go on"
        return _answer(running, await put_right(vms, **asked))


async def _agreed(running: Run, found: Recovered) -> bool:
    """Ask on a terminal; without one nothing is agreed to."""
    import asyncio

    if running.options.as_json or not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    echo(_text(found), err=True)
    return await asyncio.to_thread(click.confirm, "Do it?", err=True)


def _text(found: Recovered) -> str:
    lines = []
    for number, each in enumerate(found.findings, 1):
        said = f"Done: {each.result}" if each.done else each.next
        if each.result and not each.done:
            said = f"NOT DONE: {each.result}"
        elif not each.does and not each.done:
            said = f"LEFT: {each.next}"
        lines.append(f"{number}. {each.vm}: {each.message}. {said}")
    return "\n".join(lines) or "nothing was left here by a death"


def _answer(running: Run, found: Recovered) -> Answer:
    left = found.left
    text = _text(found)
    if any(each.does and not each.result for each in left):
        text += "\nNothing was done: --yes does it"
    data = {
        "findings": [each.model_dump(mode="json") for each in found.findings],
        "left": len(left),
    }
    return Answer(data, text, status=LEFT if left else 0, quiet=running.options.quiet)
