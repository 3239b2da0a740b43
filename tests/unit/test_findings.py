"""What is found of a configuration before anything runs."""

from __future__ import annotations

import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from qmpcommit.daemon.config import parse
from qmpcommit.daemon.findings import examine, meet

CYCLE = "[[cycle]]\nvm = 'a'\ndisk = 'vda'\nevery = 5\nguest = 'reset'\n"
TRUE = "keep_if = ['true']\n"
RULE = "[[flatten]]\nkeep = 1\ndepth = 2\n"


@pytest.mark.parametrize(
    ("one", "other", "do"),
    [
        ("*", "*", True), ("a", "a", True), ("a", "b", False), ("web*", "*1", True),
        ("web*", "db*", False), ("a?c", "abc", True), ("a?", "abc", False),
        ("[ab]x", "[bc]x", True),
        ("[ab]x", "[cd]x", False), ("", "*", True), ("a*b*c", "aXbYc", True), ("*a", "*b", False),
        ("[", "[", True), ("[!a]", "a", False), ("x" * 500 + "*", "*" + "x" * 500, True),
    ],
)  # fmt: skip
def test_patterns_meet(one: str, other: str, do: bool) -> None:
    assert meet(one, other) is meet(other, one) is do


def test_a_configuration_that_is_right_has_nothing(folder: Path) -> None:
    text = f"state = '{folder}/s'\n[listen]\nsocket = '{folder}/d'\n{CYCLE}{TRUE}"
    assert examine(parse(text.encode(), "c")) == ([], [])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("state = 'FILE'", "state: FILE is no folder"),
        ("state = 'FILE/under'", "state: FILE is no folder"),
        ("[listen]\nsocket = 'FILE'", "listen.socket: FILE is there already, and is no socket"),
        ("[listen]\nsocket = 'FILE/d'", "listen.socket: .*FILE is no folder"),
        ("[listen]\nsocket = 'NONE/d'", "listen.socket: there is no folder NONE"),
        (f"[listen]\nsocket = '/{'x' * 107}'", "listen.socket: .*at most 107 bytes"),
        ("[access]\noverlays = ['NONE']", "access.overlays: NONE is not there"),
        ("[access]\nmonitors = ['NONE/*/sockets']", "access.monitors: NONE is not there"),
        ("[access]\ndeletions = ['FILE']", "access.deletions: FILE is no folder"),
        ("[access]\nagents = ['FILE/*']", "access.agents: FILE is no folder"),
        ("state = 'NEWER'", "state: NEWER/journal.db was written by a newer qmpcommitd"),
        ("state = 'ODD'", "state: ODD/journal.db is no file"),
        ("[[vm]]\nname = 'a'\nqmp = 'FILE'", "vm.0.qmp: FILE is no socket"),
        (f"{CYCLE}keep_if = ['no-such']", "cycle.0.keep_if: there is no command 'no-such'"),
        (f"{CYCLE}{TRUE}overlay_dir = 'NONE'", "cycle.0.overlay_dir: there is no folder NONE"),
        (f"{CYCLE}{TRUE}freeze = 'agent'\nagent = 'FILE'", "cycle.0: FILE is no socket of a's"),
    ],
)
def test_what_would_fail_when_it_is_needed(folder: Path, text: str, wrong: str) -> None:
    (folder / "file").touch()
    (folder / "odd" / "journal.db").mkdir(parents=True)
    (folder / "newer").mkdir()
    with closing(sqlite3.connect(folder / "newer" / "journal.db")) as journal:
        journal.executescript("CREATE TABLE whole (a); INSERT INTO whole VALUES (1)")
        journal.execute("PRAGMA user_version = 99")
    names = {each: f"{folder}/{each.lower()}" for each in ("FILE", "NONE", "ODD", "NEWER")}
    for name, path in names.items():
        text, wrong = text.replace(name, path), wrong.replace(name, path)
    if not text.startswith("state"):
        text = f"state = '{folder}/s'\n{text}"
    found = examine(parse(text.encode(), "c"))
    assert len(found.wrong) == 1
    assert all(part in found.wrong[0] for part in wrong.split(".*"))


def test_folders_that_may_come_to_be_are_noted(folder: Path) -> None:
    text = f"state = '{folder}/s'\n[[discover]]\nglob = '{folder}/none/*/qmp'\n"
    assert examine(parse(text.encode(), "c")) == (
        [],
        [f"discover.0: there is no folder {folder}/none yet, in which VMs are looked for"],
    )


def test_where_patterns_meet_is_noted(folder: Path) -> None:
    for name in ("web1", "web2"):
        (folder / name).mkdir()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{folder}/{name}/qmp")
    text = (
        f"state = '{folder}/s'\n{CYCLE}{TRUE}{RULE}vm = '*'\ndisk = 'vd*'\n"
        f"{RULE}vm = 'web*'\n{RULE}vm = 'db'\ndisk = 'sda'\n"
        f"[[vm]]\nname = 'one'\nqmp = '{folder}/web1/qmp'\n"
        f"[[vm]]\nname = 'other'\nqmp = '{folder}/web1/qmp'\n"
        f"[[discover]]\nglob = '{folder}/*/qmp'\n"
    )
    found = examine(parse(text.encode(), "c"))
    assert found.wrong == []
    assert [each.split(":")[0] for each in found.noted] == [
        "flatten.0 (* vd*) meets the cycle of vda of a",
        "flatten.0 (* vd*) meets flatten.1 (web* *)",
        "one and other have one monitor, which serves one at a time",
        "discover.0 finds the monitor of one too, and calls it web1",
        "discover.0 finds the monitor of other too, and calls it web1",
    ]


def test_what_a_journal_has_lost_is_noted(folder: Path) -> None:
    with sqlite3.connect(folder / "journal.db") as journal:
        journal.execute("CREATE TABLE losses (id INTEGER, why, kept, promises, all_named)")
        lost = (
            '[{"kind": "commit", "id": "c1", "vm": "a", "disk": "vda", "job_id": "", "how": "old"}]'
        )
        row = (1, "its last 3 transactions are lost", "/kept", lost, 1)
        journal.execute("INSERT INTO losses VALUES (?, ?, ?, ?, ?)", row)
    journal.close()
    (noted,) = examine(parse(f"state = '{folder}'".encode(), "c")).noted
    assert "set aside as /kept" in noted
    assert "commit c1 of vda of a" in noted
    (folder / "journal.db").write_bytes(b"no journal")
    assert examine(parse(f"state = '{folder}'".encode(), "c")).noted == []
