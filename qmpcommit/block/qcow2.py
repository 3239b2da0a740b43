"""What a qcow2 file that no QEMU has open tells of itself, read from its header.

Only the few facts that are wanted where no ``qemu-img`` has to be there.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, NamedTuple

MAGIC = b"QFI\xfb"
BITMAPS = 0x23852875
"""The header extension that tells where the bitmaps are."""

LONGEST_NAME = 1023
"""Bytes that a backing file's name may have at all."""

_BACKING_FORMAT, _FEATURE_NAMES = 0xE2792ACA, 0x6803F857
_HEADER = 112
"""Bytes of the header itself as QEMU rewrites it (version 3, since 5.1)."""

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


def snapshot_count(path: str) -> int:
    """How many internal snapshots the file holds; 0 where it is no qcow2, or can't be read."""
    try:
        with open(path, "rb") as file:
            header = file.read(64)
    except OSError:
        return 0
    if len(header) < 64 or header[:4] != MAGIC:
        return 0
    return int(struct.unpack(">I", header[60:64])[0])


def name_room(path: str, backing_format: str) -> int | None:
    """The bytes that a backing file's name of this format may have in the header; None: no qcow2.

    QEMU keeps header, extensions and name in the first cluster. It adds the names of the features
    where clusters are large enough for them to do no harm.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(104)
            if len(start) < 72 or start[:4] != MAGIC:
                return None
            version, _, _, bits = struct.unpack(">IQII", start[4:24])
            place, used = 72, 72
            if version >= 3:
                (place,) = struct.unpack(">I", start[100:104])
                used = max(place, _HEADER)
            features = 8 + 48 * 16 if version >= 3 and bits >= 12 else 0
            while True:
                file.seek(place)
                kind, length = struct.unpack(">II", file.read(8))
                if kind == 0:
                    break
                size = 8 + _padded(length)
                place += size
                if kind == _FEATURE_NAMES:
                    features = max(features, size)
                elif kind != _BACKING_FORMAT:
                    used += size
    except (OSError, struct.error):
        return None
    used += features + 8 + _padded(len(backing_format)) + 8  # the last: no more extensions
    cluster = 1 << int(bits)
    return max(0, min(LONGEST_NAME, cluster - used))


class Unwritten(NamedTuple):
    """Clusters that a qcow2 has not, or shares: of data, and of the tables that tell of them."""

    clusters: int
    tables: int


_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_OFFSET = 0x00FFFFFFFFFFFE00


def unwritten(path: str) -> Unwritten | None:
    """What writing everywhere would allocate, from the tables on disk; None where unknown.

    Reads every L2 table, 1 MiB for 8 GiB of a disk with 64 KiB clusters.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(104)
            if len(header) < 72 or header[:4] != MAGIC:
                return None
            version, _, _, bits, size = struct.unpack(">IQIIQ", header[4:32])
            entries, where = struct.unpack(">IQ", header[36:48])
            features = struct.unpack(">Q", header[72:80])[0] if version >= 3 else 0
            words = 2 if features & 16 else 1  # an extended L2 entry has a bitmap beside it
            cluster = 1 << int(bits)
            missing, tables = -(-int(size) // cluster), 0
            for entry in _numbers(_table(file, where, entries * 8)):
                if not entry & _COPIED:
                    tables += 1
                    continue
                file.seek(entry & _OFFSET)
                found = _numbers(file.read(cluster))[::words]
                missing -= sum(1 for e in found if e & _COPIED and not e & _COMPRESSED)
            return Unwritten(max(0, missing), tables)
    except (OSError, ValueError, struct.error):
        return None


def _numbers(table: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(table) // 8}Q", table[: len(table) // 8 * 8])


def _padded(length: int) -> int:
    return (length + 7) // 8 * 8


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
