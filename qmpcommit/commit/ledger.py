"""Where the steps of a commit are written down before they are taken.

Whoever wants a commit to survive its own process (the daemon, or a program with a `FileLedger`)
gives a `Ledger`: each step that changes something in QEMU is noted, with the state of the machine,
before it is taken. From the last note `phases.resume` goes on, in another process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol

from qmpcommit.block.identity import FileId
from qmpcommit.callback import Failed, ask
from qmpcommit.commit.checks.finding import Finding
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.facts import Choice, Ended
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.phases import PARTS, Phase, State, Verdict
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import AnyPolicy, PolicyCall, Recycle, parse_policy
from qmpcommit.errors import InvalidRequest, QmpCommitError


class Ledger(Protocol):
    """Writes a commit's steps down, for another process to go on from; `FileLedger` is one.

    A program that writes them elsewhere folds each note into the one value that is to be kept, and
    gives that back when the commit is resumed::

        class Row:
            async def note(self, step, state=None, **facts):
                self.value = qc.add_note(self.value, step, state, **facts)   # JSON's own types
                await self.database.write(self.value)                        # durable
            def moved(self, state): ...
            async def noted(self):
                return self.value

    One ledger is for one commit, group, window or cycle.
    """

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        """A step that is about to be taken; it is when this returns.

        `step` is the QMP command that will be sent, or what else will be done: ``freeze`` (a fresh
        overlay is made; the facts `overlay` and `recycle`), ``stop`` and ``cont`` (the guest stands
        still, or goes on again), ``overlay``, ``thaw``, ``clear-away`` (stale layers are closed and
        deleted; the fact `outcome`), ``throttle`` (the fact `repair` is the QMP command that takes
        it back) and ``unthrottle``. ``block-commit``, the first, has the facts `plan`, `files`,
        `timeout` and `hooked`; each note with a `state` has `times` and `identity`, QEMU's process.

        Of what is no commit each note has `kind`, its id `known_as`, its whole `value`, which takes
        the place of the former, and whether it is `over`.

        One that raises, ends in ``CancelledError``, or takes too long while a disk is held or the
        guest stands still (two seconds) fails: before the job's end a step that can't be noted is
        not taken, and the job is cancelled (`CommitFailed`, its ``__cause__`` what this ended
        with); a cancellation, and what follows the end or lets the guest go on, is done all the
        same, without deleting files, and a warning of the outcome tells.
        """

    def moved(self, state: State) -> None:
        """The machine has reached another phase; for whoever watches, so nothing waits for it."""


COMMIT = "commit"
KINDS = (COMMIT, "group", "window", "cycle")
"""What a ledger may hold one of."""

Noted = Mapping[str, Any]
"""All that was noted, in JSON's own types; of what is no commit its `kind` is there."""


def add_note(noted: Noted, step: str, state: State | None = None, **facts: Any) -> dict[str, Any]:
    """What was noted so far, and this step: all that whoever goes on has to know."""
    if facts.get("kind", COMMIT) != COMMIT:
        told = {"step": step, "over": bool(facts.get("over"))}
        return {**facts["value"], "kind": facts["kind"], "known_as": facts["known_as"], **told}
    added = {**noted, "step": step}
    if state is not None:
        added["state"] = dump_state(state)
        added["times"] = {name: at.isoformat() for name, at in facts["times"].items()}
        added["identity"] = facts.get("identity") or added.get("identity", "")
    match step:
        case "block-commit":
            plan = facts["plan"].model_dump(mode="json")
            if not isinstance(facts["plan"].policy, AnyPolicy):
                plan["policy"] = None  # a callable is to be given again
            hooked = bool(facts.get("hooked"))
            added |= {"plan": plan, "files": facts["files"], "hooked": hooked}
            timeout = facts.get("timeout")
            if timeout is not None:
                added |= {"timeout": timeout, "begun": time.time()}
        case "freeze":
            added["overlay"] = facts["overlay"]
            added["recycle"] = facts["recycle"].model_dump(mode="json")
        case "stop":
            added["stopped"] = True
        case "cont":
            added["stopped"] = False
        case "job-finalize":
            added["finalized"] = True
        case "throttle":
            added["repair"] = facts["repair"]
        case "unthrottle":
            added.pop("repair", None)
        case "clear-away":
            added["outcome"] = facts["outcome"].model_dump(mode="json")
    return added


async def read_ledger(ledger: Any) -> Noted:
    """All that a ledger holds, of whatever kind; nothing where it is empty.

    Raises `InvalidRequest` for one that can't be read.
    """
    if not callable(getattr(ledger, "noted", None)):
        raise InvalidRequest(
            f"{ledger!r} is no ledger to resume from: it has no noted(), which gives back what"
            " add_note made of the notes"
        )
    try:
        noted: Noted | None = await ask(ledger.noted)
    except Failed as failed:
        if isinstance(failed.cause, QmpCommitError):
            raise failed.cause from None
        raise InvalidRequest(f"the ledger can't be read: {failed}") from failed.cause
    if noted and noted.get("kind", COMMIT) not in KINDS:
        raise InvalidRequest(
            f"the ledger holds a '{noted['kind']}', which this version of qmpcommit does not know"
        )
    return dict(noted or {})


def expect_kind(noted: Noted, kind: str) -> None:
    """Raises `InvalidRequest` where a ledger holds something else."""
    held = noted.get("kind", COMMIT)
    if noted and held != kind:
        how = "Session.resume(ledger)" if held == COMMIT else "qc.resume(ledger, vms), with all VMs"
        raise InvalidRequest(f"the ledger holds a {held}, not a {kind}: go on with it by {how}")


def resumed_of(noted: Noted, *, same_vm: bool | None, alone: bool = True) -> Resumed:
    """Where a commit was that is to be gone on with; raises ValueError or the like.

    Of one that is not `alone` its group lets the guest go on.
    """
    recycle = noted.get("overlay")  # the version before noted no more than that
    recycled = noted.get("recycle") or {"overlay": recycle}
    outcome = noted.get("outcome")
    return Resumed(
        state=load_state(noted["state"]),
        same_vm=same_vm,
        recycle=Recycle.model_validate(recycled) if recycle else None,
        stopped=bool(noted.get("stopped")) and alone,
        outcome=CommitOutcome.model_validate(outcome) if outcome else None,
        times={name: datetime.fromisoformat(at) for name, at in noted["times"].items()},
    )


def files_of(noted: Noted) -> dict[str, FileId | None]:
    """Which files of this host the stale layers and the base were."""
    return {
        name: FileId(*known) if known else None
        for name, known in (noted.get("files") or {}).items()
    }


def plan_of(noted: Noted, policy: AnyPolicy | PolicyCall | None) -> Plan:
    """The plan, with what is left of its policy, or with the `policy` that is given anew."""
    plan = Plan.model_validate(noted["plan"])
    plan.findings[:] = [Finding.model_validate(each) for each in plan.findings]
    left = policy
    if left is None and plan.policy is not None:
        left = rest_of(parse_policy(plan.policy), noted)
    object.__setattr__(plan, "policy", left)
    return plan


def rest_of(policy: AnyPolicy | PolicyCall, noted: Noted) -> AnyPolicy | PolicyCall:
    """What is left of a policy whose job was READY when that was noted."""
    since = noted.get("ready")
    if since is None or not isinstance(policy, AnyPolicy):
        return policy
    return policy.rest(time.time() - since)


def time_left(noted: Noted) -> float | None:
    """Seconds until the deadline that it was begun with; None where it has none."""
    timeout: float | None = noted.get("timeout")
    if timeout is None:
        return None
    passed: float = max(0.0, time.time() - noted["begun"])
    return max(0.0, timeout - passed)


def dump_state(state: State) -> dict[str, Any]:
    """The state as JSON's own types: one mapping, for the names of all its values differ."""
    dumped = state._asdict()
    for name in PARTS:
        dumped |= dumped.pop(name)._asdict()
    if state.end is not None:
        dumped["end"] = state.end._asdict()
    return dumped


def load_state(dumped: Mapping[str, Any]) -> State:
    """The state that was dumped; raises ValueError or TypeError for what is none."""
    values = dict(dumped)
    values["phase"] = Phase(values["phase"])
    for name, kind in (("decision", Choice), ("former", Choice), ("verdict", Verdict)):
        if values.get(name) is not None:
            values[name] = kind(values[name])
    if values.get("end") is not None:
        values["end"] = Ended(**values["end"])
    values["trail"] = tuple(values.get("trail") or ())
    for name, part in PARTS.items():
        values[name] = part(**{each: values.pop(each) for each in part._fields if each in values})
    return State(**values)
