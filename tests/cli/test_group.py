"""The command with several disks: one object, one instant, all or none."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cli.command import end, qmpcommit, run, start
from tests.ground.daemons import many_disks
from tests.ground.images import Chain, assert_disk, make_chain


def two_chains(folder: Path, bulk: int = 0) -> tuple[Chain, Chain]:
    first = make_chain(folder, bulk=bulk)
    return first, make_chain(folder, names=("base2", "top2"), bulk=bulk)


@pytest.mark.parametrize("decision", ["pivot", "keep-overlay"])
async def test_two_disks_of_one_vm(decision: str, folder: Path) -> None:
    chains = two_chains(folder)
    async with many_disks(folder / "a", *chains) as qemu:
        said = await run("commit", qemu.qmp, "top", "top2", f"--{decision}", "--json")
        assert (said.status, said.err) == (0, "")
        assert said.json["action"] == decision.removesuffix("-overlay")
        assert [each["disk"] for each in said.json["outcomes"]] == ["top", "top2"]
        assert said.json["instant"]
        assert all(each["held"] <= said.json["held"] for each in said.json["outcomes"])
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


async def test_disks_of_two_vms(folder: Path) -> None:
    chains = two_chains(folder)
    async with (
        many_disks(folder / "a", chains[0]) as one,
        many_disks(folder / "b", chains[1]) as two,
    ):
        said = await run("commit", one.qmp, "top", "--and", two.qmp, "top2", "--pivot", "--delete")
        assert (said.status, said.err) == (0, "")
        assert "top: pivoted" in said.out
        assert "top2: pivoted" in said.out
        assert "One instant for 2 disks" in said.out
        assert not chains[0].top.exists()
        await one.quit()
        await two.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize(
    ("check", "status", "action"), [("true", 0, "pivot"), ("false", 3, "keep")]
)
async def test_a_check_is_asked_once(check: str, status: int, action: str, folder: Path) -> None:
    chains = two_chains(folder)
    asked = folder / "asked"
    command = f'echo "$QMPCOMMIT_DISK" >> {asked}; {check}'
    async with many_disks(folder / "a", *chains) as qemu:
        said = await run("commit", qemu.qmp, "top", "top2", "--check", command, "--json")
        assert (said.status, said.json["action"]) == (status, action)
        assert asked.read_text().split() == ["top", "top2"]


async def test_a_disk_that_does_not_exist_stops_all_before_anything_is_sent(folder: Path) -> None:
    chains = two_chains(folder)
    async with many_disks(folder / "a", *chains) as qemu:
        said = await run("commit", qemu.qmp, "top", "nothing", "--pivot", "--json")
        assert (said.status, said.error["type"]) == (4, "DiskNotFound")
        assert (await qemu.execute("query-jobs")) == []
        said = await run("commit", qemu.qmp, "top", "top", "--pivot", "--json")
        assert (said.status, said.error["type"]) == (2, "InvalidRequest")


async def test_ctrl_c_cancels_all(folder: Path) -> None:
    chains = two_chains(folder, bulk=33 << 20)
    async with many_disks(folder / "a", *chains) as qemu:
        words = ["commit", qemu.qmp, "top", "top2", "--pivot", "--bandwidth", "1MiB", "--json"]
        process = await start(*words)
        while len(await qemu.execute("query-jobs")) < 2:
            assert process.returncode is None
        process.send_signal(signal.SIGINT)
        said = await end(process)
        assert (said.status, said.error["type"]) == (130, "Interrupted")
        assert await qemu.execute("query-jobs") == []
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_the_deadline_cancels_all(folder: Path) -> None:
    chains = two_chains(folder, bulk=33 << 20)
    async with many_disks(folder / "a", *chains) as qemu:
        words = ["commit", qemu.qmp, "top", "top2", "--pivot", "--bandwidth", "1MiB"]
        said = await run(*words, "--timeout", "3", "--json")
        assert (said.status, said.error["type"]) == (1, "DeadlineExceeded")
        assert len(said.error["outcomes"]) == 2
        assert await qemu.execute("query-jobs") == []


@pytest.mark.parametrize(
    "words",
    [
        ["/x", "a", "b"],
        ["/x", "a", "b", "--hold"],
        ["/x", "a", "b", "--recycle", "f"],
        ["/x", "a", "b", "--pivot", "--top", "0"],
        ["/x", "a", "--and", "/y", "b", "--pivot", "--dry-run"],
        ["/x", "a", "--and", "/y"],
        ["/x", "a", "--pivot", "--hold-limit", "1"],
        ["/x", "a", "b", "--pivot", "--hold-limit", "long"],
    ],
)
def test_wrong_usage(words: list[str]) -> None:
    said = qmpcommit("commit", *words)
    assert (said.status, said.out) == (2, "")
    assert said.err.count("\n") == 1
