"""Who else uses what the commit changes: in this QEMU, or in another process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qmpcommit.block.chain import Image
from qmpcommit.block.files import image_locks
from qmpcommit.block.flush import FLUSH
from qmpcommit.block.graph import FILTERS, BlockGraph, Node
from qmpcommit.block.identity import HOST_FILES, FileId, file_id
from qmpcommit.commit.checks.finding import Case, Finding, refused, unchecked


def base_shared(case: Case) -> Iterator[Finding]:
    """Whoever else reads a layer that the commit changes: the base and those between.

    An overlay that nothing uses (left over from an earlier commit) is a note, as QEMU does not
    mind it either; another node of the same file has a lock on it, used or not.
    """
    changed = [case.plan.base, *case.plan.between]
    inside = _down(case.graph, [case.plan.disk.root, case.plan.top.node_name], edges=None)
    for image in changed:
        users, idle = _users(case, image, inside)
        if users:
            yield refused(
                "base-shared",
                f"{image.filename} is also used in this QEMU by {', '.join(users)}; the commit"
                " changes what it shows: detach or delete them first",
            )
        if idle:
            yield Finding(
                "base-shared", "note",
                f"{image.filename} is also under {', '.join(idle)}, which nothing uses now and"
                " which is invalid after the commit",
            )  # fmt: skip
    yield from _locks(case)


def _users(case: Case, image: Image, inside: set[str]) -> tuple[list[str], list[str]]:
    """What uses a layer beside this disk's chain, and what lies over it unused."""
    graph = case.graph
    own = _down(graph, [image.node_name], edges=("file", "data-file"))
    over = {p for name in own for p in graph.parents.get(name, ()) if p not in inside}
    same = set(_same_file(case, own, inside))
    users = {user: None for name in sorted(own) for user in _attached(graph, name)}
    idle: dict[str, None] = {}
    for name in sorted(over | same):
        for top, used in _uppermost(graph, name, inside):
            if top.startswith(FLUSH) and not used:
                continue  # what a killed flush of ours has left
            (users if used or name in same else idle)[_describe(graph, top)] = None
    return list(users), list(idle)


def _down(graph: BlockGraph, names: Iterable[str], edges: tuple[str, ...] | None) -> set[str]:
    """These nodes and all below them, over the edges of these names."""
    found: set[str] = set()
    todo = [name for name in names if name in graph.nodes]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        below = graph.nodes[name].children.items()
        todo += [n for edge, n in below if n in graph.nodes and (edges is None or edge in edges)]
    return found


def _same_file(case: Case, own: set[str], inside: set[str]) -> Iterator[str]:
    """Other protocol nodes that have the same file open."""
    hosted = [n for n in own if case.graph.nodes[n].driver in HOST_FILES]
    names = {str(case.graph.nodes[n].raw.get("file")) for n in hosted}
    files = {identity for n in hosted if (identity := _identity(case, case.graph.nodes[n]))}
    for name, node in case.graph.nodes.items():
        if name in inside or node.driver not in HOST_FILES:
            continue
        if str(node.raw.get("file")) in names or _identity(case, node) in files:
            yield name


def _identity(case: Case, node: Node) -> FileId | None:
    path = case.place(node).path
    return file_id(path) if path else None


def _uppermost(graph: BlockGraph, name: str, inside: set[str]) -> list[tuple[str, bool]]:
    """The nodes over `name` that have nothing over them, and whether anything uses them."""
    found, todo, seen = [], [(name, False)], {name}
    while todo:
        here, used = todo.pop()
        used = used or any(_attached(graph, here))
        above = [p for p in graph.parents.get(here, ()) if p not in inside]
        if not above:
            found.append((here, used))
        todo += [(p, used) for p in above if p not in seen]
        seen.update(above)
    return sorted(found)


def _attached(graph: BlockGraph, name: str) -> Iterator[str]:
    """The devices, exports and jobs that use a node itself."""
    for device in graph.devices:
        if (device.get("inserted") or {}).get("node-name") == name:
            yield f"the device {device.get('qdev') or device.get('device')}"
    for export in graph.exports:
        if export.get("node-name") == name:
            yield f"the export '{export.get('id')}'"
    for job in graph.jobs.values():
        if name in job.nodes.values():
            yield f"the job '{job.id}'"


def _describe(graph: BlockGraph, name: str) -> str:
    layer = graph.below_filters(name) or name
    kind = "filter" if graph.nodes[name].driver in FILTERS else "node"
    users = list(_attached(graph, name))
    used = f" of {' and '.join(users)}" if users else " (blockdev-del closes it)"
    return f"the {kind} '{name}' ({graph.nodes[layer].raw.get('file')}){used}"


def _locks(case: Case) -> Iterator[Finding]:
    base = case.plan.base
    if not case.probe_locks and base.read_only:
        return  # QEMU opens it for writing when the job begins, and is told of any lock then
    place = case.place(case.graph.leaf(base.node_name))
    if not place.path:
        yield unchecked("base-shared", f"locks of other processes: {place.reason}")
        return
    locks = image_locks(place.path, case.pid, case.opened.of_process(case.pid))
    if locks.held == "others":
        who = ", ".join(locks.holders) or "a process that can't be seen from here"
        yield refused(
            "base-shared",
            f"{base.filename} is locked by another process: {who}; what it reads there would"
            " change under it, and QEMU can't write to it before it is closed",
        )
    elif locks.held == "unknown":
        yield unchecked(
            "base-shared",
            f"{base.filename} is locked, but it can't be told from here whether by QEMU alone",
        )
