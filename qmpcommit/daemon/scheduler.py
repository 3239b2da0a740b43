"""Which commits run at once, and how they share the bandwidth: pure, without I/O.

Commits wait in the order of their priority (higher first), then in that in which they came. One
that its VM or its storage holds up does not hold up those behind it. The members of a group start
together or not at all; what is free for them is kept for them, or others would go past them for
ever. Those that run share the budget evenly; what one that asks for less leaves over goes to the
others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import NamedTuple


class Entry(NamedTuple):
    """A commit that waits or runs; `rate` is the bytes per second it asked for (0: no limit)."""

    id: str
    vm: str
    storage: str
    priority: int = 0
    rate: int = 0


class Caps(NamedTuple):
    """How many may run at once, in all, on one VM and on one storage; and their budget."""

    commits: int
    per_vm: int
    per_storage: int
    bandwidth: int = 0


class Scheduler:
    """The queue and what runs; `changed` commits are those whose share is another one now."""

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self.running: dict[str, Entry] = {}
        self._waiting: dict[str, tuple[tuple[int, int], tuple[Entry, ...]]] = {}
        self._order = count()

    def add(self, *entries: Entry) -> None:
        """Queue one, or the members of a group."""
        waiting = ((-entries[0].priority, next(self._order)), entries)
        self._waiting.update((entry.id, waiting) for entry in entries)

    def impossible(self, entries: Sequence[Entry]) -> str | None:
        """Which limit keeps so many from ever running together; None where none does."""
        if len(entries) > self.caps.commits:
            return f"{self.caps.commits} commits at once (limits.commits)"
        vm, many = Counter(entry.vm for entry in entries).most_common(1)[0]
        if many > self.caps.per_vm:
            return f"{self.caps.per_vm} at once on a VM (limits.per_vm), and {many} are of {vm}"
        storages = Counter(entry.storage for entry in entries if entry.storage)
        most = max(storages.values(), default=0)
        if most > self.caps.per_storage:
            return (
                f"{self.caps.per_storage} at once on a storage (limits.per_storage), and {most}"
                " bases lie on one"
            )
        return None

    def resume(self, entry: Entry) -> None:
        """One that runs already, whatever the limits say."""
        self.running[entry.id] = entry

    def remove(self, commit_id: str) -> bool:
        """One that has ended, or waits no more; whether it was there."""
        there = self._waiting.pop(commit_id, None) or self.running.pop(commit_id, None)
        return there is not None

    @property
    def waiting(self) -> list[str]:
        """The queue, first to run first."""
        return [entry.id for unit in self._units() for entry in unit]

    def _units(self) -> list[tuple[Entry, ...]]:
        """What starts together, in the order of the queue."""
        return [entries for _, entries in sorted(set(self._waiting.values()))]

    def start(self) -> list[Entry]:
        """Move what may run now from the queue, in its order."""
        vms = Counter(entry.vm for entry in self.running.values())
        storages = Counter(entry.storage for entry in self.running.values())
        taken = len(self.running)
        started: list[Entry] = []
        for unit in self._units():
            if taken >= self.caps.commits:
                break
            their_vms = Counter(entry.vm for entry in unit)
            theirs = Counter(entry.storage for entry in unit if entry.storage)
            fits = (
                taken + len(unit) <= self.caps.commits
                and all(vms[vm] + many <= self.caps.per_vm for vm, many in their_vms.items())
                and all(storages[s] + many <= self.caps.per_storage for s, many in theirs.items())
            )
            if fits:
                for entry in unit:
                    del self._waiting[entry.id]
                    self.running[entry.id] = entry
                started += unit
            if fits or len(unit) > 1:
                taken += len(unit)
                vms += their_vms
                storages += theirs
        return started

    def shares(self, copying: Iterable[str]) -> Mapping[str, int]:
        """Bytes per second for each of those that copy; 0 is no limit."""
        entries = [self.running[commit_id] for commit_id in copying if commit_id in self.running]
        return divide(self.caps.bandwidth, {entry.id: entry.rate for entry in entries})


def divide(budget: int, asked: Mapping[str, int]) -> dict[str, int]:
    """Divide a budget evenly, but to nobody more than they asked for (0: as much as there is)."""
    if not budget:
        return dict(asked)
    shares: dict[str, int] = {}
    left = budget
    modest = sorted((rate, name) for name, rate in asked.items() if rate)
    greedy = [name for name, rate in asked.items() if not rate]
    for place, (rate, name) in enumerate(modest):
        even = left // (len(modest) - place + len(greedy))
        shares[name] = max(1, min(rate, even))
        left -= shares[name]
    for place, name in enumerate(greedy):
        shares[name] = max(1, left // (len(greedy) - place))
        left -= shares[name]
    return shares
