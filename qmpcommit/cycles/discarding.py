"""A discard as it is noted: of all of its disks or of none, whatever process goes on with it.

What was begun is exchanged where that was decided, which is when all empty overlays lay; else it is
put back, the guests go on, and it begins again. So no VM waits for another one with its guest
paused.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from qmpcommit.block.chain import Image, absolute
from qmpcommit.block.identity import FileId, identify
from qmpcommit.commit.claim import Claim, release_all, take, take_if_free
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.stale_layers import why_unknown
from qmpcommit.cycles.book import Parts, RoundBook, is_exchanged
from qmpcommit.cycles.exchange import Exchange, Guest, complete, exchange_all, put_back
from qmpcommit.errors import CommitFailed, VMGone
from qmpcommit.qmp.process import is_same, process_identity
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM


Called = Literal["discard", "round"]
"""What people call what it belongs to."""


@record
class Discarded(Record):
    """An overlay that was thrown away.

    `former` must never be booted again, and `deleted` tells that it is gone; `overlay` is the
    empty one that the disk writes to now, over `base`. `guest` is what became of the guest.
    """

    disk: str
    former: str
    overlay: str
    base: Image
    guest: Guest
    deleted: bool = False
    vm: str = ""
    warnings: tuple[str, ...] = ()


async def discard_of(vm: VM, plan: Plan, *, delete: bool) -> dict[str, Any]:
    """What is noted of a disk that is discarded beside `part_of`."""
    former = absolute(plan.top, vm.cwd)
    file = await asyncio.to_thread(identify, former, vm.peer_pid) if delete else None
    unseen = await asyncio.to_thread(why_unknown, former) if delete and file is None else ""
    return {"plan": plan.model_dump(mode="json"), "file": file, "unseen": unseen}


class Discarding:
    """Discards the overlays of a book's disks, and ends what was begun of that.

    The VMs are given by the places of their disks, None for one that is not there.
    """

    def __init__(self, book: Parts, guest: Guest, called: Called = "discard") -> None:
        self._book, self._guest, self._called = book, guest, called

    async def run(
        self,
        vms: Sequence[VM],
        claims: Sequence[Claim] = (),
        stopped: Collection[VM] = (),
    ) -> list[Exchange]:
        """Exchange them all, or what is left of them; see `exchange_all` for what it raises.

        `claims` are what holds the disks already; the guests of those that are `stopped` have run.
        """
        exchanges = self._exchanges(vms)
        for each, claim in zip(exchanges, claims, strict=False):
            each.claim = claim
        for each in exchanges:
            if each.vm in stopped:
                each.running = True
        async with _claimed(exchanges):
            await exchange_all(exchanges, self._book.decide)
        return exchanges

    async def settle(self, vms: Sequence[VM | None]) -> None:
        """End what was begun in the QEMUs of these VMs, without a look at any other.

        Raises `VMGone` where another QEMU answers by now, when all others are settled;
        `CommitFailed` where it can't be ended (its ``__cause__`` tells why); what
        `Monitor.execute` raises.
        """
        gone = [
            part["vm"]
            for part, vm in zip(self._book.parts, vms, strict=True)
            if vm is not None
            and not is_exchanged(part)
            and is_same(part["identity"], process_identity(vm.peer_pid)) is False
        ]
        there = [
            None if part["vm"] in gone else vm
            for part, vm in zip(self._book.parts, vms, strict=True)
        ]
        begun = [each for each in self._exchanges(there) if each.begun and not each.over]
        async with _claimed(begun):
            if self._book.decided == "exchange":
                await complete(begun)
            elif stuck := await put_back(begun):
                raise CommitFailed(". ".join(each.text for each in stuck)) from stuck[0].error
        if gone:
            raise self.gone(gone[0])

    def gone(self, vm: str) -> VMGone:
        """What is raised where the QEMU has ended in which it was begun, and what to boot."""
        mine = [part for part in self._book.parts if part["vm"] == vm]
        formers = formers_of(mine)
        text = f"nothing was discarded: boot {formers}"
        if self._book.decided == "exchange":
            fresh = " and ".join(part["overlay"] for part in mine)
            text = (
                f"its changes were to be discarded: boot {fresh}, which is empty and starts from"
                f" the base; {formers} is whole still where it was not deleted"
            )
        disks = " and ".join(part["disk"] for part in mine)
        middle = f"{vm} is gone in the middle of a {self._called} for {disks}"
        return VMGone(f"{middle}; {text}", vm=vm)

    def _exchanges(self, vms: Sequence[VM | None]) -> list[Exchange]:
        """From where they are."""
        return [
            Exchange(
                vm,
                Plan.model_validate(part["plan"]),
                part["overlay"],
                guest=self._guest,
                note=partial(self._book.note_of, number),
                file=FileId(*part["file"]) if part["file"] else None,
                noted=part,
                asked=OverlayOptions.of(part["options"], part["secret"]),
            )
            for number, (vm, part) in enumerate(zip(vms, self._book.parts, strict=True))
            if vm is not None
        ]


async def discarded(exchanges: Sequence[Exchange], book: RoundBook) -> tuple[Discarded, ...]:
    """What became of them, which is noted as well."""
    ends = []
    for each, part in zip(exchanges, book.parts, strict=True):
        vm, plan, said = each.vm, each.plan, warnings_of(part)
        path = absolute(plan.top, vm.cwd)
        deleted = book.value["delete"] and not await asyncio.to_thread(os.path.lexists, path)
        for warning in said:
            vm.log.warning("outcome_warning", disk=plan.disk.name, warning=warning)
        overlay, former = each.filename, plan.top.handed_out
        vm.log.info("discarded", disk=plan.disk.name, former=former, overlay=overlay)
        ends.append(
            Discarded(
                disk=plan.disk.name,
                former=former,
                overlay=overlay,
                base=plan.base,
                guest=book.value["guest"],
                # It is not gone because nothing is there to be seen.
                deleted=deleted and not part["unseen"],
                vm=vm.name,
                warnings=tuple(said),
            )
        )
    await book.end(outcome=[each.model_dump(mode="json") for each in ends])
    return tuple(ends)


def warnings_of(part: Mapping[str, Any]) -> list[str]:
    """What is to be said of one disk that was exchanged."""
    said = list(part.get("warnings") or [])
    if unseen := part.get("unseen"):
        former = part["plan"]["top"]["filename"]
        why = unseen if isinstance(unseen, str) else "it is not seen here as QEMU's"
        said.append(f"{former} was not deleted: {why}")  # True is what the version before noted
    return said


def formers_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """The overlays that are, or were to be, thrown away."""
    return " and ".join(part["plan"]["top"]["filename"] for part in parts)


@asynccontextmanager
async def _claimed(exchanges: Sequence[Exchange]) -> AsyncIterator[None]:
    """Their disks are held, all or none; for one that was begun its guest does not wait."""
    claims: list[Claim] = []
    try:
        for each in exchanges:
            if each.over or each.claim is not None:
                continue
            vm, disk = each.vm, each.plan.disk
            each.claim = await (
                take_if_free(vm, disk, "disc")
                if each.begun
                else take(vm, disk, "disc", state="Nothing was discarded")
            )
            claims.append(each.claim)
        yield
    finally:
        await release_all(claims)
