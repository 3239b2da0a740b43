"""A piece of work whose process is killed by SIGKILL at its n-th place.

There is a place before and after each QMP command that changes something. Arguments: the monitor,
which work, the place's number (0: never), the file to which the places are written as they are
passed, and the folder of fresh overlays.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import qmpcommit as qc
from qmpcommit.session import Session
from tests.ground.killing import places

Work = Callable[[Session, Path], Awaitable[Any]]


def _commit(policy: Callable[[Path], Any], **more: Any) -> Work:
    async def work(vm: Session, folder: Path) -> None:
        job = await vm.commit("vda", policy=policy(folder), **more)
        await job.wait()

    return work


def _group(policy: Callable[[Path, str], Any], **more: Any) -> Work:
    async def work(vm: Session, folder: Path) -> None:
        await vm.commit_group({d: policy(folder, d) for d in ("vda", "vdb")}, **more)

    return work


def _recycle(folder: Path, disk: str = "vda") -> qc.Recycle:
    return qc.Recycle(str(folder / f"fresh-{disk}.qcow2"))


async def _discard(vm: Session, folder: Path) -> None:
    await vm.discard(["vda", "vdb"], guest="reset")


async def _discard_one(vm: Session, folder: Path) -> None:
    await vm.discard("vda", guest="reset", delete=True)


async def _cycle(vm: Session, folder: Path) -> None:
    await vm.cycle(["vda", "vdb"], keep_if=["true"], guest="reset")


async def _window(vm: Session, folder: Path) -> None:
    async with vm.snapshot(["vda", "vdb"], freeze="pause"):
        pass


async def _flatten(vm: Session, folder: Path) -> None:
    await vm.flatten("vda", keep=1)


WORK: dict[str, Work] = {
    "pivot": _commit(lambda folder: qc.Pivot()),
    "keep": _commit(lambda folder: qc.Keep()),
    "recycle": _commit(_recycle),
    "recycle shallow": _commit(_recycle, shallow=True),
    "group pivot": _group(lambda folder, disk: qc.Pivot()),
    "group keep": _group(lambda folder, disk: qc.Keep(), freeze="pause"),
    "group recycle": _group(_recycle),
    "cycle": _cycle,
    "discard": _discard,
    "discard one": _discard_one,
    "window": _window,
    "flatten": _flatten,
    "recover": lambda vm, folder: vm.recover(decide="abort"),
    "recover, pivot": lambda vm, folder: vm.recover(decide="pivot"),
    "recover, keep": lambda vm, folder: vm.recover(decide="keep"),
}


async def main(qmp: str, work: str, folder: str) -> None:
    """From start to end."""
    async with Session.connect(qmp) as vm:
        await WORK[work](vm, Path(folder))


if __name__ == "__main__":
    QMP, NAME, DIE_AT, PLACES, FOLDER = sys.argv[1:]
    places(PLACES, int(DIE_AT))
    asyncio.run(main(QMP, NAME, FOLDER))
