"""A commit whose monitor lies: one message is not what QEMU says; it ends, and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import qmpcommit as qc
from tests.fuzz.test_reader import LIMIT, some, to_its_end
from tests.ground.replay import Said, commit, record, replay
from tests.unit.test_hostile import anything


@pytest.fixture(scope="module")
def recorded() -> list[Said]:
    """What a real QEMU says in a commit."""
    with tempfile.TemporaryDirectory(prefix="qc-") as name:
        return asyncio.run(record(Path(name)))


GONE = "gone"
"""What stands for no member at all."""


def commits(folder: Path, said: list[Said], **options: Any) -> str:
    """How a commit ends whose monitor says this."""
    ends: list[str] = []

    async def it() -> None:
        async with replay(folder, said) as fake:
            session = qc.Session.connect(fake.path, timeout=1, command_timeout=1, patience=0.5)
            try:
                async with session as vm:
                    ends.append((await commit(vm, **{"timeout": 1.0, **options})).action)
            except qc.QmpCommitError as error:
                ends.append(type(error).__name__)

    to_its_end(it())
    return ends[0]


def test_what_was_recorded_is_a_pivot_again(folder: Path, recorded: list[Said]) -> None:
    assert commits(folder, recorded, timeout=LIMIT) == "pivot"


@pytest.mark.timeout(600)
@settings(some(150), phases=[Phase.generate])  # one message is small enough
@given(
    place=st.integers(0, 10**6),
    fate=st.sampled_from(["other", "other", "other", "lost", "moved", "twice"]),
    way=st.lists(st.integers(0, 10**6), max_size=6),
    value=st.just(GONE) | anything,
    to=st.integers(0, 10**6),
)
def test_a_commit_whose_monitor_lies(
    folder: Path, recorded: list[Said], place: int, fate: str, way: list[int], value: Any, to: int
) -> None:
    """One message has a member of another value, of another type, or none; an event moves."""
    said = list(recorded)
    place %= len(said)
    if fate == "other":
        message = json.loads(json.dumps(said[place].message))
        tell_otherwise(message, way, value)
        said[place] = said[place]._replace(message=message)
    elif not said[place].command:
        event = said.pop(place) if fate != "twice" else said[place]
        if fate != "lost":
            said.insert(to % len(said), event)
    commits(folder, said)


def tell_otherwise(message: dict[str, Any], way: list[int], value: Any) -> None:
    """Put something else, or nothing, at some place of a message, its id apart."""
    holder: Any = message
    key: Any = "data" if "event" in message else "return" if "return" in message else "error"
    for step in way:
        if not isinstance(holder[key], (dict, list)) or not holder[key]:
            break
        holder = holder[key]
        keys = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = keys[step % len(keys)]
    if value != GONE:
        holder[key] = value
    elif holder is not message:
        del holder[key]
