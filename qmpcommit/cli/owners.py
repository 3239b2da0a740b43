"""Who works on which disk, as ``chain`` and ``jobs`` tell of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.block.chain import Disk
    from qmpcommit.block.graph import BlockGraph


def tell_of_owners(disks: Iterable[Disk], graph: BlockGraph) -> list[dict[str, Any]]:
    """A line each on standard error; the member ``held`` of the JSON."""
    if not graph.claims:
        return []
    from qmpcommit.commit.owners import owners_of

    return tell(owners_of(disks, graph))


def tell(owners: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of those that a daemon has named."""
    for each in owners:
        echo(f"qmpcommit: {each['message']}", err=True)
    return owners
