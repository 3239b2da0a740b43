"""What a killed process leaves of a snapshot window, and how it is cleared away.

A window is found by its overlays' names, which carry `MARK`, by its nodes and jobs, whose names
begin with ``qmpcommit-w``, and by the marker node that is there while its guest is quiesced.
What holds no data, or what a pivot has made stale, is removed; anything else stays and is named.

Rests on ``query-jobs``, ``job-dismiss``, ``blockdev-add`` and ``blockdev-del``, and on what a
commit rests on.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qmpcommit.block.chain import Disk, Image, absolute, read_disks, read_image
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.block.identity import FileId, identify
from qmpcommit.block.qcow2 import bitmap_names, holds_data
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.phases import Phase, Preparation, State
from qmpcommit.commit.plan import adopted_plan
from qmpcommit.commit.policy import Pivot
from qmpcommit.commit.stale_layers import BeforeClosing, close_nodes, remove_file
from qmpcommit.errors import CommandRefused, QmpCommitError, WindowError
from qmpcommit.guest.marks import marks_among
from qmpcommit.names import JOB_PREFIX
from qmpcommit.values import Record, record
from qmpcommit.window.records import MARK, NAME, Frozen

if TYPE_CHECKING:
    from qmpcommit.commit.claim import Claim
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.vm import VM

ROUNDS = 3
"""How often an overlay is committed whose former commit ended otherwise than in a pivot."""

CREATION = 5.0
"""Seconds for which a creation that is under way is waited for."""

CLOSED = "qmpcommit-window-closed"
"""A dirty bitmap of this name in an overlay's file says that it was pivoted away from."""

_JOB = re.compile(r"qmpcommit-w[0-9a-f]{8}-\d+-(create-file|create-qcow2|[0-9a-f]{8})")


@record
class Remains(Record):
    """What was left of a window and could not be cleared away, and why; `hint` as an error's."""

    what: str
    message: str
    hint: str = ""


def remains_of(graph: BlockGraph) -> list[Remains]:
    """What a killed process left in QEMU of windows, beside the overlays that disks write to.

    And of group commits that had a guest quiesced.
    """
    found = [Remains(mark.node, mark.message) for mark in marks_among(graph.nodes)]
    for name in graph.nodes:
        file = graph.file(graph.leaf(name))
        if MARK in file and not graph.parents.get(name) and not _laid(graph, name):
            found.append(Remains(name, f"{file} is open, and no disk uses it"))
    return found


async def unused(vm: VM, folders: Collection[str] = ()) -> list[str]:
    """What `clear` would look at, by the names of nodes and files; nothing is changed."""
    graph = await read_graph(vm)
    laid = {absolute(d.active, vm.cwd) for d in read_disks(graph) if d.active is not None}
    files: set[str] = set()
    if vm.peer_pid is not None:
        files = await asyncio.to_thread(_beside, vm, graph, folders)
    return [each.what for each in remains_of(graph)] + sorted(files - laid)


# -- an overlay that is in use --------------------------------------------------------------------


def disk_over(graph: BlockGraph, overlay: str) -> Disk | None:
    """The disk whose guest writes to this overlay; None where it was not laid over anything."""
    for disk in read_disks(graph):
        if disk.active and disk.active.filename == graph.full(overlay) and len(disk.chain) > 1:
            return disk
    return None


async def merge_back(
    vm: VM, each: Frozen, bandwidth: int | str | None, *, claim: Claim | None = None
) -> CommitOutcome | None:
    """Commit one overlay back and pivot; None where nothing is left of it.

    `claim` is that of whoever closes the window. A commit of the window's that is there already is
    taken up where it is. Raises `WindowError` where no disk writes to the overlay, and it may hold
    data; `JobConflict` for another's job.
    """
    for _ in range(ROUNDS):
        _, graph = await vm.look()
        disk = disk_over(graph, each.overlay)
        if disk is None or disk.active is None:
            remains = await left_of(vm, each.overlay)
            if remains:
                what = "; ".join(each.message for each in remains)
                raise WindowError(f"no disk writes to it: {what}", hint=remains[0].hint, vm=vm.name)
            return None
        own = own_jobs(disk, each.overlay)
        if own:
            job = await _take_up(vm, graph, own[0], claim)
        else:
            node = disk.active.node_name
            job = await vm.commit(
                each.overlay,
                policy=Pivot(),
                shallow=True,
                delete=True,
                bandwidth=bandwidth,
                job_id=new_own_job(each.overlay, node),
                on_pivot=marking_closed(vm),
                claim=claim,
            )
        outcome = await job.wait()
        if outcome.action == "pivot":
            return outcome
    raise WindowError(
        f"the commit of {each.overlay} ended {ROUNDS} times without a pivot: another client"
        " decides too. Nothing is lost",
        vm=vm.name,
    )


def new_own_job(overlay: str, node: str) -> str:
    """An id for the job that commits this overlay back, which is open as that node."""
    stem = node.removesuffix("-top")
    if not re.fullmatch(_own_stem(overlay), stem):  # whoever started this QEMU named it
        stem = f"{JOB_PREFIX}window"
    return f"{stem}-{os.urandom(4).hex()}"


def own_jobs(disk: Disk, overlay: str) -> list[str]:
    """The jobs on a disk that were begun to close the window of its overlay, by their ids."""
    return [job for job in disk.jobs if is_own_job(job, overlay)]


def is_own_job(job_id: str, overlay: str) -> bool:
    """Whether a job of that id commits this overlay of a window back, to close the window."""
    return re.fullmatch(f"{_own_stem(overlay)}-[0-9a-f]{{8}}", job_id) is not None


def _own_stem(overlay: str) -> str:
    return rf"{JOB_PREFIX}(w{re.escape(window_of(overlay)[-8:])}-\d+|window)"


async def _take_up(vm: VM, graph: BlockGraph, job_id: str, claim: Claim | None) -> CommitJob:
    """Go on with a commit of ours that a killed process left, up to the deletion of its overlay."""
    followed = next((job for job in vm.jobs if job.id == job_id), None)
    if followed is not None:
        return followed
    plan = replace(adopted_plan(vm.name, graph, job_id, Pivot()), stale="delete")
    jobs = await vm.execute("query-block-jobs")
    listed: Mapping[str, Any] = next((job for job in jobs if job.get("device") == job_id), {})
    finalizes = bool(listed.get("auto-finalize", True))
    plan.arguments["auto-finalize"] = finalizes
    barrier = Preparation(prepares=not finalizes)
    state = State(two_phase=True, phase=Phase.COPYING, began=True, barrier=barrier)
    known = await asyncio.to_thread(_identified, vm, plan.top)
    return await vm.resume(
        plan,
        Resumed(state),
        files={plan.top.node_name: known},
        on_pivot=marking_closed(vm),
        claim=claim,
    )


def marking_closed(vm: VM) -> BeforeClosing:
    """What has the stale overlay itself say that it is stale, once QEMU has closed it.

    So that whoever finds its file may delete it, if this process is killed before it did.
    """

    async def mark(outcome: CommitOutcome) -> None:
        await _mark_closed(vm, outcome.top.node_name)

    return BeforeClosing(mark)


async def _mark_closed(vm: VM, node: str) -> None:
    bitmap = {"node": node, "name": CLOSED, "persistent": True}
    with suppress(QmpCommitError):
        await vm.execute("block-dirty-bitmap-add", bitmap)


def is_void(path: str) -> bool:
    """Whether a window's overlay holds nothing of its own, or says itself that it is stale."""
    return not holds_data(path) or CLOSED in bitmap_names(path)


def _identified(vm: VM, image: Image) -> FileId | None:
    return identify(absolute(image, vm.cwd), vm.peer_pid)


# -- nodes, jobs and files that nobody uses -------------------------------------------------------


async def left_of(vm: VM, overlay: str) -> list[Remains]:
    """What stays of an overlay that no disk writes to, after all has been removed that may be."""
    graph = await read_graph(vm)
    for disk in read_disks(graph):
        below = [image.filename for image in disk.chain[1:]]
        if graph.full(overlay) in below and disk.active is not None:
            text = (
                f"{disk} of {vm.name} has {disk.active.filename} over it by now, so that it is a"
                " layer of that disk like any other: merge it into the file below by a commit of"
                " its own"
            )
            hint = (
                f"'qmpcommit commit {vm.address or 'QMP'} {disk} --top {shlex.quote(overlay)}"
                " --shallow --delete' does that"
            )
            return [Remains(overlay, text, hint)]
    return await clear(vm, [overlay])


async def clear(
    vm: VM,
    overlays: Collection[str] | None = None,
    folders: Collection[str] = (),
    but: Collection[str] = (),
) -> list[Remains]:
    """Remove what is left of windows and in use by no disk; what stays is returned.

    With `overlays` only what belongs to these files, else all that is found in QEMU, beside the
    active layers, and in `folders`. Only whom nobody else follows may be cleared away: a window
    that another process is just opening would fail. Nothing is touched of the windows `but`, which
    are known by the last eight digits of their names.
    """
    await end_jobs(vm, overlays)
    remains = []
    graph = await read_graph(vm)
    wanted = {graph.full(each) for each in overlays or ()}
    for name in list(graph.nodes):
        file = graph.file(graph.leaf(name))
        if MARK not in file or (overlays is not None and file not in wanted):
            continue
        if window_of(file)[-8:] in but:
            continue
        if graph.parents.get(name) or _laid(graph, name):
            continue
        remains += await _clear_node(vm, graph, name, file)
    graph = await read_graph(vm)
    known = {
        os.path.join(vm.cwd or os.getcwd(), str(node.raw.get("file") or ""))
        for node in graph.nodes.values()
    }
    if overlays is not None:
        paths = {os.path.join(vm.cwd or os.getcwd(), each) for each in overlays}
    else:
        paths = await asyncio.to_thread(_beside, vm, graph, folders)
    if vm.peer_pid is not None:  # QEMU runs on this host
        paths = {path for path in paths if window_of(path)[-8:] not in but}
        for path in sorted(paths - known - {each.what for each in remains}):
            remains += await asyncio.to_thread(_clear_file, vm, graph, path)
    for each in remains:
        vm.log.warning("window_remains", what=each.what, message=each.message)
    return remains


async def end_jobs(vm: VM, overlays: Collection[str] | None = None) -> None:
    """Dismiss the window's jobs that have concluded; a creation concludes by itself.

    Comes before any look at the block graph: a QEMU that is asked for its nodes while it opens
    the qcow2 image that it creates fails an assertion of its own, and dies. So `WindowError` is
    raised where a creation does not conclude.
    """
    windows = None if overlays is None else {window_of(each)[-8:] for each in overlays}
    clock = asyncio.get_running_loop().time
    end = clock() + CREATION
    while True:
        creating = []
        for job in await vm.execute("query-jobs"):
            name = str(job.get("id"))
            if not _JOB.fullmatch(name) or (windows is not None and name[11:19] not in windows):
                continue
            if job.get("status") == "concluded":
                with suppress(CommandRefused):
                    await vm.execute("job-dismiss", {"id": name})
            elif "-create-" in name:
                creating.append(name)
        if not creating:
            return
        if clock() >= end:
            raise WindowError(
                f"QEMU of {vm.name} still creates an overlay of a window after {CREATION:g} s"
                f" ({', '.join(creating)}); perhaps its storage hangs. Nothing was changed: repeat"
                " this when the storage answers again",
                vm=vm.name,
                remains=creating,
            )
        await asyncio.sleep(0.1)


def window_of(overlay: str) -> str:
    """The window that an overlay's name tells."""
    return overlay.rpartition(MARK)[2].partition(".")[0]


def _laid(graph: BlockGraph, name: str) -> bool:
    """Whether an overlay is over something, and in use; a storage daemon's may be open only."""
    return "backing" in graph.nodes[name].children and _active(graph, name)


def _active(graph: BlockGraph, name: str) -> bool:
    return any(d.active is not None and d.active.node_name == name for d in read_disks(graph))


async def _clear_node(vm: VM, graph: BlockGraph, name: str, file: str) -> list[Remains]:
    """Close a node that nothing uses, and remove its file if it is safe."""
    image = replace(read_image(graph, name), filename=file)
    below = graph.below_filters(graph.nodes[name].children.get("backing"))
    stale = below is not None and _active(graph, below)
    if below is not None and not stale:
        text = (
            f"{file} is open as node {name}, no disk uses it or what it lies on: it may hold the"
            " newest data of a disk that was unplugged, and is left alone"
        )
        return [Remains(file, text)]
    known = await asyncio.to_thread(_identified, vm, image)
    if stale:
        await _mark_closed(vm, name)
    remains = [Remains(file, text) for text in await close_nodes(vm, [name])]
    if remains:
        return remains
    now = await read_graph(vm)
    path = absolute(image, vm.cwd)
    if not stale and not await asyncio.to_thread(is_void, path):
        return [_unknown(vm, path)]
    base = read_image(graph, below) if below is not None else Image("", "", "")
    problem = await asyncio.to_thread(
        remove_file, image, known, graph=now, base=base, cwd=vm.cwd, pid=vm.peer_pid
    )
    return [] if problem is None else [Remains(path, problem)]


def _beside(vm: VM, graph: BlockGraph, folders: Collection[str]) -> set[str]:
    """Files that are named as overlays of windows of this VM's disks."""
    found = set()
    for disk in read_disks(graph):
        if disk.active is None:
            continue
        active = absolute(disk.active, vm.cwd)
        stem = os.path.basename(active).removesuffix(".qcow2").partition(MARK)[0] + MARK
        for folder in {os.path.dirname(active), *folders}:
            with suppress(OSError):
                for name in os.listdir(folder):
                    if name.startswith(stem) and NAME.fullmatch(window_of(name)):
                        found.add(os.path.join(folder, name))
    return found


def _clear_file(vm: VM, graph: BlockGraph, path: str) -> list[Remains]:
    """Remove a file that this QEMU has not open, if nothing is lost with it."""
    if not os.path.lexists(path):
        return []
    found = os.lstat(path)  # before it is read: what comes in its place then is another file
    if not is_void(path):
        return [_unknown(vm, path)]
    problem = remove_file(
        Image("", path, ""),
        FileId(found.st_dev, found.st_ino),
        graph=graph,
        base=Image("", "", ""),
        cwd=vm.cwd,
        pid=vm.peer_pid,
    )
    return [] if problem is None else [Remains(path, problem)]


def _unknown(vm: VM, path: str) -> Remains:
    return Remains(
        path,
        f"{path} is an overlay of a window that {vm.name} has not open. If that window was closed"
        " it is stale and can be deleted; if the VM was started anew without it, it holds the"
        " newest data: compare it with the disk ('qemu-img compare')",
    )
