"""What the demo runs on: QEMU's programs, a chain with known bytes, and a QEMU of its own."""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from qmpcommit.errors import OperationError
from qmpcommit.tasks import kill

MIB = 1 << 20
SIZE = 32 * MIB

MACHINES = {"x86_64": "q35", "aarch64": "virt", "ppc64": "pseries", "s390x": "s390-ccw-virtio"}

INSTALL = (
    "install QEMU and run this again. Debian, Ubuntu: sudo apt install qemu-system-x86 qemu-utils;"
    " Fedora: sudo dnf install qemu-system-x86-core qemu-img;"
    " Arch: sudo pacman -S qemu-base; macOS: brew install qemu"
)

BASE = ((0, 4 * MIB, 0x11), (20 * MIB, MIB, 0x12))
OVERLAY = ((2 * MIB, 4 * MIB, 0x21), (24 * MIB, 2 * MIB, 0x22))
"""Offset, length and byte of what is written: the overlay's partly over the base's."""


class DemoFailed(OperationError):
    """The demo could not run, or what it read is not what was written."""


@dataclass(frozen=True)
class Programs:
    """The programs of the QEMU that is installed; `machine` is "" for a storage daemon."""

    qemu: str
    machine: str
    img: str
    io: str

    @classmethod
    def find(cls, *, storage_daemon: bool) -> Programs:
        """Those on the path; raises `DemoFailed`, which says what to install."""
        img, io = shutil.which("qemu-img"), shutil.which("qemu-io")
        if img is None or io is None:
            raise DemoFailed(f"the demo needs qemu-img and qemu-io: {INSTALL}")
        for kind in () if storage_daemon else (platform.machine(), *MACHINES):
            qemu = shutil.which(f"qemu-system-{kind}")
            if qemu is not None and kind in MACHINES:
                return cls(qemu, MACHINES[kind], img, io)
        qemu = shutil.which("qemu-storage-daemon")
        if qemu is None:
            what = "qemu-storage-daemon" if storage_daemon else "qemu-system-x86_64"
            raise DemoFailed(f"the demo needs {what}: {INSTALL}")
        return cls(qemu, "", img, io)


@dataclass
class Chain:
    """Two files, and the bytes that the disk shows through the overlay."""

    base: Path
    overlay: Path
    picture: bytearray


async def run_program(*command: str | Path) -> None:
    """Run one that must succeed; raises `DemoFailed` with what it said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        await kill(process)
    if process.returncode:
        text = said.decode(errors="replace").strip()
        raise DemoFailed(f"{command[0]} failed with status {process.returncode}: {text}")


async def make_chain(programs: Programs, folder: Path) -> Chain:
    """``base.qcow2`` with a pattern, and ``overlay.qcow2`` with another partly over it."""
    base, overlay = folder / "base.qcow2", folder / "overlay.qcow2"
    create = (programs.img, "create", "-q", "-f", "qcow2")
    await run_program(*create, base, str(SIZE))
    await run_program(*create, "-b", base, "-F", "qcow2", overlay)
    picture = bytearray(SIZE)
    for path, writes in ((base, BASE), (overlay, OVERLAY)):
        orders: list[str] = []
        for offset, length, byte in writes:
            orders += ["-c", f"write -P {byte} {offset} {length}"]
            picture[offset : offset + length] = bytes([byte]) * length
        await run_program(programs.io, "-f", "qcow2", *orders, path)
    return Chain(base, overlay, picture)


async def compare(programs: Programs, path: Path, picture: bytes | bytearray) -> int | None:
    """Read every byte of an image that nobody has open; the first place that differs, or None."""
    raw = path.with_suffix(".raw")
    await run_program(programs.img, "convert", "-f", "qcow2", "-O", "raw", path, raw)
    found = raw.read_bytes()
    raw.unlink()
    if found == picture:
        return None
    step = 4096
    for place in range(0, max(len(found), len(picture)), step):
        if found[place : place + step] != picture[place : place + step]:
            return place
    return min(len(found), len(picture))


@asynccontextmanager
async def qemu(programs: Programs, folder: Path, chain: Chain) -> AsyncIterator[str]:
    """A running QEMU with the chain as its disk ``vda``; gives its monitor's path.

    It is killed on the way out, if it has not ended by then.
    """
    monitor, log = folder / "qmp", folder / "qemu.log"
    command = _daemon(programs, chain) if not programs.machine else _system(programs, chain)
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,  # a terminal's Ctrl-C is ours, not its
        )
    try:
        async with asyncio.timeout(30):
            while not monitor.exists():
                if process.returncode is not None:
                    said = log.read_text(errors="replace").strip()
                    raise DemoFailed(f"{programs.qemu} ended at once: {said}")
                await asyncio.sleep(0.005)
        yield str(monitor)
        async with asyncio.timeout(20):
            await process.wait()
    finally:
        await kill(process)


def _nodes(chain: Chain, option: str) -> list[str]:
    options = []
    for name, path, over in (("base", chain.base, ""), ("overlay", chain.overlay, ",backing=base")):
        file = str(path).replace(",", ",,")
        node = f"driver=qcow2,node-name={name}{over}"
        options += [option, f"{node},file.driver=file,file.filename={file}"]
    return options


def _system(programs: Programs, chain: Chain) -> Sequence[str]:
    device = "virtio-blk-ccw" if "ccw" in programs.machine else "virtio-blk-pci"
    return [
        *(programs.qemu, "-S", "-display", "none", "-nodefaults", "-m", "128"),
        *("-machine", f"{programs.machine},accel=tcg", "-qmp", "unix:qmp,server=on,wait=off"),
        *_nodes(chain, "-blockdev"),
        # share-rw, because the demo's writer stands beside the device, for want of a guest
        *("-device", f"{device},drive=overlay,id=vda,share-rw=on"),
    ]


def _daemon(programs: Programs, chain: Chain) -> Sequence[str]:
    return [
        *(programs.qemu, "--chardev", "socket,id=qmp,path=qmp,server=on,wait=off"),
        *("--monitor", "chardev=qmp", *_nodes(chain, "--blockdev")),
    ]
