"""QEMU's block graph, read from three queries: nodes, the edges between them, who uses them.

``query-named-block-nodes`` tells each node (flat: the nested form grows with the square of a
chain), ``query-block`` and ``query-block-exports`` who uses them, and
``x-debug-query-block-graph`` (in every QEMU since 4.0) the edges, which no other query of
older QEMUs gives: children, and which nodes a block job holds as source and target.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from qmpcommit.errors import CommandRefused
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import all_of

Raw = Mapping[str, Any]

FILTERS = frozenset(
    (
        "blkdebug",
        "blklogwrites",
        "blkreplay",
        "blkverify",
        "commit_top",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "backup-top",
        "mirror_top",
        "preallocate",
        "replication",
        "snapshot-access",
        "throttle",
    )
)
"""Drivers that pass their one child's contents through and are no layer of a chain."""

FDSET = "/dev/fdset/"
"""What the name of a file begins with that QEMU was given open (``add-fd``)."""

CLAIMED, CLAIMER = "qmpcommit-claim-", "qmpc-"
"""What the names of the nodes begin with that only tell who works on a disk."""


_OF_JOBS = frozenset(("backup-top", "commit_top", "mirror_top"))


class Node(NamedTuple):
    """One node of the graph; `raw` is QEMU's BlockDeviceInfo."""

    name: str
    driver: str
    raw: Raw
    children: Mapping[str, str]

    @property
    def below(self) -> str | None:
        """The one child whose contents a filter shows."""
        for edge in ("file", "backing", "image", "test"):
            if edge in self.children:
                return self.children[edge]
        return None


def _is_hidden(node: Node) -> bool:
    return node.driver in FILTERS and node.name.startswith("#")


class JobNodes(NamedTuple):
    """The nodes that a block job holds, by the names of QEMU's edges."""

    id: str
    nodes: Mapping[str, str]

    @property
    def changed(self) -> set[str]:
        """The nodes whose contents the job moves: not the disk's root, if only that is called so.

        A commit of an intermediate layer has the root that it was given as its main node.
        """
        held = dict(self.nodes)
        if "intermediate node" in held:
            held.pop("main node", None)
        return set(held.values())

    @property
    def source(self) -> str | None:
        """The layer that is copied (an active commit names it so)."""
        return self.nodes.get("source")

    @property
    def target(self) -> str | None:
        """The layer that is written."""
        return self.nodes.get("target")


class BlockGraph(NamedTuple):
    """Nodes, users and jobs, as they were at one moment.

    `claims` are the names of the nodes that tell who works on a disk; they are none of `nodes`.
    """

    nodes: Mapping[str, Node]
    devices: tuple[Raw, ...]
    exports: tuple[Raw, ...]
    jobs: Mapping[str, JobNodes]
    parents: Mapping[str, frozenset[str]]
    fdsets: Mapping[str, tuple[int, ...]] = {}
    """Of files that QEMU was given open (``/dev/fdset/N``): its descriptors of them."""
    given: Mapping[str, str] = {}
    """What those files are called on this host, where they have a name."""
    cwd: str | None = None
    """QEMU's working directory, from which relative file names count, where it is known."""
    real: Mapping[str, str] = {}
    """For names that lead through other folders (``/a/../b/x``): the same without that."""
    claims: frozenset[str] = frozenset()

    def below_filters(self, name: str | None) -> str | None:
        """The first node at or under `name` that is not a filter."""
        seen: set[str] = set()
        while name is not None and name in self.nodes and name not in seen:
            seen.add(name)
            if self.nodes[name].driver not in FILTERS:
                return name
            name = self.nodes[name].below
        return None

    def filters(self, name: str | None) -> list[str]:
        """The filters from `name` down to the first node that is none."""
        found: list[str] = []
        while name is not None and name in self.nodes and name not in found:
            if self.nodes[name].driver not in FILTERS:
                break
            found.append(name)
            name = self.nodes[name].below
        return found

    def chain(self, name: str | None) -> list[str]:
        """The layers from `name` down, filters seen through, active layer first."""
        found: list[str] = []
        layer = self.below_filters(name)
        while layer is not None and layer not in found:
            found.append(layer)
            layer = self.below_filters(self.nodes[layer].children.get("backing"))
        return found

    def used_by(self, name: str) -> str:
        """The node by which whoever uses `name` uses it: QEMU does not show a job's filter."""
        while True:
            above = [
                p
                for p in self.parents.get(name, ())
                if self.nodes[p].below == name
                and (self.nodes[p].driver in _OF_JOBS or _is_hidden(self.nodes[p]))
            ]
            if len(above) != 1:
                return name
            name = above[0]

    def kept_filters(self, name: str | None) -> tuple[str, ...]:
        """The filters from `name` down, where a commit into what is below can go through them."""
        found = self.filters(name)
        kept = all(self.nodes[each].driver in ("throttle", "copy-on-read") for each in found)
        return tuple(found) if kept else ()

    def root(self, name: str) -> str:
        """The topmost node over `name`: the filters above it included, whoever uses them."""
        seen = {name}
        while True:
            above = [
                p
                for p in self.parents.get(name, ())
                if self.nodes[p].driver in FILTERS and p not in seen and self.nodes[p].below == name
            ]
            if not above:
                return name
            name = min(above)
            seen.add(name)

    def file(self, node: Node) -> str:
        """The name of the file that a node shows: absolute, where it is a host file's.

        QEMU puts the names of a chain together from those in the headers, so that they may lead
        through the folders of layers that are merged away and deleted.
        """
        return self.full(str(node.raw.get("file") or ""))

    def full(self, name: str) -> str:
        """The name of a file by which QEMU has it open, as `file` gives it for the node."""
        name = os.path.join(self.cwd, name) if self.cwd and is_plain(name) else name
        return self.real.get(name, name)

    def leaf(self, name: str) -> Node:
        """The protocol node at the bottom of a layer: what holds its bytes."""
        node = self.nodes[name]
        seen = {name}
        while True:
            below = node.below if node.driver in FILTERS else node.children.get("file")
            if below is None or below in seen or below not in self.nodes:
                return node
            node = self.nodes[below]
            seen.add(below)


async def read_graph(monitor: Monitor) -> BlockGraph:
    """Ask QEMU for its whole block graph: read-only queries, which are sent at once.

    Raises `ProtocolViolation` where an answer has another shape than QEMU's.
    """
    with monitor.sensible("the queries of its block graph"):
        if not monitor.creates_nothing:
            await _optional(monitor, "query-jobs", [])
        asked = asyncio.ensure_future(_nodes(monitor))

        async def behind(command: str, otherwise: Any) -> Any:
            if not monitor.creates_nothing:  # the nodes are waited for: nothing is older than they
                await asyncio.wait({asked})
            return await _optional(monitor, command, otherwise)

        nodes, devices, exports, edges = await all_of(
            asked,
            behind("query-block", []),
            behind("query-block-exports", []),
            behind("x-debug-query-block-graph", None),
        )
        _check_users([*devices, *exports, *(d.get("inserted") or {} for d in devices)])
        graph = build_graph(nodes, devices, exports, edges)
        if any(FDSET in str(node.get("file")) for node in nodes):
            sets = await _optional(monitor, "query-fdsets", [])
            numbers = _descriptors(sets)
            given = await asyncio.to_thread(given_names, numbers, monitor.peer_pid)
            graph = graph._replace(fdsets=numbers, given=given)
        graph = graph._replace(cwd=working_directory(monitor.peer_pid))
        joined = {name for node in graph.nodes.values() if "/../" in (name := graph.file(node))}
        if not joined:
            return graph
        real = await asyncio.to_thread(_real_names, joined, monitor.peer_pid)
        return graph._replace(real=real)


def _real_names(names: Iterable[str], pid: int | None) -> dict[str, str]:
    """On real folders, where these names of QEMU's (process `pid`) lead somewhere here."""
    from qmpcommit.block.identity import names_are_ours

    found = {}
    if names_are_ours(pid):
        for name in names:
            folder, file = os.path.split(name)
            real = os.path.join(os.path.realpath(folder), file)
            with suppress(OSError):
                if os.path.samefile(real, name):
                    found[name] = real
    return found


def given_names(fdsets: Mapping[str, tuple[int, ...]], pid: int | None) -> dict[str, str]:
    """What the files of these sets, which QEMU (process `pid`) was given open, are called here."""
    found = {}
    for name, numbers in fdsets.items():
        links = [f"/proc/{pid}/fd/{number}" for number in numbers if pid]
        try:
            paths = {os.readlink(link) for link in links}
            if len(paths) == 1 and os.path.samefile(links[0], *paths):
                found[name] = paths.pop()
        except OSError:
            continue
    return found


def working_directory(pid: int | None) -> str | None:
    """A process's, as its path is from here; None where it can't be known."""
    try:
        path = os.readlink(f"/proc/{pid}/cwd") if pid else None
        removed = (
            path is not None
            and path.endswith(" (deleted)")  # else its storage is not asked, which may hang
            and os.stat(f"/proc/{pid}/cwd").st_nlink == 0
        )
    except OSError:
        return None
    return None if removed else path


def is_plain(filename: str) -> bool:
    """Whether it is a host file's name: with a colon before any slash it is a URI."""
    return bool(filename) and ":" not in filename.split("/", maxsplit=1)[0]


def _descriptors(sets: Iterable[Raw]) -> dict[str, tuple[int, ...]]:
    return {f"{FDSET}{s['fdset-id']}": tuple(fd["fd"] for fd in s["fds"]) for s in sets}


def _check_users(users: Iterable[Raw]) -> None:
    """Raises TypeError where one is no object, or its node's name is no text."""
    for user in users:
        if not isinstance(user, Mapping) or not isinstance(user.get("node-name", ""), str):
            raise TypeError(f"no user of a node: {user!r:.200}")


async def _nodes(monitor: Monitor) -> Any:
    try:
        return await monitor.execute("query-named-block-nodes", {"flat": True})
    except CommandRefused:  # QEMU before 5.0 has no such argument
        return await monitor.execute("query-named-block-nodes")


async def _optional(monitor: Monitor, command: str, otherwise: Any) -> Any:
    try:
        return await monitor.execute(command)
    except CommandRefused as error:
        if error.error_class != "CommandNotFound":
            raise  # half a graph would be taken for the whole
        return otherwise


def build_graph(
    nodes: Iterable[Raw], devices: Iterable[Raw], exports: Iterable[Raw], edges: Raw | None
) -> BlockGraph:
    """Put the replies together; pure, so that recordings can be read as well."""
    raw = {node["node-name"]: node for node in nodes if node.get("node-name")}
    claims = frozenset(name for name in raw if name.startswith((CLAIMED, CLAIMER)))
    for name in claims:
        del raw[name]
    children: dict[str, dict[str, str]] = {
        name: {c["child"]: c["node-name"] for c in node.get("children") or () if "node-name" in c}
        for name, node in raw.items()
    }
    jobs: dict[str, dict[str, str]] = {}
    if edges is not None:
        names = {vertex["id"]: vertex for vertex in edges["nodes"]}
        for edge in edges["edges"]:
            parent, child = names[edge["parent"]], names[edge["child"]]
            if parent["type"] == "block-driver" and parent["name"] in children:
                children[parent["name"]].setdefault(edge["name"], child["name"])
            elif parent["type"] == "block-job":
                held, name = jobs.setdefault(parent["name"], {}), edge["name"]
                if name in held:  # a commit calls each layer above its base "intermediate node"
                    name = f"{name} {len(held)}"
                held[name] = child["name"]
    elif not any(children.values()):
        _guess_children(raw, children)
    parents: dict[str, set[str]] = {}
    for name, down in children.items():
        for child_name in down.values():
            parents.setdefault(child_name, set()).add(name)
    return BlockGraph(
        nodes={n: Node(n, str(r.get("drv", "?")), r, children[n]) for n, r in raw.items()},
        devices=tuple(devices),
        exports=tuple(exports),
        jobs={job: JobNodes(job, held) for job, held in jobs.items()},
        parents={name: frozenset(up) for name, up in parents.items()},
        claims=claims,
    )


def _guess_children(raw: Mapping[str, Raw], children: dict[str, dict[str, str]]) -> None:
    """Join nodes by file names, for a QEMU that tells no edges at all."""
    by_file: dict[str, list[str]] = {}
    for name, node in raw.items():
        by_file.setdefault(str(node.get("file")), []).append(name)
    for name, node in raw.items():
        backing = by_file.get(str(node.get("backing_file") or "")) or ()
        layers = [n for n in backing if n != name and "cluster-size" in raw[n].get("image", {})]
        if node.get("backing_file") and len(layers) == 1:
            children[name]["backing"] = layers[0]
