"""Who hears a monitor: its events, and the ups and downs of its connection."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from qemu.qmp.message import Message

if TYPE_CHECKING:
    from qmpcommit.qmp.events import Event

_JOB_IN = {
    "JOB_STATUS_CHANGE": "id",
    "BLOCK_JOB_READY": "device",
    "BLOCK_JOB_PENDING": "id",
    "BLOCK_JOB_COMPLETED": "device",
    "BLOCK_JOB_CANCELLED": "device",
    "BLOCK_JOB_ERROR": "device",
}
"""Events that are about one job, and the member with its id."""

WAITING_BYTES = 8 * 1024 * 1024
"""Bytes, as they came, of the events that wait unread in a stream; one larger waits alone."""

LOST: Mapping[str, Any] = {"event": "CONNECTION_LOST"}
BACK: Mapping[str, Any] = {"event": "CONNECTION_BACK"}
"""What a stream tells of the connection, between what came over it."""

OnMessage = Callable[[Mapping[str, Any]], None]
OnLink = Callable[[bool], None]


class Subscription:
    """One subscriber; `closed` once it hears no more."""

    __slots__ = ("_all", "closed", "ended", "job", "on_link", "on_message")

    def __init__(
        self,
        everybody: Subscribers,
        on_message: OnMessage,
        on_link: OnLink,
        ended: Callable[[], None],
        job: str | None = None,
    ) -> None:
        self._all = everybody
        self.job = job
        self.on_message = on_message
        self.on_link = on_link
        self.ended = ended
        self.closed = False

    def close(self) -> None:
        """Hear no more; safe to repeat."""
        if not self.closed:
            self.closed = True
            self._all.remove(self)


class Subscribers:
    """All subscribers of one monitor; they outlive its connections."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._wide: list[Subscription] = []
        self._of_job: dict[str, list[Subscription]] = {}

    @property
    def none(self) -> bool:
        """Whether nobody listens."""
        return not self._subscriptions

    def add(
        self,
        on_message: OnMessage,
        on_link: OnLink = lambda up: None,
        ended: Callable[[], None] = lambda: None,
        job: str | None = None,
    ) -> Subscription:
        """Hear raw events, in the reader's own step; `ended` is called when all is over.

        With `job` those that are about another job are not heard: where many jobs run at once,
        each event would cost as many calls as there are jobs.
        """
        subscription = Subscription(self, on_message, on_link, ended, job)
        self._subscriptions.append(subscription)
        self._peers(job).append(subscription)
        return subscription

    @contextmanager
    def while_in(
        self, on_message: OnMessage, on_link: OnLink, job: str | None = None
    ) -> Iterator[Subscription]:
        """`add` for the length of a block."""
        subscription = self.add(on_message, on_link, job=job)
        try:
            yield subscription
        finally:
            subscription.close()

    def remove(self, subscription: Subscription) -> None:
        """Called by `Subscription.close`."""
        self._subscriptions.remove(subscription)
        peers = self._peers(subscription.job)
        peers.remove(subscription)
        if subscription.job is not None and not peers:
            del self._of_job[subscription.job]

    def message(self, message: Mapping[str, Any]) -> None:
        """Tell of an event all whom it may concern."""
        job = _job_of(message)
        if job is None:
            hear = list(self._subscriptions)
        else:
            hear = [*self._wide, *self._of_job.get(job, ())]
        for subscription in hear:
            subscription.on_message(message)

    def _peers(self, job: str | None) -> list[Subscription]:
        return self._wide if job is None else self._of_job.setdefault(job, [])

    def link(self, up: bool) -> None:
        """Tell all that the connection is up or down."""
        for subscription in list(self._subscriptions):
            subscription.on_link(up)

    def end(self) -> None:
        """Nothing more will come."""
        for subscription in list(self._subscriptions):
            subscription.close()
            subscription.ended()


def _job_of(message: Mapping[str, Any]) -> str | None:
    """The one job that an event is about; None where it may concern anybody."""
    member = _JOB_IN.get(message["event"])
    data = message.get("data") if member is not None else None
    job = data.get(member) if isinstance(data, Mapping) else None
    return job if isinstance(job, str) else None


class EventStream:
    """Typed events of a monitor from the moment this was made: ``async for event in stream``.

    A context manager; leaving it ends the subscription. Where the connection is lost and comes
    back, a `ConnectionLost` and a `ConnectionBack` stand between the events (in a stream of some
    names, where ``CONNECTION_LOST`` and ``CONNECTION_BACK`` are among them). At most `limit` events
    wait unread, and `WAITING_BYTES` of them: then the oldest are dropped and counted in `missed`,
    so a flood costs no memory.
    """

    def __init__(self, subscribers: Subscribers, names: frozenset[str], limit: int) -> None:
        self.missed = 0
        self._names = names
        self._limit, self._bytes = limit, 0
        self._waiting: deque[tuple[Mapping[str, Any], int]] = deque()
        self._arrived = asyncio.Event()
        self._lost = False
        self._subscription = subscribers.add(self._put, self._link, ended=self._arrived.set)

    def _link(self, up: bool) -> None:
        if up is self._lost:  # not of the first connection
            self._lost = not up
            self._put(BACK if up else LOST)

    def _put(self, message: Mapping[str, Any]) -> None:
        if not self._names or message["event"] in self._names:
            size = len(bytes(message)) if isinstance(message, Message) else 0
            self._waiting.append((message, size))
            self._bytes += size
            while len(self._waiting) > self._limit or self._too_large:
                self._take()
                self.missed += 1
            self._arrived.set()

    @property
    def _too_large(self) -> bool:
        return self._bytes > WAITING_BYTES and len(self._waiting) > 1

    def _take(self) -> Mapping[str, Any]:
        message, size = self._waiting.popleft()
        self._bytes -= size
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription; an iteration stops when it has read what waits."""
        self._subscription.close()
        self._arrived.set()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        from qmpcommit.qmp.events import MARKERS, parse_event

        message = await self._next()
        if message is LOST or message is BACK:
            return MARKERS[message["event"]]()
        return parse_event(message)

    async def raw(self) -> AsyncIterator[Mapping[str, Any]]:
        """The data of each event as it came, without building a model of it."""
        while True:
            try:
                message = await self._next()
            except StopAsyncIteration:
                return
            if message is not LOST and message is not BACK:
                yield message.get("data") or {}

    async def _next(self) -> Mapping[str, Any]:
        while not self._waiting:
            if self._subscription.closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._take()
