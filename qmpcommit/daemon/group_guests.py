"""Guests that stand still for a group's recycles, and that nobody else lets go on.

While a group is driven, `Pauses` sees to its guests. Whom a former daemon has paused, or whom
this one could not reach in time, goes on from here: at once where nothing is finalized, for then
all overlays stay; else when the last of its disks has its fresh overlay, or gets none any more.

Rests on ``query-status`` and ``cont``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from qmpcommit.commit.pending import place_of
from qmpcommit.daemon.registry import Registry
from qmpcommit.errors import (
    CommandRefused,
    ConnectError,
    DeadlineExceeded,
    MonitorLost,
    QmpCommitError,
)
from qmpcommit.guest.marks import mark_of_group, unmark
from qmpcommit.guest.run_state import go_on
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from qmpcommit.daemon.keeping import Keeper
    from qmpcommit.daemon.promise import Promise
    from qmpcommit.session import Session

LAST_WORD = 0.5
"""Seconds that a guest's QEMU gets to let it go on when the daemon stops."""


def paused_for(promises: Iterable[Promise]) -> list[list[Promise]]:
    """Those for which a guest was paused that may stand still yet, those of each VM together."""
    by_vm: dict[str, list[Promise]] = {}
    for promise in promises:
        if promise.noted.get("stopped"):
            by_vm.setdefault(promise.vm, []).append(promise)
    return list(by_vm.values())


async def let_go_on(session: Session, promises: Sequence[Promise]) -> None:
    """Continue the guest that was paused for these; raises what `Monitor.execute` raises."""
    try:
        await go_on(session)
    except CommandRefused as error:
        promises[0].log.warning("guest_stays_paused", why=error.message)
    for owner in {mark_of_group(place.group) for p in promises if (place := place_of(p.job_id))}:
        await unmark(session, owner, "pause")
    for promise in promises:
        await promise.note("cont")


class Guests:
    """Lets the guests of a registry's VMs go on."""

    def __init__(self, registry: Registry, keeper: Keeper) -> None:
        self._registry, self._keeper = registry, keeper

    async def go_on(self, promises: Sequence[Promise], *, settled: bool) -> float:
        """Let one VM's guest go on, with `settled` when these are; for how many seconds it waited.

        It returns when the guest goes on, or its QEMU has ended. Whoever cancels it leaves no
        guest that stands still, as far as QEMU can be asked.
        """
        clock = asyncio.get_running_loop().time
        since = clock()
        try:
            if settled:
                for promise in promises:
                    await promise.settled.wait()
            while not await self._try(promises):
                pass
        except asyncio.CancelledError:
            await to_the_end(self._at_once(promises))
            raise
        return clock() - since

    async def _try(self, promises: Sequence[Promise]) -> bool:
        """Whether nothing is left to do, at once or after the VM was waited for."""
        promise = promises[0]
        try:
            await self._once(promises)
        except (ConnectError, MonitorLost, DeadlineExceeded) as error:
            try:
                await self._keeper.wait_for_vm(promise, error)
            except QmpCommitError:
                return True  # with its QEMU the guest has gone
            return False
        return True

    async def _once(self, promises: Sequence[Promise]) -> None:
        promise = promises[0]
        vm = self._registry.vms.get(promise.vm)
        if vm is None:
            raise ConnectError(f"no VM is called '{promise.vm}' at the moment", vm=promise.vm)
        async with self._registry.use(vm) as session:
            if vm.identity != promise.identity:
                return  # another QEMU, whose guest was not paused here
            try:
                await let_go_on(session, promises)
            except DeadlineExceeded:
                session.drop()  # it is silent
                raise

    async def _at_once(self, promises: Sequence[Promise]) -> None:
        with suppress(QmpCommitError, TimeoutError):
            async with asyncio.timeout(LAST_WORD):
                await self._once(promises)
