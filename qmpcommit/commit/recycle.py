"""A fresh, empty overlay over the base, before the guest can write to the base.

What `block-job-cancel` leaves is an overlay with all its clusters; what is wanted for the next
round is one with *only the changes since*. So the job pivots while the guest is paused, the
fresh overlay, made and opened before that, is laid over the base, and the guest goes on.

Rests on ``blockdev-create``, ``blockdev-add``, ``stop``, ``blockdev-snapshot`` and ``cont``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpcommit.block.backing_name import BackingName, View, name_below
from qmpcommit.block.chain import Image, read_image
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.block.identity import names_are_ours
from qmpcommit.commit.plan import JOB_PREFIX, WINDOW_MARK, Plan
from qmpcommit.commit.run_state import Still, runs
from qmpcommit.errors import CommandRefused, CommitFailed
from qmpcommit.qmp.monitor import Monitor

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.qmp.subscriptions import EventStream


PATIENCE = 0.5
"""Seconds of silence after which QEMU is asked about the creation of the overlay."""

NODE_NAME_LENGTH = 31
"""Characters that QEMU's node-names have at most."""


def node_stem(job_id: str) -> str:
    """What a job's fresh overlay's node-names begin with: its id, or a short stand-in."""
    if len(job_id) + len("-file") <= NODE_NAME_LENGTH:
        return job_id
    return f"{JOB_PREFIX}{hashlib.sha256(job_id.encode()).hexdigest()[:12]}"


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


class FreshOverlay:
    """The overlay of one recycle; `paused` is for how long the guest stood still, in seconds.

    `remark` says why it was not let go on, where something else has stopped it by then. Each step
    is safe to repeat. `thaw` continues the guest only if `freeze` paused it; unless it is
    `alone`, whoever paused the guest for several of its disks does.
    """

    def __init__(
        self,
        monitor: Monitor,
        plan: Plan,
        filename: str,
        cwd: str | None,
        ledger: Ledger | None = None,
        *,
        alone: bool = True,
    ) -> None:
        self.filename = filename
        self._alone = alone
        self._still: Still | None = None
        self._cwd = cwd
        stem = node_stem(plan.job_id)
        self.node = f"{stem}-top"
        self.paused: float | None = None
        self.remark = self.disturbed = ""
        self.size = 0
        self._monitor, self._plan = monitor, plan
        self._file_node = f"{stem}-file"
        self._stopped_at: float | None = None
        self._begun = self._tried = self._laid = self._restored = self._here = False
        self._ledger = ledger

    def restore(self, *, stopped: bool, laid: bool = False) -> None:
        """Take up what a former process did; it paused the guest if `stopped`.

        It may have put the overlay over the base if `laid`.
        """
        self._begun = self._tried = self._restored = True
        self._laid = laid
        if stopped:
            self._stopped_at = asyncio.get_running_loop().time()
            self._still = Still(self._monitor, paused=True)

    async def freeze(self, *, again: bool = False, stopped: bool = False) -> None:
        """Make and open the overlay, then pause the guest, if it runs.

        Raises `CommitFailed` for a file that is there already: nothing is overwritten. With
        `again`, what is there under the overlay's node-name or its file name is what a former
        process of ours made and never used: it is made anew. It paused the guest if `stopped`.
        """
        if stopped:  # it goes on, whatever fails from here on
            self._stopped_at = asyncio.get_running_loop().time()
            self._still = Still(self._monitor, paused=True)
        await self.make(again=again)
        if self._still is None and (self._alone or await runs(self._monitor)):
            self._still = Still(self._monitor)
        if self._still is not None and await self._still.ran():
            if self._ledger is not None:
                await self._ledger.note("stop")
            self._stopped_at = asyncio.get_running_loop().time()
            await self._still.stop()

    async def make(self, *, again: bool = False) -> None:
        """Make and open the overlay, as `freeze` does, and leave the guest as it is."""
        if again:
            for what in ("file", "qcow2"):
                await self._forget(what)
            await self._discard()
            with suppress(FileNotFoundError):
                await asyncio.to_thread(os.unlink, self._path)
        await self.open(again=again)

    async def open(self, *, again: bool = False) -> None:
        """Make and open the overlay; raises `CommitFailed` for a file that is there already.

        With `again` one that only QEMU sees is what a former process of ours has made.
        """
        obstacle = await self.obstacle(ours=again)
        if obstacle is not None:
            raise CommitFailed(obstacle)
        await self._open()

    async def obstacle(self, *, ours: bool = False) -> str | None:
        """Why it can't be made: a file that is there already is not overwritten.

        ``blockdev-create`` would, so QEMU is asked where its files can't be looked at from here;
        not if what it has there is `ours`.
        """
        there = await asyncio.to_thread(os.path.lexists, self._path)
        if there or (not ours and not self._is_here() and await self._can_be_opened()):
            return f"{self.filename} exists already; a fresh overlay needs a new file"
        return None

    def _is_here(self) -> bool:
        """Whether its name means here what it means to QEMU."""
        known = self._cwd is not None or os.path.isabs(self.filename)
        return known and names_are_ours(self._monitor.peer_pid)

    async def _can_be_opened(self) -> bool:
        node = {"driver": "file", "filename": self.filename, "node-name": self._file_node}
        try:
            await self._monitor.execute("blockdev-add", {**node, "read-only": True})
        except CommandRefused:
            return False
        await self._monitor.execute("blockdev-del", {"node-name": self._file_node})
        return True

    async def lay(self) -> None:
        """Put it over the base, whose users it takes over.

        The stale layers are closed before: QEMU lays nothing over a node that backs another.
        """
        if self._tried:
            fresh = (await read_graph(self._monitor)).nodes.get(self.node)
            if fresh is None:
                raise CommitFailed(f"QEMU has no node {self.node} any more")
            if "backing" in fresh.children:
                return  # the reply was lost, not the command
        self._tried = True
        for image in (self._plan.top, *self._plan.between):
            if not image.node_name.startswith("#"):
                with suppress(CommandRefused):  # then QEMU refuses the overlay, and says why
                    await self._monitor.execute("blockdev-del", {"node-name": image.node_name})
        self._laid = True
        arguments = {"node": self._plan.base.node_name, "overlay": self.node}
        await self._monitor.execute("blockdev-snapshot", arguments)

    async def thaw(self) -> None:
        """Let the guest go on, if it was paused here."""
        still = self._still
        if still is None:
            return
        if still.disturbed and self._laid:
            base = self._plan.base.filename
            self.disturbed = (
                "somebody let the guest go on before the fresh overlay lay, so that"
                f" {base} may hold what it wrote after its instant"
            )
        self.remark = await still.go_on()
        self._still = None
        if self._stopped_at is not None:
            self.paused = asyncio.get_running_loop().time() - self._stopped_at
            self._stopped_at = None

    def leave(self) -> None:
        """Nobody sees to the guest any more: it is as it is."""
        if self._still is not None:
            self._still.leave()

    async def undo(self) -> None:
        """It was not laid over the base: close it, and unlink what was made of it here."""
        if not self._begun:
            return
        for what in ("file", "qcow2"):
            await self._forget(what)
        await self._discard()
        graph = await read_graph(self._monitor)
        nodes = graph.nodes
        opened = {graph.file(node) for node in nodes.values()}
        if nodes.keys() & {self.node, self._file_node} or opened & {self._path, self.filename}:
            return  # somebody uses it after all
        if self._is_here():
            with suppress(OSError):
                await asyncio.to_thread(os.unlink, self._path)

    async def left(self) -> Left | None:
        """What is left of it now that QEMU has ended: unlinked, where it is nobody's but ours."""
        if not self._begun:
            return None
        if self._laid:
            return Left(self.filename, laid=True)
        if not self._restored and self._here and has_ended(self._monitor.peer_pid):
            try:
                await asyncio.to_thread(os.unlink, self._path)
            except FileNotFoundError:
                return None
            except OSError:
                return Left(self.filename, laid=False)
            return None
        return Left(self.filename, laid=False)

    async def image(self) -> Image:
        """The overlay as QEMU has it."""
        return read_image(await read_graph(self._monitor), self.node)

    @property
    def _path(self) -> str:
        return os.path.join(self._cwd or os.getcwd(), self.filename)

    async def _open(self) -> None:
        top = self._plan.top
        graph = await read_graph(self._monitor)
        self.size = self._size_now(graph)
        name = await asyncio.to_thread(self._backing_name, graph)
        created = {"driver": "file", "filename": self.filename, "size": 0}
        self._begun, self._here = True, self._is_here()
        await self._create("file", created)
        node = {"driver": "file", "filename": self.filename, "node-name": self._file_node}
        await self._monitor.execute("blockdev-add", node)
        image: dict[str, Any] = {
            "driver": "qcow2",
            "file": self._file_node,
            "size": self.size,
            "backing-file": name.text,
            "backing-fmt": name.format,
        }
        if top.cluster_size and top.driver == "qcow2":
            image["cluster-size"] = top.cluster_size
        await self._create("qcow2", image)
        overlay = {
            "driver": "qcow2",
            "file": self._file_node,
            "node-name": self.node,
            "backing": None,
        }
        await self._monitor.execute("blockdev-add", overlay)

    def _backing_name(self, graph: BlockGraph) -> BackingName:
        """What its header calls the base.

        QEMU shows an overlay with a relative name as ``json:``, so that one which is shown by its
        file's name goes on being so, unless the caller wants a relative name.
        """
        plan = self._plan
        layers = [] if plan.top == plan.base else [plan.top, *plan.between]
        kept = None if plan.top.shown.startswith("json:") else False
        return name_below(
            graph,
            plan.base.node_name,
            self.filename,
            View.of(self._monitor.peer_pid, self._cwd),
            through=[image.node_name for image in layers],
            relative=plan.keep_relative or kept,
        )

    def _size_now(self, graph: BlockGraph) -> int:
        """The disk's; it may have been resized since the plan was made."""
        layers = (self._plan.base, self._plan.top)
        now = [read_image(graph, i.node_name) for i in layers if i.node_name in graph.nodes]
        return max(image.virtual_size or 0 for image in now or layers)

    async def _create(self, what: str, options: Mapping[str, Any]) -> None:
        """One ``blockdev-create`` job, from start to dismissal."""
        job = self._creation(what)
        with self._monitor.events("JOB_STATUS_CHANGE") as changes:
            await self._monitor.execute("blockdev-create", {"job-id": job, "options": options})
            await self._concluded(job, changes)
        error = (await self._job(job) or {}).get("error")
        await self._monitor.execute("job-dismiss", {"id": job})
        if error:
            raise CommitFailed(f"QEMU could not create {self.filename}: {error}", error=error)

    async def _forget(self, what: str) -> None:
        """See a former process's ``blockdev-create`` job end, and dismiss it."""
        job = self._creation(what)
        with self._monitor.events("JOB_STATUS_CHANGE") as changes:
            found = await self._job(job)
            if found is None:
                return
            if found.get("status") != "concluded":
                await self._concluded(job, changes)
        await self._monitor.execute("job-dismiss", {"id": job})

    def _creation(self, what: str) -> str:
        return f"{self._plan.job_id}-create-{what}"

    async def _job(self, job: str) -> Mapping[str, Any] | None:
        jobs = await self._monitor.execute("query-jobs")
        return next((entry for entry in jobs if entry.get("id") == job), None)

    async def _concluded(self, job: str, changes: EventStream) -> None:
        """Wait for its end; an event that does not come is asked for."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._monitor.command_timeout):
                while not await self._is_over(job, changes):
                    pass
                return
        raise CommitFailed(
            f"QEMU did not create {self.filename} within {self._monitor.command_timeout:g} s"
        )

    async def _is_over(self, job: str, changes: EventStream) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                async for change in changes.raw():
                    if (change.get("id"), change.get("status")) == (job, "concluded"):
                        return True
        found = await self._job(job)
        return found is None or found.get("status") == "concluded"

    async def _discard(self) -> None:
        for node in (self.node, self._file_node):
            with suppress(CommandRefused):  # not opened yet, or in use
                await self._monitor.execute("blockdev-del", {"node-name": node})


def interrupted_recycles(graph: BlockGraph) -> list[dict[str, str]]:
    """Fresh overlays of ours that were opened and never laid: whoever did it was killed."""
    found = []
    for name in graph.nodes:
        ours = name.startswith(JOB_PREFIX) and name.endswith("-top")
        if ours and "backing" not in graph.nodes[name].children and not graph.parents.get(name):
            file = graph.leaf(name).raw.get("file")
            if WINDOW_MARK in str(file):
                continue  # a window's
            text = (
                f"An interrupted recycle left the empty overlay {file} open as node {name}, and"
                " perhaps the guest paused: end its job (abort, or pivot), let the guest go on"
                f" with 'cont', and close the overlay with 'blockdev-del {name}'"
            )
            found.append({"node": name, "overlay": str(file), "next": text})
    return found
