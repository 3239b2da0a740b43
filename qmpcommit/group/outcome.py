"""What a group commit came to: all of it, none of it, or which disks on which side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from qmpcommit.commit.facts import Choice
from qmpcommit.commit.outcome import CommitOutcome, Timings
from qmpcommit.commit.phases import State, Verdict
from qmpcommit.commit.plan import Plan
from qmpcommit.errors import DeadlineExceeded, GroupFailed, GroupSplit, QmpCommitError
from qmpcommit.values import Record, record


@record
class GroupOutcome(Record):
    """The end of a group commit in which all disks ended the same way, as they were meant to.

    `action` is what was done to all, ``mixed`` where the members' policies differ, ``abort``
    where a policy or the caller wanted no end; `decided_by` who decided that. `outcomes` are the
    members' own, in their order; each tells in `held` for how long its disk's I/O was held.
    `held` is the longest of these, in seconds, and `instant` the one moment that all bases show,
    on QEMU's own clock: all disks were held then. `quiesced` is for how many seconds the guest
    stood still that did so longest, where a `freeze` was asked for; each of `outcomes` tells it of
    its own.
    """

    group: str
    status: Literal["completed", "cancelled"]
    action: Literal["pivot", "keep", "abort", "recycle", "mixed"]
    outcomes: list[CommitOutcome]
    decided_by: str = ""
    instant: datetime | None = None
    held: float | None = None
    quiesced: float | None = None
    warnings: list[str] = field(default_factory=list)


class MemberEnd(NamedTuple):
    """How one member ended: its outcome or its error, and what was decided for it."""

    plan: Plan
    state: State
    timings: Timings
    outcome: CommitOutcome | None
    error: BaseException | None
    choice: Choice | None

    @property
    def name(self) -> str:
        """The disk and its VM."""
        return f"{self.plan.disk.name} of {self.plan.vm}"

    @property
    def held(self) -> float | None:
        """For how many seconds the disk's I/O was held, on QEMU's clock."""
        return self.timings.held

    @property
    def keeps(self) -> bool:
        """Whether it was kept, by whomever, or was to be."""
        if self.state.verdict in (Verdict.PIVOTED, Verdict.RECYCLED, Verdict.KEPT):
            return self.state.verdict is Verdict.KEPT
        return self.choice is Choice.KEEP

    def done(self) -> bool | None:
        """Whether its decision was carried out; None where that can't be known."""
        state = self.state
        match state.verdict:
            case Verdict.PIVOTED | Verdict.RECYCLED | Verdict.KEPT | Verdict.MERGED:
                return True
            case Verdict.VM_GONE | Verdict.MONITOR_LOST | None:
                if state.end is not None:
                    return not state.end.cancelled and state.end.error is None
                return None if state.barrier.prepared else False
        if state.verdict is Verdict.VANISHED:  # its overlay is active: it has not pivoted
            return None if self.keeps else False
        return None if state.verdict is Verdict.UNCLEAR else False

    def dump(self) -> dict[str, Any]:
        """For an error's facts: the outcome, or the error with what is known beside it."""
        if self.outcome is not None:
            return self.outcome.model_dump(mode="json")
        error = self.error
        said = (
            error.to_dict()
            if isinstance(error, QmpCommitError)
            else {"type": type(error).__name__, "message": str(error)}
        )
        where = {"vm": self.plan.vm, "disk": self.plan.disk.name, "job_id": self.plan.job_id}
        return {**where, "held": self.held, "error": said}


def is_clean(end: MemberEnd) -> bool:
    """Whether nothing is left of it, and nothing was done by it."""
    if end.outcome is not None:
        return end.outcome.action == "abort"
    facts = end.error.facts if isinstance(end.error, QmpCommitError) else {}
    return facts.get("begun") is False or bool(facts.get("vanished"))


def outcome_of(group: str, ends: Sequence[MemberEnd], *, by: str) -> GroupOutcome:
    """The outcome where all ended as they were meant to."""
    outcomes = [end.outcome for end in ends if end.outcome is not None]
    actions = {outcome.action for outcome in outcomes}
    completed = all(outcome.status == "completed" for outcome in outcomes)
    since = [end.timings.decided for end in ends if end.timings.decided is not None]
    holds = [end.held for end in ends if end.held is not None]
    stood = [o.quiesced for o in outcomes if o.quiesced is not None]
    return GroupOutcome(
        group=group,
        status="completed" if completed else "cancelled",
        action=actions.pop() if len(actions) == 1 else "mixed",  # type: ignore[arg-type]
        outcomes=outcomes,
        decided_by=by,
        instant=max(since) if completed and len(since) == len(ends) else None,
        held=max(holds) if holds else None,
        quiesced=max(stood) if stood else None,
        warnings=[f"{o.disk} of {o.vm}: {w}" for o in outcomes for w in o.warnings],
    )


def error_of(
    ends: Sequence[MemberEnd],
    *,
    why: str,
    culprit: int | None,
    finalized: bool,
    timeout: float | None = None,
    problems: Sequence[str] = (),
) -> QmpCommitError | None:
    """The error of a group that did not end as it was meant to; None where it did.

    `why` is why it was cancelled (empty where all were `finalized`), `culprit` the member that
    it was cancelled for; `problems` is what of the guests a person has to see to.
    """
    sides = {True: [], False: [], None: []}  # type: dict[bool | None, list[MemberEnd]]
    for end in ends:
        sides[end.done()].append(end)
    cause = ends[culprit].error if culprit is not None else None
    cause = cause or next((end.error for end in ends if end.error is not None), None)
    if finalized and not sides[False] and not sides[None]:
        return cause if isinstance(cause, QmpCommitError) else None
    if finalized or sides[True] or sides[None]:
        error = _split(sides, why, cause, problems)
    else:
        error = _failed(ends, why, culprit, cause, timeout, problems)
    error.add(outcomes=[end.dump() for end in ends])
    error.__cause__ = cause
    return error


def _failed(  # noqa: PLR0917
    ends: Sequence[MemberEnd],
    why: str,
    culprit: int | None,
    cause: BaseException | None,
    timeout: float | None,
    problems: Sequence[str],
) -> QmpCommitError:
    text = f"the group commit of {_names(ends)} was cancelled: {_reason(ends, why, culprit, cause)}"
    text += (
        ". No disk was pivoted or kept: each goes on writing to its overlay, which is whole. The"
        " bases may hold part of the overlays' data and are valid only under them. Commit again"
    )
    text = ". But ".join([text, *problems])
    if timeout is not None:
        return DeadlineExceeded(text)
    kind = GroupFailed(text, error=getattr(cause, "error", None))
    if culprit is not None:
        plan = ends[culprit].plan
        kind.add(vm=plan.vm, disk=plan.disk.name, job_id=plan.job_id)
    return kind


def _reason(
    ends: Sequence[MemberEnd], why: str, culprit: int | None, cause: BaseException | None
) -> str:
    reason = why if culprit is None else f"{ends[culprit].name}: {why}"
    if cause is not None:
        reason += f" ({getattr(cause, 'message', str(cause) or repr(cause))})"
    return reason


def _split(
    sides: dict[bool | None, list[MemberEnd]],
    why: str,
    cause: BaseException | None,
    problems: Sequence[str],
) -> QmpCommitError:
    def named(ends: Sequence[MemberEnd], *, pivots: bool) -> list[str]:
        return [end.name for end in ends if end.keeps is not pivots]

    facts: dict[str, list[str]] = {
        "pivoted": named(sides[True], pivots=True),
        "not_pivoted": named(sides[False], pivots=True),
        "kept": named(sides[True], pivots=False),
        "not_kept": named(sides[False], pivots=False),
        "unknown": [end.name for end in sides[None]],
    }
    told = [
        (facts["pivoted"], "write to their base now; their overlays are stale"),
        (facts["kept"], "have a complete base and go on writing to their overlay"),
        (
            facts["not_pivoted"],
            "did not pivot: boot or go on with their overlay, which is whole, and"
            " under which alone their base is valid",
        ),
        (facts["not_kept"], "go on with their overlay, and their base can't be called complete"),
        (facts["unknown"], "may be on either side; their own errors say how to find out"),
    ]
    text = "the group commit is split"
    if why:
        text += f" ({why}, and another client had ended one of its jobs)"
    text += ": " + "; ".join(f"{', '.join(names)} {what}" for names, what in told if names)
    if cause is not None:
        text += f". The first failure: {getattr(cause, 'message', str(cause) or repr(cause))}"
    return GroupSplit(". But ".join([text, *problems]), **facts)


def _names(ends: Sequence[MemberEnd]) -> str:
    vms: dict[str, list[str]] = {}
    for end in ends:
        vms.setdefault(end.plan.vm, []).append(end.plan.disk.name)
    return "; ".join(f"{', '.join(disks)} of {vm}" for vm, disks in vms.items())
