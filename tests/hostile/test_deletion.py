"""A user of the API whose monitor says what he likes: no file goes that he could not delete."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpcommit.block.identity import FileId, identify
from qmpcommit.commit.deletable import not_theirs
from tests.daemon.daemons import daemon
from tests.ground.images import make_chain
from tests.ground.machines import storage_daemon

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")

USER, OTHER = 2000, 2001

# Its own monitor between QEMU and the daemon: what QEMU calls `old` it calls `new`, and it has the
# file `new` open, and the base.
MONITOR = """
import os, socket, sys, threading
front, back, base, old, new, flags = sys.argv[1:]
held = os.open(new, int(flags)), os.open(base, os.O_RDONLY)
listening = socket.socket(socket.AF_UNIX)
listening.bind(front)
listening.listen(8)
print("listens", flush=True)

def pump(a, b, x, y):
    while data := a.recv(1 << 22):
        b.sendall(data.replace(x.encode(), y.encode()))

while True:
    client, _ = listening.accept()
    server = socket.socket(socket.AF_UNIX)
    server.connect(back)
    for args in ((client, server, new, old), (server, client, old, new)):
        threading.Thread(target=pump, args=args, daemon=True).start()
"""


@asynccontextmanager
async def monitor(
    front: Path, back: str, base: Path, old: Path, new: Path, flags: int
) -> AsyncIterator[int]:
    """A monitor of the user's own; its process."""
    process = await asyncio.create_subprocess_exec(
        "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", sys.executable, "-c",
        MONITOR, *map(str, (front, back, base, old, new, flags)), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"listens\n"
        yield process.pid
    finally:
        process.kill()
        await process.wait()


WHOSE = {
    "another's": (OTHER, 0o644, 0o755, os.O_RDONLY, False),
    "another's that he may write to": (OTHER, 0o666, 0o755, os.O_RDWR, False),
    "his own, which he only reads": (USER, 0o600, 0o755, os.O_RDONLY, False),
    "his own, in another's folder": (USER, 0o600, 0o755, os.O_RDWR, True),
    "another's, in a folder for all": (OTHER, 0o666, 0o777, os.O_RDWR, True),
    "another's, in a folder like /tmp": (OTHER, 0o666, 0o1777, os.O_RDWR, False),
}


@needs_root
@pytest.mark.parametrize("whose", WHOSE)
async def test_a_file_goes_only_for_who_could_delete_it(folder: Path, whose: str) -> None:
    owner, mode, folder_mode, flags, goes = WHOSE[whose]
    folder.chmod(0o711)
    own, others = folder / "own", folder / "others"
    own.mkdir()
    others.mkdir()
    os.chown(own, USER, USER)
    chain = make_chain(folder / "own")
    victim = others / "victim"
    victim.write_bytes(chain.top.read_bytes())
    os.chown(victim, owner, owner)
    victim.chmod(mode)
    others.chmod(folder_mode)
    async with storage_daemon(own, chain) as qemu:
        os.chown(qemu.qmp, USER, USER)
        async with (
            monitor(own / "lies", qemu.qmp, chain.base, chain.top, victim, flags),
            daemon(folder, f'[[vm]]\nname = "vm"\nqmp = "{own}/lies"\n') as d,
        ):
            await d.connected("vm")
            asked = await d.commit(
                "vm", disk="top", policy={"kind": "pivot"}, delete=True, override=["base-shared"]
            )
            done = await d.end_of(asked)
            assert done["state"] == "done", done
            assert victim.exists() is not goes, done
            if not goes:
                assert "stays" in " ".join(done["outcome"]["warnings"])


def test_of_our_own_processes_nothing_is_asked(folder: Path) -> None:
    found = os.stat(folder)
    assert not_theirs(found, found, os.getpid()) == ""
    assert not_theirs(found, found, None) == ""


@needs_root
def test_a_process_that_has_ended_could_delete_nothing(folder: Path) -> None:
    found = os.stat(folder)
    assert "can't be seen" in not_theirs(found, found, 1 << 22)


def test_what_is_written_is_told_from_what_is_read(folder: Path) -> None:
    path = folder / "file"
    path.touch()
    known = FileId.of(path.stat())
    with path.open("rb"):
        assert identify(str(path), os.getpid()) == known
        assert identify(str(path), os.getpid(), written=True) is None
        with path.open("r+b"):
            assert identify(str(path), os.getpid(), written=True) == known
