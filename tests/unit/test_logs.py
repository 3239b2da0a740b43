"""The daemon's log is of bounded length, whatever others say."""

from __future__ import annotations

import time
from typing import Any

import pytest
import structlog

from qmpcommit.daemon import logs


def test_what_others_say_is_told_up_to_a_length() -> None:
    trace = "\n".join(["here", "x" * 9999, "there"])
    facts = {"event": "e", "why": "w" * 9999, "all": ["l" * 9999], "count": 7, "where": trace}
    told = logs.shorten(None, "info", facts)
    assert told["why"] == f"{'w' * logs.TOLD}... (9999 characters)"
    assert len(told["all"]) < logs.TOLD + 40
    assert (told["event"], told["count"]) == ("e", 7)
    first, second, third = told["where"].splitlines()
    assert (first, third) == ("here", "there")
    assert len(second) < logs.TOLD + 40


def test_lines_that_are_alike_are_told_so_often_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [600.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bound = logs._NotTooMany()

    def told(method: str = "info", **facts: Any) -> bool:
        try:
            return bool(bound(None, method, {"event": "vm_lost", **facts}))
        except structlog.DropEvent:
            return False

    assert sum(told(vm="evil") for _ in range(500)) == logs.ALIKE
    assert told(vm="good"), "another VM's"
    assert told("debug", vm="evil"), "who asks for details gets them"
    now[0] += 60
    first = bound(None, "info", {"event": "vm_lost", "vm": "evil"})
    assert first["left_out"] == 500 + 1 - logs.ALIKE
    assert "left_out" not in bound(None, "info", {"event": "vm_lost", "vm": "evil"})
