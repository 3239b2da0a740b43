"""Server-sent events: every change of state, from the journal on and then live."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Collection
from typing import Literal

from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.journal import Event, JournalError
from qmpcommit.daemon.rights import ASKER
from qmpcommit.wire.values import moment

HEARTBEAT = 15.0
"""Seconds of silence after which a comment tells that the stream is alive."""

AGAIN = 2000
"""Milliseconds after which a client that was cut off is to come back."""

BEGINNING = "following"
"""The kind of the first event, which tells where the stream begins and is of no VM."""

EventKind = Literal["commit", "group", "window", "cycle", "flatten", "vm"]

_PAGE = 500
_BEHIND = 10_000


class Feed:
    """One follower; its place is taken when it is made, so that nothing falls between.

    It hears of the VMs, the commit and the kinds that it names, and of all where it names none.
    """

    def __init__(
        self,
        engine: Engine,
        after: int | None,
        vms: Collection[str] = (),
        commit: str | None = None,
        kinds: Collection[EventKind] = (),
    ) -> None:
        self._asker = ASKER.get()
        self._engine, self._after = engine, after
        self._vms, self._commit, self._kinds = frozenset(vms), commit, frozenset(kinds)
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
            # Who is cut off before the first change resumes from here all the same; a block
            # without data is to some clients no JSON, and to others no event and no id.
            begin = self._begin if last is None else last
            told = json.dumps({"after": begin})
            first = Event(begin, time.time(), BEGINNING, "", None, told)
            yield f"retry: {AGAIN}\n".encode() + render(first)
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
        if self._vms and self._vms.isdisjoint(event.vm.split(",")):
            return False
        if self._kinds and event.kind not in self._kinds:
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
    when = moment(event.at)
    time = {} if when is None else {"time": when.isoformat().replace("+00:00", "Z")}
    data = json.dumps({"at": event.at, **time, **told})
    return f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n".encode()
