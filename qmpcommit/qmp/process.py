"""Which process answers at a monitor: one that can't be mistaken for a later one."""

from __future__ import annotations

import os


def began(pid: int | str) -> int | None:
    """When a process began, in clock ticks since boot; None for one that has ended.

    Raises `PermissionError` where that is hidden from us.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            facts = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if facts[0] in (b"Z", b"X") else int(facts[19])


def command_words(pid: int | None) -> list[bytes] | None:
    """The words of a process's command line; None where they can't be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return None


def process_identity(pid: int | None) -> str:
    """Its id and when it began; empty where nobody can tell."""
    if not pid:
        return ""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            began = file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""
    return f"{pid}.{began}"


def is_alive(identity: str) -> bool:
    """Whether that very process still runs."""
    pid = identity.partition(".")[0]
    return bool(identity) and process_identity(int(pid)) == identity


def is_qemu(pid: int | None) -> bool:
    """Whether a process is seen to be a QEMU, which also a loader or another name may run."""
    words = command_words(pid) or []
    return any(os.path.basename(word).startswith((b"qemu", b"kvm")) for word in words[:6])


def is_seen_ended(identity: str) -> bool:
    """Whether that very process is seen to have ended, though nobody may have waited for it yet."""
    pid, _, then = identity.partition(".")
    if not pid:
        return False
    try:
        return began(pid) != int(then) and os.path.exists("/proc/self/stat")
    except (OSError, ValueError):
        return False


def is_same(before: str, now: str) -> bool | None:
    """Whether two identities are of one process; None where one of them can't be told."""
    return before == now if before and now else None
