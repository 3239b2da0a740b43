"""``qmpcommit explain`` draws with a disk's files; ``completion`` completes words."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from qmpcommit.cli.commands import COMMANDS, COMPLETIONS
from qmpcommit.cli.completion import SHELLS
from qmpcommit.cli.explain import STORIES
from qmpcommit.manual import TOPICS
from tests.cli.command import COMMAND, ENVIRONMENT, qmpcommit, run
from tests.daemon.daemons import host_of
from tests.ground.images import make_chain
from tests.ground.machines import machine


def completed(*words: str) -> list[str]:
    """What bash would offer for the last word."""
    line = {"COMP_WORDS": " ".join(["qmpcommit", *words]), "COMP_CWORD": str(len(words))}
    said = qmpcommit(**line, _QMPCOMMIT_COMPLETE="bash_complete")
    assert (said.status, said.err) == (0, "")
    return [item.removeprefix("plain,") for item in said.out.splitlines() if item]


def offered(*words: str) -> list[str]:
    """The same of what a monitor has to tell, asked until it tells it in time."""
    while not (found := completed(*words)):
        pass
    return found


async def test_a_disks_own_files_are_drawn_and_nothing_is_sent(folder: Path) -> None:
    chain = make_chain(folder, 3)
    base, mid, top = (str(file) for file in chain.files)
    async with machine(folder, chain) as qemu:
        for story in STORIES:
            said = await run("explain", story, qemu.qmp, "vda", "--json")
            assert (said.status, said.err) == (0, "")
            (drawn,) = said.json["disks"]
            assert (drawn["disk"], drawn["files"]) == ("vda", [base, mid, top])
            last = {
                "pivot": ["base.qcow2"],
                "group": ["base.qcow2"],
                "recycle": ["base.qcow2", "FRESH"],
                "cycle": ["base.qcow2", "mid.qcow2", "FRESH"],
                "snapshot": ["base.qcow2", "mid.qcow2", "top.qcow2", "OVERLAY"],
            }
            assert drawn["stages"][-1]["chain"] == last.get(
                story, ["base.qcow2", "mid.qcow2", "top.qcow2"]
            )
        said = await run("explain", "pivot", qemu.qmp, "vda")
        assert "top.qcow2 and mid.qcow2 are stale: never boot it again" in said.out
        assert f"top.qcow2 is {top}" in said.out
        assert await qemu.execute("query-jobs") == []
        said = await run("explain", "pivot", qemu.qmp, "nothing", "--json")
        assert (said.status, said.error["type"]) == (4, "DiskNotFound")
        await qemu.quit()


async def test_what_a_vm_has_is_completed(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        assert offered("chain", qemu.qmp, "") == ["vda"]
        assert completed("commit", qemu.qmp, "x") == []
        await qemu.execute("block-commit", job_id="theirs", device="top")
        while (await qemu.execute("query-jobs"))[0]["status"] != "ready":
            await asyncio.sleep(0.01)  # an event of it may be past already
        assert offered("pivot", qemu.qmp, "") == ["theirs"]
        assert completed("pivot", "/nowhere", "") == []
        await qemu.quit()
    assert completed("com") == ["commit", "completion"]
    assert completed("commit", "--keep-o") == ["--keep-overlay"]


def test_topics_of_the_manual_are_completed() -> None:
    assert {"recovery", "recover"} <= set(completed("help", "rec"))
    assert set(completed("help", "")) >= {*TOPICS, *COMMANDS}


@pytest.mark.parametrize("place", ["before", "after"])
async def test_what_a_daemon_knows_is_completed(place: str, folder: Path) -> None:
    chain = make_chain(folder)
    async with host_of(folder, chain) as (d, _):
        daemon = f"--daemon={d.socket}"

        def words(command: str, *rest: str) -> list[str]:
            return [daemon, command, *rest] if place == "before" else [command, daemon, *rest]

        async def found(*asked: str) -> list[str]:
            return await asyncio.to_thread(offered, *words(*asked))

        assert await found("chain", "we") == ["web1"]
        assert await found("commit", "web1", "") == ["top"]
        job = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await d.until(job, "ready")
        assert (await found("pivot", "web1", ""))[0].startswith("qmpcommit-top-")
        assert await asyncio.to_thread(completed, *words("chain", "nothing")) == []


def test_stories_without_a_vm() -> None:
    for story in STORIES:
        said = qmpcommit("explain", story)
        assert (said.status, said.err) == (0, "")
        assert "base.qcow2 ◀── " in said.out
    for wrong in (["nothing"], ["pivot", "/x"], ["pivot", "/x", "vda", "vdb"]):
        assert qmpcommit("explain", *wrong).status == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_of_shells(shell: str) -> None:
    said = qmpcommit("completion", shell)
    assert (said.status, said.err) == (0, "")
    assert f"_QMPCOMMIT_COMPLETE={shell}_complete" in said.out


async def test_a_shell_finds_what_the_wheel_brings(folder: Path) -> None:
    command = folder / "qmpcommit"
    command.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    script = COMPLETIONS["bash-completion/completions/qmpcommit"]
    done = subprocess.run(
        ["bash", "-c", f"{script}complete -p qmpcommit"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PATH": f"{folder}:{os.environ['PATH']}"},
        check=True,
    )
    assert "-F _qmpcommit_completion qmpcommit" in done.stdout
    assert {place.split("/")[0].partition("-")[0] for place in COMPLETIONS} == set(SHELLS)
