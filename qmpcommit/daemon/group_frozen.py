"""Guests that are quiesced for a group's one instant, and that nobody else lets go on.

While a group is driven, `Freezes` sees to its guests. Whom a former daemon has quiesced goes on
from here, before anything else is resolved: as soon as its VM is connected, and tried again where
that fails. Only one whose disks are being recycled, all decided, waits until its fresh overlays
are laid: it is paused until then, so that nobody could thaw it, and would write to its bases.

Rests on what `thaw` rests on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qmpcommit.commit.policy import Recycle
from qmpcommit.daemon.promised_group import Group
from qmpcommit.daemon.registry import VM, Registry
from qmpcommit.errors import ConnectError, MonitorLost, QmpCommitError, VMGone
from qmpcommit.group.noted import FrozenGuest
from qmpcommit.guest.marks import mark_of_group, marks
from qmpcommit.guest.quiesce import thaw

if TYPE_CHECKING:
    from qmpcommit.daemon.keeping import Keeper
    from qmpcommit.session import Session

Laid = Callable[[str], Awaitable[object]]
"""Returns when the disks of the VM of that name have their fresh overlays, or get none."""


class FreezeNotes:
    """What is noted of the freeze of one VM's guest, with its group; a `Notes` of `quiesced`."""

    def __init__(self, group: Group, vm: str, identity: str) -> None:
        self._group, self._vm, self._identity = group, vm, identity

    async def note(self, step: str, **facts: Any) -> None:
        """``freeze`` or ``thaw`` is about to be sent."""
        before = self._group.frozen.get(self._vm)
        since = time.time() if before is None or step == "freeze" else before.since
        guest = FrozenGuest(self._vm, facts["how"], facts["agent"], self._identity, since)
        await self._group.freezes(guest, step)


class Frozen:
    """Lets the quiesced guests of a registry's VMs go on."""

    def __init__(self, registry: Registry, keeper: Keeper) -> None:
        self._registry, self._keeper = registry, keeper

    async def at_once(self, group: Group, vm: VM, session: Session) -> None:
        """A former daemon's freeze, on a VM that was just connected; within a second or so."""
        guest = group.frozen.get(vm.name)
        if group.request.freeze is None or (guest is not None and waits(group, guest)):
            return
        if guest is not None and guest.identity == vm.identity:
            group.log.warning("guest_left_frozen", vm=vm.name, how=guest.how)
            try:
                await thaw(session, guest.how, guest.agent, patience=0.0, ran=True)
            except QmpCommitError as error:  # its task tries it again
                group.log.warning("thaw_failed", vm=vm.name, error=error.message)
                return
            group.goes_on_again(vm.name, time.time() - guest.since)
        elif guest is not None:  # with its QEMU the guest has gone
            group.goes_on_again(vm.name)
        await _unmark(session, group)

    async def go_on(self, group: Group, laid: Laid | None = None) -> None:
        """Let all go on that are left; those that have to wait when `laid` of their VM returns.

        VMs that are away are waited for. What can't be thawed is told in `Group.problems`.
        """
        guests = group.frozen.values()
        await asyncio.gather(*(self._go_on(group, guest, laid) for guest in guests))

    async def _go_on(self, group: Group, guest: FrozenGuest, laid: Laid | None) -> None:
        mine = [promise for promise in group.members if promise.vm == guest.vm]
        if laid is not None and waits(group, guest):
            await laid(guest.vm)
        while guest.vm in group.frozen:
            try:
                await self._once(group, guest)
            except VMGone:
                group.goes_on_again(guest.vm)
            except (ConnectError, MonitorLost) as error:
                try:
                    await self._keeper.wait_for_vm(mine[0], error)
                except QmpCommitError:
                    group.goes_on_again(guest.vm)  # with its QEMU the guest has gone
            except QmpCommitError as error:
                group.log.warning("thaw_failed", vm=guest.vm, error=error.message)
                group.problems.append(error.message)
                group.goes_on_again(guest.vm)

    async def _once(self, group: Group, guest: FrozenGuest) -> None:
        vm = self._registry.vms.get(guest.vm)
        if vm is None:
            raise ConnectError(f"no VM is called '{guest.vm}' at the moment", vm=guest.vm)
        async with self._registry.use(vm) as session:
            if guest.vm not in group.frozen:
                return  # it was let go on when it was connected
            if vm.identity != guest.identity:
                group.goes_on_again(guest.vm)
                return
            await thaw(session, guest.how, guest.agent, ran=True)
            group.goes_on_again(guest.vm, time.time() - guest.since)
            await _unmark(session, group)


def waits(group: Group, guest: FrozenGuest) -> bool:
    """Whether a guest has to stand still until its fresh overlays are laid."""
    return group.finalizes and any(
        promise.vm == guest.vm and isinstance(promise.request.policy, Recycle)
        for promise in group.members
    )


async def _unmark(session: Session, group: Group) -> None:
    """Remove what tells in QEMU that the guest is quiesced for this group."""
    with suppress(QmpCommitError):
        for mark in await marks(session):
            if mark.owner == mark_of_group(group.id):
                await session.execute("blockdev-del", {"node-name": mark.node})
