"""The file of a fresh overlay: made where nothing was, like the file that it follows.

It is made here, so that nothing that exists is ever opened by QEMU to be written to, however
names are changed meanwhile: by O_EXCL, and only for its owner until it is like the other one.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from qmpcommit.block.files import read_header
from qmpcommit.block.identity import FileId
from qmpcommit.block.qcow2 import LONGEST_NAME, MAGIC, holds_data
from qmpcommit.qmp.process import is_alive, process_identity

_LABELS = ("security.selinux", "system.posix_acl_access")
_OURS = "user.qmpcommit"
"""Tells of a file which process made it here, that may be killed before QEMU has opened it."""

_ODD = 4096
"""Sizes that a new file is known by are multiples of this many bytes (O_DIRECT's), up to 1 GiB."""

_LEAST = 4 * 4096
"""Bytes that an empty image takes at least: of its header and of three tables."""

_FOR_ALL = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
"""What stands in QEMU's way too."""


class NewFile(NamedTuple):
    """A file that was made here and is empty; `descriptor` is held until QEMU has it open."""

    path: str
    file: FileId
    descriptor: int

    def mark(self) -> int:
        """Give it a size by which QEMU can tell that it has opened this very file."""
        size = _ODD * (1 + int.from_bytes(os.urandom(8), "big") % ((1 << 30) // _ODD))
        os.ftruncate(self.descriptor, size)
        return size

    def is_named(self) -> bool:
        """Whether its name still leads to it."""
        try:
            return FileId.of(os.stat(self.path)) == self.file
        except OSError:
            return False

    def close(self) -> None:
        """QEMU has it."""
        os.close(self.descriptor)


def make_file(path: str, like: str) -> NewFile:
    """Make a new file with mode, owner and label of the one at `like` ("" for none).

    Raises FileExistsError where the name is taken, by a link too; OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = os.open(path, flags, 0o600)
    made = NewFile(path, FileId.of(os.fstat(opened)), opened)
    with suppress(OSError):
        os.setxattr(opened, _OURS, process_identity(os.getpid()).encode() or b"fresh")
    if like:
        with suppress(OSError):  # what could not be made alike is looked for afterwards
            _resemble(opened, like)
    return made


def maker_of(path: str) -> str:
    """Who made a file for a fresh overlay (`process_identity`); "" where nothing tells that."""
    with suppress(OSError):
        return os.getxattr(path, _OURS, follow_symlinks=False).decode(errors="replace")
    return ""


def is_being_made(path: str) -> bool:
    """Whether another process made this file for a fresh overlay, and lives."""
    maker = maker_of(path)
    pid = maker.partition(".")[0]
    return pid.isdigit() and int(pid) != os.getpid() and is_alive(maker)


def _resemble(opened: int, like: str) -> None:
    other = os.stat(like)
    for owner in ((other.st_uid, other.st_gid), (-1, other.st_gid)):
        with suppress(OSError):
            os.fchown(opened, *owner)
            break
    os.fchmod(opened, stat.S_IMODE(other.st_mode) & 0o777)
    for name in _LABELS:
        with suppress(OSError):
            os.setxattr(opened, name, os.getxattr(like, name))


def write_base_name(path: str, file: FileId, name: str) -> bool:
    """Have the header of the overlay that was made here name its base so; whether it does now.

    For one that QEMU has open and nothing uses yet: QEMU reads the name when it opens a file, and
    writes it when it stores bitmaps. One write, so that a kill leaves one name or the other.
    Raises OSError where it could not be written.
    """
    try:
        opened = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        start = os.pread(opened, 24, 0)
        if FileId.of(os.fstat(opened)) != file or len(start) < 24 or start[:4] != MAGIC:
            return False
        place, former, bits = struct.unpack(">QII", start[8:24])
        text = os.fsencode(name)
        if not place or len(text) > LONGEST_NAME or place + len(text) > 1 << bits:
            return False
        between = os.pread(opened, place - 20, 20)
        length = struct.pack(">I", len(text))
        os.pwrite(opened, length + between + text.ljust(former, b"\0"), 16)
        os.fsync(opened)
        return True
    finally:
        os.close(opened)


def differences(path: str, like: str) -> str:
    """In what a file's mode and owner differ from another's; "" for in nothing that is seen."""
    try:
        mine, other = os.stat(path), os.stat(like)
    except OSError:
        return ""
    found = []
    if stat.S_IMODE(mine.st_mode) != stat.S_IMODE(other.st_mode) & 0o777:
        modes = stat.S_IMODE(mine.st_mode), stat.S_IMODE(other.st_mode)
        found.append("mode {:o}, not {:o}".format(*modes))
    if (mine.st_uid, mine.st_gid) != (other.st_uid, other.st_gid):
        owners = mine.st_uid, mine.st_gid, other.st_uid, other.st_gid
        found.append("owner {}:{}, not {}:{}".format(*owners))
    return " and ".join(found)


def remove_new(path: str, file: FileId | None, names: Iterable[str]) -> bool:
    """Unlink a fresh overlay that was never used; whether it was there and is gone.

    It is the `file` that was made here. Where another process has made it (None) it is known by
    being empty, or an empty qcow2 image over a layer that has one of these `names`. Nothing else
    is touched, and no link is followed.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode):
        return False
    ours = FileId.of(found) == file if file is not None else _is_void(path, set(names))
    if ours:
        with suppress(OSError):
            os.unlink(path)
            return True
    return False


def _is_void(path: str, names: set[str]) -> bool:
    if holds_data(path):
        return False
    try:
        header = read_header(path)
    except OSError:
        return False
    return header is None or header.backing in names


def why_not(path: str) -> OSError | None:
    """Why no file of this name can be made in its folder, whoever makes it; None where it may be.

    Nothing is made that has a name. What this user alone may not do, or what can't be tried in
    such a folder, is no answer.
    """
    folder, name = os.path.split(path)
    try:
        longest = os.statvfs(folder).f_namemax
        if longest and len(os.fsencode(name)) > longest:
            return OSError(errno.ENAMETOOLONG, f"its name has more than {longest} bytes")
        opened = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(opened, bytes(_LEAST), 0)
        finally:
            os.close(opened)
    except OSError as error:
        return error if error.errno in _FOR_ALL else None
    return None


def is_full(error: OSError) -> bool:
    """Whether there is no room, rather than no way."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_device(path: str) -> bool:
    """Whether a disk is a block device: its folder is no place for an overlay."""
    if path.startswith("/dev/") and not path.startswith("/dev/shm/"):
        return True
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def in_memory(path: str) -> str:
    """The folder of a new file, if it is the host's /dev, whose files are gone with its power."""
    folder = os.path.dirname(path)
    try:
        device = os.stat("/dev").st_dev
        gone = os.stat(folder).st_dev == device != os.stat("/").st_dev
    except OSError:
        return ""
    return folder if gone else ""
