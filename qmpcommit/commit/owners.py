"""Who works on which disk, as a person and a program are told of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qmpcommit.commit.claim import WORK, lives, owner_in, told

if TYPE_CHECKING:
    from qmpcommit.block.chain import Disk
    from qmpcommit.block.graph import BlockGraph


def owners_of(disks: Iterable[Disk], graph: BlockGraph) -> list[dict[str, Any]]:
    """Of each disk that somebody holds, by whom, since when, and whether that process lives."""
    found = []
    for disk in disks:
        owner = owner_in(graph, disk)
        if owner is None:
            continue
        alive = lives(owner)
        gone = ", which has ended: whoever comes next takes it over" if alive is False else ""
        if gone and owner.verb == "detach":
            gone = ", which left it in QEMU on purpose: it waits to be taken up"
        found.append(
            {
                "disk": disk.name,
                "work": WORK.get(owner.verb, owner.verb),
                "pid": owner.pid or None,
                "since": owner.since or None,
                "alive": alive,
                "message": f"{disk} is held by {told(owner)}{gone}",
            }
        )
    return found
