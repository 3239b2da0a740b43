"""A commit that had ended before anybody asked: which disk's it was, and what its layers are.

QEMU lists a concluded job by its id alone. What it worked on is in the claim of whoever began it,
which outlives its process, or in the block graph: a pivot leaves the stale overlay's node open
over the active layer until somebody closes it. Pure: it looks at a graph that was read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from qmpcommit.block.chain import Disk, read_disks, read_image
from qmpcommit.block.graph import FILTERS, BlockGraph
from qmpcommit.commit.claim import job_number, layer_number, numbers_of, owners_among
from qmpcommit.commit.plan import UNKNOWN, Plan, is_named_in

SEEN = (
    "who began the job has left no word of it: that it was this disk's, and pivoted, is what the"
    " block graph shows. So nothing was closed and no file touched"
)


class Found(NamedTuple):
    """What a concluded job was, as far as it can be told; `remark` is how sure that is."""

    plan: Plan
    remark: str = ""

    @property
    def known(self) -> bool:
        """Whether the block graph can tell how it ended."""
        return bool(self.plan.base.node_name)


def concluded_plan(vm: str, graph: BlockGraph, job_id: str, policy: Any) -> Found:
    """What the job of that id worked on, although it holds nothing any more."""
    disks = read_disks(graph)
    nothing = Plan(vm, Disk(name="?"), UNKNOWN, UNKNOWN, job_id, True, policy)
    claimed = _claimed(graph, disks, nothing)
    if claimed is not None:
        return Found(claimed)
    mine = [disk for disk in disks if is_named_in(job_id, disk) or disk.device == job_id]
    seen = [each for each in _stale(graph, disks) if not mine or each[0] in mine]
    if len(seen) == 1:
        disk, top = seen[0]
        return Found(_with(replace(nothing, disk=disk), graph, top, disk.chain[0].node_name), SEEN)
    return Found(replace(nothing, disk=mine[0]) if len(mine) == 1 else nothing)


def _claimed(graph: BlockGraph, disks: list[Disk], nothing: Plan) -> Plan | None:
    """As the claim tells that was made for this very job."""
    mine = job_number(nothing.job_id)
    owner = next((o for o in owners_among(graph.claims).values() if o.job == mine), None)
    if owner is None:
        return None
    base = next((n for n in graph.nodes if layer_number(n).startswith(owner.base)), "")
    top = next((n for n in graph.nodes if layer_number(n).startswith(owner.top)), "")
    disk = next((d for d in disks if owner.disk in numbers_of(d)), None)
    if disk is None:  # it has other users by now
        disk = next((d for d in disks if base in [image.node_name for image in d.chain]), None)
    if disk is None or not base:
        return None
    two_phase = owner.layer.startswith(owner.top)
    return _with(replace(nothing, disk=disk, two_phase=two_phase), graph, top, base)


def _with(plan: Plan, graph: BlockGraph, top: str, base: str) -> Plan:
    """The plan with these layers, and those between them; `top` may be gone."""
    layers = graph.chain(top) if top else []
    below = layers[1 : layers.index(base)] if base in layers else []
    return replace(
        plan,
        top=read_image(graph, top) if top else UNKNOWN,
        base=read_image(graph, base),
        between=tuple(read_image(graph, name) for name in below),
    )


def _stale(graph: BlockGraph, disks: Iterable[Disk]) -> list[tuple[Disk, str]]:
    """The overlays that lie unused over what a disk writes to, each with that disk."""
    used = [disk for disk in disks if disk.chain and (disk.qdev or disk.device or disk.exports)]
    busy = {image.node_name for disk in used for image in disk.chain}
    found = []
    for name, node in graph.nodes.items():
        above = [p for p in graph.parents.get(name, ()) if graph.nodes[p].driver not in FILTERS]
        if name in busy or above or "backing" not in node.children:
            continue
        below = graph.chain(name)[1:]
        found += [(disk, name) for disk in used if disk.chain[0].node_name in below]
    return found
