"""One snapshot window that the daemon holds open by a lease: its row, and what is noted of it."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from qmpcommit.commit.quiesce import How
from qmpcommit.commit.window_records import Frozen, NotedWindow
from qmpcommit.daemon.undertaking import ENDED, Undertaking
from qmpcommit.daemon.window_models import WindowDisk, WindowRequest, WindowView
from qmpcommit.errors import QmpCommitError
from qmpcommit.values import Record

_HELD = ("freeze", "lay", "thaw")


class LeasedWindow(Undertaking[WindowRequest]):
    """A window: "opening", "open", "closing", then "done" or "failed".

    It is the ledger of `open_window`. `opened` is set when it is open or has ended; `failure` is
    then what it ended with. `changed` wakes whoever waits for the end of its lease.
    """

    kind = "window"
    asks = WindowRequest

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.opened = asyncio.Event()
        self.changed = asyncio.Event()
        self.lock = asyncio.Lock()
        self.failure: QmpCommitError | None = None
        self.problem = ""
        self.found_again = False

    @property
    def name(self) -> str:
        """The window's own name, which its overlays carry."""
        return str(self.noted.get("name", ""))

    @property
    def laid(self) -> NotedWindow | None:
        """What was begun, from the note ``create`` on."""
        noted = self.noted.get("window")
        return None if noted is None else NotedWindow.model_validate(noted)

    @property
    def frozen(self) -> dict[str, Frozen]:
        """The disks by the names that they were asked for by."""
        laid = self.laid
        return {} if laid is None else dict(laid.disks)

    @property
    def held(self) -> How | None:
        """How its guest was quiesced by a process that may not have let it go on any more."""
        step, how = self.noted.get("step"), self.noted.get("how")
        return how if self.state == "opening" and step in _HELD else None

    @property
    def jobs(self) -> dict[str, str]:
        """The ids of the jobs that close it, by the disks' asked names."""
        return dict(self.noted.get("jobs") or {})

    @property
    def left(self) -> float:
        """Seconds until its lease ends; not above zero when it has ended."""
        return (self.expires or 0.0) - time.time()

    async def note(self, step: str, **facts: Any) -> None:
        """A step that is about to be taken; `Undertaking.note` with records made plain."""
        plain = {
            name: value.model_dump(mode="json") if isinstance(value, Record) else value
            for name, value in facts.items()
        }
        await super().note(step, **plain)

    def path(self, each: Frozen) -> str:
        """Where the overlay's file is on this host."""
        return os.path.join(str(self.noted.get("cwd") or ""), each.overlay)

    def view(self) -> WindowView:
        """As the API shows it; looks at the overlays' files."""
        over = self.state in ENDED
        outcomes = (self.outcome or self.error or {}).get("outcomes") or []
        return WindowView.model_validate(
            {
                "id": self.id,
                "vm": self.vm,
                "state": self.state,
                "name": self.name,
                "disks": {
                    asked: WindowDisk(
                        disk=each.disk,
                        filename=each.filename,
                        overlay=each.overlay,
                        node_name=each.node_name,
                        size=allocated(self.path(each)),
                    )
                    for asked, each in self.frozen.items()
                },
                "created": self.created,
                "quiesced": self.noted.get("quiesced"),
                "lease": self.request.lease,
                "expires": self.expires,
                "ended": self.ended,
                "commits": list(self.noted.get("commits") or ()),
                "outcomes": outcomes,
                "problem": None if over else self.problem or None,
                "error": self.error,
            }
        )


SIZES: dict[str, int] = {}
"""What `allocated` has seen last of each file: looking itself may take long, as on a hung NFS."""


def allocated(path: str) -> int | None:
    """The bytes that a file takes; None where it can't be looked at from here."""
    try:
        size = SIZES[path] = os.stat(path).st_blocks * 512
    except (OSError, ValueError):
        return None
    return size
