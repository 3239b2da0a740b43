"""The package's rooms: each imports only from the floors below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import qmpcommit

FLOORS = (
    {"errors", "manual", "preloading"},
    {"former", "log", "tasks", "units", "values", "names"},
    {"callback"},
    {"qmp"},
    {"events"},
    {"block", "guest"},
    {"commit"},
    {"group", "window"},
    {"cycles"},
    {"recovery"},
    {"wire", "session"},
    {"client", "offline_session"},
    {"daemon"},
    {"cli"},
)
FRONT = {"__init__", "__main__"}
PACKAGE = Path(qmpcommit.__file__).parent


def imports(file: Path) -> Iterator[str]:
    """The rooms that a file imports from, wherever in it, for types only or not."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package, _, rest = node.module.partition(".")
            if package == "qmpcommit":
                yield from [rest.split(".")[0]] if rest else (name.name for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith("qmpcommit."))


def test_rooms_import_from_the_floors_below() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    upward = []
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE)
        room = place.parts[0].removesuffix(".py")
        if room in FRONT:
            continue
        assert room in floor, f"{place} is on no floor"
        upward += [
            f"{place} imports {other}"
            for other in imports(file)
            if other not in {room, "__version__"} and floor[other] >= floor[room]
        ]
    assert not upward
