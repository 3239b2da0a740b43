"""A rule for all disks beside a golden base: what nobody approved does not come into it."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.command import qmpcommit
from tests.daemon.daemons import daemon
from tests.daemon.test_rules import RULE, commits, until
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon

CYCLE = '[[cycle]]\ndisk = "top"\nevery = "10000s"\nkeep_if = ["false"]\nguest = "stop"\n'


@pytest.mark.parametrize("called", ["web1", "another"])
async def test_a_disk_with_a_cycle_is_left_alone(folder: Path, called: str) -> None:
    """Although the cycle knows its VM by another name."""
    chain = make_chain(folder, 3)
    async with storage_daemon(folder, chain) as qemu:
        config = (
            f'{RULE}keep = 1\ndepth = 2\n{CYCLE}vm = "{called}"\n'
            f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n'
            f'[[vm]]\nname = "another"\nqmp = "{qemu.qmp2}"\n'
        )
        async with daemon(folder, config) as d:
            await d.connected("web1")
            await d.connected("another")

            def left_alone(rule: object) -> bool:
                return '"left-alone"' in json.dumps(rule) and "cycle" in json.dumps(rule)

            seen = await until(d, 0, left_alone)
            await until(d, 0, lambda rule: rule["last_look"] > seen["last_look"])
            assert await commits(d) == []
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


def test_check_config_says_where_they_meet(folder: Path) -> None:
    config = folder / "c.toml"
    rule = '[[flatten]]\nvm = "*"\nkeep = 1\ndepth = 2\n'
    config.write_text(f'state = "{folder}/s"\n{rule}{CYCLE}vm = "a"\n')
    said = qmpcommit("daemon", "--config", config, "--check-config")
    assert said.status == 0
    assert "note: flatten.0 (* *) meets the cycle of top of a" in said.out
    said = qmpcommit("daemon", "--config", config, "--check-config", "--json")
    assert "the rule leaves that disk alone" in json.loads(said.out)["notes"][0]


def test_check_config_finds_what_a_round_would_find(folder: Path) -> None:
    config = folder / "c.toml"
    config.write_text(f'state = "{folder}/s"\n{CYCLE.replace("false", "no-such")}vm = "a"\n')
    said = qmpcommit("daemon", "--config", config, "--check-config", "--json")
    assert said.status == 2
    assert "there is no command 'no-such'" in said.error["message"]


def test_check_config_finds_what_a_start_would_find(folder: Path) -> None:
    config = folder / "c.toml"
    state = folder / "s"
    listen = f'[listen]\nsocket = "{folder}/d.sock"\n'
    config.write_text(f'state = "{state}"\n{listen}[access]\noverlays = ["{folder}/none"]\n')
    said = qmpcommit("daemon", "--config", config, "--check-config", "--json")
    assert (said.status, "access.overlays" in said.error["message"]) == (2, True)
    config.write_text(f'state = "{state}"\n{listen}')
    assert qmpcommit("daemon", "--config", config, "--check-config").status == 0
    assert qmpcommit("daemon", "--config", config, "--timeout", "0.1").status == 0
    with closing(sqlite3.connect(state / "journal.db")) as journal:
        journal.execute("PRAGMA user_version = 99")
    for words in (["--check-config"], ["--timeout", "5"]):
        said = qmpcommit("daemon", "--config", config, *words, "--json")
        assert said.status
        assert "a newer qmpcommitd" in json.loads(said.out)["error"]["message"]
