"""What is done in PENDING, where a real QEMU does not fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qmpcommit.commit import facts
from qmpcommit.commit.in_pending import Care
from qmpcommit.commit.stale_layers import Around, nobody_met
from qmpcommit.errors import CommandRefused
from qmpcommit.qmp.monitor import Monitor
from tests.unit.test_checks import made


class Refusing(Monitor):
    """Refuses all that it is asked, but has no nodes."""

    connected = True

    async def execute(self, command: str, arguments: Any = None, **more: object) -> Any:
        if command.startswith("query-"):
            return []
        if command == "x-debug-query-block-graph":
            return {"nodes": [], "edges": []}
        raise CommandRefused("refused", error_class="GenericError", desc="no such driver")


async def test_a_barrier_that_breaks_undoes_the_decision_and_holds_no_disk() -> None:
    async def barrier() -> str | None:
        raise ZeroDivisionError("their own")

    _, plan = made()
    prepared = await Care(Refusing("/nowhere"), plan, Around(barrier=barrier)).prepare(keeps=True)
    assert prepared == facts.Prepared("the barrier failed: ZeroDivisionError('their own')")


async def test_a_member_of_a_group_that_is_taken_up_alone_is_undone() -> None:
    _, plan = made()
    around = Around(barrier=nobody_met)
    prepared = await Care(Refusing("/nowhere"), plan, around).prepare(keeps=True)
    assert isinstance(prepared, facts.Prepared)
    assert "one of a group" in str(prepared.error)


@pytest.mark.parametrize("read_only", [True, False])
async def test_a_base_that_qemu_closes_for_writing_need_not_be_flushed(read_only: bool) -> None:
    _, plan = made(top="mid")
    plan = replace(plan, base=replace(plan.base, read_only=read_only))
    care = Care(Refusing("/nowhere"), plan, Around())
    assert await care.prepare(keeps=True) == facts.Prepared()
    assert care.unflushed == (None if read_only else "no such driver")
