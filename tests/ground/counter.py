"""A writer whose order of writes tells whether two disks were copied at one instant."""

from __future__ import annotations

import asyncio
from typing import Self

import qmpcommit as qc
from tests.ground.images import Picture
from tests.ground.nbd import Nbd

BLOCK = 4096


def block_of(count: int) -> bytes:
    """What stands on a disk when the count has been written to it."""
    return count.to_bytes(8, "big") * (BLOCK // 8)


class Counter:
    """Counts on two disks, always on the first before the second, each write flushed.

    So at any one instant the second shows what the first shows, or one less. The place changes
    with the count, so that the last writes of all are found in many blocks; `pictures` are what
    the disks must show when the writing has ended.
    """

    PLACES = 16

    def __init__(self, disks: tuple[Nbd, Nbd], pictures: tuple[Picture, Picture]) -> None:
        self.pictures = pictures
        self.count = 0
        self._disks = disks
        self._stop = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop = True
        assert self._task is not None
        await self._task

    async def _run(self) -> None:
        while not self._stop:
            count = self.count + 1
            offset = count % self.PLACES * BLOCK
            for disk, picture in zip(self._disks, self.pictures, strict=True):
                await disk.write(offset, block_of(count))
                await disk.flush()
                picture.write(offset, block_of(count))
            self.count = count


async def shown(vm: qc.Session, nbd: str, node: str) -> int:
    """The highest count that a node shows, which nobody writes to; as an NBD client reads it."""
    export = {"type": "nbd", "id": "look", "name": node, "node-name": node}
    await vm.execute("block-export-add", export)
    try:
        client = await Nbd.connect(nbd, node)
        try:
            data = await client.read(0, Counter.PLACES * BLOCK)
        finally:
            await client.close()
    finally:
        with vm.events("BLOCK_EXPORT_DELETED") as deleted:
            await vm.execute("block-export-del", {"id": "look", "mode": "hard"})
            await anext(deleted)
    blocks = [data[n : n + BLOCK] for n in range(0, len(data), BLOCK)]
    counts = [int.from_bytes(block[:8], "big") for block in blocks]
    for block, count in zip(blocks, counts, strict=True):
        assert block == block_of(count), "a block that was half written"
    return max(counts)
