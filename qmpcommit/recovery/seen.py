"""What a VM shows of what a death has left: read once, changing nothing.

Rests on ``query-status``, ``query-jobs``, ``query-block-jobs`` and the queries of the block graph.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpcommit.block.backing_name import View, leads_to, written_below
from qmpcommit.block.chain import Disk, absolute, read_disks
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.block.identity import file_id, names_are_ours, open_files
from qmpcommit.block.throttle import Noted, noted_limits
from qmpcommit.commit.checks import CLAIM, READER
from qmpcommit.commit.claim import Owner, lives, owners_among
from qmpcommit.commit.overlay.file import is_being_made, maker_of
from qmpcommit.errors import CommandRefused
from qmpcommit.names import JOB_PREFIX, WINDOW_MARK

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM

_CYCLES = re.compile(r"\.(?:cycle|snapshot)-\d{8}T\d{6}Z-[0-9a-f]{8}\.qcow2$")


class Seen(NamedTuple):
    """One VM at one moment.

    `status` is the guest's run state, None where there is no guest; `jobs` are those of
    ``query-jobs`` by their ids. `living` are the owners of claims that live, or may live, `dead`
    those that have ended. `followed` are the jobs that this session follows. `names` has for
    each overlay of ours the node of the layer that its header names; `files` are empty overlays
    of ours that nobody has open. `windows` are overlays that windows have left,
    `limits` what notes tell of the limits that disks had before they were held back. `readers` are
    the processes that read what stands still under an overlay that disks write to, by its file.
    """

    vm: str
    address: str
    status: str | None
    jobs: Mapping[str, Mapping[str, Any]]
    graph: BlockGraph
    disks: tuple[Disk, ...] = ()
    living: tuple[Owner, ...] = ()
    dead: tuple[Owner, ...] = ()
    unsure: tuple[Owner, ...] = ()
    followed: frozenset[str] = frozenset()
    names: Mapping[str, str] = {}
    files: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    limits: tuple[Noted, ...] = ()
    readers: Mapping[str, list[str]] = {}


async def see(vm: VM, *, folders: Collection[str] = (), override: Collection[str] = ()) -> Seen:
    """Look at a VM; with "claim" in `override` owners who may live or not are taken for dead.

    With "reader" nobody is taken for a reader of what stood still in a window.
    """
    try:
        status = str((await vm.execute("query-status")).get("status"))
    except CommandRefused:
        status = None
    graph = await read_graph(vm)
    jobs = {str(job.get("id")): job for job in await vm.execute("query-jobs")}
    disks = tuple(read_disks(graph))
    owners = list(owners_among(graph.claims).values())
    alive = {owner.nonce: lives(owner) for owner in owners}
    taken = (False, None) if CLAIM in override else (False,)
    dead = [owner for owner in owners if alive[owner.nonce] in taken]
    names = await asyncio.to_thread(_names, vm, graph, disks)
    files = await asyncio.to_thread(_files, vm, graph, disks, folders)
    from qmpcommit.window.remains import unused

    windows = await unused(vm, folders)
    readers = {} if READER in override else await asyncio.to_thread(_readers, vm, disks)
    return Seen(
        vm=vm.name,
        address=str(vm.address or "QMP"),
        status=status,
        jobs=jobs,
        graph=graph,
        disks=disks,
        living=tuple(owner for owner in owners if owner not in dead),
        dead=tuple(dead),
        unsure=tuple(o for o in owners if o not in dead and alive[o.nonce] is None),
        followed=frozenset(job.id for job in vm.jobs),
        names=names,
        files=tuple(files),
        windows=tuple(each for each in windows if not each.startswith(JOB_PREFIX)),
        limits=tuple(await noted_limits(vm)),
        readers=readers,
    )


def _readers(vm: VM, disks: Collection[Disk]) -> dict[str, list[str]]:
    from qmpcommit.window.readers import readers_of

    found = {disk.active.filename: readers_of(vm, disk) for disk in disks if disk.active}
    return {overlay: readers for overlay, readers in found.items() if readers}


def _names(vm: VM, graph: BlockGraph, disks: Collection[Disk]) -> dict[str, str]:
    """What the headers of our fresh overlays name, of the layers that disks have."""
    view = View.of(vm.peer_pid, vm.cwd)
    layers = {image.node_name for disk in disks for image in disk.chain}
    found = {}
    for name, node in graph.nodes.items():
        if not (name.startswith(JOB_PREFIX) and node.driver == "qcow2"):
            continue
        for layer in sorted(layers - {name}):
            written = next(written_below(graph, name, view))
            if written.text and leads_to(graph, name, layer, written, view) == "same":
                found[name] = layer
    return found


def _files(
    vm: VM, graph: BlockGraph, disks: Collection[Disk], folders: Collection[str]
) -> list[str]:
    """Files of ours without a byte that QEMU has not open; only where its names are ours."""
    if not names_are_ours(vm.peer_pid):
        return []
    opened = set(open_files(vm.peer_pid).values()) if vm.peer_pid else set()
    places = {os.path.dirname(absolute(image, vm.cwd)) for disk in disks for image in disk.chain}
    found = []
    for folder in sorted({*places, *folders}):
        with suppress(OSError):
            for name in sorted(os.listdir(folder)):
                path = os.path.join(folder, name)
                if WINDOW_MARK in name or not (_CYCLES.search(name) or maker_of(path)):
                    continue
                if is_being_made(path):
                    continue
                if os.path.islink(path) or not os.path.isfile(path) or os.path.getsize(path):
                    continue  # an empty image may be the disk of a VM that is off: no bytes are not
                if file_id(path) not in opened:
                    found.append(path)
    return found
