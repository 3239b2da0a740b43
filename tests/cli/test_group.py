"""The command with several disks: one object, one instant, all or none."""

from __future__ import annotations

import asyncio
import json
import signal
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from qmpcommit.cli.disks import disk_pairs
from tests.cli.command import COMMAND, ENVIRONMENT, end, qmpcommit, run, start
from tests.ground.daemons import many_disks
from tests.ground.images import assert_disk, two_chains
from tests.ground.machines import machine


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


async def test_disks_of_two_vms_asdisk_pairs(folder: Path) -> None:
    chains = two_chains(folder)
    async with (
        many_disks(folder / "a:b", chains[0]) as one,
        many_disks(folder / "b", chains[1]) as two,
    ):
        pairs = f"{one.qmp}:top", f"unix:{two.qmp}:top2"
        said = await run("commit", *pairs, "--keep-overlay", "--json")
        assert (said.status, said.err) == (0, "")
        assert [each["disk"] for each in said.json["outcomes"]] == ["top", "top2"]
        said = await run("commit", pairs[0], "--pivot", "--json")
        assert (said.status, said.json["disk"]) == (0, "top")
        said = await run("commit", pairs[1], "top2", "--pivot")
        assert said.status == 2
        assert "top2 is no QMP:DISK, and the words before it are" in said.err
        await one.quit()
        await two.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (["tcp:127.0.0.1:4444", "vda"], []),
        (["tcp:127.0.0.1:4444:vda"], [("tcp:127.0.0.1:4444", "vda")]),
        (["tcp:[::1]:4444:/i/a.qcow2"], [("tcp:[::1]:4444", "/i/a.qcow2")]),
        (["/nowhere/at/all:vda", "x"], []),
        (["/nowhere/at/all:vda", None], [("/nowhere/at/all", "vda")]),
        ([f"{__file__}:vda", "/no:where:vda"], [(__file__, "vda"), ("/no:where", "vda")]),
        (["/nowhere"], []),
        ([f"{__file__}:vda:1", None], [(__file__, "vda:1")]),
        ([f"{__file__}:"], []),
        ([__file__, "vda:1"], []),
    ],
)
def test_what_is_a_pair(words: list[str | None], pairs: list[tuple[str, str]]) -> None:
    assert disk_pairs(words, by_name=False) == pairs


def test_with_the_daemon_a_pair_begins_with_a_name() -> None:
    assert disk_pairs(["web1:vda", "db1:vdb:2"], by_name=True) == [
        ("web1", "vda"),
        ("db1", "vdb:2"),
    ]
    assert disk_pairs(["web1", "vda"], by_name=True) == []


async def test_disks_of_two_vms(folder: Path) -> None:
    chains = two_chains(folder)
    async with (
        many_disks(folder / "a", chains[0]) as one,
        many_disks(folder / "b", chains[1]) as two,
    ):
        said = await run("commit", one.qmp, "top", "--and", two.qmp, "top2", "--pivot", "--delete")
        assert (said.status, said.err) == (0, "")
        assert f"top of {one.qmp}: pivoted" in said.out
        assert f"top2 of {two.qmp}: pivoted" in said.out
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
        assert "valid only under them" in said.error["message"]
        assert await qemu.execute("query-jobs") == []
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_group_that_is_left_in_its_hook_is_told_of_its_pivots(folder: Path) -> None:
    chains = two_chains(folder)
    called = folder / "called"
    async with many_disks(folder / "a", *chains) as qemu:
        hook = f"touch {called}; exec sleep 60"
        line = ("commit", qemu.qmp, "top", "top2", "--pivot", "--delete", "--on-pivot", hook)
        process = await start(*line, "--json")
        async with asyncio.timeout(30):
            while not called.exists():
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = await end(process)
        assert said.status == 130
        text = said.error["message"]
        assert "were committed, all of them" in text
        for chain in chains:
            assert f"The image to boot is {chain.base}, and {chain.top} must never" in text
            assert chain.top.exists()
        assert "valid only under" not in text
        assert [each["error"]["outcome"]["action"] for each in said.error["outcomes"]] == [
            "pivot", "pivot",
        ]  # fmt: skip
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


async def test_the_deadline_cancels_all(folder: Path) -> None:
    chains = two_chains(folder, bulk=33 << 20)
    async with many_disks(folder / "a", *chains) as qemu:
        words = ["commit", qemu.qmp, "top", "top2", "--pivot", "--bandwidth", "1MiB"]
        said = await run(*words, "--timeout", "3", "--json")
        assert (said.status, said.error["type"]) == (1, "DeadlineExceeded")
        assert len(said.error["outcomes"]) == 2
        assert await qemu.execute("query-jobs") == []


@pytest.mark.parametrize("where", ["", "{disk}.fresh", "f{number}-{time}"])
async def test_each_disk_is_recycled_onto_an_overlay_of_its_own(folder: Path, where: str) -> None:
    chains = two_chains(folder)
    into = folder / "fresh"
    into.mkdir()
    async with machine(folder, *chains, running=True) as qemu:
        words = ["commit", qemu.qmp, "vda", "vdb", "--recycle", into / where, "--json"]
        words += ["--overlay-options", '{"detect-zeroes": "on"}']
        said = await run(*words)
        assert (said.status, said.json["action"]) == (0, "recycle")
        active = [Path(each["active"]["filename"]) for each in said.json["outcomes"]]
        assert sorted(into.iterdir()) == sorted(active)
        disks = await qemu.execute("query-block")
        assert [each["inserted"]["detect_zeroes"] for each in disks] == ["on", "on"]
        if where == "{disk}.fresh":
            assert active == [into / "vda.fresh", into / "vdb.fresh"]
        await qemu.quit()
    for chain, path in zip(chains, active, strict=True):
        assert_disk(path, chain.pictures[-1])
        assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize(
    ("typed", "status", "action"),
    [
        (b"pivot\n", 0, "pivot"),
        (b"what\x1b" + b"t" * 90 + b"\nkeep\npivot\n", 0, "keep"),
        (b"abort\n", 0, "abort"),
        (b"", 3, "abort"),
        (b"keep\npivot", 0, "pivot"),  # all of it before READY, and the end of input after it
    ],
)
async def test_a_hold_is_decided_on_standard_input(
    typed: bytes, status: int, action: str, folder: Path
) -> None:
    chains = two_chains(folder)
    async with many_disks(folder / "a", *chains) as qemu:
        words = map(str, ["commit", qemu.qmp, "top", "top2", "--hold", "--json"])
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *words, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=ENVIRONMENT
        )
        assert process.stdin is not None
        assert process.stderr is not None
        async with asyncio.timeout(30):
            if typed and not typed.endswith(b"\n"):
                process.stdin.write(typed)
                process.stdin.close()
            elif typed:
                assert b"all are READY" in await process.stderr.readline()
                process.stdin.write(typed)
            else:
                process.stdin.close()
            out, err = await process.communicate()
        assert process.returncode == status, err
        assert json.loads(out)["action"] == action
        told = rb"not 'what\x1b" + b"t" * 35 + b"...'"
        assert (told in err) == (b"what" in typed), err
        assert (b"nobody can decide" in err) == (not typed)
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base if action == "pivot" else chain.top, chain.pictures[-1])


async def test_a_hold_that_runs_out_keeps(folder: Path) -> None:
    chains = two_chains(folder)
    async with many_disks(folder / "a", *chains) as qemu:
        said = await run("commit", qemu.qmp, "top", "top2", "--hold", "0.2", "--json")
        assert (said.status, said.json["action"]) == (3, "keep")
        await qemu.quit()


async def test_a_dry_run_of_several_sends_nothing(folder: Path) -> None:
    chains = two_chains(folder)
    async with machine(folder, *chains) as qemu:
        dry = ["commit", qemu.qmp, "vda", "vdb", "--dry-run"]
        said = await run(*dry, "--recycle", folder / "{disk}.new", "--json")
        assert (said.status, said.err) == (0, "")
        plans = said.json["plans"]
        assert [plan["disk"]["name"] for plan in plans] == ["vda", "vdb"]
        fresh = [str(folder / "vda.new"), str(folder / "vdb.new")]
        assert [plan["policy"]["overlay"] for plan in plans] == fresh
        assert all(plan["findings"] for plan in plans)
        (folder / "vdb.new").touch()
        said = await run(*dry, "--recycle", folder / "{disk}.new")
        assert (said.status, "exists already" in said.err) == (2, True)
        said = await run(*dry, "--pivot")
        assert (said.status, said.out.count("Nothing was sent")) == (0, 2)
        assert await qemu.execute("query-jobs") == []
        said = await run("commit", qemu.qmp, "vda", "vda", "--dry-run", "--pivot", "--json")
        assert (said.status, said.error["type"]) == (2, "InvalidRequest")
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])
        assert_disk(chain.base, chain.pictures[0])


@pytest.mark.parametrize(
    "words",
    [
        ["/x", "a", "b"],
        ["/x", "a", "b", "--recycle", "f"],
        ["/x", "a", "b", "--pivot", "--top", "0"],
        ["/x", "a", "--and", "/y", "a", "--recycle", "/tmp/{disk}.qcow2"],
        ["/x", "a", "--and", "/y"],
        ["/x", "a", "--pivot", "--hold-limit", "1"],
        ["/x", "a", "b", "--pivot", "--hold-limit", "long"],
    ],
)
def test_wrong_usage(words: list[str]) -> None:
    said = qmpcommit("commit", *words)
    assert (said.status, said.out) == (2, "")
    assert said.err.count("\n") == 1
