"""Who still reads what stood still in a window whose owner has died.

A backup may outlive whoever opened its window. Merged back, the window's file would change under
it, and the backup would end well with two instants in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpcommit.block.chain import Disk, absolute
from qmpcommit.block.files import openers
from qmpcommit.block.identity import file_id
from qmpcommit.commit.checks import READER
from qmpcommit.names import WINDOW_MARK
from qmpcommit.window.remains import own_jobs

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM


def readers_of(vm: VM, disk: Disk) -> list[str]:
    """The processes that have the file open over which a window's overlay lies, but QEMU itself.

    Empty where it is being merged back already, and where QEMU runs elsewhere. Processes of other
    users are seen by root only. Looks at all processes of this host.
    """
    active = disk.active
    if active is None or WINDOW_MARK not in active.filename or len(disk.chain) < 2:
        return []
    if vm.peer_pid is None or own_jobs(disk, active.filename):
        return []
    file = file_id(absolute(disk.chain[1], vm.cwd))
    if file is None:
        return []
    return openers(file, but=vm.peer_pid, writer_of=file_id(absolute(active, vm.cwd)))


def reading(readers: list[str], filename: str) -> str:
    """Who reads it, and what would become of that, for a message."""
    verb = "has" if len(readers) == 1 else "have"
    return (
        f"{' and '.join(readers)} {verb} {filename} open still, which would change under"
        f" {'it' if len(readers) == 1 else 'them'}"
    )


WHAT_TO_DO = "End that, or wait for its end"
HINT = f"--override {READER} merges back all the same"
