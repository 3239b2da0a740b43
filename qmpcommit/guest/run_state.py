"""Whether a guest runs, and letting one go on that was stopped here.

Several may have one guest stand still at the same time, each for a reason of its own: two
recycles, a window and a discard. QEMU does not count them, and the first ``cont`` would let the
guest write to the disk of another. So each is a `Still`, and the last one to let go continues it.

Rests on ``query-status``, ``stop`` and ``cont``, and on the event ``RESUME``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from qmpcommit.errors import CommandRefused
from qmpcommit.qmp.monitor import Monitor

STOPPED_HERE = ("paused", "prelaunch")
"""What a running guest is in after ``stop``; the second if it was reset since.

One that stands still for another reason (an I/O error, the end of a migration, after which the
disks belong to another host) is not to be continued by whoever stopped it.
"""


class _Guest:
    """Those who have one guest stand still; `owed` is that one who has let go had stopped it."""

    def __init__(self) -> None:
        self.still: WeakSet[Still] = WeakSet()
        self.owed = False

    @property
    def here(self) -> list[Still]:
        """Those of them whose guest is that of the QEMU which answers now."""
        return [each for each in self.still if each.here]


_GUESTS: WeakKeyDictionary[Monitor, _Guest] = WeakKeyDictionary()


class Still:
    """One of those in this process who have a guest stand still, from now until `leave`.

    `paused` tells that it is to go on when the last of them lets go: it ran, or had been stopped
    by another one of them. `disturbed` tells that it went on meanwhile: somebody else, perhaps in
    another process, has sent ``cont``. The guest of a QEMU that has come instead is another one.
    """

    def __init__(self, monitor: Monitor, *, paused: bool = False) -> None:
        self.paused, self.disturbed = paused, False
        self._monitor, self._pid = monitor, monitor.peer_pid
        self._guest = _GUESTS.setdefault(monitor, _Guest())
        self._guest.still.add(self)
        me = ref(self)

        def heard(message: Mapping[str, Any]) -> None:
            still = me()
            if still is not None and message["event"] == "RESUME":
                still.disturbed = True

        self._listening = monitor.subscribers.add(heard)

    async def ran(self) -> bool:
        """Whether the guest has to go on afterwards. Raises what `Monitor.execute` raises."""
        running = await runs(self._monitor)
        self._pid = self._monitor.peer_pid
        owed = self._guest.owed or any(each.paused for each in self._guest.here)
        self.paused = running or owed
        return self.paused

    async def stop(self) -> None:
        """Stop it; raises what `Monitor.execute` raises."""
        await self._monitor.execute("stop")
        self.disturbed = False

    async def go_on(self) -> str:
        """Let go; the guest goes on, unless another one has it stand still. As `go_on`."""
        if not self.paused and not self._guest.owed:
            self.leave()
            return ""
        self.paused = True  # also where that was another one's to see to
        status = await _status(self._monitor)
        if not self.here:
            self.leave()
            return f"the guest of {self._monitor.name} is another one: its QEMU has ended"
        self.leave(owing=True)
        return await _continue(self._monitor, status)

    def leave(self, *, owing: bool = False) -> None:
        """Let go, and leave the guest as it is; with `owing` another one has to continue it."""
        self._guest.still.discard(self)
        self._listening.close()
        if owing or not self._guest.here:
            self._guest.owed = owing

    def leave_stopped(self) -> None:
        """Let go of a guest that is to stay stopped, whoever else lets go of it."""
        for each in self._others:
            each.paused = False
        self._guest.owed = False
        self.leave()

    async def give_up(self) -> str:
        """Let go of a guest that was not stopped by this one; else as `go_on`."""
        self.paused = False
        return await self.go_on()

    @property
    def here(self) -> bool:
        """Whether no other QEMU is known to answer by now."""
        now = self._monitor.peer_pid
        return self._pid is None or now is None or self._pid == now

    @property
    def _others(self) -> list[Still]:
        return [each for each in self._guest.still if each is not self]


async def runs(monitor: Monitor) -> bool:
    """Whether a guest runs; a storage daemon has none. Raises what `Monitor.execute` raises."""
    try:
        return bool((await monitor.execute("query-status")).get("running"))
    except CommandRefused:
        return False


async def go_on(monitor: Monitor, *, ran: bool = True) -> str:
    """Continue a guest that ran and was stopped here, if it still stands still for that.

    Where it is not known that it `ran`, one that was reset since is left as it is. Else what is
    returned says why it was not continued; nothing where it is continued by the last of those who
    have it stand still. Safe to repeat; raises what `Monitor.execute` raises.
    """
    return await _continue(monitor, await _status(monitor), STOPPED_HERE if ran else ("paused",))


async def _status(monitor: Monitor) -> object:
    return (await monitor.execute("query-status")).get("status")


async def _continue(
    monitor: Monitor, status: object, stopped: Collection[str] = STOPPED_HERE
) -> str:
    guest = _GUESTS.get(monitor)
    if guest is not None and guest.here:
        guest.owed = True
        return ""
    if guest is not None:
        guest.owed = False
    if status in stopped:
        await monitor.execute("cont")
    elif status != "running":
        monitor.log.warning("not_continued", status=status)
        return f"the guest of {monitor.name} was not let go on: it is '{status}' by now"
    return ""
