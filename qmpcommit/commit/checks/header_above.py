"""Whether QEMU can write the new backing name into the overlays above the merged layers.

At the end of an intermediate commit it rewrites the header of each overlay over top. Where one
can't be written QEMU ends by SIGSEGV, and the guest with it (5.2 to 11.1).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from qmpcommit.block.chain import Image, read_image
from qmpcommit.block.files import image_locks, opened_for_writing, read_only_because
from qmpcommit.block.graph import FILTERS, BlockGraph, Node
from qmpcommit.block.identity import HOST_FILES, file_id
from qmpcommit.block.qcow2 import LONGEST_NAME, name_room
from qmpcommit.commit.checks.finding import Case, Finding, image_data, refused
from qmpcommit.commit.checks.read_only import declared, is_on

NAME = "header-above"

_REWRITABLE = ("qcow2", "qed")
"""The formats whose backing name QEMU can change."""

_JOBS_OWN = ("commit_top", "mirror_top")
"""Filters that go with their job."""


def header_above(case: Case) -> Iterator[Finding]:
    """The overlays over top whose headers get the base's name."""
    if case.plan.two_phase:
        return  # it ends without a header being written
    name = written_name(case)
    for node, between in overlays_above(case.graph, case.plan.top.node_name):
        image = read_image(case.graph, node.name)
        if between:
            yield refused(
                NAME,
                f"{image.filename} lies over {case.plan.top.filename} through the filter"
                f" '{between}', and QEMU does not change its backing name through a filter: started"
                " from its files, the VM would still need the layers that are merged away. Remove"
                " the filter first",
            )
            continue
        why = _no_name(node, case, image, name) or _no_format(case, node, image)
        if why:
            yield Finding(NAME, "refuse", why, final=True)
            continue
        why = _replaced(case, node) if node.raw.get("ro") else ""
        if why:
            yield Finding(
                NAME, "refuse",
                f"at its end QEMU would open {image.filename} by its name to write its header, into"
                f" what has that name now: {why}. Put that file back under its name",
                final=True,
            )  # fmt: skip
            continue
        why, known = _not_writable(case, node) if node.raw.get("ro") else ("", True)
        if why and known:
            yield refused(
                NAME,
                f"at its end QEMU would write the base's name into the header of {image.filename},"
                f" and would crash, and the guest with it, since it can't: {why}",
            )
        elif why:
            yield Finding(
                NAME, "note",
                f"QEMU will write into the header of {image.filename}, and it is not known from"
                f" here whether it can: {why}",
            )  # fmt: skip


def written_name(case: Case) -> str:
    """The backing name that the headers above will get."""
    return str(case.plan.arguments.get("backing-file") or case.plan.base.shown)


def overlays_above(graph: BlockGraph, top: str) -> list[tuple[Node, str]]:
    """The overlays that lie over a layer, each with a filter that lies between (or "")."""
    found: list[tuple[Node, str]] = []
    todo, seen = [(top, "")], {top}
    while todo:
        name, between = todo.pop()
        for parent in sorted(graph.parents.get(name, ())):
            node = graph.nodes[parent]
            if parent in seen:
                continue
            if node.driver in FILTERS and node.below == name:
                todo.append((parent, between or ("" if node.driver in _JOBS_OWN else parent)))
            elif node.driver not in FILTERS and node.children.get("backing") == name:
                found.append((node, between))
            seen.add(parent)
    return sorted(found, key=lambda each: each[0].name)


def _no_name(node: Node, case: Case, image: Image, name: str) -> str:
    """Why the name does not fit into the header; "" where it does."""
    length, room = len(os.fsencode(name)), LONGEST_NAME
    place = case.place(case.graph.leaf(node.name))
    if place.path and node.driver == "qcow2":
        found = name_room(place.path, _format(case))
        room = room if found is None else found
    if length <= room:
        return ""
    shown = name if length < 200 else f"{name[:80]}...{name[-80:]}"
    return (
        f"the base's name as {image.filename} must have it has {length} bytes ('{shown}'), but that"
        f" header has room for {room}: QEMU would crash at the end, and the guest with it."
        " A relative name may be shorter (keep_relative), or give the base a"
        " shorter path"
    )


def _format(case: Case) -> str:
    """The backing format that QEMU writes beside the name."""
    return "raw" if "backing-mask-protocol" in case.plan.arguments else case.plan.base.driver


def _no_format(case: Case, node: Node, image: Image) -> str:
    """Why this format can't be given another backing name."""
    what = image.filename
    if node.driver not in _REWRITABLE:
        return (
            f"{what} lies over {case.plan.top.filename}, and QEMU can't change the backing name of"
            f" a {node.driver} image: it would crash at the end, and the guest with it. Commit from"
            " the active layer instead"
        )
    if image_data(case.graph, node.name).get("data-file-raw"):
        return (
            f"{what} lies over {case.plan.top.filename} and has a raw external data file"
            " (data_file_raw), with which its header can name no backing file: QEMU would crash at"
            " the end, and the guest with it. Commit from the active layer instead"
        )
    return ""


def _not_writable(case: Case, node: Node) -> tuple[str, bool]:
    """Why QEMU can't reopen a read-only overlay for writing, and whether that is known.

    It reopens the format node, and with it the nodes of its file that have their mode from it.
    A file that it has open for reading only is opened again, by its name.
    """
    graph = case.graph
    leaf = graph.leaf(node.name)
    why, known = _declared_so(case, node, leaf)
    if why and known:
        return why, True
    if leaf.driver not in HOST_FILES or not case.pid:
        return why, False
    trouble = _not_by_name(case, leaf) or _in_use(case, node, leaf)
    return (trouble, True) if trouble else (why, False)


def _declared_so(case: Case, node: Node, leaf: Node) -> tuple[str, bool]:
    """Whether a node of its file was given ``read-only=on`` itself, so that it stays so."""
    if not leaf.raw.get("ro"):
        return "", True
    above, known = declared(node.name, case.pid), False
    for name in _files(case.graph, node):
        own = declared(name, case.pid)
        if is_on((above or {}).get("file.read-only")) or is_on((own or {}).get("read-only")):
            return (
                f"its node '{name}' was opened with read-only=on: blockdev-reopen it and"
                f" '{node.name}' with read-only off first"
            ), True
        known = known or own is not None
    if above is None and not known and not leaf.name.startswith("#block"):
        return f"its node '{leaf.name}' is read-only, perhaps of its own", False
    return "", True


def _replaced(case: Case, node: Node) -> str:
    """Whether its name leads to another file than QEMU has open."""
    leaf = case.graph.leaf(node.name)
    if leaf.driver not in HOST_FILES:
        return ""
    told = case.opened.named(str(leaf.raw.get("file")))
    return told.reason if told.verdict == "other" else ""


def _not_by_name(case: Case, leaf: Node) -> str:
    """Why its name does not open the same file for writing."""
    filename = str(leaf.raw.get("file"))
    pid = case.pid or 0
    place = case.place(leaf)
    if place.path:
        file = file_id(place.path)
        if file is not None and not leaf.raw.get("ro") and opened_for_writing(pid, file):
            return ""
        return read_only_because(place.path, pid)
    told = case.opened.named(filename)
    return told.reason if told.verdict == "gone" else ""


def _in_use(case: Case, node: Node, leaf: Node) -> str:
    """Who else has the file open and wants nobody to write to it."""
    graph, place = case.graph, case.place(leaf)
    if not place.path:
        return ""
    file = file_id(place.path)
    own = {node.name, *_files(graph, node)}
    beside = [p for p in graph.parents.get(leaf.name, ()) if p not in own]
    for other in graph.nodes.values():
        if other.name != leaf.name and other.driver in HOST_FILES and file is not None:
            at = case.place(other).path
            if at and file_id(at) == file:
                beside += graph.parents.get(other.name, ())
    if beside:
        return f"this QEMU has it open once more, as {', '.join(sorted(set(beside)))}"
    locks = image_locks(place.path, case.pid, case.opened.of_process(case.pid))
    if locks.held == "others":
        who = ", ".join(locks.holders) or "a process that can't be seen from here"
        return f"it is locked by another process, {who}; wait until that has closed it"
    return ""


def _files(graph: BlockGraph, node: Node) -> Iterator[str]:
    """The nodes between a format node and what holds its bytes."""
    below = node.children.get("file")
    while below is not None and below in graph.nodes:
        yield below
        below = graph.nodes[below].below
