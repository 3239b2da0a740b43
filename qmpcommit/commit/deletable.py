"""Whose a file is: nothing is deleted for somebody who could not delete it.

A monitor says which files are its disk's. Who runs it may say what he likes, and the one who is
asked to delete them, perhaps root, may do more than he may.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple


class Credentials(NamedTuple):
    """As what a process uses files."""

    uid: int
    groups: frozenset[int]


def credentials(pid: int) -> Credentials | None:
    """Those of a process; None where it has ended, or can't be looked at."""
    found: dict[str, list[int]] = {}
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                name, _, values = line.partition(":")
                if name in ("Uid", "Gid", "Groups"):
                    found[name] = [int(each) for each in values.split()]
        return Credentials(found["Uid"][3], frozenset((found["Gid"][3], *found["Groups"])))
    except (OSError, ValueError, LookupError):
        return None


def is_ours(pid: int | None) -> bool:
    """Whether that process may do all that we may, or nobody knows which one it is."""
    who = credentials(pid) if pid is not None else None
    return pid is None or (who is not None and who.uid in (0, os.geteuid()))


def not_theirs(file: os.stat_result, folder: os.stat_result, pid: int | None) -> str:
    """Why QEMU's process could not delete this file of that folder itself; empty where it could.

    Its own files count as such in every folder: what is in them it could destroy.
    """
    if pid is None or is_ours(pid):
        return ""
    who = credentials(pid)
    if who is None:
        return f"as whom QEMU (process {pid}) runs can't be seen"
    if who.uid == file.st_uid:
        return ""
    sticky = bool(folder.st_mode & stat.S_ISVTX) and folder.st_uid != who.uid
    if _may_write(who, folder) and not sticky:
        return ""
    return f"it is user {file.st_uid}'s, and QEMU runs as user {who.uid}, who could not delete it"


def _may_write(who: Credentials, folder: os.stat_result) -> bool:
    shift = 6 if folder.st_uid == who.uid else 3 if folder.st_gid in who.groups else 0
    return folder.st_mode >> shift & 0o3 == 0o3
