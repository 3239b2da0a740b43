"""A story that is told again and again, and each time the daemon is killed at another place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from tests.daemon.daemons import Daemon
from tests.ground.places import chosen, told


def killable(folder: Path) -> Daemon:
    """A daemon that `tests.daemon.killable` kills; not started."""
    places = folder / "places"
    places.touch()
    d = Daemon(folder, "commands = true\n", module="tests.daemon.killable")
    d.environment = {"QMPCOMMIT_DIE_AT": "0", "QMPCOMMIT_PLACES": str(places)}
    return d


def places_of(folder: Path, until: str = "UPDATE undertakings") -> list[str]:
    """Where the rehearsal could have died, up to the last time that the journal was told that."""
    places = (folder / "places").read_text().splitlines()
    last = max(n for n, place in enumerate(places) if until in place)
    return places[: last + 1]


async def killed_everywhere(
    d: Daemon,
    story: Callable[[int, str], Awaitable[object]],
    places: list[str],
    started: Callable[[], Awaitable[object]] | None = None,
) -> str:
    """Tell the story once for each of these places; what is to be printed.

    `story` is given the place's number and name, `started` is awaited whenever the daemon was
    started with another place to die at: a story that ends alive leaves it at the same.
    """
    tried = chosen(len(places))
    for number in tried:
        place = places[number - 1]
        try:
            if d.environment["QMPCOMMIT_DIE_AT"] != str(number):
                await d.kill()
                d.environment["QMPCOMMIT_DIE_AT"] = str(number)
                await d.start()
                if started is not None:
                    await started()
            await story(number, place)
        except BaseException:
            print(f"killed at {number}: {place}\n{d.log[-6000:]}")
            raise
    return told(len(places), len(tried))


async def rehearsed_and_killed_everywhere(
    folder: Path,
    story: Callable[[Daemon, int, str], Awaitable[object]],
    until: str = "UPDATE undertakings",
) -> str:
    """The same with a daemon of its own, whose first story finds the places."""
    d = killable(folder)
    await d.start()
    try:
        await story(d, 0, "")
        return await killed_everywhere(d, partial(story, d), places_of(folder, until))
    finally:
        if d.process is not None:
            await d.kill()
