"""Who works on which disk, as ``chain`` and ``jobs`` tell of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qmpcommit.block.chain import Disk
    from qmpcommit.block.graph import BlockGraph


def tell_of_owners(disks: Iterable[Disk], graph: BlockGraph) -> list[dict[str, Any]]:
    """A line each on standard error; the member ``held`` of the JSON."""
    if not graph.claims:
        return []
    from qmpcommit.commit.claim import WORK, lives, owner_in, told

    held = []
    for disk in disks:
        owner = owner_in(graph, disk)
        if owner is None:
            continue
        alive = lives(owner)
        gone = ", which has ended: whoever comes next takes it over" if alive is False else ""
        click.echo(f"qmpcommit: {disk} is held by {told(owner)}{gone}", err=True)
        held.append(
            {
                "disk": disk.name,
                "work": WORK.get(owner.verb, owner.verb),
                "pid": owner.pid or None,
                "since": owner.since or None,
                "alive": alive,
            }
        )
    return held
