"""The file of a Unix socket that a process listens on, whose name counts from a lost folder.

A daemon that was given a relative name has left the folder from which it counts. The kernel knows
the file (``sock_diag``), and not its name; the process may tell the folder by its environment
(``PWD``) and by the files that it has open.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _REQUEST = 20, 1
_SHOW_VFS, _VFS = 2, 1
_LISTENS = 1 << 10


def file_of(pid: int, name: str) -> str | None:
    """The path of the socket that this process has bound by a relative `name`.

    "" where it listens on one of that name and the path is not found; None where it is not seen
    to. Asks the kernel; nobody is connected to.
    """
    inodes = _listening(pid, name)
    if not inodes:
        return None
    files = [_file(inode) for inode in inodes]
    for folder in dict.fromkeys(_folders(pid)):
        path = os.path.join(folder, name)
        with suppress(OSError):
            found = os.stat(path)
            if (found.st_ino & 0xFFFFFFFF, found.st_dev) in files:
                return path
    return ""


def _listening(pid: int, name: str) -> list[int]:
    """The kernel's numbers of the sockets of that name that the process has."""
    mine = set()
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{number}"))
                if found:
                    mine.add(int(found[1]))
    sockets = []
    with suppress(OSError), open(f"/proc/{pid}/net/unix", errors="surrogateescape") as file:
        for line in file:
            words = line.rstrip("\n").split(maxsplit=7)
            if len(words) == 8 and words[7] == name and int(words[6]) in mine:
                sockets.append(int(words[6]))
    return sockets


def _file(inode: int) -> tuple[int, int] | None:
    """The inode and device of the file that a socket is bound to; None where nothing tells."""
    ask = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, _LISTENS, inode, _SHOW_VFS,
                      0xFFFFFFFF, 0xFFFFFFFF)  # fmt: skip
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(1)
            kernel.send(struct.pack("=IHHII", 16 + len(ask), _BY_FAMILY, _REQUEST, 1, 0) + ask)
            answer = kernel.recv(65536)
    except OSError:
        return None
    length, kind = struct.unpack_from("=IH", answer)
    at = 16 + 16  # behind the headers of netlink and of unix_diag
    while kind == _BY_FAMILY and at + 4 <= min(length, len(answer)):
        size, what = struct.unpack_from("=HH", answer, at)
        if what == _VFS:
            number, device = struct.unpack_from("=II", answer, at + 4)
            return number, os.makedev(device >> 20, device & 0xFFFFF)
        if size < 4:
            break
        at += (size + 3) & ~3
    return None


def _folders(pid: int) -> Iterator[str]:
    """Where the process may have been when it was started."""
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        told = dict(word.partition(b"=")[::2] for word in file.read().split(b"\0"))
        yield from (os.fsdecode(told[name]) for name in (b"PWD", b"OLDPWD") if told.get(name))
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                path = os.readlink(f"/proc/{pid}/fd/{number}")
                if path.startswith("/"):
                    yield os.path.dirname(path)
