"""What surrounds a commit, from the command line, on a real QEMU."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command import run
from tests.ground.images import MIB, assert_disk, create, make_chain
from tests.ground.images import run as run_tool
from tests.ground.machines import machine
from tests.ground.qemu import QEMU
from tests.ground.sessions import runs


async def test_delete_after_the_hook(folder: Path) -> None:
    chain = make_chain(folder, 3)
    note = folder / "note"
    hook = f'test -e {chain.top} && echo "$QMPCOMMIT_DISK $QMPCOMMIT_ACTIVE" > {note}'
    async with machine(folder, chain) as qemu:
        said = await run(
            "commit", qemu.qmp, "vda", "--pivot", "--delete", "--on-pivot", hook, "--json"
        )
        assert said.status == 0
        assert said.json["deleted"] == [str(chain.top), str(chain.files[1])]
        assert said.json["hook"] == "done"
        await qemu.quit()
    assert note.read_text() == f"vda {chain.base}\n"
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_hook_that_fails_is_a_failure_and_nothing_is_deleted(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--pivot", "--delete", "--on-pivot", "exit 7")
        assert said.status == 1
        assert "status 7" in said.out
        await qemu.quit()
    assert chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])


async def test_recycle(folder: Path) -> None:
    chain = make_chain(folder)
    fresh = folder / "here" / "fresh.qcow2"
    fresh.parent.mkdir()
    async with machine(folder, chain) as qemu:
        await qemu.execute("cont")
        words = ("commit", qemu.qmp, "vda", "--recycle", fresh.name, "--stale", "rename", "--json")
        said = await run(*words, cwd=fresh.parent)  # QEMU runs in another folder
        assert said.status == 0
        assert said.json["action"] == "recycle"
        assert said.json["active"]["filename"] == str(fresh)
        assert said.json["guest_paused"] > 0
        assert await runs(qemu)
        again = await run("commit", qemu.qmp, "vda", "--recycle", fresh)
        assert again.status == 2
        assert "exists already" in again.err
        await qemu.quit()
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(fresh, chain.pictures[-1])


async def test_the_chain_tells_bitmaps_copies_and_draws_a_graph(folder: Path) -> None:
    chain = make_chain(folder, 3)
    run_tool(QEMU.img, "bitmap", "--add", chain.top, "daily")
    async with machine(folder, chain) as qemu:
        said = await run("chain", qemu.qmp)
        assert "bitmaps daily" in said.out
        assert said.out.count("a commit copies at most") == 2
        said = await run("chain", qemu.qmp, "vda", "--dot")
        assert '"disk vda" -> "top";' in said.out
        assert '"mid" -> "base";' in said.out
        assert said.out.startswith("digraph")
        said = await run("chain", qemu.qmp, "--json")
        (disk,) = said.json["disks"]
        assert disk["chain"][0]["bitmaps"] == ["daily"]
        assert disk["chain"][0]["virtual_size"] == 64 * MIB


async def test_an_interrupted_recycle_is_told(folder: Path) -> None:
    """As a client leaves it that is killed between opening the overlay and laying it."""
    chain = make_chain(folder)
    fresh = create(folder / "fresh.qcow2", 64 * MIB)
    async with machine(folder, chain) as qemu:
        await qemu.execute("block-commit", job_id="qmpcommit-x", device="top")
        file = {"driver": "file", "filename": str(fresh)}
        overlay = {"driver": "qcow2", "file": file, "backing": None}
        await qemu.execute("blockdev-add", node_name="qmpcommit-x-top", **overlay)
        said = await run("jobs", qemu.qmp)
        assert f"left the empty overlay {fresh} open" in said.out
        assert f"'qmpcommit recover {qemu.qmp}'" in said.out
        told = (await run("jobs", qemu.qmp, "--json")).json["interrupted_recycles"]
        assert [recycle["node"] for recycle in told] == ["qmpcommit-x-top"]
        await run("pivot", qemu.qmp, "qmpcommit-x")
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_dry_run_tells_all_and_sends_nothing(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--pivot", "--dry-run")
        assert said.status == 0
        assert "block-commit {" in said.out
        assert "free-space" in said.out
        assert said.out.endswith("Nothing was sent.\n")
        said = await run("commit", qemu.qmp, "vda", "--keep-overlay", "--dry-run", "--json")
        assert said.json["arguments"]["top-node"] == "top"
        assert {f["name"] for f in said.json["findings"]} >= {"free-space", "corrupt"}
        missing = await run("commit", qemu.qmp, "vda", "--dry-run")
        assert missing.status == 2
        assert await qemu.execute("query-jobs") == []
        await qemu.quit()
    for path, picture in zip(chain.files, chain.pictures, strict=True):
        assert_disk(path, picture)


async def test_a_check_refuses_and_is_overridden_by_name(folder: Path) -> None:
    chain = make_chain(folder)
    with chain.base.open("r+b") as file:
        file.seek(79)
        file.write(b"\x02")  # qcow2's "corrupt" among the incompatible features
    async with machine(folder, chain, style="implicit") as qemu:
        said = await run("commit", qemu.qmp, "vda", "--pivot", "--dry-run")
        assert (said.status, "[refuse] corrupt" in said.out) == (1, True)
        said = await run("commit", qemu.qmp, "vda", "--pivot")
        assert said.status == 1
        assert "override 'corrupt'" in said.err
        said = await run("commit", qemu.qmp, "vda", "--pivot", "--override", "corrupted")
        assert said.status == 2
        await qemu.quit()


async def test_converging_is_told(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("commit", qemu.qmp, "vda", "--pivot", "--converge", "5", "--json")
        assert said.status == 0
        assert said.json["converge"]["verdict"] in ("ready", "ended")
        assert said.json["converge"]["restored"]
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_options_that_exclude_each_other(folder: Path) -> None:
    for words in (
        ["--delete", "--rename"],
        ["--stale", "leave", "--delete"],
        ["--on-error", "panic"],
        ["--recycle", ""],
    ):
        said = await run(
            "commit", "/none", "vda", *(["--pivot"] if "--recycle" not in words else []), *words
        )
        assert said.status == 2
