"""The daemon, on a host where whoever looks at a file in one folder waits for ever.

QMPCOMMIT_SLOW is the folder, from when there is a file "hangs" in it.
"""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import qmpcommit.cli.main
from qmpcommit.daemon import sizes

SLOW = os.environ["QMPCOMMIT_SLOW"]


def stat(path: Any) -> os.stat_result:
    if os.path.dirname(path) == SLOW and os.path.exists(f"{SLOW}/hangs"):
        threading.Event().wait()
    return os.stat(path)


sizes.os = SimpleNamespace(stat=stat, path=os.path)  # type: ignore[attr-defined,assignment]

if __name__ == "__main__":
    qmpcommit.cli.main.main()
