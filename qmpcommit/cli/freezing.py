"""``--freeze`` and ``--agent``: guests that stand still for an instant, on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.session import Session

F = TypeVar("F", bound=Callable[..., Any])


def freezing(command: F) -> F:
    """Add both options."""
    command = click.option(
        "--agent",
        "agents",
        multiple=True,
        metavar="SOCKET",
        help="The guest agent's socket; with several VMs one for each, in their order.",
    )(command)
    return click.option(
        "--freeze",
        type=click.Choice(["agent", "pause"]),
        help="Quiesce the guest for the instant: its file systems through the guest agent, or its"
        " vCPUs.",
    )(command)


def sockets_of(freeze: str | None, vms: Iterable[str], agents: Sequence[str]) -> dict[str, str]:
    """The agents' sockets by their VMs, in order; raises `click.UsageError`."""
    names = list(dict.fromkeys(vms))
    if len(agents) != (len(names) if freeze == "agent" else 0):
        times = "once" if len(names) == 1 else f"{len(names)} times"
        raise click.UsageError(f"Give --agent {times} for --freeze agent, or not at all")
    return dict(zip(names, agents, strict=False))


async def tell_of_frozen(vm: Session, qmp: str) -> None:
    """Warn on standard error where somebody has left this guest quiesced, or does so just now."""
    from qmpcommit.guest.marks import marks, what_to_do

    for mark in await marks(vm):
        echo(
            f"qmpcommit: {qmp}: {mark.message}. If whoever did it is gone: {what_to_do(mark, qmp)}",
            err=True,
        )
