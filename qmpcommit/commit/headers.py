"""The headers of a chain around a commit: the name to be written, and whether all lead on.

QEMU rewrites the header of the layer above the merged ones by itself, with the name that it
happens to show of the base. ``backing-file`` of ``block-commit`` says which it is to be.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from qmpcommit.block.backing_name import (
    BackingName,
    View,
    leads_to,
    name_below,
    written_below,
)
from qmpcommit.block.graph import BlockGraph
from qmpcommit.commit.plan import Plan
from qmpcommit.errors import ChainError


def with_backing_file(plan: Plan, graph: BlockGraph, pid: int | None, cwd: str | None) -> Plan:
    """The plan of an intermediate commit with the base's name for the header above.

    `pid` is QEMU's, `cwd` its working directory, where they are known. Looks at files. Raises
    `ChainError` where the base can't be named.
    """
    names = [image.node_name for image in plan.disk.chain]
    above = names[names.index(plan.top.node_name) - 1]
    try:
        name = name_below(
            graph,
            plan.base.node_name,
            _file(graph, above),
            View.of(pid, cwd),
            through=(above, plan.top.node_name, *(image.node_name for image in plan.between)),
            relative=plan.keep_relative or None,
        )
    except ChainError as error:
        error.add(vm=plan.vm, disk=plan.disk.name)
        raise
    return replace(plan, arguments={**plan.arguments, "backing-file": name.text})


def is_bare(graph: BlockGraph, name: str) -> bool:
    """Whether a layer is a protocol's node, without a raw format over it."""
    return name in graph.nodes and not graph.nodes[name].children


def _file(graph: BlockGraph, name: str) -> str:
    return str(graph.leaf(name).raw.get("file") or "")


def wrong_headers(graph: BlockGraph, chain: Sequence[str], view: View) -> list[str]:
    """What the headers of a chain say that is not what QEMU has, and how to mend each.

    `chain` are the layers' nodes, active layer first. Reads the headers, so that it belongs in a
    thread; what can't be seen from here is judged by what QEMU read of it, or not at all.
    """
    found = []
    for overlay, below in pairwise(name for name in chain if name in graph.nodes):
        written = next(written_below(graph, overlay, view))
        file = _file(graph, overlay)
        try:
            name = name_below(graph, below, file, view)
        except ChainError:
            continue
        if not written.text:
            continue
        if leads_to(graph, overlay, below, written, view) in ("other", "part"):
            found.append(
                f"the header of {file} says that it lies on '{written.text}'"
                f" ({written.format or 'no format'}), but QEMU has '{name.text}' ({name.format})"
                " under it: started from its files, the disk would be another one, or not open."
                f" Mend it while the VM is off: {mending(file, name)}"
            )
    return found


def mending(overlay: str, name: BackingName) -> str:
    """The command that gives an overlay's header the right name."""
    return shlex.join(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", name.format, "-b", name.text, overlay]
    )
