"""The members of a group start together or not at all, and nobody waits for ever."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qmpcommit.daemon.scheduler import Caps, Entry, Scheduler

CAPS = Caps(4, 2, 3)
MEMBER = st.tuples(st.sampled_from("abc"), st.sampled_from(["s", "t", ""]))
GROUP = st.tuples(st.lists(MEMBER, min_size=1, max_size=4), st.integers(0, 2))


def entries(name: str, members: list[tuple[str, str]], priority: int = 0) -> list[Entry]:
    return [Entry(f"{name}{n}", vm, on, priority) for n, (vm, on) in enumerate(members)]


@given(st.lists(GROUP, max_size=12), st.data())
def test_all_or_none_within_the_limits_and_everybody_runs(
    groups: list[tuple[list[tuple[str, str]], int]], data: Any
) -> None:
    scheduler = Scheduler(CAPS)
    units: dict[str, set[str]] = {}
    for number, (members, priority) in enumerate(groups):
        unit = entries(f"g{number}-", members, priority)
        if scheduler.impossible(unit) is None:
            scheduler.add(*unit)
            units[f"g{number}"] = {entry.id for entry in unit}
    ran: set[str] = set()
    while len(ran) < len(units):
        scheduler.start()
        running = list(scheduler.running.values())
        ids = {entry.id for entry in running}
        assert len(running) <= CAPS.commits
        assert max(Counter(e.vm for e in running).values(), default=0) <= CAPS.per_vm
        stored = Counter(e.storage for e in running if e.storage)
        assert max(stored.values(), default=0) <= CAPS.per_storage
        there = [name for name, unit in units.items() if unit & ids]
        assert all(units[name] <= ids for name in there), "a group started in part"
        assert there, "nothing runs, and something waits"
        ended = data.draw(st.sampled_from(there))
        ran.add(ended)
        for entry in units[ended]:
            assert scheduler.remove(entry)
    assert not scheduler.waiting


def test_a_group_is_not_overtaken_for_ever() -> None:
    scheduler = Scheduler(Caps(2, 2, 2))
    scheduler.add(Entry("first", "a", ""))
    scheduler.start()
    scheduler.add(*entries("g", [("a", ""), ("b", "")]))
    scheduler.add(Entry("later", "c", ""))
    assert scheduler.start() == [], "one place is free, and is the group's"
    scheduler.remove("first")
    assert [entry.id for entry in scheduler.start()] == ["g0", "g1"]


def test_what_can_never_run_together_is_known() -> None:
    scheduler = Scheduler(CAPS)
    assert "limits.commits" in str(scheduler.impossible(entries("g", [(c, "") for c in "abcde"])))
    assert "limits.per_vm" in str(scheduler.impossible(entries("g", [("a", "")] * 3)))
    on_one = [("a", "s"), ("a", "s"), ("b", "s"), ("c", "s")]
    assert "limits.per_storage" in str(scheduler.impossible(entries("g", on_one)))
    assert scheduler.impossible(entries("g", on_one[:3])) is None
