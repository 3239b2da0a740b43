"""The daemon as a process of its own, and its API over its real socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.command import ENVIRONMENT
from tests.ground import forked
from tests.ground.complaints import complaints
from tests.ground.forked import Forked
from tests.ground.images import Chain
from tests.ground.machines import Machine, storage_daemon


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


@dataclass
class Answer:
    """What the API answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Daemon:
    """One daemon; it may be killed and started again."""

    folder: Path
    config: str
    environment: dict[str, str] = field(default_factory=dict)
    module: str = "qmpcommit.cli.main"
    log_level: str = "debug"
    process: asyncio.subprocess.Process | Forked | None = None
    through: Sequence[str] = ()
    fds: Sequence[int] = ()

    @property
    def socket(self) -> str:
        return str(self.folder / "d.sock")

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    async def launch(self) -> asyncio.subprocess.Process | Forked:
        """Start the process, and don't wait for it to serve."""
        path = self.folder / "config.toml"
        text = f'state = "{self.folder}/state"\nlog = "json"\nlog_level = "{self.log_level}"\n'
        top, _, listen = self.config.partition("[listen]")
        first, tables = _split(top)
        where = f'[listen]\nsocket = "{self.socket}"\n{listen}'
        path.write_text(f"{text}{first}\n{tables}\n{where}")
        words = ["daemon", "--config", str(path)]
        environment = {**ENVIRONMENT, **_debug(), **self.environment}
        with (self.folder / "daemon.log").open("ab") as log:
            if self.through or self.fds:
                self.process = await asyncio.create_subprocess_exec(
                    *self.through, sys.executable, "-m", self.module, *words,
                    stdout=log, stderr=log, env=environment, pass_fds=self.fds,
                )  # fmt: skip
            else:
                self.process = forked.start(
                    self.module, *words, output=log.fileno(), environment=environment,
                    imported=forked.DAEMON,
                )  # fmt: skip
        return self.process

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        await self.launch()
        await self.serving()

    async def serving(self) -> None:
        """Wait until it serves."""
        process = self.process
        assert process is not None
        async with asyncio.timeout(30):
            while True:
                if process.returncode is not None:
                    raise AssertionError(f"the daemon ended: {self.log}")
                with suppress(OSError):
                    if (await self.get("/readyz")).status == 200:
                        return
                await asyncio.sleep(0.02)  # there is nothing to wait on but the socket

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            return await self.process.wait()

    async def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        return await asyncio.to_thread(self._request, method, path, body, headers or {})

    def _request(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Answer:
        connection = UnixConnection(self.socket)
        try:
            raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            named = {"Content-Type": "application/json"} if raw is not None else {}
            connection.request(method, path, raw, {**named, **headers})
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    async def raw(self, *parts: bytes) -> Answer:
        """Send these very bytes, and read what is answered until the daemon hangs up."""
        return await asyncio.to_thread(self._raw, parts)

    def _raw(self, parts: tuple[bytes, ...]) -> Answer:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(self.socket)
            with suppress(OSError):  # it need not read all that is sent
                for part in parts:
                    sock.sendall(part)
            received = b""
            with suppress(ConnectionResetError):
                while data := sock.recv(1 << 16):
                    received += data
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in pairs}
        return Answer(int(first.split()[1]) if first else 0, headers, body)

    async def get(self, path: str) -> Answer:
        return await self.request("GET", path)

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.request("POST", path, body, named)

    async def commit(self, vm: str, **asked: Any) -> str:
        """Ask for a commit; its id."""
        answer = await self.post(f"/v1/vms/{vm}/commits", asked)
        assert answer.status == 202, answer.body
        return str(answer.json["id"])

    async def end_of(self, commit_id: str, seconds: float = 40) -> Any:
        """Wait for a commit's end, past restarts of the daemon."""
        async with asyncio.timeout(seconds):
            while True:
                with suppress(OSError, http.client.HTTPException):
                    answer = await self.get(f"/v1/commits/{commit_id}?wait=2")
                    assert answer.status == 200, answer.body
                    if answer.json["ended"]:
                        return answer.json
                await asyncio.sleep(0.01)

    async def until(self, commit_id: str, phase: str) -> None:
        """Wait until a commit is in this phase."""
        async with asyncio.timeout(30):
            while (await self.get(f"/v1/commits/{commit_id}")).json["phase"] != phase:
                await asyncio.sleep(0.01)

    async def connected(self, vm: str) -> None:
        """Wait until a VM is connected."""
        async with asyncio.timeout(30):
            while True:
                answer = await self.get(f"/v1/vms/{vm}")
                if answer.status == 200 and answer.json["state"] == "connected":
                    return
                await asyncio.sleep(0.01)


def _debug() -> dict[str, str]:
    """Asyncio's debug mode for the daemon, where the tests run in it."""
    return {"PYTHONASYNCIODEBUG": "1"} if sys.flags.dev_mode else {}


def _split(text: str) -> tuple[str, str]:
    """What comes before the first table, and the tables."""
    at = text.find("[")
    return (text, "") if at < 0 else (text[:at], text[at:])


@asynccontextmanager
async def daemon(folder: Path, config: str = "", **environment: str) -> AsyncIterator[Daemon]:
    """A daemon that serves; killed in the end where it still runs.

    `config` is TOML, ``[listen]`` last; the state folder, the socket and the logs are set here.
    """
    made = Daemon(folder, config, {**environment})
    try:
        await made.start()
        yield made
        assert not complaints(made.log)
    except BaseException:
        if (folder / "daemon.log").exists():
            print(made.log[-8000:])
        raise
    finally:
        if made.process is not None and made.process.returncode is None:
            os.kill(made.process.pid, signal.SIGCONT)
            await made.kill()


@asynccontextmanager
async def host_of(
    folder: Path, chain: Chain, config: str = "", listen: str = ""
) -> AsyncIterator[tuple[Daemon, Machine]]:
    """A daemon that knows the VM ``web1``; its images can be read afterwards."""
    text = f'{config}\n[[vm]]\nname = "web1"\nqmp = "{folder}/qmp"\n{listen}'
    async with storage_daemon(folder, chain) as qemu, daemon(folder, text) as d:
        await d.connected("web1")
        yield d, qemu
        await qemu.quit()
