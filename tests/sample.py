"""What ``tests/run.sh`` runs of itself: all that needs no QEMU, and a sample of every other kind.

A plugin of pytest (``-p tests.sample``). Of each file outside tests/unit and tests/ground its first
tests are run, one case of each, and a long one only where it has no other; of those that try every
step one step is tried (``QMPCOMMIT_TEST_STRIDE``). What was left out is said at the end.
"""

from __future__ import annotations

from collections import Counter

import pytest

WHOLE = ("unit", "ground")
"""Folders of which all is run."""

EACH = 3
"""So many tests of any other file."""

LONG = 90.0
"""Seconds that a test may ask for and still be in the sample."""

_LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the sample."""
    taken: Counter[str] = Counter()
    seen: set[str] = set()
    quick = {str(item.path) for item in items if _limit(item) <= LONG}
    kept = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        file = str(item.path)
        if item.path.parent.name not in WHOLE:
            most = EACH if file in quick else 1
            if test in seen or taken[file] == most or (file in quick and _limit(item) > LONG):
                continue
            seen.add(test)
            taken[file] += 1
        kept.append(item)
    config.stash[_LEFT_OUT] = len(items) - len(kept)
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    left = terminalreporter.config.stash.get(_LEFT_OUT, 0)
    terminalreporter.write_line(f"a sample: {left} tests were left out")


def _limit(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark is not None and mark.args else 0.0
