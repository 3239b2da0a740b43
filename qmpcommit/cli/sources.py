"""Where the VMs of ``vms`` and ``top`` are read, and their jobs told: by monitors, or a daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from fnmatch import fnmatch
from time import time
from typing import TYPE_CHECKING, Any, Protocol

from qmpcommit.block.chain import Disk
from qmpcommit.cli import decide
from qmpcommit.errors import QmpCommitError
from qmpcommit.recovery.host import DiskState, JobState, VMState, states
from qmpcommit.recovery.monitors import find
from qmpcommit.session import Session
from qmpcommit.window.run import windows_of

if TYPE_CHECKING:
    from qmpcommit.client.host import Client
    from qmpcommit.client.vm import RemoteVM
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.wire.commit import VMView

ENDS = ("pivot", "keep", "abort")


class Source(Protocol):
    """VMs as they are now, and orders to their jobs."""

    every: float
    """Seconds between two looks that cost nobody much."""

    async def look(self) -> list[VMState]:
        """All VMs, one that can't be asked too; raises where none can be."""
        ...

    async def order(self, vm: VMState, job: JobState, order: str, rate: int = 0) -> str:
        """Tell a job: pivot, keep, abort, pause, resume or speed; what came of it, in words."""
        ...


class Monitors:
    """The VMs of these globs, or of this host; each look connects anew, and hangs up."""

    every = 2.0

    def __init__(self, globs: Sequence[str], within: Callable[[], float]) -> None:
        self._globs, self._within = globs, within

    async def look(self) -> list[VMState]:
        """Asked at the same time, each in bounded time."""
        places = await asyncio.to_thread(find, self._globs)
        return await states(places, within=self._within())

    async def order(self, vm: VMState, job: JobState, order: str, rate: int = 0) -> str:
        """Over a monitor of its own; an end is waited for."""
        async with Session.connect(vm.address) as session:
            if order in ENDS:
                adopted = await decide.adopt(session, job.id, order, carry_bitmaps=order != "abort")
                decide.order(adopted, order)
                return _ended(job, await adopted.wait())
            await _steer(session, job.id, order, rate)
        return f"{job.id}: {order}, done"


def _ended(job: JobState, outcome: CommitOutcome) -> str:
    """How it ended, and a line for each warning."""
    said = [f"{job.id} has ended by '{outcome.action}'"]
    return "\n".join([*said, *(f"Warning: {warning}" for warning in outcome.warnings)])


async def _steer(vm: Session | RemoteVM, job: str, order: str, rate: int) -> None:
    if order == "speed":
        await vm.set_bandwidth(job, rate)
    else:
        await (vm.pause_job if order == "pause" else vm.resume_job)(job)


class Daemon:
    """The VMs that a daemon knows, or those of them whose names these globs tell."""

    every = 1.0

    def __init__(
        self, globs: Sequence[str], connect: Callable[[], AbstractAsyncContextManager[Client]]
    ) -> None:
        self._globs, self._connect = globs, connect

    async def look(self) -> list[VMState]:
        """Asked of the daemon, all at the same time."""
        async with self._connect() as host:
            views = [
                view
                for view in await host.vms()
                if not self._globs or any(fnmatch(view.name, glob) for glob in self._globs)
            ]
            ready = {
                (each.vm, each.job_id): each.view.ready
                for each in await host.commits(state="running", limit=1000)
            }
            looks = (_of_daemon(host.vm(view.name), view, ready) for view in views)
            return list(await asyncio.gather(*looks))

    async def order(self, vm: VMState, job: JobState, order: str, rate: int = 0) -> str:
        """Of the daemon, which adopts the job of somebody else that is to end."""
        from qmpcommit.errors import JobNotFound

        async with self._connect() as host:
            there = host.vm(vm.name)
            if order not in ENDS:
                await _steer(there, job.id, order, rate)
                return f"{job.id}: {order}, done"
            try:
                known = await there.job(job.id)
            except JobNotFound:
                known = await there.adopt(job.id, order)  # type: ignore[arg-type]
            else:
                await {"pivot": known.pivot, "keep": known.keep, "abort": known.abort}[order]()
            return _ended(job, await known.wait())


async def _of_daemon(
    vm: RemoteVM, view: VMView, ready: dict[tuple[str, str], float | None]
) -> VMState:
    try:
        disks, jobs, owners = await asyncio.gather(vm.disks(), vm.jobs(), vm.owners())
    except QmpCommitError as error:
        return VMState(view.qmp, asked=False, name=view.name, wrong=(error.message,))
    held = {each["disk"]: each for each in owners}
    on = {job: disk.name for disk in disks for job in disk.jobs}
    gone = [each["message"] for each in owners if each.get("alive") is False]
    return VMState(
        view.qmp,
        name=view.name,
        status=view.state,
        disks=tuple(_disk(disk, held) for disk in disks if disk.chain),
        jobs=tuple(
            _job(job, on.get(str(job["device"]), ""), held, ready.get((view.name, job["device"])))
            for job in jobs
        ),
        windows=tuple(await asyncio.to_thread(windows_of, disks, None)),
        wrong=tuple(gone),
    )


def _disk(disk: Disk, held: dict[str, dict[str, Any]]) -> DiskState:
    over = disk.chain[0] if len(disk.chain) > 1 else None
    owner = held.get(disk.name)
    return DiskState(
        disk.name,
        len(disk.chain),
        overlay=over.filename if over else "",
        overlay_size=over.allocated_size if over else None,
        held=owner["message"] if owner and owner.get("alive") is not False else "",
    )


def _job(
    job: dict[str, Any], disk: str, held: dict[str, dict[str, Any]], ready: float | None
) -> JobState:
    since = (held.get(disk) or {}).get("since")
    return JobState(
        str(job["device"]),
        str(job["type"]),
        str(job["status"]),
        disk=disk,
        current=int(job["offset"]),
        total=int(job["len"]),
        speed=int(job["speed"]),
        begun_for=max(0.0, time() - since) if since else None,
        ready_for=max(0.0, time() - ready) if ready else None,
    )
