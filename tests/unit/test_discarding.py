"""What is begun of a discard in a VM that goes away in the middle of it."""

from __future__ import annotations

from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.cycles import discarding as discarding_module
from qmpcommit.daemon.cycle_discarding import Discards
from qmpcommit.daemon.cycle_round import Round
from qmpcommit.wire.cycle import Cycle
from tests.unit.test_overlay_asked import CYCLE


async def test_a_vm_that_is_away_is_settled_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unknown: Any = None
    found = Round("a", Cycle.model_validate(CYCLE), unknown)

    async def away(exchanges: object) -> object:
        assert found.exchanging == {"a"}
        raise qc.MonitorLost("lost", vm="a")

    monkeypatch.setattr(discarding_module, "put_back", away)
    with pytest.raises(qc.MonitorLost):
        await Discards(unknown).settle(found, "a", unknown)
    assert found.exchanging == set()
