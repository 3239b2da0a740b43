"""Image files on this host: how much room is behind them, what their headers say, who locks them.

Nothing here writes, and nothing takes a lock. Which file a name means is `identity`'s.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, NamedTuple

from qmpcommit.block.identity import LOCK_BYTES, FileId, is_locked, open_files, writes

_WRITES, _LETS_NOBODY_WRITE = 101, 201
_IN_THE_WAY = (101, 103, 200, 201, 203)
"""Those of others that a commit is in conflict with: they write, or want nobody to write.

Who shares everything (``qemu-img -U``) has said that it does not mind.
"""


def opened_for_writing(pid: int, file: FileId) -> bool:
    """Whether a process has this file open for writing (``/proc/PID/fdinfo``)."""
    for number, opened in open_files(pid).items():
        if opened != file:
            continue
        with suppress(OSError), open(f"/proc/{pid}/fdinfo/{number}", encoding="utf-8") as info:
            flags = [line.split()[1] for line in info if line.startswith("flags:")]
            if flags and int(flags[0], 8) & os.O_ACCMODE == os.O_RDWR:
                return True
    return False


# -- room ---------------------------------------------------------------------------------------


def is_block_device(path: str) -> bool:
    """Whether it is a block device (links followed)."""
    return stat.S_ISBLK(os.stat(path).st_mode)


def free_space(path: str) -> int:
    """Bytes that a process without privileges can still write to this path's file system."""
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize


def device_size(path: str) -> int:
    """The bytes of a block device."""
    number = os.stat(path).st_rdev
    with suppress(OSError, ValueError):
        return int(_sysfs(number, "size")) * 512
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(opened, 0, os.SEEK_END)
    finally:
        os.close(opened)


def read_only_because(path: str, pid: int | None = None) -> str:
    """Why QEMU can't open the file for writing; "" where nothing stands in its way."""
    found = os.stat(path)
    if stat.S_ISBLK(found.st_mode):
        with suppress(OSError):
            if _sysfs(found.st_rdev, "ro").strip() == "1":
                return "its block device is read-only"
        return ""
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return "its file system is mounted read-only"
    if _is_immutable(path):
        return "it is marked immutable (chattr -i lets it be written again)"
    who = _credentials(pid) if pid else None
    if who is None or who.overrides or _has_acl(path):
        return ""
    if found.st_uid in who.users:
        allowed = found.st_mode & stat.S_IWUSR
    elif found.st_gid in who.groups:
        allowed = found.st_mode & stat.S_IWGRP
    else:
        allowed = found.st_mode & stat.S_IWOTH
    mode = stat.filemode(found.st_mode)
    return "" if allowed else f"QEMU's user {who.users[0]} may not write it ({mode})"


_FS_IOC_GETFLAGS = 0x80086601
_IMMUTABLE_OR_APPEND = 0x10 | 0x20


def _is_immutable(path: str) -> bool:
    try:
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        answer = fcntl.ioctl(opened, _FS_IOC_GETFLAGS, bytes(8))
        return bool(struct.unpack("=i4x", answer)[0] & _IMMUTABLE_OR_APPEND)
    except OSError:
        return False  # a file system without such marks
    finally:
        os.close(opened)


_DAC_OVERRIDE = 1 << 1


class _Who(NamedTuple):
    """Who a process is for the file system; `overrides` where modes do not bind it."""

    users: tuple[int, ...]
    groups: frozenset[int]
    overrides: bool


def _credentials(pid: int) -> _Who | None:
    users: tuple[int, ...] = ()
    groups: set[int] = set()
    overrides = False
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, values = line.partition(":")
                if name == "Uid":
                    users = (int(values.split()[3]),)  # the one for file access
                elif name == "Gid":
                    groups.add(int(values.split()[3]))
                elif name == "Groups":
                    groups.update(int(value) for value in values.split())
                elif name == "CapEff":
                    overrides = bool(int(values, 16) & _DAC_OVERRIDE)
    except OSError:
        return None
    return _Who(users, frozenset(groups), overrides) if users else None


def _has_acl(path: str) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def _sysfs(device: int, name: str) -> str:
    numbers = f"{os.major(device)}:{os.minor(device)}"
    path = f"/sys/dev/block/{numbers}/{name}"
    with open(path, encoding="utf-8") as file:
        return file.read()


# -- locks --------------------------------------------------------------------------------------


class Locks(NamedTuple):
    """Who holds QEMU's image lock on a file.

    `held` is "none"; "own", by QEMU itself (and by such as mind no writer) alone; "others", by
    `holders` (or by processes that can't be seen) as well; "unknown" where it can't be told
    whose the locks are.
    """

    held: Literal["none", "own", "others", "unknown"]
    holders: tuple[str, ...] = ()


def image_locks(path: str, pid: int | None, opened: Mapping[int, FileId] | None = None) -> Locks:
    """Look for QEMU's locks (OFD locks on `LOCK_BYTES`) without taking any.

    An OFD lock does not tell its owner, so those of `pid` (its ``/proc/PID/fdinfo``) are taken
    away from all of this host (``/proc/locks``). Read twice, because locks come and go. The
    kernel takes some milliseconds for ``/proc/locks``, so it is not asked needlessly. `opened` are
    the open files of `pid` where they were read just now.
    """
    if not is_locked(path):
        return Locks("none")
    if not pid:
        return Locks("unknown")
    this = os.stat(path)
    files = open_files(pid) if opened is None else opened
    mine = [number for number, file in files.items() if file == FileId.of(this)]
    if not mine:
        return Locks("unknown")
    for attempt in range(2):
        try:
            own, names = _own_locks(pid, mine)
            if own[_WRITES] and own[_LETS_NOBODY_WRITE]:
                return Locks("own")  # nobody else can have a lock that is in the way
            all_locks = _all_locks(names | {_lock_name(this)})
        except OSError:
            return Locks("unknown")
        others = any(all_locks[byte] > own[byte] for byte in _IN_THE_WAY)
        remote = not any(own.values()) and not any(all_locks.values())  # another host's (NFS)
        if not others and not remote:
            return Locks("own" if any(own.values()) else "unknown")
        if not attempt:
            time.sleep(0.01)
    return Locks("others", tuple(openers(FileId.of(this), but=pid)))


def _lock_name(found: os.stat_result) -> str:
    """How ``/proc/locks`` calls a file."""
    device = found.st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}:{found.st_ino}"


def _own_locks(pid: int, numbers: list[int]) -> tuple[Counter[int], set[str]]:
    held: Counter[int] = Counter()
    names: set[str] = set()
    for number in numbers:
        with (
            suppress(FileNotFoundError),
            open(f"/proc/{pid}/fdinfo/{number}", encoding="utf-8") as file,
        ):
            for line in file:
                if line.startswith("lock:"):
                    _count(line.removeprefix("lock:"), None, held, names)
    return held, names


def _all_locks(names: set[str]) -> Counter[int]:
    held: Counter[int] = Counter()
    with open("/proc/locks", encoding="utf-8") as file:
        for line in file:
            _count(line, names, held, set())
    return held


def _count(line: str, wanted: set[str] | None, held: Counter[int], names: set[str]) -> None:
    """Count the bytes of one lock: ``1: OFDLCK ADVISORY READ -1 00:1a:123 100 103``."""
    words = line.split()
    if len(words) != 8 or words[1] not in ("OFDLCK", "POSIX"):
        return  # a lease, a whole-file flock, or one that waits ("->")
    name, first, last = words[5:]
    if wanted is not None and name not in wanted:
        return
    names.add(name)
    end = LOCK_BYTES[-1] if last == "EOF" else int(last)
    held.update(byte for byte in LOCK_BYTES if int(first) <= byte <= end)


def openers(file: FileId, but: int, *, writer_of: FileId | None = None) -> list[str]:
    """The processes that have a file open, for a message: ``qemu-io (process 12)``.

    Not those that write to the file `writer_of`, which are QEMU behind a monitor that is passed on.
    """
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in (but, os.getpid()):
            pid = int(entry)
            if file in open_files(pid).values():
                if writer_of is not None and writes(pid, writer_of):
                    continue
                name = "?"
                with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8") as comm:
                    name = comm.read().strip()
                found.append(f"{name} (process {pid})")
    return found


# -- qcow2 headers ------------------------------------------------------------------------------

_MAGIC = b"QFI\xfb"
_HEADER = ">4sIQIIQIIQQIIQ"
_BACKING_FORMAT = 0xE2792ACA


class Header(NamedTuple):
    """What a qcow2 file says of itself on disk; `backing` and its format may be empty."""

    version: int
    cluster_size: int
    virtual_size: int
    backing: str
    backing_format: str
    corrupt: bool
    refcount_bits: int
    refcount_table: tuple[int, int]
    """Its offset and its length in bytes."""


def read_header(path: str) -> Header | None:
    """The header of a qcow2 file as it is on disk now; None where it is no qcow2.

    QEMU may have the file open: nothing is locked, and the header is one short read.
    """
    with open(path, "rb", buffering=0) as file:
        start = file.read(65536)
        if len(start) < struct.calcsize(_HEADER) or not start.startswith(_MAGIC):
            return None
        (_, version, name_at, name_length, cluster_bits, size, _, _, _, table, clusters, _, _) = (
            struct.unpack_from(_HEADER, start)
        )
        corrupt, order, length = False, 4, 72
        if version >= 3:
            incompatible, _, _, order, length = struct.unpack_from(">QQQII", start, 72)
            corrupt = bool(incompatible & 2)
        name = b""
        if name_at:
            file.seek(name_at)
            name = file.read(min(name_length, 1023))
    cluster = 1 << cluster_bits
    return Header(
        version,
        cluster,
        size,
        os.fsdecode(name),
        _extension(start, length, name_at or cluster, _BACKING_FORMAT).decode(errors="replace"),
        corrupt,
        1 << order,
        (table, clusters * cluster),
    )


def _extension(start: bytes, at: int, end: int, wanted: int) -> bytes:
    while at + 8 <= min(end, len(start)):
        kind, length = struct.unpack_from(">II", start, at)
        if kind == 0:
            break
        if kind == wanted:
            return start[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8
    return b""


def used_end(path: str, header: Header) -> int:
    """Where the last cluster in use ends (``image-end-offset``), from the refcounts on disk.

    Two reads. On a block device, which has no length of its own to go by, what lies beyond is
    what a qcow2 in it can still take.
    """
    offset, length = header.refcount_table
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        table = file.read(length)
        per_block = header.cluster_size * 8 // header.refcount_bits
        for number in range(len(table) // 8 - 1, -1, -1):
            (at,) = struct.unpack_from(">Q", table, number * 8)
            if not at:
                continue
            file.seek(at)
            used = len(file.read(header.cluster_size).rstrip(b"\0"))
            if used:
                entries = -(-used * 8 // header.refcount_bits)
                return (number * per_block + entries) * header.cluster_size
    return 0
