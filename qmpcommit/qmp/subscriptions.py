"""Who hears a monitor: its events, and the ups and downs of its connection."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from qmpcommit.qmp.events import Event

OnMessage = Callable[[Mapping[str, Any]], None]
OnLink = Callable[[bool], None]


class Subscription:
    """One subscriber; `closed` once it hears no more."""

    __slots__ = ("_all", "closed", "ended", "on_link", "on_message")

    def __init__(
        self,
        everybody: Subscribers,
        on_message: OnMessage,
        on_link: OnLink,
        ended: Callable[[], None],
    ) -> None:
        self._all = everybody
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

    @property
    def none(self) -> bool:
        """Whether nobody listens."""
        return not self._subscriptions

    def add(
        self,
        on_message: OnMessage,
        on_link: OnLink = lambda up: None,
        ended: Callable[[], None] = lambda: None,
    ) -> Subscription:
        """Hear raw events, in the reader's own step; `ended` is called when all is over."""
        subscription = Subscription(self, on_message, on_link, ended)
        self._subscriptions.append(subscription)
        return subscription

    @contextmanager
    def while_in(self, on_message: OnMessage, on_link: OnLink) -> Iterator[Subscription]:
        """`add` for the length of a block."""
        subscription = self.add(on_message, on_link)
        try:
            yield subscription
        finally:
            subscription.close()

    def remove(self, subscription: Subscription) -> None:
        """Called by `Subscription.close`."""
        self._subscriptions.remove(subscription)

    def message(self, message: Mapping[str, Any]) -> None:
        """Tell all of an event."""
        for subscription in list(self._subscriptions):
            subscription.on_message(message)

    def link(self, up: bool) -> None:
        """Tell all that the connection is up or down."""
        for subscription in list(self._subscriptions):
            subscription.on_link(up)

    def end(self) -> None:
        """Nothing more will come."""
        for subscription in list(self._subscriptions):
            subscription.close()
            subscription.ended()


class EventStream:
    """Typed events of a monitor from the moment this was made: ``async for event in stream``.

    A context manager; leaving it ends the subscription. At most `limit` events wait unread:
    then the oldest are dropped and counted in `missed`, so a flood costs no memory.
    """

    def __init__(self, subscribers: Subscribers, names: frozenset[str], limit: int) -> None:
        self.missed = 0
        self._names = names
        self._waiting: deque[Mapping[str, Any]] = deque(maxlen=limit)
        self._arrived = asyncio.Event()
        self._subscription = subscribers.add(self._put, ended=self._arrived.set)

    def _put(self, message: Mapping[str, Any]) -> None:
        if not self._names or message["event"] in self._names:
            self.missed += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(message)
            self._arrived.set()

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
        from qmpcommit.qmp.events import parse_event

        return parse_event(await self._next())

    async def raw(self) -> AsyncIterator[Mapping[str, Any]]:
        """The data of each event as it came, without building a model of it."""
        while True:
            try:
                message = await self._next()
            except StopAsyncIteration:
                return
            yield message.get("data") or {}

    async def _next(self) -> Mapping[str, Any]:
        while not self._waiting:
            if self._subscription.closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.popleft()
