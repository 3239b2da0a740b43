"""What an operator expects: who asked for what, files that nobody else reads, HTTP as it is."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

from tests.daemon.daemons import Daemon, daemon, host_of
from tests.ground.images import make_chain
from tests.ground.machines import storage_daemon

HOLD = {"kind": "hold"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_nobody_else_reads_the_state_folder(folder: Path) -> None:
    state = folder / "state"
    before = os.umask(0)
    try:
        async with daemon(folder) as d:
            assert mode(state) == 0o700
            assert {mode(each) for each in state.iterdir()} == {0o600}
            await d.stop()
            state.chmod(0o755)  # as a version before has left it
            for each in state.iterdir():
                each.chmod(0o644)
            await d.start()
            assert mode(state) == 0o700
            assert {mode(each) for each in state.iterdir()} == {0o600}
    finally:
        os.umask(before)


async def test_a_state_folder_that_is_not_ours_alone_is_told(folder: Path) -> None:
    state = folder / "state"
    state.mkdir()
    state.chmod(0o755)
    (state / "somebody-elses").touch()
    async with daemon(folder) as d:
        assert mode(state) == 0o755
        assert "state_not_private" in d.log
        assert "mode 0755" in d.log


async def test_who_asked_for_what_is_told(folder: Path) -> None:
    chain = make_chain(folder)
    async with host_of(folder, chain) as (d, _):
        me = {"who": f"user {os.geteuid()}", "uid": os.geteuid(), "role": "admin"}
        asked = await d.commit("web1", disk="top", policy=HOLD)
        await d.until(asked, "ready")
        await d.kill()
        await d.start()
        await d.until(asked, "ready")
        await d.post(f"/v1/commits/{asked}/decision", {"action": "keep"})
        done = await d.end_of(asked)
        for by in (done["asked_by"], done["decided_by"]):
            assert by.pop("address").startswith("process ")
            assert by == me
        window = (await d.post("/v1/vms/web1/windows", {"disks": ["top"]})).json
        assert window["asked_by"]["uid"] == os.geteuid()
        await d.request("DELETE", f"/v1/windows/{window['id']}")
        ended = (await d.get(f"/v1/windows/{window['id']}?wait=20")).json
        assert ended["state"] == "done", ended
        members = [{"vm": "web1", "disk": "top"}]
        group = (await d.post("/v1/groups", {"members": members, "policy": {"kind": "keep"}})).json
        ended = (await d.get(f"/v1/groups/{group['id']}?wait=20")).json
        assert (ended["state"], ended["asked_by"]["uid"]) == ("done", os.geteuid()), ended
        lines = [json.loads(each) for each in d.log.splitlines()]
        told = [each for each in lines if each["event"] == "asked"]
        assert [(each["method"], each["path"], each["status"]) for each in told] == [
            ("POST", "/v1/vms/web1/commits", 202),
            ("POST", f"/v1/commits/{asked}/decision", 202),
            ("POST", "/v1/vms/web1/windows", 201),
            ("DELETE", f"/v1/windows/{window['id']}", 202),
            ("POST", "/v1/groups", 202),
        ]
        assert {each["uid"] for each in told} == {os.geteuid()}
        assert d.process is not None
        with sqlite3.connect(folder / "state" / "journal.db") as journal:
            (noted,) = journal.execute(
                "SELECT noted FROM commits WHERE id = ?", (asked,)
            ).fetchone()
        journal.close()
        assert json.loads(noted)["asked"]["role"] == "admin"


async def raw(d: Daemon, method: str, path: str) -> Any:
    head = f"{method} {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
    return await d.raw(head.encode())


async def test_head_is_get_without_a_body(folder: Path) -> None:
    async with daemon(folder) as d:
        for path in ("/v1/vms", "/healthz", "/openapi.json", "/metrics", "/v1/vms/web9"):
            got, head = await raw(d, "GET", path), await raw(d, "HEAD", path)
            assert head.status == got.status, path
            assert head.body == b""
            assert head.headers["content-type"] == got.headers["content-type"]
            if path in ("/v1/vms", "/v1/vms/web9"):
                assert head.headers["content-length"] == got.headers["content-length"]
        stream = await raw(d, "HEAD", "/v1/events")
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")


async def test_options_tells_what_may_be_asked(folder: Path) -> None:
    async with daemon(folder) as d:
        for path, allowed in (
            ("/v1/vms", "GET, HEAD, OPTIONS, POST"),
            ("/v1/vms/web1/commits", "OPTIONS, POST"),
            ("/v1/events", "GET, HEAD, OPTIONS"),
        ):
            said = await raw(d, "OPTIONS", path)
            assert (said.status, said.headers["allow"], said.body) == (204, allowed, b"")
        assert (await raw(d, "OPTIONS", "/v1/nothing")).status == 404


async def test_a_storage_that_hangs_keeps_no_thread_and_no_end(folder: Path) -> None:
    """The overlay of a window is looked at, and never seen again."""
    (disks := folder / "disks").mkdir()
    chain = make_chain(disks)
    async with storage_daemon(disks, chain) as qemu:
        made = Daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n')
        made.module, made.environment["QMPCOMMIT_SLOW"] = "tests.hostile.slow_disk", str(disks)
        try:
            await made.start()
            await made.connected("web1")
            window = (await made.post("/v1/vms/web1/windows", {"disks": ["top"]})).json
            place = f"/v1/windows/{window['id']}"
            size = (await made.get(place)).json["disks"]["top"]["size"]
            assert size > 0
            (disks / "hangs").touch()
            paths = [place] * 50 + ["/v1/windows"] * 4 + ["/v1/vms/web1/disks"]
            for answer in await asyncio.gather(*map(made.get, paths)):
                assert answer.status == 200
            told = (await made.get(place)).json["disks"]["top"]
            assert told["size"] == size, "what was seen last"
            await made.request("DELETE", place)
            ended = (await made.get(f"{place}?wait=20")).json
            assert ended["state"] == "done", ended
            assert await made.stop() == 0
        finally:
            if made.process is not None and made.process.returncode is None:
                await made.kill()
        await qemu.quit()
