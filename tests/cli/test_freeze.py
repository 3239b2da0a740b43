"""``--freeze`` and ``--agent`` of groups and cycles, as users type them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cli.command import qmpcommit, run
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine
from tests.ground.sessions import runs
from tests.real.test_agent import fake_agent


async def test_a_group_over_two_vms_tells_for_how_long_each_guest_stood_still(
    folder: Path,
) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
    chains = [make_chain(folder / "one"), make_chain(folder / "two")]
    async with (
        machine(folder / "one", chains[0], running=True) as one,
        machine(folder / "two", chains[1], running=True) as two,
        fake_agent(folder / "one") as first,
        fake_agent(folder / "two") as second,
    ):
        pairs = (f"{one.qmp}:vda", f"{two.qmp}:vda")
        said = await run("commit", *pairs, "--keep-overlay", "--freeze", "pause", "--json")
        assert said.status == 0, said.err
        stood = [each["quiesced"] for each in said.json["outcomes"]]
        assert all(stood)
        assert said.json["quiesced"] == max(stood)
        agents = ("--agent", first.path, "--agent", second.path)
        said = await run("commit", *pairs, "--pivot", "--freeze", "agent", *agents)
        assert said.status == 0, said.err
        assert "The guests stood still for at most" in said.out
        for fake in (first, second):
            asked = [each for each in fake.asked if each.startswith("guest-fsfreeze")]
            assert asked.count("guest-fsfreeze-freeze") == 1
            assert asked[-2:] == ["guest-fsfreeze-thaw", "guest-fsfreeze-status"]
        for qemu in (one, two):
            assert await runs(qemu)
            await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("freeze", ["pause", "agent"])
async def test_a_kept_round_tells_it_and_a_discard_freezes_nothing(
    folder: Path, freeze: str
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, running=True) as qemu, fake_agent(folder) as fake:
        words = ["cycle", qemu.qmp, "vda", "--reset", "--freeze", freeze]
        words += ["--agent", fake.path] if freeze == "agent" else []
        said = await run(*words, "--keep-if", "true", "--json")
        assert (said.status, said.json["result"]) == (0, "kept"), said.err
        assert said.json["kept"]["quiesced"] > 0
        assert said.json["kept"]["action"] == "recycle"
        overlay = Path(said.json["overlay"])
        assert await runs(qemu)
        frozen = ["guest-fsfreeze-freeze"] if freeze == "agent" else []
        assert [each for each in fake.asked if each == "guest-fsfreeze-freeze"] == frozen
        assert not fake.frozen
        words[2] = str(overlay)
        said = await run(*words, "--keep-if", "false", "--json")
        assert (said.status, said.json["result"]) == (3, "discarded")
        assert [each for each in fake.asked if each == "guest-fsfreeze-freeze"] == frozen
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(overlay, chain.pictures[-1])


@pytest.mark.parametrize(
    "words",
    [
        ("commit", "one:vda", "two:vda", "--pivot", "--freeze", "agent", "--agent", "a"),
        ("commit", "one:vda", "two:vda", "--pivot", "--agent", "a", "--agent", "b"),
        ("commit", "one", "vda", "vdb", "--pivot", "--freeze", "pause", "--agent", "a"),
        ("commit", "one", "vda", "--pivot", "--freeze", "pause"),
        ("commit", "one", "vda", "vdb", "--pivot", "--freeze", "hard"),
        ("cycle", "one", "vda", "--keep-if", "true", "--freeze", "agent"),
        ("cycle", "one:vda", "two:vda", "--keep-if", "true", "--freeze", "agent", "--agent", "a"),
        ("window", "one", "vda", "--freeze", "agent", "--", "true"),
        ("window", "one", "vda", "--agent", "a", "--", "true"),
    ],
)
async def test_what_has_no_meaning_is_refused_before_anything_is_done(
    words: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("one", "two"):
        (folder / name).touch()  # else QMP:DISK is no pair
    said = await asyncio.to_thread(qmpcommit, *words)
    assert said.status == 2, said.err
    assert "freeze" in said.err
