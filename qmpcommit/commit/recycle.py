"""What an interrupted recycle leaves behind: a fresh overlay, used or not, and its file."""

from __future__ import annotations

import os
import shlex
from typing import NamedTuple

from qmpcommit.block.graph import BlockGraph
from qmpcommit.names import JOB_PREFIX, WINDOW_MARK


class Left(NamedTuple):
    """A fresh overlay's file that a QEMU has left: `laid` over the base, perhaps, or never used."""

    filename: str
    laid: bool


def has_ended(pid: int | None) -> bool:
    """Whether a process of this host is seen to have ended; one that nobody knows is not."""
    if pid is None:
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except FileNotFoundError:
        return os.path.exists("/proc/self/stat")
    except (OSError, IndexError):
        return False


def interrupted_recycles(graph: BlockGraph, qmp: str = "QMP") -> list[dict[str, str]]:
    """Fresh overlays of ours that were opened and never laid: whoever did it was killed."""
    found = []
    for name in graph.nodes:
        ours = name.startswith(JOB_PREFIX) and name.endswith("-top")
        if ours and "backing" not in graph.nodes[name].children and not graph.parents.get(name):
            file = graph.leaf(name).raw.get("file")
            if WINDOW_MARK in str(file):
                continue  # a window's
            text = (
                f"An interrupted recycle or snapshot left the empty overlay {file} open as node"
                f" {name}, and perhaps the guest paused: 'qmpcommit recover {shlex.quote(qmp)}'"
                " puts that right"
            )
            found.append({"node": name, "overlay": str(file), "next": text})
    return found
