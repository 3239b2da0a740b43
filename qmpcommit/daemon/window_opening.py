"""Opening a window: all of its overlays are laid at one instant, or none is.

On one VM a transaction lays all of them, whoever learns of it. On several it is one instant only
where all guests stood still until all overlays were laid; so what was not seen to open on all of
them, by this daemon or a former one, is closed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.keeping import error_dict
from qmpcommit.daemon.leased_window import LeasedWindow, Part
from qmpcommit.daemon.window_reach import AWAY, ask, writer_of
from qmpcommit.errors import DeadlineExceeded, QmpCommitError, WindowError
from qmpcommit.session import Session
from qmpcommit.tasks import to_the_end
from qmpcommit.window.records import Window
from qmpcommit.window.run import open_window, recover_window


class Opening:
    """Opens windows on the VMs of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def open(self, window: LeasedWindow) -> None:
        """It is "open" then; or "closing", with `LeasedWindow.undo`, where it has to be undone.

        Raises what `open_window` raises, where nothing is left of it on any VM.
        """
        lost: QmpCommitError | None = None
        alone = len(window.parts) == 1
        if not window.found_again:
            try:
                await self._begin(window)
            except QmpCommitError as error:
                sent = any(part.laid for part in window.parts)
                if not sent or (alone and not isinstance(error, (DeadlineExceeded, *AWAY))):
                    raise
                lost = error
                window.log.info("window_looked_for", why=error.message)
        if not window.is_open:
            if not any(part.laid for part in window.parts):
                raise WindowError(
                    f"the daemon ended before it opened the window on {window.vm}; nothing was"
                    " sent. Ask again",
                    vm=window.vm,
                )
            if not alone:
                window.failure = lost or _not_opened(window.vm)
                await window.move("closing", undo=error_dict(window.failure))
                return
            if not await self.recover(window.parts[0]):
                raise lost or _not_opened(window.vm)
        window.found_again = False
        async with window.lock:
            await window.move("open")

    async def recover(self, part: Part) -> bool:
        """Let its guest go on; whether overlays are laid, which are open then.

        Of what was not laid nothing is left, or it is raised. Raises what `ask` and
        `recover_window` raise.
        """
        noted = part.laid
        if noted is None:
            return False
        held = part.may_be_held

        async def recovering(vm: Session) -> Window | None:
            found = await recover_window(vm, noted, held=held)
            for each in noted.disks.values():
                if found is None or each not in found.values():
                    await writer_of(self._engine, part, vm, each)
            return found

        found = await ask(self._engine, part, recovering)
        if found is not None:
            part.claims = found.claims
            await part.note("open", window=replace(noted, disks=dict(found)))
        return found is not None

    async def _begin(self, window: LeasedWindow) -> None:
        """On all of its VMs; where one fails, the others undo what they have begun."""
        meet = asyncio.Barrier(len(window.parts)).wait
        opening = [
            asyncio.create_task(self._begin_on(window, part, meet), name=f"window on {part.vm}")
            for part in window.parts
        ]
        try:
            await asyncio.gather(*opening)
        except BaseException:
            for task in opening:
                task.cancel()
            await to_the_end(_over(opening))
            raise

    async def _begin_on(
        self, window: LeasedWindow, part: Part, meet: Callable[[], Awaitable[object]]
    ) -> None:
        vm, asked = self._engine.vm(part.vm), window.request
        async with self._engine.registry.use(vm, wait=1.0) as session:
            part.know(identity=vm.identity, cwd=session.cwd)
            opened = await open_window(
                session,
                part.disks,
                overlay_dir=asked.overlay_dir,
                overlay_options=asked.overlay_options,
                overlay_secret=asked.overlay_secret,
                freeze=asked.freeze,
                agent=part.agent,
                name=part.name,
                ledger=part,
                meet=meet,
            )
            part.claims, part.claimed_in = opened.claims, vm.identity


async def _over(opening: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(opening)
    for task in opening:
        if not task.cancelled():
            task.exception()  # the first one's is the news


def _not_opened(vm: str) -> WindowError:
    return WindowError(
        f"the window on {vm} was not opened, for the daemon ended meanwhile. The guest goes on,"
        " and nothing is left of the window. Ask again",
        vm=vm,
    )
