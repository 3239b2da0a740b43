"""Who may use the API: peers by user and group, and bearers of the token."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import qmpcommit
from tests.daemon.daemons import Daemon, daemon

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")

NOBODY, DAEMON = 65534, 1
"""Two numbers of users (and groups) that are not root."""

PEER = """
import os, socket, sys
path, uid, gid, groups = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.setgroups([int(g) for g in groups.split(",") if g])
os.setgid(gid)
os.setuid(uid)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(path)
except PermissionError:
    sys.exit("no access")
sock.sendall(b"GET /v1/vms HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
while data := sock.recv(65536):
    sys.stdout.buffer.write(data)
"""


def as_user(d: Daemon, uid: int, gid: int, *groups: int) -> tuple[int, str]:
    """What the API answers a process of that user: status (0: it can't connect) and text."""
    d.folder.chmod(0o711)
    words = [d.socket, str(uid), str(gid), ",".join(map(str, groups))]
    done = subprocess.run(
        [sys.executable, "-c", PEER, *words], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    if done.returncode:
        assert done.stderr == "no access\n"
        return 0, done.stderr
    return int(done.stdout.split()[1]), done.stdout


@needs_root
async def test_strangers_are_refused_by_their_credentials(folder: Path) -> None:
    """Although the socket itself lets everybody in."""
    async with daemon(folder, '[listen]\nmode = "0666"\n') as d:
        status, text = as_user(d, NOBODY, NOBODY)
        assert status == 403
        assert "application/problem+json" in text
        assert f"user {NOBODY} may not use this daemon" in text
        assert as_user(d, 0, NOBODY)[0] == 200


@needs_root
async def test_users_and_groups_that_are_allowed(folder: Path) -> None:
    listen = f'[listen]\nmode = "0666"\nusers = [{NOBODY}]\ngroups = ["daemon"]\n'
    async with daemon(folder, listen) as d:
        assert as_user(d, NOBODY, 7)[0] == 200
        assert as_user(d, 12345, DAEMON)[0] == 200
        assert as_user(d, DAEMON, 7)[0] == 403
        # A supplementary group that the host's group file does not know of is not believed.
        assert as_user(d, 12345, 7, DAEMON)[0] == 403


@needs_root
async def test_the_socket_has_the_mode_and_the_group_it_is_given(folder: Path) -> None:
    async with daemon(folder, '[listen]\ngroup = "daemon"\n') as d:
        status = os.stat(d.socket)
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert status.st_gid == DAEMON
        assert as_user(d, NOBODY, NOBODY)[0] == 0
        assert as_user(d, NOBODY, DAEMON)[0] == 200


async def test_the_socket_is_for_its_owner_and_group_alone(folder: Path) -> None:
    async with daemon(folder) as d:
        assert stat.S_IMODE(os.stat(d.socket).st_mode) == 0o660
        await d.kill()
        await d.start()  # over the dead one's socket
        assert await d.stop() == 0
        assert not Path(d.socket).exists(), "a socket that nobody serves is left behind"
        Path(d.socket).write_text("precious")
        process = await d.launch()
        assert await process.wait() != 0
        assert Path(d.socket).read_text() == "precious"
        assert "is no socket" in d.log


TOKEN = "0123456789abcdef-secret"


def _tcp(port: int, path: str = "/v1/vms", **headers: str) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status >= 400:
            assert json.loads(body)["status"] == answer.status
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


async def test_tcp_needs_the_token(folder: Path, free_port: int) -> None:
    token = folder / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    listen = f'[listen]\ntcp = "127.0.0.1:{free_port}"\ntoken_file = "{token}"\n'
    async with daemon(folder, listen) as d:
        assert (await d.get("/v1/vms")).status == 200, "the Unix socket needs none"
        assert _tcp(free_port, Authorization=f"Bearer {TOKEN}")[0] == 200
        for wrong in ("", "Bearer", "Bearer ", "Bearer None", f"Basic {TOKEN}", TOKEN,
                      f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \xff\xfe"):  # fmt: skip
            status, headers = _tcp(free_port, Authorization=wrong)
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), wrong
        for path in ("/healthz", "/metrics", "/openapi.json", "/v1/events"):
            assert _tcp(free_port, path)[0] == 401
        assert TOKEN not in d.log


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (TOKEN, 0o644, "others may read the token file"),
        ("short", 0o600, "shorter than 16"),
        ("é" * 20, 0o600, "ASCII"),
        (None, 0, "can't be read"),
    ],
)
def test_a_token_file_that_is_not_safe(folder: Path, text: str | None, mode: int, why: str) -> None:
    token = folder / "token"
    if text is not None:
        token.write_text(text)
        token.chmod(mode)
    config = folder / "c.toml"
    config.write_text(f'[listen]\ntcp = "127.0.0.1:1"\ntoken_file = "{token}"\n')
    said = qmpcommit("daemon", "--config", config, "--check-config", "--json")
    assert said.status == 2
    assert why in said.error["message"]


def test_a_configuration_is_checked_without_serving(folder: Path) -> None:
    config = folder / "c.toml"
    config.write_text(f'state = "{folder}/state"\n')
    said = qmpcommit("daemon", "--config", config, "--check-config")
    assert (said.status, said.out) == (0, f"{config} is right\n")
    assert not (folder / "state").exists()
    for text, why in (
        ('[listen]\nusers = ["nobody-at-all"]', "no user 'nobody-at-all'"),
        ('[listen]\ngroup = "nobody-at-all"', "no group 'nobody-at-all'"),
        ("[limits]\ncommit = 3", "limits.commit: is not known here"),
        ("x = ", "is no TOML"),
    ):
        config.write_text(text)
        said = qmpcommit("daemon", "--config", config, "--check-config", "--json")
        assert said.status == 2
        assert why in said.error["message"]


async def test_one_daemon_a_state_folder(folder: Path) -> None:
    async with daemon(folder) as d:
        first = d.process
        second = await d.launch()
        assert await second.wait() == 2
        assert "another qmpcommitd uses the state folder" in d.log
        d.process = first
        assert (await d.get("/healthz")).status == 200


async def test_a_socket_that_is_served_is_not_taken_away(folder: Path) -> None:
    async with daemon(folder) as d:
        config = folder / "c.toml"
        config.write_text(f'state = "{folder}/other"\n[listen]\nsocket = "{d.socket}"\n')
        said = qmpcommit("daemon", "--config", config, "--timeout", "1", "--json")
        assert said.status == 2
        assert "somebody listens on" in said.error["message"]
        assert (await d.get("/healthz")).status == 200
        other = Path(f"{d.socket}.other")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(other))
            other.rename(d.socket)
            assert await d.stop() == 0
            assert Path(d.socket).exists(), "it is not this daemon's"
        await d.start()
        assert await d.stop() == 0
        assert not Path(d.socket).exists()
