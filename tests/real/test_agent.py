"""What no real guest agent can be made to do: lines lost, late or senseless, at a chosen moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.qmp.agent import Agent
from tests.ground.images import make_chain
from tests.ground.machines import machine

SENTINEL = b"\xff"


class FakeAgent:
    """Answers as the agent does; `instead` may answer otherwise (None: hang up, b"": silence)."""

    def __init__(self) -> None:
        self.frozen = 0
        self.asked: list[str] = []
        self.connections = 0
        self.instead: dict[str, list[bytes | None]] = {}
        self.before_sync = b""
        self.heard: Callable[[str], object] = lambda command: None
        self.path = ""

    def _answer(self, command: str, arguments: dict[str, Any]) -> bytes:
        value: Any = {}
        if command == "guest-sync-delimited":
            value = arguments["id"]
        elif command == "guest-fsfreeze-status":
            value = "frozen" if self.frozen else "thawed"
        elif command == "guest-fsfreeze-freeze":
            self.frozen = value = 2
        elif command == "guest-fsfreeze-thaw":
            value, self.frozen = self.frozen, 0
        return json.dumps({"return": value}).encode() + b"\n"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while line := await reader.readline():
                request = json.loads(line.lstrip(SENTINEL))
                command = request["execute"]
                self.asked.append(command)
                self.heard(command)
                answer: bytes | None = self._answer(command, request.get("arguments", {}))
                if self.instead.get(command):
                    answer = self.instead[command].pop(0)
                if answer is None:
                    break
                if command == "guest-sync-delimited":
                    answer = self.before_sync + SENTINEL + answer
                writer.write(answer)
        finally:
            writer.close()


@asynccontextmanager
async def fake_agent(folder: Path) -> AsyncIterator[FakeAgent]:
    fake = FakeAgent()
    fake.path = str(folder / "agent")
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(fake.serve(reader, writer))
        tasks.add(task)

    server = await asyncio.start_unix_server(accept, fake.path)
    try:
        yield fake
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


@asynccontextmanager
async def session(folder: Path) -> AsyncIterator[tuple[qc.Session, FakeAgent]]:
    async with (
        machine(folder, make_chain(folder)) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
        fake_agent(folder) as fake,
    ):
        yield vm, fake


async def test_what_a_former_client_did_not_read_is_dropped(folder: Path) -> None:
    async with fake_agent(folder) as fake:
        stale = b'{"return": 1}\n{"ret\n\n[]\n'
        stale += SENTINEL + b'{"return": 7}\n' + SENTINEL + b"[]\n"
        fake.before_sync = stale + SENTINEL + b'urn": 3}'
        async with Agent(fake.path) as agent:
            assert await agent.status() == "thawed"
            assert await agent.freeze() == 2
            assert await agent.thaw() == 2


async def test_who_does_not_answer_is_told_with_what_to_look_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none_left(**more: Any) -> Any:
        raise OSError("no more of these")

    with pytest.raises(qc.QuiesceFailed, match=r"web1.*No such file.*guest_agent\.0") as caught:
        async with Agent(folder / "nobody", vm="web1"):
            pytest.fail("it is open")
    assert (caught.value.vm, caught.value.agent) == ("web1", str(folder / "nobody"))
    async with fake_agent(folder) as fake:
        fake.instead["guest-sync-delimited"] = [b""]
        with pytest.raises(qc.QuiesceFailed, match=r"within 0\.1 s: no qemu-ga runs"):
            async with Agent(fake.path, timeout=0.1):
                pytest.fail("it is open")
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "open_connection", none_left)
            with pytest.raises(qc.QuiesceFailed, match="no more of these"):
                async with Agent(fake.path):
                    pytest.fail("it is open")
        async with Agent(fake.path) as agent:
            assert await agent.status() == "thawed"


@pytest.mark.parametrize(
    "answer", [b"\x00\x01\n", b"[1]\n", b'{"return"\n', b'{"event": "x"}\n', b"[" * 5000 + b"\n"]
)
async def test_what_is_no_answer_is_told_as_such(answer: bytes, folder: Path) -> None:
    async with fake_agent(folder) as fake:
        fake.instead["guest-fsfreeze-status"] = [answer]
        async with Agent(fake.path, vm="web1") as agent:
            with pytest.raises(qc.QuiesceFailed, match=r"web1.*can't be understood"):
                await agent.status()
            with pytest.raises(qc.QuiesceFailed, match="connection is closed"):
                await agent.status()


async def test_an_answer_that_is_no_number_is_told_as_such(folder: Path) -> None:
    async with fake_agent(folder) as fake:
        fake.instead["guest-fsfreeze-freeze"] = [b'{"return": "two"}\n']
        async with Agent(fake.path, vm="web1") as agent:
            with pytest.raises(qc.QuiesceFailed, match="with a str instead of a number"):
                await agent.freeze()
            assert await agent.status() == "frozen"


async def test_a_refusal_carries_the_agents_own_text(folder: Path) -> None:
    async with fake_agent(folder) as fake:
        error = {"error": {"class": "CommandNotFound", "desc": "it has been disabled"}}
        fake.instead["guest-fsfreeze-freeze"] = [json.dumps(error).encode() + b"\n"]
        async with Agent(fake.path) as agent:
            with pytest.raises(qc.QuiesceFailed) as caught:
                await agent.freeze()
            assert caught.value.desc == "it has been disabled"
            assert await agent.status() == "frozen"  # the line is still good


async def test_a_thaw_whose_line_breaks_is_sent_again_over_a_new_one(folder: Path) -> None:
    async with session(folder) as (vm, fake):
        fake.instead["guest-fsfreeze-thaw"] = [None, b"nonsense\n"]
        async with qc.freeze(vm, "agent", agents=fake.path) as quiet:
            assert fake.frozen
        assert not fake.frozen
        assert quiet.seconds is not None
        assert fake.asked.count("guest-fsfreeze-thaw") == 3
        assert fake.connections == 4


async def test_a_thaw_that_froze_again_is_not_believed(folder: Path) -> None:
    async with session(folder) as (vm, fake):
        async with qc.freeze(vm, "agent", agents=fake.path):
            fake.instead["guest-fsfreeze-status"] = [b'{"return": "frozen"}\n']
        assert fake.asked.count("guest-fsfreeze-thaw") == 2


async def test_what_somebody_else_has_frozen_is_left_alone(folder: Path) -> None:
    async with session(folder) as (vm, fake):
        fake.frozen = 1
        with pytest.raises(qc.QuiesceFailed, match="frozen already, by somebody") as caught:
            async with qc.freeze(vm, "agent", agents=fake.path):
                pytest.fail("it is quiesced")
        assert caught.value.frozen is None
        assert fake.frozen == 1
        assert "guest-fsfreeze-thaw" not in fake.asked


LOST: dict[str, Callable[[FakeAgent], None]] = {
    "hangs up": lambda fake: fake.instead.update({"guest-fsfreeze-freeze": [None]}),
    "is silent": lambda fake: fake.instead.update({"guest-fsfreeze-freeze": [b""]}),
    "talks nonsense": lambda fake: fake.instead.update({"guest-fsfreeze-freeze": [b"?\n"]}),
}


@pytest.mark.parametrize("how", LOST)
async def test_a_freeze_whose_answer_is_lost_is_thawed(how: str, folder: Path) -> None:
    async with session(folder) as (vm, fake):
        LOST[how](fake)
        with pytest.raises(qc.QuiesceFailed):
            async with qc.freeze(vm, "agent", agents=fake.path, limit=1):
                raise AssertionError("not frozen, and begun nevertheless")
        assert "guest-fsfreeze-freeze" in fake.asked
        assert not fake.frozen


async def test_a_guest_that_can_not_be_thawed_is_told_with_what_to_do(folder: Path) -> None:
    async with session(folder) as (vm, fake):
        fake.frozen = 1
        fake.instead["guest-fsfreeze-thaw"] = [None] * 1000
        with pytest.raises(qc.QuiesceFailed, match="send guest-fsfreeze-thaw") as caught:
            await qc.thaw(vm, "agent", fake.path, patience=0.3)
        assert caught.value.frozen is True
        assert fake.asked.count("guest-fsfreeze-thaw") > 1


async def test_a_cancelled_thaw_is_brought_to_its_end(folder: Path) -> None:
    async with session(folder) as (vm, fake):
        thawing = asyncio.Event()

        class Telling:
            async def note(self, step: str, **facts: Any) -> None:
                if step == "thaw":
                    thawing.set()
                    await asyncio.sleep(0)

        async def work() -> None:
            async with qc.freeze(vm, "agent", agents=fake.path, ledger=Telling()):
                pass

        fake.instead["guest-fsfreeze-thaw"] = [None]
        task = asyncio.create_task(work())
        await thawing.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert not fake.frozen


async def test_a_note_that_hangs_does_not_keep_the_guest_frozen(folder: Path) -> None:
    class Hanging:
        async def note(self, step: str, **facts: Any) -> None:
            if step == "thaw":
                await asyncio.Event().wait()

    async with session(folder) as (vm, fake):
        async with qc.freeze(vm, "agent", agents=fake.path, ledger=Hanging()):
            assert fake.frozen
        assert not fake.frozen
