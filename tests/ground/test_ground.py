"""The ground itself: it would see a wrong byte, and it changes nothing of what it carries."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from tests.ground.images import MIB, Write, assert_disk, make_chain, write
from tests.ground.machines import storage_daemon
from tests.ground.nbd import Nbd, Writer
from tests.ground.proxy import proxy


def test_a_wrong_byte_is_seen(folder: Path) -> None:
    chain = make_chain(folder, 3)
    for path, picture in zip(chain.files, chain.pictures, strict=True):
        assert_disk(path, picture)
    write(chain.base, [Write(10 * MIB + 12345, 1, 0x99)])
    with pytest.raises(AssertionError, match=r"top.qcow2 differs at 0xa03039: it has 99"):
        assert_disk(chain.top, chain.pictures[-1])


def test_a_wrong_size_is_seen(folder: Path) -> None:
    chain = make_chain(folder)
    picture = chain.pictures[-1].copy()
    picture.data += b"\0"
    with pytest.raises(AssertionError, match="bytes, not"):
        assert_disk(chain.top, picture)


async def test_a_commit_by_hand_under_a_writer(folder: Path) -> None:
    """What every other test rests on: writer, proxy, picture, and QEMU's own commit."""
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with (
        asyncio.timeout(30),
        storage_daemon(folder, chain) as daemon,
        proxy(folder, daemon.qmp) as between,
    ):
        client = QMPClient()
        await client.connect(between.path)
        async with (
            await Nbd.connect(daemon.nbd, "top") as nbd,
            Writer(nbd, picture) as writer,
        ):
            await writer.writes(50)
            with client.listener(("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED")) as events:
                await client.execute("block-commit", {"job-id": "j", "device": "top"})
                await events.get()
                await writer.writes(50)
                await client.execute("job-complete", {"id": "j"})
                await events.get()
            await writer.writes(50)
        assert between.sent == ["qmp_capabilities", "block-commit", "job-complete"]
        await client.disconnect()
        await daemon.quit()
    assert_disk(chain.base, picture)
