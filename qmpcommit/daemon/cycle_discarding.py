"""What a round throws away: of all of its disks, on however many VMs, or of none.

Disks of one VM are carried forward by whoever finds them half-way. Those of several VMs go the
way that was noted when all fresh overlays were laid: exchanged if that was before the end of the
process that laid them, and else put back, whereupon it begins again. So no VM ever waits for
another one with its guest paused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from qmpcommit.block.identity import FileId
from qmpcommit.commit.claim import Claim, release_all, take, take_if_free
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.plan import Plan
from qmpcommit.cycles.exchange import Exchange, complete, exchange_all, put_back
from qmpcommit.daemon.cycle_asking import sessions
from qmpcommit.daemon.cycle_round import Decided, Round
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.registry import VM
from qmpcommit.errors import (
    CommitFailed,
    ConnectError,
    DeadlineExceeded,
    MonitorLost,
    QmpCommitError,
    VMGone,
)
from qmpcommit.qmp.process import is_alive
from qmpcommit.session import Session

AGAIN = 0.5
"""Seconds between two tries to reach a VM in the middle of an exchange."""


_AWAY = (ConnectError, MonitorLost, DeadlineExceeded)


class Discarding:
    """Exchanges overlays for empty ones, and ends what a former daemon has begun of that."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def discard(self, found: Round) -> dict[str, Any]:
        """The round's outcome; a VM that is away in between is waited for."""
        try:
            await self._discard(found)
        except CommitFailed as error:
            already = [f"{part['disk']} of {part['vm']}" for part in found.parts if _over(part)]
            if not already:
                raise
            text = f"{error.message}. But {' and '.join(already)} was discarded already"
            raise CommitFailed(text, **error.facts) from None
        warnings = [text for part in found.parts for text in part.get("warnings") or []]
        return {"result": "discarded", "warnings": warnings}

    async def _discard(self, found: Round) -> None:
        end = time.monotonic() + self._engine.config.limits.gone_after
        hung: DeadlineExceeded | None = None
        while not _done(found):
            await self._settle_all(found, end)
            if _done(found):
                break
            if hung is not None and time.monotonic() > end:
                raise DeadlineExceeded(
                    f"{hung.message}. It answers again: nothing was discarded, and the guests go"
                    " on",
                    **hung.facts,
                )
            try:
                async with sessions(self._engine, found.vms, AGAIN) as held:
                    await self._exchange(found, held)
            except VMGone:
                raise
            except DeadlineExceeded as error:
                hung = error
                self._hangs(found, error)  # perhaps with its guest paused: it is waited for
            except (ConnectError, MonitorLost):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(AGAIN)

    async def rescue(self, found: Round) -> str:
        """After an error that nobody foresaw: have the guests go on; what is left, in words."""
        if not any(_begun(part) for part in found.parts):
            return "Nothing was discarded"
        try:
            if found.decided is None:
                await found.note("back", decided="back")
            await self._settle_all(found, time.monotonic())
        except Exception as error:  # the same again, perhaps
            found.log.warning("not_settled", error=repr(error))
            paused = " and ".join(found.vms)
            return (
                f"The guest of {paused} may be paused still, and its disk half exchanged: look at"
                f" its chain, then let it go on with 'cont'. {_formers(found.parts)} is whole"
            )
        if all(map(_over, found.parts)):
            return "The overlays were discarded, and the guests go on"
        return "Nothing was discarded, and the guests go on"

    async def settle(self, found: Round, vm: VM, session: Session) -> None:
        """End what was begun in this VM's QEMU, without a look at any other.

        Raises `VMGone` where it was begun in another QEMU, `CommitFailed` where it can't be ended.
        """
        for part in found.parts:
            began = part.get("identity")
            if part["vm"] == vm.name and began and vm.identity and began != vm.identity:
                raise _gone(found, vm.name)
        begun = [
            each for each in self._exchanges(found, {vm.name: session})
            if each.running is not None and not each.over
        ]  # fmt: skip
        if not begun:
            return
        if found.decided != "back" and len(found.vms) == 1:
            await self._exchange(found, {vm.name: session})
            return
        found.exchanging.add(vm.name)
        claims: list[Claim] = []
        try:
            claims = await self._claim(begun)
            if found.decided == "exchange":
                await self._warn(found, begun, await complete(begun))
            else:
                stuck = await put_back(begun)
                for each in stuck:
                    if isinstance(each.error, _AWAY):  # it is put back when it answers again
                        raise each.error
                if stuck:
                    raise CommitFailed(". ".join(each.text for each in stuck), vm=vm.name)
        finally:
            await release_all(claims)
            found.exchanging.discard(vm.name)

    async def _settle_all(self, found: Round, end: float) -> None:
        """Settle it on each VM, before anything is said of one on which that can't be."""
        settling = (self._settle_soon(found, name, end) for name in found.vms)
        errors = [error for error in await asyncio.gather(*settling) if error is not None]
        if errors:
            raise errors[0]

    async def _settle_soon(self, found: Round, name: str, end: float) -> QmpCommitError | None:
        """Why it can't be settled on this VM."""
        identities = [part.get("identity") for part in found.parts if part["vm"] == name]
        while True:
            try:
                vm = self._engine.vm(name)
                async with self._engine.registry.use(vm, wait=AGAIN) as session:
                    await self.settle(found, vm, session)
            except VMGone as error:
                return error
            except _AWAY as error:
                if isinstance(error, DeadlineExceeded):
                    self._hangs(found, error)
                dead = any(each and not is_alive(each) for each in identities)
                # A guest that may be paused is not left to itself while its QEMU lives.
                left = not dead and all(identities) and any(
                    _begun(part) for part in found.parts if part["vm"] == name
                )  # fmt: skip
                if not left and (dead or time.monotonic() > end):
                    return _gone(found, name)
                await asyncio.sleep(AGAIN)
            except QmpCommitError as error:
                return error
            else:
                return None

    def _hangs(self, found: Round, error: DeadlineExceeded) -> None:
        """A QEMU does not answer: its monitor is connected anew, as soon as it does again."""
        found.log.warning("exchange_hangs", vm=error.vm, why=error.message)
        for name in found.vms:
            vm = self._engine.registry.vms.get(name)
            if vm is not None and vm.session is not None and error.vm in (name, None):
                vm.session.drop()

    async def _exchange(self, found: Round, held: dict[str, Session]) -> None:
        exchanges = self._exchanges(found, held)
        forward = found.decided == "exchange"

        async def decide(which: Decided) -> None:
            # What a former try has exchanged can't be put back any more where a VM is away.
            await found.note(which, decided="exchange" if forward else which)

        found.exchanging |= held.keys()
        claims: list[Claim] = []
        try:
            claims = await self._claim(exchanges)
            warnings = await exchange_all(exchanges, on_decision=decide)
        finally:
            await release_all(claims)
            found.exchanging -= held.keys()
        await self._warn(found, exchanges, warnings)

    async def _claim(self, exchanges: Sequence[Exchange]) -> list[Claim]:
        """Claim their disks, all or none; of one that was begun its guest does not wait for it."""
        claims: list[Claim] = []
        try:
            for each in exchanges:
                if each.over:
                    continue
                disk = each.plan.disk
                begun = each.running is not None
                taking = take_if_free(each.vm, disk, "disc") if begun else take(
                    each.vm, disk, "disc", state="Nothing was discarded"
                )  # fmt: skip
                each.claim = await taking
                claims.append(each.claim)
        except BaseException:
            await release_all(claims)
            raise
        return claims

    async def _warn(
        self, found: Round, exchanges: Sequence[Exchange], warnings: Sequence[list[str]]
    ) -> None:
        said = {
            each.plan.job_id: text for each, text in zip(exchanges, warnings, strict=True) if text
        }
        for number, part in enumerate(found.parts):
            if part["job_id"] in said:
                await found.note_of(number, "exchanged", warnings=said[part["job_id"]])

    def _exchanges(self, found: Round, held: dict[str, Session]) -> list[Exchange]:
        """Those of the disks of these VMs, from where they are."""
        return [
            Exchange(
                held[part["vm"]],
                Plan.model_validate(part["plan"]),
                part["overlay"],
                guest=found.request.guest,
                note=partial(found.note_of, number),
                file=FileId(*part["file"]) if part.get("file") else None,
                noted=part,
                asked=OverlayOptions.of(
                    found.request.overlay_options,
                    found.request.overlay_secret if part.get("encrypted", True) else None,
                ),
            )
            for number, part in enumerate(found.parts)
            if part["vm"] in held
        ]


def _done(found: Round) -> bool:
    return all(map(_over, found.parts))


def _over(part: Mapping[str, Any]) -> bool:
    return part.get("step") == "exchanged"


def _begun(part: Mapping[str, Any]) -> bool:
    """Whether its guest may stand still for it."""
    return part.get("running") is not None and not _over(part)


def _formers(parts: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(part["plan"]["top"]["filename"] for part in parts)


def _gone(found: Round, name: str) -> VMGone:
    """The QEMU in which an exchange was begun has ended."""
    mine = [part for part in found.parts if part["vm"] == name]
    formers = _formers(mine)
    text = f"nothing was discarded: boot {formers}"
    if found.decided == "exchange":
        fresh = " and ".join(part["overlay"] for part in mine)
        text = (
            f"its changes were to be discarded: boot {fresh}, which is empty and starts from the"
            f" base; {formers} is whole still where it was not deleted"
        )
    disks = " and ".join(part["disk"] for part in mine)
    return VMGone(f"{name} is gone in the middle of a round for {disks}; {text}", vm=name)
