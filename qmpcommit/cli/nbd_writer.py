"""A guest's writes without a guest: a small NBD client that never stops writing.

Rests on the NBD protocol's fixed newstyle negotiation and its simple replies
(https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
"""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import suppress
from typing import Self

_OPTION, _OPTION_REPLY = 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _REPLY = 0x25609513, 0x67446698
_GO, _ACK, _WRITE = 7, 1, 1

BLOCK = 4096


class NbdWriter:
    """Writes 4 KiB at random places, one after the other, and puts the same into `picture`.

    A context manager that writes while it is entered. `count` are the blocks that the server
    has acknowledged; `pause` holds the writing, so that the picture stands still.
    """

    def __init__(self, path: str, export: str, picture: bytearray) -> None:
        self.count = 0
        self.picture = picture
        self._path, self._export = path, export
        self._random = random.Random(1)
        self._may_write = asyncio.Lock()
        self._paused = False
        self._task: asyncio.Task[None] | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        self._streams = await asyncio.open_unix_connection(self._path)
        await self._agree()
        self._task = asyncio.create_task(self._write_on())
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        assert self._task is not None
        assert self._streams is not None
        if kind is None and not self._paused:
            await self.pause()  # so that no write is left without its reply
        self._task.cancel()
        await asyncio.wait({self._task})
        self._streams[1].close()
        with suppress(OSError):
            await self._streams[1].wait_closed()
        if not self._task.cancelled():
            self._task.result()  # raises what stopped it

    async def writes(self, more: int) -> None:
        """Wait until so many more are acknowledged."""
        goal = self.count + more
        while self.count < goal:
            assert self._task is not None
            if self._task.done():
                await self._task  # raises what stopped it
            await asyncio.sleep(0.001)

    async def pause(self) -> None:
        """Let the write under way end, and begin no other until `resume`."""
        await self._may_write.acquire()
        self._paused = True

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._may_write.release()

    async def _agree(self) -> None:
        assert self._streams is not None
        reader, writer = self._streams
        await reader.readexactly(18)
        name = self._export.encode()
        wish = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        writer.write(struct.pack(">I", 3) + struct.pack(">QII", _OPTION, _GO, len(wish)) + wish)
        while True:
            head = await reader.readexactly(20)
            magic, _, kind, length = struct.unpack(">QIII", head)
            data = await reader.readexactly(length)
            if magic != _OPTION_REPLY or kind >> 31:
                raise ConnectionError(f"no NBD export '{self._export}': {data!r}")
            if kind == _ACK:
                return

    async def _write_on(self) -> None:
        while True:
            async with self._may_write:
                await self._write()

    async def _write(self) -> None:
        assert self._streams is not None
        reader, writer = self._streams
        offset = self._random.randrange(len(self.picture) // BLOCK) * BLOCK
        data = self._random.randbytes(16) * (BLOCK // 16)
        handle = self.count
        writer.write(struct.pack(">IHHQQI", _REQUEST, 0, _WRITE, handle, offset, BLOCK) + data)
        magic, error, answered = struct.unpack(">IIQ", await reader.readexactly(16))
        if (magic, answered) != (_REPLY, handle) or error:
            raise OSError(error, f"NBD write failed with error {error}")
        self.picture[offset : offset + BLOCK] = data
        self.count += 1
