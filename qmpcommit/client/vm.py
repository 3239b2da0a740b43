"""A VM of the daemon: its disks and its commits."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Unpack
from urllib.parse import quote

from qmpcommit.block.chain import Disk, find_disk
from qmpcommit.client.job import RemoteJob
from qmpcommit.client.problems import sensible
from qmpcommit.client.taking_back import wanted
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import check_command, parse_policy
from qmpcommit.commit.request import CommitOptions, GroupOptions, Request
from qmpcommit.errors import (
    DaemonLost,
    InvalidRequest,
    JobNotFound,
    QmpCommitError,
)
from qmpcommit.former import former
from qmpcommit.guest.sockets import socket_of
from qmpcommit.units import parse_seconds

if TYPE_CHECKING:
    from qmpcommit.client.host import Client
    from qmpcommit.commit.pace import Converge
    from qmpcommit.commit.request import Stale
    from qmpcommit.commit.steering import JobNow
    from qmpcommit.guest.run_state import How
    from qmpcommit.guest.sockets import Agents
    from qmpcommit.window.overlays import Snapshot
    from qmpcommit.window.records import Window
    from qmpcommit.wire.commit import VMView
    from qmpcommit.wire.cycle import RoundView


class RemoteGroupOptions(GroupOptions, total=False):
    """What the daemon takes for one disk and for several."""

    on_pivot: Sequence[str] | None
    converge: float | Converge | None
    priority: int


class RemoteOptions(RemoteGroupOptions, CommitOptions, total=False):
    """What the daemon takes for one disk: all of it is a value."""


class RemoteVM:
    """One VM of a daemon, by its name; made by `Client.vm`."""

    def __init__(self, client: Client, name: str) -> None:
        self.client, self.name = client, name
        self.path = f"/v1/vms/{name}"

    def __repr__(self) -> str:
        return f"<RemoteVM {self.name!r} of the daemon at {str(self.client.wire.address)!r}>"

    async def info(self) -> VMView:
        """Where its monitor is, and whether it is connected; raises `VMNotFound`."""
        from qmpcommit.client.host import vm_view

        return vm_view(self._parse(await self.client.ask("GET", self.path)))

    async def disks(self) -> list[Disk]:
        """All disks of the VM with their backing chains, active layer first."""
        found = self._parse(await self.client.ask("GET", f"{self.path}/disks"))
        with sensible("list of disks"):
            return [Disk.model_validate(each, extra="ignore") for each in found]

    async def disk(self, name: str) -> Disk:
        """The disk of that name; raises `DiskNotFound` with the candidates."""
        return find_disk(await self.disks(), str(name), vm=self.name)

    async def jobs(self) -> list[dict[str, Any]]:
        """The block jobs as QEMU lists them (``query-block-jobs``), each with its ``commit``."""
        found = self._parse(await self.client.ask("GET", f"{self.path}/jobs"))
        with sensible("list of jobs"):
            return [dict(each) for each in found]

    async def recycles(self) -> list[dict[str, str]]:
        """Overlays that an interrupted recycle left open, each with what to do ``next``."""
        found = self._parse(await self.client.ask("GET", f"{self.path}/recycles"))
        with sensible("list of recycles"):
            return [dict(each) for each in found]

    async def owners(self) -> list[dict[str, Any]]:
        """Disks that somebody works on, and who: ``disk``, ``work``, ``pid``, ``since``, ..."""
        found = self._parse(await self.client.ask("GET", f"{self.path}/owners"))
        with sensible("list of owners"):
            return [dict(each) for each in found]

    async def job(self, name: str) -> RemoteJob:
        """The commit of this VM with that id or job id; raises `JobNotFound`.

        A job id means a commit that has not ended, as it does in QEMU.
        """
        for state in ("running", "queued"):
            for job in await self.client.commits(vm=self.name, state=state, limit=1000):
                if name in (job.id, job.job_id):
                    return job
        if len(name) == 32:
            try:
                found = await self.client.commit(name)
            except QmpCommitError as error:
                if type(error).__name__ != "CommitNotFound":
                    raise
            else:
                if found.vm == self.name:
                    return found
        raise JobNotFound(
            f"the daemon has no commit '{name}' of {self.name} that has not ended; a block job that"
            " is not its own becomes so when it is decided (pivot, keep or abort)",
            vm=self.name,
            job_id=name,
        )

    async def adopt(
        self,
        job_id: str,
        action: Literal["pivot", "keep", "abort"],
        *,
        wait: bool = False,
        delete: bool = False,
        stale: Stale | None = None,
        on_pivot: Sequence[str] | None = None,
        carry_bitmaps: bool = True,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> RemoteJob:
        """Decide a commit job that is not the daemon's: it becomes a commit of its own.

        Before READY that is refused (`NotReady`), unless it is to `wait` for it, for `timeout`
        seconds at most, or is aborted. The rest is as for `Session.adopt`; `on_pivot` is a command
        that the daemon runs. Raises `JobNotFound`, `JobConflict` where it is no commit or one that
        the daemon has promised, `InvalidRequest`, and what `commit` raises of the daemon's.
        """
        from qmpcommit.client.host import commit_view

        body: dict[str, Any] = {"action": action, "wait": wait, "delete": delete, "stale": stale}
        body |= {"carry_bitmaps": carry_bitmaps, "timeout": timeout}
        if on_pivot is not None:
            body["on_pivot"] = list(check_command(on_pivot, "on_pivot, asked of the daemon,"))
        path = f"{self.path}/jobs/{quote(job_id, safe='')}/decision"
        headers = {"idempotency-key": idempotency_key or uuid.uuid4().hex}
        reply = await self.client.ask("POST", path, body, headers=headers)
        return RemoteJob(self.client, commit_view(self._parse(reply)))

    async def plan(self, disk: str, **options: Unpack[RemoteOptions]) -> Plan:
        """What a commit would send and what its checks find; as `Session.plan`, nothing is sent."""
        from qmpcommit.commit.checks import Finding

        body = body_of(disk, **options)
        found = self._parse(await self.client.ask("POST", f"{self.path}/plans", body))
        with sensible("plan"):
            plan = Plan.model_validate(found, extra="ignore")
            return replace(
                plan,
                policy=parse_policy(plan.policy) if plan.policy is not None else None,
                findings=[Finding.model_validate(each, extra="ignore") for each in plan.findings],
            )

    async def commit(
        self,
        disk: str,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[RemoteOptions],
    ) -> RemoteJob:
        """Have the daemon promise a commit; it is kept even if this client, or the daemon, dies.

        Arguments are those of `Session.commit`. Commands (`only_if`, `on_pivot`, a `Check`) are
        run by the daemon, where its configuration allows that; `converge` is in seconds;
        `timeout` counts from the promise. A higher `priority` leaves the queue first. A lost
        reply is asked for again under `idempotency_key`, one of its own by default, so that
        there is never a second commit.

        Raises what `Session.commit` raises before anything is sent, `VMNotFound`, `QueueFull`,
        `KeyReused`, `DaemonUnreachable`, `DaemonLost` or `DaemonError`. If this is cancelled,
        so is a commit that was promised meanwhile.
        """
        asking = self._promise(body_of(disk, **options), idempotency_key)
        job, _ = await wanted(asking, self._take_back, self._unanswered)
        return job

    async def set_bandwidth(self, job_id: str, bandwidth: int | str) -> JobNow:
        """Limit a block job to so many bytes per second (0: no limit), whoever began it.

        As `Session.set_bandwidth`; of a commit of the daemon's own until that shares its storage's
        bandwidth anew. Raises what that raises, and what `disks` raises.
        """
        from qmpcommit.units import parse_size

        rate = parse_size(bandwidth, "bandwidth")
        return await self._steer(job_id, {"action": "speed", "bandwidth": rate})

    async def pause_job(self, job_id: str) -> JobNow:
        """Have a block job copy nothing until `resume_job`; as `Session.pause_job`."""
        return await self._steer(job_id, {"action": "pause"})

    async def resume_job(self, job_id: str) -> JobNow:
        """Have a block job go on, whoever or whatever has stopped it; as `Session.resume_job`."""
        return await self._steer(job_id, {"action": "resume"})

    async def _steer(self, job_id: str, body: dict[str, Any]) -> JobNow:
        from qmpcommit.commit.steering import JobNow

        path = f"{self.path}/jobs/{quote(job_id, safe='')}/steering"
        found = self._parse(await self.client.ask("POST", path, body))
        with sensible("job"):
            return JobNow.model_validate(found, extra="ignore")

    async def overlay(
        self,
        disks: Sequence[str],
        *,
        overlay: str | os.PathLike[str] | None = None,
        overlay_options: Mapping[str, Any] | None = None,
        overlay_secret: str | None = None,
        freeze: How | None = None,
        agents: Agents | None = None,
    ) -> Snapshot:
        """Lay fresh overlays over disks, which stay; as `Session.overlay`.

        `overlay` and the agent's socket are paths on the daemon's host. Raises what that raises,
        and what `disks` raises; `DaemonLost` where the answer is lost: it is not asked again, for
        the overlays may lie.
        """
        from qmpcommit.window.overlays import LaidOverlay, Snapshot

        socket = socket_of(agents, self)
        body = {
            "disks": list(disks),
            "overlay": None if overlay is None else os.fspath(overlay),
            "overlay_options": None if overlay_options is None else dict(overlay_options),
            "overlay_secret": overlay_secret,
            "freeze": freeze,
            "agent": None if socket is None else os.fspath(socket),
        }
        path = f"{self.path}/overlays"
        found = self._parse(await self.client.ask("POST", path, body, repeats=False))
        with sensible("snapshot"):
            laid = Snapshot.model_validate(found, extra="ignore")
            disks_ = tuple(LaidOverlay.model_validate(each, extra="ignore") for each in laid.disks)
            return replace(laid, disks=disks_)

    @former(agent="agents", overlay_dir="overlay")
    def snapshot(
        self,
        disks: Sequence[str],
        *,
        overlay: str | os.PathLike[str] | None = None,
        overlay_options: Mapping[str, Any] | None = None,
        overlay_secret: str | None = None,
        freeze: How | None = None,
        agents: Agents | None = None,
        bandwidth: int | str | None = None,
        lease: float = 60.0,
    ) -> AbstractAsyncContextManager[Window]:
        """A window in which the disks' files stand still; as `Session.snapshot`.

        The daemon holds it open by a lease of so many seconds, which is renewed here while the
        block lasts: if this client dies, the daemon closes the window. `agents` is the socket's
        path on the daemon's host. Raises what `Session.snapshot` raises, `VMNotFound`,
        `DaemonUnreachable`, `DaemonLost` or `DaemonError`; and `WindowError` where the window
        was closed before the block had ended.
        """
        from qmpcommit.client.window import snapshot

        return snapshot(
            self,
            disks,
            overlay_dir=overlay,
            overlay_options=overlay_options,
            overlay_secret=overlay_secret,
            freeze=freeze,
            agent=socket_of(agents, self),
            bandwidth=bandwidth,
            lease=lease,
        )

    async def cycle(self, disk: str, *, idempotency_key: str | None = None) -> RoundView:
        """Run a round of the ``[[cycle]]`` that the daemon has for this disk, and wait for its end.

        `result` tells whether the overlay's changes were "kept" or "discarded". A lost reply is
        asked for again under `idempotency_key`, one of its own by default, so that there is never
        a second round; the wait goes on over a restart of the daemon. Cancelling it does not end
        the round. Raises the error that the round ended with, `VMNotFound`, `InvalidRequest`
        where the disk has no cycle, `JobConflict` while another round of it is under way,
        `QueueFull`, `KeyReused`, `DaemonUnreachable`, `DaemonLost` or `DaemonError`.
        """
        from qmpcommit.client.cycle import begin

        return await (await begin(self, disk, idempotency_key)).wait()

    async def _promise(self, body: dict[str, Any], key: str | None) -> tuple[RemoteJob, bool]:
        """The promised commit, and whether it is new."""
        from qmpcommit.client.host import commit_view

        headers = {"idempotency-key": key or uuid.uuid4().hex}
        reply = await self.client.ask("POST", f"{self.path}/commits", body, headers=headers)
        job = RemoteJob(self.client, commit_view(self._parse(reply)))
        return job, key is None or reply.again or "idempotent-replay" not in reply.headers

    async def _take_back(self, promised: tuple[RemoteJob, bool]) -> None:
        job, new = promised
        if new:
            await job.decide("abort")

    def _unanswered(self) -> DaemonLost:
        return DaemonLost(
            f"the daemon did not answer whether it has promised the commit of {self.name};"
            " perhaps it has. See what it lists",
            vm=self.name,
        )

    def _parse(self, reply: Any) -> Any:
        try:
            return self.client.parse(reply)
        except QmpCommitError as error:
            error.add(vm=self.name)
            raise


def name_of(vm: RemoteVM | str) -> str:
    """The name of a VM, which may itself be given."""
    return str(getattr(vm, "name", vm))


def body_of(
    disk: str,
    *,
    on_pivot: Sequence[str] | None = None,
    converge: float | Converge | None = None,
    priority: int = 0,
    **options: Unpack[CommitOptions],
) -> dict[str, Any]:
    """The request's body; raises `InvalidRequest` as `Session.commit` does."""
    body = Request(disk, **options).body()
    if on_pivot is not None:
        body["on_pivot"] = list(check_command(on_pivot, "on_pivot, asked of the daemon,"))
    if converge is not None:
        body["converge"] = _seconds_to_converge(converge)
    return {**body, "priority": priority} if priority else body


def _seconds_to_converge(converge: Any) -> float:
    from qmpcommit.commit.pace import Converge

    if not isinstance(converge, Converge):
        return parse_seconds(converge, "time to converge")
    if converge != Converge(deadline=converge.deadline, pause=0.5):
        raise InvalidRequest(
            "the daemon converges in its own way, with a pause of at most half a second: give the"
            " seconds alone"
        )
    return float(converge.deadline)
