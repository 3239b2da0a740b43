"""The two-phase commit as a state machine: facts in, actions out, no I/O.

`step` takes a `State` and one `Fact` and returns the next state with the `Action`s that the
driver owes. `EDGES` are the ways from phase to phase; there is none back. Facts may come late,
twice, out of order or not at all; four rules keep that harmless:

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


_GONE = "QEMU has ended, or can't be reached any more"

EDGES: dict[Phase, dict[Phase, str]] = {
    Phase.STARTING: {
        Phase.COPYING: "QEMU has the job",
        Phase.READY: "it is READY when it is first heard of",
        Phase.DECIDED: "it is cancelled when it is first heard of",
        Phase.ENDED: "it has ended when it is first asked for",
        Phase.FINISHED: "nothing was sent, QEMU did not take it, or is gone",
    },
    Phase.COPYING: {
        Phase.READY: "QEMU says that all is copied, of the active layer",
        Phase.DECIDED: "it is cancelled",
        Phase.ENDED: "the job concluded, or is gone: a layer below the active one, or a failure",
        Phase.FINISHED: _GONE,
    },
    Phase.READY: {
        Phase.DECIDED: "the policy or a caller says what becomes of it",
        Phase.ENDED: "the job failed, or another client has decided",
        Phase.FINISHED: _GONE,
    },
    Phase.DECIDED: {
        Phase.ENDED: "the job concluded, or is gone",
        Phase.FINISHED: _GONE,
    },
    Phase.ENDED: {
        Phase.CONFIRMED: "the block graph, read back, shows how it ended",
        Phase.FINISHED: "the same, and nothing is left to do; or QEMU is gone",
    },
    Phase.CONFIRMED: {
        Phase.FINISHED: "the job is dismissed, the guest goes on; or QEMU is gone",
    },
}
"""Which phase one fact may lead to, and what that is; the manual's picture is drawn from it."""


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


class Order(NamedTuple):
    """What was decided last, and whether QEMU was told.

    `tries` counts how often it was sent, `in_flight` tells that its reply is due, `accepted`
    whether QEMU took it, `refusal` why it did not, `resumed` that a paused job was resumed for it.
    `former` and `former_by` are the decision that an abort came after, where QEMU may have carried
    it out before.
    """

    decision: Choice | None = None
    by: str = ""
    tries: int = 0
    in_flight: bool = False
    accepted: bool = False
    refusal: str | None = None
    resumed: bool = False
    former: Choice | None = None
    former_by: str = ""

    def changed(self, choice: Choice, by: str) -> Order:
        """Another decision, of which nothing was sent yet; the one before, if that was."""
        order = self._replace(former=self.decision, former_by=self.by) if self.tries else self
        return order._replace(decision=choice, by=by, tries=0, accepted=False, refusal=None)


class Link(NamedTuple):
    """The monitor and who is behind it.

    `doubt` is set by ``SHUTDOWN``, `other_vm` when another process answers at the monitor.
    """

    linked: bool = True
    other_vm: bool = False
    doubt: bool = False


class Preparation(NamedTuple):
    """What has to be done while PENDING holds the disk's I/O.

    With `prepares` there is something (`auto_finalize` is off then); `preparing` and `prepared`
    tell where that is. `meets` tells that others are waited for, whatever was decided, `undoes`
    that an adopted job that is PENDING already is cancelled, and not finalized.
    """

    prepares: bool = False
    preparing: bool = False
    prepared: bool = False
    meets: bool = False
    undoes: bool = False


class Halt(NamedTuple):
    """`stalls` tells that a storage error makes the job wait, `stalled` that it does."""

    stalls: bool = False
    stalled: bool = False


class Guest(NamedTuple):
    """`frozen` is whether it is paused by us, `overlaid` whether the fresh overlay was tried."""

    frozen: bool = False
    overlaid: bool = False


PARTS: dict[str, type[Order | Link | Preparation | Halt | Guest]] = {
    "order": Order,
    "link": Link,
    "barrier": Preparation,
    "stall": Halt,
    "guest": Guest,
}
"""The values that a state nests, by their names in it."""


class State(NamedTuple):
    """All that is known about one commit: its job, and five values beside it.

    `two_phase` says that top is the active layer. `began` is whether QEMU was seen to know the
    job, `status` the last status it told. `listed` tells that the concluded job waits for its
    dismissal, `spares` that this is left to somebody else; `refusals` counts the refused ones.
    `trail` are remarks for the outcome's warnings. `taken_up` is whether another process began it,
    so that even a job never seen may have begun and ended. `unsent` tells that ``block-commit`` was
    not sent yet, `unchecked` that it is not known yet whether the job copies what the disk uses,
    `stale` that it does not.
    """

    two_phase: bool
    phase: Phase = Phase.STARTING
    began: bool = False
    status: str = ""
    auto_finalize: bool = True
    done: int = 0
    total: int = 0
    end: Ended | None = None
    listed: bool = False
    refusals: int = 0
    spares: bool = False
    verdict: Verdict | None = None
    error: str | None = None
    trail: tuple[str, ...] = ()
    taken_up: bool = False
    unsent: bool = False
    unchecked: bool = False
    stale: bool = False
    order: Order = Order()
    link: Link = Link()
    barrier: Preparation = Preparation()
    stall: Halt = Halt()
    guest: Guest = Guest()

    @property
    def ordered(self) -> Choice | None:
        """What may have been done to end the job well: an abort can come too late."""
        order = self.order
        return order.former if order.decision is Choice.ABORT else order.decision

    @property
    def keeps(self) -> bool:
        """Whether QEMU has taken a keep from us: no other client was first with a pivot."""
        return self.order.decision is Choice.KEEP and self.order.accepted

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
        barrier=Preparation(prepares=prepares, meets=meets),
        stall=Halt(stalls=stalls),
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
        barrier=Preparation(prepares=prepares or not two_phase, undoes=undoes),
        spares=spares,
        link=Link(linked=linked),
    )
    if stale:
        order = Order(decision=Choice.ABORT, by="qmpcommit")
        state = state._replace(stale=True, error=stale, order=order)
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
    if undoes and state.running and state.order.decision is not Choice.ABORT:
        order = state.order.changed(Choice.ABORT, "group")
        state = state._replace(phase=Phase.COPYING, order=order)
    barrier = state.barrier
    if finalizes and state.two_phase and state.running:
        barrier = barrier._replace(prepared=True)
    state = state._replace(
        link=state.link._replace(linked=linked, other_vm=same_vm is False),
        order=state.order._replace(in_flight=False, resumed=False),
        # what is done of an intermediate layer is looked at again
        barrier=barrier._replace(preparing=False, prepared=barrier.prepared and state.two_phase),
        stall=state.stall._replace(stalled=False),
        taken_up=True,
    )
    if state.finished:
        return state, [Duty.FINISH]
    if state.link.other_vm:
        state = state._replace(guest=state.guest._replace(frozen=False))
        if state.phase is not Phase.CONFIRMED:
            return _finish(state._replace(verdict=Verdict.VM_GONE))
        remark = "QEMU ended before what follows the commit was done"
        return _finish(state._replace(trail=(*state.trail, remark)))
    if state.phase is Phase.READY:
        state = state._replace(phase=Phase.COPYING)  # so that the policy is asked again
    if not linked:
        return state, [Duty.RELINK]
    return _close(state) if state.phase is Phase.CONFIRMED else _look(state)


def freezes_again(state: State) -> bool:
    """Whether a freeze is due that a former process noted, and may have done or begun."""
    noted = state.taken_up and state.running and state.order.decision is Choice.RECYCLE
    return noted and state.guest.frozen and not state.order.tries


def _look(state: State) -> Step:
    """Find out where the job is; a freeze is done again before, so that the pivot can follow."""
    if state.unsent:
        return state, [Duty.LOOK]
    if freezes_again(state):
        return state._replace(order=state.order._replace(in_flight=True)), [Duty.FREEZE]
    return state, [Duty.ASK]


def objection(state: State, choice: Choice) -> str | None:
    """Why a caller's decision can't be taken now: ``not ready``, ``decided``, ``ended``."""
    if not state.running:
        return "ended"
    if choice is Choice.ABORT:
        return None
    if state.phase is Phase.DECIDED:
        return None if state.order.decision is choice else "decided"
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
            return _lost(state)
        case LinkBack(same_vm):
            return _back(state, same_vm)
        case LinkDead(vm_gone):
            return _dead(state, vm_gone)
        case News.SHUTTING_DOWN:
            doubt = state.link.doubt or state.end is None
            return state._replace(link=state.link._replace(doubt=doubt)), []
        case News.TICK:
            return _tick(state)
        case News.RELIEVED:
            due = state.stall.stalled and state.running
            return _stalled(state, False), [Command.RESUME] if due else []
        case News.THAWED:
            thawed = state._replace(guest=state.guest._replace(frozen=False))
            return _close(thawed) if state.phase is Phase.CONFIRMED else (thawed, [])
    assert_never(fact)


def _lost(state: State) -> Step:
    """What was under way may have been done or not: QEMU is asked when the link is back."""
    lost = state._replace(
        link=state.link._replace(linked=False),
        order=state.order._replace(in_flight=False),
        barrier=state.barrier._replace(preparing=False),
    )
    return lost, [Duty.RELINK] if state.link.linked else []


def _stalled(state: State, stalled: bool) -> State:
    if stalled is state.stall.stalled:
        return state
    return state._replace(stall=state.stall._replace(stalled=stalled))


def _looked(state: State, error: str | None) -> Step:
    if state.unsent:
        state = state._replace(unsent=False)
        if error is None:
            return state, [Command.START]
        return _finish(state._replace(verdict=Verdict.CHANGED, error=error))
    due = state.order.in_flight and state.order.decision in PIVOTS and state.running
    if error is None or not due:
        return state, []
    # A pivot that was due, and was not sent.
    order = state.order._replace(tries=state.order.tries - 1, in_flight=False)
    state = state._replace(error=error, order=order)
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
        return _stalled(state, False), []
    return state, [Duty.ASK] if state.stall.stalls and not state.stall.stalled else []


def _pending(state: State) -> Step:
    """The disk's I/O waits: no longer than what has to be done takes."""
    order, barrier = state.order, state.barrier
    if order.in_flight or barrier.preparing or not state.running:
        return state, []  # the last: heard late, when the end was seen before
    if order.decision is None and barrier.undoes:
        return _decided(state, Choice.ABORT, "caller")
    if order.decision is Choice.ABORT:
        # An old QEMU takes a cancellation just before READY for a soft one, and holds the disk.
        return (state, [Duty.ASK]) if order.accepted else _order(state)
    if state.unchecked:
        return state, []
    if (state.keeps and not barrier.meets) or barrier.prepared or not barrier.prepares:
        return state, [Command.FINALIZE]
    return state._replace(barrier=barrier._replace(preparing=True)), [Duty.PREPARE]


def _prepared(state: State, error: str | None) -> Step:
    if not state.barrier.preparing or not state.running:
        return state, []
    done = state.barrier._replace(preparing=False, prepared=error is None)
    state = state._replace(barrier=done)
    if error is None:
        return state, [Command.FINALIZE]
    return _decided(state._replace(error=error), Choice.ABORT, "qmpcommit")


def _frozen(state: State, error: str | None) -> Step:
    if state.order.decision is not Choice.RECYCLE or not state.running:
        return state, []
    if error is not None:
        return _decided(state._replace(error=error), Choice.ABORT, "qmpcommit")
    return _order(state)


def _overlaid(state: State, error: str | None) -> Step:
    if state.phase is not Phase.CONFIRMED or state.guest.overlaid:
        return state, []
    verdict = Verdict.RECYCLED if error is None else Verdict.PIVOTED
    guest = state.guest._replace(overlaid=True)
    return _close(state._replace(guest=guest, verdict=verdict, error=error))


def _ready(state: State) -> Step:
    """READY was heard or seen; standby counts, since only a READY job can be in it."""
    match state.phase:
        case Phase.STARTING | Phase.COPYING if state.unchecked and state.order.decision is None:
            heard = state.status in ("standby", "pending")
            return state._replace(
                phase=Phase.COPYING, status=state.status if heard else "ready"
            ), []
        case Phase.STARTING | Phase.COPYING:
            state = state._replace(phase=Phase.READY)
            if state.order.decision is Choice.ABORT:
                return _order(state)
            if not state.two_phase:
                # QEMU treats a layer that somebody else writes to as active; there is only
                # one sane conclusion to the commit of an intermediate layer.
                return _decided(state, Choice.PIVOT, "qmpcommit")
            return state, [Duty.CONSULT]
        case Phase.DECIDED if state.order.refusal is not None and state.status != "standby":
            return _order(state)
    return state, []


def _decided(state: State, choice: Choice, by: str) -> Step:
    if not state.running or state.order.decision is choice:
        return state, []
    if choice is not Choice.ABORT and (state.phase is not Phase.READY or state.order.decision):
        return state, []  # too early or too late: `objection` tells the caller why
    state = state._replace(
        order=state.order.changed(choice, by), barrier=state.barrier._replace(preparing=False)
    )
    if choice is Choice.RECYCLE:
        freezing = state._replace(
            phase=Phase.DECIDED,
            guest=state.guest._replace(frozen=True),
            order=state.order._replace(in_flight=True),
        )
        return freezing, [Duty.FREEZE]
    if state.phase is Phase.STARTING and not state.began:
        return state, []  # an abort before the job exists waits for it
    return _order(state)


def _order(state: State) -> Step:
    """Send the decision, once more if it was refused for a state that has passed."""
    order = state.order
    assert order.decision is not None
    if not state.link.linked:
        # Asked and sent when the link is back; a freeze that was due for another decision is not.
        return state._replace(phase=Phase.DECIDED, order=order._replace(in_flight=False)), []
    if order.tries >= MAX_TRIES:
        return _give_up(state, order.refusal or "")
    sent = order._replace(tries=order.tries + 1, refusal=None, in_flight=True)
    return state._replace(phase=Phase.DECIDED, order=sent), [ORDERS[order.decision]]


def _give_up(state: State, refusal: str) -> Step:
    """QEMU does not take the decision: the job must not stay in READY, so it is cancelled."""
    order = state.order
    remark = f"QEMU refused to {order.decision}: {refusal}"
    if not refusal:
        remark = f"QEMU did not {order.decision} in {order.tries} tries, and gave no answer to any"
    trail = state.trail if remark in state.trail else (*state.trail, remark)
    state = state._replace(trail=trail, error=state.error or remark)
    if order.decision is Choice.ABORT:  # nothing stronger exists; ask at each tick
        return state._replace(order=order._replace(refusal=refusal)), []
    return _decided(state, Choice.ABORT, order.by)


def _accepted(state: State, command: Command) -> Step:
    order = state.order
    if command is Command.START:
        state = state._replace(began=True)
        if state.phase is Phase.STARTING:
            state = state._replace(phase=Phase.COPYING)
        if order.decision is Choice.ABORT and order.tries == 0 and state.running:
            return _order(state)
        return state, [Duty.CHECK] if state.unchecked and state.running else []
    if command is Command.DISMISS:
        return _finish(state)
    if command is Command.RESUME:
        if order.decision is None:
            return state, []  # after a stall
        remark = "the job was paused; it was resumed to carry out the decision"
        return state._replace(trail=(*state.trail, remark)), []
    if order.decision is not None and command is ORDERS[order.decision]:
        state = state._replace(order=order._replace(accepted=True, in_flight=False))
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
    order = state.order._replace(in_flight=False)
    if order.decision is None or command is not ORDERS[order.decision] or not state.running:
        return state, []  # RESUME and FINALIZE: the state has passed already
    if final:
        return _give_up(state._replace(order=order._replace(tries=0)), error)
    return state._replace(order=order._replace(refusal=error)), [Duty.ASK]


def _unnoted(state: State, command: Command, error: str) -> Step:
    """What was to come can't be written down, so that the job is cancelled instead."""
    if not state.running or state.order.decision is Choice.ABORT:
        return state, []
    order = state.order
    if order.decision is not None and command is ORDERS[order.decision]:
        order = order._replace(tries=order.tries - 1, in_flight=False)
    return _decided(state._replace(error=error, order=order), Choice.ABORT, "qmpcommit")


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
    checks = state.unchecked and state.running and state.order.decision is None
    return state, [*actions, Duty.CHECK] if checks else actions


def _seen_running(state: State, was: State, job: JobSeen) -> Step:
    aborts = state.order.decision is Choice.ABORT and not state.order.in_flight
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
            if aborts and state.order.accepted:
                return _order(state)
            return _pending(state)
        case "paused" | "standby" if state.stall.stalls and job.io_status not in ("", "ok"):
            if state.stall.stalled:
                return state, []
            return _stalled(state, True), [Duty.STALL]
        case "ready" | "standby":
            return _seen_ready(state)
        case "created" | "running" | "paused":
            if state.phase is Phase.STARTING:
                state = state._replace(phase=Phase.COPYING)
            if aborts and not state.order.accepted:
                return _order(state)
    return state, []


def _seen_ready(state: State) -> Step:
    if state.phase in (Phase.STARTING, Phase.COPYING):
        if state.order.decision is Choice.ABORT:
            return _order(state._replace(phase=Phase.READY))
        return _ready(state)
    order = state.order
    if state.phase is not Phase.DECIDED or order.in_flight:
        return state, []  # seen before the decision was sent
    if state.status == "standby" and order.decision is not Choice.ABORT:
        # A job that somebody paused stays in standby, and the decision needs it running. In the
        # standby of a drain QEMU refuses to resume, and says "ready" again by itself.
        if order.resumed:
            return state, []
        refusal = order.refusal or (None if order.accepted else "the job is paused")
        resumed = order._replace(resumed=True, refusal=refusal)
        return state._replace(order=resumed), [Command.RESUME]
    if order.refusal is not None or not order.accepted:
        return _order(state)
    return state, []


def _was_cancelled(state: State, error: str) -> bool:
    """Whether a concluded job's error stands for a cancellation, which only its event tells."""
    ours = state.order.decision is Choice.ABORT and state.order.accepted
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
    if recycles and not state.guest.overlaid:
        return state, [Duty.OVERLAY]
    if state.guest.frozen:
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
    if state.order.accepted and state.order.decision is not Choice.ABORT:
        taken = state.order.decision
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
    if state.link.linked:
        return state, []
    state = state._replace(link=state.link._replace(linked=True, other_vm=same_vm is False))
    return _dead(state, vm_gone=True) if state.link.other_vm else _look(state)


def _dead(state: State, vm_gone: bool) -> Step:
    if state.phase is Phase.CONFIRMED and not state.guest.frozen:
        remark = "QEMU went away before the concluded job could be dismissed"
        return _finish(state._replace(trail=(*state.trail, remark)))
    verdict = Verdict.VM_GONE if vm_gone else Verdict.MONITOR_LOST
    return _finish(state._replace(verdict=verdict))


def _tick(state: State) -> Step:
    """Silence is never trusted for long."""
    if not state.link.linked:
        return state, [Duty.RELINK]
    if state.unsent:
        return state, [Duty.LOOK]
    return state._replace(order=state.order._replace(resumed=False)), [Duty.ASK]


def _finish(state: State) -> Step:
    return state._replace(phase=Phase.FINISHED), [Duty.FINISH]
