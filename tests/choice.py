"""What of the block-job tests CI runs on QEMUs other than the machine's own: what can differ there.

A plugin of pytest (``-p tests.choice``). A new module is run on all QEMUs unless it is named here;
of a test with several cases one is run, another one each time; and on one that is neither the
oldest nor the newest, which differ most, every other test. ``tests/run.sh --all-qemu`` and
``--full`` run all of it on all of them.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict

import pytest

BETWEEN = ("-trixie",)
"""Suffixes of QEMUs that are neither the oldest nor the newest."""

OURS_ALONE = {
    "test_agent": "the other side is a guest agent of ours",
    "test_cancelled": "who is cancelled is our process, at each of its own steps",
    "test_cycle_group": "QEMU is asked what test_cycle and test_group ask it",
    "test_driver": "answers are refused and lines broken by a proxy of ours",
    "test_file_ledger": "who is killed is our process, at each of its own steps",
    "test_floods": "the other side is a monitor of ours",
    "test_group_freeze": "the agents are ours, and QEMU is asked what test_group asks it",
    "test_group_freeze_killed": "who is killed is our process, at each of its own steps",
    "test_group_policies": "who decides for a group is on this side of the monitor",
    "test_job": "hooks, deadlines and callers are on this side of the monitor",
    "test_job_ids": "ids are compared on this side of the monitor",
    "test_monitor": "the other side is a monitor of ours, or a line that breaks",
    "test_shared_client": "who owns the connection is decided on this side of it",
    "test_told": "words are chosen on this side of the monitor",
    "test_two_owners": "pauses are counted on this side of the monitor",
    "test_window_killed": "who is killed is our process, at each of its own steps",
    "test_window_recovery": "what was noted is read on this side of the monitor",
    "test_window_remains": "what is left of a window is judged on this side of the monitor",
}
"""Modules of tests/real in which QEMU is only asked what others ask it too, and why."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is the same everywhere."""
    cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent.name != "real" or item.path.stem not in OURS_ALONE:
            cases[item.nodeid.partition("[")[0]].append(item)
    chosen = {random.choice(several).nodeid for several in cases.values()}
    if os.environ.get("QMPCOMMIT_TEST_QEMU_SUFFIX") in BETWEEN:
        chosen = set(random.sample(sorted(chosen), len(chosen) // 2))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]
