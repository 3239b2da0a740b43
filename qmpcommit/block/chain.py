"""Disks and their backing chains, and the names that people give them.

A disk is what a guest's device or an export uses: its `chain` has the layers from the active
layer down to the bottom, filters seen through. Layers are `Image`s. Names are resolved the way
QEMU shows them: node-names, drive aliases, qdev ids and QOM paths, file names (``json:`` and
protocol URIs as QEMU prints them, plain files also through symlinks and relative names).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

from qmpcommit.block.bitmaps import bitmaps_of
from qmpcommit.block.graph import FDSET, BlockGraph, Raw, is_plain
from qmpcommit.block.network_name import (
    export_of,
    json_options,
    shown_export,
    written_export,
)
from qmpcommit.errors import ChainError, DiskNotFound
from qmpcommit.names import STALE_MARK
from qmpcommit.values import Record, record

_HOST_DRIVERS = frozenset(("file", "host_device", "host_cdrom"))


@record
class Image(Record):
    """One layer of a backing chain.

    `filename` is the host file where the layer lives on one (absolute, where QEMU's working
    directory is known), else what QEMU shows (a protocol URI or ``json:``); `shown` is always
    QEMU's own. Sizes are in bytes: `virtual_size` is what
    the guest sees, `allocated_size` what the layer takes on the host (None where unknown), which
    is also the most that a commit of it copies. `bitmaps` are the names of its dirty bitmaps,
    `warnings` what somebody should look at: corruption, encryption, an inconsistent bitmap.
    `data_file` is the host file in which a qcow2 keeps its data, where that is another one.
    `astray` says why `filename` leads to another file from here, or to none; "" where it does not,
    or nobody has looked. `given_as` is the name of a file that QEMU was given open. `filters` are
    the nodes over it in the chain (a throttle), uppermost first, by which it is named as well.
    `stale` is what tells that a pivot or a merge has made it invalid, its "header" or its "name".
    """

    node_name: str
    filename: str
    driver: str
    shown: str = ""
    virtual_size: int | None = None
    allocated_size: int | None = None
    read_only: bool = False
    cluster_size: int | None = None
    bitmaps: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    data_file: str = ""
    astray: str = ""
    given_as: str = ""
    filters: tuple[str, ...] = ()
    stale: Literal["", "header", "name"] = ""

    @property
    def over(self) -> str:
        """The node that a commit writes to, or an overlay is laid over: its filters stay."""
        return self.filters[0] if self.filters else self.node_name

    @property
    def is_slice(self) -> bool:
        """Whether it is a part of its file only, in which other things are as well."""
        return slice_of(self.shown)

    @property
    def handed_out(self) -> str:
        """The name by which a command finds it: of a slice of a file not the whole file's."""
        return self.shown if self.is_slice else self.given_as or self.filename

    def __str__(self) -> str:
        return (
            self.filename
            if self.filename == self.node_name
            else f"{self.filename} ({self.node_name})"
        )


@record
class Disk(Record):
    """A disk of a VM: `chain` has its layers, active layer first (empty: no medium inserted).

    `name` is the shortest of its names; `device` the drive alias of a legacy ``-drive``, `qdev`
    the device's QOM path or id as ``query-block`` has it, `exports` the ids of the block
    exports that serve it, `root` the node that they use, with `filters` from there down to the
    active layer; `head` is what ``block-commit`` calls the device: nothing at all lies over it.
    `jobs` are the ids of block jobs that hold a layer of it.
    """

    name: str
    chain: tuple[Image, ...] = ()
    device: str = ""
    qdev: str = ""
    exports: tuple[str, ...] = ()
    root: str = ""
    head: str = ""
    filters: tuple[str, ...] = ()
    removable: bool = False
    io_status: str = ""
    jobs: tuple[str, ...] = ()

    @property
    def active(self) -> Image | None:
        """The image that the guest writes to."""
        return self.chain[0] if self.chain else None

    def __str__(self) -> str:
        return self.name


Layer: TypeAlias = str | int | os.PathLike[str] | Image
"""What names a layer: a node-name, a file, an index into the chain, or the layer itself."""


def layer_name(layer: Layer) -> str | int:
    """The layer as it travels through JSON; an `Image` is known by its node-name."""
    if isinstance(layer, Image):
        return layer.node_name
    return os.fspath(layer) if isinstance(layer, os.PathLike) else layer


class BackingChain(NamedTuple):
    """The layers of one disk, and how people name them."""

    disk: Disk
    cwd: str | None = None

    def find(self, layer: Layer, role: str) -> int:
        """The place in the chain (0 = active layer) of the layer that is named so.

        Raises `ChainError` for none or several.
        """
        chain, name = self.disk.chain, layer_name(layer)
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise self._error(f"{role} is a node-name, a file name or an index, not {name!r}")
        if isinstance(name, int) or (name.isascii() and name.isdigit() and not self._called(name)):
            index = int(name)
            if not 0 <= index < len(chain):
                raise self._error(
                    f"there is no layer {index} in the chain of {self.disk}: it has"
                    f" {len(chain)} (0 is the active layer)"
                )
            return index
        found = self._called(name)
        if len(found) == 1:
            return found[0]
        layers = ", ".join(f"{i}: {image}" for i, image in enumerate(chain))
        what = "matches several layers" if found else "is no layer"
        raise self._error(f"{role} '{name}' {what} of {self.disk}'s chain ({layers})")

    def _called(self, name: str) -> list[int]:
        layers = [(image.node_name, *image.filters) for image in self.disk.chain]
        by_node = [i for i, names in enumerate(layers) if name in names]
        return by_node or [
            i for i, image in enumerate(self.disk.chain) if same_file(name, image, self.cwd)
        ]

    def _error(self, message: str) -> ChainError:
        return ChainError(f"{message}. Nothing was sent", disk=self.disk.name)


def absolute(image: Image, cwd: str | None) -> str:
    """The image's file name as an absolute path, where it is a host file's."""
    if ":" in image.filename.split("/", maxsplit=1)[0] or image.filename.startswith("json:"):
        return image.filename
    return os.path.join(cwd or os.getcwd(), image.filename)


def check_nameable(image: Image, vm: str, disk: str) -> None:
    """Raise `ChainError` where an overlay can't name this image as its backing file."""
    if image.filename.startswith(FDSET):
        raise ChainError(
            f"QEMU has {image.node_name} of {disk} of {vm} open by a file descriptor"
            f" ({image.filename}, from add-fd), which means nothing once it has ended, and would be"
            " the backing file's name in the new overlay: have QEMU open that image by its name."
            " Nothing was sent",
            vm=vm,
            disk=disk,
        )
    if is_temporary(image):
        raise ChainError(
            f"{disk} of {vm} was started with snapshot=on: {image.filename} is QEMU's own temporary"
            " file, which has no name any more and is gone with QEMU. Nothing can be laid over it"
            " or read from it: start the VM over an overlay with a name. Nothing was sent",
            vm=vm,
            disk=disk,
        )


_TEMPORARY = re.compile(r"vl\.[A-Za-z0-9]{6}")


def is_temporary(image: Image) -> bool:
    """Whether it is QEMU's own overlay of a ``snapshot=on``, which it unlinks at once."""
    path = image.filename
    return bool(_TEMPORARY.fullmatch(os.path.basename(path))) and not os.path.lexists(path)


def same_file(name: str, image: Image, cwd: str | None) -> bool:
    """Whether a file name that somebody typed means this image.

    `cwd` is QEMU's working directory, against which the relative names that it shows count.
    """
    if name in (image.filename, image.shown):
        return True
    options = json_options(name)
    while isinstance(options.get("file"), dict) and not slice_of(name):
        options = options["file"]
    mine = written_export(name) if ":" in name else None
    mine = mine or (export_of(options) if options.get("driver") == "nbd" else None)
    if mine is not None:
        shown = json_options(image.shown)
        return mine == (shown_export(image.filename) or export_of(shown.get("file") or shown))
    name = str(options.get("filename") or name).removeprefix("file:")
    if not is_plain(name) or not is_plain(image.filename):
        return False  # a protocol's name: only the same text is the same image
    theirs = image.given_as or os.path.join(cwd or os.getcwd(), image.filename)
    return os.path.realpath(name) == os.path.realpath(theirs)


def slice_of(shown: str) -> bool:
    """Whether an image is a part of a file only: a ``raw`` with an offset or a size, or in one."""
    options: object = json_options(shown)
    while isinstance(options, dict):
        if options.get("driver") == "raw" and (options.get("offset") or options.get("size")):
            return True
        options = options.get("file")
    return False


def read_image(graph: BlockGraph, name: str) -> Image:
    """The `Image` of a node."""
    node = graph.nodes[name]
    info: Raw = node.raw.get("image") or {}
    shown = str(info.get("filename") or node.raw.get("file") or name)
    leaf = graph.leaf(name)
    filename = shown
    if leaf.driver in _HOST_DRIVERS:
        filename = graph.file(leaf) or shown
    return Image(
        node_name=name,
        filename=filename,
        driver=node.driver,
        shown=shown,
        virtual_size=info.get("virtual-size"),
        allocated_size=info.get("actual-size"),
        read_only=bool(node.raw.get("ro", False)),
        cluster_size=info.get("cluster-size"),
        bitmaps=tuple(bitmap.name for bitmap in bitmaps_of(graph, name)),
        warnings=tuple(_warnings(graph, name)),
        data_file=_data_file(graph, name),
        given_as=graph.given.get(str(leaf.raw.get("file")), ""),
        stale=_stale(graph, name, filename),
    )


_RENAMED = re.compile(r".\.stale-[A-Za-z][A-Za-z0-9._-]*$")


def _stale(graph: BlockGraph, name: str, filename: str) -> Literal["", "header", "name"]:
    """What tells that a layer is stale: the mark in its header, or the name that it was given."""
    bitmaps = graph.nodes[name].raw.get("dirty-bitmaps") or ()
    if any(each.get("name") == STALE_MARK for each in bitmaps):
        return "header"
    return "name" if _RENAMED.search(os.path.basename(filename)) else ""


def _data_file(graph: BlockGraph, name: str) -> str:
    child = graph.nodes[name].children.get("data-file")
    if child is None or child not in graph.nodes:
        return ""
    leaf = graph.leaf(child)
    shown = str((graph.nodes[child].raw.get("image") or {}).get("filename") or "")
    if slice_of(shown):
        return shown
    return graph.file(leaf) if leaf.driver in _HOST_DRIVERS else ""


def _warnings(graph: BlockGraph, name: str) -> Iterator[str]:
    info: Raw = graph.nodes[name].raw.get("image") or {}
    if ((info.get("format-specific") or {}).get("data") or {}).get("corrupt"):
        yield "marked corrupt"
    if info.get("encrypted") or graph.nodes[name].raw.get("encrypted"):
        yield "encrypted"
    if info.get("dirty-flag"):
        yield "not closed cleanly"
    for bitmap in bitmaps_of(graph, name):
        if bitmap.inconsistent:
            yield f"bitmap {bitmap.name} is inconsistent"
    leaf = graph.leaf(name)
    file = str(leaf.raw.get("file") or "")
    if slice_of(str(info.get("filename") or "")):
        yield f"a slice of {graph.file(leaf)}, which is not this image"
    if file.startswith(FDSET):
        yield f"opened by descriptor: {file} is no file's name"
    if leaf.driver in _HOST_DRIVERS and is_plain(file) and file[:1] != "/" and not graph.cwd:
        yield "named from QEMU's working directory, which is not known here"


def read_disks(graph: BlockGraph) -> list[Disk]:
    """All disks of a VM: those of its devices, then those that only exports use.

    Where nothing has a device (qemu-storage-daemon), the topmost layers that nobody uses are
    disks too, so that a chain which is only open can be named.
    """
    disks = [_of_device(graph, device) for device in graph.devices]
    used = {image.node_name for disk in disks for image in disk.chain}
    exports: dict[str, list[str]] = {}
    served_by: dict[str, set[str]] = {}
    for export in graph.exports:
        layer = graph.below_filters(export.get("node-name"))
        if layer is not None:
            exports.setdefault(layer, []).append(str(export.get("id", "")))
            served_by.setdefault(layer, set()).add(str(export.get("node-name")))
    for place, disk in enumerate(disks):
        if disk.chain and disk.chain[0].node_name in exports:
            ids = tuple(exports.pop(disk.chain[0].node_name))
            disks[place] = replace(disk, exports=ids)
    for layer, served in exports.items():
        nodes = served_by[layer]
        root = graph.used_by(min(nodes) if len(nodes) == 1 else layer)
        disks.append(_of_node(graph, layer, tuple(served), root))
        used.update(image.node_name for image in disks[-1].chain)
    if not graph.devices:
        for name in graph.nodes:
            layer = graph.below_filters(name)
            if layer != name or _has_layer_above(graph, name) or not _is_format(graph, name):
                continue
            chain = graph.chain(name)
            if not used.intersection(chain):
                disks.append(_of_node(graph, name, (), graph.root(name)))
    return disks


def find_disk(disks: Iterable[Disk], name: str, *, vm: str, cwd: str | None = None) -> Disk:
    """The one disk that `name` means; raises `DiskNotFound` with the candidates."""
    disks = list(disks)
    found = [disk for disk in disks if _is_called(disk, name, cwd)]
    if len(found) == 1:
        return found[0]
    candidates = [disk.name for disk in found or disks]
    if found:
        each = " and ".join(f"{disk.name} ({qom_path(disk.qdev) or disk.root})" for disk in found)
        message = f"'{name}' is ambiguous on {vm}: it means {each}; use a QOM path or a node-name"
    else:
        layer_of = [d.name for d in disks if any(_names_layer(i, name, cwd) for i in d.chain)]
        hint = f"its disks are {', '.join(candidates)}" if candidates else "it has no disks"
        if layer_of:
            hint = f"it is a backing layer of {' and '.join(layer_of)}; name the disk, and the"
            hint += " layer with base or top"
        message = f"there is no disk '{name}' on {vm}: {hint}"
    raise DiskNotFound(f"{message}. Nothing was sent", vm=vm, disk=name, candidates=candidates)


def find_again(disks: Iterable[Disk], disk: Disk) -> Disk | None:
    """The same device's (or export's) disk in a later reading, whatever its chain is now."""
    for other in disks:
        if disk.qdev or disk.device:
            if (other.qdev, other.device) == (disk.qdev, disk.device):
                return other
        elif disk.exports and set(disk.exports) & set(other.exports):
            return other
    return None


def _names_layer(image: Image, name: str, cwd: str | None) -> bool:
    return name == image.node_name or same_file(name, image, cwd)


def _is_called(disk: Disk, name: str, cwd: str | None) -> bool:
    if not name:
        return False
    of_device = (disk.qdev, qom_path(disk.qdev), qdev_id(disk.qdev))
    if name in (disk.name, disk.device, *of_device, disk.root, *disk.exports, *disk.filters):
        return True
    return disk.active is not None and _names_layer(disk.active, name, cwd)


def qdev_id(qdev: str) -> str:
    """The id that a person gave to the device with this QOM path; "" where none did."""
    if not qdev.startswith("/"):
        return qdev
    parts = qdev.split("/")
    return parts[3] if parts[1:3] == ["machine", "peripheral"] and len(parts) > 3 else ""


def qom_path(qdev: str) -> str:
    """The QOM path of the device itself.

    ``query-block`` tells that one, or the id alone, or the path of its virtio-backend.
    """
    if qdev.startswith("/"):
        return qdev.removesuffix("/virtio-backend")
    return f"/machine/peripheral/{qdev}" if qdev else ""


def _of_device(graph: BlockGraph, device: Raw) -> Disk:
    alias = str(device.get("device") or "")
    qdev = str(device.get("qdev") or "")
    inserted = (device.get("inserted") or {}).get("node-name")
    layer = graph.below_filters(inserted)
    root = graph.used_by(str(inserted)) if layer else ""
    name = qdev_id(qdev) or alias or root or qdev
    return Disk(
        name=name,
        device=alias,
        qdev=qdev,
        removable=bool(device.get("removable", False)),
        io_status=str(device.get("io-status") or ""),
        **_layers(graph, layer, root),  # type: ignore[arg-type]
    )


def _of_node(graph: BlockGraph, layer: str, exports: tuple[str, ...], root: str) -> Disk:
    layers: Any = _layers(graph, layer, root)
    return Disk(name=layer, exports=exports, **layers)


def _layers(graph: BlockGraph, layer: str | None, root: str) -> dict[str, object]:
    """The chain of what is used by the node `root`; a filter beside that is not the disk's."""
    if layer is None:
        return {}
    chain, head = graph.chain(layer), graph.root(layer)
    held = {*chain, *graph.filters(root), *graph.filters(head)}
    jobs = tuple(job.id for job in graph.jobs.values() if held & set(job.nodes.values()))
    images = [read_image(graph, layer)]
    for above, name in pairwise(chain):
        filters = graph.kept_filters(graph.nodes[above].children.get("backing"))
        images.append(replace(read_image(graph, name), filters=filters))
    return {
        "chain": tuple(images),
        "root": root,
        "head": head,
        "filters": tuple(graph.filters(root)),
        "jobs": jobs,
    }


def _has_layer_above(graph: BlockGraph, name: str) -> bool:
    """Whether another layer backs on this node, or a format lives in it."""
    todo, seen = [name], {name}
    while todo:
        for parent in graph.parents.get(todo.pop(), ()):
            if graph.below_filters(parent) == parent:
                return True
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return False


def _is_format(graph: BlockGraph, name: str) -> bool:
    return "file" in graph.nodes[name].children or "backing" in graph.nodes[name].children
