"""One promised commit: what was asked, how far it is, and its way into the journal and back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpcommit.block.identity import FileId
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.ledger import Noted, add_note, files_of, plan_of, resumed_of
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.phases import Phase, State, Verdict
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Pivot, parse_policy
from qmpcommit.commit.request import what_of_stale
from qmpcommit.daemon import clock
from qmpcommit.daemon.journal import NOTE, Event, Journal, JournalFull, Statement, event
from qmpcommit.daemon.rights import asked_by
from qmpcommit.daemon.undertaking import write_when_possible
from qmpcommit.log import Log
from qmpcommit.qmp.process import is_same
from qmpcommit.window.remains import is_own_job
from qmpcommit.wire.commit import CommitRequest

if TYPE_CHECKING:
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.daemon.metrics import Metrics
    from qmpcommit.session import Session

FRESH = 1.0
"""Seconds for which the checks of a commit that is begun at once are not made again."""

_CHECKED = """
    UPDATE commits SET noted = json_set(noted, '$.state.unchecked', json('false'))
    WHERE id = ? AND json_extract(noted, '$.state.unchecked')
"""
"""Changes nothing else: it is written when there is time, and steps are noted meanwhile."""

LASTING = ("lost", "group", "clock", "asked", "decided")
"""What is noted of a promise for ever: the last is when it was made and READY, as `clock` has it.

The others are of one of which a damaged journal has lost something.
"""

_READY = """
    UPDATE commits SET ready = ?, noted = json_set(coalesce(noted, '{}'), '$.clock.ready', json(?))
    WHERE id = ?
"""

_HOLDS_THE_GUEST = {"job-finalize", "thaw", "cont", "unthrottle"}
"""Steps that let a guest go on: they never wait for room in the journal."""


class Prepared(NamedTuple):
    """A commit that was checked a moment ago, on a session that may still be the same."""

    job: CommitJob
    session: Session
    at: float

    def serves(self, session: Session) -> bool:
        """Whether what was seen then is believed still."""
        return session is self.session and time.monotonic() - self.at < FRESH


class Foretold(NamedTuple):
    """What was noted of a job before it was to be begun: its plan, that as it is kept, the rest."""

    plan: Plan | None
    dumped: dict[str, Any] | None
    noted: dict[str, Any]

    def tells(self, plan: Plan, noted: Mapping[str, Any]) -> bool:
        """Whether another process would go on from it as from this note of ``block-commit``."""
        same = ("state", "identity", "files", "hooked")
        return plan is self.plan and all(noted[name] == self.noted[name] for name in same)


class Ending(NamedTuple):
    """How a promise ends, and what writes and tells it."""

    state: str
    ended: float
    outcome: dict[str, Any] | None
    error: Any
    statement: Statement
    event: Event


class Promise:
    """A commit that was answered with 202.

    It is the commit's `Ledger`: each step is in the journal before it is taken. `noted` is the
    last one, from which another process goes on. `group` is the id of the group that it is a
    member of. `deciding` is held by the request whose decision is being written down.
    """

    def __init__(
        self,
        commit_id: str,
        vm: str,
        request: CommitRequest,
        job_id: str,
        *,
        journal: Journal,
        metrics: Metrics,
        group: str = "",
    ) -> None:
        self.id, self.vm, self.request, self.group = commit_id, vm, request, group
        self.disk = request.disk
        self.priority = request.priority
        self.created = time.time()
        self.born = time.monotonic()
        self._held_since: float | None = None
        self.state = "queued"
        self.phase = ""
        self.storage = ""
        self.plan: dict[str, Any] | None = None
        self.noted: dict[str, Any] = {"clock": {"made": clock.noted(self.born)}, **asked_by()}
        self.decision: str | None = None
        self.ready: float | None = None
        self.ended: float | None = None
        self.outcome: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.identity = ""
        self.rate = 0
        self.job: CommitJob | None = None
        self.task: asyncio.Task[None] | None = None
        self.prepared: Prepared | None = None
        self.decides: Callable[[], object] = lambda: None
        self.may_run = asyncio.Event()
        self.found = asyncio.Event()
        self.over = asyncio.Event()
        self.deciding = asyncio.Lock()
        self._journal, self._metrics = journal, metrics
        self._ready_at: float | None = None
        self._foretold: Foretold | None = None
        self.called(job_id)

    def called(self, job_id: str) -> None:
        """The id that its job has in QEMU, once it was planned."""
        self.job_id = job_id
        self.log = Log(vm=self.vm, disk=self.disk, job=job_id, commit=self.id)

    @property
    def policy_kind(self) -> str:
        """The policy that was asked for, as metrics call it."""
        return getattr(self.request.policy, "kind", "none")

    # -- the journal ------------------------------------------------------------------------------

    def insertion(self) -> Statement:
        """The row of a new one."""
        told = self._foretold or Foretold(None, self.plan, self.noted)
        return Statement(
            "INSERT INTO commits (id, vm, disk, job_id, state, priority, created, request, storage,"
            " in_group, noted, plan) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self.id, self.vm, self.disk, self.job_id, self.state, self.priority, self.created,
             self.request.model_dump_json(), self.storage, self.group,
             _json(told.noted or None), _json(told.dumped)),
        )  # fmt: skip

    @classmethod
    def load(cls, row: Mapping[str, Any], journal: Journal, metrics: Metrics) -> Promise:
        """One as the journal has it; raises ValueError where it can't be understood."""
        request = CommitRequest.model_validate_json(row["request"])
        promise = cls(
            row["id"], row["vm"], request, row["job_id"], journal=journal, metrics=metrics,
            group=row["in_group"],
        )  # fmt: skip
        promise.state, promise.phase, promise.storage = row["state"], row["phase"], row["storage"]
        promise.created, promise.ready, promise.ended = row["created"], row["ready"], row["ended"]
        promise.decision = row["decision"]
        for name in ("plan", "outcome", "error"):
            setattr(promise, name, json.loads(row[name]) if row[name] else None)
        promise.noted = json.loads(row["noted"]) if row["noted"] else {}
        promise.identity = promise.noted.get("identity", "")
        told = promise.noted.get("clock") or {}
        promise.born = clock.moment(told.get("made"), promise.created)
        if promise.ready is not None:
            promise._held_since = clock.moment(told.get("ready"), promise.ready)
        if promise.ended is None:
            promise.phase = promise.noted.get("state", {}).get("phase", "")
        if promise.state in ("done", "failed", "cancelled"):
            promise.over.set()
        return promise

    def event(self, **more: Any) -> Event:
        """What is told of it now."""
        data = {"id": self.id, "vm": self.vm, "disk": self.disk, "state": self.state,
                "phase": self.phase, **more}  # fmt: skip
        return event("commit", self.vm, self.id, json.dumps(data))

    async def end(
        self, state: str, *, outcome: CommitOutcome | None = None, error: Any = None
    ) -> None:
        """How it ended, durable before anybody is told."""
        end = self.ending(state, outcome, error)
        await self._write(end.statement, events=[end.event])
        self.ended_as(end)

    def ending(self, state: str, outcome: CommitOutcome | None, error: Any) -> Ending:
        """Its end, to be written and then told with `ended_as`."""
        ended = time.time()
        dumped = outcome.model_dump(mode="json") if outcome is not None else None
        values = (
            state, "finished", self.ready, ended, _json(dumped), _json(error), self.id
        )  # fmt: skip
        sql = (
            "UPDATE commits SET state = ?, phase = ?, ready = ?, ended = ?, outcome = ?, error = ?"
            " WHERE id = ?"
        )
        told = self.event(state=state, phase="finished", outcome=dumped, error=error)
        return Ending(state, ended, dumped, error, Statement(sql, values), told)

    def ended_as(self, end: Ending) -> None:
        """Its end is durable."""
        self.state, self.phase, self.ended = end.state, "finished", end.ended
        self.outcome, self.error = end.outcome, end.error
        self.over.set()

    def run(self) -> None:
        """It leaves the queue; that is durable with its first step: before it nothing is sent."""
        leaving = self.leaving()
        self._journal.write_soon(leaving, events=[self.event()])

    def foretell(self, job: CommitJob, identity: str) -> None:
        """It may run at once: that its job is begun is written with what promises it."""
        state, facts = job.first_note()
        noted = add_note(self.noted, "block-commit", state, **facts, times={}, identity=identity)
        self._foretold = Foretold(facts["plan"], noted.pop("plan"), noted)
        self.state = "running"

    def leaving(self) -> Statement:
        """It leaves the queue with this statement."""
        self.state = "running"
        return Statement("UPDATE commits SET state = 'running' WHERE id = ?", (self.id,))

    async def decide(self, action: str) -> None:
        """A decision that was answered is not forgotten; raises `JournalFull`."""
        by = asked_by("decided")
        self.noted = {**self.noted, **by}
        sql = (
            "UPDATE commits SET decision = ?, noted = json_patch(ifnull(noted, '{}'), ?)"
            " WHERE id = ?"
        )
        await self._journal.write(Statement(sql, (action, json.dumps(by), self.id)))
        self.decision = action

    async def forget_begin(self) -> None:
        """QEMU never knew the job: it may be begun again."""
        await self._write(self.forgetting())

    def forgetting(self) -> Statement:
        """What was begun is forgotten with this statement."""
        self.noted, self.plan = {n: self.noted[n] for n in LASTING if n in self.noted}, None
        self.ready = self._held_since = None
        sql = "UPDATE commits SET noted = ?, plan = NULL, ready = NULL WHERE id = ?"
        return Statement(sql, (_json(self.noted or None), self.id))

    async def _write(
        self, *statements: Statement, events: Sequence[Event] = (), told: bool = True
    ) -> None:
        """Until there is room: what runs goes on as it is meanwhile."""
        made = lambda: statements  # noqa: E731
        await write_when_possible(self._journal, self.log, made, events=events, told=told)

    def _only_closes(self, state: State | None) -> bool:
        """Whether what is cleared away are nodes alone: whoever goes on closes them once more."""
        request = self.request
        leaves = what_of_stale(request.delete, request.stale) == "leave"
        hooked = request.on_pivot is not None or is_own_job(self.job_id, self.disk)
        merged = state is not None and state.verdict in (Verdict.PIVOTED, Verdict.MERGED)
        return leaves and not hooked and merged

    # -- the ledger -------------------------------------------------------------------------------

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        """A step that is about to be taken."""
        noted = {**add_note(self.noted, step, state, **facts), "identity": self.identity}
        statements = []
        if step == "block-commit":
            self.plan = noted.pop("plan")
            sql = "UPDATE commits SET plan = ?, state = 'running' WHERE id = ?"
            statements.append(Statement(sql, (_json(self.plan), self.id)))
            foretold, self._foretold = self._foretold, None
            if foretold is not None and foretold.tells(facts["plan"], noted):
                self.noted = noted  # which was written with what promises it
                return
        self.noted = noted
        statements.append(Statement(NOTE, (_json(noted), self.id)))
        if step == "clear-away" and self._only_closes(state):
            self._journal.write_soon(*statements)
        elif step in _HOLDS_THE_GUEST or (state is not None and state.status == "pending"):
            try:
                await self._journal.write(*statements, told=False)
            except JournalFull as error:
                self.log.warning("journal_full", why=error.message, step=step)
        else:
            await self._write(*statements, told=False)
        if state is not None and state.phase is Phase.DECIDED and self._ready_at is not None:
            self.decides()
            self._metrics.reaction.observe(asyncio.get_running_loop().time() - self._ready_at)
            self._ready_at = None

    def moved(self, state: State) -> None:
        """The machine has reached another phase."""
        statements = []
        noted = self.noted.get("state") or {}
        if noted.get("unchecked") and not state.unchecked:
            self.noted = {**self.noted, "state": {**noted, "unchecked": False}}
            statements.append(Statement(_CHECKED, (self.id,)))
        if state.phase.value == self.phase or state.finished:
            if statements:
                self._journal.write_soon(*statements)
            return
        self.phase = state.phase.value
        if state.phase is Phase.READY:
            self.decides()
            self._ready_at = asyncio.get_running_loop().time()
            if self.ready is None:  # else it is found again, and its time goes on
                self.ready, self._held_since = time.time(), time.monotonic()
                since = clock.noted(self._held_since)
                known = {**self.noted.get("clock", {}), "ready": since}
                self.noted = {**self.noted, "clock": known}
                policy = self.request.policy
                if policy is not None and policy.held:  # whose time goes on over a restart
                    values = (self.ready, json.dumps(since), self.id)
                    statements.append(Statement(_READY, values))
        self._journal.write_soon(*statements, events=[self.event()])

    # -- back from the journal --------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Whether the journal has lost some of it: it may have been begun, and is never begun."""
        return "lost" in self.noted

    @property
    def adopted(self) -> bool:
        """Whether somebody else has begun its job, which became the daemon's by a decision."""
        return "adopted" in self.noted

    @property
    def begun(self) -> bool:
        """Whether ``block-commit`` may have been sent."""
        return "state" in self.noted and self.plan is not None

    @property
    def as_noted(self) -> Noted:
        """All that a ledger would hold of it, once it was begun."""
        noted = {**self.noted, "plan": self.plan}
        if self.ready is not None and Phase(noted["state"]["phase"]) is Phase.STARTING:
            # None was noted since.
            ready = datetime.fromtimestamp(self.ready, UTC).isoformat()
            noted["times"] = {"ready": ready, **noted["times"]}
        return noted

    def resumed(self, identity: str) -> tuple[Plan, Resumed, dict[str, FileId | None]]:
        """What to go on with, now that this QEMU answers; raises ValueError."""
        noted = self.as_noted
        plan = plan_of(noted, self.decided_policy())
        same_vm = is_same(self.identity, identity)
        return plan, resumed_of(noted, same_vm=same_vm), files_of(noted)

    def decided_policy(self) -> Any:
        """The policy that counts now: a decision that was promised, or what is left of a hold."""
        policy = self.request.policy
        if self.decision is not None:
            return parse_policy({"kind": self.decision})
        if policy is None:
            return Pivot()  # an intermediate layer asks none
        if self._held_since is None:
            return policy
        return policy.rest(time.monotonic() - self._held_since)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)
