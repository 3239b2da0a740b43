"""Having QEMU write down what it holds of an image in memory.

An intermediate ``block-commit`` flushes its base only where QEMU had opened that read-only and
closes it for writing again. Else data and metadata stay in QEMU until it closes the image: if it
is killed before, the base lacks what was committed, and the chain above it names it already.

No QMP command flushes a node. Closing one does, and a ``throttle`` filter hands that on to what it
filters: so one without limits is laid over the image and closed. Rests on ``object-add``,
``blockdev-add``, ``blockdev-del`` and ``object-del``.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress

from qmpcommit.errors import CommandRefused, QmpCommitError
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import to_the_end


def filter_name(node: str) -> str:
    """The node-name and the group's id of the filter over `node`: always the same."""
    return f"qmpcommit-flush-{hashlib.sha256(node.encode()).hexdigest()[:8]}"


async def flush(monitor: Monitor, node: str) -> None:
    """Flush one node, to its disk; what a killed process left of such a flush is removed.

    Raises `CommandRefused` where this QEMU can't, and what `Monitor.execute` raises.
    """
    name = filter_name(node)
    try:
        try:
            await _open(monitor, node, name)
        except CommandRefused:
            await _remove(monitor, name)
            await _open(monitor, node, name)
        await monitor.execute("blockdev-del", node_name=name)
    finally:
        await to_the_end(_remove(monitor, name))


async def _open(monitor: Monitor, node: str, name: str) -> None:
    await monitor.execute("object-add", {"qom-type": "throttle-group", "id": name})
    await monitor.execute(
        "blockdev-add",
        {"driver": "throttle", "node-name": name, "throttle-group": name, "file": node},
    )


async def _remove(monitor: Monitor, name: str) -> None:
    if not monitor.connected:
        return
    with suppress(QmpCommitError):
        with suppress(CommandRefused):
            await monitor.execute("blockdev-del", node_name=name)
        await monitor.execute("object-del", id=name)


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
