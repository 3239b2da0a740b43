"""Whether QEMU would open a fresh overlay as is asked, tried before there is one.

QEMU is asked to add nodes that can't come to be, over no image and over no file: once plainly
and once with the options. If it says the same both times, it has nothing against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmpcommit.commit.overlay.like import Likeness
from qmpcommit.errors import CommandRefused
from qmpcommit.names import JOB_PREFIX
from qmpcommit.qmp.monitor import Monitor

TRIAL = f"{JOB_PREFIX}tried"
"""The node that is opened to see whether QEMU takes the options, and closed at once."""

_PLAIN: tuple[dict[str, Any], ...] = (
    {"driver": "qcow2", "node-name": TRIAL, "file": {"driver": "null-co", "read-zeroes": True}},
    {"driver": "file", "node-name": TRIAL, "filename": "/proc/self/fdinfo/none", "read-only": True},
)


async def refused_options(monitor: Monitor, like: Likeness) -> str | None:
    """What QEMU has against the options of the overlay's two nodes (``blockdev-add``)."""
    for plain, options in zip(_PLAIN, (like.node, like.file), strict=True):
        told = await _answer(monitor, {**options, **plain})
        if told is not None and told != await _answer(monitor, plain):
            return f"QEMU does not take its options: {told}"
    direct = (like.file.get("cache") or {}).get("direct")
    if like.file.get("aio") == "native" and direct is not True:
        return (
            "QEMU takes aio native for a file with cache.direct only: ask for"
            """ {"file": {"aio": "native", "cache": {"direct": true}}}, or for another aio"""
        )
    return None


async def _answer(monitor: Monitor, node: Mapping[str, Any]) -> str | None:
    """Why there is no such node; None if there was one."""
    try:
        await monitor.execute("blockdev-add", node)
    except CommandRefused as error:
        return error.desc
    await monitor.execute("blockdev-del", {"node-name": TRIAL})
    return None
