"""The daemon's examples and its container, as far as they can be tried without one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import qmpcommit
from qmpcommit.daemon.config import Config, parse
from qmpcommit.wire.cycle import Cycle
from tests.cli.command import ENVIRONMENT, ROOT
from tests.constraints import needed, pinned
from tests.daemon.daemons import daemon
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon

EXAMPLES = ROOT / "examples" / "daemon"


async def run(*words: str, **more: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**ENVIRONMENT, **more},
    )  # fmt: skip
    async with asyncio.timeout(80):
        out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


def test_the_configuration_is_right_and_has_every_option() -> None:
    text = (EXAMPLES / "config.toml").read_text()
    assert parse(text.encode(), "x").discover[0].glob == "/run/vms/*/qmp.sock"
    everything = re.sub(r"(?m)^#((\w+ = )|\[)", r"\1", text)
    whole = parse(everything.encode(), "x")
    given = tomllib.loads(everything)

    def compare(model: Any, members: Any, path: str) -> None:
        either = {"every", "agent"} if isinstance(model, Cycle) else set()  # or at, or agents
        assert set(type(model).model_fields) - either == set(members), path
        for name, value in members.items():
            inner = getattr(model, name)
            if isinstance(inner, BaseModel):
                compare(inner, value, name)
            elif value and isinstance(value, list) and isinstance(value[0], dict):
                compare(inner[0], value[0], name)

    compare(whole, given, "")
    # What is commented out is the default, as it says.
    default = Config()
    for name in ("state", "log_level", "commands", "retain_days", "discover_every", "limits"):
        assert getattr(whole, name) == getattr(default, name), name
    assert (whole.listen.socket, whole.listen.mode) == (default.listen.socket, "0660")


@pytest.mark.skipif(not shutil.which("curl"), reason="the walk-through is one with curl")
async def test_the_walkthrough(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        script = str(EXAMPLES / "walkthrough.sh")
        status, said = await run(script, "web1", "top", d.socket)
        assert status == 0, said
        assert "window: done" in said
        assert "asked for twice, promised once" in said
        assert "phase: ready" in said
        assert "'action': 'pivot'" in said
        assert '"phase": "finished"' in said, "the events"
        assert 'qmpcommit_commits_total{outcome="pivot",policy="hold"} 1.0' in said
        status, said = await run(script, "web1", "nothing", d.socket)
        assert status != 0
        assert "No such disk" in said
        assert len((await d.get("/v1/commits")).json) == 2, "that of the window, and the other"
        assert await d.stop() == 0
    assert_disk(chain.base, chain.pictures[-1])


async def test_the_set_up_lays_everything_out(folder: Path) -> None:
    script = str(EXAMPLES / "setup-systemd.sh")
    target = folder / "root"
    given = {"DESTDIR": str(target), "QMPCOMMITD": "/usr/local/bin/qmpcommitd"}
    for _ in range(2):
        status, said = await run(script, **given)
        assert status == 0, said
        config = target / "etc/qmpcommit/config.toml"
        assert "/run/vms" in config.read_text()
        service = (target / "etc/systemd/system/qmpcommitd.service").read_text()
        assert "ExecStart=/usr/local/bin/qmpcommitd --config" in service
        for name in ("etc/systemd/system/qmpcommitd.socket", "usr/lib/sysusers.d/qmpcommit.conf",
                     "usr/lib/tmpfiles.d/qmpcommit.conf"):  # fmt: skip
            assert (target / name).is_file()
        config.write_text("# mine: /run/vms\n")
    assert config.read_text() == "# mine: /run/vms\n"


def _dockerfile() -> str:
    return re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())


async def test_the_containers_health_check(folder: Path) -> None:
    found = re.search(r"(?m)^HEALTHCHECK .*? CMD (\[.*)$", _dockerfile())
    assert found
    python, option, code = json.loads(found[1])
    assert (python, option) == ("python", "-c")
    assert "'/run/qmpcommit/qmpcommitd.sock'" in code
    code = code.replace("/run/qmpcommit/qmpcommitd.sock", f"{folder}/d.sock")
    assert (await run(sys.executable, "-c", code))[0] == 1
    async with daemon(folder) as d:
        assert await run(sys.executable, "-c", code) == (0, "")
        assert await d.stop() == 0
    assert (await run(sys.executable, "-c", code))[0] == 1


def test_the_image_tells_what_it_is_and_how_it_is_stopped() -> None:
    text = _dockerfile()
    assert f"ARG VERSION={qmpcommit.__version__}\n" in text
    for label in ("title", "description", "version", "licenses"):
        assert f"org.opencontainers.image.{label}=" in text
    assert "\nSTOPSIGNAL SIGTERM\n" in text
    stop = re.search(r"--stop-timeout (\d+)", text)
    unit = (ROOT / "qmpcommit/daemon/system/qmpcommitd.service").read_text()
    assert stop
    assert f"TimeoutStopSec={stop[1]}\n" in unit
    first, *others = (ROOT / ".dockerignore").read_text().splitlines()[1:]
    assert first == "*"
    copied = re.findall(r"(?m)^COPY (.*) \S+$", text)
    for name in " ".join(copied).split():
        assert f"!{name.removeprefix('./')}" in others, name


def test_the_image_has_the_versions_that_were_tested() -> None:
    """Each is what those that are pinned ask for, whatever is newer here."""
    assert "pip wheel --no-cache-dir --constraint constraints.txt " in _dockerfile()
    pins, found = pinned(), needed("qmpcommit[daemon,top]")
    for name, each in found.items():
        for parent, asked in each.asked:
            if parent == "qmpcommit" or pins.get(parent) == found[parent].version:
                assert asked.specifier.contains(pins[name], prereleases=True), (parent, asked)
    for name in ("uvicorn", "qemu-qmp", "pydantic", "h11"):  # of which more than what they promise
        bounds = {bound.operator for parent, each in found[name].asked for bound in each.specifier
                 if parent == "qmpcommit"}  # fmt: skip
        assert "<" in bounds, name


def test_the_container_runs_the_daemon_or_the_command(folder: Path) -> None:
    text = _dockerfile()
    entry = json.loads(re.findall(r"(?m)^ENTRYPOINT (.*)$", text)[-1])
    command = json.loads(re.findall(r"(?m)^CMD (.*)$", text)[-1])
    assert entry == ["qmpcommit"]
    assert command[:2] == ["daemon", "--config"]
    copied = re.search(rf"(?m)^COPY (\S+) {re.escape(command[2])}$", text)
    assert copied
    assert (ROOT / copied[1]).is_file()
    assert "USER qmpcommit" in text.split("FROM")[-1]
    for words in ([*command, "--help"], ["chain", "--help"]):
        subprocess.run(
            [sys.executable, "-m", "qmpcommit.cli.main", *words],
            check=True, capture_output=True, timeout=60, env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
