"""What happens to a job, as the state machine's tests tell it in one word."""

from __future__ import annotations

from qmpcommit.commit.facts import Accepted, Answered, Command, Ended, JobSeen, StatusChanged

PENDING = StatusChanged("pending")
CREATED = (StatusChanged("created"), StatusChanged("running"), Accepted(Command.START))
COMPLETED = (StatusChanged("waiting"), PENDING, Ended(False, None, 10, 10))
HELD = Answered(JobSeen("pending", auto_finalize=False))


def concluded(error: str | None = None, done: int = 10) -> Answered:
    """QEMU says that it has ended, with that error."""
    return Answered(JobSeen("concluded", done, 10, error))
