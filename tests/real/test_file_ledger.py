"""A commit whose process is killed anywhere goes on from its ledger, and ends as it was to end."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground import forked
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.places import STRIDE, first
from tests.ground.sessions import runs

pytestmark = pytest.mark.timeout(900)

KILLABLE = "tests.real.killable_commit"


class Killable:
    """Processes with one commit of a machine's disk, and its ledger."""

    def __init__(self, folder: Path, qemu: Machine, policy: dict[str, Any]) -> None:
        self._folder, self._qemu, self._policy = folder, qemu, policy
        self.ledger = folder / "ledger"

    async def run(self, place: int, how: str = "begin") -> tuple[int, list[str]]:
        """Until it dies at that place: its status, the places it passed."""
        places = self._folder / "places"
        places.unlink(missing_ok=True)
        words = [self._qemu.qmp, str(self.ledger), json.dumps(self._policy), str(place)]
        status, _ = await forked.run(KILLABLE, *words, str(places), how)
        assert status in (0, -signal.SIGKILL)
        return status, places.read_text().splitlines() if places.exists() else []

    @property
    def outcome(self) -> qc.CommitOutcome:
        """What the last of them came to."""
        return qc.CommitOutcome.model_validate_json((self._folder / "outcome").read_text())


def expected(kind: str, folder: Path, chain: Chain) -> Path:
    """What the guest writes to in the end."""
    return {"pivot": chain.base, "keep": chain.top, "abort": chain.top}.get(kind, folder / "new")


def policy_of(kind: str, folder: Path) -> dict[str, Any]:
    """The policy of that kind."""
    if kind in ("recycle", "unused"):
        kind = "recycle"
        return {"kind": kind, "overlay": str(folder / "new")}
    if kind == "hold":
        return {"kind": kind, "timeout": 0.5, "otherwise": policy_of("recycle", folder)}
    return {"kind": kind}


async def bitmaps_of(vm: qc.Session) -> set[str]:
    """The names of the active layer's."""
    (disk,) = await vm.disks()
    nodes = await vm.execute("query-named-block-nodes", {"flat": True})
    (active,) = [node for node in nodes if node["node-name"] == disk.chain[0].node_name]
    return {bitmap["name"] for bitmap in active.get("dirty-bitmaps", ())}


async def died(folder: Path, kind: str, place: int, again: int | None) -> bool:
    """Whether it was killed at that place, and once more while it was gone on with."""
    folder.mkdir()
    chain = make_chain(folder)
    unused = kind == "unused"
    daemon = storage_daemon(folder, chain, export=False)
    async with daemon if unused else machine(folder, chain, running=True) as qemu:
        process = Killable(folder, qemu, policy_of(kind, folder))
        async with qc.Session.connect(qemu.qmp) as vm:
            node = (await vm.disks())[0].chain[0].node_name
            await vm.execute("block-dirty-bitmap-add", {"node": node, "name": "b"})
        status, places = await process.run(place)
        where = places[-1]
        if again is not None and status and process.ledger.exists():
            _, places = await process.run(again, "resume")
            where = f"{where}, {places[-1] if places else ''}"
        if process.ledger.exists():
            assert process.ledger.stat().st_mode & 0o777 == 0o600
            assert (await process.run(0, "resume"))[0] == 0, where
            outcome = process.outcome
            expects = "recycle" if kind in ("hold", "unused") else kind
            assert outcome.action == expects, where
            assert outcome.decided_by == ("hold expired" if kind == "hold" else "policy"), where
        else:  # nothing was begun
            assert status
            async with qc.Session.connect(qemu.qmp) as vm:
                with pytest.raises(qc.JobNotFound, match="none was begun"):
                    await vm.resume(qc.FileLedger(process.ledger))
        async with qc.Session.connect(qemu.qmp) as vm:
            assert await vm.execute("query-jobs") == [], where
            assert unused or await runs(vm), where
            (disk,) = await vm.disks()
            active = expected(kind, folder, chain) if process.ledger.exists() else chain.top
            assert disk.chain[0].filename == str(active), where
            assert await bitmaps_of(vm) == {"b"}, where
            named = {node["node-name"] for node in await vm.execute("query-named-block-nodes")}
            if process.ledger.exists():  # else the claim of a dead process holds nobody up
                assert not [name for name in named if "claim" in name], where
        await qemu.quit()
    assert_disk(active, chain.pictures[-1])
    if kind != "abort" and process.ledger.exists():
        assert_disk(chain.base, chain.pictures[-1])
    gone = kind not in ("abort", "keep") and process.ledger.exists()
    assert chain.top.exists() != gone, where
    assert not list(folder.glob("ledger.*")) or status, where
    return status != 0


@pytest.mark.parametrize("kind", ["pivot", "keep", "abort", "recycle", "hold", "unused"])
async def test_killed_anywhere_it_goes_on_from_the_ledger(kind: str, folder: Path) -> None:
    place, killed = first() - STRIDE, True
    count = 0
    while killed:
        place += STRIDE
        killed = await died(folder / str(place), kind, place, None)
        count += killed
    print(f"{kind}: killed at {count} places")
    assert count >= 12 // STRIDE


@pytest.mark.parametrize("kind", ["pivot", "recycle"])
async def test_killed_again_while_it_goes_on(kind: str, folder: Path) -> None:
    """The second process too, at each of its places."""
    for place in range(first(), 40, max(STRIDE, 7)):
        for again in range(first(), 12, max(STRIDE, 5)):
            if not await died(folder / f"{place}-{again}", kind, place, again):
                return


# -- what can't be gone on with --------------------------------------------------------------------


async def test_what_no_ledger_holds_is_to_be_given_again(folder: Path) -> None:
    chain = make_chain(folder)
    called: list[str] = []
    asked = asyncio.Event()

    async def policy(ready: qc.Ready) -> qc.Pivot:
        if not asked.is_set():
            asked.set()
            await asyncio.Event().wait()
        return qc.Pivot()

    async def hook(outcome: qc.CommitOutcome) -> None:
        called.append("hook")

    ledger = qc.FileLedger(folder / "ledger")
    async with machine(folder, chain) as qemu:
        vm = await qc.Session.connect(qemu.qmp)
        job = await vm.commit("vda", policy=policy, on_pivot=hook, delete=True, ledger=ledger)
        await asked.wait()
        await vm.release()  # as if killed
        again = qc.FileLedger(folder / "ledger")
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.InvalidRequest, match=r"policy of job .* was a callable"):
                await vm.resume(again, on_pivot=hook)
            with pytest.raises(qc.InvalidRequest, match="was begun with an on_pivot"):
                await vm.resume(again, policy=policy)
            job = await vm.resume(again, policy=policy, on_pivot=hook)
            outcome = await job.wait()
            assert (outcome.action, outcome.hook) == ("pivot", "done")
            assert called[-1] == "hook"
            again.remove()
            assert not (folder / "ledger").exists()
        await qemu.quit()
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_commit_does_not_begin_over_the_notes_of_another(folder: Path) -> None:
    chain = make_chain(folder)
    ledger = folder / "ledger"
    async with machine(folder, chain) as qemu:
        vm = await qc.Session.connect(qemu.qmp)
        for _ in range(2):  # one that has ended is replaced
            job = await vm.commit("vda", policy=qc.Keep(), ledger=qc.FileLedger(ledger))
            assert (await job.wait()).warnings == []
        held = json.loads(ledger.read_text())
        held["commit"]["over"] = False
        ledger.write_text(json.dumps(held))
        with pytest.raises(qc.CommitFailed, match="holds a commit that has not ended"):
            await vm.commit("vda", policy=qc.Pivot(), ledger=qc.FileLedger(ledger))
        assert await vm.execute("query-jobs") == []
        await vm.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"qmpcommit": 2, "commit": {}}', "\x00"])
async def test_a_damaged_ledger_is_told_and_left(text: str, folder: Path) -> None:
    chain = make_chain(folder)
    path = folder / "ledger"
    path.write_text(text)
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.InvalidRequest, match="is no ledger of this version"):
                await vm.resume(qc.FileLedger(path))
            with pytest.raises(qc.CommitFailed, match="Nothing was sent"):
                await vm.commit("vda", policy=qc.Pivot(), ledger=qc.FileLedger(path))
            with pytest.raises(qc.InvalidRequest, match="no ledger to resume from"):
                await vm.resume(object())  # type: ignore[arg-type]
        await qemu.quit()
    assert path.read_text() == text
    assert_disk(chain.top, chain.pictures[-1])


async def test_what_holds_something_else_is_gone_on_with_elsewhere(folder: Path) -> None:
    chain = make_chain(folder)
    group = folder / "group"
    await qc.FileLedger(group).note("begin", kind="group", known_as="0a", value={})
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            with pytest.raises(qc.InvalidRequest, match=r"a group, not a commit: .* qc\.resume"):
                await vm.resume(qc.FileLedger(group))
            with pytest.raises(qc.CommitFailed, match="holds a group that has not ended"):
                await vm.commit("vda", policy=qc.Pivot(), ledger=qc.FileLedger(group))
            with pytest.raises(qc.JobNotFound, match="the ledger holds nothing"):
                await qc.resume(qc.FileLedger(folder / "none"), [vm])
            job = await vm.commit("vda", policy=qc.Hold(), ledger=qc.FileLedger(folder / "ledger"))
            await job.ready()
            await vm.release()  # as if killed
        ledger = qc.FileLedger(folder / "ledger")
        with pytest.raises(qc.InvalidRequest, match="none of the VMs that were named"):
            await qc.resume(ledger, [])
        outcome = await qc.resume(ledger, qemu.qmp, policy=qc.Pivot())
        assert isinstance(outcome, qc.CommitOutcome)
        assert outcome.action == "pivot"
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
