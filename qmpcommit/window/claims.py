"""The disks of a window are claimed from before it opens until it is closed.

A claim of a window's tells the last eight digits of the window's name: whoever names the window
may close it. At its end its owner looks whether it stood still all the time.

Rests on what a claim rests on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from qmpcommit.block.chain import Disk, read_disks
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.commit.checks import READER
from qmpcommit.commit.claim import (
    Claim,
    Owner,
    check_free,
    clear_dead,
    lives,
    owner_in,
    owners_of,
    release_all,
    take,
    take_if_free,
    told,
)
from qmpcommit.errors import JobConflict
from qmpcommit.window.readers import HINT, WHAT_TO_DO, readers_of, reading
from qmpcommit.window.records import Frozen, Window
from qmpcommit.window.remains import disk_over, own_jobs, window_of

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM


def tag_of(window: str) -> str:
    """What the claims of a window of that name tell of it."""
    return window[-8:]


async def claim_disks(
    vm: VM, disks: Mapping[str, Disk], window: str, override: Collection[str]
) -> dict[str, Claim]:
    """Claim all disks of a window that is about to be opened, or none; raises `JobConflict`."""
    claims: dict[str, Claim] = {}
    try:
        for asked, disk in disks.items():
            claims[asked] = await take(
                vm, disk, "window", tag=tag_of(window), override=override,
                state="Nothing was changed",
            )  # fmt: skip
    except BaseException:
        await release_all(claims.values())
        raise
    return claims


async def claim_named(vm: VM, each: Frozen, override: Collection[str] = ()) -> Claim | None:
    """The claim of the disk that writes to an overlay of a window, for whoever names that window.

    None where no disk does. A claim of the window's own is taken as it is, unless its owner has
    ended. Raises `JobConflict` where somebody holds the disk for something else.
    """
    graph = await read_graph(vm)
    disk = disk_over(graph, each.overlay)
    if disk is None:
        return None
    tag = tag_of(window_of(each.overlay))
    owner = owner_in(graph, disk)
    if owner is not None and owner.tag == tag and lives(owner) is not False:
        return Claim(vm, owner, held=True)
    return await take(vm, disk, "close", tag=tag, override=override, state="Its window stays open")


async def claim_again(vm: VM, each: Frozen) -> Claim | None:
    """As `claim_named`, for a window that is taken up: it goes on where somebody else has it."""
    graph = await read_graph(vm)
    disk = disk_over(graph, each.overlay)
    if disk is None:
        return None
    return await take_if_free(vm, disk, "window", tag=tag_of(window_of(each.overlay)))


async def claim_all_again(vm: VM, disks: Mapping[str, Frozen]) -> dict[str, Claim]:
    """The same for disks by any names, all or none."""
    claims: dict[str, Claim] = {}
    try:
        for asked, each in disks.items():
            claim = await claim_again(vm, each)
            if claim is not None:
                claims[asked] = claim
    except BaseException:  # nobody has the window, to let its disks go
        await release_all(claims.values())
        raise
    return claims


async def clear_named(vm: VM, window: str) -> None:
    """Close what a killed owner of that window has left of its claims."""
    left = [owner for owner in await owners_of(vm) if owner.tag == tag_of(window)]
    await clear_dead(vm, left)


async def closable(
    vm: VM, left: Iterable[Frozen], override: Collection[str]
) -> tuple[list[Frozen], list[JobConflict]]:
    """Those of these overlays that nobody holds who lives, and over which nobody reads.

    And why the others can't be closed.
    """
    graph = await read_graph(vm)
    free: list[Frozen] = []
    held: list[JobConflict] = []
    for each in left:
        disk = disk_over(graph, each.overlay)
        try:
            if disk is not None:
                check_free(vm, graph, disk, override=override)
                if READER not in override:
                    await _check_unread(vm, disk, each)
        except JobConflict as conflict:
            held.append(conflict)
        else:
            free.append(each)
    return free, held


async def _check_unread(vm: VM, disk: Disk, each: Frozen) -> None:
    readers = await asyncio.to_thread(readers_of, vm, disk)
    if readers:
        raise JobConflict(
            f"the window over {disk} of {vm.name} stays open: {reading(readers, each.filename)}."
            f" {WHAT_TO_DO}",
            hint=HINT,
            vm=vm.name,
            disk=disk.name,
        )


def held_windows(owners: Iterable[Owner]) -> frozenset[str]:
    """The windows, by what their claims tell of them, whose owners live or may live."""
    return frozenset(owner.tag for owner in owners if owner.tag and lives(owner) is not False)


async def disturbances(vm: VM, window: Window) -> list[str]:
    """Why what was read in this window is no instant's image; empty where it is one."""
    graph = await read_graph(vm)
    found = []
    for asked, each in window.items():
        why = _disturbed(graph, each, window.below.get(asked), window.claims.get(asked))
        if why:
            found.append(f"{each.filename}: {why}")
    return found


def _disturbed(
    graph: BlockGraph, each: Frozen, below: list[str] | None, claim: Claim | None
) -> str:
    for disk in read_disks(graph):
        names = [image.filename for image in disk.chain]
        overlay = graph.full(each.overlay)
        if overlay in names:
            break
    else:
        return f"{each.overlay} is under no disk any more, so that the guest wrote elsewhere"
    now = names[names.index(overlay) + 1 :]
    if below is not None and now != below:
        return (
            f"what lies under {each.overlay} was changed by somebody else: {' -> '.join(below)}"
            f" has become {' -> '.join(now)}"
        )
    foreign = [job for job in disk.jobs if job not in own_jobs(disk, each.overlay)]
    if foreign:
        return f"somebody else's block job works on {disk}: {', '.join(foreign)}"
    if claim is None or not claim.held:
        return ""
    owner = owner_in(graph, disk)
    if owner is None:
        return f"the claim on {disk} is gone: its QEMU was started anew, or somebody has deleted it"
    if owner.nonce != claim.owner.nonce:
        return f"{disk} was taken over by {told(owner)}"
    return ""
