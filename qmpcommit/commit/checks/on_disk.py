"""What the files say of the chain, which is what the next start of the VM goes by."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise

from qmpcommit.block.chain import Image
from qmpcommit.block.files import read_header
from qmpcommit.block.graph import Raw
from qmpcommit.block.identity import HOST_FILES, file_id, locate
from qmpcommit.commit.checks.finding import (
    Case,
    Finding,
    flat_options,
    refused,
    unchecked,
)


def on_disk_backing(case: Case) -> Iterator[Finding]:
    """What the files say of the chain, which is what the next start of the VM goes by."""
    chain = case.plan.disk.chain
    names = [image.node_name for image in chain]
    if case.plan.base.node_name not in names:
        yield unchecked("on-disk-backing", "the base is not in the disk's chain")
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
                yield refused(
                    "on-disk-backing",
                    f"{overlay.filename} names '{written}' as its backing file ({source}), but"
                    f" QEMU has {below.filename} under it: started from its files, the VM would"
                    " have another disk. qemu-img rebase -u repairs the name while the VM is off",
                )
                break


def _written(case: Case, overlay: Image) -> Iterator[tuple[str, str, str]]:
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


def _means(case: Case, name: str, image: Image) -> bool:
    """Whether a backing file's name means this layer."""
    leaf = case.graph.leaf(image.node_name)
    opened = str(leaf.raw.get("file"))
    if name in (image.shown, image.filename, opened):
        return True
    name = _plain(name)
    if name == opened:
        return True
    if leaf.driver not in HOST_FILES or not name or ":" in name.split("/", maxsplit=1)[0]:
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
    try:
        options = flat_options(json.loads(name.removeprefix("json:")))
    except ValueError:
        return name
    for key in ("file.filename", "filename", "file.file.filename"):
        if isinstance(options.get(key), str):
            return str(options[key])
    return name
