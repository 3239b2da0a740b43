"""What a client asks is looked at before any VM is: what could have no effect is refused."""

from __future__ import annotations

from collections.abc import Sequence

from qmpcommit.commit.checks import check_override
from qmpcommit.commit.objections import may_pivot, refuse_idle
from qmpcommit.wire.commit import CommitRequest


def check_asked(requests: Sequence[CommitRequest]) -> None:
    """Refuse a commit's request, or a group's; raises `InvalidRequest`.

    What is asked of all members of a group has to have an effect on one of them.
    """
    for request in requests:
        check_override(request.override)
    reached = next((each for each in requests if may_pivot(each.policy)), requests[0])
    stale = "delete" if reached.delete else reached.stale or "leave"
    refuse_idle(reached.policy, stale=stale, on_pivot=reached.on_pivot)
