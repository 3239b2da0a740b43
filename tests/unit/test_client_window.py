"""How the client renews a window's lease while its daemon has troubles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from qmpcommit.client.host import Client
from qmpcommit.client.http import Reply
from qmpcommit.client.window import _Held
from qmpcommit.daemon.journal import JournalFull
from qmpcommit.errors import DaemonLost, JobConflict, QmpCommitError, WindowNotFound


def refusal(status: int, error: QmpCommitError) -> Reply:
    body = {"type": f"urn:qmpcommit:{type(error).__name__}", "error": error.to_dict()}
    return Reply(status, {}, json.dumps(body).encode())


@pytest.mark.parametrize("closed", [refusal(409, JobConflict("it is done")),
                                    refusal(404, WindowNotFound("it is forgotten"))])  # fmt: skip
async def test_a_lease_is_renewed_until_the_window_is_closed(closed: Reply) -> None:
    answers: list[Reply | Exception] = [
        Reply(200, {}, b"{}"),
        refusal(503, JournalFull("no room")),
        DaemonLost("it is away"),
        Reply(502, {}, b"what is this"),
        Reply(200, {}, b"{}"),
        closed,
    ]

    class Answering(Client):
        async def ask(
            self, method: str, path: str, body: Mapping[str, Any] | None = None, **more: Any
        ) -> Reply:
            assert (method, body) == ("POST", {"seconds": 0.03})
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    async with asyncio.timeout(30):
        await _Held(Answering("/d.sock"), "web1")._renew(0.03)
    assert answers == []
