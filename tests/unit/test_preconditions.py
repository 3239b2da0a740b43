"""What QEMU must be able to do, and what must be idle, before a commit is sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

import qmpcommit as qc
from qmpcommit.commit.preconditions import carrying_of, check_abilities
from qmpcommit.qmp.monitor import Monitor
from tests.unit.test_checks import layer, made


class Old:
    """A monitor of a QEMU without some arguments, which sees our files."""

    peer_pid = os.getpid()

    def __init__(self, *lacks: str) -> None:
        self.lacks = lacks

    async def features(self) -> Old:
        return self

    def has_argument(self, command: str, name: str) -> bool:
        return f"{command} {name}" not in self.lacks


async def check(policy: Any, *lacks: str, **arguments: Any) -> None:
    _, plan = made()
    plan = replace(plan, policy=policy, arguments={**plan.arguments, **arguments})
    monitor = cast(Monitor, Old(*lacks))
    await check_abilities(monitor, plan, "running", cwd=None, private=False)


async def test_a_keep_is_refused_early_where_nothing_could_do_it() -> None:
    with pytest.raises(qc.CommitFailed, match=r"no block-job-cancel with 'force'.*pivot instead"):
        await check(qc.Keep(), "block-job-cancel force")
    await check(qc.Keep())
    await check(qc.Pivot(), "block-job-cancel force")


async def test_a_mask_is_refused_early_where_qemu_has_none() -> None:
    lacks, mask = "block-commit backing-mask-protocol", {"backing-mask-protocol": True}
    with pytest.raises(qc.InvalidRequest, match=r"QEMU 9\.0"):
        await check(qc.Pivot(), lacks, **mask)
    await check(qc.Pivot(), **mask)
    await check(qc.Pivot(), lacks)


@pytest.mark.parametrize("of", [
    lambda recycle: recycle,
    lambda recycle: qc.Hold(otherwise=recycle),
    lambda recycle: qc.Check(["true"], passed=recycle),
    lambda recycle: qc.Check(["true"], failed=recycle),
], ids=["itself", "hold", "passed", "failed"])  # fmt: skip
async def test_an_overlay_that_can_not_be_made_is_refused_early(
    of: Callable[[qc.Recycle], Any], tmp_path: Path
) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(qc.InvalidRequest, match="exists already"):
        await check(of(qc.Recycle(str(tmp_path / "there"))))
    with pytest.raises(qc.InvalidRequest, match="there is no folder"):
        await check(of(qc.Recycle(str(tmp_path / "none" / "new"))))
    await check(of(qc.Recycle(str(tmp_path / "new"))))


@pytest.mark.parametrize("busy", [True, False])
def test_a_bitmap_that_a_backup_uses_is_waited_for_by_the_caller(busy: bool) -> None:
    top = layer("top")
    bitmap = {"name": "b", "count": 0, "granularity": 65536, "recording": True, "busy": busy}
    top["dirty-bitmaps"] = [{**bitmap, "persistent": True}]
    graph, plan = made(top)
    if not busy:
        carrying = carrying_of(graph, plan)
        assert carrying is not None
        assert list(carrying.names) == ["b"]
        return
    with pytest.raises(qc.JobConflict, match=r"bitmap 'b' of top is busy.*Nothing was sent"):
        carrying_of(graph, plan)
