"""Group commits and cycles of real guests, frozen by a real ``qemu-ga`` for the one instant."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.guest import marks as freeze_marks
from tests.cli.command import ENVIRONMENT
from tests.cli.command import run as qmpcommit
from tests.guest.guest import (
    SLOTS,
    assert_files,
    file_system,
    guest,
    journal_is_empty,
    needs_guest,
)
from tests.guest.test_windows import as_acknowledged, spun, status_of

pytestmark = [needs_guest, pytest.mark.timeout(600)]


async def test_the_base_that_is_kept_is_what_the_agent_has_flushed(folder: Path) -> None:
    chain = file_system(folder)
    async with guest(folder, chain) as made, qc.Session.connect(made.qemu.qmp) as vm:
        made.order("agent")
        seen: list[str] = []

        async def held(jobs: Any) -> None:
            """All is decided and held, and nothing is finalized yet."""
            seen.append(await status_of(made))

        # Without a freeze: what a power cut leaves, so the test can tell.
        await vm.commit_group(["vda"], policy=qc.Keep(), on_decision=held)
        assert not journal_is_empty(chain.base)
        await made.more()
        asked: dict[str, Any] = {"freeze": "agent", "agents": made.agent, "on_decision": held}
        before = as_acknowledged(made)
        outcome = await vm.commit_group(["vda"], policy=qc.Keep(), **asked)
        now = as_acknowledged(made)
        assert await status_of(made) == "thawed"
        assert journal_is_empty(chain.base)
        assert seen == ["thawed", "frozen"]
        assert outcome.outcomes[0].quiesced
        kept = folder / "kept.qcow2"
        shutil.copyfile(chain.base, kept)
        now.acked.pop(now.count % SLOTS, None)  # which may have been written already
        before.acked = {n: said for n, said in before.acked.items() if now.acked.get(n) == said}
        assert_files(kept, before)
        await made.more()
        await vm.commit_group(["vda"], policy=qc.Pivot(), **asked)
        assert seen[-1] == "frozen"
        await made.more()
        await made.power_off()
    assert_files(chain.base, made)


async def test_one_guest_that_can_not_be_frozen_has_none_pivoted(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
    chains = [file_system(folder / name) for name in ("a", "b")]
    async with (
        guest(folder / "a", chains[0]) as willing,
        guest(folder / "b", chains[1]) as deaf,  # no agent runs in it
        qc.Session.connect(willing.qemu.qmp, name="willing") as one,
        qc.Session.connect(deaf.qemu.qmp, name="deaf") as other,
    ):
        willing.order("agent")
        assert await status_of(willing) == "thawed"
        agents = {one: willing.agent, other: deaf.agent}
        disks = [(one, "vda"), (other, "vda")]
        with pytest.raises(qc.GroupFailed, match=r"vda of deaf: its guest could not be quiesced"):
            await qc.commit_group(disks, policy=qc.Pivot(), freeze="agent", agents=agents)
        assert await status_of(willing) == "thawed"
        for vm, chain, made in zip((one, other), chains, (willing, deaf), strict=True):
            assert (await vm.disk("vda")).chain[0].filename == str(chain.top)
            assert await freeze_marks.marks(vm) == []
            await made.more()
        deaf.order("agent")
        assert await status_of(deaf) == "thawed"
        outcome = await qc.commit_group(disks, policy=qc.Pivot(), freeze="agent", agents=agents)
        assert all(each.quiesced for each in outcome.outcomes)
        for made in (willing, deaf):
            await made.more()
            await made.power_off()
    for chain, made in zip(chains, (willing, deaf), strict=True):
        assert_files(chain.base, made)


@pytest.mark.parametrize("freeze", ["agent", "pause"])
async def test_a_round_that_is_kept_under_a_writing_guest(folder: Path, freeze: Any) -> None:
    chain = file_system(folder)
    async with guest(folder, chain, style="implicit") as made:
        made.order("agent")
        assert await status_of(made) == "thawed"
        async with qc.Session.connect(made.qemu.qmp) as vm:
            how: dict[str, Any] = {"freeze": freeze, "guest": "stop"}
            how |= {"agents": made.agent} if freeze == "agent" else {}
            one = await vm.cycle("vda", keep_if=["true"], **how)
            assert one.kept is not None
            assert one.kept.quiesced
            assert one.kept.guest_paused
            assert await status_of(made) == "thawed"
            # Only what is frozen is clean; a pause alone leaves the journal to be replayed.
            assert journal_is_empty(chain.base) is (freeze == "agent")
            await made.more()
        await made.power_off()
    assert_files(Path(one.overlay), made)


async def test_what_a_killed_group_left_frozen_is_thawed_by_the_next(folder: Path) -> None:
    chain = file_system(folder)
    async with guest(folder, chain, style="implicit") as made:
        made.order("agent")
        assert await status_of(made) == "thawed"
        words = ["cycle", made.qemu.qmp, "vda", "--keep-if", "true", "--stop"]
        words += ["--freeze", "agent", "--agent", made.agent]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.guest.killed_frozen", *words, env=ENVIRONMENT
        )
        assert await process.wait() == -signal.SIGKILL
        assert await status_of(made) == "frozen"
        assert await spun(made) == 0
        named = await qmpcommit("cycle", made.qemu.qmp, "vda", "--keep-if", "true", "--stop")
        assert named.status == 1
        assert "frozen through its agent for a group commit or cycle" in named.err
        assert "(it needs --agent SOCKET)" in named.err
        assert await status_of(made) == "frozen"
        thawing = await qmpcommit(*words)  # whose job is in the way still
        assert thawing.status == 1
        assert await status_of(made) == "thawed"
        await made.more()
        for job in await made.qemu.execute("query-jobs"):
            assert (await qmpcommit("abort", made.qemu.qmp, job["id"])).status == 0
        done = await qmpcommit(*words, "--json")
        assert done.status == 0, done.err
        assert journal_is_empty(chain.base)
        await made.more()
        await made.power_off()
    assert_files(Path(done.json["overlay"]), made)
