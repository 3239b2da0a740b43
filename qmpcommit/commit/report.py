"""From the machine's last state to the outcome, or to the error, that a caller gets."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace

from qmpcommit.block.chain import Image
from qmpcommit.callback import said_of
from qmpcommit.commit.facts import Choice
from qmpcommit.commit.outcome import Action, CommitOutcome, Timings
from qmpcommit.commit.phases import PIVOTS, State, Verdict
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.recycle import Left
from qmpcommit.errors import (
    ChainError,
    CommitFailed,
    DeadlineExceeded,
    JobConflict,
    MonitorLost,
    NoSpace,
    QmpCommitError,
    VMGone,
)

_FULL = os.strerror(errno.ENOSPC)
"""How QEMU says that there is no room, in its own words as in ours."""

_ACTIONS: dict[Verdict, tuple[Action, Choice | None]] = {
    Verdict.PIVOTED: ("pivot", Choice.PIVOT),
    Verdict.RECYCLED: ("recycle", Choice.RECYCLE),
    Verdict.KEPT: ("keep", Choice.KEEP),
    Verdict.CANCELLED: ("abort", Choice.ABORT),
    Verdict.MERGED: ("none", None),
}


def outcome_of(plan: Plan, state: State, active: Image | None, timings: Timings) -> CommitOutcome:
    """The outcome of a commit that ended in an orderly way."""
    assert state.verdict is not None
    action, choice = _ACTIONS[state.verdict]
    warnings = list(state.trail)
    for image in (plan.base, plan.top):
        if image.astray and active is not None and active.node_name == image.node_name:
            active = replace(active, astray=image.astray, warnings=image.warnings)
    order = state.order
    by = order.by if choice is order.decision else "another client"
    if choice is None:
        by = ""
    elif choice is order.former and choice is not order.decision:
        by = order.former_by
        warnings.append(f"the job had ended with {action} before it could be aborted ({order.by})")
    elif by == "another client":
        asked = f"; this commit had asked for {order.decision}" if order.decision else ""
        warnings.append(f"another client ended the job with {action}{asked}")
    known = bool(plan.top.node_name)  # else it was adopted when it had ended
    if action == "abort" or (action == "keep" and plan.between):
        warnings.append(_halfway(plan, action))
    elif not known and plan.base.node_name and action != "keep":
        warnings.append(
            "which file was the overlay, that must never be booted again, is not known: QEMU had"
            " closed it before the job was taken up"
        )
    elif not known:
        warnings.append("which images the job worked on is not known; the disk's chain shows them")
    if state.link.doubt:
        warnings.append("QEMU was shutting down when the job ended")
    return CommitOutcome(
        status="cancelled" if action == "abort" else "completed",
        action=action,
        vm=plan.vm,
        disk=plan.disk.name,
        job_id=plan.job_id,
        base=plan.base,
        top=plan.top,
        active=active if active is not None and active.node_name else None,
        decided_by=by,
        invalidated=plan.invalidated if known and action in ("pivot", "recycle", "none") else [],
        bytes_committed=state.done,
        timings=timings,
        warnings=warnings,
    )


def found_before(plan: Plan) -> list[str]:
    """What the checks before the first byte found that should be known, refusals included.

    One that refused was overridden, or there would be no commit.
    """
    told = []
    for found in plan.findings:
        each = found if isinstance(found, Mapping) else found.model_dump()
        if each["level"] == "note":
            told.append(f"found before it began, {each['name']}: {each['message']}")
        elif each["level"] == "refuse":
            said = str(each["message"]).partition(" (override '")[0]
            told.append(f"found before it began and overridden, {each['name']}: {said}")
    return told


def _halfway(plan: Plan, action: str) -> str:
    if not plan.top.node_name:
        return (
            "the layers below the job's overlay, which are not known here, may hold part of its"
            " data: they are valid only under it. The disk's chain shows them"
        )
    below = [image.filename for image in (*plan.between, plan.base)]
    only = f"valid only under {plan.top.filename}"
    if action == "abort":
        return f"{', '.join(below)} may hold part of the overlay's data: {only}"
    return f"{', '.join(below[:-1])} lies over a base that has changed: {only}"


def error_of(
    plan: Plan,
    state: State,
    timeout: float | None,
    lost: QmpCommitError | None,
    policy_error: BaseException | None,
    *,
    left: Left | None = None,
    cause: BaseException | None = None,
) -> QmpCommitError | None:
    """The error of a commit that did not; None where there is an outcome.

    `policy_error` is what a policy or an ``on_stall`` ended with, `cause` what a ledger or a
    barrier has, for which it was cancelled.

    `left` is what may be left of a recycle's fresh overlay whose QEMU has ended.
    """
    error = _by_verdict(plan, state, lost, left)
    if error is None and state.verdict is Verdict.PIVOTED and state.error is not None:
        what, then = "not as it was meant to", ""
        if state.ordered is Choice.RECYCLE:
            what = "no fresh overlay could be laid over the base"
            then = ". Lay an overlay over it (blockdev-snapshot), or go on with the base"
        error = CommitFailed(
            f"{_subject(plan)} has pivoted, but {what}: {state.error}. The guest writes to"
            f" {plan.base.filename} now; {plan.top.filename} is stale{then}",
            error=state.error,
            pivoted=True,
        )
    if error is None and state.order.by == "deadline" and state.verdict is Verdict.CANCELLED:
        error = deadline_error(plan, state, timeout or 0)
    if error is None and policy_error is not None and state.verdict is Verdict.CANCELLED:
        error = CommitFailed(
            f"the policy of {_subject(plan)} failed ({said_of(policy_error)}), so the job was"
            f" aborted. {_still_active(plan)}",
            error=str(policy_error),
        )
        error.__cause__ = policy_error
    if error is None and state.error is not None:
        error = CommitFailed(
            f"{_subject(plan)} failed: {state.error}. {_still_active(plan)}", error=state.error
        )
        if cause is not None and state.verdict is Verdict.CANCELLED:
            error.__cause__ = cause
    if error is not None:
        error.add(vm=plan.vm, disk=plan.disk.name, job_id=plan.job_id)
    return error


def _by_verdict(
    plan: Plan, state: State, lost: QmpCommitError | None, left: Left | None
) -> QmpCommitError | None:
    subject = _subject(plan)
    match state.verdict:
        case Verdict.REFUSED:
            kind = JobConflict if "in use" in (state.error or "") else CommitFailed
            return kind(
                f"QEMU refused to start {subject}: {state.error}. Nothing was changed",
                error=state.error,
            )
        case Verdict.CHANGED:
            return ChainError(f"{subject} was not begun: {state.error}. Nothing was sent")
        case Verdict.STALE:
            return CommitFailed(_stale(plan, state), error=state.error)
        case Verdict.NEVER_BEGAN:
            return CommitFailed(
                f"the reply to block-commit for {subject} was lost, and QEMU knows no such job:"
                " nothing was changed. Run it again",
                begun=False,
            )
        case Verdict.FAILED:
            text = f"{subject} failed: {state.error}. {_still_active(plan)}"
            if _FULL not in (state.error or ""):
                return CommitFailed(text, error=state.error)
            return NoSpace(
                f"{text}. Make room under {plan.base.filename} and commit again, or have the next"
                " commit wait for it (on-error: stop)",
                error=state.error,
            )
        case Verdict.VANISHED:
            return CommitFailed(
                f"{subject}: the job is gone from QEMU and how it ended is unknown."
                f" {_still_active(plan)}, so the base can't be called complete. Commit again",
                vanished=True,
            )
        case Verdict.UNCLEAR:
            return CommitFailed(
                f"{subject}: {state.error}. {_newest_unknown(plan)}{_spared(plan, state)}",
                hint="'qmpcommit chain' shows what the guest writes to",
                error=state.error,
            )
        case Verdict.VM_GONE:
            return _gone(plan, state, lost, left)
        case Verdict.MONITOR_LOST if state.unsent:
            why = str(lost) if lost else "the monitor was lost"
            return MonitorLost(f"{subject}: {why}. Nothing was sent. Run it again")
        case Verdict.MONITOR_LOST:
            return MonitorLost(
                f"{subject}: {str(lost) if lost else 'the monitor was lost'}. The job"
                f" {plan.job_id} may be running in QEMU still: end it when the monitor is back"
                f"{_until_it_has_ended(plan)}"
                f"{_let_go_on(state)}",
                hint="See 'qmpcommit jobs' and end it with 'qmpcommit pivot', 'keep' or 'abort'",
            )
    return None


def _stale(plan: Plan, state: State) -> str:
    """What is to be known of a job whose overlay was stale when it began."""
    top, base = plan.top.filename, plan.base.filename
    ended = "cancelled at once"
    if state.end is not None and not state.end.cancelled:
        ended = "to be cancelled at once, but has ended before"
    return (
        f"{_subject(plan)} began on a stale overlay: {state.error}. The job was {ended}. {top} is"
        f" not the disk's any more, and must not be booted; {base} may hold older data of {top} in"
        " the place of what the guest has written since: compare it with a backup. Two owners were"
        " at work on this disk at the same time"
    )


def _gone(plan: Plan, state: State, lost: QmpCommitError | None, left: Left | None) -> VMGone:
    laid = left is not None and left.laid  # which is done only after the pivot was seen
    pivoted = True if laid else _pivoted(plan, state)
    top, base = plan.top.filename, plan.base.filename
    ordered = "Another client may have pivoted, and whether"
    if state.ordered in PIVOTS:
        ordered = "The pivot was ordered and whether"
    if state.unsent:
        what = f"Nothing was sent: {plan.disk.chain[0].filename} is the image to boot, as it was"
    elif not plan.top.node_name:
        what = "Which image it wrote to last is not known here: look before booting"
    elif not plan.two_phase:
        what = (
            f"The active image {plan.disk.chain[0].filename} is still the one to boot; whether"
            f" {base} has taken the place of {top} is in the header above it (qemu-img info); if it"
            f" has not, {_halfway(plan, 'abort')}"
        )
    elif left is not None and laid:
        what = (
            f"The pivot had completed before, and {left.filename} was being laid over {base}: boot"
            f" from {left.filename}, which shows all of {base} and what the guest wrote since;"
            f" {top} is stale"
        )
    elif pivoted:
        what = f"The pivot had completed before: boot from {base}; {top} is stale"
    elif pivoted is None:
        what = (
            f"{ordered} it happened is unknown. Compare before booting:"
            f" 'qemu-img compare {top} {base}'. If they are identical boot from {base}; if not,"
            " ask the log of QEMU which it used last"
        )
    elif state.stale:
        what = _stale(plan, state)
    else:
        what = (
            f"Nothing was pivoted: {top} is still the image to boot, and it is whole;"
            f" {_halfway(plan, 'abort')}"
        )
    if left is not None and not laid:
        what += f". The fresh overlay {left.filename} was never used: delete it if it is there"
    why = str(lost) if lost is not None else f"QEMU of {plan.vm} has ended"
    if state.stale:  # "not pivoted" would have a stale overlay booted
        pivoted = None
    gone = VMGone(f"{_subject(plan)}: {why}. {what}", pivoted=pivoted, base=base, top=top)
    if left is not None:
        gone.add(overlay=left.filename)
    return gone


def _pivoted(plan: Plan, state: State) -> bool | None:
    """Whether the base is the disk now: True, False, or None where it can't be known."""
    if not plan.two_phase:
        return False
    if not plan.top.node_name:
        return None
    if state.ordered not in PIVOTS:
        clean = state.end is not None and not state.end.cancelled and state.end.error is None
        # it ended well and not by us: another client's pivot or keep (QEMU's own end is neither)
        return None if clean and not state.link.doubt and not state.keeps else False
    if state.end is None:
        # Held in PENDING, nothing is pivoted yet.
        finalized = state.barrier.prepared or not state.barrier.prepares
        return None if (state.order.tries or state.order.former) and finalized else False
    if state.end.cancelled or state.end.error is not None:
        return False
    # An order that QEMU was not heard to take may have come second, after another client's keep.
    ours = state.order.accepted and state.order.decision in PIVOTS
    return True if ours and not state.link.doubt else None


def not_noted(plan: Plan, failed: CommitFailed) -> CommitFailed:
    """The error of a commit whose ledger failed before anything was sent."""
    error = CommitFailed(
        f"{_subject(plan)} was not begun: {failed}. Nothing was sent",
        **{**failed.facts, "vm": plan.vm, "disk": plan.disk.name, "job_id": plan.job_id},
    )
    error.__cause__ = failed.__cause__
    return error


def ended_before(outcome: CommitOutcome) -> str:
    """What is to be known of a commit that was left when it had ended, but not what follows it."""
    active = outcome.active or outcome.base
    done = {"none": f"merged {outcome.top} into {outcome.base}", "keep": "kept", "abort": "aborted"}
    said = f"the job had ended before: {done.get(outcome.action, 'pivoted')}. "
    if outcome.invalidated:
        said += (
            f"The image to boot is {active.filename}, and {', '.join(outcome.invalidated)} must"
            " never be booted again. "
        )
    return (
        f"{said}What was to follow (a hook, the deletion of stale files) was not brought to its end"
    )


def deadline_error(
    plan: Plan, state: State, timeout: float, outcome: CommitOutcome | None = None
) -> DeadlineExceeded:
    """The error of a commit that took too long; one that has an `outcome` has ended."""
    hint = None
    if outcome is not None:
        what = ended_before(outcome)
    elif state.verdict is Verdict.CANCELLED:
        what = f"the job was cancelled. {_still_active(plan)}"
    else:
        what = (
            "the job did not end when it was cancelled and is left in QEMU: abort it once more"
            f"{_until_it_has_ended(plan)}"
        )
        hint = f"See 'qmpcommit jobs', and end it with 'qmpcommit abort QMP {plan.job_id}'"
    return DeadlineExceeded(
        f"{_subject(plan)} did not end within {timeout:g} s: {what}",
        hint=hint,
        vm=plan.vm,
        disk=plan.disk.name,
        job_id=plan.job_id,
        **({} if outcome is None else {"outcome": outcome.model_dump(mode="json")}),
    )


def _subject(plan: Plan) -> str:
    if not plan.top.node_name:
        return f"the commit job {plan.job_id} of {plan.vm}"
    return f"the commit of {plan.top.filename} into {plan.base.filename} ({plan.disk} of {plan.vm})"


def _let_go_on(state: State) -> str:
    frozen = state.guest.frozen
    return ". The guest may be paused: let it go on with 'cont'" if frozen else ""


def _spared(plan: Plan, state: State) -> str:
    if not state.spares:
        return ""
    return (
        f". QEMU still lists the job {plan.job_id} as concluded, which is all that tells of it:"
        " dismiss it when that is clear (job-dismiss)"
    )


def _until_it_has_ended(plan: Plan) -> str:
    """What goes for the base of a job that nobody follows."""
    if not plan.top.node_name:
        return ""
    below, top = plan.base.filename, plan.top.filename
    return f". Until it has ended well, {below} is valid only under {top}"


def _newest_unknown(plan: Plan) -> str:
    if not plan.top.node_name:
        return _still_active(plan)
    return (
        f"Whether {plan.top.filename} or {plan.base.filename} is the newer one is not known: it is"
        " what the guest writes to now (query-block); of a disk that nothing uses compare"
        f" them before booting ('qemu-img compare {plan.top.filename} {plan.base.filename}')"
    )


def _still_active(plan: Plan) -> str:
    if not plan.top.node_name:  # adopted when it had ended: nothing is known of its disk
        return "Which image the guest writes to now, the disk's chain shows"
    whole = f"{plan.top.filename} is still the active image and whole"
    if not plan.two_phase:
        whole = f"The chain of {plan.disk} is as it was and whole"
    return f"{whole}; {_halfway(plan, 'abort')}"
