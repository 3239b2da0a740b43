"""Events that nobody reads: what the daemon keeps of them is bounded, and in the journal."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from qmpcommit.daemon import feed as feed_module
from qmpcommit.daemon.api import create_app
from qmpcommit.daemon.config import parse
from qmpcommit.daemon.connections import Doors, PeerProtocol
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.feed import Feed
from qmpcommit.daemon.journal import Event, Journal, Statement
from qmpcommit.daemon.rights import ASKER, Asker, Grant
from tests.daemon.daemons import Daemon

BATCH = 1000
NOISE = 1 << 20
"""Bytes that may be in use more or less for any other reason."""


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Engine]:
    """The daemon's API in this process, at `Daemon.socket`."""
    raw = f'state = "{folder}"\n[listen]\nsocket = "{folder}/d.sock"\n'
    journal = await Journal(folder / "journal.db").open()
    config = parse(raw.encode(), "c")
    engine = Engine(config, journal)
    protocol: Any = partial(PeerProtocol, doors=Doors(config.limits, 1024))
    settings = uvicorn.Config(
        create_app(engine), uds=f"{folder}/d.sock", http=protocol, ws="none", lifespan="off",
        log_config=None, access_log=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(settings)
    task = asyncio.create_task(server._serve())
    try:
        async with asyncio.timeout(30):
            while not server.started:
                await asyncio.sleep(0.001)
        yield engine
    finally:
        await engine.stop()
        server.should_exit = True
        await task


async def happen(engine: Engine, count: int) -> None:
    """So many events are journaled, and told."""
    happened = Event(0, time.time(), "vm", "web1", None, json.dumps({"name": "web1", "up": True}))
    for _ in range(count // BATCH):
        await engine.journal.write(events=[happened] * BATCH)


async def ids_of(reader: asyncio.StreamReader) -> list[int]:
    """Those of all events up to the end of the stream."""
    ids = []
    while (line := await reader.readline()) not in (b"", b"0\r\n"):
        if line.startswith(b"id: "):
            ids.append(int(line[4:]))
    return ids


async def follow(
    folder: Path, after: str = ""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(Daemon(folder, "").socket, limit=4096)
    writer.write(f"GET /v1/events{after} HTTP/1.1\r\nHost: d\r\n\r\n".encode())
    await reader.readuntil(b"id: ")
    return reader, writer


async def test_a_follower_that_never_reads_is_let_go_and_resumes_from_the_journal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_BEHIND", 2000)
    async with serving(folder) as engine:
        reader, writer = await follow(folder)
        await reader.readline()
        await happen(engine, 10 * BATCH)  # more than the sockets and the queue take
        assert not engine.followers
        gc.collect()
        tracemalloc.start()
        try:
            await happen(engine, 20 * BATCH)
            gc.collect()
            kept = tracemalloc.get_traced_memory()[0]
            await happen(engine, 80 * BATCH)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - kept < NOISE
        finally:
            tracemalloc.stop()
        seen = await ids_of(reader)  # and now it reads after all
        writer.close()
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) < 10 * BATCH
        reader, writer = await follow(folder, f"?after={len(seen)}")
        await reader.readline()
        await reader.readuntil(b"id: ")
        assert int(await reader.readline()) == len(seen) + 1
        writer.close()


async def test_of_what_a_follower_has_not_read_nothing_is_kept_for_it(folder: Path) -> None:
    async with serving(folder) as engine:
        made = feed_module.Feed(engine, None)
        event = Event(0, 0.0, "vm", "web1", None, "{}")
        for number in range(feed_module._BEHIND + 5):
            engine._tell(event._replace(id=number + 1))
        assert made._queue.qsize() == 1
        told = [text async for text in made]
        assert [text.split(b"\n")[0] for text in told] == [b"retry: 2000", b"id: 1"]


async def test_a_journal_that_is_closed_ends_the_stream(folder: Path) -> None:
    """The daemon stops while a follower reads what was; it resumes with the next one."""
    journal = await Journal(folder / "journal.db").open()
    engine = Engine(parse(f'state = "{folder}"'.encode(), "c"), journal)
    await happen(engine, BATCH)
    feed = aiter(feed_module.Feed(engine, 0))
    heard = [await anext(feed), await anext(feed)]
    assert heard[1].startswith(b"id: 1\n")
    await engine.stop()
    assert len(engine.followers) == 1
    rest = [text async for text in feed]
    assert rest, "a page was read before"
    assert len(rest) < BATCH - 1
    assert engine.followers == set()


async def test_a_damaged_event_keeps_no_other_from_being_told(folder: Path) -> None:
    journal = await Journal(folder / "journal.db").open()
    raw = f'state = "{folder}"\n[listen]\nsocket = "{folder}/d.sock"\n'
    engine = Engine(parse(raw.encode(), "c"), journal)
    try:
        await happen(engine, BATCH)
        broken = "UPDATE events SET data = CAST(x'ff7b22' AS TEXT), vm = CAST(x'f0' AS TEXT)"
        await journal.write(Statement(f"{broken} WHERE id = 2"))
        feed = Feed(engine, 0)
        told = []
        async for text in feed:
            told.append(text)
            if len(told) == 4:  # the first one is no event
                break
        feed.close()
        assert [text.split(b"\n")[0] for text in told[1:]] == [b"id: 1", b"id: 2", b"id: 3"]
        assert b"unreadable" in told[2]
    finally:
        await journal.close()


async def blocks_of(feed: Feed, count: int) -> list[dict[str, str]]:
    """So many blocks of a stream, each by the names of its lines."""
    found = []
    async for text in feed:
        lines = text.decode().splitlines()
        assert lines.pop() == ""
        found.append(dict(line.split(": ", 1) for line in lines))
        if len(found) == count:
            break
    feed.close()
    return found


async def test_the_first_block_is_an_event_that_every_client_reads(folder: Path) -> None:
    """One without data is no JSON to some clients, and keeps others from its id."""
    async with serving(folder) as engine:
        await happen(engine, BATCH)
        for after, begin in ((None, BATCH), (7, 7)):
            (first,) = await blocks_of(Feed(engine, after), 1)
            assert int(first["retry"]) > 0
            assert (first["event"], first["id"]) == ("following", str(begin))
            assert json.loads(first["data"])["after"] == begin


async def test_events_are_chosen_by_kind_and_vm_and_shown_to_who_may_see_them(
    folder: Path,
) -> None:
    async with serving(folder) as engine:
        told = [("vm", "web1"), ("window", "web1"), ("vm", "db1"), ("window", "web2,db1")]
        made = [Event(0, 0.0, kind, vm, None, json.dumps({"vm": vm})) for kind, vm in told]
        await engine.journal.write(events=made)

        async def chosen(query: str) -> list[int]:
            reader, writer = await follow(folder, f"?after=0{query}")
            await reader.readline()
            vm = Event(0, 0.0, "vm", "web1,web2,db1", None, "{}")
            await engine.journal.write(events=[vm, vm._replace(kind="window")])
            last = (await engine.journal.read("SELECT max(id) AS id FROM events"))[0]["id"]
            found = [0]
            while found[-1] < last - 1:
                await reader.readuntil(b"id: ")
                found.append(int(await reader.readline()))
            writer.close()
            return [number for number in found if 0 < number <= len(told)]

        assert await chosen("") == [1, 2, 3, 4]
        assert await chosen("&kind=window") == [2, 4]
        assert await chosen("&vm=db1") == [3, 4]
        assert await chosen("&vm=db1&vm=web1&kind=vm") == [1, 3]
        assert (await Daemon(folder, "").get("/v1/events?kind=windows")).status == 422
        ASKER.set(Asker("user 7", 7, "", (Grant("read", ("web*",)),)))
        seen = await blocks_of(Feed(engine, 0, ["db1", "web1"]), 3)
        assert [each["id"] for each in seen] == ["0", "1", "2"]
