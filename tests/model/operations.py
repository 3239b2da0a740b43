"""Random operations, the same for hypothesis and for the soak: each a name and small numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

from tests.model.world import World

POLICIES = ("pivot", "keep", "abort", "hold", "hold", "check passes", "check fails", "call")
ENDS = ("pivot", "keep", "abort")

Draw = Callable[[int], int]
"""A number below its argument."""


def operation(draw: Draw, world: World) -> Coroutine[Any, Any, None]:
    """The next operation; what it is told is drawn whether it is used or not."""
    kind = draw(20)
    if kind < 5:
        return world.write(draw(512), 1 + draw(64))
    if kind < 8:
        return world.snapshot()
    if kind < 13:
        return world.commit(
            POLICIES[draw(len(POLICIES))], draw(4), draw(3), slow=draw(4) == 0, writes=draw(5)
        )
    if kind < 15:
        return world.decide(ENDS[draw(3)])  # type: ignore[arg-type]
    return (
        lambda: (
            world.die(ENDS[draw(3)], draw(60))  # type: ignore[arg-type]
            if draw(2)
            else world.die_committing(POLICIES[draw(2)], draw(4), draw(3), draw(600))
        ),
        world.lose_link,
        world.pause,
        world.resume,
        lambda: world.resize(1 + draw(16)) if draw(2) else world.recycle(),
    )[kind - 15]()


async def run(draw: Draw, count: int) -> World:
    """One example of `count` operations."""
    world = World(layers=2 + draw(3), faulty=draw(4) == 0)
    async with world:
        for _ in range(count):
            await operation(draw, world)
    return world


def seeded(seed: int) -> Draw:
    """Draws that can be had again."""
    return random.Random(seed).randrange
