"""Server-sent events: every change of state, from the journal on and then live."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.journal import Event, JournalError
from qmpcommit.daemon.rights import ASKER

HEARTBEAT = 15.0
"""Seconds of silence after which a comment tells that the stream is alive."""

_PAGE = 500
_BEHIND = 10_000


class Feed:
    """One follower; its place is taken when it is made, so that nothing falls between."""

    def __init__(self, engine: Engine, after: int | None, vm: str | None, commit: str | None):
        self._asker = ASKER.get()
        self._engine, self._after, self._vm, self._commit = engine, after, vm, commit
        self._queue: asyncio.Queue[Event] = asyncio.Queue(_BEHIND)
        self._lost = False
        self._begin = engine.told
        if after is not None and after > self._begin:
            self._after = 0  # of a journal that was set aside: all of this one is news
        engine.followers.add(self._hear)

    def close(self) -> None:
        """Follow no longer; safe to repeat."""
        self._engine.followers.discard(self._hear)

    def _hear(self, event: Event) -> None:
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self._lost = True  # the stream ends; the client resumes from its last event
            self.close()
            oldest = self._queue.get_nowait()
            while not self._queue.empty():  # for a client that may never read them
                self._queue.get_nowait()
            self._queue.put_nowait(oldest)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The stream's text."""
        try:
            last = self._after
            # Who is cut off before the first event resumes from here all the same.
            yield f": qmpcommit\nid: {self._begin if last is None else last}\n\n".encode()
            if last is not None:
                async for event in self._past(last):
                    last = event.id
                    if self._wanted(event):
                        yield render(event)
            while not self._engine.stopping and not (self._lost and self._queue.empty()):
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        event = await self._queue.get()
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                if (last is None or event.id > last) and self._wanted(event):
                    yield render(event)
        except JournalError:
            pass  # it was closed, for the daemon stops; whoever follows resumes with the next one
        finally:
            self.close()

    async def _past(self, after: int) -> AsyncIterator[Event]:
        while True:
            sql = "SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?"
            rows = await self._engine.journal.read(sql, after, _PAGE)
            for row in rows:
                yield Event(**row)
            if len(rows) < _PAGE:
                return
            after = rows[-1]["id"]

    def _wanted(self, event: Event) -> bool:
        if self._asker is not None and not self._asker.may("read", event.vm.split(",")):
            return False
        if self._vm is not None and self._vm not in event.vm.split(","):
            return False
        return self._commit is None or event.commit_id == self._commit


def render(event: Event) -> bytes:
    """One event of the stream."""
    try:
        told = dict(json.loads(event.data))
    except (
        TypeError,
        ValueError,
    ):  # its row is damaged; the others are told all the same
        told = {"unreadable": event.data}
    data = json.dumps({"at": event.at, **told})
    return f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n".encode()
