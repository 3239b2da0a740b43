"""A piece of work whose process is killed by SIGKILL at its n-th place.

There is a place before and after each QMP command that changes something. Arguments: the monitors,
with commas between; which work; the place's number (0: never); the file to which the places are
written as they are passed; the folder of fresh overlays; and the name of a place to die at.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import qmpcommit as qc
from qmpcommit.block.throttle import MIB, Throttle
from qmpcommit.session import Session
from tests.ground.killing import places

Work = Callable[..., Awaitable[Any]]


def _commit(policy: Callable[[Path], Any], **more: Any) -> Work:
    async def work(folder: Path, vm: Session) -> None:
        job = await vm.commit("vda", policy=policy(folder), **more)
        await job.wait()

    return work


def _group(policy: Callable[[Path, str], Any], **more: Any) -> Work:
    async def work(folder: Path, vm: Session) -> None:
        await vm.commit_group({d: policy(folder, d) for d in ("vda", "vdb")}, **more)

    return work


def _recycle(folder: Path, disk: str = "vda") -> qc.Recycle:
    return qc.Recycle(str(folder / f"fresh-{disk}.qcow2"))


async def _discard(folder: Path, vm: Session) -> None:
    await vm.discard(["vda", "vdb"], guest="reset")


async def _discard_one(folder: Path, vm: Session) -> None:
    await vm.discard("vda", guest="reset", delete=True)


async def _discard_and_stop(folder: Path, vm: Session) -> None:
    await vm.discard("vda", guest="stop")


async def _cycle(folder: Path, vm: Session) -> None:
    await vm.cycle(["vda", "vdb"], keep_if=["true"], guest="reset")


async def _window(folder: Path, vm: Session) -> None:
    async with vm.snapshot(["vda", "vdb"], freeze="pause"):
        pass


async def _flatten(folder: Path, vm: Session) -> None:
    await vm.flatten("vda", keep=1)


async def _slowed(folder: Path, vm: Session) -> None:
    job = await vm.commit("vda", policy=qc.Hold())
    await job.ready()
    throttle = await Throttle.find(vm, job.plan.disk, await vm.graph())
    assert throttle is not None
    await throttle.limit(2 * MIB)
    await throttle.limit(MIB)
    assert await throttle.restore() == ""
    await job.detach()


async def _two_pivot(folder: Path, *vms: Session) -> None:
    await qc.commit_group([(vm, "vda") for vm in vms], policy=qc.Pivot())


async def _two_discard(folder: Path, *vms: Session) -> None:
    await qc.discard([(vm, "vda") for vm in vms], guest="reset")


def _recover(decide: Any) -> Work:
    return lambda folder, *vms: qc.recover(vms, decide=decide)


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
    "discard and stop": _discard_and_stop,
    "window": _window,
    "flatten": _flatten,
    "slowed": _slowed,
    "slowed by a filter": _slowed,
    "two VMs pivot": _two_pivot,
    "two VMs discard": _two_discard,
    "recover, abort": _recover("abort"),
    "recover, pivot": _recover("pivot"),
    "recover, keep": _recover("keep"),
}


async def main(qmps: str, work: str, folder: str) -> None:
    """From start to end."""
    async with AsyncExitStack() as stack:
        vms = [await stack.enter_async_context(Session.connect(qmp)) for qmp in qmps.split(",")]
        await WORK[work](Path(folder), *vms)


if __name__ == "__main__":
    QMPS, NAME, DIE_AT, PLACES, FOLDER, *DIE_IN = sys.argv[1:]
    places(PLACES, int(DIE_AT), *DIE_IN)
    asyncio.run(main(QMPS, NAME, FOLDER))
