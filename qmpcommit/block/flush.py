"""Having QEMU write down what it holds of an image in memory.

An intermediate ``block-commit`` flushes its base only where QEMU had opened that read-only and
closes it for writing again. Else data and metadata stay in QEMU until it closes the image: if it
is killed before, the base lacks what was committed, and the chain above it names it already.

No QMP command flushes a node. Closing one does, and a ``copy-on-read`` filter hands that on to what
it filters: so one is laid over the image, for nobody to read through, and closed. Rests on
``blockdev-add`` and ``blockdev-del``.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress

from qmpcommit.errors import CommandRefused, QmpCommitError
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import to_the_end

FLUSH = "qmpcommit-flush-"
"""What the node-names of these filters begin with; whoever was killed has left one, perhaps."""


def filter_name(node: str) -> str:
    """The node-name of the filter over `node`: always the same."""
    return f"{FLUSH}{hashlib.sha256(node.encode()).hexdigest()[:8]}"


async def flush(monitor: Monitor, node: str) -> None:
    """Flush one node, to its disk; what a killed process left of such a flush is removed.

    Raises `CommandRefused` where this QEMU can't, and what `Monitor.execute` raises.
    """
    name = filter_name(node)
    filtered = {"driver": "copy-on-read", "node-name": name, "file": node}
    try:
        try:
            await monitor.execute("blockdev-add", filtered)
        except CommandRefused:
            await _remove(monitor, name)
            await monitor.execute("blockdev-add", filtered)
        await monitor.execute("blockdev-del", node_name=name)
    finally:
        await to_the_end(_remove(monitor, name))


async def _remove(monitor: Monitor, name: str) -> None:
    if monitor.connected:
        with suppress(QmpCommitError):
            await monitor.execute("blockdev-del", node_name=name)


def sync_file(path: str) -> None:
    """Write down what the host's kernel holds of a file, so that QEMU's own flush is short.

    QEMU flushes in its main loop. Nothing is done where the file can't be opened from here.
    """
    with suppress(OSError, ValueError):
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fdatasync(file)
        finally:
            os.close(file)
