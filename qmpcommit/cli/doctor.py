"""``qmpcommit doctor``: what is wrong with VMs, and what to type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.completing import complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qmpcommit.cli.running import Run
    from qmpcommit.recovery.verdict import Symptom, Verdict

WRONG, NOT_FOUND = 1, 4


@click.command(cls=Command)
@click.argument("qmps", shell_complete=complete_monitor, nargs=-1, metavar="[QMP]...")
@click.option("--all", "everything", is_flag=True, help="All VMs that 'qmpcommit vms' shows.")
@common
def doctor(qmps: tuple[str, ...], *, everything: bool, **given: Any) -> Answer:
    """Say what is wrong with VMs, and what to type; nothing is changed.

    It looks for what a death has left (as 'qmpcommit recover' does), for guests that stand still,
    names on disk that would not open, bases that others use, and room for a full commit. The exit
    status is for a monitoring system: 0 all is well, 1 something is wrong (a monitor that can't be
    asked is, too), 4 there is no VM. A note is no fault. Each VM has 2 s, or with --timeout nine
    tenths of that.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    if everything == bool(qmps):
        raise click.UsageError("Give the VMs' monitors, or --all")
    return run(options, lambda running: _doctor(running, qmps))


async def _doctor(running: Run, qmps: tuple[str, ...]) -> Answer:
    import asyncio

    from qmpcommit.cli.tables import draw
    from qmpcommit.cli.vms import NONE, within
    from qmpcommit.names import SOCKETS
    from qmpcommit.recovery.monitors import Place, find
    from qmpcommit.recovery.verdict import examine

    if qmps:
        places = [Place((qmp,)) for qmp in dict.fromkeys(qmps)]
    else:
        places = await asyncio.to_thread(find)
    found = await examine(places, within=within(running))
    ill = sum(not each.well for each in found)
    status = WRONG if ill else 0
    if not any(each.there for each in found):
        status = NOT_FOUND
    data = {"vms": [each.model_dump(mode="json") for each in found], "wrong": ill}
    quiet = running.options.quiet
    if not found:
        return Answer(data, NONE.format(sockets=SOCKETS), status=status, quiet=quiet)
    return Answer(
        data,
        "\n".join(_lines(found, None)),
        status=status,
        quiet=quiet,
        draw=lambda: draw(lambda width: "\n".join(_lines(found, width))),
    )


def _lines(found: Sequence[Verdict], width: int | None) -> Iterator[str]:
    from qmpcommit.cli.tables import wrapped

    for each in found:
        name = f"{each.address} ({each.name})" if each.name else each.address
        wrong = sum(symptom.level == "wrong" for symptom in each.symptoms)
        verdict = "all is well"
        if wrong:
            verdict = "1 thing is wrong" if wrong == 1 else f"{wrong} things are wrong"
        yield from wrapped(f"{name}: {verdict}", width, 2)
        for symptom in each.symptoms:
            yield from wrapped(f"  {_words(symptom)}", width, 4)
            if symptom.command:
                yield f"    {symptom.command}"  # never broken: so it can be copied


def _words(symptom: Symptom) -> str:
    head = "WARNING: " if symptom.level == "wrong" else "Note: "
    text = f"{head}{symptom.message}"
    if symptom.next:
        text += f". {symptom.next}"
    return text + (":" if symptom.command else "")
