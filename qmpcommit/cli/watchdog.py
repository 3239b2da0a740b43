"""A command ends with the qmpcommit that runs it, even where that is killed by SIGKILL.

A process of its own waits for the end of a pipe that only qmpcommit holds, and then ends the
command's process group: what the command has begun is in it too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from qmpcommit.tasks import to_the_end

_SCRIPT = """
read -r group || exit 0
read -r over && exit 0
kill -s TERM -- "-$group" 2>/dev/null
for tenth in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    kill -s 0 -- "-$group" 2>/dev/null || exit 0
    sleep 0.1
done
kill -s KILL -- "-$group" 2>/dev/null
"""
"""What ignores SIGTERM for two seconds is killed."""


@asynccontextmanager
async def watchdog() -> AsyncIterator[Callable[[int], None]]:
    """While this block runs, the process group that the result is called with ends with us.

    Without a ``/bin/sh`` nothing watches.
    """
    theirs, ours = os.pipe()  # which no other child gets
    try:
        process = None
        with suppress(OSError):
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _SCRIPT, "qmpcommit-watchdog"),
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # not in the group that it ends, nor in a terminal's
            )
    finally:
        os.close(theirs)

    def watch(group: int) -> None:
        with suppress(OSError):
            os.write(ours, b"%d\n" % group)

    try:
        yield watch
    finally:
        with suppress(OSError):
            os.write(ours, b"over\nover\n")
        os.close(ours)
        if process is not None:
            await to_the_end(process.wait())
