"""One snapshot window that the daemon holds open by a lease: its row, and what is noted of it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from typing import Any, Self, cast

from qmpcommit.commit.claim import Claim
from qmpcommit.daemon import clock
from qmpcommit.daemon.journal import Journal, Statement
from qmpcommit.daemon.sizes import allocated
from qmpcommit.daemon.undertaking import ENDED, Undertaking
from qmpcommit.errors import QmpCommitError
from qmpcommit.guest.run_state import How
from qmpcommit.log import Log
from qmpcommit.values import Record
from qmpcommit.window.records import Frozen, NotedWindow, Window
from qmpcommit.window.run import new_window_name
from qmpcommit.wire.window import (
    VMWindowView,
    WindowDisk,
    WindowRequest,
    WindowState,
    WindowView,
)

SET = 1.0
"""Seconds by which the host's clock differs that was set."""

_HELD = ("freeze", "lay", "thaw")
_OPEN = ("open", "close", "merge")


class LeasedWindow(Undertaking[WindowRequest]):
    """A window: "opening", "open", "closing", then "done" or "failed".

    `parts` has what is done on each of its VMs. `opened` is set when it is open or has ended;
    `failure` is then what it ended with. `changed` wakes whoever waits for the end of its lease.
    `undo` is why it is closed without having been open: on not all of its VMs it was.
    """

    kind = "window"
    asks = WindowRequest

    def __init__(
        self, vm: str, request: WindowRequest, journal: Journal, *, known_as: str = ""
    ) -> None:
        super().__init__(vm, request, journal, known_as=known_as)
        self.opened = asyncio.Event()
        self.changed = asyncio.Event()
        self.lock = asyncio.Lock()
        self.failure: QmpCommitError | None = None
        self.found_again = False
        self.parts = [Part(self, name, disks) for name, disks in request.disks.items()]

    @classmethod
    def new(cls, request: WindowRequest, journal: Journal) -> LeasedWindow:
        """A new one, whose names are chosen."""
        window = cls(",".join(sorted(request.disks)), request, journal)
        window.noted["lease"] = window._lease(request.lease)
        window.expires = window.created + request.lease
        for part in window.parts:
            part.know(name=new_window_name())
        return window

    @classmethod
    def load(cls, row: Mapping[str, Any], journal: Journal) -> Self:
        """One as the journal has it; what is left of its lease is never more than the lease."""
        window = super().load(row, journal)
        if window.expires is not None:
            told, most = window.noted.get("lease"), window.request.lease
            if told is not None:
                most = told["seconds"]
                begun = clock.moment(told["since"], window.expires - most)
                left = begun + most - time.monotonic()
            else:
                left = window.expires - time.time()
            expires = time.time() + min(left, most)
            if abs(expires - window.expires) > SET:  # else it is shown as before
                window.expires = expires
        return window

    def _lease(self, seconds: float) -> dict[str, Any]:
        """One that begins now, as it is noted."""
        return {"since": clock.noted(time.monotonic()), "seconds": seconds}

    async def renew(self, seconds: float) -> None:
        """Its lease ends so many seconds from now; raises `JournalFull`."""
        before, expires = self.noted.get("lease"), time.time() + seconds
        self.noted = {**self.noted, "lease": self._lease(seconds)}
        sql = "UPDATE undertakings SET expires = ?, noted = ? WHERE id = ?"
        values = (expires, json.dumps(self.noted), self.id)
        try:
            await self._journal.write(Statement(sql, values))
        except QmpCommitError:
            self.noted = {**self.noted, "lease": before}
            raise
        self.expires = expires

    @property
    def is_open(self) -> bool:
        """Whether it was noted of all its VMs that it is open there."""
        return all(part.is_open for part in self.parts)

    @property
    def undo(self) -> dict[str, Any] | None:
        """The error for which it is closed again."""
        return self.noted.get("undo")

    @property
    def expires(self) -> float | None:
        """When its lease ends (seconds since 1970)."""
        return self._expires

    @expires.setter
    def expires(self, at: float | None) -> None:
        self._expires = at
        self._ends = time.monotonic() + (at or 0.0) - time.time()

    @property
    def left(self) -> float:
        """Seconds until its lease ends, however the clock is set; not above zero when it has."""
        return self._ends - time.monotonic()

    async def save(self) -> None:
        """Write what is known now, durable when this returns."""
        await self._save()

    def view(self) -> WindowView:
        """As the API shows it; looks at the overlays' files."""
        outcomes = (self.outcome or {}).get("outcomes") or (self.error or {}).get("closed") or {}
        views = [part.view(outcomes.get(part.vm, ())) for part in self.parts]
        problems = [] if self.state in ENDED else [p.problem for p in self.parts if p.problem]
        stood = [each.quiesced for each in views if each.quiesced is not None]
        alone = len(views) == 1
        return WindowView(
            id=self.id,
            vm=self.vm,
            state=cast(WindowState, self.state),
            name=",".join(each.name for each in views),
            disks=views[0].disks if alone else {},
            windows=[] if alone else views,
            created=self.created,
            quiesced=max(stood, default=None),
            lease=self.request.lease,
            expires=self.expires,
            ended=self.ended,
            commits=[commit for each in views for commit in each.commits],
            outcomes=[outcome for each in views for outcome in each.outcomes],
            asked_by=self.noted.get("asked"),
            problem="; ".join(problems) or None,
            error=self.error,
        )


class Part:
    """The window on one VM, where `disks` are asked for and the overlays carry `name`.

    It is the ledger of `open_window`. `problem` says what keeps it waiting, and `closed` is set
    when nothing is left of it. `claims` hold its disks, by the names that they were asked for by,
    in the QEMU `claimed_in`; `released` tells that none is left.
    """

    def __init__(self, window: LeasedWindow, vm: str, disks: list[str]) -> None:
        self.vm, self.disks = vm, disks
        self.problem = ""
        self.closed = False
        self.claims: dict[str, Claim] = {}
        self.claimed_in = ""
        self.released = False
        self.log = Log(vm=vm, window=window.id)
        self._window = window

    @property
    def noted(self) -> dict[str, Any]:
        """What another process needs to go on with it."""
        return dict(self._window.noted.get("parts", {}).get(self.vm, {}))

    @property
    def name(self) -> str:
        """The window's own name on this VM."""
        return str(self.noted.get("name", ""))

    @property
    def agent(self) -> str | None:
        """The socket of the guest's agent."""
        return self._window.request.agents.get(self.vm)

    @property
    def identity(self) -> str:
        """Which QEMU it was begun on."""
        return str(self.noted.get("identity") or "")

    @property
    def cwd(self) -> str | None:
        """That QEMU's working directory."""
        return self.noted.get("cwd")

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
    def as_opened(self) -> Window:
        """The window as the library has it."""
        laid = self.laid
        window = Window(self.name, self.frozen, laid.below if laid is not None else None)
        window.claims = self.claims
        return window

    @property
    def disturbed(self) -> list[str]:
        """Why what was read in it is no instant's image."""
        return list(self.noted.get("disturbed") or ())

    @property
    def is_open(self) -> bool:
        """Whether it was noted that all of its overlays are laid, and the guest goes on."""
        return self.noted.get("step") in _OPEN

    @property
    def held(self) -> How | None:
        """How its guest was quiesced by a process that may not have let it go on any more."""
        step, how = self.noted.get("step"), self.noted.get("how")
        return how if step in _HELD else None

    @property
    def may_be_held(self) -> bool:
        """Whether its guest may be quiesced: what this process has noted of it is known here."""
        return self._window.found_again or self.held is not None

    @property
    def jobs(self) -> dict[str, str]:
        """The ids of the jobs that close it, by the disks' asked names."""
        return dict(self.noted.get("jobs") or {})

    @property
    def commits(self) -> list[str]:
        """The commits that close it."""
        return list(self.noted.get("commits") or ())

    def know(self, **facts: Any) -> None:
        """Facts that the next note writes down."""
        plain = {
            name: value.model_dump(mode="json") if isinstance(value, Record) else value
            for name, value in facts.items()
        }
        parts = {**self._window.noted.get("parts", {}), self.vm: {**self.noted, **plain}}
        self._window.noted = {**self._window.noted, "parts": parts}

    async def note(self, step: str, **facts: Any) -> None:
        """A step that is about to be taken, with what a recovery has to know of it."""
        self.know(**facts, step=step)
        await self._window.save()

    def view(self, outcomes: Any = ()) -> VMWindowView:
        """As the API shows it; looks at the overlays' files."""
        return VMWindowView(
            vm=self.vm,
            name=self.name,
            disks=shown(self.frozen, self.cwd),
            quiesced=self.noted.get("quiesced"),
            commits=self.commits,
            outcomes=list(outcomes),
        )


def path_of(each: Frozen, cwd: str | None) -> str:
    """Where an overlay's file is on this host, of a QEMU with that working directory."""
    return os.path.join(cwd or "", each.overlay)


def shown(disks: Mapping[str, Frozen], cwd: str | None) -> dict[str, WindowDisk]:
    """Disks as the API shows them, with what is known of the sizes of their overlays' files."""
    return {
        name: WindowDisk(**each.model_dump(), size=allocated(path_of(each, cwd)))
        for name, each in disks.items()
    }
