"""The files that a window's COMMAND is told: as arguments and variables, never as program text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.command import qmpcommit
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import storage_daemon


async def test_a_command_is_handed_the_files_that_stand_still(folder: Path) -> None:
    made = make_chain(folder, relative=True)
    strange = folder / "top.; touch stray"
    made.top.rename(strange)
    chain = Chain([made.base.relative_to(folder), strange.relative_to(folder)], made.pictures)
    copies = [folder / "first", folder / "second"]
    async with storage_daemon(folder, chain) as qemu:
        told = qmpcommit("window", qemu.qmp, "top.; touch stray", "--", "true")
        assert told.status == 0, told.err
        said = qmpcommit(
            "window", qemu.qmp, strange, "--", "sh", "-c", f"cp {{{strange}}} {folder}/copy"
        )
        assert (said.status, "The command was not run" in said.err) == (2, True)
        program = f'cp "$1" {copies[0]}; cp "$QMPCOMMIT_FILES" {copies[1]}'
        said = qmpcommit(
            "window", qemu.qmp, strange, "--", "sh", "-c", program, "sh", f"{{{strange}}}"
        )
        assert said.status == 0, said.err
        await qemu.quit()
    for copy in copies:
        assert copy.read_bytes() == strange.read_bytes()
    assert not list(Path.cwd().glob("stray*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount namespace of its own")
async def test_a_name_that_is_another_file_here_is_handed_to_no_command(folder: Path) -> None:
    """QEMU's folder has another one mounted over it, in QEMU's own mount namespace."""
    theirs, ours = folder / "theirs", folder / "vm"
    theirs.mkdir()
    ours.mkdir()
    chain = make_chain(theirs, relative=True)
    for path in chain.files:
        (ours / path.name).write_bytes(b"another VM's disk")
    seen = Chain([ours / path.name for path in chain.files], chain.pictures)
    wrap = ["unshare", "-m", "sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh"]
    async with storage_daemon(folder, seen, wrap=[*wrap, str(theirs), str(ours)]) as qemu:
        command = ["--", "cp", "{top}", str(folder / "copy")]
        said = qmpcommit("window", qemu.qmp, "top", *command)
        assert (said.status, "another file in the view of QEMU" in said.err) == (1, True), said.err
        for hook in (["--only-if", "true"], ["--check", "true"], ["--on-pivot", "true"]):
            policy = [] if hook[0] == "--check" else ["--pivot"]
            said = qmpcommit("commit", qemu.qmp, "top", *policy, *hook)
            assert (said.status, "would be told" in said.err) == (1, True), said.err
        assert "another file in the view of QEMU" in qmpcommit("chain", qemu.qmp, "--json").out
        said = qmpcommit("commit", qemu.qmp, "top", "--pivot", "--delete")
        assert said.status == 0
        await qemu.quit()
    assert not (folder / "copy").exists()
    assert_disk(theirs / "base.qcow2", chain.pictures[-1])
    assert {(ours / path.name).read_bytes() for path in chain.files} == {b"another VM's disk"}
