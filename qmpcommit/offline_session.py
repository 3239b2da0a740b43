"""The same commit with the VM switched off: a private storage daemon opens its disk.

`offline` starts a ``qemu-storage-daemon`` that only we can reach, gives a `Session` over it, and
ends it again, whatever happens. The image's own lock says whether a VM runs on it.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qmpcommit.errors import ChainError, ConnectError, JobConflict, QmpCommitError
from qmpcommit.session import Session
from qmpcommit.tasks import kill, to_the_end

DISK = "disk"
"""What the one disk is called there."""

START_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0
"""Seconds that the daemon gets to open its monitor, and to end at each of three requests."""

_QCOW2 = b"QFI\xfb"
_PR_SET_PDEATHSIG = 1


@asynccontextmanager
async def offline(
    image: str | os.PathLike[str], *, program: str = "qemu-storage-daemon"
) -> AsyncIterator[Session]:
    """A session over a private storage daemon that has opened this qcow2 image and its chain.

    Its one disk is called `DISK`. Raises `ChainError` for what is no overlay, `JobConflict`
    where a running VM (or another process) has the image open, `ConnectError` where the daemon
    can't be started. The daemon dies with us even if we are killed, so that it keeps no lock.
    """
    path = _check(image)
    found = shutil.which(program)
    if found is None:
        raise ConnectError(
            f"{program} is not installed, and an offline commit needs it: on Debian and Ubuntu it"
            " comes with qemu-system-x86 or qemu-utils, elsewhere with QEMU's tools"
        )
    folder = tempfile.mkdtemp(prefix="qmpcommit-")  # for us alone (0700), so its sockets are too
    try:
        process = await _start(found, path, folder)
        told = False
        try:
            async with Session.connect(f"{folder}/qmp", name=f"offline {path.name}") as session:
                session.private = True
                try:
                    yield session
                finally:
                    told = True
                    await to_the_end(_close(session))
        finally:
            await to_the_end(_end(process, told=told))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(image: str | os.PathLike[str]) -> Path:
    """The image's whole path; what can't be an overlay is refused before anything is started."""
    path = Path(os.path.abspath(image))
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ChainError(f"can't read {path}: {error.strerror}. Nothing was done") from None
    if magic != _QCOW2:
        raise ChainError(
            f"{path} is no qcow2 image, so it has no backing file to commit into. Nothing was done"
        )
    return path


async def _start(program: str, path: Path, folder: str) -> asyncio.subprocess.Process:
    node = {"driver": "qcow2", "node-name": DISK,
            "file": {"driver": _protocol(path), "filename": str(path)}}  # fmt: skip
    # The export, which nobody can reach, stands for the device: it makes the layer active, and
    # shows in the block graph which image the disk uses.
    command = [program, "--chardev", f"socket,id=qmp,path={folder}/qmp,server=on,wait=off",
               "--monitor", "chardev=qmp", "--blockdev", json.dumps(node),
               "--nbd-server", f"addr.type=unix,addr.path={folder}/nbd",
               "--export", f"nbd,id={DISK},node-name={DISK},writable=on"]  # fmt: skip
    with _stderr(folder).open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is for us to handle
            preexec_fn=_die_with_parent,
        )
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not _is_open(folder):
                if process.returncode is not None:
                    raise _refusal(path, folder)
                await asyncio.sleep(0.01)  # there is nothing to wait on but the file system
    except BaseException as error:
        await kill(process)
        if isinstance(error, TimeoutError):
            text = f"{program} did not open its monitor within {START_TIMEOUT:g} s"
            raise ConnectError(text) from None
        raise
    return process


def _protocol(path: Path) -> str:
    """QEMU's driver for it: the one for files refuses a block device."""
    return "host_device" if path.is_block_device() else "file"


def _stderr(folder: str) -> Path:
    return Path(folder, "stderr")


def _is_open(folder: str) -> bool:
    """Whether the daemon has opened the image and listens."""
    return os.path.exists(f"{folder}/nbd") and os.path.exists(f"{folder}/qmp")


def _die_with_parent() -> None:
    """Between fork and exec: be ended when the parent dies, by SIGKILL even (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _refusal(path: Path, folder: str) -> QmpCommitError:
    """Why the daemon did not open the image."""
    from qmpcommit.block.files import image_locks

    words = " ".join(_stderr(folder).read_text(errors="replace").split())[-500:]
    if image_locks(str(path), None).held != "none" or " lock" in words:
        return JobConflict(
            f"{path} is in use: a running VM (or another process) has it or its backing file open."
            f" Commit through that VM's monitor instead, or stop it. QEMU says: {words}."
            " Nothing was done"
        )
    return ChainError(f"QEMU can't open {path} with its backing chain: {words}. Nothing was done")


async def _close(session: Session) -> None:
    """Close the disk before the daemon ends: old ones end without flushing what is exported."""
    with suppress(QmpCommitError, TimeoutError):
        with session.events("BLOCK_EXPORT_DELETED") as deleted:
            await session.execute("block-export-del", {"id": DISK, "mode": "hard"})
            async with asyncio.timeout(STOP_TIMEOUT):
                await anext(deleted)
        if DISK in (await session.graph()).nodes:
            await session.execute("blockdev-del", {"node-name": DISK})
    with suppress(QmpCommitError):
        await session.execute("quit")


async def _end(process: asyncio.subprocess.Process, *, told: bool) -> None:
    """Wait for the end where it was `told` to quit, ask for it, force it."""
    for request in (*([None] if told else []), signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        if request is not None:
            with suppress(ProcessLookupError):
                process.send_signal(request)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
