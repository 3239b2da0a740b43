"""Fresh overlays are laid over disks of one VM at one instant, all of them or none.

Those of a window, which are merged back when it closes, and those that stay.

Rests on ``blockdev-create``, ``blockdev-add`` and ``transaction`` of ``blockdev-snapshot``.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qmpcommit.block.bitmaps import bitmaps_of, fresh_actions, plan_carrying
from qmpcommit.block.chain import Disk, find_again, read_disks, read_image
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.callback import Noting
from qmpcommit.commit.in_use import check_idle
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.errors import CommandRefused, WindowError
from qmpcommit.guest.hold import Quiet, quiesced
from qmpcommit.guest.run_state import How

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM


READ_ONLY = (
    "is read-only, so that its guest writes nothing, and an overlay could never be merged back"
)


async def lay_all(
    vm: VM,
    pairs: Sequence[tuple[Disk, FreshOverlay]],
    mark: str,
    *,
    freeze: How | None,
    agent: str | os.PathLike[str] | None,
    what: str,
    again: str,
    name: str = "",
    ledger: Noting | None = None,
    meet: Callable[[], Awaitable[object]] | None = None,
    bitmaps: bool = False,
) -> Quiet:
    """Make and open the overlays, quiesce the guest, and lay them; how it was quiesced.

    The guest's mark has the owner `mark`, and a ledger notes the `name`; `what` and `again` are for
    messages. With `bitmaps` those of the layers below go on in the overlays. Whoever calls this
    undoes what it has made if it raises: `WindowError`, `JobConflict`, what making an overlay or
    quiescing raises.
    """
    for _, overlay in pairs:
        await overlay.open()
    async with quiesced(vm, freeze, agent=agent, ledger=ledger, owner=mark) as quiet:
        if meet is not None:
            await meet()
        if ledger is not None:
            await ledger.note("lay", held=freeze is not None, name=name)
        await _lay(vm, pairs, what, again, bitmaps=bitmaps)
        if meet is not None:
            await meet()
    return quiet


async def _lay(
    vm: VM, pairs: Sequence[tuple[Disk, FreshOverlay]], what: str, again: str, *, bitmaps: bool
) -> None:
    """All overlays at one instant, or none."""
    _, graph = await vm.look()  # once more, for others may have been at work meanwhile
    now = read_disks(graph)
    for disk, overlay in pairs:
        active = disk.active and disk.active.node_name
        found = find_again(now, disk) or next((d for d in now if d.root == disk.root), None)
        if found is None or (found.active and found.active.node_name) != active:
            raise WindowError(
                f"{disk} of {vm.name} writes to {found and found.active} by now, not to"
                f" {disk.active}: somebody else has changed it while {what}."
                f" Nothing was changed; {again}",
                vm=vm.name,
                disk=disk.name,
            )
        size = read_image(graph, active).virtual_size if active in graph.nodes and active else None
        if size is not None and size != overlay.size:
            raise WindowError(
                f"{disk} of {vm.name} was resized from {overlay.size} to {size} bytes while"
                f" {what}. Nothing was changed; {again}",
                vm=vm.name,
                disk=disk.name,
            )
        await overlay.check_named()
    over = {disk.active.node_name: each.node for disk, each in pairs if disk.active is not None}
    actions: list[Mapping[str, Any]] = [
        {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}}
        for node, overlay in over.items()
    ]
    if bitmaps:
        actions += [each for names in over.items() for each in _carried(graph, *names)]
    try:
        await vm.execute("transaction", {"actions": actions})
    except CommandRefused:
        for disk in read_disks(await read_graph(vm)):  # a job may have been begun meanwhile
            if disk.active is not None and disk.active.node_name in over:
                check_idle(vm.name, disk)
        raise
    for disk, each in pairs if bitmaps else ():
        if disk.active is not None and disk.active.node_name in graph.nodes:
            each.warnings += _left(graph, disk.active.node_name, each.filename)


def _left(graph: BlockGraph, below: str, overlay: str) -> list[str]:
    """The bitmaps that do not go on in the overlay, in words."""
    found = [bitmap for bitmap in bitmaps_of(graph, below) if bitmap.inconsistent or bitmap.busy]
    why = {True: "inconsistent (QEMU did not close it)", False: "used by a job or an export"}
    return [
        f"bitmap '{bitmap.name}' of {below} does not go on in {overlay}, for it is"
        f" {why[bitmap.inconsistent]}: the next backup by it has to be a full one"
        for bitmap in found
    ]


def _carried(graph: BlockGraph, below: str, overlay: str) -> list[dict[str, Any]]:
    """What has the bitmaps of the layer below go on in its overlay, with all that they mark."""
    if not {below, overlay} <= graph.nodes.keys():
        return []
    found = plan_carrying(graph, [below], below)
    names = {name: each for name, each in found.names.items() if not any(b.busy for b in each)}
    return fresh_actions(found._replace(names=names), graph.nodes[overlay].raw)
