"""How large files are that may lie on a storage that hangs, as a lost NFS does.

Each is looked at by a thread of its own, which nobody waits for long, and nobody at all when the
daemon ends. In a folder where one look hangs no other is begun.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

WAIT = 1.0
"""Seconds that a look may take; then what was seen last counts."""

SIZES: dict[str, int] = {}
"""The bytes that each file took when it was seen last."""

_hangs: set[str] = set()
_lock = threading.Lock()


def allocated(path: str) -> int | None:
    """The bytes that a file takes; None where it can't be looked at from here."""
    folder = os.path.dirname(path)
    if folder in _hangs:
        return SIZES.get(path)
    found: list[int] = []
    ended = threading.Event()

    def look() -> None:
        with suppress(OSError, ValueError):
            found.append(os.stat(path).st_blocks * 512)
        with _lock:
            if found:
                SIZES[path] = found[0]
            _hangs.discard(folder)
            ended.set()

    threading.Thread(target=look, name="size", daemon=True).start()
    if not ended.wait(WAIT):
        with _lock:
            if not ended.is_set():
                _hangs.add(folder)
                return SIZES.get(path)
    return found[0] if found else None
