"""The daemon, on a host that never tells the groups of a user."""

from __future__ import annotations

import threading

import qmpcommit.cli.main
from qmpcommit.daemon import rights


def hangs(uid: int, gid: int) -> frozenset[int]:
    threading.Event().wait()
    return frozenset()


rights._groups_of, rights.NSS = hangs, 1.0

if __name__ == "__main__":
    qmpcommit.cli.main.main()
