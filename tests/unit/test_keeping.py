"""A promise whose VM is away: when it is waited for, and for which process."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qmpcommit.daemon.config import Config
from qmpcommit.daemon.keeping import Keeper
from qmpcommit.errors import MonitorLost
from qmpcommit.log import Log
from qmpcommit.qmp.process import process_identity

OURS = process_identity(os.getpid())
"""The identity of a QEMU that is alive."""


class Answering:
    """A VM at whose socket one process after another answers."""

    def __init__(self, *identities: str) -> None:
        self.connect = "keep"
        self.up = asyncio.Event()
        self.up.set()
        self.left = list(identities)

    @property
    def identity(self) -> str:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


async def wait(vm: Answering, identity: str) -> None:
    registry: Any = SimpleNamespace(vms={"web1": vm})
    promise: Any = SimpleNamespace(vm="web1", identity=identity, log=Log())
    keeper = Keeper(Config.model_validate({}), registry, cast(Any, None), cast(Any, None))
    async with asyncio.timeout(20):
        await keeper.wait_for_vm(promise, MonitorLost("its socket is gone"))


async def test_another_process_at_the_socket_is_not_taken_for_the_one_that_has_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qmpcommit.daemon.keeping.LOOK_AGAIN", 0.01)
    vm = Answering("1.2", "1.2", "1.2", OURS)
    await wait(vm, OURS)
    assert vm.left == [OURS]


@pytest.mark.parametrize("identity", ["", "1.1"])
async def test_who_answers_is_asked_where_the_former_process_has_ended_or_is_not_known(
    identity: str,
) -> None:
    await wait(Answering("1.2"), identity)
