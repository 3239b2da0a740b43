"""Which commits run at once, and how they share the bandwidth, whatever comes and goes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qmpcommit.daemon.scheduler import Caps, Entry, Scheduler, divide

CAPS = Caps(commits=4, per_vm=2, per_storage=3, bandwidth=1000)

VMS = st.sampled_from(["web", "db", "mail"])
STORAGES = st.sampled_from(["8:1", "8:2", ""])
RATES = st.sampled_from([0, 0, 1, 10, 300, 5000])


class Coming(RuleBasedStateMachine):
    """Commits come, start, end and are cancelled in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(CAPS)
        self.entries: dict[str, Entry] = {}
        self.queue: list[str] = []
        self.resumed: set[str] = set()

    @rule(vm=VMS, storage=STORAGES, priority=st.integers(-2, 2), rate=RATES)
    def come(self, vm: str, storage: str, priority: int, rate: int) -> None:
        entry = Entry(f"c{len(self.entries)}", vm, storage, priority, rate)
        self.entries[entry.id] = entry
        self.scheduler.add(entry)
        self.queue.append(entry.id)
        self.queue.sort(key=lambda name: -self.entries[name].priority)  # stable: first come

    @rule(vm=VMS, storage=STORAGES)
    def resume(self, vm: str, storage: str) -> None:
        """One that a former daemon had started: it runs, whatever the limits say."""
        entry = Entry(f"c{len(self.entries)}", vm, storage)
        self.entries[entry.id] = entry
        self.scheduler.resume(entry)
        self.resumed.add(entry.id)

    @rule()
    def start(self) -> None:
        before = dict(self.scheduler.running)
        started = self.scheduler.start()
        names = [entry.id for entry in started]
        assert names == [name for name in self.queue if name in names], "not in the queue's order"
        assert set(self.scheduler.running) == set(before) | set(names)
        self.queue = [name for name in self.queue if name not in names]
        running = list(self.scheduler.running.values())
        if names:
            assert len(running) <= CAPS.commits
        for entry in started:
            assert _on(running, vm=entry.vm) <= CAPS.per_vm
            assert not entry.storage or _on(running, storage=entry.storage) <= CAPS.per_storage
        for name in self.queue:  # who waits still has a reason to
            entry = self.entries[name]
            assert (
                len(running) >= CAPS.commits
                or _on(running, vm=entry.vm) >= CAPS.per_vm
                or (entry.storage and _on(running, storage=entry.storage) >= CAPS.per_storage)
            ), f"{entry} could run, and does not"

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """One ends or is cancelled; to say so twice does no harm."""
        name = data.draw(st.sampled_from(sorted(self.entries)))
        there = name in self.queue or name in self.scheduler.running
        assert self.scheduler.remove(name) is there
        assert self.scheduler.remove(name) is False
        self.queue = [waiting for waiting in self.queue if waiting != name]

    @rule()
    def drain(self) -> None:
        """As long as those that run end, each that waits has its turn."""
        for _ in range(2 * len(self.entries) + 2):
            self.start()
            for name in list(self.scheduler.running):
                self.scheduler.remove(name)
        assert not self.scheduler.waiting

    @invariant()
    def the_queue_is_what_came_and_has_not_gone(self) -> None:
        assert self.scheduler.waiting == self.queue
        assert not set(self.queue) & set(self.scheduler.running)

    @invariant()
    def shares_keep_to_the_budget(self) -> None:
        shares = self.scheduler.shares([*self.scheduler.running, "stranger"])
        assert set(shares) == set(self.scheduler.running)
        assert sum(shares.values()) <= CAPS.bandwidth
        assert all(share > 0 for share in shares.values())


TestComing = Coming.TestCase


def _on(running: list[Entry], **what: str) -> int:
    return sum(all(getattr(entry, k) == v for k, v in what.items()) for entry in running)


def test_a_higher_priority_goes_first_and_equals_keep_their_order() -> None:
    scheduler = Scheduler(Caps(1, 1, 1))
    for number, priority in enumerate([0, 5, 0, 5, -1]):
        scheduler.add(Entry(f"c{number}", f"vm{number}", "", priority))
    order = []
    while started := scheduler.start():
        order += [entry.id for entry in started]
        scheduler.remove(started[0].id)
    assert order == ["c1", "c3", "c0", "c2", "c4"]


def test_one_that_is_held_up_does_not_hold_up_those_behind_it() -> None:
    scheduler = Scheduler(Caps(10, 1, 10))
    for name, vm in (("a", "web"), ("b", "web"), ("c", "db")):
        scheduler.add(Entry(name, vm, ""))
    assert [entry.id for entry in scheduler.start()] == ["a", "c"]
    assert scheduler.waiting == ["b"]


ASKED = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), RATES, max_size=12)


@given(budget=st.integers(100, 100_000), asked=ASKED)
def test_a_budget_is_divided_evenly_and_used_up(budget: int, asked: dict[str, int]) -> None:
    shares = divide(budget, asked)
    assert set(shares) == set(asked)
    assert sum(shares.values()) <= budget
    assert all(0 < share <= (asked[name] or budget) for name, share in shares.items())
    greedy = [share for name, share in shares.items() if not asked[name]]
    held_back = [share for name, share in shares.items() if share < asked[name]]
    if greedy:
        assert sum(shares.values()) == budget
        assert max(greedy) - min(greedy) <= 1
    for share in [*greedy, *held_back]:  # nobody has more than one who would like more
        assert max(shares.values()) <= share + len(shares)


@given(asked=ASKED)
def test_without_a_budget_each_has_what_it_asked_for(asked: dict[str, int]) -> None:
    assert divide(0, asked) == asked


def test_a_budget_smaller_than_the_number_of_jobs_stops_none() -> None:
    assert Counter(divide(2, dict.fromkeys("abcd", 0)).values()) == {1: 4}
