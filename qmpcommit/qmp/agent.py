"""QEMU's guest agent over its socket: freezing the guest's file systems, and thawing them.

The agent speaks JSON lines like QMP, but greets nobody, answers one command after the other,
and what a former client did not read is still in the line. So each connection begins with
``guest-sync-delimited``: the agent marks its answer with a byte that JSON never has, and all
before it is dropped. ``qemu.qmp`` takes that byte for the end of the protocol, hence a reader
of our own.

Rests on the QEMU Guest Agent Protocol Reference: ``guest-sync-delimited``,
``guest-fsfreeze-freeze``, ``guest-fsfreeze-thaw``, ``guest-fsfreeze-status``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

from qmpcommit.errors import QuiesceFailed
from qmpcommit.qmp.address import Address
from qmpcommit.tasks import to_the_end

_SENTINEL = b"\xff"
_TOLD = 500  # characters of the guest's that an error repeats
_READ_LIMIT = 16 * 1024 * 1024  # bytes; an answer of the commands used here has some hundred


class Agent:
    """One connection to a guest agent, open inside ``async with``; one command at a time.

    `address` is the path of the Unix socket of the agent's chardev, or ``tcp:HOST:PORT``. `vm`
    is what errors call the VM. `timeout` bounds, in seconds, connecting with its synchronization
    and each command. Entering raises `QuiesceFailed` where nobody answers.
    """

    def __init__(
        self, address: str | os.PathLike[str], *, vm: str = "vm", timeout: float = 5.0
    ) -> None:
        self.address = Address.parse(address)
        self.vm = vm
        self.timeout = timeout
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        try:
            async with self._within(self.timeout, "connect"):
                sock = await self.address.open()
                try:
                    self._streams = await asyncio.open_connection(sock=sock, limit=_READ_LIMIT)
                finally:
                    if self._streams is None:
                        sock.close()
                await self._synchronize()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up at once, whatever is still to be said; never raises."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()
            await to_the_end(_closed(streams[1]))

    async def freeze(self, *, timeout: float | None = None) -> int:
        """Flush and freeze the guest's file systems; how many (``guest-fsfreeze-freeze``).

        They stay frozen when this connection ends, until somebody thaws them. When this raises
        or is cancelled they may be frozen or not, so thaw them then, over a new connection.
        """
        command = "guest-fsfreeze-freeze"
        return self._number(command, await self.execute(command, timeout=timeout))

    async def thaw(self) -> int:
        """Thaw all file systems; how many were (``guest-fsfreeze-thaw``). Safe to repeat."""
        command = "guest-fsfreeze-thaw"
        return self._number(command, await self.execute(command))

    async def status(self) -> str:
        """``thawed`` or ``frozen`` (``guest-fsfreeze-status``)."""
        status = await self.execute("guest-fsfreeze-status")
        return status if isinstance(status, str) else f"a {type(status).__name__}"

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Run one command of the agent's and return its value.

        Raises `QuiesceFailed` with the agent's error, or where no answer comes within `timeout`
        seconds. After any end but an answer the connection is closed, since the answer may come
        late.
        """
        answered = False
        try:
            async with self._within(timeout or self.timeout, command):
                self._send(b"", command, arguments)
                reply = await self._reply()
                answered = True
        finally:
            if not answered:
                await self.close()
        if "error" in reply:
            error = reply["error"]
            told = error.get("desc") if isinstance(error, dict) else error
            # The guest says it, in any length.
            told = told[:_TOLD] if isinstance(told, str) else "it does not say why"
            raise self._failed(f"refused {command}: {told}", desc=told, command=command)
        return reply.get("return")

    async def _synchronize(self) -> None:
        mark = 1 + int.from_bytes(os.urandom(6), "big")
        self._send(_SENTINEL, "guest-sync-delimited", {"id": mark})
        answer = None
        while answer != mark:  # but one to somebody who has left
            answer = (await self._reply(synchronizing=True)).get("return")

    def _number(self, command: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise self._failed(
            f"answered {command} with a {type(value).__name__} instead of a number of file systems",
            command=command,
        )

    def _send(self, before: bytes, command: str, arguments: Mapping[str, object] | None) -> None:
        if self._streams is None:
            raise self._failed(f"was not asked for {command}: the connection is closed")
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self._streams[1].write(before + json.dumps(request).encode() + b"\n")

    async def _reply(self, *, synchronizing: bool = False) -> dict[str, Any]:
        assert self._streams is not None
        while True:
            line = await self._streams[0].readline()
            if not line.endswith(b"\n"):
                raise EOFError("it closed the connection")
            if synchronizing:
                _, mark, line = line.rpartition(_SENTINEL)
                if not mark:
                    continue
            with suppress(ValueError, RecursionError):
                reply = json.loads(line)
                if isinstance(reply, dict) and ("return" in reply or "error" in reply):
                    return reply
            if not synchronizing:
                raise ValueError("what it says is no answer of an agent")

    @asynccontextmanager
    async def _within(self, seconds: float, command: str) -> AsyncIterator[None]:
        """Bound what is done; each end of the line as our own error."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise self._failed(
                f"did not answer within {seconds:g} s: no qemu-ga runs in the guest, the guest"
                " is paused or hangs, or another client holds this socket (QEMU serves one at a"
                " time)",
                command=command,
            ) from error
        except OSError as error:
            why = error.strerror or str(error)
            raise self._failed(
                f"can't be reached: {why}. Is the VM running, and is this the socket of its"
                " org.qemu.guest_agent.0 channel?",
                command=command,
            ) from error
        except (EOFError, ValueError) as error:
            raise self._failed(f"can't be understood: {error}", command=command) from error

    def _failed(self, what: str, **facts: object) -> QuiesceFailed:
        return QuiesceFailed(
            f"the guest agent of {self.vm} at {self.address} {what}",
            vm=self.vm,
            agent=str(self.address),
            **facts,
        )


async def _closed(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(2.0):
            await writer.wait_closed()
