"""Image files, what they must contain, and what they do contain, byte for byte."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.ground.qemu import QEMU, Qemu

MIB = 1 << 20


CHUNK = 65536
_ZEROS = bytes(CHUNK)


class Picture:
    """What a disk must contain: plain bytes, written as the guest or the test wrote them.

    In chunks that a copy shares with it: most are zeros, and there are many copies.
    """

    def __init__(self, size: int, data: bytes | bytearray | None = None) -> None:
        self.size = size
        self._chunks = [_ZEROS[: size - at] for at in range(0, size, CHUNK)]
        if data is not None:
            assert len(data) == size
            self.write(0, data)

    @property
    def data(self) -> bytes:
        """All of it."""
        return b"".join(self._chunks)

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """A write that was acknowledged."""
        assert offset + len(data) <= self.size
        done = 0
        while done < len(data):
            number, at = divmod(offset + done, CHUNK)
            new = data[done : done + CHUNK - at]
            old = self._chunks[number]
            self._chunks[number] = bytes(old[:at] + new + old[at + len(new) :])
            done += len(new)

    def fill(self, offset: int, length: int, pattern: int) -> None:
        """A write of one byte's repetition, as qemu-io's ``write -P``."""
        self.write(offset, bytes([pattern]) * length)

    def copy(self) -> Picture:
        """As it is now."""
        copy = Picture(0)
        copy.size, copy._chunks = self.size, list(self._chunks)
        return copy

    def first_difference(self, raw: Path) -> int | None:
        """The first byte that a file of plain bytes does not have so."""
        with raw.open("rb") as file:
            for number, chunk in enumerate(self._chunks):
                found = file.read(len(chunk))
                if found != chunk:
                    pairs = enumerate(zip(found, chunk, strict=False))
                    differs = (n for n, (one, other) in pairs if one != other)
                    return number * CHUNK + next(differs, len(found))
            return self.size if file.read(1) else None


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
    if bulk:
        return _made(folder, chosen, size, bulk, fmt, relative=relative, qemu=qemu)
    template = _template(tuple(chosen), size, fmt, qemu)
    files = [folder / path.name for path in template.files]
    run("cp", "-t", folder, *template.files)
    if not relative:
        for below, path in itertools.pairwise(files):
            _set_backing(path, below)
    return Chain(files, [picture.copy() for picture in template.pictures])


def _made(
    folder: Path, names: Sequence[str], size: int, bulk: int, fmt: str, *, relative: bool,
    qemu: Qemu,
) -> Chain:  # fmt: skip
    picture = Picture(size)
    chain = Chain([], [])
    below: Path | None = None
    for number, name in enumerate(names):
        kind = fmt if number == 0 else "qcow2"
        path = folder / f"{name}.{kind}"
        backing = below.name if below is not None and relative else below
        create(path, size, backing=backing, fmt=kind, backing_fmt=fmt if number == 1 else "qcow2",
               qemu=qemu)  # fmt: skip
        writes = list(LAYERS[number])
        if bulk and number == len(names) - 1:
            writes.append(Write(8 * MIB, bulk, 0x77))
        write(path, writes, fmt=kind, qemu=qemu)
        for w in writes:
            picture.fill(w.offset, w.length, w.pattern)
        chain.files.append(path)
        chain.pictures.append(picture.copy())
        below = path
    return chain


@cache
def _template(names: tuple[str, ...], size: int, fmt: str, qemu: Qemu) -> Chain:
    """A chain to be copied: that is far quicker than to have it made."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="qc-chains-", dir=place))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _made(folder, names, size, 0, fmt, relative=True, qemu=qemu)


def _set_backing(path: Path, below: Path) -> None:
    """Write another backing file's name into the header of a qcow2 file, where it is the last."""
    with path.open("r+b") as file:
        file.seek(8)
        (at,) = struct.unpack(">Q", file.read(8))
        name = str(below).encode()
        file.write(struct.pack(">I", len(name)))
        file.seek(at)
        file.write(name)


def two_chains(folder: Path, **more: Any) -> tuple[Chain, Chain]:
    """As `make_chain`, and a second one of ``base2`` and ``top2``."""
    return make_chain(folder, **more), make_chain(folder, names=("base2", "top2"), **more)


@contextmanager
def _raw(path: Path, fmt: str, qemu: Qemu) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder) / "raw"
        run(qemu.img, "convert", "-f", fmt, "-O", "raw", path, raw)
        yield raw


def read(path: Path, *, fmt: str = "qcow2", qemu: Qemu = QEMU) -> bytes:
    """All bytes that a guest would read from this image and the layers below it."""
    with _raw(path, fmt, qemu) as raw:
        return raw.read_bytes()


def assert_disk(path: Path, picture: Picture, *, fmt: str = "qcow2", qemu: Qemu = QEMU) -> None:
    """The image shows exactly the picture; says where it first differs."""
    with _raw(path, fmt, qemu) as raw:
        at = picture.first_difference(raw)
        if at is None:
            return
        size = raw.stat().st_size
        assert size == picture.size, f"{path.name} has {size} bytes, not {picture.size}"
        with raw.open("rb") as file:
            file.seek(at)
            found = file.read(8)
    raise AssertionError(
        f"{path.name} differs at {at:#x}: it has {found.hex()},"
        f" and should have {picture.data[at : at + 8].hex()}"
    )
