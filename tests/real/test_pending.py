"""One disk held in PENDING with nobody there: it is named, told of, and ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.commit.pending import held_jobs
from qmpcommit.guest.marks import set_mark, thaw_marked
from tests.cli.command import run
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import Machine, machine

JOB = "qmpcommit-vda-1"


@asynccontextmanager
async def left_pending(qemu: Machine) -> AsyncIterator[qc.Session]:
    """A session that finds what a former one left."""
    async with qc.Session.connect(qemu.qmp) as vm:
        with vm.events("BLOCK_JOB_READY", "BLOCK_JOB_PENDING") as heard:
            job = {"job-id": JOB, "device": "top", "auto-finalize": False, "auto-dismiss": False}
            await vm.execute("block-commit", job)
            await anext(heard)
            await vm.execute("job-complete", id=JOB)
            await anext(heard)
    async with qc.Session.connect(qemu.qmp) as vm:
        yield vm


@pytest.mark.parametrize("finalize", [False, True])
async def test_a_disk_that_was_left_held_is_told_of_and_ended(finalize: bool, folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        async with left_pending(qemu) as vm:
            (held,) = await held_jobs(vm, qemu.qmp)
            assert held["id"] == JOB
            assert f"'qmpcommit recover {qemu.qmp}'" in held["next"]
            assert "group" not in held["next"]
            with pytest.raises(qc.JobConflict, match=f"left PENDING: job {JOB} holds"):
                await vm.commit("vda", policy=qc.Pivot())
            (outcome,) = await qc.resolve_pending(vm, finalize=finalize, grace=0)
            assert outcome.action == ("pivot" if finalize else "abort")
            assert await held_jobs(vm, qemu.qmp) == []
            assert await vm.query_jobs() == []
        await qemu.quit()
    assert_disk(chain.base if finalize else chain.top, chain.pictures[-1])


async def test_each_command_on_that_monitor_names_it_and_how_to_resolve_it(folder: Path) -> None:
    chains = make_chain(folder), make_chain(folder, names=("base2", "top2"))
    async with machine(folder, *chains) as qemu:
        async with left_pending(qemu):
            pass
        for words, status in (
            (("chain", qemu.qmp, "vdb"), 0),
            (("jobs", qemu.qmp), 0),
            (("commit", qemu.qmp, "vda", "--pivot"), 1),
            (("commit", qemu.qmp, "vdb", "--keep-overlay"), 0),
            (("commit", qemu.qmp, "vdb", "--pivot", "--dry-run"), 0),
            (("commit", qemu.qmp, "vda", "vdb", "--keep-overlay"), 1),
            (("window", qemu.qmp, "vda", "--", "true"), 1),
            (("window", qemu.qmp, "vdb", "--", "true"), 0),
            (("window", "--close", qemu.qmp), 0),
            (("cycle", qemu.qmp, "vda", "--keep-if", "true"), 1),
            (("flatten", qemu.qmp, "vdb", "--keep", "2"), 0),
            (("flatten", qemu.qmp, "vda", "--keep", "1"), 1),
            (("keep", qemu.qmp, "another"), 4),
        ):
            said = await run(*words)
            assert said.status == status, words
            told = said.out + said.err
            assert told.count(f"'qmpcommit recover {qemu.qmp}'") == 1, words
        said = await run("abort", qemu.qmp, JOB)
        assert (said.status, said.err) == (0, "")
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_guest_that_was_left_quiesced_beside_it_is_named_too(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, running=True) as qemu:
        async with left_pending(qemu) as vm:
            await vm.execute("stop")
            assert await set_mark(vm, "g01234567", "pause")
            with pytest.raises(qc.JobConflict, match="the guest was paused for a group commit"):
                await vm.commit("vda", policy=qc.Pivot())
            assert await thaw_marked(vm, owner="w01234567") == []
            assert not (await vm.query_status()).running  # another's is not touched
            assert await thaw_marked(vm, owner="g01234567") == []
            assert (await vm.query_status()).running
            await qc.resolve_pending(vm, grace=0)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
