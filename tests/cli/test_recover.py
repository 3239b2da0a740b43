"""``qmpcommit recover``: what it says, what it does, and who names it."""

from __future__ import annotations

from pathlib import Path

import pytest

import qmpcommit as qc
from tests.cli.command import qmpcommit, run
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.sessions import runs
from tests.real.test_recover_killed import killed


async def killed_at(step: str, work: str, qemu: Machine, folder: Path) -> list[Chain]:
    """Kill the work's process there, which another run on other files has told of."""
    chain = make_chain(folder / "tried")
    async with machine(folder / "tried", chain, running=True) as other:
        _, passed = await killed([other], work, 0, folder / "tried")
    await killed([qemu], work, passed.index(step) + 1, folder)
    return [chain]


@pytest.fixture
def tried(folder: Path) -> Path:
    (folder / "tried").mkdir()
    return folder


async def test_where_nothing_was_left(folder: Path) -> None:
    async with machine(folder, make_chain(folder), running=True) as qemu:
        for words in ((), ("--yes",)):
            said = await run("recover", qemu.qmp, *words)
            assert (said.status, said.out) == (0, "nothing was left here by a death\n")
        await qemu.quit()


async def test_a_recycle_that_was_killed_before_its_overlay_lay(tried: Path) -> None:
    chain = make_chain(tried)
    async with machine(tried, chain, running=True) as qemu:
        await killed_at("before blockdev-snapshot", "recycle", qemu, tried)
        recover = f"'qmpcommit recover {qemu.qmp}'"
        for words, status in (
            (("jobs", qemu.qmp), 0),
            (("chain", qemu.qmp), 0),
            (("commit", qemu.qmp, "vda", "--pivot"), 1),
            (("cycle", qemu.qmp, "vda", "--keep-if", "true", "--reset"), 1),
        ):
            named = await run(*words)
            assert named.status == status, named.err
            assert recover in named.out + named.err, words
        shown = await run("recover", qemu.qmp)
        assert shown.status == 3
        assert "its guest would write to the base" in shown.out
        assert shown.out.endswith("Nothing was done: --yes does it\n")
        assert not await runs(qemu)
        done = await run("recover", qemu.qmp, "--yes", "--json")
        assert done.status == 0, done.err
        assert done.json["left"] == 0
        found = [each["kind"] for each in done.json["findings"]]
        assert found == ["recycle", "frozen", "concluded"]  # its claim went with the cycle
        assert all(each["done"] and each["result"] for each in done.json["findings"])
        assert await runs(qemu)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(tried / "fresh-vda.qcow2", chain.pictures[-1])


async def test_a_ready_job_is_told_and_decided_by_a_person_only(tried: Path) -> None:
    chain = make_chain(tried)
    async with machine(tried, chain, running=True) as qemu:
        await killed_at("before job-complete", "pivot", qemu, tried)
        told = await run("recover", qemu.qmp, "--yes")
        assert told.status == 3
        assert "--decide pivot, keep or abort" in told.out
        (job,) = await qemu.execute("query-jobs")
        assert job["status"] == "ready"
        done = await run("recover", qemu.qmp, "--decide", "pivot", "--yes")
        assert done.status == 0, done.out
        assert "it ended by 'pivot'" in done.out
        async with qc.Session.connect(qemu.qmp) as vm:
            (disk,) = await vm.disks()
            assert disk.active is not None
            assert disk.active.filename == str(chain.base)
            assert set((await vm.graph()).nodes) == {"base", disk.chain[0].over} | {
                name for name in (await vm.graph()).nodes if name.startswith("#")
            }
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


def test_what_is_wrong_usage() -> None:
    for words in (
        ("recover",),
        ("recover", "a", "--agent", "b", "--agent", "c"),
        ("--daemon", "recover", "a"),
        ("recover", "a", "--override", "nothing"),
    ):
        assert qmpcommit(*words).status == 2, words
