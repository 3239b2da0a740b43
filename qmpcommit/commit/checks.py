"""What can be known to go wrong, looked at before the first byte is written.

`check_commit` compares a plan with QEMU's block graph and with the files on this host and
tells what it found; `refuse` turns what speaks against the commit into one error. Each check
has a name, by which it can be overridden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from qmpcommit.block.chain import Image
from qmpcommit.block.files import (
    FileId,
    Place,
    device_size,
    file_id,
    free_space,
    image_locks,
    is_block_device,
    locate,
    read_header,
    read_only_because,
    used_end,
)
from qmpcommit.block.graph import FILTERS, BlockGraph, Node, Raw
from qmpcommit.commit.plan import Plan
from qmpcommit.errors import ChainError, InvalidRequest, NoSpace
from qmpcommit.units import show_size
from qmpcommit.values import Record, record

NAMES = (
    "free-space",
    "size",
    "base-shared",
    "read-only-base",
    "corrupt",
    "encrypted",
    "on-disk-backing",
)
"""The names of all checks, in the order in which they are told."""

_ABOUT_SPACE = frozenset(("free-space", "size"))
_HOST_FILES = frozenset(("file", "host_device", "host_cdrom"))
_DEVICES = frozenset(("host_device", "host_cdrom"))
_GROWING_FORMATS = frozenset(("raw", "qcow2", "qed", "luks", "parallels"))
_GROWING_PROTOCOLS = frozenset(("file", "rbd", "ssh", "gluster", "nfs"))
_COPIED_AT_ONCE = 65536
"""What the job copies at the least where the base has no clusters (one bit of its bitmap)."""


@record
class Finding(Record):
    """What one check found: "refuse" speaks against the commit, a "note" should be known.

    A check that could not be made is a note that says why. `numbers` are those of the message,
    in bytes.
    """

    name: str
    level: Literal["ok", "note", "refuse"]
    message: str
    numbers: dict[str, int] = field(default_factory=dict)


class _Case(NamedTuple):
    """What every check is given."""

    graph: BlockGraph
    plan: Plan
    pid: int | None
    cwd: str | None
    probe_locks: bool = True

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
        if node.driver not in _HOST_FILES:
            return Place("", f"it is on {node.driver}, not in a file of this host")
        return locate(str(node.raw.get("file")), pid=self.pid, cwd=self.cwd)


def check_commit(
    graph: BlockGraph,
    plan: Plan,
    *,
    pid: int | None = None,
    cwd: str | None = None,
    probe_locks: bool = True,
) -> list[Finding]:
    """All checks of a plan against the graph that it was made from; nothing is changed.

    `pid` is QEMU's (without it, nothing is looked at on this host), `cwd` its working
    directory. Whose the locks on a base are that QEMU does not write to yet costs the kernel
    some 20 ms to tell; without `probe_locks` it is left to QEMU, which refuses a base that
    another process has locked. Looks at files, so that it belongs in a thread. Findings come in
    the order of `NAMES`; a check may have several.
    """
    if not {plan.base.node_name, plan.top.node_name} <= graph.nodes.keys():
        return [Finding(name, "note", "not checked: the layers are not known") for name in NAMES]
    case = _Case(graph, plan, pid, cwd, probe_locks)
    checks = (
        _free_space, _size, _base_shared, _read_only_base, _corrupt, _encrypted, _on_disk_backing,
    )  # fmt: skip
    findings: list[Finding] = []
    for name, check in zip(NAMES, checks, strict=True):
        try:
            found = list(check(case))
        except OSError as error:
            found = [_unchecked(name, f"{error.filename or 'a file'}: {error.strerror}")]
        findings += found or [Finding(name, "ok", "nothing speaks against it")]
    return findings


def refuse(findings: Iterable[Finding], overridden: Collection[str] = ()) -> None:
    """Raise one error that names all failed checks which are not overridden.

    `NoSpace` where only space is missing, else `ChainError`; `InvalidRequest` for a name in
    `overridden` that no check has.
    """
    unknown = sorted(set(overridden) - set(NAMES))
    if unknown:
        raise InvalidRequest(
            f"there is no check {', '.join(map(repr, unknown))}; those that can be overridden are"
            f" {', '.join(NAMES)}. Nothing was sent"
        )
    failed = [f for f in findings if f.level == "refuse" and f.name not in overridden]
    if not failed:
        return
    kind = NoSpace if all(f.name in _ABOUT_SPACE for f in failed) else ChainError
    told = " ".join(f"[{f.name}] {f.message}." for f in failed)
    raise kind(
        f"{told} Nothing was sent",
        checks=list(dict.fromkeys(f.name for f in failed)),
        findings=[f.model_dump(mode="json") for f in failed],
    )


def _refused(name: str, message: str, **numbers: int) -> Finding:
    return Finding(name, "refuse", f"{message} (override '{name}' to commit anyway)", numbers)


def _unchecked(name: str, reason: str, **numbers: int) -> Finding:
    return Finding(name, "note", f"not checked: {reason}", numbers)


# -- room -----------------------------------------------------------------------------------------


def _free_space(case: _Case) -> Iterator[Finding]:
    """What the base may grow by, against the room under it."""
    base = case.plan.base
    node = case.storage(base.node_name)
    data, needed = growth(case.graph, case.plan)
    place = case.place(node)
    if not place.path:
        yield _unchecked("free-space", place.reason, needed=needed)
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
            yield _unchecked("free-space", f"it is not known what {base.filename} uses of its"
                             f" {show_size(size)}", needed=needed)  # fmt: skip
            return
        free = max(0, size - used_end(place.path, header))
        where = f"the block device {place.path} of {show_size(size)}"
        what = f"the base in it may grow by {show_size(needed)}"
    numbers = {"needed": needed, "free": free, "data": data}
    if needed <= free:
        yield Finding("free-space", "ok", f"{what}, and {where} has {show_size(free)}", numbers)
        return
    yield _refused(
        "free-space",
        f"{what} ({needed} bytes; the layers above it hold {show_size(data)}), but {where} has"
        f" only {show_size(free)} left ({free} bytes): make room for {show_size(needed - free)},"
        " or commit fewer layers",
        **numbers,
    )


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
    return max(512, cluster // 32 if _data(graph, layer.node_name).get("extended-l2") else cluster)


def _metadata(copied: int, size: int, info: Raw) -> int:
    """What a qcow2 needs besides `copied` bytes of data, wherever in `size` they are written."""
    cluster = int(info.get("cluster-size") or 65536)
    data: Raw = (info.get("format-specific") or {}).get("data") or {}
    entry = 16 if data.get("extended-l2") else 8
    clusters = -(-copied // cluster)
    tables = min(clusters, -(-size // (cluster // entry * cluster)))
    counts = -(-(clusters + tables) * int(data.get("refcount-bits") or 16) // 8 // cluster)
    return (tables + counts + 2) * cluster if clusters else 0


def _size(case: _Case) -> Iterator[Finding]:
    """QEMU makes a smaller base as large as the overlay; not every base can be."""
    base, wanted = case.plan.base, case.plan.top.virtual_size
    have = base.virtual_size
    if wanted is None or have is None:
        yield _unchecked("size", "QEMU does not tell the virtual sizes")
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
        yield _refused(
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


def _why_fixed(case: _Case) -> str:
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


# -- others who use the base --------------------------------------------------------------------


def _base_shared(case: _Case) -> Iterator[Finding]:
    """Whoever else reads a layer that the commit changes: the base and those between.

    An overlay that nothing uses (left over from an earlier commit) is a note, as QEMU does not
    mind it either; another node of the same file has a lock on it, used or not.
    """
    changed = [case.plan.base, *case.plan.between]
    inside = _down(case.graph, [case.plan.disk.root, case.plan.top.node_name], edges=None)
    for image in changed:
        users, idle = _users(case, image, inside)
        if users:
            yield _refused(
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


def _users(case: _Case, image: Image, inside: set[str]) -> tuple[list[str], list[str]]:
    """What uses a layer beside this disk's chain, and what lies over it unused."""
    graph = case.graph
    own = _down(graph, [image.node_name], edges=("file", "data-file"))
    over = {p for name in own for p in graph.parents.get(name, ()) if p not in inside}
    same = set(_same_file(case, own, inside))
    users = {user: None for name in sorted(own) for user in _attached(graph, name)}
    idle: dict[str, None] = {}
    for name in sorted(over | same):
        for top, used in _uppermost(graph, name, inside):
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


def _same_file(case: _Case, own: set[str], inside: set[str]) -> Iterator[str]:
    """Other protocol nodes that have the same file open."""
    hosted = [n for n in own if case.graph.nodes[n].driver in _HOST_FILES]
    names = {str(case.graph.nodes[n].raw.get("file")) for n in hosted}
    files = {identity for n in hosted if (identity := _identity(case, case.graph.nodes[n]))}
    for name, node in case.graph.nodes.items():
        if name in inside or node.driver not in _HOST_FILES:
            continue
        if str(node.raw.get("file")) in names or _identity(case, node) in files:
            yield name


def _identity(case: _Case, node: Node) -> FileId | None:
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


def _locks(case: _Case) -> Iterator[Finding]:
    base = case.plan.base
    if not case.probe_locks and base.read_only:
        return  # QEMU opens it for writing when the job begins, and is told of any lock then
    place = case.place(case.graph.leaf(base.node_name))
    if not place.path:
        yield _unchecked("base-shared", f"locks of other processes: {place.reason}")
        return
    locks = image_locks(place.path, case.pid)
    if locks.held == "others":
        who = ", ".join(locks.holders) or "a process that can't be seen from here"
        yield _refused(
            "base-shared",
            f"{base.filename} is locked by another process: {who}; what it reads there would"
            " change under it, and QEMU can't write to it before it is closed",
        )
    elif locks.held == "unknown":
        yield _unchecked(
            "base-shared",
            f"{base.filename} is locked, but it can't be told from here whether by QEMU alone",
        )


# -- the base can't be written --------------------------------------------------------------------


def _read_only_base(case: _Case) -> Iterator[Finding]:
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
        yield _refused("read-only-base", f"the base {base.filename} can't be written: {why}")
        return
    if not leaf.raw.get("ro"):
        return
    declared = _declared_read_only(leaf.name, case.pid)
    if declared:
        yield _refused(
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
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:
        return None
    for option, value in pairwise(words):
        if option in ("-blockdev", "--blockdev"):
            found = _declared(value, name)
            if found is not None:
                return found
    return None


def _declared(value: str, name: str) -> bool | None:
    """The ``read-only`` beside this ``node-name``, in either form of ``-blockdev``."""
    options: dict[str, Any] = {}
    if value.startswith("{"):
        try:
            _flatten("", json.loads(value), options)
        except ValueError:
            return None
    else:
        for part in value.replace(",,", "\0").split(","):
            key, _, given = part.partition("=")
            options[key] = given.replace("\0", ",")
    for key, given in options.items():
        if given == name and (key == "node-name" or key.endswith(".node-name")):
            said = options.get(key.removesuffix("node-name") + "read-only")
            return said is True or said in ("on", "yes", "true", "y")
    return None


def _flatten(prefix: str, value: object, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), item, into)
    else:
        into[prefix] = value


# -- what the layers are --------------------------------------------------------------------------


def _data(graph: BlockGraph, name: str) -> Raw:
    info: Raw = graph.nodes[name].raw.get("image") or {}
    return (info.get("format-specific") or {}).get("data") or {}


def _corrupt(case: _Case) -> Iterator[Finding]:
    layers = (*case.layers, case.plan.base)
    found = [i for i in layers if _data(case.graph, i.node_name).get("corrupt")]
    if found:
        yield _refused(
            "corrupt",
            f"marked corrupt: {', '.join(image.filename for image in found)}; its data can't be"
            " trusted, and QEMU does not write to it: shut the VM down and run qemu-img check"
            " (-r repairs) on it",
        )


def _encrypted(case: _Case) -> Iterator[Finding]:
    """Plain text must not end up in a base that is not encrypted, nor the other way round."""
    base = case.plan.base
    keys = {image.node_name: _key(case.graph, image.node_name) for image in (*case.layers, base)}
    if not any(keys.values()):
        return
    told = ", ".join(
        f"{image.filename}: {keys[image.node_name] or 'not encrypted'}"
        for image in (*case.layers, base)
    )
    if len({bool(key) for key in keys.values()}) > 1:
        yield _refused(
            "encrypted",
            "encrypted and plain layers would be merged, and the base holds the data in its own"
            f" way afterwards ({told})",
        )
        return
    yield Finding(
        "encrypted", "note",
        f"the data are decrypted and encrypted again with the base's own key ({told})",
    )  # fmt: skip


def _key(graph: BlockGraph, name: str) -> str:
    """How a layer is encrypted; "" for not at all."""
    node = graph.nodes[name]
    info: Raw = node.raw.get("image") or {}
    if not (info.get("encrypted") or node.raw.get("encrypted") or node.driver == "luks"):
        return ""
    own = _data(graph, name).get("encrypt") or _data(graph, name)
    return str(own.get("format") or ("luks" if node.driver == "luks" else "encrypted"))


def _on_disk_backing(case: _Case) -> Iterator[Finding]:
    """What the files say of the chain, which is what the next start of the VM goes by."""
    chain = case.plan.disk.chain
    names = [image.node_name for image in chain]
    if case.plan.base.node_name not in names:
        yield _unchecked("on-disk-backing", "the base is not in the disk's chain")
        return
    last = names.index(case.plan.base.node_name)
    for overlay, below in pairwise(chain[: last + 1]):
        if overlay.node_name not in case.graph.nodes or below.node_name not in case.graph.nodes:
            continue
        for source, written, full in _written(case, overlay):
            if not written:
                yield Finding(
                    "on-disk-backing", "note",
                    f"{overlay.filename} names no backing file itself ({source}), while QEMU has"
                    f" {below.filename} under it: a start of the VM must give the whole chain",
                )  # fmt: skip
                break
            if not _means(case, full, below):
                yield _refused(
                    "on-disk-backing",
                    f"{overlay.filename} names '{written}' as its backing file ({source}), but"
                    f" QEMU has {below.filename} under it: started from its files, the VM would"
                    " have another disk. qemu-img rebase -u repairs the name while the VM is off",
                )
                break


def _written(case: _Case, overlay: Image) -> Iterator[tuple[str, str, str]]:
    """The backing names of a layer: who says so, as written, and in full."""
    leaf = case.graph.leaf(overlay.node_name)
    place = case.place(leaf)
    if place.path and overlay.driver == "qcow2":
        try:
            header = read_header(place.path)
        except OSError:
            header = None
        if header is not None:
            folder = os.path.dirname(str(leaf.raw.get("file")))
            yield "its header on disk", header.backing, _full(header.backing, folder)
    info: Raw = case.graph.nodes[overlay.node_name].raw.get("image") or {}
    written = str(info.get("backing-filename") or "")
    yield "as QEMU read it", written, str(info.get("full-backing-filename") or written)


def _full(name: str, folder: str) -> str:
    if not name or name.startswith("json:") or ":" in name.split("/", maxsplit=1)[0]:
        return name
    return os.path.join(folder, name)


def _means(case: _Case, name: str, image: Image) -> bool:
    """Whether a backing file's name means this layer."""
    leaf = case.graph.leaf(image.node_name)
    opened = str(leaf.raw.get("file"))
    if name in (image.shown, image.filename, opened):
        return True
    name = _plain(name)
    if name == opened:
        return True
    if leaf.driver not in _HOST_FILES or not name or ":" in name.split("/", maxsplit=1)[0]:
        return False
    cwd = case.cwd or os.getcwd()
    if os.path.normpath(os.path.join(cwd, name)) == os.path.normpath(os.path.join(cwd, opened)):
        return True
    here, there = case.place(leaf), locate(name, pid=case.pid, cwd=case.cwd)
    if here.path and there.path:
        return file_id(here.path) == file_id(there.path)
    if not case.pid:
        return os.path.realpath(os.path.join(cwd, name)) == os.path.realpath(
            os.path.join(cwd, opened)
        )
    return False


def _plain(name: str) -> str:
    """The plain file name in ``file:...`` or ``json:{...}``; other names as they are."""
    if name.startswith("file:"):
        return name.removeprefix("file:").removeprefix("//")
    if not name.startswith("json:"):
        return name
    options: dict[str, Any] = {}
    try:
        _flatten("", json.loads(name.removeprefix("json:")), options)
    except ValueError:
        return name
    for key in ("file.filename", "filename", "file.file.filename"):
        if isinstance(options.get(key), str):
            return str(options[key])
    return name
