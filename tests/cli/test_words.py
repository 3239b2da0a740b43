"""What helps: sections and examples, suggestions, the bare name, what may stand where."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from qmpcommit.cli.commands import COMMANDS
from qmpcommit.cli.main import cli
from qmpcommit.cli.sections import EXAMPLES, SECTIONS, Command
from tests.cli.command import ENVIRONMENT, on_a_terminal, qmpcommit
from tests.ground.images import make_chain
from tests.ground.machines import machine


async def test_the_usual_monitor_may_be_left_out(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        usual = {"QMPCOMMIT_QMP": qemu.qmp}
        named = qmpcommit("chain", qemu.qmp, "vda")
        assert qmpcommit("chain", "vda", **usual) == named
        assert qmpcommit("chain", qemu.qmp, "vda", QMPCOMMIT_QMP="/nowhere.sock") == named
        assert qmpcommit("jobs", **usual) == qmpcommit("jobs", qemu.qmp)
        said = qmpcommit("commit", "vda", "--keep-overlay", "--json", **usual)
        assert (said.status, said.json["action"]) == (0, "keep")
        said = qmpcommit("window", "vda", "--", "ls", "{vda}", **usual)
        assert (said.status, said.out.splitlines()[0]) == (0, str(chain.top))
        said = qmpcommit("pivot", "nothing", "--json", **usual)
        assert (said.status, said.error["type"]) == (4, "JobNotFound")
        await qemu.quit()


ONE_AFTER_ANOTHER = """
import json, sys
from qmpcommit.cli.main import main
ends = []
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        ends.append(end.code)
print()
print(json.dumps(ends))
"""
"""Many command lines in one process, which imports all that they need once."""


def test_examples_are_right_usage() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys()
    wanted: dict[str, int] = {}
    asked = []
    for name, lines in EXAMPLES.items():
        for line in lines:
            if name in ("daemon", "demo", "top"):
                continue  # what they do is tested elsewhere
            words = shlex.split(line.partition(" > ")[0])
            if words == ["vms"] or "--all" in words:
                continue  # it asks all VMs of the host, those of other tests too
            alone = name in ("help", "completion") or words == ["explain", "recycle"]
            wanted[line] = 0 if alone else 4
            asked.append(words)
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(asked)],
        capture_output=True, text=True, env=ENVIRONMENT, check=True, timeout=80,
    )  # fmt: skip
    assert dict(zip(wanted, json.loads(done.stdout.splitlines()[-1]), strict=True)) == wanted


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_sections_and_examples(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Command)
    text = command.get_help(click.Context(command, info_name=name))
    for line in EXAMPLES[name]:
        assert f"\n  qmpcommit {line}\n" in f"{text}\n"
    known = {option for options in SECTIONS.values() for option in options}
    for each in command.params:
        if isinstance(each, click.Option) and each.name not in known:
            assert (name, each.name) in {
                ("demo", "storage_daemon"),
                ("daemon", "check_config"),
                ("doctor", "everything"),
                ("ui", "no_browser"),
                ("ui", "port"),
            }
        if isinstance(each, click.Option):
            assert f"{each.opts[0]}" in text
    for section, options in SECTIONS.items():
        there = any(each.name in options for each in command.params)
        assert (f"\n{section}:\n" in text) is (there or section == "Output")


def test_what_is_unknown_suggests() -> None:
    assert "Did you mean 'commit'? See" in qmpcommit("comit").err
    assert "No such command 'frobnicate'. See" in qmpcommit("frobnicate").err
    assert "--pivot" in qmpcommit("commit", "/x", "vda", "--pivott").err


async def test_the_bare_name_helps_on_a_terminal() -> None:
    said = await on_a_terminal()
    assert said.status == 2
    assert said.out.replace("\r", "") == qmpcommit("--help", COLUMNS="120").out
    assert qmpcommit().err == "qmpcommit: Missing command. See 'qmpcommit --help'\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--daemon", "/nowhere/d.sock", "jobs", "web1"],
        ["jobs", "--daemon", "/nowhere/d.sock", "web1"],
        ["jobs", "web1", "--daemon=/nowhere/d.sock"],
        ["jobs", "web1", "--json", "--daemon", "/nowhere/d.sock", "--timeout", "9"],
    ],
    ids=" ".join,
)
def test_the_daemon_may_be_named_anywhere(words: list[str]) -> None:
    said = qmpcommit(*words, "--json")
    assert said.error["type"] == "DaemonUnreachable"
    assert said.error["address"] == "/nowhere/d.sock"


def test_what_a_windows_command_takes_is_its_own() -> None:
    said = qmpcommit("window", "/nowhere", "vda", "--", "echo", "--daemon", "/nowhere/d.sock")
    assert (said.status, said.err[:24]) == (4, "qmpcommit: can't connect")


def test_a_daemon_knows_its_vms_by_their_names() -> None:
    said = qmpcommit("jobs", "--daemon=/nowhere/d.sock", QMPCOMMIT_QMP="/nowhere.sock")
    assert said.status == 2
    assert "Missing argument 'QMP'" in said.err


async def test_a_narrow_terminal_is_shown_all(folder: Path) -> None:
    place = folder / "a-folder-of-images-with-quite-a-long-name"
    place.mkdir()
    chain = make_chain(place, 3)
    async with machine(folder, chain) as qemu:
        mark = {"node": "top", "name": "backup-of-every-night"}
        await qemu.execute("block-dirty-bitmap-add", **mark)
        wide = qmpcommit("chain", qemu.qmp)
        narrow = await on_a_terminal("chain", qemu.qmp, columns=60)
        assert (narrow.status, narrow.out.split()) == (0, wide.out.split())
        lines = narrow.out.splitlines()
        for file in chain.files:
            assert str(file) in [line.strip(" └─") for line in lines]  # so it can be copied
        assert all(len(line) <= 60 for line in lines if str(folder) not in line)
        wider = await on_a_terminal("chain", qemu.qmp, columns=200)
        assert wider.out.replace("\r", "") == wide.out
        await qemu.quit()


async def test_what_is_wrong_has_a_colour_unless_it_is_not_wanted(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        chain.base.rename(folder / "elsewhere")
        for colour, unwanted in ((True, ""), (False, "1")):
            said = await on_a_terminal("chain", qemu.qmp, columns=200, NO_COLOR=unwanted)
            assert "WARNING: " in said.out
            assert ("\x1b[" in said.out) is colour
        assert "\x1b[" not in qmpcommit("chain", qemu.qmp).out
        await qemu.quit()


async def test_a_narrow_bar_says_all_that_is_to_be_typed(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await on_a_terminal("commit", qemu.qmp, "vda", "--hold", "2", columns=60)
        assert said.status == 3
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\s\u2500-\u257f]", "", said.out)
        assert re.search(rf"READY\(qmpcommitpivot\|keep\|abort{qemu.qmp2}qmpcommit-vda-", shown)
        await qemu.quit()
