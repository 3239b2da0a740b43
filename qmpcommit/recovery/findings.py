"""What was found of a death, and what is done about it."""

from __future__ import annotations

from typing import Literal

from qmpcommit.values import Record, record

Kind = Literal[
    "creation",
    "pending",
    "recycle",
    "discard",
    "frozen",
    "ready",
    "copying",
    "concluded",
    "node",
    "window",
    "throttle",
    "file",
    "claim",
]
"""What was left, in the order in which it is put right."""

Decide = Literal["pivot", "keep", "abort"]
"""What becomes of jobs that are READY, or will be: only the caller can know."""


@record
class Finding(Record):
    """One thing that a death has left on a VM: `what` is the job, node or file.

    `does` tells that `recover` puts it right by itself, and `next` how; else `next` is what a
    person has to look at or to say. `done` tells that it was put right, and `result` how that
    ended, or why it was not.
    """

    kind: Kind
    vm: str
    what: str
    message: str
    next: str
    does: bool = True
    disk: str = ""
    done: bool = False
    result: str = ""

    def __str__(self) -> str:
        return f"{self.vm}: {self.message}. {self.next}"


@record
class Recovered(Record):
    """What was found, in order, and what became of it."""

    findings: tuple[Finding, ...] = ()

    @property
    def left(self) -> tuple[Finding, ...]:
        """What is not put right: it was only looked at, needs a word, or could not be done."""
        return tuple(each for each in self.findings if not each.done)
