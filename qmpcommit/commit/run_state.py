"""Whether a guest runs, and letting one go on that was stopped here.

Rests on ``query-status`` and ``cont``.
"""

from __future__ import annotations

from qmpcommit.errors import CommandRefused
from qmpcommit.qmp.monitor import Monitor

STOPPED_HERE = ("paused", "prelaunch")
"""What a running guest is in after ``stop``; the second if it was reset since.

One that stands still for another reason (an I/O error, the end of a migration, after which the
disks belong to another host) is not to be continued by whoever stopped it.
"""


async def runs(monitor: Monitor) -> bool:
    """Whether a guest runs; a storage daemon has none. Raises what `Monitor.execute` raises."""
    try:
        return bool((await monitor.execute("query-status")).get("running"))
    except CommandRefused:
        return False


async def go_on(monitor: Monitor) -> str:
    """Continue a guest that ran and was stopped here, if it still stands still for that.

    Else what is returned says why it was not continued. Safe to repeat; raises what
    `Monitor.execute` raises.
    """
    status = (await monitor.execute("query-status")).get("status")
    if status in STOPPED_HERE:
        await monitor.execute("cont")
    elif status != "running":
        monitor.log.warning("not_continued", status=status)
        return f"the guest of {monitor.name} was not let go on: it is '{status}' by now"
    return ""
