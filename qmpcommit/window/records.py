"""What is known of a snapshot window: its frozen disks, its overlays, and its name.

The name is in each overlay's file name and node-name, so that a window whose owner was killed is
found by whoever comes next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Generic, TypeVar

from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.guest.run_state import How
from qmpcommit.names import WINDOW_MARK
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from qmpcommit.commit.claim import Claim

V = TypeVar("V")

MARK = WINDOW_MARK
"""In the name of each overlay of a window, before the window's own number."""

STAMP = "%Y%m%dT%H%M%SZ"

NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


@record
class Frozen(Record):
    """One disk in a window: `filename` stands still, and so does all below it.

    `overlay` is the file that the guest writes to meanwhile, `node_name` its node. `astray` says
    why `filename`, or a name below it, does not lead to QEMU's file from here; "" where it does.
    """

    disk: str
    filename: str
    overlay: str
    node_name: str
    astray: str = ""


@record
class OpenWindow(Record):
    """An overlay of a window that is open: its age in seconds, and its size in bytes.

    Both are None where its file can't be looked at from here.
    """

    disk: str
    window: str
    filename: str
    overlay: str
    age: float | None = None
    size: int | None = None
    node_name: str = ""


class Window(Mapping[str, Frozen]):
    """The frozen disks of an open window, by the names that they were asked for by.

    `quiesced` is for how many seconds the guest was frozen or paused; `outcomes` are the commits
    that closed the window. `below` are the files that stood still for each disk when it was opened,
    `disturbed` says why what was read of them is no instant's image, `claims` hold the disks.
    """

    def __init__(
        self, name: str, frozen: Mapping[str, Frozen], below: Mapping[str, list[str]] | None = None
    ) -> None:
        self.name = name
        self.quiesced: float | None = None
        self.outcomes: list[CommitOutcome] = []
        self.below = dict(below or {})
        self.disturbed: list[str] = []
        self.claims: dict[str, Claim] = {}
        self._frozen = dict(frozen)

    def __repr__(self) -> str:
        return f"<Window {self.name} over {', '.join(map(repr, self._frozen)) or 'nothing'}>"

    def __getitem__(self, disk: str) -> Frozen:
        return self._frozen[disk]

    def __iter__(self) -> Iterator[str]:
        return iter(self._frozen)

    def __len__(self) -> int:
        return len(self._frozen)


class GroupWindow(Mapping[tuple[V, str], Frozen], Generic[V]):
    """The frozen disks of a window over several VMs: ``window[vm, "vda"].filename``.

    A VM is its `Session`, or its name where the daemon holds the window open. `of` has each VM's
    own window, with its name, outcomes, and for how long its guest stood still.
    """

    def __init__(self, of: Mapping[V, Window]) -> None:
        self.of = dict(of)

    def __repr__(self) -> str:
        return f"<GroupWindow {self.of!r}>"

    def __getitem__(self, disk: tuple[V, str]) -> Frozen:
        vm, name = disk
        return self.of[vm][name]

    def __iter__(self) -> Iterator[tuple[V, str]]:
        return ((vm, name) for vm, window in self.of.items() for name in window)

    def __len__(self) -> int:
        return sum(len(window) for window in self.of.values())


@record
class NotedWindow(Record):
    """What has to be known of a window to take it up in another process.

    `disks` are by the names that they were asked for by, and so are the files `below` their
    overlays; `freeze` and `agent` tell how its guest was to be quiesced.
    """

    name: str
    disks: dict[str, Frozen]
    freeze: How | None = None
    agent: str | None = None
    below: dict[str, list[str]] = field(default_factory=dict)
