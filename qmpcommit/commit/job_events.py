"""From a monitor's events to the facts about one job, with QEMU's own times of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from qmpcommit.commit import facts
from qmpcommit.qmp.clock import time_of

_BLOCK_JOB_EVENTS = {"BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"}


class Hearing:
    """Listens for one job; `times` has when it started, was ready, decided and ended."""

    def __init__(self, job_id: str, tell: Callable[[facts.Fact], None]) -> None:
        self.times: dict[str, datetime] = {}
        self._job_id = job_id
        self._tell = tell
        self._shutting_down = False

    def link(self, up: bool) -> None:
        """The monitor's connection ended or came back."""
        if not up:
            self._tell(facts.News.LINK_LOST)

    def message(self, message: Mapping[str, Any]) -> None:
        """An event; called in the reader's own step, so it only sorts."""
        name, data = message["event"], message.get("data")
        if name == "SHUTDOWN":
            if not self._shutting_down:  # once is enough to doubt what follows
                self._shutting_down = True
                self._tell(facts.News.SHUTTING_DOWN)
        elif not isinstance(data, Mapping):
            return
        elif name == "JOB_STATUS_CHANGE" and data.get("id") == self._job_id:
            self._status(str(data.get("status")), message)
        elif name in _BLOCK_JOB_EVENTS and data.get("device") == self._job_id:
            self._block_job(name, data, message)

    def _status(self, status: str, message: Mapping[str, Any]) -> None:
        if status == "created":
            self._stamp("started", message)
        elif status in ("waiting", "aborting"):
            self._stamp("decided", message)
        self._tell(facts.StatusChanged(status))

    def _block_job(self, name: str, data: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        done, total = _bytes(data.get("offset")), _bytes(data.get("len"))
        if name == "BLOCK_JOB_READY":
            self._stamp("ready", message)
            self._tell(facts.BecameReady(done, total))
            return
        self._stamp("ended", message)
        error = data.get("error")
        cancelled = name == "BLOCK_JOB_CANCELLED"
        self._tell(facts.Ended(cancelled, None if error is None else str(error), done, total))

    def _stamp(self, what: str, message: Mapping[str, Any]) -> None:
        when = time_of(message.get("timestamp"))
        if when is not None:
            self.times.setdefault(what, when)


def _bytes(value: object) -> int:
    return value if isinstance(value, int) else 0
