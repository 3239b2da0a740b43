"""A host of scripted monitors in a process of its own: a thousand VMs for the daemon's bench.

Each answers with what a real storage daemon was recorded to answer. Commits stay copying until
the driver says ``ready SECONDS`` on standard input; then each becomes READY at a moment of its
own within so many seconds, and the time until its ``job-complete`` arrives is measured here,
from wire to wire. ``report`` prints the figures as one line of JSON, ``reset`` undoes pivots.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}\r\n'  # noqa: E501  (as it goes over the wire)


class Host:
    """All monitors, and what was measured."""

    def __init__(self, replies: dict[str, dict[str, Any]]) -> None:
        self.replies = replies
        self.monitors: set[Monitor] = set()
        self.copying: list[Monitor] = []
        self.reactions: list[float] = []
        self.ended = 0
        self.late = 0.0
        self.first = self.last = 0.0

    def tell(self, line: str) -> None:
        """A command of the bench's driver."""
        word, _, rest = line.strip().partition(" ")
        if word == "ready":
            loop = asyncio.get_running_loop()
            monitors, self.copying = self.copying, []
            self.reactions, self.ended = [], 0
            now = self.first = loop.time() + 0.1
            for monitor in monitors:
                loop.call_at(now + random.uniform(0, float(rest)), monitor.become_ready)
        elif word == "reset":
            for monitor in self.monitors:
                monitor.pivoted = False
        elif word == "report":
            figures = {
                "copying": len(self.copying),
                "ended": self.ended,
                "reactions": self.reactions,
                "first": self.first,
                "last": self.last,
            }
            sys.stdout.write(json.dumps(figures) + "\n")
            sys.stdout.flush()


class Monitor(asyncio.Protocol):
    """One connection; one job at a time."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.job: str | None = None
        self.status = ""
        self.pivoted = False
        self.ready_at = 0.0
        self.waiting = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.write(GREETING)
        self.host.monitors.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.host.monitors.discard(self)

    def data_received(self, data: bytes) -> None:
        self.waiting += data
        decoder = json.JSONDecoder()
        text = self.waiting.decode()
        while text := text.lstrip():
            try:
                message, end = decoder.raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            self.transport.write(self.answer(message))
        self.waiting = text.encode()

    def answer(self, message: dict[str, Any]) -> bytes:
        """The events that a command causes, and its reply."""
        command, ident = message["execute"], json.dumps(message.get("id"))
        arguments = message.get("arguments", {})
        value: Any = {}
        events = b""
        if command == "block-commit":
            self.job = arguments["job-id"]
            events = self.become("created") + self.become("running")
            self.host.copying.append(self)
        elif command == "job-complete":
            self.host.reactions.append(time.monotonic() - self.ready_at)
            self.host.last = time.monotonic()
            self.pivoted = True
            reply = f'{{"return": {{}}, "id": {ident}}}\r\n'.encode()
            ended = self.event("BLOCK_JOB_COMPLETED", type="commit", device=self.job, len=65536,
                               offset=65536, speed=0)  # fmt: skip
            return (
                reply
                + self.become("waiting")
                + self.become("pending")
                + ended
                + self.become("concluded")
            )
        elif command == "job-dismiss":
            events = self.become("null")
            self.job = None
            self.host.ended += 1
        elif command == "query-jobs":
            value = []
            if self.job is not None:
                value = [{"id": self.job, "type": "commit", "status": self.status,
                          "current-progress": 65536, "total-progress": 65536}]  # fmt: skip
        else:
            known = self.host.replies["after" if self.pivoted else "before"]
            value = known.get(command, {})
            if command == "query-status":
                error = '{"class": "CommandNotFound", "desc": "no"}'
                return f'{{"error": {error}, "id": {ident}}}\r\n'.encode()
            if command == "blockdev-del":
                self.pivoted = True
        return events + f'{{"return": {json.dumps(value)}, "id": {ident}}}\r\n'.encode()

    def become_ready(self) -> None:
        ready = self.become("ready") + self.event(
            "BLOCK_JOB_READY", type="commit", device=self.job, len=65536, offset=65536, speed=0
        )
        self.ready_at = time.monotonic()
        self.transport.write(ready)

    def become(self, status: str) -> bytes:
        self.status = status
        return self.event("JOB_STATUS_CHANGE", id=self.job, status=status)

    def event(self, name: str, **data: Any) -> bytes:
        now = time.time()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        return json.dumps({"timestamp": stamp, "event": name, "data": data}).encode() + b"\r\n"


async def main(folder: Path, first: int, end: int) -> None:
    host = Host(json.loads((folder / "replies.json").read_text()))
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_unix_server(lambda: Monitor(host), str(folder / f"{number}.sock"))
        for number in range(first, end)
    ]
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        host.tell(line.decode())
    for server in servers:
        server.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
