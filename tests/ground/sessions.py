"""What tests ask of a session, and of a machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

import qmpcommit as qc
from qmpcommit.guest import hold, run_state


class Asked(Protocol):
    """A session, or a machine, which is asked over its second monitor."""

    async def execute(self, command: str) -> Any: ...


async def runs(vm: Asked) -> bool:
    """Whether its guest runs."""
    return bool((await vm.execute("query-status"))["running"])


async def files(vm: qc.Session, disk: str | None = None) -> list[Path]:
    """The files of this disk, or of the only one, active layer first."""
    if disk is not None:
        found = await vm.disk(disk)
    else:
        (found,) = await vm.disks()
    return [Path(image.filename) for image in found.chain]


async def lost(vm: qc.Session) -> None:
    """Wait until it has noticed that its monitor is gone."""
    async with asyncio.timeout(20):
        while vm.connected:
            await asyncio.sleep(0)


async def time_to_go_too_far(vm: Asked) -> None:
    """QEMU answers 20 times: by then whoever does not wait has gone on."""
    for _ in range(20):
        await vm.execute("query-jobs")


@contextmanager
def hurried(vm: qc.Session, *, patience: float | None = None) -> Iterator[None]:
    """In the block QEMU does not answer and is soon given up; elsewhere it may take its time."""
    former = vm.timeout, vm.command_timeout, vm.patience
    vm.timeout = vm.command_timeout = 0.3
    vm.patience = vm.patience if patience is None else patience
    try:
        yield
    finally:
        vm.timeout, vm.command_timeout, vm.patience = former


def thaws_once(patch: pytest.MonkeyPatch) -> None:
    """A guest that can't be thawed is not tried again."""
    patch.setattr(hold, "THAW_PATIENCE", 0.0)
    defaults = run_state.thaw.__kwdefaults__
    assert defaults is not None
    patch.setitem(defaults, "patience", 0.0)
