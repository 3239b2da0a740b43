"""A scripted monitor, for what a real one can't be made to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.ground.messages import messages

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 9, "micro": 9}, "package": ""},
                    "capabilities": []}}  # fmt: skip

Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Refusal(Exception):
    """Raised by a handler: QEMU's error reply."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc, self.error_class = desc, error_class


class FakeMonitor:
    """Serves one client after another; `commands` are all that were received.

    With `hangs_up` it accepts, and closes at once.
    """

    def __init__(
        self,
        handler: Handler | None = None,
        greeting: bytes | None = None,
        *,
        hangs_up: bool = False,
    ) -> None:
        self.path = ""
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.connected = asyncio.Event()
        self.connections = 0
        self._handler = handler
        self._hangs_up = hangs_up
        self._greeting = json.dumps(GREETING).encode() + b"\n" if greeting is None else greeting
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        self.connected.set()
        try:
            if self._hangs_up:
                return
            writer.write(self._greeting)
            async for message, _ in messages(reader):
                await self._answer(message, writer)
        except (OSError, ValueError, asyncio.CancelledError):
            pass  # the client hung up, or spoke no JSON, or we close
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        reply: dict[str, Any] = {"id": message["id"]} if "id" in message else {}
        command, arguments = message.get("execute"), message.get("arguments", {})
        if not isinstance(command, str):
            desc = "QMP input lacks member 'execute'"
            reply["error"] = {"class": "GenericError", "desc": desc}
        elif command == "qmp_capabilities":
            reply["return"] = {}
        else:
            self.commands.append((command, arguments))
            try:
                reply["return"] = await self._handler(command, arguments) if self._handler else {}
            except Refusal as refusal:
                reply["error"] = {"class": refusal.error_class, "desc": refusal.desc}
        writer.write(json.dumps(reply).encode() + b"\n")

    def event(self, name: str, **data: Any) -> None:
        """Send an event to whoever is connected."""
        stamp = {"seconds": 1_700_000_000, "microseconds": 123456}
        self.send(json.dumps({"event": name, "data": data, "timestamp": stamp}).encode() + b"\n")

    def send(self, data: bytes) -> None:
        """Send these very bytes to whoever is connected."""
        for writer in self._writers:
            writer.write(data)

    async def flood(self, line: bytes, count: int) -> None:
        """Send that so many times, no faster than it is read."""
        for writer in list(self._writers):
            with suppress(OSError):  # it hung up
                for _ in range(count):
                    writer.write(line)
                    await writer.drain()

    def drop(self) -> None:
        """Hang up on whoever is connected."""
        for writer in self._writers:
            writer.transport.abort()

    async def all_closed(self) -> None:
        """Wait until nobody is connected any more."""
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Hang up and stop."""
        self.drop()
        for task in list(self._tasks):
            task.cancel()
        await self.all_closed()


@asynccontextmanager
async def fake_monitor(
    folder: Path,
    handler: Handler | None = None,
    greeting: bytes | None = None,
    *,
    hangs_up: bool = False,
) -> AsyncIterator[FakeMonitor]:
    """A fake monitor on a socket in that folder."""
    fake = FakeMonitor(handler, greeting, hangs_up=hangs_up)
    fake.path = str(folder / "fake")
    server = await asyncio.start_unix_server(fake.serve, fake.path, limit=1 << 24)
    try:
        yield fake
    finally:
        server.close()
        await fake.close()
        await server.wait_closed()
