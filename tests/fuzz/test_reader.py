"""A session whose monitor says anything: it ends, with an error of ours, and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import qmpcommit as qc
from qmpcommit.qmp.reading import REPLY
from tests.ground.fake_monitor import GREETING
from tests.unit.test_hostile import anything

EXAMPLES = int(os.environ.get("QMPCOMMIT_TEST_EXAMPLES", "0"))
LIMIT = 60.0
"""Seconds by which anything has ended; a generous multiple of every deadline that is given."""

GREETS = json.dumps(GREETING).encode() + b"\r\n"


def some(in_ci: int) -> settings:
    """So many examples, always the same, unless more are asked for."""
    return settings(
        max_examples=EXAMPLES or in_ci,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def to_its_end(deed: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own, in time, with no task left and no complaint of asyncio's."""

    async def all_of_it() -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
        async with asyncio.timeout(LIMIT):
            await deed
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.001)  # what was cancelled has its last step
        assert not complaints

    asyncio.run(all_of_it())


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(folder: Path, serve: Serve) -> AsyncIterator[str]:
    """Something that listens, on one connection after the other; its path."""
    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(OSError, asyncio.CancelledError):
                await serve(reader, writer)
        finally:
            tasks.discard(task)
            writer.transport.abort()

    path = str(folder / "any")
    listening = await asyncio.start_unix_server(one, path)
    try:
        yield path
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(set(tasks))
        await listening.wait_closed()
        Path(path).unlink(missing_ok=True)


async def asks(path: str, *, patience: float = 0.0) -> Any:
    """One session, one question."""
    session = qc.Session.connect(path, timeout=0.5, command_timeout=0.5, patience=patience)
    async with session as vm:
        with vm.events("STOP"):
            return await vm.execute("query-status")


# -- bytes ----------------------------------------------------------------------------------------


def conversation(writes: Callable[[bytes], Awaitable[None]]) -> Serve:
    """A monitor that is a right one, if `writes` writes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting = b""
        await writes(GREETS)
        while data := await reader.read(4096):
            waiting += data
            with suppress(ValueError):
                asked = json.loads(waiting)
                waiting = b""
                await writes(reply(asked))

    return serve


def reply(asked: dict[str, Any]) -> bytes:
    """To qmp_capabilities, which may have no id, and to a question."""
    named = {"id": asked["id"]} if "id" in asked else {}
    return json.dumps({"return": {}, **named}).encode() + b"\r\n"


def whole() -> int:
    """Bytes that a right conversation has."""
    return len(GREETS) + len(reply({})) + len(reply({"id": "__qmp#00000"}))


async def test_a_monitor_that_closes_after_any_byte(folder: Path) -> None:
    ends = []
    for length in range(whole()):
        left = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal left
            left = length  # noqa: B023

            async def writes(data: bytes) -> None:
                nonlocal left
                part, left = data[:left], left - len(data[:left])
                writer.write(part)
                await writer.drain()
                if len(part) < len(data):
                    raise ConnectionAbortedError

            await conversation(writes)(reader, writer)

        async with asyncio.timeout(LIMIT), server(folder, serve) as path:
            try:
                ends.append(type(await asks(path)))
            except qc.QmpCommitError as error:
                ends.append(type(error))
    assert set(ends[: len(GREETS)]) == {qc.ConnectError}
    assert set(ends[len(GREETS) :]) <= {qc.ConnectError, qc.MonitorLost, dict}
    assert qc.MonitorLost in ends


async def test_messages_that_come_in_two_parts_at_any_byte(folder: Path) -> None:
    for cut in range(1, whole()):
        sent = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            sent = 0

            async def writes(data: bytes) -> None:
                nonlocal sent
                at = min(max(cut - sent, 0), len(data))  # noqa: B023
                sent += len(data)
                for part in (data[:at], data[at:]):
                    writer.write(part)
                    await writer.drain()
                    for _ in range(5):
                        await asyncio.sleep(0)

            await conversation(writes)(reader, writer)

        async with asyncio.timeout(LIMIT), server(folder, serve) as path:
            session = qc.Session.connect(path, timeout=LIMIT, command_timeout=LIMIT)
            async with session as vm:
                assert await vm.execute("query-status") == {}


@pytest.mark.parametrize("greets", [False, True], ids=["greeting", "reply"])
async def test_a_line_that_never_ends_ends_and_is_not_kept(greets: bool, folder: Path) -> None:
    """A monitor that has no end is left at a limit, not when memory is full."""
    sent: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent.append(0)
        writer.write(b'{"QMP": "')
        while True:
            writer.write(b"x" * (1 << 20))
            await writer.drain()
            sent[-1] += 1 << 20

    async def greeted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETS)
        asked = json.loads(await reader.read(4096))
        writer.write(reply(asked))
        await reader.read(4096)
        await serve(reader, writer)

    async with asyncio.timeout(LIMIT), server(folder, greeted if greets else serve) as path:
        session = qc.Session.connect(path, timeout=LIMIT, command_timeout=LIMIT, patience=0)
        with pytest.raises(qc.MonitorLost if greets else qc.ConnectError):
            async with session as vm:
                await vm.execute("query-status")
    assert sent
    assert max(sent) <= 2 * REPLY + (16 << 20)


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.integers(1, 5000).map(lambda depth: b"[" * depth + b"\n"),
    st.integers(1, 5000).map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth + b"\n"),
    anything.map(lambda value: json.dumps(value).encode() + b"\r\n"),
    st.fixed_dictionaries(
        {},
        optional={"return": anything, "error": anything, "event": anything,
                  "id": st.just("__qmp#00000") | anything,
                  "data": anything, "timestamp": anything, "QMP": anything},
    ).map(lambda message: json.dumps(message).encode() + b"\r\n"),
    st.integers(1, 40).map(lambda size: b'{"event": "X", "a": "' + b"x" * (size << 14) + b'"}\n'),
)  # fmt: skip
"""Bytes, nesting, JSON of any kind, messages of any kind, long lines."""


def test_garbage_between_messages(folder: Path) -> None:
    """Before or after the greeting, the answer to qmp_capabilities, or that to a question."""
    ends: set[type] = set()

    @some(150)
    @given(place=st.integers(0, 2), garbage=st.lists(GARBAGE, min_size=1, max_size=3),
           first=st.booleans())  # fmt: skip
    @example(place=2, garbage=[b'{"return": 1, "id": "nobody"}\r\n'] * 3, first=True)
    @example(place=2, garbage=[b'{"error": 7, "id": null}\r\n'], first=True)
    @example(place=2, garbage=[b'{"error": {}, "id": "__qmp#00000"}\r\n'], first=True)
    @example(place=2, garbage=[json.dumps({"event": {}}).encode() + b"\r\n"], first=True)
    def somewhere(place: int, garbage: list[bytes], first: bool) -> None:
        ends.add(ended_by(folder, place, garbage, first))

    somewhere()
    assert ends >= {qc.ConnectError, qc.MonitorLost, dict}


def ended_by(folder: Path, place: int, garbage: list[bytes], first: bool) -> type:
    """What comes of a question, where the message at that place has garbage beside it."""
    ends: list[type] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        places = count()

        async def writes(data: bytes) -> None:
            here = garbage if next(places) == place else []
            for part in (*here, data) if first else (data, *here):
                writer.write(part)
            await writer.drain()

        await conversation(writes)(reader, writer)

    async def it() -> None:
        async with server(folder, serve) as path:
            try:
                ends.append(type(await asks(path)))
            except qc.QmpCommitError as error:
                ends.append(type(error))

    to_its_end(it())
    return ends[0]
