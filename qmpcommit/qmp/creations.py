"""Whether QEMU creates an image at the moment, as it has told: nobody may ask for its nodes then.

``query-jobs`` tells of what kind each job is, ``JOB_STATUS_CHANGE`` of each that begins or ends
after that. So it is asked once on a connection, and anew when a job has begun that it did not list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST = 100
"""Jobs of unknown kind of which each is known; of more it is asked anew."""

_ENDED = ("concluded", "null")


def is_creation(job: Mapping[str, Any]) -> bool:
    """Whether a job of ``query-jobs`` is a ``blockdev-create`` that has not ended."""
    return job.get("type") == "create" and job.get("status") not in _ENDED


class Creations:
    """What is known of one connection's ``blockdev-create`` jobs."""

    def __init__(self) -> None:
        self._asked = False
        self._begun: set[str] = set()  # and not listed since: of whatever kind
        self._running: set[str] = set()

    @property
    def none(self) -> bool:
        """Whether it is known that there is none."""
        return self._asked and not self._begun and not self._running

    def forget(self) -> None:
        """The connection is another one, or lost: what was not heard over it is not known."""
        self._asked = False
        self._begun.clear()
        self._running.clear()

    def heard(self, event: Mapping[str, Any]) -> None:
        """An event of QEMU's."""
        data = event.get("data")
        if event["event"] != "JOB_STATUS_CHANGE" or not isinstance(data, Mapping):
            return
        known_as, status = str(data.get("id")), data.get("status")
        if status == "created":
            self._begun.add(known_as)
            if len(self._begun) > MOST:
                self.forget()
        elif status in _ENDED:
            self._begun.discard(known_as)
            self._running.discard(known_as)

    def listed(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """What ``query-jobs`` has answered."""
        self._running = {str(job["id"]) for job in jobs if is_creation(job)}
        self._begun.difference_update(str(job["id"]) for job in jobs)
        self._asked = True
