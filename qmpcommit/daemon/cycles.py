"""Golden cycles: in rounds, an overlay's changes go into the base, or are thrown away.

A round asks a command whether the changes deserve it. If so a promise recycles the overlay: the
base takes its data, and an empty one begins. If not an `Exchange` lays an empty one over the base.
Each round is an `Undertaking`: it is in the journal before it begins, and so is each step of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress

from qmpcommit.daemon.cycle_asking import ask_command
from qmpcommit.daemon.cycle_discarding import Discarding
from qmpcommit.daemon.cycle_keeping import Keeping
from qmpcommit.daemon.cycle_round import Round
from qmpcommit.daemon.cycle_times import reached, until_next
from qmpcommit.daemon.engine import Engine, key_row
from qmpcommit.daemon.groups import Groups
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.undertaking import ENDED, readable
from qmpcommit.errors import CommitNotFound, InvalidRequest, JobConflict, QmpCommitError
from qmpcommit.log import Log
from qmpcommit.tasks import stop
from qmpcommit.wire.cycle import Cycle, CycleView

HAND_OVER = 1.0
"""Seconds that an exchange under way gets when the daemon stops."""


class Cycles:
    """All cycles of the configuration; a `Story` of the engine."""

    def __init__(self, engine: Engine, groups: Groups) -> None:
        self._engine = engine
        self._keeping, self._discarding = Keeping(engine, groups), Discarding(engine)
        self._cycles = {(cycle.vm, cycle.disk): cycle for cycle in engine.config.cycle}
        self._of = {place: cycle for cycle in engine.config.cycle for place in cycle.disks}
        self._next: dict[tuple[str, str], float] = {}
        self._kept: dict[tuple[str, str], float] = {}
        self.live: dict[tuple[str, str], Round] = {}
        self._clocks: set[asyncio.Task[None]] = set()
        self._log = Log()

    # -- the story --------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the rounds that had not ended."""
        rows = await self._engine.journal.read(
            "SELECT * FROM undertakings WHERE kind = 'cycle' ORDER BY created"
        )
        for row in rows:
            try:
                found = Round.load(row, self._engine.journal)
            except ValueError as error:  # written by another version: said, and left as it is
                self._log.warning("round_unreadable", cycle=row["id"], why=str(error))
                continue
            if found.state not in ENDED:
                self.live[found.place] = found
            elif (found.outcome or {}).get("result") == "kept":
                self._kept[found.place] = found.ended or found.created

    async def on_up(self, vm: VM) -> None:
        """End the exchange that a former daemon has begun, before anybody else uses the VM."""
        assert vm.session is not None
        for found in self.live.values():
            here = vm.name in found.vms and vm.name not in found.exchanging
            if here and found.state == "discarding":
                try:
                    await self._discarding.settle(found, vm, vm.session)
                except QmpCommitError as error:  # its task tries again, and says how it ended
                    found.log.warning("exchange_not_ended", why=error.message)

    def owned(self, vm: str) -> set[str]:
        """Their commits are promises; what an exchange opens is no job."""
        return set()

    def busy(self, vm: str) -> list[str]:
        """Rounds that have not ended."""
        return [found.id for found in self.live.values() if vm in found.vms]

    def start(self) -> None:
        """Go on with what was begun, and keep to the schedule."""
        for found in self.live.values():
            self._launch(found)
        for key, cycle in self._cycles.items():
            clock = asyncio.create_task(self._keep_time(cycle), name=f"cycle of {key}")
            self._clocks.add(clock)

    async def stop(self) -> None:
        """Hand over: an exchange gets a moment to end, all else goes on with the next daemon."""
        for clock in self._clocks:
            await stop(clock)
        busy = [found.task for found in self.live.values() if found.exchanging and found.task]
        if busy:
            await asyncio.wait(busy, timeout=HAND_OVER)
        for found in list(self.live.values()):
            if found.task is not None:
                await stop(found.task)

    def gauge(self) -> None:
        """Bring the gauges up to date."""
        now = time.time()
        for (vm, disk), at in self._kept.items():
            self._engine.metrics.cycle_kept_age.labels(vm, disk).set(max(0.0, now - at))

    # -- looking and asking -----------------------------------------------------------------------

    async def views(self) -> list[CycleView]:
        """All cycles, as the API shows them."""
        return [await self._view(cycle) for cycle in self._cycles.values()]

    async def _view(self, cycle: Cycle) -> CycleView:
        key = (cycle.vm, cycle.disk)
        while True:
            running = self.live.get(key)
            rows = await self._engine.journal.read(
                "SELECT * FROM undertakings WHERE kind = 'cycle' AND vm = ? AND ended IS NOT NULL"
                " ORDER BY created DESC, rowid DESC LIMIT 1000",
                cycle.vm,
            )
            if self.live.get(key) is running:  # else it has ended meanwhile, or begun
                break
        last = None
        for row in rows:
            with suppress(ValueError):  # written by another version
                ended = Round.load(row, self._engine.journal)
                if ended.disk == cycle.disk:
                    last = ended
                    break
        return CycleView(
            cycle=cycle,
            next_round=self._next.get(key),
            running=running.view() if running is not None else None,
            last=last.view() if last is not None else None,
            last_kept=self._kept.get(key),
        )

    async def round(self, round_id: str) -> Round:
        """The round of that id, ended ones included; raises `CommitNotFound`."""
        for found in self.live.values():
            if found.id == round_id:
                return found
        sql = "SELECT * FROM undertakings WHERE kind = 'cycle' AND id = ?"
        rows = await self._engine.journal.read(sql, round_id)
        if not rows:
            raise CommitNotFound(f"there is no round '{round_id}' of a cycle")
        with readable(f"round '{round_id}'"):
            return Round.load(rows[0], self._engine.journal)

    async def ask(self, vm: str, disk: str, key: str | None, fingerprint: str) -> Round:
        """A round to be run now, durable.

        Raises `VMNotFound`, `InvalidRequest` where no cycle is for that disk, `JobConflict`
        while a round is under way, `KeyReused`, `QueueFull` or `JournalFull`.
        """
        self._engine.vm(vm)
        cycle = self._of.get((vm, disk))
        if cycle is None:
            raise InvalidRequest(
                f"the configuration has no [[cycle]] for {disk} of {vm}", vm=vm, disk=disk
            )
        return await self._engine.shielded(self._take(cycle, key, fingerprint))

    async def _take(self, cycle: Cycle, key: str | None, fingerprint: str) -> Round:
        async with self._engine.keyed(key, fingerprint) as known:
            if known is not None:
                return await self.round(known)
            return await self.begin(cycle, key, fingerprint)

    async def begin(self, cycle: Cycle, key: str | None = None, fingerprint: str = "") -> Round:
        """Begin a round; raises `JobConflict` while one is under way."""
        self._engine.check_room()
        place = (cycle.vm, cycle.disk)
        if place in self.live:
            raise JobConflict(
                f"round {self.live[place].id} of {cycle.disk} of {cycle.vm} has not ended yet",
                vm=cycle.vm,
                disk=cycle.disk,
            )
        made = self.live[place] = Round(cycle.vm, cycle, self._engine.journal)
        try:
            await self._engine.journal.write(
                made.insertion(), *key_row(key, fingerprint, made.id), events=[made.event()]
            )
        except BaseException:
            del self.live[place]
            raise
        self._launch(made)
        return made

    # -- the schedule -----------------------------------------------------------------------------

    async def _keep_time(self, cycle: Cycle) -> None:
        """Rounds in time; one whose time has passed unused is not made up for."""
        while True:
            now = time.time()
            due = self._next[cycle.vm, cycle.disk] = now + until_next(cycle, now)
            await reached(cycle, due)
            try:
                await self.begin(cycle)
            except QmpCommitError as error:
                self._log.info("cycle_skipped", vm=cycle.vm, disk=cycle.disk, why=error.message)

    def _launch(self, found: Round) -> None:
        found.task = asyncio.create_task(self._run(found), name=f"round {found.id}")

    # -- a round ----------------------------------------------------------------------------------

    async def _run(self, found: Round) -> None:
        """One round to its end, from wherever it is."""
        result = "failed"
        try:
            if found.state in ("new", "asking"):
                await ask_command(self._engine, found)
            kept = found.state == "keeping"
            end = self._keeping.keep if kept else self._discarding.discard
            outcome = await end(found)
            result = outcome["result"]
            if kept:
                self._kept[found.place] = time.time()
            await found.end("done", outcome=outcome)
        except QmpCommitError as error:
            await self._fail(found, error)
        except Exception as error:  # a bug of ours must not leave a round without an end
            found.log.warning("bug", error=repr(error))
            left = "Nothing was discarded"
            if found.state == "discarding":
                left = await self._discarding.rescue(found)
            await self._fail(found, QmpCommitError(f"internal error: {error!r}. {left}"))
        self._engine.metrics.cycle_rounds.labels(found.vm, found.disk, result).inc()
        found.log.info("cycle_round", disk=found.disk, result=result)
        self.live.pop(found.place, None)

    async def _fail(self, found: Round, error: QmpCommitError) -> None:
        error.add(vm=found.vm, disk=found.disk)
        found.log.warning("cycle_failed", error=type(error).__name__, why=error.message)
        await found.end("failed", error=json.loads(json.dumps(error.to_dict(), default=str)))
