"""The mark of a stale overlay, in its own header: who opens it later can see what it is.

A pivot or a merge leaves files that are whole and valid, and show an old disk. The mark is a
disabled, persistent dirty bitmap of a name of ours. QEMU itself writes it, into a file that it has
open and locked, so nothing is ever written beside another's lock. The guest's data are not
touched, and the image opens as before. The mark goes where the file goes, is listed wherever QEMU
has the file open (``dirty-bitmaps``), and ``qemu-img bitmap --remove`` takes it away. A name that
``--stale rename`` gave tells the same.

Best effort: where QEMU can't store it (no qcow2, version 2, read-only, encrypted) the file stays
as it is, which the log tells. Rests on ``block-dirty-bitmap-add``, ``blockdev-add`` and
``blockdev-del``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress

from qmpcommit.block.chain import Image, absolute
from qmpcommit.block.graph import Node, is_plain, read_graph
from qmpcommit.block.identity import FileId, file_id, identify
from qmpcommit.errors import CommandRefused
from qmpcommit.names import MARKING, STALE_MARK
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import to_the_end

_GRAIN = 1 << 24
"""The coarsest bitmap is the smallest, and nothing is ever recorded in it."""


class Marks:
    """Marks the stale layers of one commit, each once, while QEMU has it open."""

    def __init__(self, monitor: Monitor, job_id: str) -> None:
        self._monitor = monitor
        self._node = f"{MARKING}{hashlib.sha256(job_id.encode()).hexdigest()[:8]}"
        self.done: set[str] = set()

    async def close_left(self) -> None:
        """Close what a process that was killed had opened here, for this job."""
        if self._node in (await read_graph(self._monitor)).nodes:
            await self._monitor.execute("blockdev-del", {"node-name": self._node})

    async def mark(self, node: Node) -> None:
        """Mark a stale layer that is open still, and that nothing uses any more.

        QEMU stores the mark where it closes the node.
        """
        writable = node.driver == "qcow2" and not node.raw.get("ro")
        if writable and await self._add(node.name):
            self.done.add(node.name)

    async def take_back(self, node: str) -> None:
        """Remove the mark of a node that QEMU did not close, for somebody uses it."""
        if node in self.done:
            self.done.discard(node)
            with suppress(CommandRefused):
                arguments = {"node": node, "name": STALE_MARK}
                await self._monitor.execute("block-dirty-bitmap-remove", arguments)

    async def mark_closed(
        self,
        stale: Iterable[Image],
        files: Mapping[str, FileId | None],
        cwd: str | None,
    ) -> None:
        """Mark those whose nodes are gone, or could not be written to: each is opened for it.

        Only the very file that the chain had, and only if nobody else has it open: QEMU's lock
        tells.
        """
        left = [
            (image, file)
            for image in stale
            if image.node_name not in self.done
            and image.driver == "qcow2"
            and is_plain(image.filename)
            and (file := files.get(image.node_name)) is not None
        ]
        nodes = (await read_graph(self._monitor)).nodes if left else {}
        for image, file in left:
            if image.node_name not in nodes:
                await to_the_end(self._open_for_it(image, absolute(image, cwd), file))

    async def _open_for_it(self, image: Image, path: str, file: FileId) -> None:
        if await asyncio.to_thread(file_id, path) != file:
            return
        storage = {"driver": "file", "filename": image.filename}
        opened = {"driver": "qcow2", "node-name": self._node, "backing": None, "file": storage}
        try:
            await self._monitor.execute("blockdev-add", opened)
        except CommandRefused as error:
            self._monitor.log.info("stale_not_marked", file=image.filename, reason=error.desc)
            return
        try:
            found = await asyncio.to_thread(identify, path, self._monitor.peer_pid)
            if found == file and await self._add(self._node):
                self.done.add(image.node_name)
        finally:
            with suppress(CommandRefused):
                await self._monitor.execute("blockdev-del", {"node-name": self._node})

    async def _add(self, node: str) -> bool:
        arguments = {"node": node, "name": STALE_MARK, "granularity": _GRAIN,
                     "persistent": True, "disabled": True}  # fmt: skip
        try:
            await self._monitor.execute("block-dirty-bitmap-add", arguments)
        except CommandRefused as error:
            self._monitor.log.info("stale_not_marked", node=node, reason=error.desc)
            return False
        return True
