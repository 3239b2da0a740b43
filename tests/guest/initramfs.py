"""The guest's initial file system: busybox, the modules it needs, and what it runs."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console")
"""What Debian's cloud kernel has not built in; ext4 and the serial ports are."""


@dataclass(frozen=True)
class Parts:
    """What a guest is made of, as unpacked from Debian's packages."""

    kernel: Path
    modules: Path
    busybox: Path
    agent: Path

    @classmethod
    def found(cls) -> Parts | str:
        """Those in ``.guest`` (or $QMPCOMMIT_GUEST), or which one is missing."""
        room = Path(os.environ.get("QMPCOMMIT_GUEST") or ".guest").absolute()
        made = []
        for pattern in ("boot/vmlinuz-*", "lib/modules/*", "bin/busybox", "usr/sbin/qemu-ga"):
            found = sorted(room.glob(pattern))
            if not found:
                return f"no real guest: {room}/{pattern} is missing (tests/run.sh brings it)"
            made.append(found[-1])
        return cls(*made)


def archive(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive as the kernel reads it ("newc"), of (name, mode with type, content)."""
    out = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        head = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        out += b"070701" + b"".join(b"%08X" % value for value in head) + path
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def module_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """The modules and all that they need, in the order in which they can be loaded."""
    files = {path.name.split(".")[0].replace("-", "_"): path for path in folder.rglob("*.ko*")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:
            return  # built in, or there already
        told = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in filter(None, (told[1] if told else b"").decode().split(",")):
            add(needed)
        order.append(path)

    for name in names:
        add(name)
    return order


def libraries(program: Path) -> list[Path]:
    """The shared objects that a program of this host's kind loads, its loader included."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    return [Path(found) for found in re.findall(r"(/\S+) \(0x", done.stdout)]


def initramfs(parts: Parts, script: str, *, agent: bool = False) -> bytes:
    """A compressed initramfs whose ``/init`` is `script`; ``/modules`` lists what to load."""
    entries: list[tuple[str, int, bytes]] = []
    folders: set[str] = set()

    def put(name: str, data: bytes, mode: int = 0o100755) -> None:
        steps = name.split("/")[:-1]
        for depth in range(1, len(steps) + 1):
            parent = "/".join(steps[:depth])
            if parent not in folders:
                folders.add(parent)
                entries.append((parent, 0o040755, b""))
        entries.append((name, mode, data))

    for folder in ("dev", "proc", "sys", "mnt", "run", "tmp", "var/run"):
        put(f"{folder}/.keep", b"")
    put("bin/busybox", parts.busybox.read_bytes())
    put("bin/sh", b"busybox", 0o120777)
    put("init", script.encode())
    loaded = module_files(parts.modules, MODULES)
    for path in loaded:
        put(f"lib/modules/{path.name}", path.read_bytes(), 0o100644)
    put("modules", "".join(f"/lib/modules/{path.name}\n" for path in loaded).encode(), 0o100644)
    if agent:
        put("bin/qemu-ga", parts.agent.read_bytes())
        for path in libraries(parts.agent):
            put(str(path).lstrip("/"), path.read_bytes())
    return gzip.compress(archive(entries), 1)
