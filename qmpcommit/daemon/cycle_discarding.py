"""What a round throws away, of VMs that come and go; see `cycles.discarding`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from qmpcommit.cycles.book import is_begun, is_exchanged
from qmpcommit.cycles.discarding import formers_of, warnings_of
from qmpcommit.daemon.cycle_asking import sessions
from qmpcommit.daemon.cycle_round import Round
from qmpcommit.daemon.engine import Engine
from qmpcommit.errors import (
    CommitFailed,
    ConnectError,
    DeadlineExceeded,
    MonitorLost,
    QmpCommitError,
)
from qmpcommit.qmp.process import is_alive
from qmpcommit.session import Session

AGAIN = 0.5
"""Seconds between two tries to reach a VM in the middle of an exchange."""


_AWAY = (ConnectError, MonitorLost, DeadlineExceeded)


class Discards:
    """Has overlays thrown away, and ends what a former daemon has begun of that."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def discard(self, found: Round) -> dict[str, Any]:
        """The round's outcome; a VM that is away in between is waited for."""
        try:
            await self._discard(found)
        except CommitFailed as error:
            already = [
                f"{part['disk']} of {part['vm']}" for part in found.parts if is_exchanged(part)
            ]
            if not already:
                raise
            text = f"{error.message}. But {' and '.join(already)} was discarded already"
            raise CommitFailed(text, **error.facts) from None
        warnings = [text for part in found.parts for text in warnings_of(part)]
        return {"result": "discarded", "warnings": warnings}

    async def _discard(self, found: Round) -> None:
        end = time.monotonic() + self._engine.config.limits.gone_after
        hung: DeadlineExceeded | None = None
        while not found.exchanged:
            await self._settle_all(found, end)
            if found.exchanged:
                break
            if hung is not None and time.monotonic() > end:
                raise DeadlineExceeded(
                    f"{hung.message}. It answers again: nothing was discarded, and the guests go"
                    " on",
                    **hung.facts,
                )
            try:
                async with sessions(self._engine, found.vms, AGAIN) as held:
                    with found.at_work(held):
                        await found.discarding.run([held[part["vm"]] for part in found.parts])
            except DeadlineExceeded as error:
                hung = error
                self._hangs(found, error)  # perhaps with its guest paused: it is waited for
            except (ConnectError, MonitorLost):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(AGAIN)

    async def rescue(self, found: Round) -> str:
        """After an error that nobody foresaw: have the guests go on; what is left, in words."""
        if not found.begun:
            return "Nothing was discarded"
        try:
            await self._settle_all(found, time.monotonic())
        except Exception as error:  # the same again, perhaps
            found.log.warning("not_settled", error=repr(error))
            paused = " and ".join(found.vms)
            return (
                f"The guest of {paused} may be paused still, and its disk half exchanged: look at"
                f" its chain, then let it go on with 'cont'. {formers_of(found.parts)} is whole"
            )
        if found.exchanged:
            return "The overlays were discarded, and the guests go on"
        return "Nothing was discarded, and the guests go on"

    async def settle(self, found: Round, name: str, session: Session) -> None:
        """End what was begun in this VM's QEMU; raises as `Discarding.settle`."""
        vms = [session if part["vm"] == name else None for part in found.parts]
        with found.at_work([name]):
            await found.discarding.settle(vms)

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
                    await self.settle(found, name, session)
            except QmpCommitError as error:
                away = error.__cause__ if isinstance(error, CommitFailed) else error
                if not isinstance(away, _AWAY):
                    return error
                if isinstance(away, DeadlineExceeded):
                    self._hangs(found, away)
                dead = any(each and not is_alive(each) for each in identities)
                # A guest that may be paused is not left to itself while its QEMU lives.
                left = not dead and all(identities) and any(
                    is_begun(part) for part in found.parts if part["vm"] == name
                )  # fmt: skip
                if not left and (dead or time.monotonic() > end):
                    return found.discarding.gone(name)
                await asyncio.sleep(AGAIN)
            else:
                return None

    def _hangs(self, found: Round, error: DeadlineExceeded) -> None:
        """A QEMU does not answer: its monitor is connected anew, as soon as it does again."""
        found.log.warning("exchange_hangs", vm=error.vm, why=error.message)
        for name in found.vms:
            vm = self._engine.registry.vms.get(name)
            if vm is not None and vm.session is not None and error.vm in (name, None):
                vm.session.drop()
