"""A guest agent that says anything, as a guest may: our own errors, in time, and nothing kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import qmpcommit as qc
from qmpcommit.qmp.agent import _READ_LIMIT, Agent
from tests.fuzz.test_reader import LIMIT, server, some, to_its_end
from tests.unit.test_hostile import anything

SENTINEL = b"\xff"
line = st.one_of(
    anything.map(lambda value: json.dumps({"return": value}).encode() + b"\n"),
    anything.map(lambda value: json.dumps({"error": value}).encode() + b"\n"),
    anything.map(lambda value: json.dumps({"error": {"desc": value}}).encode() + b"\n"),
    anything.map(lambda value: json.dumps(value).encode() + b"\n"),
    st.integers(1, 5000).map(lambda depth: b'{"return":' + b"[" * depth + b"]" * depth + b"}\n"),
    st.integers(1, 5000).map(lambda depth: b'{"error":' + b"[" * depth + b"]" * depth + b"}\n"),
    st.integers(1, 5000).map(lambda size: b'{"return": ' + b"9" * size + b"}\n"),
    st.integers(1, 5000).map(lambda size: b'{"error": {"desc": "' + b"x" * size + b'"}}\n'),
    st.binary(max_size=100),
)

DEEDS: list[Callable[[Agent], Awaitable[Any]]] = [
    lambda agent: agent.freeze(),
    lambda agent: agent.status(),
    lambda agent: agent.thaw(),
]


@some(200)
@given(before=st.lists(line, max_size=2), replies=st.lists(line, max_size=3))
@example(before=[], replies=[b'{"return": "all"}\n'])
@example(before=[], replies=[b'{"return": {}}\n', b'{"return": true}\n', b'{"return": null}\n'])
def test_an_agent_that_says_anything(
    folder: Path, before: list[bytes], replies: list[bytes]
) -> None:
    left = list(replies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.readline():
            mark = json.loads(asked.lstrip(SENTINEL)).get("arguments", {}).get("id")
            if mark is not None:
                for each in before:
                    writer.write(each)
                writer.write(SENTINEL + json.dumps({"return": mark}).encode() + b"\n")
            elif left:
                writer.write(left.pop(0))
            else:
                return  # it hangs up: to wait for silence would take most of the time
            await writer.drain()

    async def it() -> None:
        async with server(folder, serve) as path:
            for deed in DEEDS:
                try:
                    async with Agent(path, timeout=0.2) as agent:
                        assert isinstance(await deed(agent), (int, str))
                except qc.QuiesceFailed as error:
                    assert len(error.message) < 2000

    to_its_end(it())


@pytest.mark.parametrize("greets", [False, True], ids=["synchronizing", "answering"])
@pytest.mark.parametrize(
    "said", [b"x" * (1 << 16), b'{"return": 1}\n' * 5000], ids=["line", "lines"]
)
async def test_an_agent_that_never_stops_is_left_and_not_kept(
    said: bytes, greets: bool, folder: Path
) -> None:
    sent: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = json.loads((await reader.readline()).lstrip(SENTINEL))
        if greets:
            mark = json.dumps({"return": asked["arguments"]["id"]}).encode()
            writer.write(SENTINEL + mark + b"\n")
            await reader.readline()
        sent.append(0)
        while True:
            writer.write(said)
            await writer.drain()
            sent[-1] += len(said)

    async with asyncio.timeout(LIMIT), server(folder, serve) as path:
        with suppress(qc.QuiesceFailed):
            async with Agent(path, timeout=5) as agent:
                assert await agent.thaw() == 1
                assert b"\n" in said
    assert sent
    if b"\n" not in said:
        assert max(sent) <= 2 * _READ_LIMIT + (8 << 20)
