"""A snapshot window over disks of several VMs, which all stand still at one instant.

No QEMU knows of another one's, so what makes the instant one is the guests: each is quiesced,
and only when all stand still are the overlays laid; only when all are laid do they go on.

Rests on what a window of one VM rests on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from qmpcommit.errors import InvalidRequest, WindowError
from qmpcommit.former import former
from qmpcommit.guest.hold import check_sockets
from qmpcommit.guest.marks import thaw_all_abandoned
from qmpcommit.guest.run_state import How
from qmpcommit.guest.sockets import Sockets
from qmpcommit.tasks import to_the_end
from qmpcommit.units import parse_size
from qmpcommit.window.book import PartNotes, WindowBook, close_all
from qmpcommit.window.records import GroupWindow, Window
from qmpcommit.window.run import close_window, new_window_name, open_window

if TYPE_CHECKING:
    from qmpcommit.callback import Notes
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.vm import VM


@former(overlay_dir="overlay")
@asynccontextmanager
async def snapshot(
    disks: Iterable[tuple[VM, str]],
    *,
    freeze: How = "pause",
    agents: Sockets[Any] | None = None,
    overlay: str | os.PathLike[str] | None = None,
    overlay_options: Mapping[str, Any] | None = None,
    overlay_secret: str | None = None,
    bandwidth: int | str | None = None,
    ledger: Ledger | None = None,
    override: Collection[str] = (),
) -> AsyncIterator[GroupWindow[VM]]:
    """One instant of several VMs: ``async with qc.snapshot([(vm1, "vda"), (vm2, "vda")])``.

    As `Session.snapshot`, for all or none. Every guest is quiesced while the overlays of all are
    laid, for ten seconds at most: its vCPUs are paused, or its file systems frozen through its
    agent's socket in `agents`. Who writes over a storage daemon's exports is not held still.
    `ledger` is told of each step before it is taken; ``qc.resume(ledger, vms)`` closes the window
    of a process that was killed.

    Raises what `Session.snapshot` raises, with nothing left of it on any VM; where a VM's window
    can't be closed, the others are, and `WindowError` names the overlays that stay.
    """
    wanted: dict[VM, list[str]] = {}
    for vm, disk in disks:
        wanted.setdefault(vm, []).append(disk)
    if not wanted:
        raise WindowError("name the disks of the window, at least one")
    if freeze not in ("agent", "pause"):
        raise InvalidRequest(
            f"several VMs have one instant only while their guests stand still: freeze is 'agent'"
            f" or 'pause', not {freeze!r}"
        )
    parse_size(bandwidth or 0, "bandwidth")
    agents = agents or {}
    check_sockets(freeze, wanted, agents)
    await thaw_all_abandoned(wanted, agents)  # not while others stand still for it
    meet = asyncio.Barrier(len(wanted))
    notes = _notes(ledger, wanted, bandwidth)
    opening = {
        vm: asyncio.create_task(
            open_window(
                vm, names, overlay_dir=overlay, overlay_options=overlay_options,
                overlay_secret=overlay_secret, freeze=freeze, agent=agents.get(vm),
                ledger=notes.get(vm), meet=meet.wait, override=override,
            ),
            name=f"window of {vm.name}",
        )
        for vm, names in wanted.items()
    }  # fmt: skip
    try:
        await asyncio.gather(*opening.values())
    except BaseException:
        await to_the_end(_give_up(opening, notes))
        raise
    window = GroupWindow({vm: task.result() for vm, task in opening.items()})
    try:
        yield window
    finally:
        await to_the_end(_close(window.of, bandwidth, notes))


def _notes(ledger: Any, vms: Iterable[VM], bandwidth: int | str | None) -> dict[VM, Notes]:
    """Where each VM's window is noted: in one book."""
    if ledger is None:
        return {}
    if not callable(getattr(ledger, "noted", None)):
        raise InvalidRequest(f"{ledger!r} is no ledger of a window over VMs: it has no noted()")
    book = WindowBook(ledger, new_window_name(), {"bandwidth": bandwidth})
    return {vm: PartNotes(book, str(number), vm) for number, vm in enumerate(vms, 1)}


async def _give_up(opening: Mapping[VM, asyncio.Task[Window]], notes: Mapping[VM, Notes]) -> None:
    """All or none: end what is being opened, close what is open."""
    for task in opening.values():
        task.cancel()
    await asyncio.wait(opening.values())
    opened = {
        vm: task.result()
        for vm, task in opening.items()
        if not task.cancelled() and task.exception() is None
    }
    await _close(opened, None, notes)


async def _close(
    windows: Mapping[VM, Window], bandwidth: int | str | None, notes: Mapping[VM, Notes]
) -> None:
    await close_all(
        close_window(vm, window, bandwidth=bandwidth, ledger=notes.get(vm))
        for vm, window in windows.items()
    )
