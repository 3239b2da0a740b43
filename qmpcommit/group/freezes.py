"""The guests of a group commit, quiesced for its one instant: each for its own disks.

Each is quiesced when all disks are READY, before the first of them is held, and goes on when its
own disks have ended; or at once where the group has given up, or at its limit. A mark in QEMU
tells of it meanwhile, for whoever comes after this process was killed.

Rests on what `quiesced` and `marked` rest on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qmpcommit.callback import Notes
from qmpcommit.commit.job import CommitJob
from qmpcommit.errors import QmpCommitError, QuiesceFailed
from qmpcommit.guest.marks import mark_of_group, marked
from qmpcommit.guest.quiesce import LIMIT, How, Quiet, quiesced
from qmpcommit.guest.sockets import Sockets
from qmpcommit.tasks import stop, to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM

OnQuiet = Callable[["VM"], None]
"""Called when the guest of a VM stands still."""

OnFailure = Callable[["VM", str, Exception | None], None]
"""Called when it can't, or does no longer, though its disks have not ended; with why."""


class Freezes:
    """Quiesces guests; `seconds` is for how long each was, `problems` are for people to read.

    `notes` are told of each step before it is taken. Without `how` there are none to begin with.
    """

    def __init__(
        self,
        group: str,
        how: How | None,
        agents: Sockets[VM],
        *,
        on_quiet: OnQuiet,
        on_failure: OnFailure,
        notes: Mapping[VM, Notes] | None = None,
    ) -> None:
        self.seconds: dict[VM, float] = {}
        self.problems: list[str] = []
        self._owner, self._how, self._agents = mark_of_group(group), how, agents
        self._on_quiet, self._on_failure, self._notes = on_quiet, on_failure, notes or {}
        self._given_up = asyncio.Event()
        self._beginning: set[VM] = set()
        self._holding: dict[VM, asyncio.Task[None]] = {}

    def begin(
        self,
        guests: Mapping[VM, Sequence[CommitJob]],
        until: Callable[[VM], Awaitable[object]],
    ) -> None:
        """Quiesce these guests, all at once, each until its jobs are settled and `until` ends."""
        for vm, jobs in guests.items():
            self._beginning.add(vm)
            holding = self._hold(vm, jobs, until)
            self._holding[vm] = asyncio.create_task(holding, name=f"freeze of {vm.name}")

    def give_up(self) -> None:
        """Let all go on; what is being frozen just now is not waited for."""
        if self._given_up.is_set():
            return
        self._given_up.set()
        for vm in self._beginning:
            self._holding[vm].cancel()

    async def over(self) -> None:
        """Wait until all go on again; their jobs have to have ended, or the group given up."""
        if self._holding:
            await to_the_end(self._wait())

    async def _wait(self) -> None:
        await asyncio.wait(self._holding.values())

    async def _hold(
        self,
        vm: VM,
        jobs: Sequence[CommitJob],
        until: Callable[[VM], Awaitable[object]],
    ) -> None:
        quiet = Quiet(self._how)
        socket, notes = self._agents.get(vm), self._notes.get(vm)
        try:
            async with (
                marked(vm, self._owner, self._how),
                quiesced(vm, self._how, agent=socket, limit=LIMIT, ledger=notes) as quiet,
            ):
                self._beginning.discard(vm)
                self._on_quiet(vm)
                try:
                    await self._disks_have_ended(jobs)
                    await until(vm)
                except asyncio.CancelledError:
                    # Its limit: no base may be finalized that is written to from here on.
                    why = f"its guest stood still for {LIMIT:g} s, its limit, and goes on"
                    self._on_failure(vm, why, None)
                    raise
        except asyncio.CancelledError as error:
            self.problems += getattr(error, "__notes__", ())
        except Exception as error:  # the notes' own too
            if isinstance(error, QuiesceFailed) and error.frozen:
                self.problems.append(error.message)
            why = error.message if isinstance(error, QmpCommitError) else repr(error)
            self._on_failure(vm, f"its guest could not be quiesced ({why})", error)
        finally:
            self._beginning.discard(vm)
        if quiet.seconds is not None:
            self.seconds[vm] = quiet.seconds

    async def _disks_have_ended(self, jobs: Sequence[CommitJob]) -> None:
        """Wait until they have, or the group has given up."""
        settling = asyncio.create_task(_settled(jobs))
        giving_up = asyncio.create_task(self._given_up.wait())
        try:
            await asyncio.wait({settling, giving_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await stop(settling)
            await stop(giving_up)


async def _settled(jobs: Sequence[CommitJob]) -> None:
    for job in jobs:
        await job.settled()
