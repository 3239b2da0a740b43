"""Tests that are shared out: none is run twice, and none is lost without a word."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.crew import Crew

MANY = """
import pytest

@pytest.mark.parametrize("n", range(20))
def test_it(n):
    with open({ran!r}, "a") as file:
        file.write(f"{{n}}\\n")
    assert n != 7
"""
DIES = """
import os

def test_first(): pass
def test_that_dies(): os._exit(0)
def test_that_was_claimed(): pass
"""


def test_each_is_run_once(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "test_many.py").write_text(MANY.format(ran=str(ran)))
    crew = Crew([], [str(folder)])
    crew.work(2)
    assert sorted(map(int, ran.read_text().split())) == list(range(20))
    assert crew.failed == ["test_many.py::test_it[7]"]
    assert "19 passed, 1 failed" in crew.summary(1.0)


def test_what_was_lost_with_its_pytest_has_failed(folder: Path) -> None:
    (folder / "test_dies.py").write_text(DIES)
    crew = Crew([], [str(folder)])
    crew.work(1)
    assert Counter(crew.ends.values()) == {"passed": 1, "failed": 2}
