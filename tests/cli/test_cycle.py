"""``qmpcommit cycle`` on a real QEMU."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command import run
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine


async def test_it_keeps(folder: Path) -> None:
    chain = make_chain(folder)
    told = folder / "told"
    ask = f'echo "$QMPCOMMIT_DISK $QMPCOMMIT_BASE" > {told}'
    async with machine(folder, chain, running=True) as qemu:
        words = ("cycle", qemu.qmp, "vda", "--keep-if", ask, "--reset", "--delete")
        said = await run(*words, "--json")
        assert (said.status, said.json["result"]) == (0, "kept")
        await qemu.quit()
    assert str(chain.base) in told.read_text()
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(Path(said.json["overlay"]), chain.pictures[-1])


async def test_it_discards(folder: Path) -> None:
    chain = make_chain(folder)
    overlay = folder / "next.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        words = ("cycle", qemu.qmp, "vda", "--keep-if", "exit 1", "--overlay", str(overlay))
        refused = await run(*words)
        assert refused.status == 1
        assert "--reset or --stop" in refused.err
        said = await run(*words, "--stop")
        assert said.status == 3
        assert str(overlay) in said.out
        await qemu.quit()
    assert_disk(overlay, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])


async def test_several_disks_of_several_vms_end_the_same_way(folder: Path) -> None:
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    chains = [
        make_chain(folder / "one"),
        make_chain(folder / "one", names=("base2", "top2")),
        make_chain(folder / "two"),
    ]
    told = folder / "told"
    ask = f'echo "$QMPCOMMIT_DISK" > {told}; exit 1'
    async with (
        machine(folder / "one", *chains[:2], running=True) as one,
        machine(folder / "two", chains[2], running=True) as two,
    ):
        words = (f"{one.qmp}:vda", f"{one.qmp}:vdb", f"{two.qmp}:vda")
        said = await run("cycle", *words, "--keep-if", ask, "--reset", "--delete", "--json")
        assert (said.status, said.json["result"]) == (3, "discarded"), said
        assert told.read_text().split() == ["vda", "vdb", "vda"]
        discarded = [each["overlay"] for each in said.json["rounds"]]
        words = (one.qmp, "vda", "vdb")
        said = await run("cycle", *words, "--keep-if", "true", "--reset")
        assert said.status == 0
        assert [line.split(":")[0] for line in said.out.splitlines()] == ["kept", "kept"]
        mixed = await run("cycle", f"{one.qmp}:vda", "vdb", "--keep-if", "true")
        assert (mixed.status, "is no QMP:DISK" in mixed.err) == (2, True)
        assert (await run("cycle", one.qmp, "--keep-if", "true")).status == 2
        await one.quit()
        await two.quit()
    assert_disk(Path(discarded[2]), chains[2].pictures[0])
    for chain in chains:
        assert not chain.top.exists()
        assert_disk(chain.base, chain.pictures[0])


async def test_no_answer_is_a_failure(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("cycle", qemu.qmp, "vda", "--keep-if", "no-such-program", "--json")
        error = said.json["error"]  # the shell has said so, too
        assert (said.status, error["type"]) == (1, "CommitFailed")
        assert "Nothing was changed" in error["message"]
        assert (await run("cycle", qemu.qmp, "vda")).status == 2
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
