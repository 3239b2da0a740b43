"""What an outcome and the command's text tell is so: of checks, of who writes, of others' jobs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.cli.show import outcome_text
from tests.cli.command import end, run, start
from tests.ground.images import (
    MIB,
    Chain,
    Picture,
    Write,
    assert_disk,
    create,
    make_chain,
    write,
)
from tests.ground.machines import machine, storage_daemon

WHO = {
    "guest": "The guest now writes to",
    "export": "The export now writes to",
    "nothing": "No device or export uses the disk. Its image is now",
}


@pytest.mark.parametrize("used_by", WHO)
async def test_who_writes_is_said_where_it_is_known(used_by: str, folder: Path) -> None:
    chain = make_chain(folder)
    opened = (
        machine(folder, chain)
        if used_by == "guest"
        else storage_daemon(folder, chain, export=used_by == "export")
    )
    async with opened as qemu, qc.Session.connect(qemu.qmp) as vm:
        outcome = await (await vm.commit("top", policy=qc.Pivot())).wait()
        assert outcome.used_by == used_by
        assert f"pivoted. {WHO[used_by]} {chain.base}" in outcome_text(outcome)
        await vm.close()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_the_checks_found_is_told_afterwards(folder: Path) -> None:
    """A base that QEMU makes larger is noted; so is a check that was overridden."""
    base = create(folder / "base.qcow2", 32 * MIB)
    low, mid, top = (folder / f"{name}.qcow2" for name in ("low", "mid", "top"))
    for path, below in ((low, base), (mid, low), (top, mid)):
        create(path, 64 * MIB, backing=below)
        write(path, [Write(40 * MIB, MIB, 7)])
    picture = Picture(64 * MIB)
    picture.fill(40 * MIB, MIB, 7)
    chain = Chain([base, low, mid, top], [picture] * 4)
    async with storage_daemon(folder, chain) as qemu:
        said = await run("flatten", qemu.qmp, "top", "--keep", "3")
        assert said.status == 0
        assert (
            f"Warning: top: found before it began, size: QEMU will grow the base {base}" in said.out
        )
        async with qc.Session.connect(qemu.qmp) as vm:
            node = {"driver": "qcow2", "node-name": "reader", "read-only": True, "backing": None,
                    "file": {"driver": "file", "filename": str(mid)}}  # fmt: skip
            await vm.execute("blockdev-add", {**node, "force-share": True})
            asked: dict[str, Any] = {"policy": qc.Keep(), "shallow": True}
            with pytest.raises(qc.ChainError, match="base-shared"):
                await vm.commit("top", **asked)
            job = await vm.commit("top", **asked, override=["base-shared"])
            (told,) = (await job.wait()).warnings
            assert told.startswith("found before it began and overridden, base-shared: ")
            assert "(override" not in told
            await vm.execute("blockdev-del", {"node-name": "reader"})
        await qemu.quit()
    assert_disk(base, picture)


async def test_a_pivot_onto_a_filter_is_one(folder: Path) -> None:
    """As another client may have begun it: the disk's layer is what lies below the filter."""
    chain = make_chain(folder, names=("base", "unused"), layers=1)
    over = create(folder / "over.qcow2", 64 * MIB, backing=chain.base)
    write(over, [Write(0, MIB, 9)])
    chain.pictures[-1].fill(0, MIB, 9)
    async with storage_daemon(folder, chain, export=False) as qemu:
        await qemu.execute("blockdev-add", driver="copy-on-read", node_name="f", file="base")
        top = {"driver": "file", "filename": str(over)}
        await qemu.execute("blockdev-add", driver="qcow2", node_name="over", file=top, backing="f")
        await qemu.execute("nbd-server-start", addr={"type": "unix",
                           "data": {"path": str(folder / "nbd")}})  # fmt: skip
        await qemu.execute("block-export-add", type="nbd", id="e", node_name="over", writable=True)
        await qemu.execute(
            "block-commit", job_id="theirs", device="over", base_node="f", auto_dismiss=False
        )
        async with asyncio.timeout(20):
            while (await qemu.execute("query-jobs"))[0]["status"] != "ready":
                pass
        said = await run("pivot", qemu.qmp, "theirs")
        assert (said.status, said.err) == (0, "")
        assert "The export now writes to" in said.out
        await qemu.execute("block-export-del", id="e", mode="hard")
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_flatten_ends_with_the_step_that_another_client_aborts(folder: Path) -> None:
    chain = make_chain(folder, 4)
    write(chain.files[1], [Write(8 * MIB, 40 * MIB, 0x77)])
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        flattening = asyncio.ensure_future(vm.flatten("top", keep=2, bandwidth="1MiB")._all())
        async with asyncio.timeout(20):
            while not (jobs := await qemu.execute("query-jobs")):
                pass
        await qemu.execute("job-cancel", id=jobs[0]["id"])
        (outcome,) = await flattening
        assert (outcome.action, outcome.decided_by) == ("abort", "another client")
        assert len((await vm.disk("top")).chain) == 4
        await vm.close()
        await qemu.quit()


@pytest.mark.parametrize(
    "words", [["commit", "--top", "1", "--shallow"], ["flatten", "--keep", "2"]], ids=lambda w: w[0]
)
async def test_a_layer_whose_merge_another_client_aborts_is_not_merged(
    words: list[str], folder: Path
) -> None:
    chain = make_chain(folder, 3)
    write(chain.files[1], [Write(8 * MIB, 40 * MIB, 0x77)])
    chain.pictures[-1].fill(8 * MIB, 40 * MIB, 0x77)
    write(chain.top, [Write(8 * MIB, MIB, 0x78)])
    chain.pictures[-1].fill(8 * MIB, MIB, 0x78)
    async with storage_daemon(folder, chain) as qemu:
        process = await start(words[0], qemu.qmp, "top", *words[1:], "--bandwidth", "1MiB")
        async with asyncio.timeout(20):
            while not (jobs := await qemu.execute("query-jobs")):
                pass
        await qemu.execute("job-cancel", id=jobs[0]["id"])
        said = await end(process)
        assert said.status == 3
        assert "another client" in said.out
        assert f"{chain.base} may hold part of the overlay's data" in said.out
        await qemu.quit()
    assert all(path.exists() for path in chain.files)
