"""What the daemon does of a discard on one VM that goes away in the middle of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.daemon.cycle_discarding import Discarding


async def test_a_vm_that_is_away_is_settled_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unknown: Any = None
    discarding = Discarding(unknown)
    begun = SimpleNamespace(running=True, over=False)
    found: Any = SimpleNamespace(parts=[], vms=["a", "b"], decided="back", exchanging=set())
    vm: Any = SimpleNamespace(name="a", identity="1")

    async def away(exchanges: object) -> object:
        assert found.exchanging == {"a"}
        raise qc.MonitorLost("lost", vm="a")

    monkeypatch.setattr(discarding, "_exchanges", lambda found, held: [begun])
    monkeypatch.setattr(discarding, "_claim", away)
    with pytest.raises(qc.MonitorLost):
        await discarding.settle(found, vm, unknown)
    assert found.exchanging == set()
