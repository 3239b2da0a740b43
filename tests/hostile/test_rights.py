"""Rights of an API user end at what was granted: roles, VMs, folders."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import qmpcommit
from tests.daemon.daemons import Daemon, daemon
from tests.ground.images import make_chain
from tests.ground.machines import machine, storage_daemon

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")

ROLES = {"reader": ("read", "*"), "webs": ("operate", "web*"), "boss": ("admin", "*")}
HOLD = {"disk": "top", "policy": {"kind": "hold"}}


class House:
    """A daemon with the VMs web1 and db1, and who asks it over TCP."""

    def __init__(self, d: Daemon, port: int, folder: Path) -> None:
        self.d, self.port, self.folder = d, port, folder

    async def ask(self, who: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return await asyncio.to_thread(self._ask, who, method, path, body)

    def _ask(self, who: str, method: str, path: str, body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            token = (self.folder / f"{who}.token").read_text()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            raw = None if body is None else json.dumps(body)
            connection.request(method, path, raw, headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else text
        finally:
            connection.close()

    async def commit(self, vm: str) -> str:
        """One that waits for a decision."""
        known = await self.d.commit(vm, **HOLD)
        await self.d.until(known, "ready")
        return known


@asynccontextmanager
async def house(folder: Path, port: int, access: str = "") -> AsyncIterator[House]:
    grants = ""
    for who, (role, vms) in ROLES.items():
        path = folder / f"{who}.token"
        path.write_text(f"{who}-{'0' * 20}")
        path.chmod(0o600)
        grants += f'[[access.grant]]\nrole = "{role}"\ntokens = ["{path}"]\nvms = ["{vms}"]\n'
    for name in ("web1", "db1"):
        (folder / name).mkdir()
    async with (
        storage_daemon(folder / "web1", make_chain(folder / "web1")) as web,
        storage_daemon(folder / "db1", make_chain(folder / "db1")) as db,
    ):
        config = (
            f'[access]\n{access}\n{grants}[[vm]]\nname = "web1"\nqmp = "{web.qmp}"\n'
            f'[[vm]]\nname = "db1"\nqmp = "{db.qmp}"\n[listen]\ntcp = "127.0.0.1:{port}"\n'
        )
        async with daemon(folder, config) as d:
            await d.connected("web1")
            await d.connected("db1")
            yield House(d, port, folder)


async def test_each_role_may_what_it_may_on_its_vms(folder: Path, free_port: int) -> None:
    async with house(folder, free_port) as h:
        new = {"name": "web2", "qmp": str(folder / "web1" / "qmp2")}
        tried = [
            ("GET", "/v1/vms/web1/disks", None, {"reader": 200, "webs": 200, "boss": 200}),
            ("GET", "/v1/vms/db1/disks", None, {"reader": 200, "webs": 404, "boss": 200}),
            ("POST", "/v1/vms/db1/commits", HOLD, {"reader": 403, "webs": 404}),
            ("POST", "/v1/vms/web1/commits", HOLD, {"reader": 403, "webs": 202}),
            ("POST", "/v1/vms", new, {"reader": 403, "webs": 403, "boss": 201}),
            ("DELETE", "/v1/vms/web2", None, {"reader": 403, "webs": 403, "boss": 204}),
            ("GET", "/metrics", None, {"reader": 200, "webs": 403}),
            ("GET", "/healthz", None, {"reader": 200, "webs": 200}),
        ]
        for method, path, body, wanted in tried:
            for who, status in wanted.items():
                said = await h.ask(who, method, path, body)
                assert said[0] == status, (who, method, path, said)
        groups = {"members": [{"vm": v, "disk": "top"} for v in ("web1", "db1")], "policy": None}
        groups["policy"] = {"kind": "keep"}  # type: ignore[assignment]
        assert (await h.ask("webs", "POST", "/v1/groups", groups))[0] == 404
        window = {"disks": ["top"]}
        assert (await h.ask("reader", "POST", "/v1/vms/web1/windows", window))[0] == 403


async def test_what_is_of_other_vms_is_not_seen(folder: Path, free_port: int) -> None:
    async with house(folder, free_port) as h:
        web, db = await h.commit("web1"), await h.commit("db1")
        for path, name in (("/v1/vms", "name"), ("/v1/commits", "vm")):
            status, seen = await h.ask("webs", "GET", path)
            assert status == 200
            assert {each[name] for each in seen} == {"web1"}
            assert {each[name] for each in (await h.ask("reader", "GET", path))[1]} == {
                "web1", "db1",
            }  # fmt: skip
        none = "f" * len(db)
        for path in ("/v1/commits/{}", "/v1/commits?after={}"):
            status, said = await h.ask("webs", "GET", path.format(db))
            expected = await h.ask("webs", "GET", path.format(none))
            assert (status, json.loads(json.dumps(said).replace(db, none))) == expected
        assert (await h.ask("webs", "GET", f"/v1/commits/{db}"))[0] == 404
        keep = {"action": "keep"}
        assert (await h.ask("webs", "POST", f"/v1/commits/{db}/decision", keep))[0] == 404
        assert (await h.ask("reader", "POST", f"/v1/commits/{db}/decision", keep))[0] == 403
        assert (await h.ask("webs", "POST", f"/v1/commits/{web}/decision", keep))[0] == 202
        await h.d.end_of(web)
        assert (await h.d.get(f"/v1/commits/{db}")).json["phase"] == "ready"
        told = await asyncio.to_thread(events, h, "webs", web)
        assert b'"web1"' in told
        assert b"db1" not in told


def events(h: House, who: str, until: str) -> bytes:
    """All that is told, up to the end of a commit."""
    with socket.create_connection(("127.0.0.1", h.port), timeout=30) as sock:
        token = (h.folder / f"{who}.token").read_text()
        head = (
            f"GET /v1/events?after=0 HTTP/1.1\r\nHost: d\r\nAuthorization: Bearer {token}\r\n\r\n"
        )
        sock.sendall(head.encode())
        told = b""
        while not (until.encode() in told and b'"done"' in told):
            data = sock.recv(1 << 16)
            assert data
            told += data
        return told


async def test_files_are_used_made_and_deleted_only_where_they_may_be(
    folder: Path, free_port: int
) -> None:
    async with house(folder, free_port) as h:
        other = folder / "other"
        other.mkdir()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(other / "qmp"))
            new = {"name": "web2", "qmp": str(other / "qmp")}
            status, said = await h.ask("boss", "POST", "/v1/vms", new)
            assert (status, "access.monitors" in said["detail"]) == (422, True)
        window = {"disks": ["top"], "overlay_dir": str(other)}
        status, said = await h.ask("boss", "POST", "/v1/vms/web1/windows", window)
        assert (status, "access.overlays" in said["detail"]) == (422, True)
        agent = {"disks": ["top"], "freeze": "agent", "agent": str(other / "agent")}
        status, said = await h.ask("boss", "POST", "/v1/vms/web1/windows", agent)
        assert (status, "access.agents" in said["detail"]) == (422, True)
        assert os.listdir(other) == ["qmp"]


async def test_an_overlay_is_made_only_beside_its_disk(folder: Path) -> None:
    other, link = folder / "other", folder / "link"
    other.mkdir()
    link.symlink_to(other)
    (folder / "vm").mkdir()
    async with machine(folder / "vm", make_chain(folder / "vm")) as qemu:
        config = f'[access]\n[[vm]]\nname = "vm"\nqmp = "{qemu.qmp}"\n'
        async with daemon(folder, config) as d:
            await d.connected("vm")
            for place in (other, link):
                recycle = {"kind": "recycle", "overlay": str(place / "new.qcow2")}
                for policy in (recycle, {"kind": "hold", "otherwise": recycle, "timeout": 1}):
                    asked = {"disk": "vda", "policy": policy}
                    said = await d.post("/v1/vms/vm/commits", asked)
                    assert (said.status, "access.overlays" in said.json["detail"]) == (422, True)
            assert os.listdir(other) == []
            recycle = {"kind": "recycle", "overlay": str(folder / "vm" / "new.qcow2")}
            done = await d.end_of(await d.commit("vm", disk="vda", policy=recycle, delete=True))
            assert done["state"] == "done", done
        await qemu.quit()


async def test_folders_can_be_listed(folder: Path, free_port: int) -> None:
    access = f'deletions = ["{folder}/none"]\noverlays = ["{folder}/w*"]\nmonitors = []\n'
    async with house(folder, free_port, access) as h:
        pivot = {"disk": "top", "policy": {"kind": "pivot"}, "delete": True}
        status, said = await h.ask("boss", "POST", "/v1/vms/web1/commits", pivot)
        assert (status, "access.deletions" in said["detail"]) == (422, True)
        window = {"disks": ["top"]}
        assert (await h.ask("boss", "POST", "/v1/vms/db1/windows", window))[0] == 422
        assert (await h.ask("boss", "POST", "/v1/vms/web1/windows", window))[0] == 201
        new = {"name": "web2", "qmp": str(folder / "web1" / "qmp2")}
        assert (await h.ask("boss", "POST", "/v1/vms", new))[0] == 422


async def test_a_token_is_exchanged_without_a_restart(folder: Path, free_port: int) -> None:
    async with house(folder, free_port) as h:
        path = folder / "webs.token"
        old = path.read_text()
        assert (await h.ask("webs", "GET", "/v1/vms"))[0] == 200
        fresh = folder / "fresh"
        fresh.write_text("another-token-of-sufficient-length")
        fresh.chmod(0o600)
        fresh.rename(path)
        assert (await h.ask("webs", "GET", "/v1/vms"))[0] == 200
        path.write_text(old)
        path.chmod(0o644)  # everybody reads it: the one before counts until that is put right
        assert (await h.ask("webs", "GET", "/v1/vms"))[0] == 401


ASKS = """
import os, socket, sys
path, uid, gid, line = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.setgroups([])
os.setgid(gid)
os.setuid(uid)
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)
sock.sendall(f"{line} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
print(sock.recv(65536).split()[1].decode())
"""


@needs_root
async def test_users_and_groups_have_roles_too(folder: Path) -> None:
    folder.chmod(0o711)
    access = (
        '[[access.grant]]\nrole = "read"\nusers = [2000]\nvms = ["web*"]\n'
        '[[access.grant]]\nrole = "admin"\ngroups = ["daemon"]\n'
        '[[vm]]\nname = "web1"\nqmp = "/nowhere/web1/qmp"\nconnect = "on-demand"\n'
        '[listen]\nmode = "0666"\n'
    )
    async with daemon(folder, access) as d:

        async def asks(uid: int, gid: int, line: str) -> int:
            words = [sys.executable, "-c", ASKS, d.socket, str(uid), str(gid), line]
            done = await asyncio.to_thread(
                subprocess.run, words, capture_output=True, text=True, check=True
            )
            return int(done.stdout)

        assert await asks(2001, 2001, "GET /v1/vms") == 403
        assert await asks(2000, 2001, "GET /v1/vms/web1") == 200
        assert await asks(2000, 2001, "DELETE /v1/vms/web1") == 403
        assert await asks(2000, 2001, "GET /v1/vms/db1") == 404
        assert await asks(2001, 1, "DELETE /v1/vms/web1") == 409


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('[[access.grant]]\nrole = "king"', "must be 'read', 'operate' or 'admin'"),
        ('[[access.grant]]\nrole = "read"\nusers = ["nobody-at-all"]', "no user 'nobody-at-all'"),
        ('[[access.grant]]\nrole = "read"\ntokens = ["/nowhere"]', "/nowhere can't be read"),
        ('[access]\nmonitors = ["run"]', "must be an absolute path"),
        ('[access]\nadmins = ["a"]', "access.admins: is not known here; there are agents"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, text: str, wrong: str) -> None:
    config = folder / "c.toml"
    config.write_text(f'state = "{folder}/s"\n{text}\n')
    said = qmpcommit("daemon", "--config", config, "--check-config", "--json")
    assert said.status == 2
    assert wrong in said.error["message"]


@needs_root
async def test_a_host_that_tells_no_groups_holds_up_nobody_else(folder: Path) -> None:
    folder.chmod(0o711)
    made = Daemon(folder, '[listen]\nmode = "0666"\ngroups = ["daemon"]\n')
    made.module = "tests.hostile.slow_host"
    try:
        await made.start()
        words = [sys.executable, "-c", ASKS, made.socket, "2001", "2001", "GET /healthz"]
        stranger = asyncio.create_task(
            asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=True)
        )
        while not stranger.done():
            assert (await made.get("/healthz")).status == 200
            await asyncio.sleep(0.02)
        assert (await stranger).stdout == "403\n"
        assert await made.stop() == 0
    finally:
        if made.process is not None and made.process.returncode is None:
            await made.kill()
