"""A proxy between a client and a real monitor that can cut, hold and refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.ground.messages import messages

Hook = Callable[[dict[str, Any]], str]
"""Sees a message; answers "pass", "drop", "cut" (before it) or "cut after"."""


def let_pass(message: dict[str, Any]) -> str:
    """The hook that does nothing."""
    return "pass"


class Proxy:
    """Passes whole messages; `to_qemu` and `to_client` are its hooks."""

    def __init__(self, path: str, target: str) -> None:
        self.path, self.target = path, target
        self.to_qemu: Hook = let_pass
        self.to_client: Hook = let_pass
        self.sent: list[str] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen (again)."""
        Path(self.path).unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=1 << 26)

    async def refuse(self) -> None:
        """Cut, and listen no more until `open`."""
        if self._server is not None:
            self._server.close()
        await self.cut()
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None
        Path(self.path).unlink(missing_ok=True)

    async def cut(self) -> None:
        """End all connections."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        theirs: asyncio.StreamWriter | None = None
        pumps: list[asyncio.Task[None]] = []
        try:
            answers, theirs = await asyncio.open_unix_connection(self.target, limit=1 << 26)
            pumps = [
                asyncio.create_task(self._pump(reader, theirs, True)),
                asyncio.create_task(self._pump(answers, writer, False)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            if pumps:
                await asyncio.wait(pumps)
            for side in (writer, theirs):
                if side is not None:
                    side.transport.abort()
                    with suppress(OSError):
                        await side.wait_closed()
            self._tasks.discard(task)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, to_qemu: bool
    ) -> None:
        with suppress(OSError):
            async for message, line in messages(source):
                if to_qemu:
                    self.sent.append(message.get("execute", ""))
                fate = (self.to_qemu if to_qemu else self.to_client)(message)
                if fate == "cut":
                    return
                if fate != "drop":
                    sink.write(line)
                    await sink.drain()
                if fate == "cut after":
                    await asyncio.sleep(0)
                    return


@asynccontextmanager
async def proxy(folder: Path, target: str) -> AsyncIterator[Proxy]:
    """A proxy in front of a monitor."""
    made = Proxy(str(folder / "proxy"), target)
    await made.open()
    try:
        yield made
    finally:
        await made.refuse()
