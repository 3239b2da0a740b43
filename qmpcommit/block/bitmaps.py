"""Dirty bitmaps carried across a commit.

QEMU leaves a bitmap where it is: on the overlay that a pivot makes stale. Whoever backs up
incrementally loses the chain then. So each bitmap of the layers that are merged is merged into
one of the same name in the base, in one ``transaction``, while PENDING holds the disk's I/O:
nothing is written between the merge and the pivot, so nothing is missed and nothing is marked
that did not change. A base's own bitmap of that name goes on, and has recorded what the commit
wrote meanwhile: ``name`` marks at least all that it marked before.

Rests on ``block-dirty-bitmap-add``, ``-merge``, ``-enable`` and ``-disable``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qmpcommit.block.graph import BlockGraph, Raw
from qmpcommit.names import STALE_MARK
from qmpcommit.qmp.monitor import Monitor


class Bitmap(NamedTuple):
    """One dirty bitmap of a node (BlockDirtyInfo); `marked` and `granularity` in bytes."""

    node: str
    name: str
    marked: int
    granularity: int
    recording: bool
    persistent: bool
    busy: bool
    inconsistent: bool


class Carrying(NamedTuple):
    """What to carry into `base`, by name, topmost layer first; `problems` for people to read.

    `busy` are bitmaps that another job uses, which can't be merged until it has ended. `layers`
    are those whose bitmaps were looked at.
    """

    base: str
    names: Mapping[str, tuple[Bitmap, ...]]
    problems: tuple[str, ...]
    busy: tuple[str, ...]
    keeps: bool
    layers: tuple[str, ...] = ()

    def seen_in(self, nodes: Mapping[str, Raw]) -> Carrying:
        """The same as it is by now: a bitmap may have come or gone since it was planned."""
        if not {*self.layers, self.base} <= nodes.keys():
            return self
        return _plan(nodes, self.layers, self.base)


def bitmaps_of(graph: BlockGraph, node: str) -> list[Bitmap]:
    """The named bitmaps of a node; the mark of a stale layer is none, and is never carried."""
    return _read(graph.nodes[node].raw)


def _read(raw: Mapping[str, Any]) -> list[Bitmap]:
    return [
        Bitmap(
            node=str(raw["node-name"]),
            name=str(info["name"]),
            marked=int(info.get("count", 0)),
            granularity=int(info.get("granularity", 65536)),
            recording=bool(info.get("recording", True)),
            persistent=bool(info.get("persistent", False)),
            busy=bool(info.get("busy", False)),
            inconsistent=bool(info.get("inconsistent", False)),
        )
        for info in raw.get("dirty-bitmaps") or ()
        if info.get("name") and info["name"] != STALE_MARK
    ]


def plan_carrying(graph: BlockGraph, layers: Sequence[str], base: str) -> Carrying:
    """Which bitmaps of `layers` (top first) have to be carried into `base`."""
    return _plan({name: graph.nodes[name].raw for name in (*layers, base)}, layers, base)


def _plan(nodes: Mapping[str, Raw], layers: Sequence[str], base: str) -> Carrying:
    names: dict[str, list[Bitmap]] = {}
    problems: list[str] = []
    busy: list[str] = []
    for layer in layers:
        for bitmap in _read(nodes[layer]):
            where = f"bitmap '{bitmap.name}' of {layer}"
            if bitmap.inconsistent:
                problems.append(f"{where} is inconsistent (QEMU did not close it) and is lost")
                continue
            if bitmap.busy:
                busy.append(where)
            names.setdefault(bitmap.name, []).append(bitmap)
    keeps = _keeps_bitmaps(nodes[base])
    below = {bitmap.name: bitmap for bitmap in _read(nodes[base])}
    for name, bitmaps in names.items():
        there = below.get(name)
        if there is not None and there.busy:
            busy.append(f"bitmap '{name}' of {base}")
        if there is not None and there.inconsistent:
            problems.append(f"bitmap '{name}' of {base} is inconsistent, so nothing can join it")
        grains = {bitmap.granularity for bitmap in (*bitmaps, *([there] if there else []))}
        if len(grains) > 1:
            sizes = ", ".join(str(size) for size in sorted(grains))
            problems.append(f"bitmap '{name}' has several granularities ({sizes} bytes)")
        if not keeps and any(bitmap.persistent for bitmap in bitmaps):
            problems.append(
                f"bitmap '{name}' is persistent, which {base} can't store: it lives in memory"
                " until QEMU ends"
            )
    unusable = {name for name, there in below.items() if there.inconsistent}
    carried = {name: tuple(found) for name, found in names.items() if name not in unusable}
    return Carrying(base, carried, tuple(problems), tuple(busy), keeps, tuple(layers))


def busy_bitmaps(nodes: Iterable[Raw], layers: Collection[str]) -> list[str]:
    """The bitmaps of these layers that an export or a job uses, in words."""
    return [
        f"bitmap '{bitmap.name}' of {bitmap.node}"
        for node in nodes
        if node.get("node-name") in layers
        for bitmap in _read(node)
        if bitmap.busy
    ]


async def lethal_bitmaps(monitor: Monitor, layers: Collection[str]) -> str:
    """Why `layers`, which QEMU closes by itself at the end, must not be closed now; or "".

    Whoever uses a layer goes over to the base with a pivot, and the bitmap that it uses does not:
    QEMU (5.2 to 11.1) fails an assertion of its own where it closes such a layer, and ends with its
    guest. Raises what `Monitor.execute` raises.
    """
    if not layers:
        return ""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return lethal(busy_bitmaps(nodes, layers))


def lethal(busy: Sequence[str]) -> str:
    """The same in words, for bitmaps that were seen to be busy."""
    if not busy:
        return ""
    return (
        f"{', '.join(busy)} is used by an export or a job, and QEMU closes that layer at the end of"
        " the commit: it would fail an assertion over it, and end with its guest. End that export"
        " first"
    )


def _keeps_bitmaps(raw: Raw) -> bool:
    """Whether the format can store persistent bitmaps (qcow2 of version 3)."""
    if raw.get("drv") != "qcow2":
        return False
    image = raw.get("image") or {}
    data = (image.get("format-specific") or {}).get("data") or {}
    return bool(data.get("compat", "1.1") != "0.10")


def carrying_actions(carrying: Carrying, there: Sequence[Bitmap]) -> list[dict[str, Any]]:
    """The ``transaction`` that carries the bitmaps; `there` are those of the base now."""
    below = {bitmap.name: bitmap for bitmap in there}
    actions: list[dict[str, Any]] = []

    def add(kind: str, **data: Any) -> None:
        named = {key.replace("_", "-"): value for key, value in data.items()}
        actions.append({"type": f"block-dirty-bitmap-{kind}", "data": named})

    for name, bitmaps in carrying.names.items():
        topmost = bitmaps[0]
        if name not in below:
            persistent = carrying.keeps and any(bitmap.persistent for bitmap in bitmaps)
            add("add", node=carrying.base, name=name, granularity=topmost.granularity,
                persistent=persistent, disabled=not topmost.recording)  # fmt: skip
        turned = name in below and below[name].recording is not topmost.recording
        if turned and topmost.recording:  # first: of a disk that writes meanwhile it misses nothing
            add("enable", node=carrying.base, name=name)
        sources = [{"node": bitmap.node, "name": name} for bitmap in bitmaps]
        add("merge", node=carrying.base, target=name, bitmaps=sources)
        if turned and not topmost.recording:
            add("disable", node=carrying.base, name=name)
    return actions


def fresh_actions(carrying: Carrying, fresh: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What has them go on in a fresh overlay under their names, with all that they mark.

    So that whoever looks at the active layer alone, as before, misses nothing; who looks at the
    layers below too finds the base's.
    """
    there = {bitmap.name for bitmap in _read(fresh)}
    data = ((fresh.get("image") or {}).get("format-specific") or {}).get("data") or {}
    keeps = data.get("compat", "1.1") != "0.10"
    node = fresh["node-name"]
    actions: list[dict[str, Any]] = []
    for name, bitmaps in carrying.names.items():
        add = {
            "node": node,
            "name": name,
            "granularity": bitmaps[0].granularity,
            "persistent": keeps and any(bitmap.persistent for bitmap in bitmaps),
            "disabled": not bitmaps[0].recording,
        }
        if name not in there:
            actions.append({"type": "block-dirty-bitmap-add", "data": add})
        sources = [{"node": bitmap.node, "name": name} for bitmap in bitmaps]
        merge = {"node": node, "target": name, "bitmaps": sources}
        actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
    return actions


async def carry(
    monitor: Monitor, carrying: Carrying, *, fresh: str | None = None
) -> tuple[str, ...]:
    """Carry them, all or none, into the overlay `fresh` as well, if one follows; their names.

    Safe to repeat. Raises what `Monitor.execute` raises.
    """
    listed = await monitor.execute("query-named-block-nodes", {"flat": True})
    nodes = {node.get("node-name"): node for node in listed}
    carrying = carrying.seen_in(nodes)
    actions = carrying_actions(carrying, _read(nodes.get(carrying.base, {})))
    if fresh is not None and fresh in nodes:
        actions += fresh_actions(carrying, nodes[fresh])
    if actions:
        await monitor.execute("transaction", {"actions": actions})
    return tuple(carrying.names)
