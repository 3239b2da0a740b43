"""Strangers that connect and say little: who has a right to the daemon is answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.daemon.daemons import Daemon

TOKEN = "0123456789abcdef-secret"
HEAD = b"GET /healthz HTTP/1.1\r\nHost: d\r\n"


@contextmanager
def many_files() -> Iterator[None]:
    """This process may have more of them than the daemon."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 3000), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def served(
    folder: Path, port: int, limits: str = "", **hurry: float
) -> AsyncIterator[Daemon]:
    """A daemon on both sockets, which can't open more than 1024 files."""
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    listen = f'[listen]\ntcp = "127.0.0.1:{port}"\ntoken_file = "{token}"\n'
    made = Daemon(folder, f"{limits}\n{listen}", through=("prlimit", "--nofile=1024:1024"))
    if hurry:
        made.module = "tests.hostile.hurried"
        named = {name.replace("__", "."): value for name, value in hurry.items()}
        made.environment["QMPCOMMIT_HURRY"] = json.dumps(named)
    try:
        await made.start()
        yield made
    except BaseException:
        print(made.log[-4000:])
        raise
    finally:
        if made.process is not None and made.process.returncode is None:
            await made.kill()


def connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    sock.settimeout(30)
    return sock


def local(d: Daemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(d.socket)
    return sock


def is_cut(sock: socket.socket) -> bool:
    """Wait until the daemon has ended it."""
    with suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass
    return True


async def test_idle_strangers_on_tcp_keep_nobody_from_the_unix_socket(
    folder: Path, free_port: int
) -> None:
    with many_files(), ExitStack() as stack:
        async with served(folder, free_port) as d:
            for _ in range(1300):
                with suppress(OSError):
                    stack.enter_context(connected(free_port))
            assert (await d.get("/healthz")).status == 200
            assert d.process is not None
            assert len(os.listdir(f"/proc/{d.process.pid}/fd")) < 300
            with connected(free_port) as last:
                line = f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
                last.sendall(HEAD + line)
                assert (await asyncio.to_thread(last.recv, 100)).startswith(b"HTTP/1.1 200")


async def test_what_has_not_asked_makes_room_for_who_does(folder: Path, free_port: int) -> None:
    async with served(folder, free_port, "[limits]\nconnections = 4") as d:
        with ExitStack() as stack:
            idle = [stack.enter_context(local(d)) for _ in range(6)]
            assert (await d.get("/healthz")).status == 200
            assert await asyncio.to_thread(is_cut, idle[0])


async def test_where_all_ask_for_something_one_more_is_told_so(
    folder: Path, free_port: int
) -> None:
    async with served(folder, free_port, "[limits]\nconnections = 3") as d:
        with ExitStack() as stack:
            for _ in range(2):
                busy = stack.enter_context(local(d))
                busy.sendall(b"GET /v1/events HTTP/1.1\r\nHost: d\r\n\r\n")
                assert (await asyncio.to_thread(busy.recv, 100)).startswith(b"HTTP/1.1 200")
            answer = await d.get("/healthz")
            assert answer.status == 503
            assert answer.json["title"] == "Busy"
            assert answer.headers["retry-after"]


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + b"\r\n" + HEAD], ids=["no", "half", "and half"])
async def test_half_a_request_is_cut(folder: Path, free_port: int, said: bytes) -> None:
    async with served(folder, free_port, connections__HEAD=0.2) as d:
        with local(d) as sock:
            sock.sendall(said)
            if said.count(HEAD) > 1:
                assert (await asyncio.to_thread(sock.recv, 4096)).startswith(b"HTTP/1.1 200")
            assert await asyncio.to_thread(is_cut, sock)
        assert (await d.get("/healthz")).status == 200


async def test_an_idle_connection_is_cut_though_it_reads_nothing(
    folder: Path, free_port: int
) -> None:
    async with served(folder, free_port, main__KEEP_ALIVE=1) as d:
        with local(d) as sock:
            sock.sendall((HEAD + b"\r\n") * 20)
            async with asyncio.timeout(30):
                while await connections(d):
                    await asyncio.sleep(0.05)


async def connections(d: Daemon) -> int:
    """How many are open on the Unix socket."""
    assert d.process is not None
    done = subprocess.run(
        ["grep", "-c", f" 03 .*{d.socket}$", "/proc/net/unix"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return int(done.stdout)


async def test_the_daemon_opens_as_many_files_as_it_may(folder: Path) -> None:
    made = Daemon(folder, "", through=("prlimit", "--nofile=256:2048"))
    try:
        await made.start()
        assert made.process is not None
        said = Path(f"/proc/{made.process.pid}/limits").read_text()
        assert "Max open files            2048" in said
    finally:
        await made.kill()
