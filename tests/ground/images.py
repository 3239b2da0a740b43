"""Image files, what they must contain, and what they do contain, byte for byte."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ground.qemu import QEMU, Qemu

MIB = 1 << 20


class Picture:
    """What a disk must contain: plain bytes, written as the guest or the test wrote them."""

    def __init__(self, size: int, data: bytes | bytearray | None = None) -> None:
        self.data = bytearray(size) if data is None else bytearray(data)
        self.size = size

    def write(self, offset: int, data: bytes) -> None:
        """A write that was acknowledged."""
        self.data[offset : offset + len(data)] = data

    def fill(self, offset: int, length: int, pattern: int) -> None:
        """A write of one byte's repetition, as qemu-io's ``write -P``."""
        self.data[offset : offset + length] = bytes([pattern]) * length

    def copy(self) -> Picture:
        """As it is now."""
        return Picture(self.size, self.data)


@dataclass(frozen=True)
class Write:
    """`length` bytes of `pattern` at `offset`."""

    offset: int
    length: int
    pattern: int


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def create(
    path: Path, size: int | None, *, backing: Path | str | None = None, fmt: str = "qcow2",
    backing_fmt: str = "qcow2", unopened: bool = False, qemu: Qemu = QEMU,
) -> Path:  # fmt: skip
    """A new image; a relative `backing` counts from the image's folder, unless `unopened`."""
    over = ["-b", str(backing), "-F", backing_fmt] if backing is not None else []
    room = [str(size)] if size is not None else []
    over += ["-u"] if unopened else []
    run(qemu.img, "create", "-q", "-f", fmt, *over, path, *room, cwd=path.parent)
    return path


def write(path: Path, writes: Iterable[Write], *, fmt: str = "qcow2", qemu: Qemu = QEMU) -> None:
    """Patterns into an image that nobody has open."""
    commands = [
        part for w in writes for part in ("-c", f"write -P {w.pattern} {w.offset} {w.length}")
    ]
    if commands:
        run(qemu.io, "-f", fmt, *commands, path)


@dataclass
class Chain:
    """A chain on disk, bottom first, and what each layer shows."""

    files: list[Path]
    pictures: list[Picture]

    @property
    def base(self) -> Path:
        """The bottom file."""
        return self.files[0]

    @property
    def top(self) -> Path:
        """The active layer's file."""
        return self.files[-1]


LAYERS = (
    (Write(0, 4 * MIB, 0x11), Write(20 * MIB, MIB, 0x12)),
    (Write(MIB, 2 * MIB, 0x21), Write(30 * MIB, 3 * MIB, 0x22)),
    (Write(2 * MIB, 2 * MIB, 0x31), Write(40 * MIB, MIB, 0x32), Write(65536, 4096, 0x33)),
    (Write(3 * MIB, MIB, 0x41), Write(50 * MIB, 2 * MIB, 0x42)),
)
"""What each layer of a test chain writes: partly over the layer below, partly beside it."""


def make_chain(
    folder: Path,
    layers: int = 2,
    *,
    size: int = 64 * MIB,
    names: Iterable[str] = ("base", "mid", "low", "top"),
    bulk: int = 0,
    fmt: str = "qcow2",
    relative: bool = False,
    qemu: Qemu = QEMU,
) -> Chain:
    """A chain of up to four layers, ``base.qcow2`` below and ``top.qcow2`` active.

    `bulk` more bytes in the top (over 16 MiB of data a speed limit is felt before READY).
    """
    chosen = list(names)
    chosen = [chosen[0], *chosen[1 : layers - 1], chosen[-1]][:layers]
    picture = Picture(size)
    chain = Chain([], [])
    below: Path | None = None
    for number, name in enumerate(chosen):
        kind = fmt if number == 0 else "qcow2"
        path = folder / f"{name}.{kind}"
        backing = below.name if below is not None and relative else below
        create(path, size, backing=backing, fmt=kind, backing_fmt=fmt if number == 1 else "qcow2",
               qemu=qemu)  # fmt: skip
        writes = list(LAYERS[number])
        if bulk and number == len(chosen) - 1:
            writes.append(Write(8 * MIB, bulk, 0x77))
        write(path, writes, fmt=kind, qemu=qemu)
        for w in writes:
            picture.fill(w.offset, w.length, w.pattern)
        chain.files.append(path)
        chain.pictures.append(picture.copy())
        below = path
    return chain


def two_chains(folder: Path, **more: Any) -> tuple[Chain, Chain]:
    """As `make_chain`, and a second one of ``base2`` and ``top2``."""
    return make_chain(folder, **more), make_chain(folder, names=("base2", "top2"), **more)


def read(path: Path, *, fmt: str = "qcow2", qemu: Qemu = QEMU) -> bytes:
    """All bytes that a guest would read from this image and the layers below it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder) / "raw"
        run(qemu.img, "convert", "-f", fmt, "-O", "raw", path, raw)
        return raw.read_bytes()


def assert_disk(path: Path, picture: Picture, *, fmt: str = "qcow2", qemu: Qemu = QEMU) -> None:
    """The image shows exactly the picture; says where it first differs."""
    found, wanted = read(path, fmt=fmt, qemu=qemu), bytes(picture.data)
    if found == wanted:
        return
    assert len(found) == len(wanted), f"{path.name} has {len(found)} bytes, not {len(wanted)}"
    low, high = 0, len(wanted)
    while high - low > 1:
        middle = (low + high) // 2
        if found[low:middle] == wanted[low:middle]:
            low = middle
        else:
            high = middle
    raise AssertionError(
        f"{path.name} differs at {low:#x}: it has {found[low : low + 8].hex()},"
        f" and should have {wanted[low : low + 8].hex()}"
    )
