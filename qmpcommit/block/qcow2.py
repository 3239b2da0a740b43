"""What a qcow2 file that no QEMU has open tells of itself, read from its header.

Only the few facts that are wanted where no ``qemu-img`` has to be there.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

MAGIC = b"QFI\xfb"
BITMAPS = 0x23852875
"""The header extension that tells where the bitmaps are."""

_MOST = 1 << 25
"""Bytes that a table may have to be read here."""


def holds_data(path: str) -> bool:
    """Whether the file holds guest data (or an internal snapshot) of its own.

    One that is empty, or a qcow2 image without any cluster, holds none. True where it can't be
    known.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(72)
            if len(header) < 72 or header[:4] != MAGIC:
                return any(header) or os.fstat(file.fileno()).st_blocks > 0
            entries, where = struct.unpack(">IQ", header[36:48])
            (snapshots,) = struct.unpack(">I", header[60:64])
            return bool(snapshots) or any(_table(file, where, entries * 8))
    except (OSError, ValueError):
        return True


def bitmap_names(path: str) -> list[str]:
    """The names of the dirty bitmaps that are stored in the file; none where there is no file."""
    try:
        with open(path, "rb") as file:
            return _bitmap_names(file)
    except (OSError, ValueError, struct.error):
        return []


def _bitmap_names(file: BinaryIO) -> list[str]:
    header = file.read(104)
    if header[:4] != MAGIC or struct.unpack(">I", header[4:8])[0] < 3:
        return []
    (place,) = struct.unpack(">I", header[100:104])
    while True:
        file.seek(place)
        kind, length = struct.unpack(">II", file.read(8))
        if kind == BITMAPS:
            count, _, size, where = struct.unpack(">IIQQ", file.read(24))
            return _names(_table(file, where, size), count)
        if kind == 0:
            return []
        place += 8 + (length + 7) // 8 * 8


def _names(directory: bytes, count: int) -> list[str]:
    names = []
    place = 0
    for _ in range(count):
        name_size, extra = struct.unpack(">HI", directory[place + 18 : place + 24])
        begin = place + 24 + extra
        names.append(directory[begin : begin + name_size].decode(errors="replace"))
        place = begin + (name_size + extra + 7) // 8 * 8 - extra
    return names


def _table(file: BinaryIO, where: int, size: int) -> bytes:
    if size > _MOST:
        raise ValueError("too large a table")
    file.seek(where)
    table = file.read(size)
    if len(table) < size:
        raise ValueError("the file ends before its table does")
    return table
