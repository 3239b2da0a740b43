"""The two-phase commit as a state machine: facts in, actions out, no I/O.

::

    STARTING --began--> COPYING --READY--> READY --decision--> DECIDED
        |                  |  (an intermediate layer has no READY)  |
        |                  +-------------------+-------------------+
        |                                      v  the job concluded, or is gone
        +--refused--> FINISHED <--dismissed-- ENDED --graph read--> CONFIRMED

`step` takes a `State` and one `Fact` and returns the next state with the `Action`s that the
driver owes. Facts may come late, twice, out of order or not at all; three rules keep that
harmless:

* What QEMU says when asked (`Answered`) counts as much as its events: READY, PENDING and the
  end are taken from either, whichever is first.
* `block-commit` is sent once. A command whose reply was lost is looked up with ``query-jobs``,
  never repeated blindly; a decision is repeated only if the job is seen still READY.
* A pivot and a keep end with the same event, so an end is never believed before the block
  graph was read back.
* A plan may be stale. The disk is looked at right before `block-commit` is sent, and once more
  when the job is there: before that it is neither READY nor finalized, whatever QEMU says.

In every state that is not FINISHED something is owed: a reply, a reconnection, a decision, or
at least the next tick, which asks QEMU again. So there is no state without a way on.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, assert_never

from qmpcommit.commit.facts import (
    Accepted,
    Action,
    Answered,
    BecameReady,
    Checked,
    Choice,
    Command,
    Decided,
    Duty,
    Ended,
    Fact,
    Frozen,
    GraphRead,
    JobSeen,
    LinkBack,
    LinkDead,
    Looked,
    News,
    Overlaid,
    Prepared,
    Refused,
    StatusChanged,
    Unanswered,
    Unnoted,
    Use,
    Where,
)

MAX_TRIES = 20
"""How often a decision is repeated that QEMU refuses although the job is READY."""

MAX_REFUSALS = 3
"""How often a dismissal is repeated that QEMU refuses although it lists the job."""


ORDERS = {
    Choice.PIVOT: Command.PIVOT,
    Choice.RECYCLE: Command.PIVOT,
    Choice.KEEP: Command.KEEP,
    Choice.ABORT: Command.ABORT,
}
PIVOTS = (Choice.PIVOT, Choice.RECYCLE)


class Phase(StrEnum):
    """Where a commit is; ``queued`` only with a daemon, which has not begun it."""

    QUEUED = "queued"
    STARTING = "starting"
    COPYING = "copying"
    READY = "ready"
    DECIDED = "decided"
    ENDED = "ended"
    CONFIRMED = "confirmed"
    FINISHED = "finished"


class Verdict(StrEnum):
    """How it ended."""

    PIVOTED = "pivoted"
    RECYCLED = "recycled"
    KEPT = "kept"
    MERGED = "merged"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"  # QEMU did not accept block-commit: nothing was done
    CHANGED = "changed"  # the disk was not as planned any more: nothing was sent
    STALE = "stale"  # the job copied what the disk did not use any more, and was cancelled
    NEVER_BEGAN = "never began"  # the reply to block-commit was lost and no such job exists
    VANISHED = "vanished"  # the job is gone and its end unknown; the overlay is still active
    UNCLEAR = "unclear"  # it has ended, and the block graph does not show which image is the newest
    VM_GONE = "vm gone"
    MONITOR_LOST = "monitor lost"


# -- state ----------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that is known about one commit.

    `two_phase` says that top is the active layer. `began` is whether QEMU was seen to know the
    job, `status` the last status it told. `decision` and `by` are the last decision; `tries`
    counts how often it was sent, `in_flight` tells that its reply is due, `accepted` whether
    QEMU took it, `refusal` why it did not. `former` and `former_by` are the decision that an
    abort came after, where QEMU may have carried it out before. `doubt` is set by ``SHUTDOWN``,
    `other_vm` when another process answers at the monitor. `listed` tells that the concluded job
    waits for its dismissal. `trail` are remarks for the outcome's warnings.

    `prepares` tells that something has to be done while PENDING holds the disk's I/O (then
    `auto_finalize` is off), `preparing` and `prepared` where that is. `stalls` tells that a
    storage error makes the job wait, `stalled` that it does. `frozen` is whether the guest is
    paused by us, `overlaid` whether the fresh overlay was tried, `taken_up` whether another
    process began it, so that even a job never seen may have begun and ended. `undoes` tells that
    an adopted job that is PENDING already is cancelled, and not finalized. `meets` tells that
    others are waited for in PENDING, whatever was decided. `refusals` counts refused dismissals.
    `unsent` tells that ``block-commit`` was not sent yet, `unchecked` that it is not known yet
    whether the job copies what the disk uses, `stale` that it does not. `spares` tells that the
    concluded job is left for somebody else to dismiss.
    """

    two_phase: bool
    phase: Phase = Phase.STARTING
    linked: bool = True
    began: bool = False
    status: str = ""
    auto_finalize: bool = True
    decision: Choice | None = None
    by: str = ""
    tries: int = 0
    in_flight: bool = False
    accepted: bool = False
    refusal: str | None = None
    resumed: bool = False
    doubt: bool = False
    other_vm: bool = False
    end: Ended | None = None
    listed: bool = False
    done: int = 0
    total: int = 0
    verdict: Verdict | None = None
    error: str | None = None
    trail: tuple[str, ...] = ()
    prepares: bool = False
    preparing: bool = False
    prepared: bool = False
    stalls: bool = False
    stalled: bool = False
    frozen: bool = False
    overlaid: bool = False
    taken_up: bool = False
    undoes: bool = False
    meets: bool = False
    refusals: int = 0
    former: Choice | None = None
    former_by: str = ""
    unsent: bool = False
    unchecked: bool = False
    stale: bool = False
    spares: bool = False

    @property
    def ordered(self) -> Choice | None:
        """What may have been done to end the job well: an abort can come too late."""
        return self.former if self.decision is Choice.ABORT else self.decision

    @property
    def keeps(self) -> bool:
        """Whether QEMU has taken a keep from us: no other client was first with a pivot."""
        return self.decision is Choice.KEEP and self.accepted

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        return self.phase is Phase.FINISHED

    @property
    def running(self) -> bool:
        """Whether the job has neither ended nor been refused."""
        return self.phase in (Phase.STARTING, Phase.COPYING, Phase.READY, Phase.DECIDED)


Step = tuple[State, list[Action]]


def begin(
    *, two_phase: bool, prepares: bool = False, stalls: bool = False, meets: bool = False
) -> Step:
    """A new commit: `block-commit` has to be sent, if the disk is still as it was planned."""
    prepares = prepares or meets
    state = State(
        two_phase=two_phase,
        prepares=prepares,
        stalls=stalls,
        meets=meets,
        auto_finalize=not prepares,
        unsent=True,
        unchecked=True,
    )
    return state, [Duty.LOOK]


def adopt(
    *,
    two_phase: bool,
    prepares: bool = False,
    undoes: bool = False,
    stale: str = "",
    spares: bool = False,
    linked: bool = True,
) -> Step:
    """A job that exists already: QEMU has to be asked where it is.

    One that is PENDING was decided before: it is finalized, or cancelled with `undoes`. The end of
    an intermediate layer's is prepared before, for QEMU may crash over it, and so is one that
    `prepares`. One that `spares` is not dismissed when it has concluded. One that was found to be
    `stale`, which says how, is cancelled wherever it is. `linked` is as for `resume`.
    """
    state = State(
        two_phase=two_phase,
        phase=Phase.COPYING,
        began=True,
        prepares=prepares or not two_phase,
        undoes=undoes,
        spares=spares,
        linked=linked,
    )
    if stale:
        state = state._replace(stale=True, error=stale, decision=Choice.ABORT, by="qmpcommit")
    return state, [Duty.ASK if linked else Duty.RELINK]


def resume(
    state: State,
    *,
    same_vm: bool | None,
    linked: bool = True,
    undoes: bool = False,
    finalizes: bool = False,
) -> Step:
    """A commit whose follower died: go on from what it wrote down last.

    What was noted may have been done or not, so QEMU is asked first, or it is done again where
    that does no harm. `same_vm` is False when another process answers at the monitor now. While
    the monitor is away (`linked` is False) nothing is asked or done: when it is back, another
    process may answer. Of a group it is known how all have to end: with `undoes` the job is
    cancelled wherever it is, with `finalizes` what was to be done in PENDING has been done.
    """
    if undoes and state.running and state.decision is not Choice.ABORT:
        former, by = (state.decision, state.by) if state.tries else (None, "")
        state = state._replace(former=former, former_by=by, decision=Choice.ABORT, by="group")
        state = state._replace(phase=Phase.COPYING, tries=0, accepted=False, refusal=None)
    if finalizes and state.two_phase and state.running:
        state = state._replace(prepared=True)
    state = state._replace(
        linked=linked,
        in_flight=False,
        preparing=False,
        prepared=state.prepared and state.two_phase,  # an intermediate layer's is looked at again
        resumed=False,
        stalled=False,
        other_vm=same_vm is False,
        taken_up=True,
    )
    if state.finished:
        return state, [Duty.FINISH]
    if state.other_vm and state.phase is Phase.CONFIRMED:
        remark = "QEMU ended before what follows the commit was done"
        return _finish(state._replace(trail=(*state.trail, remark), frozen=False))
    if state.other_vm:
        return _finish(state._replace(verdict=Verdict.VM_GONE, frozen=False))
    if state.phase is Phase.READY:
        state = state._replace(phase=Phase.COPYING)  # so that the policy is asked again
    if not linked:
        return state, [Duty.RELINK]
    return _close(state) if state.phase is Phase.CONFIRMED else _look(state)


def freezes_again(state: State) -> bool:
    """Whether a freeze is due that a former process noted, and may have done or begun."""
    noted = state.taken_up and state.running and state.decision is Choice.RECYCLE
    return noted and state.frozen and not state.tries


def _look(state: State) -> Step:
    """Find out where the job is; a freeze is done again before, so that the pivot can follow."""
    if state.unsent:
        return state, [Duty.LOOK]
    if freezes_again(state):
        return state._replace(in_flight=True), [Duty.FREEZE]
    return state, [Duty.ASK]


def objection(state: State, choice: Choice) -> str | None:
    """Why a caller's decision can't be taken now: ``not ready``, ``decided``, ``ended``."""
    if not state.running:
        return "ended"
    if choice is Choice.ABORT:
        return None
    if state.phase is Phase.DECIDED:
        return None if state.decision is choice else "decided"
    return None if state.phase is Phase.READY else "not ready"


def step(state: State, fact: Fact) -> Step:
    """The next state and what has to be done, after one more fact."""
    if state.finished:
        return state, []
    if state.unsent and isinstance(fact, (StatusChanged, BecameReady, Ended)):
        return state, []  # of another job of that name: ours is not sent yet
    match fact:
        case Looked(error):
            return _looked(state, error)
        case Checked(use, what):
            return _checked(state, use, what)
        case StatusChanged(status):
            return _status(state, status)
        case BecameReady(done, total):
            return _ready(state._replace(began=True, done=done, total=total))
        case Ended():
            return state._replace(began=True, end=state.end or fact), []
        case Answered(job):
            return _missing(state) if job is None else _seen(state, job)
        case Accepted(command):
            return _accepted(state, command)
        case Refused(command, error, final):
            return _refused(state, command, error, final)
        case Unnoted(command, error):
            return _unnoted(state, command, error)
        case Decided(choice, by):
            return _decided(state, choice, by)
        case GraphRead(where):
            return _confirmed(state, where)
        case Prepared(error):
            return _prepared(state, error)
        case Frozen(error):
            return _frozen(state, error)
        case Overlaid(error):
            return _overlaid(state, error)
        case News.LINK_LOST | Unanswered():
            lost = state._replace(linked=False, in_flight=False, preparing=False)
            return lost, [Duty.RELINK] if state.linked else []
        case LinkBack(same_vm):
            return _back(state, same_vm)
        case LinkDead(vm_gone):
            return _dead(state, vm_gone)
        case News.SHUTTING_DOWN:
            return state._replace(doubt=state.doubt or state.end is None), []
        case News.TICK:
            return _tick(state)
        case News.RELIEVED:
            relieved = state._replace(stalled=False)
            return relieved, [Command.RESUME] if state.stalled and state.running else []
        case News.THAWED:
            thawed = state._replace(frozen=False)
            return _close(thawed) if state.phase is Phase.CONFIRMED else (thawed, [])
    assert_never(fact)


def _looked(state: State, error: str | None) -> Step:
    if state.unsent:
        state = state._replace(unsent=False)
        if error is None:
            return state, [Command.START]
        return _finish(state._replace(verdict=Verdict.CHANGED, error=error))
    if error is None or not state.in_flight or state.decision not in PIVOTS or not state.running:
        return state, []
    # A pivot that was due, and was not sent.
    state = state._replace(error=error, tries=state.tries - 1, in_flight=False)
    return _decided(state, Choice.ABORT, "qmpcommit")


def _checked(state: State, use: Use, what: str) -> Step:
    if not state.unchecked or not state.running or use is Use.UNKNOWN:
        return state, []  # UNKNOWN: it has ended, as is heard or asked next
    state = state._replace(unchecked=False)
    if use is Use.STALE:
        return _decided(state._replace(stale=True, error=what), Choice.ABORT, "qmpcommit")
    if state.status in ("ready", "standby"):
        return _ready(state)
    if state.status == "pending" and not state.auto_finalize:
        return _pending(state)
    return state, []


def _status(state: State, status: str) -> Step:
    state = state._replace(status=status)
    match status:
        case "created" | "running" | "paused":
            if state.phase is Phase.STARTING:
                state = state._replace(phase=Phase.COPYING, began=True)
            return _halted(state, status == "paused")
        case "ready" | "standby":
            state, actions = _ready(state._replace(began=True))
            state, more = _halted(state, status == "standby")
            return state, actions + more
        case "pending" if not state.auto_finalize:
            return _pending(state)
        case "concluded" | "null" if state.running and (state.began or state.end):
            return state, [Duty.ASK]
    return state, []


def _halted(state: State, halted: bool) -> Step:
    """A job that waits on storage errors shows it only when asked; one that moves does not wait."""
    if not halted:
        return state._replace(stalled=False), []
    return state, [Duty.ASK] if state.stalls and not state.stalled else []


def _pending(state: State) -> Step:
    """The disk's I/O waits: no longer than what has to be done takes."""
    if state.in_flight or state.preparing:
        return state, []
    if state.decision is None and state.undoes:
        return _decided(state, Choice.ABORT, "caller")
    if state.decision is Choice.ABORT:
        # An old QEMU takes a cancellation just before READY for a soft one, and holds the disk.
        return (state, [Duty.ASK]) if state.accepted else _order(state)
    if state.unchecked:
        return state, []
    if (state.keeps and not state.meets) or state.prepared or not state.prepares:
        return state, [Command.FINALIZE]
    return state._replace(preparing=True), [Duty.PREPARE]


def _prepared(state: State, error: str | None) -> Step:
    if not state.preparing or not state.running:
        return state, []
    state = state._replace(preparing=False)
    if error is None:
        return state._replace(prepared=True), [Command.FINALIZE]
    return _decided(state._replace(error=error), Choice.ABORT, "qmpcommit")


def _frozen(state: State, error: str | None) -> Step:
    if state.decision is not Choice.RECYCLE or not state.running:
        return state, []
    if error is not None:
        return _decided(state._replace(error=error), Choice.ABORT, "qmpcommit")
    return _order(state)


def _overlaid(state: State, error: str | None) -> Step:
    if state.phase is not Phase.CONFIRMED or state.overlaid:
        return state, []
    verdict = Verdict.RECYCLED if error is None else Verdict.PIVOTED
    return _close(state._replace(overlaid=True, verdict=verdict, error=error))


def _ready(state: State) -> Step:
    """READY was heard or seen; standby counts, since only a READY job can be in it."""
    match state.phase:
        case Phase.STARTING | Phase.COPYING if state.unchecked and state.decision is None:
            heard = state.status in ("standby", "pending")
            return state._replace(
                phase=Phase.COPYING, status=state.status if heard else "ready"
            ), []
        case Phase.STARTING | Phase.COPYING:
            state = state._replace(phase=Phase.READY)
            if state.decision is Choice.ABORT:
                return _order(state)
            if not state.two_phase:
                # QEMU treats a layer that somebody else writes to as active; there is only
                # one sane conclusion to the commit of an intermediate layer.
                return _decided(state, Choice.PIVOT, "qmpcommit")
            return state, [Duty.CONSULT]
        case Phase.DECIDED if state.refusal is not None and state.status != "standby":
            return _order(state)
    return state, []


def _decided(state: State, choice: Choice, by: str) -> Step:
    if not state.running or state.decision is choice:
        return state, []
    if choice is not Choice.ABORT and (state.phase is not Phase.READY or state.decision):
        return state, []  # too early or too late: `objection` tells the caller why
    if state.tries:
        state = state._replace(former=state.decision, former_by=state.by)
    state = state._replace(
        decision=choice, by=by, tries=0, accepted=False, refusal=None, preparing=False
    )
    if choice is Choice.RECYCLE:
        return state._replace(phase=Phase.DECIDED, frozen=True, in_flight=True), [Duty.FREEZE]
    if state.phase is Phase.STARTING and not state.began:
        return state, []  # an abort before the job exists waits for it
    return _order(state)


def _order(state: State) -> Step:
    """Send the decision, once more if it was refused for a state that has passed."""
    assert state.decision is not None
    if not state.linked:
        # Asked and sent when the link is back; a freeze that was due for another decision is not.
        return state._replace(phase=Phase.DECIDED, in_flight=False), []
    if state.tries >= MAX_TRIES:
        return _give_up(state, state.refusal or "")
    order = ORDERS[state.decision]
    state = state._replace(phase=Phase.DECIDED, tries=state.tries + 1, refusal=None, in_flight=True)
    return state, [order]


def _give_up(state: State, refusal: str) -> Step:
    """QEMU does not take the decision: the job must not stay in READY, so it is cancelled."""
    remark = f"QEMU refused to {state.decision}: {refusal}"
    if not refusal:
        remark = f"QEMU did not {state.decision} in {state.tries} tries, and gave no answer to any"
    trail = state.trail if remark in state.trail else (*state.trail, remark)
    state = state._replace(trail=trail, error=state.error or remark)
    if state.decision is Choice.ABORT:
        return state._replace(refusal=refusal), []  # nothing stronger exists; ask at each tick
    return _decided(state, Choice.ABORT, state.by)


def _accepted(state: State, command: Command) -> Step:
    if command is Command.START:
        state = state._replace(began=True)
        if state.phase is Phase.STARTING:
            state = state._replace(phase=Phase.COPYING)
        if state.decision is Choice.ABORT and state.tries == 0 and state.running:
            return _order(state)
        return state, [Duty.CHECK] if state.unchecked and state.running else []
    if command is Command.DISMISS:
        return _finish(state)
    if command is Command.RESUME:
        if state.decision is None:
            return state, []  # after a stall
        remark = "the job was paused; it was resumed to carry out the decision"
        return state._replace(trail=(*state.trail, remark)), []
    if state.decision is not None and command is ORDERS[state.decision]:
        state = state._replace(accepted=True, in_flight=False)
        if state.status == "pending" and not state.auto_finalize:
            return _pending(state)
        # QEMU defers the pivot of a paused job until it is resumed, and says "accepted".
        return state, [Duty.ASK] if state.status == "standby" and state.running else []
    return state, []


def _refused(state: State, command: Command, error: str, final: bool) -> Step:
    if command is Command.START:
        return _finish(state._replace(verdict=Verdict.REFUSED, error=error))
    if command is Command.DISMISS:
        return _undismissed(state, error)
    if state.decision is None or command is not ORDERS[state.decision] or not state.running:
        return state, []  # RESUME and FINALIZE: the state has passed already
    state = state._replace(in_flight=False)
    if final:
        return _give_up(state._replace(tries=0), error)
    return state._replace(refusal=error), [Duty.ASK]


def _unnoted(state: State, command: Command, error: str) -> Step:
    """What was to come can't be written down, so that the job is cancelled instead."""
    if not state.running or state.decision is Choice.ABORT:
        return state, []
    if state.decision is not None and command is ORDERS[state.decision]:
        state = state._replace(tries=state.tries - 1, in_flight=False)
    return _decided(state._replace(error=error), Choice.ABORT, "qmpcommit")


def _undismissed(state: State, error: str) -> Step:
    """Somebody else was first, or QEMU keeps the job, whose id nobody can use meanwhile."""
    if state.refusals < MAX_REFUSALS:
        return state._replace(refusals=state.refusals + 1), [Duty.ASK]
    remark = f"QEMU refused to dismiss the concluded job, and lists it still: {error}"
    return _finish(state._replace(trail=(*state.trail, remark)))


def _seen(state: State, job: JobSeen) -> Step:
    """The job as ``query-jobs`` shows it."""
    was = state
    state = state._replace(
        began=True,
        status=job.status,
        done=job.done,
        total=job.total,
        auto_finalize=job.auto_finalize,
    )
    if not state.running:
        return _still_listed(state, job)
    state, actions = _seen_running(state, was, job)
    checks = state.unchecked and state.running and state.decision is None
    return state, [*actions, Duty.CHECK] if checks else actions


def _seen_running(state: State, was: State, job: JobSeen) -> Step:
    match job.status:
        case "concluded":
            end = state.end or Ended(False)
            if job.error is not None and not _was_cancelled(state, job.error):
                # QEMU 5.2 calls a keep that fails cancelled; only the job's own error tells.
                end = end._replace(cancelled=False, error=end.error or job.error)
            elif job.error is not None and was.end is None:
                end = end._replace(cancelled=True)
            end = end._replace(done=job.done, total=job.total)
            return _ended(state._replace(end=end, listed=True))
        case "pending" if not state.auto_finalize:
            if state.decision is Choice.ABORT and state.accepted and not state.in_flight:
                return _order(state)
            return _pending(state)
        case "paused" | "standby" if state.stalls and job.io_status not in ("", "ok"):
            if state.stalled:
                return state, []
            return state._replace(stalled=True), [Duty.STALL]
        case "ready" | "standby":
            return _seen_ready(state)
        case "created" | "running" | "paused":
            if state.phase is Phase.STARTING:
                state = state._replace(phase=Phase.COPYING)
            if state.decision is Choice.ABORT and not state.accepted and not state.in_flight:
                return _order(state)
    return state, []


def _seen_ready(state: State) -> Step:
    if state.phase in (Phase.STARTING, Phase.COPYING):
        if state.decision is Choice.ABORT:
            return _order(state._replace(phase=Phase.READY))
        return _ready(state)
    if state.phase is not Phase.DECIDED or state.in_flight:
        return state, []  # seen before the decision was sent
    if state.status == "standby" and state.decision is not Choice.ABORT:
        # A job that somebody paused stays in standby, and the decision needs it running. In the
        # standby of a drain QEMU refuses to resume, and says "ready" again by itself.
        if state.resumed:
            return state, []
        refusal = state.refusal or (None if state.accepted else "the job is paused")
        return state._replace(resumed=True, refusal=refusal), [Command.RESUME]
    if state.refusal is not None or not state.accepted:
        return _order(state)
    return state, []


def _was_cancelled(state: State, error: str) -> bool:
    """Whether a concluded job's error stands for a cancellation, which only its event tells."""
    ours = state.decision is Choice.ABORT and state.accepted
    return ours or error == "Operation canceled"


def _missing(state: State) -> Step:
    """QEMU knows no such job (any more)."""
    if not state.running:
        state = state._replace(listed=False)
        return _close(state) if state.phase is Phase.CONFIRMED else (state, [Duty.READ_GRAPH])
    if not state.began and state.end is None and not state.taken_up:
        return _finish(state._replace(verdict=Verdict.NEVER_BEGAN))
    return _ended(state._replace(listed=False))


def _ended(state: State) -> Step:
    return state._replace(phase=Phase.ENDED), [Duty.READ_GRAPH]


def _still_listed(state: State, job: JobSeen) -> Step:
    """After the end: the link came back, or a tick asked; go on where it was left."""
    state = state._replace(listed=job.status == "concluded")
    if state.phase is Phase.ENDED:
        return state, [Duty.READ_GRAPH]
    return _close(state) if state.listed else (state, [])


def _confirmed(state: State, where: Where) -> Step:
    if state.phase is not Phase.ENDED:
        return state, []
    verdict, error, remarks = _judge(state, where)
    if state.unchecked and verdict in (Verdict.PIVOTED, Verdict.KEPT, Verdict.MERGED):
        verdict, remarks = Verdict.UNCLEAR, ()
        error = "it is not known whether the job copied what the disk used when it began"
    state = state._replace(
        phase=Phase.CONFIRMED,
        verdict=verdict,
        error=state.error or error,
        trail=state.trail + remarks,
    )
    return _close(state)


def _close(state: State) -> Step:
    """The end is known: what is left to do, one thing after another."""
    recycles = state.verdict is Verdict.PIVOTED and state.ordered is Choice.RECYCLE
    if recycles and not state.overlaid:
        return state, [Duty.OVERLAY]
    if state.frozen:
        return state, [Duty.THAW]
    if state.listed and not state.spares:
        return state, [Command.DISMISS]
    return _finish(state)


def _judge(state: State, where: Where) -> tuple[Verdict, str | None, tuple[str, ...]]:
    """What happened, from what QEMU said of the job and what the disk uses now."""
    end = state.end
    if state.stale:
        return Verdict.STALE, None, ()
    if not state.began and end is None and where not in (Where.BASE, Where.MERGED):
        if state.taken_up and where is Where.UNUSED:
            return Verdict.UNCLEAR, "QEMU has no such job, and whether it had can't be seen", ()
        return Verdict.NEVER_BEGAN, None, ()
    gone = ("the job was dismissed by another client; its end was read from the block graph",)
    if end is not None and end.cancelled:
        return Verdict.CANCELLED, None, ()
    if end is not None and end.error is not None:
        return Verdict.FAILED, end.error, ()
    if not state.two_phase:
        if where is Where.MERGED:
            return Verdict.MERGED, None, gone if end is None else ()
        if end is None:
            return Verdict.VANISHED, None, ()
        if where is not Where.TOP:  # QEMU's word counts; its base may have been merged away since
            return Verdict.MERGED, None, ()
        return Verdict.FAILED, "QEMU reported success, but the layer is still in the chain", ()
    if where is Where.BASE:
        return Verdict.PIVOTED, None, gone if end is None else ()
    # What QEMU was not heard to take may have come second, after another client's decision.
    taken: Choice | None = None
    if state.accepted and state.decision is not Choice.ABORT:
        taken = state.decision
    if where is Where.IDLE:
        # Which was first matters to nobody: without a write a pivot and a keep leave the same.
        where, taken = Where.UNUSED, taken or (state.ordered if state.taken_up else None)
    if where is Where.UNUSED and end is not None and taken in PIVOTS:
        remark = "no device or export uses the disk, so the pivot can't be seen in the block graph"
        return Verdict.PIVOTED, None, (remark,)
    if where is Where.UNUSED and (end is None or taken is None):
        return Verdict.UNCLEAR, "the job has ended, and how can't be seen in the block graph", ()
    if where is Where.OTHER:
        return Verdict.UNCLEAR, "the disk uses neither the base nor the overlay any more", ()
    if end is None:
        return Verdict.VANISHED, None, ()
    if end.done < end.total:
        short = f"the job ended with {end.done} of {end.total} bytes copied"
        return Verdict.FAILED, short, ()
    return Verdict.KEPT, None, ()


def _back(state: State, same_vm: bool | None) -> Step:
    if state.linked:
        return state, []
    state = state._replace(linked=True, other_vm=same_vm is False)
    return _dead(state, vm_gone=True) if state.other_vm else _look(state)


def _dead(state: State, vm_gone: bool) -> Step:
    if state.phase is Phase.CONFIRMED and not state.frozen:
        remark = "QEMU went away before the concluded job could be dismissed"
        return _finish(state._replace(trail=(*state.trail, remark)))
    verdict = Verdict.VM_GONE if vm_gone else Verdict.MONITOR_LOST
    return _finish(state._replace(verdict=verdict))


def _tick(state: State) -> Step:
    """Silence is never trusted for long."""
    if not state.linked:
        return state, [Duty.RELINK]
    if state.unsent:
        return state, [Duty.LOOK]
    return state._replace(resumed=False), [Duty.ASK]


def _finish(state: State) -> Step:
    return state._replace(phase=Phase.FINISHED), [Duty.FINISH]
