"""The state machine in any interleaving of facts: it ends, and what is told of the end is true."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qmpcommit.commit import report
from qmpcommit.commit.facts import Choice, Command, Decided, News, Where
from qmpcommit.commit.outcome import Timings
from qmpcommit.commit.phases import State, Verdict
from qmpcommit.errors import VMGone
from tests.unit.simulated import World
from tests.unit.simulated_driver import Driver
from tests.unit.test_checks import made

PLANS = {True: made()[1], False: made(top="mid")[1]}
"""Of the active layer, and of one below it."""

OF_THE_DISK = (Verdict.PIVOTED, Verdict.RECYCLED, Verdict.KEPT, Verdict.MERGED)

CHAOS: list[Callable[[Driver], object]] = [
    Driver.take,
    Driver.take,
    Driver.take,
    Driver.decide,
    lambda d: d.world.progress(),
    lambda d: d.world.progress(),
    lambda d: d.world.drain(True),
    lambda d: d.world.drain(False),
    lambda d: d.world.pause(True),
    lambda d: d.world.pause(False),
    lambda d: d.cut(),
    Driver.rise,
    lambda d: d.world.fail(),
    lambda d: d.world.stall(),
    Driver.relieve,
    lambda d: d.other(Command.PIVOT, "ready", "pending"),
    lambda d: d.other(Command.KEEP, "ready"),
    lambda d: d.other(Command.ABORT, "running", "ready", "paused", "standby", "pending"),
    lambda d: d.other(Command.DISMISS, "concluded"),
    lambda d: d.world.unplug(),
    lambda d: d.world.told.append(Decided(Choice.ABORT, "caller")),
    lambda d: d.world.told.append(News.TICK),
]
QUIET = [0, 1, 2, 3, 4, 5, 0, 1, 4, 5, 0, 1]


@settings(
    max_examples=15 * settings().max_examples,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    script=st.lists(st.integers(0, len(CHAOS) - 1) | st.sampled_from(QUIET), max_size=60),
    draws=st.lists(st.integers(0, 2**16), max_size=80),
    two_phase=st.booleans(),
    defers=st.booleans(),
    adopted=st.booleans(),
    auto_dismiss=st.booleans(),
    auto_finalize=st.booleans(),
    prepares=st.booleans(),
    answers=st.permutations(list(Choice)),
    dies=st.none() | st.integers(0, 40),
    lost=st.integers(0, 9),
    replaced=st.booleans(),
    stale=st.booleans(),
)
@example(  # killed when nothing was sent, and unplugged then
    script=[0, 19], draws=[1, 1, 1], two_phase=False, defers=False, adopted=False,
    auto_dismiss=False, auto_finalize=False, prepares=False, answers=list(Choice), dies=None,
    lost=0, replaced=False, stale=False,
)  # fmt: skip
def test_every_interleaving_ends_and_tells_the_truth(
    script: list[int],
    draws: list[int],
    two_phase: bool,
    defers: bool,
    adopted: bool,
    auto_dismiss: bool,
    auto_finalize: bool,
    prepares: bool,
    answers: list[Choice],
    dies: int | None,
    lost: int,
    replaced: bool,
    stale: bool,
) -> None:
    numbers = iter(draws)

    def draw(below: int) -> int:
        return next(numbers, 5) % below

    world = World(two_phase=two_phase, defers_paused_pivot=defers)
    if adopted:
        world.auto_dismiss, world.auto_finalize = auto_dismiss, auto_finalize
        world.execute(Command.START)
        world.told.clear()
    elif prepares:
        world.prepares, world.auto_finalize = True, False
    if stale and not adopted:
        world.stale, world.disk = True, Where.BASE if two_phase else Where.MERGED
    driver = Driver(world, draw, answers, adopted)
    for at in range(len(script) + 400):
        if driver.state.finished:
            break
        if at == dies:
            driver.kill(replaced=replaced, lost=lost)
        if at < len(script):
            CHAOS[script[at]](driver)
        else:
            driver.be_fair()
    state = driver.state
    assert state.finished, f"stuck: {state} in {world}"
    check_truth(state, world)


STRIKES: list[Callable[[Driver], object]] = [
    lambda d: d.world.told.append(Decided(Choice.ABORT, "caller")),
    lambda d: d.world.told.append(Decided(Choice.ABORT, "caller")),
    Driver.cut,
    Driver.miss_the_end,
    lambda d: d.other(Command.PIVOT, "ready"),
    lambda d: d.other(Command.KEEP, "ready"),
    lambda d: d.world.unplug(),
    Driver.rise,
]
"""What happens once or twice beside a commit that all else goes well with."""


@settings(
    max_examples=20 * settings().max_examples,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    strikes=st.lists(
        st.tuples(st.integers(3, 14), st.sampled_from(range(len(STRIKES)))), max_size=4
    ),
    pace=st.integers(1, 3),
    prepares=st.booleans(),
    answers=st.permutations(list(Choice)),
    dies=st.none() | st.integers(6, 20),
    lost=st.integers(0, 9),
    deadline=st.booleans(),
)
def test_of_an_end_that_nobody_heard_of_nothing_false_is_told(
    strikes: list[tuple[int, int]],
    pace: int,
    prepares: bool,
    answers: list[Choice],
    dies: int | None,
    lost: int,
    deadline: bool,
) -> None:
    """Little happens beside the commit, but when QEMU ends the last that it has said is lost."""
    world = World(prepares=prepares, auto_finalize=not prepares)
    driver = Driver(world, lambda below: below // 2, answers, adopted=False)
    for at in range(400):
        if driver.state.finished:
            break
        for when, number in strikes:
            if when == at:
                STRIKES[number](driver)
        if at == dies:
            driver.kill(replaced=False, lost=lost)
            if deadline:  # it comes while the monitor is looked for
                world.told.append(Decided(Choice.ABORT, "deadline"))
        driver.be_fair(pace)
    assert driver.state.finished, f"stuck: {driver.state} in {world}"
    check_truth(driver.state, world)


def check_truth(state: State, world: World) -> None:
    """What is told is what the simulated disk shows, and no job of ours is left behind."""
    verdict = state.verdict
    if verdict is Verdict.VM_GONE:
        assert not world.alive
        check_word(state, world)
        return
    unsent = verdict in (Verdict.CHANGED, Verdict.NEVER_BEGAN)
    unseen = (world.stale or world.unplugged) and verdict is Verdict.UNCLEAR
    assert world.starts == 1 or unsent or unseen
    assert world.starts == 0 or verdict is not Verdict.CHANGED
    assert not world.guest_paused or not world.alive, "a guest frozen by us"
    assert world.job is None or not world.alive, "a job was left behind"
    if world.stale:
        assert verdict not in OF_THE_DISK, "of what the disk did not use"
        assert verdict is not Verdict.STALE or state.error is not None
        return
    assert verdict is not Verdict.STALE
    pivoted = verdict in (Verdict.PIVOTED, Verdict.RECYCLED)
    merged = verdict is Verdict.MERGED
    truth = world.disk is (Where.BASE if world.two_phase else Where.MERGED)
    assert world.two_phase or not pivoted
    assert not world.two_phase or not merged
    assert (pivoted or merged) == truth or (truth and (world.unplugged or state.unchecked))
    if verdict is Verdict.RECYCLED:
        assert world.overlaid
    elif pivoted and state.ordered is Choice.RECYCLE:
        assert state.error or not world.alive, "a guest writes into the base unnoticed"
    if verdict is Verdict.KEPT:
        assert world.will == "keep"
        assert not world.cancelled
        assert world.error is None
    if verdict is Verdict.FAILED:
        assert world.error is not None
    if verdict is Verdict.CANCELLED:
        assert world.cancelled
    if verdict is Verdict.VANISHED:
        assert not truth or not world.two_phase, "the overlay is not the newest"
    if verdict is Verdict.UNCLEAR:
        assert world.unplugged or state.unchecked, "the graph shows how it ended"
    if (pivoted or verdict is Verdict.KEPT) and world.ours:
        outcome = report.outcome_of(PLANS[True], state, None, Timings())
        assert outcome.decided_by in ("policy", "caller"), "it was what we had ordered"


def check_word(state: State, world: World) -> None:
    """Of a QEMU that is gone, what to boot is said only as far as it is known."""
    gone = report.error_of(PLANS[world.two_phase], state, None, None, None)
    assert isinstance(gone, VMGone)
    if gone.pivoted:
        assert world.disk is Where.BASE, "the base is not the newest"
    elif gone.pivoted is False and world.ours:
        assert world.disk is not Where.BASE, "a stale overlay would be booted"
