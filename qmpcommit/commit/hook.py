"""The command that persists a VM's new disk path, between the pivot and the deletion."""

from __future__ import annotations

from collections.abc import Sequence

from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.policy import Ready, run_command
from qmpcommit.errors import CommitFailed


class PivotCommand:
    """An ``on_pivot`` that runs a command, which learns the commit from ``QMPCOMMIT_*``.

    They are those of a `Check`, and ``QMPCOMMIT_ACTIVE``, the image that the guest writes to. It
    is killed after `timeout` seconds. Raises `CommitFailed` where it does not succeed.
    """

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self.command, self._timeout = command, timeout

    async def __call__(self, outcome: CommitOutcome) -> None:
        """Run it for a commit that has pivoted."""
        ready = Ready(outcome.vm, outcome.disk, outcome.job_id, outcome.base, outcome.top)
        active = outcome.active.handed_out if outcome.active is not None else ""
        environment = {**ready.environment(), "QMPCOMMIT_ACTIVE": active}
        status = await run_command(self.command, environment, self._timeout)
        if status != 0:
            how = f"ended with status {status}" if status is not None else "took too long"
            raise CommitFailed(f"{self.command[-1]} {how}")
