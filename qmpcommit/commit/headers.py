"""The headers of a chain around a commit: the name to be written, and whether all lead on.

QEMU rewrites the header of the layer above the merged ones by itself, with the name that it
happens to show of the base. ``backing-file`` of ``block-commit`` says which it is to be.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from qmpcommit.block.backing_name import (
    BackingName,
    View,
    is_protocol,
    leads_to,
    name_below,
    written_below,
)
from qmpcommit.block.chain import read_disks
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.commit.checks.header_above import overlays_above
from qmpcommit.commit.plan import Plan
from qmpcommit.errors import ChainError
from qmpcommit.qmp.monitor import Monitor


def with_backing_file(
    plan: Plan, graph: BlockGraph, pid: int | None, cwd: str | None, *, masks: bool
) -> Plan:
    """The plan of an intermediate commit with the base's name for the header above.

    `pid` is QEMU's, `cwd` its working directory, where they are known; `masks` is whether it can
    write "raw" for the format of a bare protocol node (``backing-mask-protocol``). QEMU writes one
    name into the headers of all overlays over top, so that it has to be right in each. Looks at
    files. Raises `ChainError` where the base can't be named.
    """
    below = (plan.top.node_name, *(image.node_name for image in plan.between))
    above = [node.name for node, _ in overlays_above(graph, plan.top.node_name)]
    view = View.of(pid, cwd)
    bare = is_bare(graph, plan.base.node_name)

    def names(relative: bool | None) -> list[BackingName]:
        return [
            name_below(
                graph, plan.base.node_name, graph.file(graph.leaf(overlay)), view,
                through=(overlay, *below), relative=relative, bare=bare and not masks,
            )
            for overlay in above
        ]  # fmt: skip

    try:
        found = names(plan.keep_relative or None)
        if len(set(found)) > 1:
            found = names(relative=False)
    except ChainError as error:
        error.add(vm=plan.vm, disk=plan.disk.name)
        raise
    if not found:
        return plan
    arguments = {**plan.arguments, "backing-file": found[0].text}
    if bare and masks:
        arguments["backing-mask-protocol"] = True
    return replace(plan, arguments=arguments)


def is_bare(graph: BlockGraph, name: str) -> bool:
    """Whether a layer is a protocol's node, without a raw format over it."""
    return name in graph.nodes and not graph.nodes[name].children


class WrongHeader(NamedTuple):
    """What a header says that is not what QEMU has, and the command that mends it, VM off.

    `astray` tells that it is the one right over the base, and leads elsewhere.
    """

    message: str
    command: str
    astray: bool = False

    def __str__(self) -> str:
        return f"{self.message}. Mend it while the VM is off: {self.command}"


async def wrong_headers(
    monitor: Monitor, cwd: str | None, base: str, *, rewritten: bool
) -> list[WrongHeader]:
    """What the headers of the chain of `base` say that is not what QEMU has.

    Only of the one right over the base, if it was `rewritten`, is
    another format or part of the same file told as well: elsewhere somebody wants it so. Headers
    are read; what can't be seen from here is judged by what QEMU read of it, or not at all.
    """
    graph = await read_graph(monitor)
    chains = [[image.node_name for image in disk.chain] for disk in read_disks(graph)]
    chain = next((each for each in chains if base in each), [])
    over = chain[chain.index(base) - 1] if base in chain[1:] else ""

    def look() -> list[WrongHeader]:
        view = View.of(monitor.peer_pid, cwd)
        return [
            each._replace(astray=each.astray and overlay == over)
            for overlay, below in pairwise(chain)
            for each in _wrong(graph, overlay, below, view, rewritten=rewritten and overlay == over)
        ]

    return await asyncio.to_thread(look)


def _wrong(
    graph: BlockGraph, overlay: str, below: str, view: View, *, rewritten: bool
) -> Iterator[WrongHeader]:
    file = graph.file(graph.leaf(overlay))
    written = next(written_below(graph, overlay, view))
    verdict = leads_to(graph, overlay, below, written, view) if written.text else "same"
    astray = verdict == "other" or (rewritten and verdict == "part")
    if not astray and not (rewritten and is_protocol(written.format)):
        return
    with suppress(ChainError):
        name = name_below(graph, below, file, view)
        what = (
            "opened again, the disk would be another one, or none"
            if astray
            else "it opens, but not in programs that know formats of images only"
        )
        yield WrongHeader(
            f"the header of {file} names '{written.text}' ({written.format or 'no format'}) below"
            f" it, while QEMU has '{name.text}' ({name.format}): {what}",
            mending(file, name),
            astray,
        )


def mending(overlay: str, name: BackingName) -> str:
    """The command that gives an overlay's header the right name."""
    return shlex.join(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", name.format, "-b", name.text, overlay]
    )
