"""Golden cycles: in rounds, an overlay's changes go into the base, or are thrown away.

A round asks a command whether the changes deserve it. If so a promise recycles the overlay: the
base takes its data, and an empty one begins. If not an `Exchange` lays an empty one over the base.
Each round is an `Undertaking`: it is in the journal before it begins, and so is each step of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from datetime import datetime, timedelta
from typing import Any

from qmpcommit.block.chain import absolute, find_disk
from qmpcommit.block.files import FileId
from qmpcommit.commit.aftermath import identify
from qmpcommit.commit.cycle import deserves, new_overlay, plan_round
from qmpcommit.commit.exchange import Exchange
from qmpcommit.commit.plan import JOB_PREFIX, Plan
from qmpcommit.commit.policy import Recycle
from qmpcommit.daemon.config import Cycle
from qmpcommit.daemon.cycle_models import CycleView, RoundView
from qmpcommit.daemon.engine import Engine, key_row
from qmpcommit.daemon.models import CommitRequest
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.registry import VM, is_alive
from qmpcommit.daemon.steps import commits_of, hands_off
from qmpcommit.daemon.undertaking import ENDED, Undertaking
from qmpcommit.errors import (
    ChainError,
    CommitNotFound,
    ConnectError,
    InvalidRequest,
    JobConflict,
    MonitorLost,
    QmpCommitError,
    VMGone,
)
from qmpcommit.journal import JournalFull
from qmpcommit.log import Log
from qmpcommit.session import Session
from qmpcommit.tasks import stop

HAND_OVER = 1.0
"""Seconds that an exchange under way gets when the daemon stops."""

CONNECTING = 10.0
"""Seconds that a VM gets to be connected before its round begins."""

AGAIN = 0.5
"""Seconds between two tries to reach a VM in the middle of an exchange."""


class Round(Undertaking[Cycle]):
    """One round of one cycle; `exchanging` while it is at work in QEMU."""

    kind = "cycle"
    asks = Cycle

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.exchanging = False

    @property
    def disk(self) -> str:
        """The disk that it is for, as the configuration calls it."""
        return self.request.disk

    def view(self) -> RoundView:
        """As the API shows it."""
        told = self.outcome or {}
        return RoundView.model_validate(
            {
                "id": self.id,
                "vm": self.vm,
                "disk": self.disk,
                "state": self.state,
                "created": self.created,
                "ended": self.ended,
                "overlay": self.noted.get("overlay"),
                "commit": told.get("commit") or self.noted.get("commit"),
                "result": told.get("result"),
                "warnings": told.get("warnings") or [],
                "error": self.error,
            }
        )


class Cycles:
    """All cycles of the configuration; a `Story` of the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cycles = {(cycle.vm, cycle.disk): cycle for cycle in engine.config.cycle}
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
            key = (found.vm, found.disk)
            if found.state not in ENDED:
                self.live[key] = found
            elif (found.outcome or {}).get("result") == "kept":
                self._kept[key] = found.ended or found.created

    async def on_up(self, vm: VM) -> None:
        """End the exchange that a former daemon has begun, before anybody else uses the VM."""
        assert vm.session is not None
        for found in self.live.values():
            if found.vm == vm.name and found.state == "discarding" and not found.exchanging:
                try:
                    await self._exchange(found, vm, vm.session)
                except QmpCommitError as error:  # its task tries again, and says how it ended
                    found.log.warning("exchange_not_ended", why=error.message)

    def owned(self, vm: str) -> set[str]:
        """Their commits are promises; what an exchange opens is no job."""
        return set()

    def busy(self, vm: str) -> list[str]:
        """Rounds that have not ended."""
        return [found.id for found in self.live.values() if found.vm == vm]

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
        found = []
        for key, cycle in self._cycles.items():
            rows = await self._engine.journal.read(
                "SELECT * FROM undertakings WHERE kind = 'cycle' AND vm = ? AND ended IS NOT NULL"
                " ORDER BY created DESC, rowid DESC LIMIT 1000",
                cycle.vm,
            )
            ended = (Round.load(row, self._engine.journal) for row in rows)
            last = next((each for each in ended if each.disk == cycle.disk), None)
            running = self.live.get(key)
            found.append(
                CycleView(
                    cycle=cycle,
                    next_round=self._next.get(key),
                    running=running.view() if running is not None else None,
                    last=last.view() if last is not None else None,
                    last_kept=self._kept.get(key),
                )
            )
        return found

    async def round(self, round_id: str) -> Round:
        """The round of that id, ended ones included; raises `CommitNotFound`."""
        for found in self.live.values():
            if found.id == round_id:
                return found
        sql = "SELECT * FROM undertakings WHERE kind = 'cycle' AND id = ?"
        rows = await self._engine.journal.read(sql, round_id)
        if not rows:
            raise CommitNotFound(f"there is no round '{round_id}' of a cycle")
        return Round.load(rows[0], self._engine.journal)

    async def ask(self, vm: str, disk: str, key: str | None, fingerprint: str) -> Round:
        """A round to be run now, durable.

        Raises `VMNotFound`, `InvalidRequest` where no cycle is for that disk, `JobConflict`
        while a round is under way, `KeyReused`, `QueueFull` or `JournalFull`.
        """
        self._engine.vm(vm)
        cycle = self._cycles.get((vm, disk))
        if cycle is None:
            raise InvalidRequest(
                f"the configuration has no [[cycle]] for {disk} of {vm}", vm=vm, disk=disk
            )
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
            wait = until_next(cycle, now)
            self._next[cycle.vm, cycle.disk] = now + wait
            await asyncio.sleep(wait)
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
                await self._ask_command(found)
            kept = found.state == "keeping"
            outcome = await (self._keep(found) if kept else self._discard(found))
            result = outcome["result"]
            if kept:
                self._kept[found.vm, found.disk] = time.time()
            await found.end("done", outcome=outcome)
        except QmpCommitError as error:
            await self._fail(found, error)
        except Exception as error:  # a bug of ours must not leave a round without an end
            found.log.warning("bug", error=repr(error))
            await self._fail(found, QmpCommitError(f"internal error: {error!r}"))
        self._engine.metrics.cycle_rounds.labels(found.vm, found.disk, result).inc()
        found.log.info("cycle_round", disk=found.disk, result=result)
        self.live.pop((found.vm, found.disk), None)

    async def _fail(self, found: Round, error: QmpCommitError) -> None:
        error.add(vm=found.vm, disk=found.disk)
        found.log.warning("cycle_failed", error=type(error).__name__, why=error.message)
        await found.end("failed", error=json.loads(json.dumps(error.to_dict(), default=str)))

    async def _ask_command(self, found: Round) -> None:
        """Whether the changes deserve it; the answer is durable before anything follows of it."""
        await found.move("asking")
        vm = self._engine.vm(found.vm)
        async with self._engine.registry.use(vm, wait=CONNECTING) as session:
            plan = await self._plan(found, session)
        keep = await deserves([plan], found.request.keep_if, found.request.timeout)
        async with self._engine.registry.use(vm, wait=CONNECTING) as session:
            plan = await self._plan(found, session)  # it may have taken its time
            former = absolute(plan.top, session.cwd)
            overlay = new_overlay(found.request.overlay_dir or os.path.dirname(former), former)
            facts: dict[str, Any] = {"overlay": overlay, "job_id": plan.job_id}
            if not keep:
                await self._check_base(found, plan)
                path = absolute(plan.top, session.cwd)
                facts["plan"] = plan.model_dump(mode="json")
                facts["identity"] = vm.identity
                if found.request.delete:
                    facts["file"] = await asyncio.to_thread(identify, path, session.peer_pid)
        await found.move("keeping" if keep else "discarding", **facts)

    async def _plan(self, found: Round, session: Session) -> Plan:
        """What there is to be carried or discarded; raises where the disk is in use otherwise."""
        disks = await session.disks()
        disk = find_disk(disks, found.disk, vm=found.vm, cwd=session.cwd)
        where = {"vm": found.vm, "disk": found.disk}
        plan = plan_round(found.vm, disk, f"{JOB_PREFIX}c{found.id[:8]}")
        held = commits_of(self._engine.live.values(), found.vm, disk, disks)
        objection = hands_off(disk, held)
        if objection:
            raise JobConflict(
                f"{disk} of {found.vm} is left alone: {objection}. Nothing was changed", **where
            )
        return plan

    async def _check_base(self, found: Round, plan: Plan) -> None:
        """Raise `ChainError` where the base is known to be whole under its overlay only."""
        rows = await self._engine.journal.read(
            "SELECT * FROM commits WHERE vm = ? AND plan IS NOT NULL AND ended IS NOT NULL"
            " ORDER BY ended DESC LIMIT 1000",
            found.vm,
        )
        for row in rows:
            if json.loads(row["plan"])["base"]["filename"] != plan.base.filename:
                continue
            outcome = json.loads(row["outcome"]) if row["outcome"] else {}
            if outcome.get("action", "abort") != "abort":
                return
            raise ChainError(
                f"the overlay of {found.disk} of {found.vm} can't be discarded: commit {row['id']}"
                f" did not come to its end, so {plan.base.filename} holds part of an overlay's data"
                " and is whole under it only. Commit the overlay (pivot, keep or recycle) first."
                " Nothing was changed",
                vm=found.vm,
                disk=found.disk,
                commit=row["id"],
            )

    # -- keeping ----------------------------------------------------------------------------------

    async def _keep(self, found: Round) -> dict[str, Any]:
        """Have the base take the changes; the promise is found again by its job's id."""
        promise = await self._promised(found)
        if promise is None:
            request = CommitRequest(
                disk=found.disk,
                policy=Recycle(found.noted["overlay"]),
                shallow=True,
                delete=found.request.delete,
                job_id=found.noted["job_id"],
            )
            promise = await self._take(found, request)
        await promise.over.wait()
        if promise.state != "done":
            said = (promise.error or {}).get("message") or f"its commit was {promise.state}"
            raise ChainError(str(said), commit=promise.id)
        told = (promise.outcome or {}).get("warnings") or []
        return {"result": "kept", "commit": promise.id, "warnings": told}

    async def _promised(self, found: Round) -> Promise | None:
        job_id = found.noted["job_id"]
        for promise in self._engine.live.values():
            if (promise.vm, promise.job_id) == (found.vm, job_id):
                return promise
        sql = "SELECT * FROM commits WHERE vm = ? AND job_id = ? AND created >= ?"
        rows = await self._engine.journal.read(sql, found.vm, job_id, found.created)
        if not rows:
            return None
        return Promise.load(rows[0], self._engine.journal, self._engine.metrics)

    async def _take(self, found: Round, request: CommitRequest) -> Promise:
        """A promise, when its VM is there: it may be connected still after a restart."""
        end = time.monotonic() + self._engine.config.limits.gone_after
        while True:
            try:
                return (await self._engine.take(found.vm, request, None, ""))[0]
            except (ConnectError, MonitorLost, JournalFull):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(AGAIN)

    # -- discarding -------------------------------------------------------------------------------

    async def _discard(self, found: Round) -> dict[str, Any]:
        """Throw the changes away; a VM that is away in between is waited for."""
        since = time.monotonic()
        while True:
            try:
                vm = self._engine.vm(found.vm)
                async with self._engine.registry.use(vm, wait=AGAIN) as session:
                    warnings = await self._exchange(found, vm, session)
                return {"result": "discarded", "warnings": warnings}
            except VMGone:
                raise
            except (ConnectError, MonitorLost) as error:
                identity = found.noted.get("identity") or ""
                waited = time.monotonic() - since
                limit = self._engine.config.limits.gone_after
                if (identity and not is_alive(identity)) or waited > limit:
                    raise self._gone(found) from error
                await asyncio.sleep(AGAIN)

    async def _exchange(self, found: Round, vm: VM, session: Session) -> list[str]:
        noted = found.noted
        if noted.get("identity") and vm.identity and noted["identity"] != vm.identity:
            raise self._gone(found)
        exchange = Exchange(
            session,
            Plan.model_validate(noted["plan"]),
            noted["overlay"],
            guest=found.request.guest,
            note=found.note,
            file=FileId(*noted["file"]) if noted.get("file") else None,
            noted=noted,
        )
        found.exchanging = True
        try:
            warnings = await exchange.run()
        finally:
            found.exchanging = False
        if warnings:
            await found.note("exchanged", warnings=warnings)
        return list(found.noted.get("warnings") or [])

    def _gone(self, found: Round) -> VMGone:
        """The QEMU in which the exchange was begun has ended."""
        former = found.noted["plan"]["top"]["filename"]
        text = f"nothing was discarded: boot {former}"
        if found.noted.get("step") not in (None, "", "stop"):
            text = (
                f"its changes were to be discarded: boot {found.noted['overlay']}, which is empty"
                f" and starts from the base; {former} is whole still where it was not deleted"
            )
        return VMGone(
            f"{found.vm} is gone in the middle of a round for {found.disk}; {text}", vm=found.vm
        )


def until_next(cycle: Cycle, now: float) -> float:
    """Seconds until the next round of a cycle whose last one is just over."""
    if cycle.every is not None:
        return cycle.every
    assert cycle.at is not None
    hour, minute = map(int, cycle.at.split(":"))
    today = datetime.fromtimestamp(now).astimezone()
    due = datetime(today.year, today.month, today.day, hour, minute)
    if due.astimezone().timestamp() <= now:
        due += timedelta(days=1)  # the wall clock's, whatever it does to summer time
    return due.astimezone().timestamp() - now
