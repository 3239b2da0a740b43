"""What a commit asks QEMU for, each with its reason: a read that is here twice has two of them.

What stands in one line goes over the wire at once, and is waited for once.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import run
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine

GRAPH = (
    "query-named-block-nodes",
    "query-block",
    "query-block-exports",
    "x-debug-query-block-graph",
)
OWNER = ("query-status", "query-migrate")

Trips = Sequence[tuple[tuple[str, ...], str]]

PLAN: Trips = [
    ((*OWNER, "query-jobs"), "may its disks be written; is an image created, once a connection"),
    (GRAPH, "the disk, its chain and who uses it: the plan and its checks are made from it"),
    (("blockdev-add",), "the disk is claimed, so that no two work on it"),
]
COPY: Trips = [
    ((*OWNER, *GRAPH), "right before it is sent, under the claim: is all as it was planned"),
    (("block-commit",), "the job"),
    (
        (*OWNER, "query-block"),
        "does the job copy what the device uses, and did no migration begin right before it:"
        " others may have been faster",
    ),
]
END: Trips = [
    (("query-jobs",), "has it concluded, and with which error"),
    (GRAPH, "which image is active: no end is believed before"),
    (("job-dismiss",), "its result is known"),
]
MARK: Trips = [
    (OWNER, "is no migration under way, whose destination has the stale layer open"),
    (("block-dirty-bitmap-add",), "the mark of that layer, which QEMU stores as it closes it"),
]
PIVOT: Trips = [
    *PLAN,
    *COPY,
    (("job-complete",), "the decision"),
    *END,
    *MARK,
    (("blockdev-del",), "the stale layer, which nothing uses in the graph that showed the end"),
    (("blockdev-del",), "the claim"),
]
KEEP: Trips = [
    *PLAN[:2],
    (("query-qmp-schema",), "can a job be kept, once a process of QEMU's"),
    *PLAN[2:],
    *COPY,
    (("block-job-cancel",), "the decision"),
    *END,
    (("blockdev-del",), "the claim"),
]
DELETING: Trips = [
    *(trip for trip in PIVOT[:-1] if trip not in MARK),
    (GRAPH, "which headers are above the base, now that the layer is closed"),
    (OWNER, "is no migration under way, whose destination has the file open"),
    (GRAPH, "does nothing use the file, right before it is unlinked"),
    PIVOT[-1],
]


class Counted:
    """The commands that a session sends, by how many answers each has waited for."""

    def __init__(self, vm: qc.Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trips: list[list[str]] = [[]]
        self._waited = 0
        self._execute: Callable[..., Awaitable[Any]] = vm._execute
        monkeypatch.setattr(vm, "_execute", self._counted)

    async def _counted(self, command: str, *more: Any) -> Any:
        mine = self._waited
        if mine == len(self.trips):
            self.trips.append([])
        self.trips[mine].append(command)
        try:
            return await self._execute(command, *more)
        finally:
            self._waited = max(self._waited, mine + 1)

    @property
    def found(self) -> list[tuple[str, ...]]:
        """What is asked together has no order."""
        return [tuple(sorted(trip)) for trip in self.trips]


def expected(trips: Trips) -> list[tuple[str, ...]]:
    return [tuple(sorted(commands)) for commands, _ in trips]


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is believed for a second is also where the machine is busy."""
    monkeypatch.setattr("qmpcommit.commit.job_seen.FRESH", 60.0)
    monkeypatch.setattr("qmpcommit.commit.in_use.FRESH", 60.0)
    monkeypatch.setattr("qmpcommit.commit.driver.HEARTBEAT", 60.0)


async def trips_of(
    qemu: Machine, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[tuple[str, ...]]:
    async with asyncio.timeout(60), qc.Session.connect(qemu.qmp) as vm:
        counted = Counted(vm, monkeypatch)
        outcome = await (await vm.commit("vda", **options)).wait()
        assert outcome.warnings == []
        return counted.found


async def test_a_pivot_waits_fourteen_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        assert await trips_of(qemu, monkeypatch, policy=qc.Pivot()) == expected(PIVOT)
        assert len(PIVOT) == 14
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_keep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        assert await trips_of(qemu, monkeypatch, policy=qc.Keep()) == expected(KEEP)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_pivot_that_deletes_looks_again_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        found = await trips_of(qemu, monkeypatch, policy=qc.Pivot(), delete=True)
        assert found == expected(DELETING)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_the_second_of_a_session_asks_for_less(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        await (await vm.commit("vda", policy=qc.Keep())).wait()
        counted = Counted(vm, monkeypatch)
        await (await vm.commit("vda", policy=qc.Pivot())).wait()
        assert counted.found == expected([((*OWNER, *GRAPH), "the plan"), *PIVOT[2:]])
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_the_command_asks_for_no_more(folder: Path) -> None:
    """As QEMU itself tells what it was sent."""
    chain: Chain = make_chain(folder)
    log = folder / "trace"
    async with machine(folder, chain, extra=["-trace", "handle_qmp_command", "-D", str(log)]) as q:
        done = await run("commit", q.qmp, "vda", "--pivot", "--quiet")
        assert done.status == 0, done.err
        await q.quit()
    asked = re.findall(r'"execute": "([^"]+)"', log.read_text())
    sent = asked[: len(asked) - asked[::-1].index("blockdev-del")]
    assert sorted(sent) == sorted(
        ["qmp_capabilities", *(command for commands, _ in PIVOT for command in commands)]
    )
    assert_disk(chain.base, chain.pictures[-1])
