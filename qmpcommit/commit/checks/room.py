"""Whether there is room for what the base grows by, and whether it can grow at all."""

from __future__ import annotations

from collections.abc import Iterator

from qmpcommit.block.chain import Image
from qmpcommit.block.files import (
    Header,
    device_size,
    free_space,
    is_block_device,
    read_header,
    used_end,
)
from qmpcommit.block.graph import BlockGraph, Raw
from qmpcommit.block.qcow2 import unwritten
from qmpcommit.commit.checks.finding import Case, Finding, image_data, refused, unchecked
from qmpcommit.commit.plan import Plan
from qmpcommit.units import show_size

_GROWING_FORMATS = frozenset(("raw", "qcow2", "qed", "luks", "parallels"))
_GROWING_PROTOCOLS = frozenset(("file", "rbd", "ssh", "gluster", "nfs"))
_COPIED_AT_ONCE = 65536
"""What the job copies at the least where the base has no clusters (one bit of its bitmap)."""


def space(case: Case) -> Iterator[Finding]:
    """What the base may grow by, against the room under it."""
    base = case.plan.base
    node = case.storage(base.node_name)
    data, needed = growth(case.graph, case.plan)
    place = case.place(node)
    if not place.path:
        yield unchecked("free-space", place.reason, needed=needed)
        return
    if not is_block_device(place.path):
        free = free_space(place.path)
        where = f"the file system under {base.filename}"
        what = f"the base {base.filename} may grow by {show_size(needed)}"
    elif base.driver == "raw":
        yield Finding("free-space", "ok", "a raw base on a block device does not grow")
        return
    else:
        size = device_size(place.path)
        own = node.name == case.graph.leaf(base.node_name).name
        header = read_header(place.path) if own else None
        if header is None:
            yield unchecked("free-space", f"it is not known what {base.filename} uses of its"
                             f" {show_size(size)}", needed=needed)  # fmt: skip
            return
        free = max(0, size - used_end(place.path, header))
        if needed > free:
            needed = min(needed, _not_allocated(case, place.path, header))
        where = f"the block device {place.path} of {show_size(size)}"
        what = f"the base in it may grow by {show_size(needed)}"
    numbers = {"needed": needed, "free": free, "data": data}
    if needed <= free:
        yield Finding("free-space", "ok", f"{what}, and {where} has {show_size(free)}", numbers)
        return
    yield refused(
        "free-space",
        f"{what} ({needed} bytes; the layers above it hold {show_size(data)}), but {where} has"
        f" only {show_size(free)} left ({free} bytes): make room for {show_size(needed - free)},"
        " or commit fewer layers",
        **numbers,
    )


def _not_allocated(case: Case, path: str, header: Header) -> int:
    """What a qcow2 grows by at the most, counted where the estimate would refuse."""
    missing = unwritten(path)
    cluster = header.cluster_size
    more = max(0, (case.plan.top.virtual_size or 0) - header.virtual_size)  # it is resized to that
    if missing is None:
        return header.virtual_size * 2 + more * 2
    clusters = missing.clusters + missing.tables + -(-more // cluster)
    tables = -(-more // (cluster // 16 * cluster))
    counts = -(-(clusters + tables) * header.refcount_bits // 8 // cluster)
    return (clusters + tables + counts) * cluster


def growth(graph: BlockGraph, plan: Plan) -> tuple[int, int]:
    """The data to be copied and, at worst, the bytes that the base grows by.

    With `V` top's virtual size::

        data   = min(V, sum of what top and the layers between have allocated)
        copied = min(V, sum of allocated * chunk / that layer's cluster size)
        worst  = copied + metadata(copied)
        room   = V + metadata(V) - what the base has allocated
        growth = min(worst, room)

    `chunk` is the base's cluster (64 KiB for a raw base): a smaller cluster of an overlay
    makes a whole one of the base. `metadata` are qcow2's L2 tables and refcounts. A layer on a
    block device or of unknown allocation counts with its whole virtual size. `room`, what is
    still unallocated in the base, counts only where the allocation is all guest data: not with
    internal snapshots or bitmaps.

    What the figure can't know: guest writes while the job runs (each may take one more cluster,
    up to `room`), overlays with compressed clusters or on a compressing file system (they hold
    more than they have allocated), and clusters that the base has allocated already (they need
    nothing).
    """
    top, base = plan.top, plan.base
    size = top.virtual_size or 0
    whole = max(size, base.virtual_size or 0)
    info: Raw = graph.nodes[base.node_name].raw.get("image") or {}
    chunk = base.cluster_size or _COPIED_AT_ONCE
    data = copied = 0
    for layer in (top, *plan.between):
        held = _held(graph, layer)
        data += held
        copied += held * max(1, -(-chunk // _smallest(graph, layer)))
    data, copied = min(size, data), min(size, copied)
    qcow2 = base.driver == "qcow2"
    worst = copied + (_metadata(copied, size, info) if qcow2 else 0)
    known = base.allocated_size is not None and graph.leaf(base.node_name).driver == "file"
    if not known or base.driver not in ("raw", "qcow2") or info.get("snapshots") or base.bitmaps:
        return data, worst
    room = whole + (_metadata(whole, whole, info) if qcow2 else 0) - (base.allocated_size or 0)
    return data, max(0, min(worst, room))


def _held(graph: BlockGraph, layer: Image) -> int:
    """The most that a layer can hold of its own."""
    whole = layer.virtual_size or 0
    if layer.allocated_size is None or graph.leaf(layer.node_name).driver != "file":
        return whole
    return min(layer.allocated_size, whole)


def _smallest(graph: BlockGraph, layer: Image) -> int:
    """The smallest piece that a layer allocates (a 32nd of a cluster with subclusters)."""
    cluster = layer.cluster_size or _COPIED_AT_ONCE
    return max(
        512, cluster // 32 if image_data(graph, layer.node_name).get("extended-l2") else cluster
    )


def _metadata(copied: int, size: int, info: Raw) -> int:
    """What a qcow2 needs besides `copied` bytes of data, wherever in `size` they are written."""
    cluster = int(info.get("cluster-size") or 65536)
    data: Raw = (info.get("format-specific") or {}).get("data") or {}
    entry = 16 if data.get("extended-l2") else 8
    clusters = -(-copied // cluster)
    tables = min(clusters, -(-size // (cluster // entry * cluster)))
    counts = -(-(clusters + tables) * int(data.get("refcount-bits") or 16) // 8 // cluster)
    return (tables + counts + 2) * cluster if clusters else 0


def sizes(case: Case) -> Iterator[Finding]:
    """QEMU makes a smaller base as large as the overlay; not every base can be."""
    base, wanted = case.plan.base, case.plan.top.virtual_size
    have = _size_now(case, base)
    if wanted is None or have is None:
        yield unchecked("size", "QEMU does not tell the virtual sizes")
        return
    numbers = {"base": have, "needed": wanted}
    if have > wanted and case.plan.two_phase:
        yield Finding(
            "size", "note",
            f"the base {base.filename} is larger than the overlay: after a pivot the guest's disk"
            f" has {have} bytes instead of {wanted}", numbers,
        )  # fmt: skip
    if have >= wanted:
        return
    why = _why_fixed(case)
    if why:
        yield refused(
            "size",
            f"the base {base.filename} has {show_size(have)} ({have} bytes), the overlay"
            f" {show_size(wanted)} ({wanted} bytes), and QEMU can't grow the base: {why}; make it"
            f" {wanted} bytes large first",
            **numbers,
        )
        return
    yield Finding(
        "size", "note",
        f"QEMU will grow the base {base.filename} from {have} to {wanted} bytes, whatever is"
        " decided at READY", numbers,
    )  # fmt: skip


def _size_now(case: Case, base: Image) -> int | None:
    """The base's size; QEMU shows that of a host device as it was when it opened it."""
    leaf = case.graph.leaf(base.node_name)
    whole = (leaf.raw.get("image") or {}).get("virtual-size")
    if leaf.driver != "host_device" or base.driver not in ("raw", leaf.driver):
        return base.virtual_size
    place = case.place(leaf)
    if whole != base.virtual_size or not place.path or not is_block_device(place.path):
        return base.virtual_size  # a slice of it keeps its size
    return device_size(place.path)


def _why_fixed(case: Case) -> str:
    base = case.plan.base
    leaf = case.graph.leaf(base.node_name)
    if base.driver == leaf.driver:  # a protocol node used as it is
        return "" if leaf.driver in _GROWING_PROTOCOLS else f"{leaf.driver} has a fixed size"
    if base.driver not in _GROWING_FORMATS:
        return f"the format {base.driver} has a fixed size"
    if base.driver != "raw":
        return ""
    if leaf.driver not in _GROWING_PROTOCOLS:
        return f"it is raw on {leaf.driver}"
    length = (leaf.raw.get("image") or {}).get("virtual-size")
    if length is not None and length != base.virtual_size:
        return f"it is a slice of a file of {length} bytes"
    return ""
