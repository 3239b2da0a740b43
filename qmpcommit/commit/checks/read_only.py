"""Whether QEMU can write to the base."""

from __future__ import annotations

from collections.abc import Iterator

from qmpcommit.block.command_line import Flat, read_command_line
from qmpcommit.block.files import read_only_because
from qmpcommit.commit.checks.finding import Case, Finding, refused


def read_only_base(case: Case) -> Iterator[Finding]:
    """A base that QEMU can't reopen for writing.

    A format node that is read-only is reopened by QEMU itself, whether it is implicit or was
    declared so. Its protocol node is reopened with it if it has its mode from it; one that was
    given ``read-only=on`` itself is not, and the commit is refused.
    """
    base = case.plan.base
    leaf = case.graph.leaf(base.node_name)
    place = case.place(leaf)
    why = read_only_because(place.path, case.pid) if place.path else ""
    if why and (leaf.raw.get("ro") or base.read_only):
        yield refused("read-only-base", f"the base {base.filename} can't be written: {why}")
        return
    if not leaf.raw.get("ro"):
        return
    declared = _declared_read_only(leaf.name, case.pid)
    if declared:
        yield refused(
            "read-only-base",
            f"the node '{leaf.name}' under the base {base.filename} was opened with read-only=on,"
            " and QEMU will refuse to write to it: blockdev-reopen it and"
            f" '{base.node_name}' with read-only off first",
        )
    elif declared is None and not leaf.name.startswith("#block"):
        yield Finding(
            "read-only-base", "note",
            f"the node '{leaf.name}' under the base {base.filename} is read-only; QEMU will refuse"
            " the commit if it was opened with read-only=on of its own",
        )  # fmt: skip


def _declared_read_only(name: str, pid: int | None) -> bool | None:
    """Whether QEMU's command line declares this node read-only; None where it is not there."""
    options = declared(name, pid)
    return None if options is None else is_on(options.get("read-only"))


def declared(name: str, pid: int | None) -> Flat | None:
    """The options of the node of this name on QEMU's command line; None: not there."""
    line = read_command_line(pid)
    return None if line is None else line.of_node(name)


def is_on(value: object) -> bool:
    """Whether an option's value, of either form, is a yes."""
    return value is True or value in ("on", "yes", "true", "y")
