"""How a group comes to its decisions, with members that do what they are told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.policy import Settled
from qmpcommit.group.machine import Recorded
from qmpcommit.group.policy import Deciding
from qmpcommit.group.run import GroupCommit

FAILED = qc.CommitFailed("no space")


class Member:
    """A commit that is READY, or ends before with `error`."""

    def __init__(self, disk: str, error: Exception | None = None) -> None:
        image = qc.Image("node", "file", "qcow2")
        self.id = f"job-{disk}"
        self.plan = SimpleNamespace(vm="vm", disk=SimpleNamespace(name=disk), base=image, top=image)
        self.state = SimpleNamespace(done=7)
        self._error = error

    async def reached(self) -> bool:
        return self._error is None


def deciding(
    one: Any = None, *each: Any
) -> tuple[Deciding, list[tuple[int, Settled]], list[BaseException]]:
    decided: list[tuple[int, Settled]] = []
    failed: list[BaseException] = []
    found = Deciding(
        one, each, lambda number, settled: decided.append((number, settled)), failed.append
    )
    return found, decided, failed


async def broken(ready: qc.Ready) -> qc.Pivot:
    raise LookupError(ready.disk)


@pytest.mark.parametrize("own", [False, True])
async def test_nothing_is_decided_for_who_ends_before_it_is_ready(own: bool) -> None:
    members: Any = [Member("vda"), Member("vdb", FAILED)]
    asking, decided, failed = deciding(*((None, qc.Keep(), qc.Keep()) if own else (qc.Keep(),)))
    await asking.ask(members)
    assert [number for number, _ in decided] == ([0] if own else [])
    assert failed == []


@pytest.mark.parametrize("own", [False, True])
async def test_a_policy_that_fails_decides_nothing(own: bool) -> None:
    members: Any = [Member("vda"), Member("vdb")]
    asking, decided, failed = deciding(*((None, qc.Keep(), broken) if own else (broken,)))
    await asking.ask(members)
    assert decided == ([(0, Settled(qc.Keep(), "policy"))] if own else [])
    assert [repr(error) for error in failed] == [f"LookupError('{'vdb' if own else 'vda'}')"]


async def test_what_the_caller_decides_before_the_policy_is_asked_is_not_lost() -> None:
    members: Any = [Member("vda"), Member("vdb")]
    asking, decided, failed = deciding(qc.Hold())
    assert not asking.called
    asking.call(qc.Pivot())
    assert asking.called
    async with asyncio.timeout(10):
        await asking.ask(members)
    assert decided == [(n, Settled(qc.Pivot(), "caller")) for n in (0, 1)]
    assert failed == []


# -- the decision is written down while all disks are held -----------------------------------------


class Silent:
    """A VM that answers nothing."""

    async def query_jobs(self) -> list[Any]:
        await asyncio.Event().wait()
        return []


async def never(jobs: list[str]) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("on_decision", [None, never])
async def test_nothing_holds_the_disks_for_longer_than_they_may_be(on_decision: Any) -> None:
    group: Any = object.__new__(GroupCommit)
    told: list[Recorded] = []
    group.__dict__ |= {
        "state": SimpleNamespace(hold_limit=0.01), "book": None, "_on_decision": on_decision,
        "members": [SimpleNamespace(vm=Silent())], "jobs": [Member("vda")], "_tell": told.append,
    }  # fmt: skip
    async with asyncio.timeout(10):
        await group._written_down()
    (recorded,) = told
    assert (recorded.why == "") is (on_decision is None)
