"""How the members of a group have ended that were taken up one by one, after a restart."""

from __future__ import annotations

from collections.abc import Sequence

from qmpcommit.commit.outcome import CommitOutcome, Timings
from qmpcommit.commit.phases import Verdict
from qmpcommit.commit.report import VERDICTS
from qmpcommit.daemon.promise import Promise
from qmpcommit.errors import ConnectError, GroupFailed, MonitorLost, QmpCommitError, VMGone
from qmpcommit.group import outcome as group_outcome
from qmpcommit.group.outcome import MemberEnd
from qmpcommit.qmp.process import is_alive


def end_of(
    promise: Promise, outcome: CommitOutcome | None, error: QmpCommitError | None
) -> MemberEnd:
    """The end of one that was begun, from its promise."""
    plan, noted, _ = promise.resumed(promise.identity)
    state = promise.last or noted.state
    if outcome is not None:
        state = state._replace(verdict=VERDICTS[outcome.action])
    elif error is not None and error.facts.get("pivoted") is True:  # and what follows failed
        state = state._replace(verdict=Verdict.PIVOTED)
    elif isinstance(error, VMGone):
        state = state._replace(verdict=Verdict.VM_GONE)
    elif state.verdict is None:
        state = state._replace(verdict=Verdict.FAILED)
    timings = outcome.timings if outcome is not None else Timings(**noted.times)
    return MemberEnd(plan, state, timings, outcome, error, state.ordered)


def is_unsure(end: MemberEnd, promise: Promise) -> bool:
    """Whether its job may be in QEMU still, and the monitor has to come back to tell."""
    if isinstance(end.error, (MonitorLost, ConnectError)):
        return True
    return isinstance(end.error, VMGone) and is_alive(promise.identity)


def error_of(finalized: bool, ends: Sequence[MemberEnd]) -> QmpCommitError:
    """The error of a group whose members were settled one by one."""
    why = "" if finalized else "the daemon that held its disks ended before all were decided"
    error = group_outcome.error_of(ends, why=why, culprit=None, finalized=finalized)
    return error or GroupFailed(f"the group commit was cancelled: {why}. No disk was pivoted")
