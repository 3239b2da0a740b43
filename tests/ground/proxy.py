"""A proxy between a client and a real monitor that can cut, hold and refuse."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.ground.messages import messages

Hook = Callable[[dict[str, Any]], str]
"""Sees a message and says what becomes of it:

* "pass", "drop", "twice"
* "cut" (the connection, before it) or "cut after", with no answer to it
* "hold": it, and what comes after it in its direction, waits for `Proxy.release`
* "split": it goes in single bytes (a long one in pieces)
* "refuse": QEMU never sees this command, and the client gets an error for it
"""

REFUSAL = "refused by the proxy"


def let_pass(message: dict[str, Any]) -> str:
    """The hook that does nothing."""
    return "pass"


class Strike:
    """A hook: a command meets its fate, the first `times` that it comes; `met` counts them."""

    def __init__(self, command: str, fate: str, *, times: float = math.inf) -> None:
        self.met = 0
        self._command, self._fate, self._times = command, fate, times

    def __call__(self, message: dict[str, Any]) -> str:
        if message.get("execute") != self._command or self.met >= self._times:
            return "pass"
        self.met += 1
        return self._fate


class Proxy:
    """Passes whole messages; `to_qemu` and `to_client` are its hooks."""

    def __init__(self, path: str, target: str) -> None:
        self.path, self.target = path, target
        self.to_qemu: Hook = let_pass
        self.to_client: Hook = let_pass
        self.sent: list[str] = []
        self.held = asyncio.Event()
        self.errors: list[BaseException] = []
        self._released = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: set[asyncio.StreamWriter] = set()

    async def send(self, message: dict[str, Any]) -> None:
        """A message to the clients that QEMU has never sent; no faster than it is read."""
        for writer in list(self._clients):
            with suppress(OSError):
                writer.write(json.dumps(message).encode() + b"\r\n")
                await writer.drain()

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

    def release(self) -> None:
        """Let go what is held; what is held from now on waits for the next release."""
        self.held.clear()
        self._released.set()
        self._released = asyncio.Event()

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
        with suppress(asyncio.CancelledError):  # by `cut`; asyncio would complain of it
            try:
                await self._carry(reader, writer)
            finally:
                self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs: asyncio.StreamWriter | None = None
        pumps: list[asyncio.Task[None]] = []
        try:
            self._clients.add(writer)
            answers, theirs = await asyncio.open_unix_connection(self.target, limit=1 << 26)
            pumps = [
                asyncio.create_task(self._pump(reader, theirs, writer, True)),
                asyncio.create_task(self._pump(answers, writer, theirs, False)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        finally:
            self._clients.discard(writer)
            sides = [side for side in (writer, theirs) if side is not None]
            for side in sides:
                side.transport.abort()  # before anything is awaited: `cut` may cancel that
            for pump in pumps:
                pump.cancel()
            if pumps:
                await asyncio.wait(pumps)
            self.errors += [e for pump in pumps if not pump.cancelled() and (e := pump.exception())]
            for side in sides:
                with suppress(OSError):
                    await side.wait_closed()

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        back: asyncio.StreamWriter,
        to_qemu: bool,
    ) -> None:
        with suppress(OSError, ValueError):
            async for message, line in messages(source):
                if to_qemu:
                    self.sent.append(message.get("execute", ""))
                fate = (self.to_qemu if to_qemu else self.to_client)(message)
                match fate:
                    case "cut":
                        return
                    case "drop":
                        continue
                    case "hold":
                        released = self._released
                        self.held.set()
                        await released.wait()
                        sink.write(line)
                    case "split":
                        await _in_pieces(line, sink)
                    case "twice":
                        sink.write(line + line)
                    case "refuse":
                        back.write(_refusal(message))
                    case "pass":
                        sink.write(line)
                    case "cut after":
                        sink.write(line)
                        back.transport.abort()  # an answer may be quicker than we are
                    case _:
                        raise AssertionError(f"no such fate: {fate}")
                await sink.drain()
                if fate == "cut after":
                    await asyncio.sleep(0)
                    return


async def _in_pieces(line: bytes, sink: asyncio.StreamWriter) -> None:
    size = max(1, len(line) // 2000)  # a schema has 250 KB
    for start in range(0, len(line), size):
        sink.write(line[start : start + size])
        await sink.drain()
        await asyncio.sleep(0)


def _refusal(message: dict[str, Any]) -> bytes:
    reply: dict[str, Any] = {"id": message["id"]} if "id" in message else {}
    reply["error"] = {"class": "GenericError", "desc": REFUSAL}
    return json.dumps(reply).encode() + b"\r\n"


@asynccontextmanager
async def proxy(folder: Path, target: str) -> AsyncIterator[Proxy]:
    """A proxy in front of a monitor; raises what a hook raised."""
    made = Proxy(str(folder / "proxy"), target)
    await made.open()
    try:
        yield made
    finally:
        await made.refuse()
        if made.errors:
            raise made.errors[0]
