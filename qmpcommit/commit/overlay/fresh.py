"""A fresh, empty overlay over the base, before the guest can write to the base.

What `block-job-cancel` leaves is an overlay with all its clusters; what is wanted for the next
round is one with *only the changes since*. So the job pivots while the guest is paused, the
fresh overlay, made and opened before that, is laid over the base, and the guest goes on.

What it is like is said in `overlay_like`; its file is made here wherever that can be (see
`overlay_file`), and else by QEMU, in a way that can't empty a file that is there.

Rests on ``blockdev-add``, ``blockdev-create``, ``stop``, ``blockdev-snapshot`` and ``cont``; on
``chardev-add`` where only QEMU can make the file, and ``block_resize`` where only its size tells
which file QEMU has opened.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qmpcommit.block.backing_name import BackingName, View, detours, is_within, name_below
from qmpcommit.block.bitmaps import bitmaps_of
from qmpcommit.block.chain import Image, absolute, read_image
from qmpcommit.block.command_line import read_command_line
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.block.identity import FileId, file_id, locate, names_are_ours, open_files
from qmpcommit.commit.overlay.creation_job import create, forget
from qmpcommit.commit.overlay.file import (
    NewFile,
    differences,
    in_memory,
    is_full,
    make_file,
    remove_new,
    why_not,
    write_base_name,
)
from qmpcommit.commit.overlay.like import (
    Likeness,
    as_opened,
    declared_options,
    is_encrypted,
    likeness,
    unfit,
)
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.overlay.trial import refused_options
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.recycle import Left, has_ended
from qmpcommit.errors import CommandRefused, CommitFailed
from qmpcommit.guest.hold import Hold, Step
from qmpcommit.guest.marks import mark_of_recycle
from qmpcommit.guest.run_state import runs
from qmpcommit.names import JOB_PREFIX, node_stem
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger


_NOT_HERE = "No such file or directory"
_NOT_ALLOWED = "Permission denied"
"""What the system says through QEMU; in another language nothing is believed."""


def _is_plain(shown: str) -> bool:
    """Whether QEMU shows an image by the name of a file."""
    return ":" not in shown.split("/", maxsplit=1)[0]


class FreshOverlay:
    """The overlay of one recycle; `paused` is for how long the guest stood still, in seconds.

    `remark` says why it was not let go on, where something else has stopped it by then. Each step
    is safe to repeat. `thaw` continues the guest only if `freeze` paused it; unless it is
    `alone`, whoever paused the guest for several of its disks does. It is like the overlay that it
    follows, the plan's top, but for what is `asked`; `warnings` tell where it could not be. One
    that is not `lasting` is merged back soon, and need not be like it in all.
    """

    def __init__(
        self,
        monitor: Monitor,
        plan: Plan,
        filename: str,
        cwd: str | None,
        ledger: Ledger | None = None,
        *,
        asked: OverlayOptions | None = None,
        alone: bool = True,
        lasting: bool = True,
    ) -> None:
        self.filename = filename
        self.warnings: list[str] = []
        self._asked = asked or OverlayOptions()
        self._lasting = lasting
        self._file: FileId | None = None
        self._made: NewFile | None = None
        self._called: set[str] = set()
        self._alone = alone
        self._guest: Hold | None = None
        self._cwd = cwd
        stem = node_stem(plan.job_id)
        self.node = f"{stem}-top"
        self.paused: float | None = None
        self.remark = self.disturbed = ""
        self.size = 0
        self._monitor, self._plan = monitor, plan
        self._file_node = f"{stem}-file"
        self._begun = self._tried = self._laid = self._restored = self._here = False
        self._astray = False
        self._ledger = ledger

    def restore(self, *, stopped: bool, laid: bool = False) -> None:
        """Take up what a former process did; it paused the guest if `stopped`.

        It may have put the overlay over the base if `laid`.
        """
        self._begun = self._tried = self._restored = True
        self._laid = laid
        if stopped:
            self._guest = self._held(paused=True)

    def _held(self, *, paused: bool = False) -> Hold:
        """The guest, which a former process has `paused`, and left a mark of that."""
        from qmpcommit.commit.claim import number_of

        mark = mark_of_recycle(number_of(self._plan.disk)) if self._alone else None
        return Hold(self._monitor, "pause", mark, note=self._noted, paused=paused)

    async def _noted(self, step: Step) -> None:
        if step == "hold" and self._ledger is not None:
            await self._ledger.note("stop")

    async def freeze(self, *, again: bool = False, stopped: bool = False) -> None:
        """Make and open the overlay, then pause the guest, if it runs.

        Raises `CommitFailed` for a file that is there already: nothing is overwritten. With
        `again`, what is there under the overlay's node-name or its file name is what a former
        process of ours made and never used: it is made anew. It paused the guest if `stopped`.
        """
        if stopped:  # it goes on, whatever fails from here on
            self._guest = self._held(paused=True)
        await self.make(again=again)
        if self._guest is None and (self._alone or await runs(self._monitor)):
            self._guest = self._held()
        if self._guest is not None:
            await self._guest.take()
        await self.check_named()

    async def make(self, *, again: bool = False) -> None:
        """Make and open the overlay, as `freeze` does, and leave the guest as it is."""
        if again:
            await self._forget()
            await self._close_nodes()
            if self._is_here():
                names = await self._names(await read_graph(self._monitor))
                await asyncio.to_thread(remove_new, self._path, None, names)
        await self.open(again=again)

    async def open(self, *, again: bool = False) -> None:
        """Make and open the overlay; raises `CommitFailed` for a file that is there already.

        With `again` one that only QEMU sees is what a former process of ours has made, if it is
        empty.
        """
        obstacle = await self.obstacle(ours=again)
        if obstacle is not None:
            raise CommitFailed(obstacle)
        await self._open()
        await self.check_named()

    async def obstacle(self, *, ours: bool = False) -> str | None:
        """Why it can't be made: a file that is there already is not overwritten.

        QEMU is asked where its files can't be looked at from here: that a name is not seen is no
        proof that it is free. Not if what it has there is `ours`.
        """
        if not _is_text(self.filename):
            return (
                f"{self.filename!r} is no UTF-8, in which alone QEMU is told names: name another"
                " file for the fresh overlay"
            )
        if await asyncio.to_thread(os.path.lexists, self._path):
            return self._exists
        if self._is_here():
            memory = await asyncio.to_thread(in_memory, self._path)
            if memory:
                return (
                    f"{self.filename} would be in {memory}, which is the host's memory: name a file"
                    " or a folder on a disk for the fresh overlay"
                )
            error = await asyncio.to_thread(why_not, self._path)
            if error is not None and not is_full(error):
                return f"{self.filename} can't be made: {error.strerror}"
        if self._asked.options:
            graph = await read_graph(self._monitor)
            like = await asyncio.to_thread(self._likeness, graph)
            refused = await refused_options(self._monitor, like)
            if refused is not None:
                return f"{self.filename} can't be opened: {refused}"
        return None if ours or await self._is_seen() else await self._seen_by_qemu()

    async def without_room(self) -> str | None:
        """Why its file would find no room, as far as can be seen from here."""
        error = await asyncio.to_thread(why_not, self._path) if self._is_here() else None
        if error is None or not is_full(error):
            return None
        return f"there is no room for the fresh overlay {self.filename}: {error.strerror}"

    @property
    def _exists(self) -> str:
        return f"{self.filename} exists already; a fresh overlay needs a new file"

    def _is_here(self) -> bool:
        """Whether its name means here what it means to QEMU."""
        known = self._cwd is not None or os.path.isabs(self.filename)
        return known and names_are_ours(self._monitor.peer_pid)

    async def _is_seen(self) -> bool:
        """Whether a name that is free here is so for QEMU too, beyond doubt."""
        if not self._is_here() or not await self._open_files():
            return False
        folder = os.path.dirname(self._path)
        return await asyncio.to_thread(os.access, folder, os.X_OK)

    async def _open_files(self) -> set[FileId]:
        """What QEMU has open; nothing where that can't be seen."""
        pid = self._monitor.peer_pid
        return set((await asyncio.to_thread(open_files, pid)).values()) if pid else set()

    async def _seen_by_qemu(self) -> str | None:
        """Why QEMU can't make it, as far as QEMU sees."""
        refusal = await self._refusal(self.filename)
        if refusal is None:
            return self._exists
        if _NOT_HERE not in refusal:
            return (
                f"whether {self.filename} is there already can't be told from here, and QEMU says"
                f" '{refusal}'; name a new file for the fresh overlay in a folder that QEMU may"
                " write to"
            )
        folder = os.path.dirname(self.filename) or "."
        if _NOT_HERE in (await self._refusal(folder) or ""):
            return f"there is no folder {folder} for the fresh overlay, as QEMU sees its files"
        return None

    async def _refusal(self, path: str) -> str | None:
        """What QEMU says where it can't open this to read it."""
        node = {"driver": "file", "filename": path, "node-name": self._file_node}
        try:
            await self._monitor.execute("blockdev-add", {**node, "read-only": True})
        except CommandRefused as error:
            return error.desc
        await self._monitor.execute("blockdev-del", {"node-name": self._file_node})
        return None

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
        arguments = {"node": self._plan.base.over, "overlay": self.node}
        await self._monitor.execute("blockdev-snapshot", arguments)
        await self.look()

    async def look(self) -> None:
        """Warn if the file that the guest writes to has lost its name meanwhile."""
        text = None if self._astray else await asyncio.to_thread(self._lost)
        if text is not None:
            self._astray = True
            self.warnings.append(
                f"{text}. The guest writes to it nevertheless: copy the disk out of the running VM"
                " (as by drive-backup), or put the file back under its name from /proc"
            )

    async def check_named(self) -> None:
        """Raise `CommitFailed` where its name leads elsewhere, while it can still be left.

        A disk whose file has no name is gone with QEMU.
        """
        text = await asyncio.to_thread(self._lost)
        if text is not None:
            raise CommitFailed(text)

    def _lost(self) -> str | None:
        """That its name leads to another file than QEMU has, as far as that is known."""
        with suppress(OSError):
            if self._file is None or FileId.of(os.stat(self._path)) == self._file:
                return None
        return (
            f"the name {self.filename} does not lead to the fresh overlay any more that QEMU has"
            " open: somebody has removed it, or put a link or another file in its place or in that"
            " of one of its folders"
        )

    async def thaw(self) -> None:
        """Let the guest go on, if it was paused here."""
        guest = self._guest
        if guest is None:
            return
        if guest.disturbed and self._laid:
            base = self._plan.base.filename
            self.disturbed = (
                "somebody let the guest go on before the fresh overlay lay, so that"
                f" {base} may hold what it wrote after its instant"
            )
        await guest.release()
        self._guest, self.remark, self.paused = None, guest.remark, guest.seconds

    def leave(self) -> None:
        """Nobody sees to the guest any more: it is as it is."""
        if self._guest is not None:
            self._guest.leave()

    async def undo(self) -> None:
        """It was not laid over the base: close it, and unlink what was made of it here."""
        if not self._begun:
            return
        await self._forget()
        await self._close_nodes()
        graph = await read_graph(self._monitor)
        nodes = graph.nodes
        opened = {graph.file(node) for node in nodes.values()}
        if nodes.keys() & {self.node, self._file_node} or opened & {
            self._path, graph.full(self.filename)
        }:  # fmt: skip
            return  # somebody uses it after all
        if self._is_here():
            names = await self._names(graph)
            await asyncio.to_thread(remove_new, self._path, self._file, names)

    async def unlink(self) -> None:
        """Unlink its file while QEMU has it open, and nothing uses it; `undo` closes it then.

        Whoever is killed between the two leaves nodes, which can be found, and no file.
        """
        if self._is_here():
            names = await self._names(await read_graph(self._monitor))
            await asyncio.to_thread(remove_new, self._path, self._file, names)

    async def left(self) -> Left | None:
        """What is left of it now that QEMU has ended: unlinked, where it is nobody's but ours."""
        if not self._begun:
            return None
        if self._laid:
            return Left(self.filename, laid=True)
        if not self._restored and self._here and has_ended(self._monitor.peer_pid):
            names = await self._names(None)
            await asyncio.to_thread(remove_new, self._path, self._file, names)
            if not await asyncio.to_thread(os.path.lexists, self._path):
                return None
        return Left(self.filename, laid=False)

    async def options(self, graph: BlockGraph) -> dict[str, Any]:
        """What its node is opened with, beside its names and children.

        The former overlay has lost detect-zeroes to it by the ``blockdev-snapshot``.
        """
        like = await asyncio.to_thread(self._likeness, graph)
        return as_opened(graph.nodes[self.node], like.node)

    async def image(self) -> Image:
        """The overlay as QEMU has it."""
        return read_image(await read_graph(self._monitor), self.node)

    @property
    def _path(self) -> str:
        return os.path.join(self._cwd or os.getcwd(), self.filename)

    async def _names(self, graph: BlockGraph | None) -> set[str]:
        """What its header may call the base, whoever of ours has made it."""
        base = self._plan.base
        names = {base.shown, base.filename, absolute(base, self._cwd), *self._called}
        if graph is not None and base.node_name in graph.nodes:
            for moving in (False, True):
                names.add((await asyncio.to_thread(self._backing_name, graph, moving)).text)
        return names

    async def _open(self) -> None:
        base, top = self._plan.base, self._plan.top
        graph = await read_graph(self._monitor)
        self.size = self._size_in(graph)
        why = unfit(graph, top.node_name, base.node_name, self._asked, lasting=self._lasting)
        if why is not None:
            raise CommitFailed(f"{self.filename} was not made: {why}")
        like = await asyncio.to_thread(self._likeness, graph)
        self.warnings = list(like.warnings)
        name = await asyncio.to_thread(self._backing_name, graph)
        moving = await asyncio.to_thread(self._backing_name, graph, True)
        self._begun, self._here = True, self._is_here()
        await self._open_file(graph, like)
        if self._file is not None and self._lasting:
            name = await asyncio.to_thread(self._as_shown, graph, name)
        self._called = {name.text, moving.text}
        image: dict[str, Any] = {
            "driver": "qcow2",
            "file": self._file_node,
            "size": self.size,
            "backing-file": name.text,
            "backing-fmt": name.format,
            **like.create,
        }
        await create(self._monitor, self._creation("qcow2"), self.filename, image)
        overlay = {
            **like.node,
            "driver": "qcow2",
            "file": self._file_node,
            "node-name": self.node,
            "backing": None,
        }
        await self._monitor.execute("blockdev-add", overlay)
        if self._file is not None and self._lasting and moving.text != name.text:
            await self._call_base(self._file, moving.text)

    async def _call_base(self, file: FileId, name: str) -> None:
        """Have the header name the base as the former one's did, now that QEMU has read it."""
        try:
            await to_the_end(asyncio.to_thread(write_base_name, self._path, file, name))
        except OSError as error:
            raise CommitFailed(f"{self.filename} could not be written: {error.strerror}") from error

    def _backing_name(self, graph: BlockGraph, moving: bool = False) -> BackingName:
        """What its header calls the base: as QEMU is told, or, `moving`, as it is to be on disk.

        QEMU shows an overlay with a relative name as ``json:``, so that one which is shown by its
        file's name goes on being so, unless the caller wants a relative name. On disk it is
        relative if all names of the layers that it takes the place of were so, and they could be
        moved together.
        """
        plan = self._plan
        layers = [] if plan.top == plan.base else [plan.top, *plan.between]
        kept = None if moving or plan.top.shown.startswith("json:") else False
        return name_below(
            graph,
            plan.base.node_name,
            self.filename,
            View.of(self._monitor.peer_pid, self._cwd),
            through=[image.node_name for image in layers],
            relative=plan.keep_relative or kept,
        )

    def _as_shown(self, graph: BlockGraph, name: BackingName) -> BackingName:
        """In QEMU's own spelling, with links and all, if QEMU shows the former one by its file.

        It compares texts, and would show the fresh one as ``json:``. The header has it for the
        moment only; where QEMU will write it again, with bitmaps, it has to be right at once. One
        that gets a bitmap later has it from then on, so that it must not lead through a folder
        that may go with the layers that are merged away.
        """
        top, told = self._plan.top, self._plan.base.shown
        if not name.text.startswith("/") or not _is_plain(top.shown) or not _is_plain(told):
            return name
        meant = os.path.join(self._cwd or os.getcwd(), told)
        told_here = os.path.join(os.path.dirname(self._path), told)
        if file_id(told_here) != file_id(meant):  # as a name in a header it means another one
            return name
        home = os.path.realpath(os.path.dirname(self._path))
        if any(not is_within(home, os.path.realpath(each)) for each in detours(meant)):
            return name
        kept = top.node_name in graph.nodes and bitmaps_of(graph, top.node_name)
        return name if kept else name._replace(text=told)

    def _size_in(self, graph: BlockGraph) -> int:
        """The disk's; it may have been resized since the plan was made."""
        layers = (self._plan.base, self._plan.top)
        now = [read_image(graph, i.node_name) for i in layers if i.node_name in graph.nodes]
        return max(image.virtual_size or 0 for image in now or layers)

    def _likeness(self, graph: BlockGraph) -> Likeness:
        top, base = self._plan.top.node_name, self._plan.base.node_name
        ours = top.startswith(JOB_PREFIX) and top.endswith("-top")
        line = read_command_line(self._monitor.peer_pid)
        declared, below = declared_options(line, graph, self._plan.disk, top, ours=ours)
        return likeness(
            graph,
            top,
            self._asked,
            declared=declared,
            file_declared=below,
            encrypted=is_encrypted(graph, top) or is_encrypted(graph, base),
            lasting=self._lasting,
            called=self.filename,
        )

    # -- its file --------------------------------------------------------------------------------

    async def _open_file(self, graph: BlockGraph, like: Likeness) -> None:
        """A new file, empty, and open in QEMU."""
        node = {
            **like.file,
            "driver": "file",
            "filename": self.filename,
            "node-name": self._file_node,
        }
        followed = await asyncio.to_thread(self._followed, graph)
        try:
            if not await self._made_here(node, followed):
                await self._made_by_qemu(node)
        except CommandRefused as error:
            raise CommitFailed(
                f"QEMU could not create {self.filename}: {error.desc}", error=error.desc
            ) from error
        if self._here and followed:
            unlike = await asyncio.to_thread(differences, self._path, followed)
            if unlike:
                self.warnings.append(f"{self.filename} has {unlike} as {followed} has")

    def _followed(self, graph: BlockGraph) -> str:
        """Where the file is that it is to be like; "" where that can't be looked at."""
        top = self._plan.top.node_name
        if top not in graph.nodes:
            return ""
        filename = str(graph.leaf(top).raw.get("file") or "")
        return locate(filename, pid=self._monitor.peer_pid, cwd=self._cwd).path

    async def _made_here(self, node: dict[str, Any], followed: str) -> bool:
        """Make it, and have QEMU open it; whether it could be, and QEMU has opened no other."""
        if not self._here:
            return False
        try:
            made = await to_the_end(asyncio.to_thread(self._make, followed))
            return await self._handed_over(node, made)
        except FileExistsError:
            raise CommitFailed(self._exists) from None
        except OSError:
            return False  # perhaps QEMU can
        except BaseException:
            remove_new(self._path, self._file, ())
            raise
        finally:
            if self._made is not None:
                self._made.close()
                self._made = None

    def _make(self, followed: str) -> NewFile:
        made = self._made = make_file(self._path, followed)  # also for who is cancelled meanwhile
        self._file = made.file
        return made

    async def _handed_over(self, node: dict[str, Any], made: NewFile) -> bool:
        """Whether QEMU could open it; raises `CommitFailed` where it has opened another file."""
        try:
            await self._monitor.execute("blockdev-add", node)
        except CommandRefused as error:
            if _NOT_ALLOWED not in error.desc and _NOT_HERE not in error.desc:
                raise
            await asyncio.to_thread(remove_new, self._path, made.file, ())
            self._file = None
            return False
        same = made.file in await self._open_files() or await self._opened_marked(node, made)
        if not same or not await asyncio.to_thread(made.is_named):
            await self._monitor.execute("blockdev-del", {"node-name": self._file_node})
            raise CommitFailed(
                f"QEMU opened another file by the name {self.filename} than the one that was made"
                " for the fresh overlay: somebody has put a link or a file in its place, or in that"
                " of one of its folders. Nothing was written to it"
            )
        return True

    async def _opened_marked(self, node: dict[str, Any], made: NewFile) -> bool:
        """The same, told by a size that no other file has.

        For a QEMU whose open files can't be seen, or that is not itself at the socket's other end.
        """
        await self._monitor.execute("blockdev-del", {"node-name": self._file_node})
        size = made.mark()
        await self._monitor.execute("blockdev-add", node)
        if await self._opened_size() != size:
            return False
        await self._monitor.execute("block_resize", {"node-name": self._file_node, "size": 0})
        return True

    async def _made_by_qemu(self, node: dict[str, Any]) -> None:
        """Where QEMU alone can make it, by what never empties a file: one that is there stays.

        ``blockdev-create`` would empty it, so a character device that appends makes it.
        """
        await to_the_end(self._appended())
        await self._monitor.execute("blockdev-add", node)
        if await self._opened_size() != 0:
            await self._monitor.execute("blockdev-del", {"node-name": self._file_node})
            raise CommitFailed(f"{self._exists}. Nothing was written to it")

    async def _appended(self) -> None:
        device = {"type": "file", "data": {"out": self.filename, "append": True}}
        await self._monitor.execute("chardev-add", {"id": self._file_node, "backend": device})
        await self._monitor.execute("chardev-remove", {"id": self._file_node})

    async def _opened_size(self) -> int | None:
        """The size of what QEMU has opened as its file."""
        node = (await read_graph(self._monitor)).nodes.get(self._file_node)
        size: int | None = node and (node.raw.get("image") or {}).get("virtual-size")
        return size

    # -- what a former process has left ------------------------------------------------------------

    async def _forget(self) -> None:
        """See a former process's creations end."""
        for what in ("file", "qcow2"):
            await forget(self._monitor, self._creation(what), self.filename)
        with suppress(CommandRefused):  # it was killed before that, or this QEMU has none
            await self._monitor.execute("chardev-remove", {"id": self._file_node})

    def _creation(self, what: str) -> str:
        return f"{self._plan.job_id}-create-{what}"

    async def _close_nodes(self) -> None:
        for node in (self.node, self._file_node):
            with suppress(CommandRefused):  # not opened yet, or in use
                await self._monitor.execute("blockdev-del", {"node-name": node})


def _is_text(filename: str) -> bool:
    try:
        filename.encode()
    except UnicodeEncodeError:
        return False
    return True
