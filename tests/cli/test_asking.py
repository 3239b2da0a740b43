"""On a terminal ``commit`` asks what nobody has said, and the bar at READY takes keys."""

from __future__ import annotations

from pathlib import Path

import qmpcommit as qc
from tests.cli.command import on_a_terminal, run
from tests.cli.test_commit import assert_kept, assert_pivoted, no_jobs
from tests.ground.images import make_chain
from tests.ground.machines import machine

ASKED = "hold or explain? "


async def test_it_is_asked_and_explained(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        left = await on_a_terminal("commit", qemu.qmp, "vda", answers=[(ASKED, "\n")])
        assert left.status == 2
        assert "Nothing was sent" in left.out
        await no_jobs(qemu)
        said = await on_a_terminal(
            "commit", qemu.qmp, "vda", answers=[(ASKED, "e\n"), (ASKED, "what\n"), (ASKED, "k\n")]
        )
        assert said.status == 0, said.out
        for line in (
            "pivot    the guest writes to base.qcow2; top.qcow2 is stale: never boot it again",
            "keep     base.qcow2 has all until the decision; top.qcow2 stays full",
            "abort    base.qcow2 holds a part: it is valid only under top.qcow2",
            "base.qcow2 ◀══ top.qcow2 ◀── guest",
            "'what' is none of these",
        ):
            assert line in said.out
        assert "vda: kept." in said.out
        await qemu.quit()
    assert_kept(chain)


async def test_it_is_asked_again_where_the_chain_has_changed_meanwhile(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"

    async def change() -> str:
        async with qc.Session.connect(qemu.qmp2) as vm:
            await vm.overlay(["vda"], overlay=fresh)
        return "k\n"

    async with machine(folder, chain) as qemu:
        said = await on_a_terminal(
            "commit", qemu.qmp, "vda", answers=[(ASKED, change), (ASKED, "a\n")]
        )
        assert said.status == 0, said.out
        assert "vda is not as it was when you were asked" in said.out
        assert "it is valid only under fresh.qcow2" in said.out.rpartition("not as it was")[2]
        assert "vda: aborted." in said.out
        await qemu.quit()


async def test_the_bar_takes_a_key_and_a_yes(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await on_a_terminal(
            "commit", qemu.qmp, "vda", columns=300,
            answers=[(ASKED, "hold\n"), ("[p]ivot, ", "k"), ("keep? ", "n"), ("[p]ivot, ", "ay"),
                     ("[p]ivot, ", "p"), ("never boot it again. y for yes", "y")],
        )  # fmt: skip
        assert said.status == 0, said.out
        assert "vda: pivoted." in said.out
        await no_jobs(qemu)
        await qemu.quit()
    assert_pivoted(chain)


async def test_where_no_terminal_is_it_is_refused(folder: Path) -> None:
    said = await run("commit", folder / "nothing", "vda")
    assert said.status == 2
    assert "nothing says what to do when the copy is READY" in said.err
