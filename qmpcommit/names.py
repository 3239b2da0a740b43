"""The names by which what is ours in a QEMU is told from what is not."""

from __future__ import annotations

import hashlib

JOB_PREFIX = "qmpcommit-"
"""What the ids of our jobs begin with; only such jobs are ever adopted without being named."""

WINDOW_MARK = ".qmpcommit-window-"
"""In the file name of each overlay of a snapshot window."""

STALE_MARK = "qmpcommit-stale"
"""The dirty bitmap by which a stale overlay tells itself that it is one."""

MARKING = "qmpcommit-mark-"
"""What the nodes are called by which closed overlays are marked so; they are open for moments."""

FORMER_LIMITS = "qmpcommit-limits-"
"""What a ``throttle-group`` is called that has the limits which a disk had before it was slowed."""

HELD_GROUP = "qmpcommit:"
"""What the groups of I/O limits are called that hold a guest's writes back."""

SOCKETS = "/run/vms/*/*.sock"
"""Where monitors' sockets are, where nothing else is said."""

NODE_NAME_LENGTH = 31
"""Characters that QEMU's node-names have at most."""


def node_stem(job_id: str) -> str:
    """What a job's fresh overlay's node-names begin with: its id, or a short stand-in."""
    if len(job_id) + len("-file") <= NODE_NAME_LENGTH:
        return job_id
    return f"{JOB_PREFIX}{hashlib.sha256(job_id.encode()).hexdigest()[:12]}"
