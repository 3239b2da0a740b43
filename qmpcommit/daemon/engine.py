"""The daemon's engine: takes promises, keeps them, and takes them up again after a restart."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from qmpcommit.commit import phases
from qmpcommit.commit.claim import clear_left
from qmpcommit.commit.facts import Choice
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.pending import resolve_pending
from qmpcommit.commit.phases import Phase
from qmpcommit.commit.plan import Plan
from qmpcommit.daemon.asked import check_asked
from qmpcommit.daemon.config import Config
from qmpcommit.daemon.journal import Event, Journal, JournalFull, Statement, event
from qmpcommit.daemon.keeping import Keeper, seconds_left
from qmpcommit.daemon.losses import left_by, unnamed
from qmpcommit.daemon.metrics import Metrics
from qmpcommit.daemon.places import Places
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.registry import VM, Registry
from qmpcommit.daemon.scheduler import Caps, Entry, Scheduler
from qmpcommit.daemon.undertaking import Story, readable
from qmpcommit.errors import (
    CommitNotFound,
    ConnectError,
    InvalidRequest,
    JobConflict,
    KeyReused,
    MonitorLost,
    NotReady,
    QmpCommitError,
    QueueFull,
    VMNotFound,
)
from qmpcommit.log import Log
from qmpcommit.names import JOB_PREFIX
from qmpcommit.session import Session
from qmpcommit.tasks import stop
from qmpcommit.wire.commit import CommitRequest

HOOK_TIMEOUT = 60.0
STALL_PAUSE = 2.0
HAND_OVER = 1.2
"""Seconds that a commit which holds its guest gets to let it go before the daemon stops."""

TAKING = 0.5
"""Seconds that requests which are being promised get when the daemon stops."""

FINDING = 3.0
"""Seconds that a decision waits for a READY job to be found again in QEMU."""

ORPHANS = 10
"""Jobs of ours on one VM that nobody owns of which each has its line in the log."""

MAX_BEGINS = 3
"""How often a commit is begun that QEMU turns out not to know."""

T = TypeVar("T")

_AWAY = (ConnectError, MonitorLost)


class Engine:
    """All of the daemon but its API.

    Each of `followers` is called with each journaled event, and `told` is the last one's number;
    `stopping` tells that no new work is taken.
    """

    def __init__(self, config: Config, journal: Journal, metrics: Metrics | None = None) -> None:
        self.config, self.journal = config, journal
        self.metrics = metrics or Metrics()
        self.registry = Registry(config, self._on_up, self._on_change)
        self.followers: set[Callable[[Event], object]] = set()
        self.told = 0
        self._news: dict[str, set[asyncio.Event]] = {}
        self._keys: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._taking: set[asyncio.Future[Any]] = set()
        self._naming = asyncio.Lock()
        self._leaving: set[str] = set()
        self.stopping = False
        self.recovered = False
        self.orphans: dict[str, dict[str, str]] = {}
        self._unnamed = False
        limits = config.limits
        self.scheduler = Scheduler(
            Caps(limits.commits, limits.per_vm, limits.per_storage, limits.bandwidth)
        )
        self.live: dict[str, Promise] = {}
        self.stories: tuple[Story, ...] = ()
        self.keeper = Keeper(config, self.registry, journal, self.metrics)
        self.places = Places(config)
        self.keeper.allow = self._allow
        self.keeper.rate = self._rate
        self.keeper.begun = self.schedule
        self.log = Log()
        self._sharing: set[asyncio.Task[None]] = set()
        journal.on_event = self._tell
        journal.on_batch = self._count_batch

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the journal holds, then look for VMs."""
        for row in await self.journal.read("SELECT max(id) AS last FROM events"):
            self.told = max(self.told, row["last"] or 0)
        self._unnamed = await unnamed(self.journal)
        vms = await self.journal.read("SELECT * FROM vms")
        rows = await self.journal.read(
            "SELECT * FROM commits WHERE state IN ('queued', 'running') ORDER BY created, rowid"
        )
        for row in rows:
            try:
                promise = Promise.load(row, self.journal, self.metrics)
            except ValueError as error:  # written by another version: said, and left as it is
                self.log.warning("promise_unreadable", commit=row["id"], why=str(error))
                continue
            self.live[promise.id] = promise
            if promise.group:
                continue  # its group sees to it
            if promise.state == "running":
                self.scheduler.resume(self.entry(promise))
                promise.may_run.set()
            else:
                self.scheduler.add(self.entry(promise))
        for story in self.stories:
            await story.recover()
        # A VM is connected only when all is known that is promised for it.
        for row in vms:
            spec = json.loads(row["spec"])
            configured = {vm.name for vm in self.config.vm}
            if row["name"] not in configured:
                self.registry.add(row["name"], spec["qmp"], spec["connect"], "api")
        self.registry.start()
        for promise in list(self.live.values()):
            if not promise.group:
                self._launch(promise)
        self.recovered = True
        self.schedule()
        for story in self.stories:
            story.start()
        if rows:
            self.log.info("recovered", commits=len(rows))

    async def stop(self) -> None:
        """Hand over: no new work, jobs stay in QEMU as they are, and the next daemon goes on."""
        self.stopping = True
        if self._taking:
            _, late = await asyncio.wait(self._taking, timeout=TAKING)
            for taking in late:
                taking.cancel()
        for story in self.stories:
            await story.stop()
        jobs = [promise.job for promise in self.live.values() if promise.job is not None]
        with suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER):
                await asyncio.gather(*(job.let_go() for job in jobs))
        tasks = [promise.task for promise in self.live.values() if promise.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*(job.detach() for job in jobs))
        if tasks:
            await asyncio.wait(tasks)
        for sharing in list(self._sharing):
            await stop(sharing)
        await self.registry.close()
        await self.journal.close()

    # -- VMs --------------------------------------------------------------------------------------

    def vm(self, name: str) -> VM:
        """The VM of that name; raises `VMNotFound`."""
        vm = self.registry.vms.get(name)
        if vm is None or name in self._leaving:
            raise VMNotFound(
                f"no VM is called '{name}'; GET /v1/vms lists those that are known", vm=name
            )
        return vm

    async def add_vm(self, name: str, qmp: str, connect: Any) -> VM:
        """Make a VM known for good; raises `JobConflict` for a name that is taken."""
        return await self.shielded(self._add_vm(name, qmp, connect))

    async def _add_vm(self, name: str, qmp: str, connect: Any) -> VM:
        async with self._naming:
            self._check_stopping()
            known = self.registry.vms.get(name)
            if known is not None:
                if (known.qmp, known.connect) == (qmp, connect):
                    return known
                raise JobConflict(
                    f"a VM called '{name}' is known already, at {known.qmp}; remove it first",
                    vm=name,
                )
            spec = json.dumps({"qmp": qmp, "connect": connect})
            sql = "INSERT OR REPLACE INTO vms (name, spec) VALUES (?, ?)"
            await self.journal.write(Statement(sql, (name, spec)))
            return self.registry.vms.get(name) or self.registry.add(name, qmp, connect, "api")

    def busy(self, name: str) -> list[str]:
        """What has not ended of a VM."""
        busy = [promise.id for promise in self.live.values() if promise.vm == name]
        return busy + [known_as for story in self.stories for known_as in story.busy(name)]

    async def remove_vm(self, name: str) -> None:
        """Forget a VM; raises `VMNotFound`, or `JobConflict` while it has commits."""
        await self.shielded(self._remove_vm(name))

    async def _remove_vm(self, name: str) -> None:
        async with self._naming:
            vm = self.vm(name)
            busy = self.busy(name)
            if busy:
                raise JobConflict(
                    f"{name} has commits that have not ended ({', '.join(busy)}); wait for them, or"
                    " abort them",
                    vm=name,
                )
            if vm.origin == "config":
                raise JobConflict(f"{name} is in the configuration; remove it there", vm=name)
            if vm.origin == "discovered":
                raise JobConflict(
                    f"{name} was found by its socket {vm.qmp}; it goes when the socket does",
                    vm=name,
                )
            self._leaving.add(name)  # nothing is promised for it any more
            try:
                await self.journal.write(Statement("DELETE FROM vms WHERE name = ?", (name,)))
                await self.registry.remove(name)
            finally:
                self._leaving.discard(name)

    async def _on_up(self, vm: VM) -> None:
        """Just connected: whatever of ours holds a guest is resolved before anything else."""
        session = vm.session
        assert session is not None
        owned = {promise.job_id for promise in self.live.values() if promise.vm == vm.name}
        for story in self.stories:
            await story.on_up(vm)
        for outcome in await resolve_pending(session, owned=owned):
            self.log.warning(
                "orphan_held_its_disk", vm=vm.name, job=outcome.job_id, ended=outcome.action
            )
        await clear_left(session)
        orphans = {
            str(job["id"]): str(job.get("status"))
            for job in await session.execute("query-jobs")
            if str(job.get("id")).startswith(JOB_PREFIX)
            and job["id"] not in owned
            and job.get("type") == "commit"
        }
        if self._unnamed and orphans:
            for found in await left_by(self, vm, session, list(orphans)):
                await self.take_up(found)
                del orphans[found.job_id]
        self.orphans[vm.name] = orphans
        for name, status in islice(orphans.items(), ORPHANS):
            self.log.warning("orphan_job", vm=vm.name, job=name, status=status)
        if len(orphans) > ORPHANS:
            self.log.warning("orphan_jobs", vm=vm.name, in_all=len(orphans))

    def _allow(self, promise: Promise, session: Session, plan: Plan) -> None:
        vm = self.vm(promise.vm)
        self.places.check_commit(vm, session, plan, promise.request)

    async def take_up(self, promise: Promise, *beside: Statement) -> None:
        """One that QEMU shows, and that is not promised: it is from now on."""
        await self.promised([promise], beside, [])
        self.scheduler.resume(self.entry(promise))
        promise.may_run.set()
        self._launch(promise)

    def _on_change(self, vm: VM, what: str) -> None:
        if what == "lost":
            self.metrics.reconnects.inc()
        if what == "removed":
            self.orphans.pop(vm.name, None)
        self.log.info(f"vm_{what}", vm=vm.name)
        data = {"vm": vm.name, "state": vm.state, "change": what}
        self.journal.write_soon(events=[event("vm", vm.name, None, json.dumps(data))])

    # -- another configuration --------------------------------------------------------------------

    def check_exchange(self, config: Config) -> None:
        """Raise `JobConflict` for VMs that can't go, or be called as they are to be called."""
        wanted = {vm.name: vm for vm in config.vm}
        for name, known in self.registry.vms.items():
            new = wanted.get(name)
            same = new is not None and (new.qmp, new.connect) == (known.qmp, known.connect)
            if new is not None and known.origin == "api" and not same:
                raise JobConflict(
                    f"a VM called '{name}' was made known over the API, at {known.qmp}; remove it"
                    " first",
                    vm=name,
                )
            if (known.origin == "config" or new is not None) and not same and self.busy(name):
                raise JobConflict(
                    f"{name} has commits that have not ended ({', '.join(self.busy(name))}); wait"
                    " for them, or abort them",
                    vm=name,
                )

    async def exchange(self, config: Config) -> None:
        """Go on by another configuration, which was checked."""
        async with self._naming:
            self.check_exchange(config)
            self.config = self.keeper.config = config
            limits = config.limits
            self.scheduler.caps = Caps(
                limits.commits, limits.per_vm, limits.per_storage, limits.bandwidth
            )
            self.places = Places(config)
            for story in self.stories:
                story.exchange()
            await self.registry.exchange(config)
        self.schedule()

    # -- taking promises --------------------------------------------------------------------------

    async def take(
        self, vm_name: str, request: CommitRequest, key: str | None, fingerprint: str
    ) -> tuple[Promise, bool]:
        """A promise for a request, durable; and whether its key had been given before.

        Raises what `Session.plan` raises, `VMNotFound`, `QueueFull`, `KeyReused`, `JournalFull`.
        """
        make = partial(self._promise, vm_name, request, key, fingerprint)
        return await self.once(key, fingerprint, self.commit, make)

    async def shielded(self, work: Coroutine[Any, Any, T]) -> T:
        """Promise something, to the end, though its client may go away."""
        taking = asyncio.ensure_future(work)
        self._taking.add(taking)
        taking.add_done_callback(self._taken)
        # What the journal may have got already is not half done because its client has gone.
        return await asyncio.shield(taking)

    def _taken(self, taking: asyncio.Future[Any]) -> None:
        self._taking.discard(taking)
        if not taking.cancelled():
            taking.exception()  # its client was told, or has gone

    async def once(
        self,
        key: str | None,
        fingerprint: str,
        find: Callable[[str], Awaitable[T]],
        make: Callable[[], Awaitable[T]],
    ) -> tuple[T, bool]:
        """What was promised under that key, or is made now; and whether it was there before."""
        return await self.shielded(self._once(key, fingerprint, find, make))

    async def _once(
        self,
        key: str | None,
        fingerprint: str,
        find: Callable[[str], Awaitable[T]],
        make: Callable[[], Awaitable[T]],
    ) -> tuple[T, bool]:
        async with self.keyed(key, fingerprint) as known:
            return (await make(), False) if known is None else (await find(known), True)

    @asynccontextmanager
    async def keyed(self, key: str | None, fingerprint: str) -> AsyncIterator[str | None]:
        """The id of what was promised under that key before; raises `KeyReused`.

        Requests with one key at once are one request: the others wait for the first.
        """
        if key is None:
            yield None
            return
        lock = self._keys.setdefault(key, asyncio.Lock())
        async with lock:
            rows = await self.journal.read("SELECT * FROM keys WHERE key = ?", key)
            if rows and rows[0]["fingerprint"] != fingerprint:
                raise KeyReused("this Idempotency-Key was used for another request; use a new one")
            yield rows[0]["commit_id"] if rows else None

    async def _promise(
        self, vm_name: str, request: CommitRequest, key: str | None, fingerprint: str
    ) -> Promise:
        self._check_room(request)
        check_asked([request])
        vm = self.vm(vm_name)
        promise = Promise(
            uuid.uuid4().hex, vm_name, request, request.job_id or "", journal=self.journal,
            metrics=self.metrics,
        )  # fmt: skip
        async with self.registry.use(vm, wait=1.0) as session:
            await self.keeper.prepare(promise, session)
        self._check_room(request)  # others may have come meanwhile
        if any(p.vm == vm_name and p.job_id == promise.job_id for p in self.live.values()):
            raise JobConflict(
                f"a commit with the job id {promise.job_id} has not ended yet", vm=vm_name
            )
        events = []
        self.live[promise.id] = promise
        self.scheduler.add(self.entry(promise))
        self.schedule()
        if promise.may_run.is_set() and promise.prepared is not None:
            events.append(promise.event())
            promise.foretell(promise.prepared.job, vm.identity)
        key_rows = key_row(key, fingerprint, promise.id)
        try:
            await self.promised([promise], key_rows, events, partial(self._launch, promise))
        except BaseException:
            if promise.task is None:
                self.scheduler.remove(promise.id)
                self.schedule()
            raise
        return promise

    async def promised(
        self,
        promises: Sequence[Promise],
        beside: Sequence[Statement],
        events: Sequence[Event],
        begin: Callable[[], object] | None = None,
    ) -> None:
        """Write the promises of something else, with its row and its key; raises `JournalFull`.

        When this returns, somebody may be told; `begin` is called before, when all is durable.
        """
        self.live.update((promise.id, promise) for promise in promises)
        try:
            for promise in promises:
                self.vm(promise.vm)  # it may have been removed meanwhile
            statements = [*beside, *(promise.insertion() for promise in promises)]
            told = [*events, *(promise.event() for promise in promises)]
            await self.journal.write(*statements, events=told, begin=begin)
        except BaseException:
            for promise in promises:
                if promise.task is None:  # else it runs, and only who asked for it is not told
                    del self.live[promise.id]
            raise

    def _check_room(self, request: CommitRequest) -> None:
        self.check_room_for([request])

    def check_room_for(self, requests: Sequence[CommitRequest]) -> None:
        """Raises `QueueFull`, `JournalFull` or `InvalidRequest` where these can't be promised."""
        self.check_room()
        if len(self.live) + len(requests) > self.config.limits.commits + self.config.limits.queue:
            raise QueueFull("too many commits wait already; ask again when some have ended")
        if any(request.runs_commands for request in requests) and not self.config.commands:
            raise InvalidRequest(
                "this daemon runs no commands for its clients (only_if, on_pivot, a check): set"
                " commands = true in its configuration to allow it. Nothing was sent"
            )

    def check_room(self) -> None:
        """Raises `QueueFull` or `JournalFull` where nothing new can be promised."""
        self._check_stopping()
        if self.journal.full:
            self._look_for_room()
            raise JournalFull(
                f"the disk under the journal {self.journal.path} is full: no new commit can be"
                " promised. Make room; running commits go on"
            )

    def _check_stopping(self) -> None:
        if self.stopping:
            raise QueueFull("the daemon is stopping; ask the next one")

    def _look_for_room(self) -> None:
        """Whether there is room again is found by trying, not by refusing for ever."""
        sql = (
            "INSERT OR REPLACE INTO keys (key, fingerprint, commit_id, created)"
            " VALUES ('', '', '', 0)"
        )
        # Nothing is written for a statement that changes nothing; no client's key is empty.
        self.journal.write_soon(Statement(sql), Statement("DELETE FROM keys WHERE key = ''"))

    async def plan(self, vm: VM, request: CommitRequest, *, check: bool = False) -> Plan:
        """What a request comes to, without sending anything; raises what `Session.plan` raises."""
        async with self.registry.use(vm, wait=1.0) as session:
            return await session.plan(check=check, **vars(request.asked))

    @staticmethod
    def unknown(commit_id: str) -> CommitNotFound:
        """What is raised for an id of none, and for one that who asks may not see."""
        return CommitNotFound(f"there is no commit '{commit_id}'")

    async def commit(self, commit_id: str) -> Promise:
        """The commit of that id, ended ones included; raises `CommitNotFound`."""
        promise = self.live.get(commit_id)
        if promise is not None:
            return promise
        rows = await self.journal.read("SELECT * FROM commits WHERE id = ?", commit_id)
        if not rows:
            raise self.unknown(commit_id)
        with readable(f"commit '{commit_id}'"):
            return Promise.load(rows[0], self.journal, self.metrics)

    async def decide(self, commit_id: str, action: str) -> Promise:
        """Carry out a decision, durable before it is answered.

        Raises `NotReady`, `JobConflict` or `CommitNotFound`.
        """
        promise = await self.commit(commit_id)
        where = {"vm": promise.vm, "disk": promise.disk, "job_id": promise.job_id}
        if promise.group:
            raise JobConflict(
                f"commit {commit_id} is a member of the group {promise.group}, whose disks are"
                f" decided together: see /v1/groups/{promise.group}",
                **where,
            )
        if promise.state == "queued":
            if action != "abort":
                raise NotReady(f"commit {commit_id} waits in the queue still", **where)
            await self.shielded(self._cancel(promise))
            return promise
        asked_again = promise.decision == action
        if action != "abort" and promise.ready is not None and not asked_again:
            await self._found_again(promise)
        job = promise.job
        if promise.over.is_set() or (job is not None and not job.state.running):
            raise JobConflict(f"commit {commit_id} has ended already", **where)
        if job is None and asked_again:
            return promise  # it is carried out when the job is found again
        if job is None and action != "abort":
            raise NotReady(
                f"commit {commit_id} can't be decided: the monitor of {promise.vm} is away, or is"
                " being asked where the job is. It goes on; ask again",
                **where,
            )
        if job is not None:
            objection = phases.objection(job.state, Choice(action))
            if objection is not None:
                self._orders(job)[action]()  # which says why not
        await self.shielded(self.carry_out(promise, action))
        return promise

    async def carry_out(self, promise: Promise, action: str) -> None:
        """Have a decision written down, and given to its job; raises `JobConflict`."""
        async with promise.deciding:
            if action != "abort" and promise.decision not in (None, action):
                raise JobConflict(
                    f"commit {promise.id} was decided already, by another request:"
                    f" {promise.decision}",
                    vm=promise.vm,
                    disk=promise.disk,
                    job_id=promise.job_id,
                )
            await promise.decide(action)
            job = promise.job  # it may have begun while that was written
            if job is not None:
                with suppress(NotReady, JobConflict):  # it has moved on meanwhile
                    self._orders(job)[action]()

    async def _found_again(self, promise: Promise) -> None:
        """One that was READY for a former daemon, or before its monitor was lost, is looked for."""
        with suppress(TimeoutError, QmpCommitError):
            async with asyncio.timeout(FINDING):
                await promise.found.wait()
                if promise.job is not None:
                    await promise.job.ready()

    def _orders(self, job: CommitJob) -> dict[str, Callable[[], object]]:
        return {"pivot": job.pivot, "keep": job.keep, "abort": job.abort}

    async def _cancel(self, promise: Promise) -> None:
        """A queued one: nothing was sent."""
        if not self.scheduler.remove(promise.id):
            await promise.over.wait()  # another request cancels it
            return
        if promise.task is not None:
            await stop(promise.task)
        await promise.end("cancelled")
        self.metrics.commits.labels("cancelled", promise.policy_kind).inc()
        self.ended(promise)

    # -- running ----------------------------------------------------------------------------------

    def entry(self, promise: Promise) -> Entry:
        """A promise as the scheduler sees it."""
        rate = promise.request.bandwidth or 0
        return Entry(promise.id, promise.vm, promise.storage, promise.priority, rate)

    def _launch(self, promise: Promise) -> None:
        promise.task = asyncio.create_task(self._run(promise), name=f"promise {promise.id}")

    def schedule(self) -> None:
        """Start what may run now, and divide the bandwidth anew."""
        if self.stopping or not self.recovered:
            return
        for entry in self.scheduler.start():
            self.live[entry.id].may_run.set()
        if self.config.limits.bandwidth:
            task = asyncio.create_task(self._share(), name="bandwidth shares")
            self._sharing.add(task)
            task.add_done_callback(self._sharing.discard)

    async def _share(self) -> None:
        for commit_id, rate in self.scheduler.shares(self._copying()).items():
            promise = self.live.get(commit_id)
            if promise is None or promise.job is None or promise.rate == rate:
                continue
            promise.rate = rate
            with suppress(QmpCommitError):  # it has ended, or its monitor is away
                await promise.job.set_bandwidth(rate)

    def _rate(self, promise: Promise) -> int:
        """The share of one that is about to begin."""
        return self.scheduler.shares(self._copying()).get(
            promise.id, promise.request.bandwidth or 0
        )

    def _copying(self) -> list[str]:
        copying = ("", Phase.STARTING.value, Phase.COPYING.value)
        return [i for i in self.scheduler.running if self.live[i].phase in copying]

    async def _run(self, promise: Promise) -> None:
        """One promise to its end."""
        left = seconds_left(promise) if promise.state == "queued" else None
        try:
            async with asyncio.timeout(left):
                await promise.may_run.wait()
        except TimeoutError:
            pass  # the keeper says so, and sends nothing
        await self.keeper.keep(promise)
        self.ended(promise)

    def ended(self, *promises: Promise) -> None:
        """Their ends are durable: others may run."""
        for promise in promises:
            self.live.pop(promise.id, None)
            self.scheduler.remove(promise.id)
        self.schedule()

    # -- watching ---------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self.told = max(self.told, event.id)
        for follower in list(self.followers):
            follower(event)
        for news in self._news.get(event.commit_id or "", ()):
            news.set()

    @contextmanager
    def news_of(self, commit_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something has changed of this commit."""
        news = asyncio.Event()
        self._news.setdefault(commit_id, set()).add(news)
        try:
            yield news
        finally:
            self._news[commit_id].discard(news)
            if not self._news[commit_id]:
                del self._news[commit_id]

    def _count_batch(self, units: int, seconds: float) -> None:
        self.metrics.journal_units.inc(units)
        self.metrics.journal_seconds.observe(seconds)

    def gauge(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.jobs.clear()
        self.metrics.vms.clear()
        for promise in self.live.values():
            self.metrics.jobs.labels(promise.phase or promise.state).inc()
        self.metrics.vm_up.clear()
        self.metrics.ready_age.clear()
        for vm in self.registry.vms.values():
            self.metrics.vms.labels(vm.state).inc()
            self.metrics.vm_up.labels(vm.name).set(vm.up.is_set())
        now, since = time.time(), dict[str, float]()
        for promise in self.live.values():
            if promise.ready is not None and promise.phase == Phase.READY.value:
                since[promise.vm] = min(promise.ready, since.get(promise.vm, now))
        for name, ready in since.items():
            self.metrics.ready_age.labels(name).set(max(0.0, now - ready))
        self.metrics.journal_bytes.set(self.journal.size)
        self.metrics.orphans.clear()
        for name in self.orphans.keys() & self.registry.vms.keys():  # one may be leaving
            found = self.orphans[name]
            self.metrics.orphans.labels(name).set(len(found))
        for story in self.stories:
            story.gauge()
        self.metrics.journal_full.set(self.journal.full)

    def unready(self) -> list[str]:
        """Why no commits are taken at the moment; empty when they are."""
        reasons = []
        if not self.recovered:
            reasons.append("the journal is being read")
        if self.stopping:
            reasons.append("the daemon is stopping")
        if self.journal.full:
            self._look_for_room()
            reasons.append("the disk under the journal is full")
        return reasons

    def position(self, promise: Promise) -> int | None:
        """Its place in the queue, from 1; None where it does not wait."""
        if promise.state != "queued":
            return None
        waiting = self.scheduler.waiting
        return waiting.index(promise.id) + 1 if promise.id in waiting else None


def key_row(key: str | None, fingerprint: str, made: str) -> list[Statement]:
    """What remembers that `made` was promised under that key, to be written with it."""
    if key is None:
        return []
    sql = "INSERT INTO keys (key, fingerprint, commit_id, created) VALUES (?, ?, ?, ?)"
    return [Statement(sql, (key, fingerprint, made, time.time()))]
