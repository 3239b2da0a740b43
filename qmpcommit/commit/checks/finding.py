"""What a check is given, and what it answers with."""

from __future__ import annotations

from dataclasses import field
from typing import Literal, NamedTuple

from qmpcommit.block.chain import Image
from qmpcommit.block.graph import BlockGraph, Node, Raw
from qmpcommit.block.identity import HOST_FILES, OpenFiles, Place, locate
from qmpcommit.commit.plan import Plan
from qmpcommit.values import Record, record


@record
class Finding(Record):
    """What one check found: "refuse" speaks against the commit, a "note" should be known.

    A check that could not be made is a note that says why. `numbers` are those of the message,
    in bytes. What is `final` can't be overridden: the commit would do certain harm.
    """

    name: str
    level: Literal["ok", "note", "refuse"]
    message: str
    numbers: dict[str, int] = field(default_factory=dict)
    final: bool = False


class Case(NamedTuple):
    """What every check is given."""

    graph: BlockGraph
    plan: Plan
    pid: int | None
    cwd: str | None
    probe_locks: bool = True
    opened: OpenFiles = OpenFiles(None, ())

    @property
    def layers(self) -> tuple[Image, ...]:
        """What is copied from: top and the layers between it and the base."""
        return (self.plan.top, *self.plan.between)

    def storage(self, name: str) -> Node:
        """The protocol node that holds a layer's data (its external data file, if any)."""
        data = self.graph.nodes[name].children.get("data-file")
        return self.graph.leaf(data if data in self.graph.nodes and data else name)

    def place(self, node: Node) -> Place:
        """Where a protocol node's file can be looked at."""
        if node.driver not in HOST_FILES:
            return Place("", f"it is on {node.driver}, not in a file of this host")
        name, opened = str(node.raw.get("file")), self.opened.of_process(self.pid)
        return locate(name, pid=self.pid, cwd=self.cwd, opened=opened)


def refused(name: str, message: str, **numbers: int) -> Finding:
    """It speaks against the commit."""
    return Finding(name, "refuse", f"{message} (override '{name}' to commit anyway)", numbers)


def unchecked(name: str, reason: str, **numbers: int) -> Finding:
    """It could not be looked at."""
    return Finding(name, "note", f"not checked: {reason}", numbers)


def image_data(graph: BlockGraph, name: str) -> Raw:
    """What its format tells of a node's image (``ImageInfoSpecific``)."""
    info: Raw = graph.nodes[name].raw.get("image") or {}
    return (info.get("format-specific") or {}).get("data") or {}
