"""A group whose process is killed anywhere goes on from its ledger: all of its disks or none."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import qmpcommit as qc
from qmpcommit.commit.claim import node_of, owners_of
from qmpcommit.group.resume import ResumableGroup
from tests.ground import forked
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.places import STRIDE, first
from tests.ground.sessions import runs

pytestmark = pytest.mark.timeout(900)

KILLABLE = "tests.real.killable_group_commit"
KINDS = {
    "pivot": ("pivot", "pivot"),
    "keep": ("keep", "keep"),
    "recycle": ("recycle", "recycle"),
    "mixed": ("recycle", "keep"),
    "abort": ("pivot", "abort"),
}


class Two(NamedTuple):
    """Two VMs with a disk each, and what their group does with these."""

    folder: Path
    kinds: tuple[str, str]
    freeze: str | None
    chains: list[Chain]
    qemus: list[Machine]

    @property
    def ledger(self) -> Path:
        """The file of its notes."""
        return self.folder / "ledger"

    async def run(self, place: int, how: str = "begin", **more: Any) -> tuple[int, list[str], str]:
        """Until it dies at that place: its status, the places it passed, what it said."""
        places = self.folder / "places"
        places.unlink(missing_ok=True)
        policies: list[dict[str, Any]] = [
            {"kind": kind, "overlay": str(chain.top.parent / "new")}
            if kind == "recycle"
            else {"kind": kind}
            for kind, chain in zip(self.kinds, self.chains, strict=True)
        ]
        work = {"vms": [q.qmp for q in self.qemus], "policies": policies, "freeze": self.freeze}
        work |= more
        words = [json.dumps(work), str(self.ledger), str(place), str(places), how]
        status, said = await forked.run(KILLABLE, *words)
        passed = places.read_text().splitlines() if places.exists() else []
        assert status in (0, -signal.SIGKILL), (passed[-3:], said)
        return status, passed, said

    @property
    def outcome(self) -> qc.GroupOutcome:
        """What the last of them came to."""
        return qc.GroupOutcome.model_validate_json((self.folder / "outcome").read_text())


@asynccontextmanager
async def two_of(folder: Path, kind: str, freeze: str | None = None) -> AsyncIterator[Two]:
    """Two VMs whose guests run."""
    async with AsyncExitStack() as stack:
        chains, qemus = [], []
        for name in ("one", "other"):
            (folder / name).mkdir(parents=True)
            chains.append(make_chain(folder / name))
            qemus.append(
                await stack.enter_async_context(machine(folder / name, chains[-1], running=True))
            )
        yield Two(folder, KINDS[kind], freeze, chains, qemus)


async def died(
    folder: Path, kind: str, place: int, again: int | None, freeze: str | None = None
) -> bool:
    """Whether it was killed at that place, and once more while it was gone on with."""
    async with two_of(folder, kind, freeze) as two:
        status, places, _ = await two.run(place)
        where = places[-1]
        if again is not None and status and two.ledger.exists():
            _, places, _ = await two.run(again, "resume")
            where = f"{where}, {places[-1] if places else ''}"
        begun = two.ledger.exists()
        if begun:
            assert (await two.run(0, "resume"))[0] == 0, where
            outcome = two.outcome
            actions = list(two.kinds) if kind != "abort" else ["abort", "abort"]
            assert [each.action for each in outcome.outcomes] == actions, where
            assert outcome.decided_by == "policy", where
        else:
            assert status
        for qemu, chain, ends in zip(two.qemus, two.chains, two.kinds, strict=True):
            async with qc.Session.connect(qemu.qmp) as vm:
                assert await vm.execute("query-jobs") == [], where
                assert await runs(vm), where
                (disk,) = await vm.disks()
                fresh = chain.top.parent / "new"
                expected = {"pivot": chain.base, "recycle": fresh}.get(ends, chain.top)
                active = expected if begun and kind != "abort" else chain.top
                assert disk.chain[0].filename == str(active), where
                nodes = await vm.execute("query-named-block-nodes")
                if begun:  # else the claims of a dead process hold nobody up
                    named = [node["node-name"] for node in nodes]
                    assert not [name for name in named if "claim" in name], where
                    assert not [name for name in named if "paused" in name], where
                    assert fresh.exists() == (active == fresh), where
            await qemu.quit()
            assert_disk(active, chain.pictures[-1])
            if begun and kind != "abort":
                assert_disk(chain.base, chain.pictures[-1])
            gone = begun and kind != "abort" and ends in ("pivot", "recycle")
            assert chain.top.exists() != gone, where
    return status != 0


@pytest.mark.parametrize(
    ("kind", "freeze"),
    [("pivot", None), ("keep", "pause"), ("recycle", None), ("mixed", "pause"), ("abort", None)],
)
async def test_killed_anywhere_a_group_goes_on_from_its_ledger(
    kind: str, freeze: str | None, folder: Path
) -> None:
    place, killed = first() - STRIDE, True
    count = 0
    while killed:
        place += STRIDE
        killed = await died(folder / str(place), kind, place, None, freeze)
        count += killed
    print(f"{kind}: killed at {count} places")
    assert count >= 24 // STRIDE


@pytest.mark.parametrize("kind", ["pivot", "mixed"])
async def test_killed_again_while_a_group_goes_on(kind: str, folder: Path) -> None:
    """The second process too, at each of its places."""
    for place in range(first(), 90, max(STRIDE, 11)):
        for again in range(first(), 24, max(STRIDE, 7)):
            if not await died(folder / f"{place}-{again}", kind, place, again):
                return


async def test_what_the_dead_have_claimed_is_free_though_it_is_called_otherwise(
    folder: Path,
) -> None:
    async with two_of(folder, "pivot") as two:
        await two.run(20)
        async with qc.Session.connect(two.qemus[0].qmp) as vm:
            (owner,) = await owners_of(vm)
            other = replace(owner, disk="0123456789", node="qmpc-0123456789n00000000.commit")
            await vm.execute("blockdev-add", node_of(other))
            assert len(await owners_of(vm)) == 2
        await qc.resume(qc.FileLedger(two.ledger), [qemu.qmp for qemu in two.qemus])
        for qemu, chain in zip(two.qemus, two.chains, strict=True):
            async with qc.Session.connect(qemu.qmp) as vm:
                assert await owners_of(vm) == []
            await qemu.quit()
            assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("kind", ["pivot", "keep"])
@pytest.mark.parametrize("commands", [["job-cancel"], ["job-cancel", "job-dismiss"], []])
async def test_a_group_is_not_split_whose_member_was_cancelled_while_its_end_was_noted(
    kind: str, commands: list[str], folder: Path
) -> None:
    """And who began it was killed before it could note that all are cancelled for that."""
    async with two_of(folder, kind) as two:
        status, places, _ = await two.run(0, meanwhile=[two.qemus[1].qmp2, *commands])
        assert (status, places[-1]) == (-signal.SIGKILL, "after note finalize")
        ledger = qc.FileLedger(two.ledger)
        vms = [qemu.qmp for qemu in two.qemus]
        if commands:
            # Of a job that is gone nobody knows that it was not kept; a pivot would be seen.
            unknown = kind == "keep" and "job-dismiss" in commands
            error = qc.GroupSplit if unknown else qc.GroupFailed
            for _ in range(2):  # the second time it had ended so
                with pytest.raises(error, match="the process that held its disks ended before"):
                    await qc.resume(ledger, vms)
        else:
            outcome = await qc.resume(ledger, vms)
            assert isinstance(outcome, qc.GroupOutcome)
            assert outcome.action == kind
        pivoted = kind == "pivot" and not commands
        for qemu, chain in zip(two.qemus, two.chains, strict=True):
            async with qc.Session.connect(qemu.qmp) as vm:
                assert await vm.execute("query-jobs") == []
                (disk,) = await vm.disks()
                assert disk.chain[0].filename == str(chain.base if pivoted else chain.top)
            await qemu.quit()
            assert_disk(chain.base if pivoted else chain.top, chain.pictures[-1])


async def test_what_a_group_needs_to_go_on_is_asked_for(folder: Path) -> None:
    asked: list[str] = []
    held = asyncio.Event()

    async def policy(ready: qc.Ready) -> qc.Keep:
        asked.append(ready.job_id)
        if len(asked) == 1:
            held.set()
            await asyncio.Event().wait()
        return qc.Keep()

    async def hook(outcome: qc.CommitOutcome) -> None:
        raise AssertionError("none pivots")

    async with two_of(folder, "keep") as two:
        vms = [await qc.Session.connect(qemu.qmp) for qemu in two.qemus]
        members = [(vm, "vda") for vm in vms]
        group = ResumableGroup(
            members,
            policy=policy,
            on_pivot=hook,
            ledger=qc.FileLedger(two.ledger),
        )
        await group.start()
        await held.wait()
        other = qc.GroupCommit(members, policy=qc.Keep(), ledger=qc.FileLedger(two.ledger))
        with pytest.raises(qc.QmpCommitError):
            await other.run()
        await group.leave()  # as if killed
        for vm in vms:
            await vm.release()
        ledger = qc.FileLedger(two.ledger)
        async with AsyncExitStack() as stack:
            vms = [
                await stack.enter_async_context(qc.Session.connect(qemu.qmp)) for qemu in two.qemus
            ]
            with pytest.raises(qc.InvalidRequest, match="none of the VMs that were named"):
                await qc.resume(ledger, vms[:1])
            with pytest.raises(qc.InvalidRequest, match="was begun with an on_pivot"):
                await qc.resume(ledger, vms, policy=policy)
            with pytest.raises(qc.InvalidRequest, match=r"a policy .* was a callable"):
                await qc.resume(ledger, vms, on_pivot=hook)
            with pytest.raises(qc.InvalidRequest, match=r"a group, not a commit: .* qc\.resume"):
                await vms[0].resume(ledger)
            # In any order, and once more when it has ended.
            outcome = await qc.resume(ledger, vms[::-1], policy=policy, on_pivot=hook)
            assert isinstance(outcome, qc.GroupOutcome)
            assert (outcome.action, len(asked)) == ("keep", 2)
            assert [each.vm for each in outcome.outcomes] == [vm.name for vm in vms]
            assert await qc.resume(ledger, vms) == outcome
        for qemu in two.qemus:
            await qemu.quit()
    for chain in two.chains:
        assert_disk(chain.top, chain.pictures[-1])
        assert_disk(chain.base, chain.pictures[-1])
