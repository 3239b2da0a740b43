"""Two who want one disk: one has it, and the other is told who that is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.flush import flush
from qmpcommit.commit import claim as claims
from qmpcommit.commit.claim import (
    Owner,
    clear_left,
    node_of,
    number_of,
    owners_of,
    take,
    take_if_free,
)
from qmpcommit.commit.request import Request
from qmpcommit.commit.stale_layers import Around
from tests.ground.images import Chain, assert_disk, create, make_chain
from tests.ground.machines import storage_daemon
from tests.ground.proxy import Strike, proxy
from tests.ground.sessions import files

DEAD = 2**22
"""No process has that number."""


@asynccontextmanager
async def two(folder: Path, *names: str) -> AsyncIterator[tuple[qc.Session, qc.Session, Chain]]:
    """Two sessions with one storage daemon; at the end no disk is claimed."""
    chain = make_chain(folder, len(names) or 2, names=names or ("base", "top"))
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm, qc.Session.connect(qemu.qmp2) as other:
            yield vm, other, chain
            assert await owners_of(vm) == []
        await qemu.quit()


async def leave(vm: qc.Session, **facts: Any) -> Owner:
    """What somebody else's claim is to us."""
    here, disk = claims.here(), await vm.disk("export0")
    number = number_of(disk)
    node = f"qmpc-{number}n00000000.{facts.get('verb', 'commit')}"
    owner = Owner(number, node, "00000000", "commit", here.pid, here.began, here.place, 1)
    owner = replace(owner, **facts)
    await vm.execute("blockdev-add", node_of(owner))
    return owner


VERBS: dict[str, Any] = {
    "commit": lambda vm, disk: vm.commit(disk, policy=qc.Keep()),
    "plan": lambda vm, disk: vm.plan(disk, policy=qc.Keep()),
    "group": lambda vm, disk: vm.commit_group({disk: qc.Keep()}),
    "flatten": lambda vm, disk: vm.flatten(disk, keep=2),
    "window": lambda vm, disk: vm.snapshot([disk]).__aenter__(),
    "close": lambda vm, disk: vm.close_windows(),
}


async def test_whoever_comes_second_is_told_of_the_first(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        async with vm.snapshot(["export0"]) as window:
            before = await files(vm)
            for verb, call in VERBS.items():
                with pytest.raises(qc.JobConflict, match="a snapshot window of this very") as told:
                    await call(other, "export0")
                owner: Any = told.value.facts["owner"]
                assert (owner["verb"], owner["alive"]) == ("window", True), verb
            assert await files(vm) == before
        assert [each.action for each in window.outcomes] == ["pivot"]
    assert_disk(chain.top, chain.pictures[-1])


async def test_two_at_once_are_one_and_a_conflict(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        request = Request("export0", qc.Hold())
        jobs = [await s.prepare(request, Around()) for s in (vm, other)]
        launched = (s.launch(job) for s, job in zip((vm, other), jobs, strict=True))
        ends = await asyncio.gather(*launched, return_exceptions=True)
        (job,) = [end for end in ends if isinstance(end, qc.CommitJob)]
        (conflict,) = [end for end in ends if isinstance(end, qc.JobConflict)]
        assert "held by a commit of this very process" in str(conflict)
        await job.ready()
        await job.keep()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_was_left_is_cleared_once_by_many_at_a_time(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        for number in ("0000000001", "0000000002", "0000000003"):
            node = f"qmpc-{number}n00000000.flat"
            vm.left_claims.append(await leave(other, disk=number, node=node))
        await asyncio.gather(*(clear_left(vm) for _ in range(3)))
        assert await owners_of(vm) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_many_are_released_although_that_is_cancelled(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        disk = await vm.disk("export0")
        disks = [replace(disk, exports=(name,)) for name in ("a", "b")]
        held = [await take(vm, each, "flat", looked=True) for each in disks]
        assert len(await owners_of(other)) == 2
        releasing = asyncio.create_task(claims.release_all(held))
        asyncio.get_running_loop().call_soon(releasing.cancel)
        with pytest.raises(asyncio.CancelledError):
            await releasing
        assert await owners_of(other) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_the_claim_of_one_who_is_dead_is_anybodys(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        await leave(other, pid=DEAD)
        job = await vm.commit("export0", policy=qc.Hold())
        (owner,) = await owners_of(other)
        assert owner == job.claim.owner if job.claim else False
        await job.abort()
        await leave(other, pid=DEAD)
        assert await vm.close_windows() == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_one_of_whom_nothing_is_known_is_overridden_by_name(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        theirs = await leave(other, place="abcdef")
        with pytest.raises(qc.JobConflict, match=r"another host or container.*--override claim"):
            await vm.commit("export0", policy=qc.Keep())
        assert await owners_of(vm) == [theirs]
        job = await vm.commit("export0", policy=qc.Keep(), override=["claim"])
        assert (await job.wait()).action == "keep"
        await leave(other, place="abcdef", verb="flat")
        flattening = asyncio.create_task(vm.flatten("export0", keep=9, override=["claim"]))
        assert await flattening == []
        await leave(other, place="abcdef", verb="group")
        done = await vm.commit_group({"export0": qc.Keep()}, override=["claim"])
        assert done.action == "keep"
        await leave(other, place="abcdef", verb="disc")
        async with vm.snapshot(["export0"], override=["claim"]) as window:
            assert await owners_of(other) == [window.claims["export0"].owner]
        assert [each.action for each in window.outcomes] == ["pivot"]
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("exports", [["export0", "a"], ["a"], []], ids=["one more", "anew", "none"])
async def test_who_holds_a_disk_does_so_when_it_is_exported_anew(
    folder: Path, exports: list[str]
) -> None:
    async with two(folder) as (vm, other, chain):
        async with vm.snapshot(["export0"]) as window:
            node = (await vm.disk("export0")).root
            if "export0" not in exports:
                with other.events("BLOCK_EXPORT_DELETED") as deleted:
                    await other.execute("block-export-del", {"id": "export0", "mode": "hard"})
                    await anext(deleted)
            if "a" in exports:
                nbd = {"type": "nbd", "id": "a", "name": "a", "writable": True}
                await other.execute("block-export-add", {**nbd, "node-name": node})
            for call in VERBS.values():
                with pytest.raises(qc.JobConflict, match="a snapshot window of this very"):
                    await call(other, node)
            with pytest.raises(qc.JobConflict, match="a snapshot window of this very"):
                await take(other, await other.disk(node), "disc")
            again = await take(other, await other.disk(node), "disc", override=["claim"])
            assert await owners_of(vm) == [again.owner]
            await again.release()
            window.claims["export0"] = await take(vm, await vm.disk(node), "window")
        assert [each.action for each in window.outcomes] == ["pivot"]
    assert_disk(chain.top, chain.pictures[-1])


async def test_disks_that_nothing_uses_are_held_apart_over_one_base(folder: Path) -> None:
    chain = make_chain(folder)
    beside = folder / "beside.qcow2"
    create(beside, None, backing=chain.base)
    async with storage_daemon(folder, chain, export=False) as qemu:
        file = {"driver": "file", "filename": str(beside)}
        node = {"driver": "qcow2", "node-name": "beside", "file": file}
        async with qc.Session.connect(qemu.qmp) as vm:
            (disk,) = await vm.disks()
            below = disk.chain[-1].node_name
            await vm.execute("blockdev-add", {**node, "backing": below})
            async with vm.snapshot([disk.root, "beside"]) as window:
                for frozen in window.values():
                    with pytest.raises(qc.JobConflict, match="a snapshot window"):
                        await vm.commit(frozen.overlay, shallow=True, policy=qc.Keep())
            assert [each.action for each in window.outcomes] == ["pivot", "pivot"]
            assert await owners_of(vm) == []
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_window_whose_disk_was_taken_over_is_no_instants_image(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        with pytest.raises(qc.WindowError, match=r"held by a flatten.*no instant's image"):
            async with vm.snapshot(["export0"]):
                taken = await take(other, await other.disk("export0"), "flat", override=["claim"])
        await taken.release()
        assert [each.action for each in await vm.close_windows()] == ["pivot"]
    assert_disk(chain.top, chain.pictures[-1])


async def test_what_lies_below_is_looked_at_when_a_window_closes(folder: Path) -> None:
    """Another program merges a layer meanwhile, and knows nothing of claims."""
    async with two(folder, "base", "low", "mid", "top") as (vm, other, chain):
        window = await vm.open_window(["export0"])
        active, _, *merged = [image.node_name for image in (await vm.disk("export0")).chain]
        nodes = {"device": active, "top-node": merged[0], "base-node": merged[1]}
        with other.events("BLOCK_JOB_COMPLETED") as ended:
            await other.execute("block-commit", {"job-id": "theirs", **nodes})
            await anext(ended)
        await flush(other, merged[1])  # as that program had to: 5.2's storage daemon does not
        with pytest.raises(qc.WindowError, match=r"no instant's image.*has become") as told:
            await vm.close_window(window)
        assert "The window is closed" in str(told.value)
        assert [each.action for each in window.outcomes] == ["pivot"]
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("what", ["the claim", "its overlay"])
async def test_what_others_take_away_from_a_window_is_told(folder: Path, what: str) -> None:
    async with two(folder) as (vm, other, chain):
        window = await vm.open_window(["export0"])
        if what == "the claim":
            await other.execute("blockdev-del", {"node-name": window.claims["export0"].owner.node})
        else:
            active, frozen, _ = (await other.disk("export0")).chain
            nodes = {"device": active.node_name, "base-node": frozen.node_name}
            with other.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") as heard:
                await other.execute("block-commit", {"job-id": "theirs", **nodes})
                await anext(heard)
                await other.execute("job-complete", {"id": "theirs"})
                await anext(heard)
        why = "claim on .* is gone" if what == "the claim" else "is under no disk any more"
        with pytest.raises(qc.WindowError, match=f"no instant's image.*{why}"):
            await vm.close_window(window)
        assert await vm.windows() == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_window_is_closed_by_whoever_names_it(folder: Path) -> None:
    """Also while the claim is another process's; but not while the disk is held for more."""
    async with two(folder) as (vm, other, chain):
        window = await vm.open_window(["export0"])
        frozen = list(window.values())
        for claim in window.claims.values():
            claim.abandon()
            await claims._let_go(vm, claim.owner)
        async with await take(vm, await vm.disk("export0"), "disc"):
            with pytest.raises(qc.WindowError, match=r"held by a discard.*Its window stays open"):
                await other.close_window(frozen)
        tag = window.name[-8:]
        theirs = await leave(vm, verb="window", place="abcdef", tag=tag)
        assert await owners_of(other) == [theirs]
        assert [each.action for each in await other.close_window(frozen)] == ["pivot"]
        assert await other.close_window(frozen) == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_recovery_goes_on_without(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        disk = await vm.disk("export0")
        async with await take(vm, disk, "cycle"):
            unheld = await take_if_free(other, disk, "disc")
            assert not unheld.held
            job = await other.commit("export0", policy=qc.Abort(), claim=unheld)
            assert (await job.wait()).action == "abort"
            await unheld.release()
            assert len(await owners_of(vm)) == 1
    assert_disk(chain.top, chain.pictures[-1])


async def test_who_names_a_job_ends_what_was_left_of_it(folder: Path) -> None:
    async with two(folder) as (vm, other, chain):
        job = await vm.commit("export0", policy=qc.Hold())
        await job.ready()
        following = await other.adopt(job.id)  # its owner lives: this is its claim still
        await following.keep()
        assert (await job.wait()).action == "keep"
        left = await vm.commit("export0", policy=qc.Hold())
        await left.ready()
        await left.detach()
        assert await owners_of(vm) == []
        await leave(vm, pid=DEAD)
        await (await other.adopt(left.id)).abort()
    assert_disk(chain.top, chain.pictures[-1])


async def test_what_can_not_be_claimed_is_worked_on_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a QEMU that was built without the driver."""
    monkeypatch.setattr(claims, "node_of", lambda owner: {"driver": "none", "node-name": "n"})
    async with two(folder) as (vm, _, chain):
        job = await vm.commit("export0", policy=qc.Keep())
        assert job.claim is not None
        assert not job.claim.held
        assert (await job.wait()).action == "keep"
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("fate", ["cut", "cut after", "drop"])
async def test_a_lost_reply_is_asked_for(folder: Path, fate: str) -> None:
    """Whether the command was lost or its reply, the disk is claimed once."""
    chain = make_chain(folder)
    replies: list[None] = []

    def met() -> int:
        """How many replies were met before."""
        replies.append(None)
        return len(replies) - 1

    async with (
        storage_daemon(folder, chain) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path, command_timeout=1.0) as vm,
    ):
        disk = await vm.disk("export0")
        between.to_qemu = strike = Strike("blockdev-add", fate, times=1)
        async with await take(vm, disk, "commit") as claim:
            assert await owners_of(vm) == [claim.owner]
        assert await owners_of(vm) == []
        assert strike.met == 1
        between.to_qemu = adds = Strike("blockdev-add", "pass")
        between.to_client = lambda m: "drop" if adds.met and "return" in m and not met() else "pass"
        async with await take(vm, disk, "commit") as claim:
            assert await owners_of(vm) == [claim.owner]
            assert adds.met == 1  # it was there, and was not sent again
        between.to_qemu = Strike("blockdev-add", "cut")
        with pytest.raises(qc.MonitorLost, match=r"lost 5 times while top was claimed"):
            await take(vm, disk, "commit")
        await qemu.quit()


async def test_what_could_not_be_let_go_is_let_go_with_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(folder) as (vm, other, _):
        disk = await vm.disk("export0")
        claim = await take(vm, disk, "commit")
        with monkeypatch.context() as patched:
            patched.setattr(type(vm), "connected", False)
            await claim.release()
        assert len(await owners_of(vm)) == 1
        await (await take(vm, disk, "commit")).release()
        assert vm.left_claims == []
        claim = await take(vm, disk, "commit")
        claim.abandon()
        async with await take(other, disk, "commit"):
            pass
        claim.abandon()
        again = await take(vm, disk, "commit")
        await again.release(other)
        await again.release()
