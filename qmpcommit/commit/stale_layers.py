"""After a pivot: the stale layers are closed, and their files deleted or renamed if asked.

In this order: the nodes of the stale layers are closed (so that their locks are gone, and nobody
commits them any more), the owner's hook persists the new disk path, and only after both the files
go. What can't be done is told as a warning: the pivot itself has happened.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import struct
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypedDict

from qmpcommit.block.bitmaps import Carrying, busy_bitmaps
from qmpcommit.block.chain import Image
from qmpcommit.block.graph import FILTERS, BlockGraph, read_graph
from qmpcommit.block.identity import F_OFD_GETLK, FileId, OpenFiles, unnamed
from qmpcommit.block.qcow2 import snapshot_count
from qmpcommit.callback import Failed, ask
from qmpcommit.commit.deletable import not_theirs
from qmpcommit.commit.migration import objection
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.stale_mark import Marks
from qmpcommit.errors import CommandRefused, InvalidRequest, QmpCommitError
from qmpcommit.qmp.monitor import Monitor

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.pace import Converge
    from qmpcommit.commit.together import Together


class Stall(NamedTuple):
    """What the owner of a stalled job is told: the storage under `base` failed or is full."""

    vm: str
    disk: str
    job_id: str
    base: Image


OnStall: TypeAlias = Callable[[Stall], Awaitable[object]]
"""Called when a job waits on a storage error; when it returns, the job is resumed."""

OnPivot: TypeAlias = Callable[[CommitOutcome], Awaitable[object]]
"""Called between the pivot and the deletion, to persist the VM's new disk path."""


class BeforeClosing:
    """An `OnPivot` of our own that is awaited while the stale layers' nodes are open still.

    No outcome tells of it, unless it fails.
    """

    def __init__(self, hook: OnPivot) -> None:
        self._hook = hook

    async def __call__(self, outcome: CommitOutcome) -> None:
        """Await the hook."""
        await self._hook(outcome)


Barrier: TypeAlias = Callable[[], Awaitable[str | None]]
"""Awaited while PENDING holds the disk's I/O: None lets the job end, a reason cancels it."""


async def nobody_met() -> str | None:
    """The barrier of a group's member that was taken up without its group."""
    return "it is one of a group, and the others of it were not taken up with it"


class Hooks(TypedDict, total=False):
    """What the caller of a commit has beside it: what only lives in its process."""

    on_pivot: OnPivot | None
    on_stall: OnStall | None
    converge: Converge | None
    ledger: Ledger | None


class Around(NamedTuple):
    """What surrounds the two phases: hooks, bitmaps to carry, and which files there were.

    `files` are the stale layers' files as they were when the commit was planned, by node-name;
    `cwd` is QEMU's working directory; `ledger` is where steps are noted before they are taken;
    `barrier` is awaited last before the job's end is made final; `gate` is passed by what follows
    the end, so that many jobs that end at once don't keep those that become READY waiting;
    `together` are the jobs of its group, which are dismissed when all have ended;
    with `in_migration` it is sent and ended also while the VM is being migrated.
    """

    on_pivot: OnPivot | None = None
    on_stall: OnStall | None = None
    carrying: Carrying | None = None
    files: Mapping[str, FileId | None] = {}
    cwd: str | None = None
    converge: Converge | None = None
    ledger: Ledger | None = None
    barrier: Barrier | None = None
    together: Together | None = None
    gate: asyncio.Semaphore | None = None
    in_migration: bool = False

    def check(self) -> None:
        """Refuse what could not be done when its time comes; raises `InvalidRequest`."""
        for name, hook in (("on_pivot", self.on_pivot), ("on_stall", self.on_stall)):
            if hook is not None and not callable(hook):
                raise InvalidRequest(f"{name} is an async callable, not {hook!r}")
        if self.converge is not None and not hasattr(self.converge, "deadline"):
            raise InvalidRequest(
                f"converge is a Converge(...), as in Converge(deadline=60), not {self.converge!r}"
            )

    def prepares(self, plan: Plan) -> bool:
        """Whether something has to be done in PENDING, before the job's end is made final."""
        return not plan.two_phase or (self.carrying is not None and bool(self.carrying.names))


async def clear_away(
    monitor: Monitor,
    plan: Plan,
    outcome: CommitOutcome,
    around: Around,
    *,
    keep_files: bool = False,
    again: bool = False,
    graph: BlockGraph | None = None,
) -> CommitOutcome:
    """Nodes, hook, files, in this order; the outcome with what was done and what was not.

    With `again` a former process may have done a part of it. `graph` is the block graph where
    that was read just now.
    """
    warnings, deleted = list(outcome.warnings), list(outcome.deleted)
    renamed = list(outcome.renamed)
    hook: Literal["", "done", "failed"] = ""
    stale = (plan.top, *plan.between)
    marks, why = await _marks(monitor, plan, around)
    unclosed: QmpCommitError | None = None
    early = isinstance(around.on_pivot, BeforeClosing)
    if early and around.on_pivot is not None:
        hook = await _persisted(around.on_pivot, outcome, warnings)
    try:
        if again or outcome.action == "recycle":
            warnings += await close_layers(monitor, stale, marks)
        else:
            names = [image.node_name for image in stale]
            warnings += await close_nodes(monitor, names, marks, graph)
        if marks is not None and not again:  # else another file may have its name and place by now
            await marks.mark_closed(stale, around.files, around.cwd)
        elif marks is not None:
            await marks.close_left()
    except QmpCommitError as error:
        unclosed = error  # the hook is called all the same: the pivot has happened
    if around.on_pivot is not None and not hook:
        hook = await _persisted(around.on_pivot, outcome, warnings)
    try:
        if unclosed is not None:
            raise unclosed
        rewritten = not plan.two_phase or outcome.action == "recycle"
        astray = False
        if rewritten or plan.stale != "leave":
            from qmpcommit.commit.headers import wrong_headers

            wrong = await wrong_headers(
                monitor, around.cwd, plan.base.node_name, rewritten=rewritten
            )
            astray = any(each.astray for each in wrong)
            warnings += map(str, wrong)
        files = plan.stale != "leave" and hook != "failed" and not keep_files
        if files and not around.in_migration:
            why = await objection(monitor)
        if why:
            warnings.append(f"{', '.join(plan.invalidated)} stays, and is stale: {why}")
        elif rewritten and astray:
            warnings.append(f"{', '.join(plan.invalidated)} stays, until that header is mended")
        elif files:
            await _clear_files(
                monitor, plan, around, warnings=warnings, deleted=deleted, renamed=renamed
            )
    except QmpCommitError as error:
        warnings.append(f"the stale layers were not cleared away: {error.message}")
    hook = "" if early and hook == "done" else hook
    return replace(outcome, warnings=warnings, deleted=deleted, renamed=renamed, hook=hook)


async def _marks(monitor: Monitor, plan: Plan, around: Around) -> tuple[Marks | None, str]:
    """What marks the layers that are left, or why another host may use them.

    None where they go, too.
    """
    why = ""
    if plan.stale != "delete" and not around.in_migration:
        with suppress(QmpCommitError):
            why = await objection(monitor)
            return None if why else Marks(monitor, plan.job_id), why
    return None, why


async def _clear_files(
    monitor: Monitor,
    plan: Plan,
    around: Around,
    *,
    warnings: list[str],
    deleted: list[str],
    renamed: list[str],
) -> None:
    """The stale layers' files, each with the one that holds its data; what stays is a warning."""
    unlink = partial(
        remove_file,
        graph=await read_graph(monitor),
        base=plan.base,
        cwd=around.cwd,
        pid=monitor.peer_pid,
        held=around.files.get(plan.base.node_name),
    )
    for image in (plan.top, *plan.between):
        new = f"{image.filename}.stale-{plan.job_id}" if plan.stale == "rename" else None
        known = around.files.get(image.node_name)
        problem = await asyncio.to_thread(unlink, image, known, rename_to=new)
        if problem is not None:
            warnings.append(problem)
            continue
        if new is None:
            deleted.append(image.filename)
        else:
            renamed.append(new)
        if image.data_file:
            known = around.files.get(image.data_file)
            problem = await asyncio.to_thread(_remove_data, unlink, image, known, new)
            if problem is not None:
                warnings.append(problem)
            else:
                deleted.append(image.data_file)


async def _persisted(
    on_pivot: OnPivot, outcome: CommitOutcome, warnings: list[str]
) -> Literal["done", "failed"]:
    try:
        await ask(on_pivot, outcome)
    except Failed as failed:
        warnings.append(f"on_pivot failed ({failed}), so no file was deleted")
        return "failed"
    return "done"


async def close_layers(
    monitor: Monitor, stale: Sequence[Image], marks: Marks | None = None
) -> list[str]:
    """`close_nodes`, and the file nodes of layers that were closed before, by us or whoever."""
    warnings = await close_nodes(monitor, [image.node_name for image in stale], marks)
    graph = await read_graph(monitor)
    files = {image.filename for image in stale if image.node_name not in graph.nodes}
    left = [
        name
        for name, node in graph.nodes.items()
        if graph.file(node) in files and not users(graph, name)
    ]
    return warnings + (await close_nodes(monitor, left) if left else [])


async def close_nodes(
    monitor: Monitor,
    stale: list[str],
    marks: Marks | None = None,
    graph: BlockGraph | None = None,
) -> list[str]:
    """Close the stale layers' nodes, topmost first, with the file nodes that only they used.

    With `marks` each layer is marked before. Only what nothing uses any more is closed; what QEMU
    does not let go is a warning. A `graph` that was read just now does where it shows them
    without bitmaps, of which one that is used would be QEMU's end, and without the ended job.
    """
    if graph is None or any(_has_bitmaps_or_job(graph, name) for name in stale):
        graph = await read_graph(monitor)
    todo: list[str] = [name for name in stale if name in graph.nodes]
    for name in list(todo):
        if graph.nodes[name].driver in FILTERS:
            continue  # what lies below it is another layer
        for edge in ("file", "data-file"):
            below = graph.nodes[name].children.get(edge)
            while below is not None and below in graph.nodes:
                todo.append(below)
                below = graph.nodes[below].children.get("file")
    warnings: list[str] = []
    closed: set[str] = set()
    for name in todo:
        if name.startswith("#"):
            closed.add(name)  # QEMU's own: it goes with the node that it belongs to
            continue
        keeping = users(graph, name, closed)
        going = [name, *(each for each in stale if each.startswith("#"))]
        busy = busy_bitmaps((node.raw for node in graph.nodes.values()), going)
        if busy and not keeping:  # it would be QEMU's end
            warnings.append(
                f"node {name} stays open: {', '.join(busy)} is used by an export or a job. Close it"
                " after that (blockdev-del)"
            )
            continue
        if keeping:
            warnings.append(f"node {name} stays open: {', '.join(keeping)} uses it")
            continue
        if marks is not None and name in stale:
            await marks.mark(graph.nodes[name])
        try:
            await monitor.execute("blockdev-del", {"node-name": name})
        except CommandRefused as error:
            if name in (await read_graph(monitor)).nodes:  # else it went with the one above it
                warnings.append(f"node {name} stays open: {error.desc}")
                if marks is not None:
                    await marks.take_back(name)
        closed.add(name)
    return warnings


def _has_bitmaps_or_job(graph: BlockGraph, name: str) -> bool:
    if any(name in job.nodes.values() for job in graph.jobs.values()):
        return True
    return name in graph.nodes and bool(graph.nodes[name].raw.get("dirty-bitmaps"))


def users(graph: BlockGraph, name: str, closed: Collection[str] = ()) -> list[str]:
    """What keeps a node from being closed: nodes above it, devices, exports, jobs."""
    found = sorted(set(graph.parents.get(name, ())).difference(closed))
    for device in graph.devices:
        if (device.get("inserted") or {}).get("node-name") == name:
            found.append(str(device.get("device") or device.get("qdev")))
    found += [str(e.get("id")) for e in graph.exports if e.get("node-name") == name]
    found += [job.id for job in graph.jobs.values() if name in job.nodes.values()]
    return found


def remove_file(
    image: Image,
    known: FileId | None,
    *,
    graph: BlockGraph,
    base: Image,
    cwd: str | None,
    pid: int | None,
    held: FileId | None = None,
    rename_to: str | None = None,
) -> str | None:
    """Unlink (or rename) one stale file; why it was not done, or None.

    Only the very file that the chain had when the commit was planned, only a regular file, and
    all of it the layer's, never through a link, never the base, never one that QEMU or another
    process still uses, never one that the user whose QEMU it is could not delete; and only if its
    data are in a file with a name: that of `base`, which QEMU (process `pid`) has open, and which
    was `held` when the commit was planned.
    """
    path = os.path.join(cwd or os.getcwd(), image.filename)
    if image.is_slice:
        return (
            f"{image.filename} stays: the layer is a part of that file only (a raw offset or size)"
        )
    if known is None:
        return f"{image.filename} stays: {why_unknown(path)}"
    if base.node_name:
        nowhere = unnamed(graph, OpenFiles.of(graph, pid, cwd=cwd), base.node_name, held)
        if nowhere:
            return f"{image.filename} stays, for what it held may be in no other file: {nowhere}"
    try:
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        return f"{image.filename} stays: {error.strerror}"
    name = os.path.basename(path)
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or FileId(found.st_dev, found.st_ino) != known:
            return f"{image.filename} stays: it is not the file that was committed any more"
        foreign = not_theirs(found, os.fstat(folder), pid)
        if foreign:
            return f"{image.filename} stays: {foreign}"
        user = _used_by(graph, known, cwd) or _is_base(base, known, cwd)
        if user:
            return f"{image.filename} stays: {user} uses it"
        if _is_locked(name, folder):
            return f"{image.filename} stays: another process has it open"
        if rename_to is None and snapshot_count(path):
            return f"{image.filename} stays: it holds internal snapshots, which would go with it"
        if rename_to is None:
            os.unlink(name, dir_fd=folder)
        else:
            _rename_new(name, os.path.basename(rename_to), folder)
        with suppress(OSError):  # not every file system syncs a folder; the file has gone
            os.fsync(folder)
    except OSError as error:
        return f"{image.filename} stays: {error.strerror}"
    finally:
        os.close(folder)
    return None


def _remove_data(
    unlink: Callable[[Image, FileId | None], str | None],
    image: Image,
    known: FileId | None,
    renamed: str | None,
) -> str | None:
    """Unlink the external data file of an overlay that is gone; why it was not done, or None."""
    if renamed is not None:
        return f"{image.data_file} stays: {renamed} names it as the file that holds its data"
    problem = unlink(replace(image, filename=image.data_file), known)
    if problem is None:
        return None
    return f"{problem}. It held the data of {image.filename}, and nothing names it any more"


def why_unknown(path: str) -> str:
    """Why a file was not taken for the one that QEMU has open."""
    try:
        found = os.lstat(path)
    except OSError as error:
        return f"it can't be looked at from here ({error.strerror})"
    if stat.S_ISLNK(found.st_mode):
        return f"that name is a link to {os.path.realpath(path)}, which only its owner may delete"
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file"
    return "QEMU was not seen to have this very file open"


def _rename_new(name: str, new: str, folder: int) -> None:
    """Rename without replacing anything."""
    os.link(name, new, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    os.unlink(name, dir_fd=folder)


def _used_by(graph: BlockGraph, known: FileId, cwd: str | None) -> str | None:
    for node in graph.nodes.values():
        filename = str(node.raw.get("file") or "")
        if filename and ":" not in filename.split("/", maxsplit=1)[0]:
            path = os.path.join(cwd or os.getcwd(), filename)
            try:
                found = os.stat(path)
            except OSError:
                continue
            if FileId(found.st_dev, found.st_ino) == known:
                return f"node {node.name}"
    return None


def _is_base(base: Image, known: FileId, cwd: str | None) -> str | None:
    try:
        found = os.stat(os.path.join(cwd or os.getcwd(), base.filename))
    except OSError:
        return None
    return "the base" if FileId(found.st_dev, found.st_ino) == known else None


def _is_locked(name: str, folder: int) -> bool:
    """Whether anybody holds QEMU's (or any other) lock on the file; takes none."""
    file = os.open(name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=folder)
    try:
        ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack("hhqqi4x", fcntl.fcntl(file, F_OFD_GETLK, ask))
        return bool(answer[0] != fcntl.F_UNLCK)
    finally:
        os.close(file)
