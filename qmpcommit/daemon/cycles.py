"""Golden cycles: in rounds, an overlay's changes go into the base, or are thrown away.

A round asks a command whether the changes deserve it. If so a promise recycles the overlay: the
base takes its data, and an empty one begins. If not it is discarded.
Each round is an `Undertaking`: it is in the journal before it begins, and so is each step of it.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from qmpcommit.daemon.cycle_asking import ask_command
from qmpcommit.daemon.cycle_discarding import Discards
from qmpcommit.daemon.cycle_keeping import Keeping
from qmpcommit.daemon.cycle_round import Round
from qmpcommit.daemon.cycle_times import reached, until_next
from qmpcommit.daemon.engine import Engine, key_row
from qmpcommit.daemon.groups import Groups
from qmpcommit.daemon.keeping import error_dict
from qmpcommit.daemon.kinds import Kind
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.rights import ASKER
from qmpcommit.errors import InvalidRequest, JobConflict, QmpCommitError
from qmpcommit.log import Log
from qmpcommit.tasks import stop
from qmpcommit.wire.cycle import Cycle, CycleView

HAND_OVER = 1.0
"""Seconds that an exchange under way gets when the daemon stops."""


class Cycles(Kind[Round]):
    """All cycles of the configuration."""

    of, called, hint = Round, "round", " of a cycle"

    def __init__(self, engine: Engine, groups: Groups) -> None:
        super().__init__(engine)
        self._keeping, self._discards = Keeping(engine, groups), Discards(engine)
        self._cycles: dict[tuple[str, str], Cycle] = {}
        self._of: dict[tuple[str, str], Cycle] = {}
        self._next: dict[tuple[str, str], float] = {}
        self._kept: dict[tuple[str, str], float] = {}
        self._clocks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._log = Log()
        self._read()

    # -- the story --------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the rounds that had not ended."""
        await super().recover()
        for found in reversed(await self.newest("state = 'done' ORDER BY created DESC")):
            if (found.outcome or {}).get("result") == "kept":
                self._kept[found.place] = found.ended or found.created

    async def on_up(self, vm: VM) -> None:
        """End the exchange that a former daemon has begun, before anybody else uses the VM."""
        assert vm.session is not None
        for found in self.live.values():
            here = vm.name in found.vms and vm.name not in found.exchanging
            if here and found.state == "discarding":
                try:
                    await self._discards.settle(found, vm.name, vm.session)
                except QmpCommitError as error:  # its task tries again, and says how it ended
                    found.log.warning("exchange_not_ended", why=error.message)

    def busy(self, vm: str) -> list[str]:
        """Rounds that have not ended."""
        return [found.id for found in self.live.values() if vm in found.vms]

    def start(self) -> None:
        """Go on with what was begun, and keep to the schedule."""
        super().start()
        for key in self._cycles:
            self._set_clock(key)

    def exchange(self) -> None:
        """Keep to the cycles that there are now; a round under way ends as it began."""
        old = dict(self._cycles)
        self._read()
        for key in old.keys() | self._cycles.keys():
            if old.get(key) != self._cycles.get(key):
                if key in self._clocks:
                    self._clocks.pop(key).cancel()
                self._next.pop(key, None)
                if key in self._cycles:
                    self._set_clock(key)

    def _read(self) -> None:
        cycles = self._engine.config.cycle
        self._cycles = {(cycle.vm, cycle.disk): cycle for cycle in cycles}
        self._of = {place: cycle for cycle in cycles for place in cycle.disks}

    def _set_clock(self, key: tuple[str, str]) -> None:
        clock = self._keep_time(self._cycles[key])
        self._clocks[key] = asyncio.create_task(clock, name=f"cycle of {key}")

    async def stop(self) -> None:
        """Hand over: an exchange gets a moment to end, all else goes on with the next daemon."""
        for clock in self._clocks.values():
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
            running = self._at(key)
            which = "vm = ? AND ended IS NOT NULL ORDER BY created DESC, rowid DESC LIMIT 1000"
            rounds = await self.newest(which, cycle.vm)
            if self._at(key) is running:  # else it has ended meanwhile, or begun
                break
        last = next((each for each in rounds if each.disk == cycle.disk), None)
        return CycleView(
            cycle=cycle,
            next_round=self._next.get(key),
            running=running.view() if running is not None else None,
            last=last.view() if last is not None else None,
            last_kept=self._kept.get(key),
        )

    def vms_of(self, vm: str, disk: str) -> list[str]:
        """All VMs whose disks end as this one does."""
        cycle = self._of.get((vm, disk))
        return [vm] if cycle is None else [name for name, _ in cycle.disks]

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
        make = partial(self.begin, cycle, key, fingerprint)
        return (await self._engine.once(key, fingerprint, self.find, make))[0]

    async def begin(self, cycle: Cycle, key: str | None = None, fingerprint: str = "") -> Round:
        """Begin a round; raises `JobConflict` while one is under way."""
        self._engine.check_room()
        running = self._at((cycle.vm, cycle.disk))
        if running is not None:
            raise JobConflict(
                f"round {running.id} of {cycle.disk} of {cycle.vm} has not ended yet",
                vm=cycle.vm,
                disk=cycle.disk,
            )
        made = Round(cycle.vm, cycle, self._journal)
        await self.promise(made, *key_row(key, fingerprint, made.id))
        return made

    def _at(self, place: tuple[str, str]) -> Round | None:
        """The round of that cycle that is under way."""
        return next((each for each in self.live.values() if each.place == place), None)

    # -- the schedule -----------------------------------------------------------------------------

    async def _keep_time(self, cycle: Cycle) -> None:
        """Rounds in time; one whose time has passed unused is not made up for."""
        while True:
            now = time.time()
            due = self._next[cycle.vm, cycle.disk] = now + until_next(cycle, now)
            await reached(cycle, due)
            try:
                await self._engine.shielded(self.begin(cycle))  # the cycle may go meanwhile
            except QmpCommitError as error:
                self._log.info("cycle_skipped", vm=cycle.vm, disk=cycle.disk, why=error.message)

    # -- a round ----------------------------------------------------------------------------------

    async def _run(self, found: Round) -> None:
        ASKER.set(None)  # whoever asked for it now: what it does the configuration says
        if found.state in ("new", "asking"):
            await ask_command(self._engine, found)
        kept = found.state == "keeping"
        end = self._keeping.keep if kept else self._discards.discard
        outcome = await end(found)
        if kept:
            self._kept[found.place] = time.time()
        await found.end("done", outcome=outcome)

    async def _rescue(self, found: Round) -> str:
        discards = found.state == "discarding"
        left = await self._discards.rescue(found) if discards else "Nothing was discarded"
        return f". {left}"

    async def _after(self, found: Round) -> None:
        result = (found.outcome or {}).get("result", "failed")
        self._engine.metrics.cycle_rounds.labels(found.vm, found.disk, result).inc()
        found.log.info("cycle_round", disk=found.disk, result=result)

    async def _fail(self, found: Round, error: QmpCommitError) -> None:
        error.add(vm=found.vm, disk=found.disk)
        found.log.warning("cycle_failed", error=type(error).__name__, why=error.message)
        await found.end("failed", error=error_dict(error))
