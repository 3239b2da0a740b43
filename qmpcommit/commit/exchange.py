"""What lies under an active layer is exchanged: the disk starts again from the overlay's base.

A device can't be moved to another image, but a fresh, empty overlay can be laid over the old one
and reopened with the base as its backing file. Nobody uses the old one then. The guest stands
still meanwhile, for what it has in memory belongs to a disk that is no more.

Each step is noted before it is taken, and all of it is safe to repeat by another process: what
was done is asked of the block graph. The fresh overlay names the base in its header from the
beginning, so that what is found there after a crash of QEMU is a disk that starts from the base.

Rests on ``stop``, ``blockdev-snapshot``, ``blockdev-reopen`` (``x-blockdev-reopen`` before QEMU
6.1), ``system_reset`` and ``cont``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from qmpcommit.block.chain import Disk, read_disks
from qmpcommit.block.files import FileId
from qmpcommit.block.graph import BlockGraph
from qmpcommit.commit.aftermath import close_layers, remove_file
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Pivot
from qmpcommit.commit.recycle import FreshOverlay
from qmpcommit.errors import ChainError, CommandRefused, CommitFailed, QmpCommitError
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from qmpcommit.session import Session

Guest = Literal["reset", "stop"]
"""What becomes of the guest: it is reset and goes on, if it ran, or it stays stopped."""

Note = Callable[..., Awaitable[None]]
"""Writes a step down, with what another process has to know: ``await note(step, **facts)``."""


class Exchange:
    """Exchanges `plan.top`, the active layer, for the new file `filename` over `plan.base`.

    `file` is the old overlay's, to be deleted when nothing uses it any more; None to leave it.
    `noted` is what a former process has noted last, all facts together; empty where none has.
    """

    def __init__(
        self,
        vm: Session,
        plan: Plan,
        filename: str,
        *,
        guest: Guest,
        note: Note,
        file: FileId | None = None,
        noted: Mapping[str, Any] | None = None,
    ) -> None:
        self._vm, self._plan, self._filename, self._guest = vm, plan, filename, guest
        self._note, self._file = note, file
        noted = noted or {}
        self._over = noted.get("step") == "exchanged"
        self._let_go_before = bool(noted.get("let_go"))
        self._running: bool | None = noted.get("running")  # before it was stopped
        self._fresh = FreshOverlay(vm, plan, filename, vm.cwd)
        if self._running is not None:
            self._fresh.restore(stopped=False)

    async def run(self) -> list[str]:
        """Carry it out, or what is left of it; the warnings.

        Raises `ChainError` or `CommitFailed` where it can't be: the disk and the guest are then as
        they were. What `Monitor.execute` raises where the VM is away: repeat it when it is back.
        """
        if self._over:
            return []
        graph = await self._vm.graph()
        if not self._laid(graph):
            try:
                await self._lay(graph)
            except (CommandRefused, CommitFailed, ChainError):
                await to_the_end(self._undo())
                raise
            graph = await self._vm.graph()
        if graph.chain(self._fresh.node)[1:2] != [self._plan.base.node_name]:
            await self._note("reopen")
            try:
                await self._reopen(graph)
            except CommandRefused as error:
                await self._merge_back(error)
        self._confirm(await self._vm.graph())
        await self._note("close")
        warnings = await close_layers(self._vm, [self._plan.top])
        await self._let_go()
        if self._file is not None:
            warnings += await self._delete(self._file)
        await self._note("exchanged")
        return warnings

    def _laid(self, graph: BlockGraph) -> bool:
        node = graph.nodes.get(self._fresh.node)
        return node is not None and "backing" in node.children

    def _disk(self, graph: BlockGraph) -> Disk | None:
        """The disk whose active layer is the old overlay."""
        for disk in read_disks(graph):
            if disk.active is not None and disk.active.node_name == self._plan.top.node_name:
                return disk
        return None

    async def _lay(self, graph: BlockGraph) -> None:
        """The fresh overlay over the old one, under a guest that stands still."""
        disk = self._disk(graph)
        below = [image.node_name for image in disk.chain[1:2]] if disk is not None else []
        if disk is None or below != [self._plan.base.node_name] or disk.jobs:
            why = f"it has a block job ({', '.join(disk.jobs)})" if disk and disk.jobs else (
                "its chain is another one by now"
            )  # fmt: skip
            raise ChainError(
                f"the overlay of {self._plan.disk} of {self._vm.name} can't be discarded: {why}."
                " Nothing was discarded",
                vm=self._vm.name,
                disk=self._plan.disk.name,
            )
        again = self._running is not None
        if self._running is None:
            self._running = await self._runs()
        await self._note("stop", running=self._running)
        await self._fresh.freeze(again=again)
        await self._note("lay")
        arguments = {"node": self._plan.top.node_name, "overlay": self._fresh.node}
        await self._vm.execute("blockdev-snapshot", arguments)

    async def _runs(self) -> bool:
        status = await self._status()
        return status is not None and bool(status.get("running"))

    async def _status(self) -> dict[str, object] | None:
        """None for a storage daemon, which has no guest."""
        try:
            found: dict[str, object] = await self._vm.execute("query-status")
        except CommandRefused:
            return None
        return found

    async def _undo(self) -> None:
        await self._fresh.undo()
        await self._continue()

    async def _continue(self) -> None:
        if self._running and not await self._runs():
            await self._vm.execute("cont")

    async def _reopen(self, graph: BlockGraph) -> None:
        options = {
            "driver": "qcow2",
            "node-name": self._fresh.node,
            "file": graph.nodes[self._fresh.node].children["file"],
            "backing": self._plan.base.node_name,
        }
        try:
            await self._vm.execute("blockdev-reopen", {"options": [options]})
        except CommandRefused as error:
            if error.error_class != "CommandNotFound":
                raise
            await self._vm.execute("x-blockdev-reopen", options)

    async def _merge_back(self, why: CommandRefused) -> None:
        """QEMU does not exchange it: the empty one goes, and the guest goes on as before."""
        job = await self._vm.commit(
            self._fresh.node,
            policy=Pivot(),
            shallow=True,
            delete=True,
            override=["on-disk-backing"],  # the empty one names the base already
        )
        await job.wait()
        await self._continue()
        raise CommitFailed(
            f"QEMU does not exchange the overlay of {self._plan.disk} of {self._vm.name}:"
            f" {why.desc}. Nothing was discarded, and the guest goes on as before",
            vm=self._vm.name,
            disk=self._plan.disk.name,
        ) from why

    def _confirm(self, graph: BlockGraph) -> None:
        """What QEMU has now is believed, not what it answered."""
        wanted = [self._fresh.node, self._plan.base.node_name]
        for disk in read_disks(graph):
            if [image.node_name for image in disk.chain[:2]] == wanted:
                return
        raise CommitFailed(
            f"the fresh overlay {self._filename} is not what {self._plan.disk} of {self._vm.name}"
            " writes to, although QEMU took all commands; look at its chain before the guest goes"
            " on",
            vm=self._vm.name,
            disk=self._plan.disk.name,
        )

    async def _let_go(self) -> None:
        """Reset the guest and have it go on, as asked; a second reset does no harm."""
        status = await self._status()
        if self._guest == "stop" or status is None:
            return
        if self._let_go_before and status.get("running"):
            return  # a former process had come as far as this
        await self._note("guest", let_go=True)
        await self._vm.execute("system_reset")
        if self._running:
            await self._vm.execute("cont")

    async def _delete(self, file: FileId) -> list[str]:
        image, cwd = self._plan.top, self._vm.cwd
        path = os.path.join(cwd or os.getcwd(), image.filename)
        if not await asyncio.to_thread(os.path.lexists, path):
            return []  # a former process had come as far as this
        try:
            graph = await self._vm.graph()
        except QmpCommitError as error:
            return [f"{image.filename} stays: {error.message}"]
        problem = await asyncio.to_thread(
            remove_file, image, file, graph=graph, base=self._plan.base, cwd=cwd, rename_to=None
        )
        return [problem] if problem is not None else []
