"""Whatever is done, every image ends with what the plain model says: hypothesis chooses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.model.operations import ENDS, POLICIES, run, seeded
from tests.model.world import PATIENCE, World

EXAMPLES = int(os.environ.get("QMPCOMMIT_TEST_MODEL_EXAMPLES", "60"))
"""Of the machine; each takes about half a second."""

places = st.integers(0, 3)
ends = st.sampled_from(ENDS)
steps = st.integers(0, 400)


class Commits(RuleBasedStateMachine):
    """One world, in a loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.world: World | None = None

    def do(self, work: Coroutine[Any, Any, Any]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(PATIENCE):
                await work

        self.runner.run(bounded())

    @property
    def w(self) -> World:
        assert self.world is not None
        return self.world

    @initialize(layers=st.integers(2, 4), faulty=st.booleans())
    def begin(self, layers: int, faulty: bool) -> None:
        world = World(layers=layers, faulty=faulty)
        self.do(world.__aenter__())
        self.world = world

    @rule(first=st.integers(0, 511), count=st.integers(1, 64))
    def write(self, first: int, count: int) -> None:
        self.do(self.w.write(first, count))

    @rule()
    def snapshot(self) -> None:
        self.do(self.w.snapshot())

    @rule(
        policy=st.sampled_from(POLICIES), base=places, top=places, slow=st.booleans(),
        writes=st.integers(0, 4),
    )  # fmt: skip
    def commit(self, policy: str, base: int, top: int, slow: bool, writes: int) -> None:
        self.do(self.w.commit(policy, base, top, slow=slow, writes=writes))

    @rule(end=ends)
    def decide(self, end: Any) -> None:
        self.do(self.w.decide(end))

    @rule(end=ends, after=steps)
    def die(self, end: Any, after: int) -> None:
        self.do(self.w.die(end, after))

    @rule(policy=st.sampled_from(["pivot", "keep"]), base=places, top=places, after=steps)
    def die_committing(self, policy: str, base: int, top: int, after: int) -> None:
        self.do(self.w.die_committing(policy, base, top, after))

    @rule()
    def lose_link(self) -> None:
        self.do(self.w.lose_link())

    @rule()
    def pause(self) -> None:
        self.do(self.w.pause())

    @rule()
    def resume(self) -> None:
        self.do(self.w.resume())

    @rule(more=st.integers(1, 16))
    def resize(self, more: int) -> None:
        self.do(self.w.resize(more))

    @rule()
    def recycle(self) -> None:
        self.do(self.w.recycle())

    def teardown(self) -> None:
        try:
            if self.world is not None:
                self.do(self.world.__aexit__(None, None, None))
        finally:
            self.runner.close()


TestCommits = Commits.TestCase
TestCommits.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=25,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


async def test_the_model_tells_a_lost_write() -> None:
    """The proof can fail: a byte that the guest never wrote is found."""
    world = await run(seeded(3), 20)
    data = bytearray(world.layers.active.clusters * 65536)
    place = len(world.layers.chain) - 1
    for cluster in range(world.layers.active.clusters):
        (value, *_) = world.layers.shown(place, cluster)
        data[cluster * 65536 : (cluster + 1) * 65536] = bytes([value]) * 65536
    assert world.layers.wrong(place, bytes(data)) is None
    data[5 * 65536 + 1] ^= 1
    assert world.layers.wrong(place, bytes(data)) is not None
