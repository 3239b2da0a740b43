"""Faults at each message of a conversation with a monitor, one fault at a time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.ground.machines import Machine
from tests.ground.proxy import Proxy

BRIEFLY = 0.4
"""Seconds for which a message is held, or QEMU is stopped."""


class Boundary(NamedTuple):
    """One message of a conversation: the `number`-th of its kind."""

    to_qemu: bool
    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} #{self.number}"


class Fault(NamedTuple):
    """What happens to a message; `strikes` says what the proxy does with it."""

    name: str
    strikes: Callable[[Struck], str]
    commands: bool = True
    others: bool = True

    def __str__(self) -> str:
        return self.name

    def fits(self, boundary: Boundary) -> bool:
        """Whether it can happen to this message."""
        return self.commands if boundary.to_qemu else self.others


class Struck:
    """A monitor behind a proxy, one message of which has a fault.

    Nothing is counted before `begin`. `seen` are the messages since, `struck` tells that the
    fault has happened, `killed` that QEMU was.
    """

    def __init__(
        self,
        between: Proxy,
        qemu: Machine,
        boundary: Boundary | None = None,
        fault: Fault | None = None,
    ) -> None:
        self.between, self.qemu = between, qemu
        self.seen: list[Boundary] = []
        self.struck = self.killed = False
        self._boundary, self._fault = boundary, fault
        self._counts: Counter[str] = Counter()
        self._asked: dict[object, str] = {}
        self._refusing: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """From now on."""
        self.between.to_qemu = lambda message: self._meet(True, message)
        self.between.to_client = lambda message: self._meet(False, message)

    async def end(self) -> None:
        """Nothing happens any more, and what was held or stopped goes on."""
        self._boundary = None
        self.between.release()
        self.qemu.cont()
        if self._refusing is not None:
            await self._refusing

    def later(self, call: Callable[[], None]) -> None:
        """Soon, but after everybody has noticed."""
        asyncio.get_running_loop().call_later(BRIEFLY, call)

    def kill(self) -> str:
        """SIGKILL; what a dead QEMU had listened on, nothing listens on."""
        self.killed = True
        self.qemu.kill()
        self._refusing = asyncio.create_task(self.between.refuse())
        return "pass"

    def stop(self) -> str:
        """SIGSTOP, and soon SIGCONT."""
        self.qemu.stop()
        self.later(self.qemu.cont)
        return "pass"

    def hold(self) -> str:
        """It comes late, and so does all that is behind it."""
        self.later(self.between.release)
        return "hold"

    def _meet(self, to_qemu: bool, message: dict[str, Any]) -> str:
        kind = self._kind(message)
        self._counts[kind] += 1
        boundary = Boundary(to_qemu, kind, self._counts[kind])
        self.seen.append(boundary)
        if boundary != self._boundary or self._fault is None or self.struck:
            return "pass"
        self.struck = True
        return self._fault.strikes(self)

    def _kind(self, message: dict[str, Any]) -> str:
        if "execute" in message:
            self._asked[message.get("id")] = message["execute"]
            return str(message["execute"])
        if "event" in message:
            status = message.get("data", {}).get("status", "")
            return f"{message['event']} {status}".strip()
        if "QMP" in message:
            return "greeting"
        return f"reply to {self._asked.get(message.get('id'), '?')}"


FAULTS = (
    Fault("cut before", lambda struck: "cut"),
    Fault("cut after", lambda struck: "cut after"),
    Fault("hold", Struck.hold),
    Fault("split", lambda struck: "split"),
    Fault("twice", lambda struck: "twice", commands=False),
    Fault("drop", lambda struck: "drop"),
    Fault("refuse", lambda struck: "refuse", others=False),
    Fault("kill", Struck.kill),
    Fault("stop", Struck.stop),
)


def matrix(boundaries: list[Boundary]) -> Iterator[tuple[Boundary, Fault]]:
    """Every fault at every message to which it can happen."""
    for boundary in boundaries:
        for fault in FAULTS:
            if fault.fits(boundary):
                yield boundary, fault
