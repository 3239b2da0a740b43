"""The versions that are installed here, of all that is needed: what constraints.txt has.

python -m tests.constraints
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PATH = Path(__file__).parents[1] / "constraints.txt"


class Needed(NamedTuple):
    """A package: the version that is installed, and what is asked of it by whom."""

    version: str
    asked: list[tuple[str, Requirement]]


def needed(*asked: str) -> dict[str, Needed]:
    """All that these need, by name."""
    found: dict[str, Needed] = {}
    waiting, seen = [("", Requirement(each)) for each in asked], set()
    while waiting:
        parent, one = waiting.pop()
        name, there = canonicalize_name(one.name), distribution(one.name)
        found.setdefault(name, Needed(there.version, [])).asked.append((parent, one))
        if (key := (name, frozenset(one.extras))) in seen:
            continue
        seen.add(key)
        for text in there.requires or ():
            inner = Requirement(text)
            extras = one.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                waiting.append((name, inner))
    del found["qmpcommit"]
    return found


def pinned() -> dict[str, str]:
    """The versions that the file has."""
    lines = [line for line in PATH.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def main() -> None:
    """Write it anew."""
    head = [line for line in PATH.read_text().splitlines() if line.startswith("#")]
    found = sorted(needed("qmpcommit[daemon,top]").items())
    PATH.write_text("\n".join([*head, *(f"{name}=={each.version}" for name, each in found)]) + "\n")


if __name__ == "__main__":
    main()
