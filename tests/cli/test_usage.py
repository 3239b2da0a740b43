"""Wrong usage: status 2 before anything is sent, one paragraph or one object."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qmpcommit.cli.commands import COMMANDS, NO_DAEMON
from tests.cli.command import COMMAND, ENVIRONMENT, end, qmpcommit, start

WRONG = {
    "no command": [],
    "unknown command": ["frobnicate"],
    "unknown option": ["chain", "/x", "--frob"],
    "missing arguments": ["commit"],
    "missing disk": ["commit", "/x", "--pivot"],
    "too many arguments": ["jobs", "/x", "y"],
    "no policy": ["commit", "/x", "vda"],
    "no policy, top 0": ["commit", "/x", "vda", "--top", "0"],
    "two policies": ["commit", "/x", "vda", "--pivot", "--keep-overlay"],
    "two other policies": ["commit", "/x", "vda", "--hold", "--check", "true"],
    "malformed policy": ["commit", "/x", "vda", "--policy", "{"],
    "unknown policy": ["commit", "/x", "vda", "--policy", '{"kind": "wait"}'],
    "policy with a wrong member": ["commit", "/x", "vda", "--policy", '{"kind":"hold","for":1}'],
    "malformed size": ["commit", "/x", "vda", "--pivot", "--bandwidth", "fast"],
    "empty size": ["commit", "/x", "vda", "--pivot", "--bandwidth", ""],
    "malformed speed": ["speed", "/x", "job", "fast"],
    "no speed": ["speed", "/x", "job"],
    "malformed time": ["commit", "/x", "vda", "--pivot", "--timeout", "soon"],
    "negative time": ["chain", "/x", "--timeout", "-1"],
    "infinite time": ["jobs", "/x", "--timeout", "inf"],
    "malformed hold": ["commit", "/x", "vda", "--hold", "5parsecs"],
    "empty check": ["commit", "/x", "vda", "--check", ""],
    "empty only-if": ["commit", "/x", "vda", "--pivot", "--only-if", " "],
    "empty on-pivot": ["commit", "/x", "vda", "--pivot", "--on-pivot", ""],
    "empty keep-if": ["cycle", "/x", "vda", "--keep-if", ""],
    "delete after a keep": ["commit", "/x", "vda", "--keep-overlay", "--delete"],
    "rename after an abort": ["commit", "/x", "vda", "--abort", "--rename"],
    "on-pivot of a keep": ["commit", "/x", "vda", "--keep-overlay", "--on-pivot", "true"],
    "delete after no group's pivot": ["commit", "/x", "a", "b", "--keep-overlay", "--delete"],
    "unknown override": ["commit", "/x", "vda", "--pivot", "--override", "everything"],
    "unknown override of a plan": ["commit", "/x", "a", "--pivot", "--dry-run", "--override", "b"],
    "options of no overlay": ["commit", "/x", "vda", "--pivot", "--overlay-secret", "s"],
    "malformed overlay options": ["commit", "/x", "a", "--recycle", "f", "--overlay-options", "{"],
    "options that are not theirs": [
        "cycle",
        "/x",
        "a",
        "--keep-if",
        "true",
        "--overlay-options",
        '{"driver": "raw"}',
    ],
    "options of a daemon's cycle": [
        "--daemon=/x",
        "cycle",
        "web1",
        "vda",
        "--overlay-secret",
        "s",
    ],
    "a secret for what closes": ["window", "/x", "--close", "--overlay-secret", "s"],
    "shallow and base": ["commit", "/x", "vda", "--pivot", "--shallow", "--base", "1"],
    "bad address": ["chain", "tcp:nowhere"],
    "bad port": ["pivot", "tcp:localhost:99999", "job"],
    "empty address": ["jobs", ""],
    "long address": ["chain", "/" + "x" * 200],
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG.keys())
def test_wrong_usage(words: list[str]) -> None:
    said = qmpcommit(*words)
    assert said.status == 2
    assert said.out == ""
    assert said.err.startswith("qmpcommit: ")
    assert said.err.count("\n") == 1
    again = qmpcommit(*words, "--json")
    assert again.status == 2
    assert again.error["type"] in ("UsageError", "InvalidRequest", "PolicyRequired")
    assert again.error["message"]


def test_what_follows_two_dashes_is_not_for_us() -> None:
    said = qmpcommit("window", "/nowhere", "vda", "--", "echo", "--json")
    assert (said.status, said.out) == (4, "")
    assert said.err.startswith("qmpcommit: can't connect")


def test_a_missing_policy_says_which_there_are() -> None:
    said = qmpcommit("commit", "/x", "vda", "--json")
    assert said.error["type"] == "PolicyRequired"
    assert "--pivot" in said.error["message"]
    assert "--keep-overlay" in said.error["message"]


@pytest.mark.parametrize(
    "words",
    [
        ["commit", "--hold", "/nowhere", "vda"],
        ["commit", "--hold", "30", "/nowhere", "vda"],
        ["commit", "/nowhere", "vda", "--hold"],
        ["commit", "/nowhere", "vda", "--hold", "2min"],
        ["commit", "/nowhere", "vda", "--hold=1.5"],
        ["commit", "/nowhere", "vda", "--hold", "--quiet"],
        ["commit", "/nowhere", "vda", "--top", "1"],
        ["commit", "/nowhere:vda", "--pivot"],
        ["commit", "/nowhere:vda", "/not/there:vda", "--pivot"],
        ["cycle", "/nowhere:vda", "--keep-if", "true"],
        ["chain", "/nowhere"],
        ["jobs", "/nowhere"],
        ["pivot", "/nowhere", "j"],
        ["keep", "/nowhere", "j"],
        ["abort", "/nowhere", "j"],
        ["speed", "/nowhere", "j", "max"],
        ["pause", "/nowhere", "j"],
        ["resume", "/nowhere", "j"],
    ],
    ids=" ".join,
)
def test_right_usage_gets_as_far_as_the_vm(words: list[str]) -> None:
    assert qmpcommit(*words).status == 4
    assert qmpcommit(*words, "--json").error["type"] == "ConnectError"


@pytest.fixture
def silent(folder: Path) -> Iterator[str]:
    """A socket that accepts and never greets, as a monitor does that somebody else has."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "silent"))
        server.listen(8)
        yield str(folder / "silent")


def test_a_busy_monitor_is_1_and_bounded_by_the_timeout(silent: str) -> None:
    said = qmpcommit("chain", silent, "--timeout", "2s", "--json")
    assert said.status == 1
    assert said.error["type"] == "MonitorBusy"
    assert "another client" in said.error["message"]


def test_no_time_at_all(silent: str) -> None:
    said = qmpcommit("commit", silent, "vda", "--pivot", "--timeout", "0", "--json")
    assert said.status == 1
    assert said.error["type"] == "DeadlineExceeded"
    assert "nothing was sent" in said.error["message"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_while_connecting(number: int, folder: Path) -> None:
    connected = asyncio.Event()

    async def never_greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        assert await reader.read() == b""  # nothing was sent
        writer.close()
        await writer.wait_closed()

    path = str(folder / "silent")
    async with await asyncio.start_unix_server(never_greet, path):
        process = await start("commit", path, "vda", "--pivot", "--json")
        async with asyncio.timeout(20):
            await connected.wait()
        process.send_signal(number)
        said = await end(process)
    assert said.status == 130
    assert said.error["type"] == "Interrupted"
    assert "nothing was sent" in said.error["message"]


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        done = subprocess.run(
            [*COMMAND, "chain", "/nowhere", "--json"],
            stdout=out,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            check=False,
        )
    assert (done.returncode, done.stderr) == (4, b"")


def test_no_standard_output_at_all() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "chain", "/nowhere", "--json"],
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (4, b"")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["commit", "--help"]])
@pytest.mark.parametrize("to", ["/dev/full", "&-"])
def test_what_can_not_be_written_is_not_done(words: list[str], to: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" >{to}', "sh", *COMMAND, *words],
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 1
    assert (b"No space left" in done.stderr) is (to == "/dev/full")
    assert b"Traceback" not in done.stderr
    assert b"bug" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "--timeout", "20", "chain", "/nowhere"],
        ["-q", "--timeout=20", "--json", "jobs", "/nowhere"],
        ["--json", "chain", "/nowhere", "--timeout", "20"],
    ],
)
def test_what_all_commands_take_may_come_first(words: list[str]) -> None:
    said = qmpcommit(*words)
    assert (said.status, said.error["type"]) == (4, "ConnectError")
    without = qmpcommit("--json", "--timeout", "20")
    assert (without.status, without.error["message"][:15]) == (2, "Missing command")


def test_json_is_one_line_of_ascii() -> None:
    said = qmpcommit("chain", "/nowhere/ü\udcff", "--json")
    assert said.out.isascii()
    assert json.loads(said.out)["error"]["address"] == "/nowhere/ü\udcff"
    assert "/nowhere/ü" in qmpcommit("chain", "/nowhere/ü\udcff").err


THROUGH = {
    "vms": [],
    "chain": ["web1"],
    "commit": ["web1", "vda", "--pivot"],
    "jobs": ["web1"],
    "pivot": ["web1", "job"],
    "keep": ["web1", "job"],
    "abort": ["web1", "job"],
    "wait": ["web1", "job"],
    "speed": ["web1", "job", "1MiB"],
    "pause": ["web1", "job"],
    "resume": ["web1", "job"],
    "snapshot": ["web1", "vda"],
    "window": ["web1", "vda", "--", "true"],
    "cycle": ["web1", "vda"],
    "explain": ["pivot", "web1", "vda"],
    "ui": [],
}
"""The commands that a daemon does, as it is asked for them."""


def refuse_all(listener: socket.socket, asked: list[bytes]) -> None:
    """A daemon that knows nothing, until its socket is shut."""
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    with suppress(OSError):
        while True:
            with listener.accept()[0] as client:
                asked.append(client.recv(1 << 16))
                client.sendall(answer)


def test_each_command_is_done_through_the_daemon_or_refuses_it(folder: Path) -> None:
    assert {*THROUGH, "top"} == COMMANDS.keys() - NO_DAEMON.keys()  # that needs a terminal
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "d.sock"))
        listener.listen(8)
        daemon = threading.Thread(target=refuse_all, args=(listener, asked))
        daemon.start()
        try:
            for name, words in THROUGH.items():
                asked.clear()
                said = qmpcommit(f"--daemon={folder}/d.sock", name, *words)
                assert said.status not in (0, 2), name
                assert asked, f"{name} did not ask the daemon: {said.err}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            daemon.join()


@pytest.mark.parametrize("name", sorted(NO_DAEMON.keys() & COMMANDS.keys()))
def test_what_no_daemon_does_is_refused(name: str) -> None:
    said = qmpcommit("--daemon=/nowhere/d.sock", name, "web1", "vda", "--keep", "2")
    assert said.status == 2
    assert "is not done through a daemon: " in said.err
