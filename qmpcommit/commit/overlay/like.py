"""What a fresh overlay has to be, so that it is like the one that it follows.

Pure functions over QEMU's block graph, its command line, and what the caller asks for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qmpcommit.block.chain import Disk, qdev_id
from qmpcommit.block.command_line import CommandLine, Flat
from qmpcommit.block.graph import BlockGraph, Node, Raw
from qmpcommit.commit.overlay.options import OverlayOptions

Options = Mapping[str, Any]

_SAMPLE = 20_000
_ITER_TIME = 2000
"""QEMU's default, in milliseconds."""

_CIPHER = ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg")


class Likeness(NamedTuple):
    """The options of a fresh overlay: of ``blockdev-create``, of its nodes; and what is lost."""

    create: Options
    node: Options
    file: Options
    warnings: tuple[str, ...] = ()


def likeness(
    graph: BlockGraph,
    follows: str,
    asked: OverlayOptions,
    *,
    declared: Flat | None,
    file_declared: Flat | None,
    encrypted: bool,
    lasting: bool,
    called: str = "the fresh overlay",
) -> Likeness:
    """What an overlay has that follows this node.

    `declared` are the options that it was opened with, `file_declared` those of its protocol
    node where that was declared by itself, None where they are not known. It is encrypted with
    the secret that is `asked` for if its disk is `encrypted`. One that is not `lasting` is
    merged away again soon: nobody has to be told what it lacks.
    """
    top = graph.nodes.get(follows)
    if top is None:
        return Likeness({}, asked_node(asked), asked_file(asked))
    create = dict(format_options(top, lasting=lasting))
    node, file = runtime_options(graph, top, declared, file_declared)
    if encrypted and asked.secret is not None:
        key = {"format": "luks", "key-secret": asked.secret}
        create["encrypt"] = {**key, **dict(_cipher_of(top))}
        node["encrypt"] = key
    warnings: tuple[str, ...] = ()
    if lasting and declared is None and not asked.options:
        warnings = (
            f"with which discard, aio and locking the former overlay (node {follows}) was opened"
            f" QEMU does not tell: {called} has QEMU's defaults, or what is implied by the rest;"
            " ask for them with the overlay (overlay_options) if they were others",
        )
    return Likeness(
        create, _merged(node, asked_node(asked)), _merged(file, asked_file(asked)), warnings
    )


def asked_node(asked: OverlayOptions) -> dict[str, Any]:
    """What is asked of the qcow2 node."""
    return {name: value for name, value in asked.options.items() if name != "file"}


def asked_file(asked: OverlayOptions) -> dict[str, Any]:
    """What is asked of the protocol node."""
    return dict(asked.options.get("file", {}))


def _merged(mine: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for counts; of an object (the cache) member by member."""
    merged = dict(mine)
    for name, value in asked.items():
        known = merged.get(name)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        merged[name] = {**known, **value} if both else value  # type: ignore[dict-item]
    return merged


# -- how its file is formatted ------------------------------------------------------------------


def format_data(node: Node) -> Raw:
    """What its format tells of a node's image."""
    info: Raw = node.raw.get("image") or {}
    return (info.get("format-specific") or {}).get("data") or {}


def format_options(top: Node, *, lasting: bool = True) -> Iterator[tuple[str, Any]]:
    """Options of ``blockdev-create`` for qcow2; of what has QEMU's default, none.

    An old QEMU is never asked for what it does not know: it has opened such an image.
    """
    if top.driver != "qcow2":
        return
    size = (top.raw.get("image") or {}).get("cluster-size")
    if size:
        yield "cluster-size", size
    data = format_data(top)
    if lasting and data.get("compat") == "0.10":
        yield "version", "v2"
        return
    if data.get("lazy-refcounts"):
        yield "lazy-refcounts", True
    if data.get("refcount-bits", 16) != 16:
        yield "refcount-bits", data["refcount-bits"]
    if data.get("compression-type", "zlib") != "zlib":
        yield "compression-type", data["compression-type"]
    if data.get("extended-l2"):
        yield "extended-l2", True


def has_data_file(graph: BlockGraph, name: str) -> bool:
    """Whether a layer keeps its data in a file beside it."""
    return name in graph.nodes and "data-file" in graph.nodes[name].children


# -- encryption ---------------------------------------------------------------------------------


def is_encrypted(graph: BlockGraph, name: str) -> bool:
    """Whether a layer's data are encrypted by QEMU, in its format or under it."""
    todo, seen = [name], set()
    while todo:
        here = todo.pop()
        node = graph.nodes.get(here)
        if node is None or here in seen:
            continue
        seen.add(here)
        info: Raw = node.raw.get("image") or {}
        if info.get("encrypted") or node.raw.get("encrypted") or node.driver == "luks":
            return True
        todo += [node.children[edge] for edge in ("file", "data-file") if edge in node.children]
    return False


def each_asked(asked: OverlayOptions, encrypted: Sequence[bool]) -> list[OverlayOptions]:
    """What is asked for each of several disks: the secret is for those that are encrypted."""
    if not any(encrypted):
        return [asked] * len(encrypted)
    return [asked if each else OverlayOptions(asked.options) for each in encrypted]


def unfit(
    graph: BlockGraph, top: str, base: str, asked: OverlayOptions, *, lasting: bool = True
) -> str | None:
    """Why no overlay can follow this layer over that one, as it is asked for; None if it can."""
    encrypted = [name for name in dict.fromkeys((top, base)) if is_encrypted(graph, name)]
    if encrypted and asked.secret is None:
        return (
            f"the disk is encrypted ({' and '.join(encrypted)}), and a plain overlay would have"
            " what the guest writes in clear: name a secret object of QEMU's with which the fresh"
            " overlay is to be encrypted (overlay_secret)"
        )
    if asked.secret is not None and not encrypted:
        return (
            f"the disk is not encrypted, so that its fresh overlay is not either: leave the secret"
            f" '{asked.secret}' (overlay_secret) out"
        )
    if lasting and has_data_file(graph, top):
        return (
            f"{top} keeps its data in a file beside it (data_file), and a fresh overlay would not:"
            " pivot, and lay one of your own over the base"
        )
    return None


def _cipher_of(top: Node) -> Iterator[tuple[str, Any]]:
    own = format_data(top).get("encrypt") or {}
    if own.get("format") == "luks":
        for name in _CIPHER:
            if name in own:
                yield name, own[name]
        iterations = max((slot.get("iters", 0) for slot in own.get("slots") or ()), default=0)
        if iterations:
            yield "iter-time", iteration_time(str(own.get("hash-alg", "sha256")), iterations)


def iteration_time(algorithm: str, iterations: int) -> int:
    """The milliseconds that so many iterations over a key take, up to QEMU's default.

    QEMU is told a time and not a number, and holds the guest up for as long.
    """
    begun = time.perf_counter()
    try:
        hashlib.pbkdf2_hmac(algorithm, b"key", b"salt", _SAMPLE)
    except ValueError:  # another algorithm than Python has
        return _ITER_TIME
    took = time.perf_counter() - begun
    return max(1, min(_ITER_TIME, round(took * 1000 * iterations / _SAMPLE)))


# -- how its nodes are opened -------------------------------------------------------------------


def runtime_options(
    graph: BlockGraph, top: Node, declared: Flat | None, file_declared: Flat | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of ``blockdev-add`` for the qcow2 node and for its protocol node."""
    leaf = graph.leaf(top.name)
    node, file = _cache(top), _cache(leaf)
    known = declared or {}
    zeroes = top.raw.get("detect_zeroes", "off")
    if zeroes != "off":
        node["detect-zeroes"] = zeroes
    if zeroes == "unmap" or _unmaps(known.get("discard")):
        node["discard"] = "unmap"
    below = file_declared if file_declared is not None else _child(known)
    inside = file_declared is None and (declared is not None or leaf.name.startswith("#"))
    if inside or _unmaps(below.get("discard")):
        file["discard"] = "unmap"  # what is declared within its parent is opened so
    for name in ("aio", "locking"):
        if below.get(name) is not None:
            file[name] = below[name]
    return node, file


def as_opened(node: Node, options: Options) -> dict[str, Any]:
    """The options with which a node is reopened so that it is as it is.

    What QEMU tells of it counts, `options` for the rest.
    """
    zeroes = node.raw.get("detect_zeroes", "off")
    found = {**{k: v for k, v in options.items() if k != "cache"}, **_cache(node)}
    found["detect-zeroes"] = zeroes
    if zeroes == "unmap":
        found["discard"] = "unmap"
    return found


def _child(declared: Flat) -> Flat:
    """What is declared of the ``file`` within a node's, or a drive's, options."""
    below = {k.removeprefix("file."): v for k, v in declared.items() if k.startswith("file.")}
    return below if "aio" in below or "aio" not in declared else {**below, "aio": declared["aio"]}


def _unmaps(discard: object) -> bool:
    return discard in ("unmap", "on")


def _cache(node: Node) -> dict[str, Any]:
    """The cache mode of a node, where it is not QEMU's default."""
    cache: Raw = node.raw.get("cache") or {}
    set_so = {name: True for name in ("direct", "no-flush") if cache.get(name)}
    return {"cache": set_so} if set_so else {}


def declared_options(
    line: CommandLine | None, graph: BlockGraph, disk: Disk, name: str, *, ours: bool
) -> tuple[Flat | None, Flat | None]:
    """What a disk's active layer was opened with, and its protocol node if by itself.

    One of `ours` was opened like the one before it, back to what the device was started with.
    """
    if line is None:
        return None, None
    if name.startswith("#"):
        image: Raw = (graph.nodes[name].raw.get("image") or {}) if name in graph.nodes else {}
        return line.of_drive(disk.device, str(image.get("filename"))), None
    declared = line.of_node(name)
    if declared is None and ours:
        declared = line.of_device(qdev_id(disk.qdev))
    if declared is None:
        return None, None
    return declared, line.of_node(str(declared.get("file")))
