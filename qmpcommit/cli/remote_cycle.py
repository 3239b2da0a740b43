"""``--daemon cycle``: a round that the daemon runs, and is waited for from here."""

from __future__ import annotations

import asyncio

from qmpcommit.cli.cycle import OTHERWISE
from qmpcommit.cli.options import Answer, Interrupted
from qmpcommit.cli.remote import reach
from qmpcommit.cli.running import Run
from qmpcommit.client.cycle import RemoteRound, begin
from qmpcommit.errors import DaemonLost, DeadlineExceeded
from qmpcommit.wire.cycle import RoundView


async def cycle(running: Run, name: str, disk: str) -> Answer:
    """Run a round now; Ctrl-C and the deadline leave it with the daemon.

    Raises what `RemoteVM.cycle` raises, `DeadlineExceeded` and `Interrupted`.
    """
    begun: RemoteRound | None = None
    where = {"vm": name, "disk": disk}
    try:
        async with reach(running.options, name) as vm:
            begun = await begin(vm, disk)
            done = await begun.wait()
    except asyncio.CancelledError:
        if running.timed_out:
            seconds = running.options.timeout
            text = f"the round did not end within {seconds:g} s. {_goes_on(begun)}"
            raise DeadlineExceeded(text, **where) from None
        raise Interrupted(f"interrupted. {_goes_on(begun)}", **where) from None
    except DaemonLost as error:
        raise DaemonLost(f"{error}. {_goes_on(begun)}", **error.facts) from None
    return Answer(
        done.model_dump(mode="json"),
        "\n".join([_said(done), *(f"  Warning: {text}." for text in done.warnings)]),
        status=0 if done.result == "kept" else OTHERWISE,
        quiet=running.options.quiet,
    )


def _goes_on(begun: RemoteRound | None) -> str:
    if begun is None:
        return "If the daemon has begun a round, it goes on with it: GET /v1/cycles tells"
    return (
        f"Round {begun.id} is left with the daemon, which goes on with it: GET"
        f" /v1/cycles/{begun.id} tells how it ends"
    )


def _said(done: RoundView) -> str:
    overlays = [each.overlay for each in done.disks] or [done.overlay]
    if done.result == "kept":
        said = [f"kept: the base has the changes, {overlay} begins empty" for overlay in overlays]
    else:
        said = [f"discarded: {overlay} begins empty over the base" for overlay in overlays]
    return "\n".join(said)
