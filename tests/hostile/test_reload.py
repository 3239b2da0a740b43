"""SIGHUP: the configuration is read again, and taken whole or not at all."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemons import Daemon, daemon
from tests.ground.images import make_chain
from tests.ground.machines import storage_daemon

CYCLE = (
    '[[cycle]]\nvm = "web1"\ndisk = "top"\nevery = "10000s"\nkeep_if = ["true"]\nguest = "stop"\n'
)
HOLD = {"disk": "top", "policy": {"kind": "hold"}}


class Host:
    """A daemon whose configuration can be written anew, and two monitors."""

    def __init__(self, d: Daemon, folder: Path) -> None:
        self.d, self.folder = d, folder
        self._read = 0

    def vm(self, name: str, monitor: str = "web1") -> str:
        return f'[[vm]]\nname = "{name}"\nqmp = "{self.folder}/{monitor}/qmp"\n'

    async def read(self, text: str, whole: str = "") -> dict[str, Any]:
        """Have it read that; what the log says of it."""
        path = self.folder / "config.toml"
        top = f'state = "{self.folder}/state"\nlog = "json"\nlog_level = "debug"\n'
        listen = f'[listen]\nsocket = "{self.d.socket}"\n'
        path.write_text(whole or f"{top}{text}\n{listen}")
        assert self.d.process is not None
        self.d.process.send_signal(signal.SIGHUP)
        self._read += 1
        async with asyncio.timeout(30):
            while len(told := self.told()) < self._read:
                await asyncio.sleep(0.01)
        return told[-1]

    def told(self) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in self.d.log.splitlines(keepends=True) if "\n" in line)
        return [line for line in lines if line["event"] in ("reloaded", "reload_refused")]

    async def get(self, path: str) -> Any:
        return (await self.d.get(path)).json


@asynccontextmanager
async def host(folder: Path) -> AsyncIterator[Host]:
    for name in ("web1", "web2"):
        (folder / name).mkdir()
    async with (
        storage_daemon(folder / "web1", make_chain(folder / "web1")),
        storage_daemon(folder / "web2", make_chain(folder / "web2")),
    ):
        first = f'[[vm]]\nname = "web1"\nqmp = "{folder}/web1/qmp"\n'
        async with daemon(folder, first) as d:
            await d.connected("web1")
            yield Host(d, folder)


async def test_all_is_taken_that_can_be(folder: Path) -> None:
    async with host(folder) as h:
        asked = await h.d.commit("web1", **HOLD)
        await h.d.until(asked, "ready")
        rule = '[[flatten]]\nvm = "web*"\nkeep = 9\ndepth = 9\n'
        text = f"[limits]\nper_vm = 1\ngone_after = 5\n{rule}{CYCLE}{h.vm('web1')}"
        told = await h.read(text + h.vm("web2", "web2"))
        assert told["event"] == "reloaded"
        assert told["changed"] == ["limits", "vm", "flatten", "cycle"]
        await h.d.connected("web2")
        assert len(await h.get("/v1/rules")) == 1
        assert (await h.get("/v1/cycles"))[0]["next_round"] > 0
        # What is promised goes on as it was promised.
        assert (await h.get(f"/v1/commits/{asked}"))["phase"] == "ready"
        await h.d.post(f"/v1/commits/{asked}/decision", {"action": "keep"})
        assert (await h.d.end_of(asked))["state"] == "done"
        await h.read(h.vm("web1"))
        assert await h.get("/v1/rules") == await h.get("/v1/cycles") == []
        assert [vm["name"] for vm in await h.get("/v1/vms")] == ["web1"]
        assert (await h.get("/v1/vms/web1"))["state"] == "connected"


async def test_rights_are_taken(folder: Path) -> None:
    async with host(folder) as h:
        new = {"name": "web2", "qmp": str(folder / "web2" / "qmp")}
        await h.read(f"[access]\nmonitors = []\n{h.vm('web1')}")
        assert (await h.d.post("/v1/vms", new)).status == 422
        await h.read(f'[access]\nmonitors = ["{folder}/web2"]\n{h.vm("web1")}')
        assert (await h.d.post("/v1/vms", new)).status == 201


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[limits]\ncommits = 0\nVM", "limits.commits: must be at least 1"),
        ("x = [", "is no TOML"),
        ("VM[[access.grant]]\nrole = 'read'\nusers = ['nobody-at-all']", "nobody-at-all"),
        (f"{CYCLE.replace('true', 'no-such')}VM", "there is no command 'no-such'"),
        ("", "web1 has commits that have not ended"),
        ("OTHER", "web1 has commits that have not ended"),
        ("WHOLE", "changes state, log, log_level, listen.socket, which takes a restart"),
    ],
)
async def test_what_is_wrong_is_refused_whole(folder: Path, text: str, why: str) -> None:
    async with host(folder) as h:
        asked = await h.d.commit("web1", **HOLD)
        await h.d.until(asked, "ready")
        before = await h.get("/v1/vms")
        text = text.replace("VM", h.vm("web1")).replace("OTHER", h.vm("web1", "web2"))
        rule = '[[flatten]]\nvm = "*"\nkeep = 9\ndepth = 9\n'
        whole = rule + h.vm("web1") if text == "WHOLE" else ""
        told = await h.read(f"{text}\n{rule}", whole)
        assert told["event"] == "reload_refused"
        assert why in told["why"], told
        assert told["why"].endswith("Nothing was changed")
        assert await h.get("/v1/rules") == []
        assert await h.get("/v1/vms") == before
        assert (await h.get(f"/v1/commits/{asked}"))["phase"] == "ready"
