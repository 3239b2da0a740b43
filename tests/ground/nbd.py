"""A small NBD client: a guest's writes without a guest."""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.ground.images import Picture

_MAGIC, _OPTION, _REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _SIMPLE = 0x25609513, 0x67446698
_READ, _WRITE, _DISC, _FLUSH = 0, 1, 2, 3
_GO, _ACK = 7, 1


class Nbd:
    """One connection to an export over a Unix socket (fixed newstyle, simple replies)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._handles = 0
        self._waiting: dict[int, tuple[asyncio.Future[bytes], int]] = {}
        self._lost: str | None = None
        self._replies = asyncio.create_task(self._read_replies())
        self.size = 0

    @classmethod
    async def connect(cls, path: str, export: str) -> Self:
        """Connect and agree on the export."""
        reader, writer = await asyncio.open_unix_connection(path)
        magic, option, _ = struct.unpack(">QQH", await reader.readexactly(18))
        assert (magic, option) == (_MAGIC, _OPTION)
        name = export.encode()
        wish = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        writer.write(struct.pack(">I", 3) + struct.pack(">QII", _OPTION, _GO, len(wish)) + wish)
        size = 0
        while True:
            magic, _, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
            data = await reader.readexactly(length)
            assert magic == _REPLY
            assert kind < 1 << 31, f"NBD export {export}: {data!r}"
            if kind == _ACK:
                break
            if kind == 3 and data[:2] == b"\0\0":
                (size,) = struct.unpack(">Q", data[2:10])
        client = cls(reader, writer)
        client.size = size
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if error is None:
            await self.flush()  # as a guest does that shuts down; QEMU 5.2's daemon does not
        await self.close()

    async def close(self) -> None:
        """Hang up."""
        self._replies.cancel()
        await asyncio.wait({self._replies})
        self._writer.close()
        with suppress(OSError):  # the server may have been first
            await self._writer.wait_closed()

    async def _read_replies(self) -> None:
        try:
            while True:
                magic, error, handle = struct.unpack(">IIQ", await self._reader.readexactly(16))
                assert magic == _SIMPLE
                future, length = self._waiting.pop(handle)
                data = await self._reader.readexactly(length) if not error else b""
                if future.done():
                    continue
                if error:
                    future.set_exception(OSError(error, f"NBD error {error}"))
                else:
                    future.set_result(data)
        except (OSError, EOFError) as error:
            self._lost = str(error) or type(error).__name__
            for future, _ in self._waiting.values():
                if not future.done():
                    future.set_exception(ConnectionError(self._lost))

    async def _request(self, kind: int, offset: int, length: int, data: bytes = b"") -> bytes:
        if self._lost is not None:
            raise ConnectionError(f"the NBD server is gone: {self._lost}")
        self._handles += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[self._handles] = (future, length if kind == _READ else 0)
        head = struct.pack(">IHHQQI", _REQUEST, 0, kind, self._handles, offset, length)
        self._writer.write(head + data)
        return await future

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes from the disk."""
        return await self._request(_READ, offset, length)

    async def write(self, offset: int, data: bytes) -> None:
        """Returns when the write is acknowledged."""
        await self._request(_WRITE, offset, len(data), data)

    async def flush(self) -> None:
        """All acknowledged writes are durable."""
        await self._request(_FLUSH, 0, 0)


class Writer:
    """Writes at seeded random places as fast as it goes, and knows what it wrote.

    ``async with Writer(...)`` writes meanwhile; afterwards `picture` is what the disk must show.
    """

    def __init__(
        self, nbd: Nbd, picture: Picture, *, seed: int = 1, start: int = 0,
        length: int | None = None, block: int = 4096,
    ) -> None:  # fmt: skip
        self.picture = picture
        self.count = 0
        self._nbd = nbd
        self._random = random.Random(seed)
        self._start, self._block = start, block
        self._blocks = (length or picture.size - start) // block
        self._stop = False
        self._task: asyncio.Task[None] | None = None
        self._more = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop = True
        assert self._task is not None
        await self._task

    async def writes(self, more: int) -> None:
        """Wait until it has written so many more blocks."""
        goal = self.count + more
        while self.count < goal:
            assert self._task is not None
            assert not self._task.done(), "the writer has stopped"
            self._more.clear()
            await self._more.wait()

    async def _write(self) -> None:
        try:
            while not self._stop:
                offset = self._start + self._random.randrange(self._blocks) * self._block
                data = self._random.randbytes(16) * (self._block // 16)
                await self._nbd.write(offset, data)
                self.picture.write(offset, data)
                self.count += 1
                self._more.set()
        finally:
            self._more.set()
