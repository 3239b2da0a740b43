"""Another owner pivots between a plan and its commit: no stale overlay gets over the live base."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.request import Request
from qmpcommit.commit.stale_layers import Around
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.nbd import Nbd
from tests.ground.proxy import Proxy, let_pass, proxy
from tests.ground.sessions import files

KINDS: dict[str, dict[str, Any]] = {
    "pivot": {"policy": qc.Pivot()},
    "keep": {"policy": qc.Keep()},
    "intermediate": {"policy": None, "top": 1},
}


async def pivot(other: qc.Session, device: str, **more: Any) -> None:
    """What another owner does, who leaves the stale nodes open."""
    with other.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") as heard:
        job = {"job-id": "other", "device": device, "base-node": "base", **more}
        await other.execute("block-commit", job)
        await anext(heard)
        await other.execute("job-complete", {"id": "other"})
        await anext(heard)


@asynccontextmanager
async def two_owners(
    folder: Path, *, device: str = "", export: bool = True
) -> AsyncIterator[tuple[Machine, qc.Session, qc.Session, Chain]]:
    """A chain of three layers under a device with that filter, or under an export, or neither."""
    chain = make_chain(folder, 3)
    filters = () if device in ("", "shared") else (device,)
    made = (
        machine(folder, chain, filters=filters, device="virtio-blk-pci,share-rw=on")
        if device
        else storage_daemon(folder, chain, export=export)
    )
    async with (
        made as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        qc.Session.connect(qemu.qmp2) as other,
    ):
        yield qemu, vm, other, chain


@pytest.mark.parametrize("kind", KINDS)
async def test_a_plan_that_is_stale_is_not_sent(folder: Path, kind: str) -> None:
    asked = dict(KINDS[kind])
    policy = asked.pop("policy")
    async with two_owners(folder) as (qemu, vm, other, chain):
        job = await vm.prepare(Request("export0", policy, **asked), Around())
        await pivot(other, "top")
        picture = chain.pictures[-1].copy()
        async with await Nbd.connect(qemu.nbd, "top") as guest:
            for offset in (0, 65536, 30 << 20):
                await guest.write(offset, b"\7" * 65536)
                picture.fill(offset, 65536, 7)
            await guest.flush()
        with pytest.raises(qc.ChainError, match=r"is \S*base.* by now.*Nothing was sent"):
            await vm.launch(job)
        assert await other.query_jobs() == []
        await other.close()
        await qemu.quit()
    assert_disk(chain.base, picture)


@pytest.mark.parametrize("kind", ["pivot", "keep"])
@pytest.mark.parametrize("device", ["", "shared", "throttle"])
async def test_a_job_that_begins_on_a_stale_overlay_is_cancelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, device: str
) -> None:
    """The pivot came after the last look: QEMU takes the job, which is seen when it is there.

    It refuses a base whose device shares it with no writer, and to write to one in use from an
    intermediate layer.
    """
    async with two_owners(folder, device=device) as (qemu, vm, other, chain):
        root = "throttle0" if device == "throttle" else "top"
        before(monkeypatch, vm, lambda: pivot(other, root))
        with pytest.raises(qc.CommitFailed) as error:
            await (await vm.commit("vda" if device else "export0", **KINDS[kind])).wait()
        assert "began on a stale overlay" in error.value.message
        assert f"{chain.base} may hold older data of" in error.value.message
        assert await files(vm) == [chain.base]
        assert await vm.query_jobs() == []
        await other.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_so_is_one_whose_reply_was_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_owners(folder) as (qemu, vm, other, chain):
        await vm.close()
        async with proxy(folder, qemu.qmp) as between, qc.Session.connect(between.path) as cut:

            async def pivot_first() -> None:
                await pivot(other, "top")
                between.to_client = once_cut(between)

            before(monkeypatch, cut, pivot_first)
            with pytest.raises(qc.CommitFailed, match="began on a stale overlay"):
                await (await cut.commit("export0", policy=qc.Pivot())).wait()
        assert await other.query_jobs() == []
        await other.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_stale_job_that_is_adopted_is_cancelled(folder: Path) -> None:
    async with two_owners(folder) as (qemu, vm, other, chain):
        await pivot(other, "top")
        job = {"job-id": "late", "device": "top", "base-node": "base"}
        await other.execute("block-commit", {**job, "speed": 1, "auto-finalize": False})
        with pytest.raises(qc.CommitFailed, match="began on a stale overlay"):
            await (await vm.adopt("late", policy=qc.Pivot())).wait()
        assert await other.query_jobs() == []
        await other.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_else_may_have_changed_since_the_plan(folder: Path) -> None:
    async with two_owners(folder) as (qemu, vm, other, chain):
        jobs = [await vm.prepare(Request("export0", qc.Pivot()), Around()) for _ in range(3)]
        mine = {"job-id": "other", "device": "top", "base-node": "mid", "top-node": "top"}
        with other.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") as heard:
            await other.execute("block-commit", mine)
            await anext(heard)
            with pytest.raises(qc.JobConflict, match=r"'?other.*began after.*Nothing was sent"):
                await vm.launch(jobs[0])
            await other.execute("block-job-cancel", {"device": "other", "force": False})
            await anext(heard)
        await (await vm.commit("export0", top=1)).wait()
        with pytest.raises(qc.ChainError, match=r"its chain was .*mid.*, and is .* by now"):
            await vm.launch(jobs[1])
        with other.events("BLOCK_EXPORT_DELETED") as gone:
            await other.execute("block-export-del", {"id": "export0", "mode": "hard"})
            await anext(gone)
        with pytest.raises(qc.ChainError, match="is gone: no device or export uses it"):
            await vm.launch(jobs[2])
        await other.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_node_that_nothing_uses_is_a_disk_until_a_layer_of_it_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_owners(folder, export=False) as (qemu, vm, other, chain):
        outcome = await (await vm.commit("top", policy=qc.Keep(), base=1)).wait()
        assert outcome.action == "keep"

        async def serve() -> None:
            await pivot(other, "top")
            address = {"type": "unix", "data": {"path": f"{folder}/nbd"}}
            await other.execute("nbd-server-start", {"addr": address})
            export = {"type": "nbd", "id": "e", "node-name": "base", "writable": True}
            await other.execute("block-export-add", export)

        before(monkeypatch, vm, serve)
        with pytest.raises(qc.CommitFailed, match="began on a stale overlay"):
            await (await vm.commit("top", policy=qc.Pivot())).wait()
        await other.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("verb", ["window", "discard"])
async def test_no_overlay_is_laid_over_one_that_became_stale(
    folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    async with two_owners(folder, device="shared") as (qemu, vm, other, chain):
        before(monkeypatch, vm, lambda: pivot(other, "top"), "blockdev-create")
        if verb == "window":
            with pytest.raises(qc.WindowError, match=r"writes to \S*base.* by now"):
                await vm.open_window(["vda"])
        else:
            with pytest.raises(qc.ChainError, match="its chain is another one by now"):
                await vm.discard("vda", guest="reset", delete=True)
        assert await files(vm) == [chain.base]
        await other.close()
        await qemu.quit()
    assert sorted(folder.glob("*.qcow2*")) == sorted(chain.files)
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_flatten_counts_the_layers_anew_before_each_step(folder: Path) -> None:
    chain = make_chain(folder, 4)
    async with (
        machine(folder, chain) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        qc.Session.connect(qemu.qmp2) as other,
    ):
        steps = vm.flatten("vda", keep=2)
        assert (await anext(steps)).top.filename == str(chain.files[1])
        with other.events("BLOCK_JOB_COMPLETED") as ended:  # the next step, by whoever claims none
            step = {"device": "top", "top-node": "low", "base-node": "base", "job-id": "other"}
            await other.execute("block-commit", step)
            await anext(ended)
        assert [outcome async for outcome in steps] == []
        assert await files(vm) == [chain.top, chain.base]
        await other.close()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


def once_cut(between: Proxy) -> Callable[[dict[str, Any]], str]:
    """The line is cut before the first that QEMU says, and passes all when it is back."""

    def cut(message: dict[str, Any]) -> str:
        between.to_client = let_pass
        return "cut"

    return cut


def before(
    patch: pytest.MonkeyPatch,
    vm: qc.Session,
    what: Callable[[], Awaitable[object]],
    command: str = "block-commit",
) -> None:
    """Have something happen right before that command is first sent, and after the last look."""
    execute = vm.execute

    async def late(sent: str, *more: Any, **options: Any) -> Any:
        if sent == command:
            patch.setattr(vm, "execute", execute)
            await what()
        return await execute(sent, *more, **options)

    patch.setattr(vm, "execute", late)
