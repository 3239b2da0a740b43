"""A session with one VM: its monitor, its disks and its commits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qmpcommit.block.chain import Disk, Image, find_disk, read_disks, read_image
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.plan import Plan, Request, check_vm_state, plan_commit
from qmpcommit.commit.policy import (
    AnyPolicy,
    Hold,
    Keep,
    PolicyCall,
    Ready,
    check_command,
    run_command,
)
from qmpcommit.errors import CommandRefused, CommitFailed, JobConflict, JobNotFound, OnlyIfFailed
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import to_the_end
from qmpcommit.units import parse_seconds

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

ONLY_IF_TIMEOUT = 60.0


class Session(Monitor):
    """A VM over its QMP monitor.

    ``async with Session.connect(path) as vm`` connects; ``Session.over(client)`` shares a
    connected `qemu.qmp.QMPClient` and leaves it connected. Leaving the block cancels the commits
    that are still running, so that none is left in READY with nobody listening.
    """

    def __init__(self, address: str | os.PathLike[str] | None, **options: Any) -> None:
        super().__init__(address, **options)
        self._jobs: set[CommitJob] = set()

    @classmethod
    def connect(
        cls,
        address: str | os.PathLike[str],
        *,
        name: str | None = None,
        timeout: float = 5.0,
        command_timeout: float = 30.0,
        patience: float = 30.0,
    ) -> Self:
        """A session that connects when it is awaited or entered; seconds throughout.

        `address` is the path of a Unix socket or ``tcp:HOST:PORT``; `name` is what errors and
        logs call the VM. Raises `InvalidRequest` at once, `ConnectError` or `MonitorBusy` when
        it is opened.
        """
        return cls(
            address,
            name=name,
            timeout=parse_seconds(timeout, "timeout"),
            command_timeout=parse_seconds(command_timeout, "command timeout"),
            patience=parse_seconds(patience, "patience"),
        )

    @classmethod
    def over(
        cls,
        client: QMPClient,
        *,
        name: str | None = None,
        command_timeout: float = 30.0,
        patience: float = 10.0,
    ) -> Self:
        """A session over a connected client that the embedder owns, and that stays connected.

        If its connection is lost, running commits wait `patience` seconds for the embedder to
        connect it again.
        """
        session = cls(
            None, name=name, client=client, command_timeout=command_timeout, patience=patience
        )
        return session

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await to_the_end(self._leave())

    async def close(self) -> None:
        """Cancel the commits still running, then disconnect; bounded in time."""
        await to_the_end(self._leave())

    async def _leave(self) -> None:
        for job in list(self._jobs):
            await job.abandon()
        await self._close()

    # -- disks ------------------------------------------------------------------------------------

    async def graph(self) -> BlockGraph:
        """QEMU's block graph as it is now."""
        return await read_graph(self)

    async def disks(self) -> list[Disk]:
        """All disks of the VM with their backing chains, active layer first."""
        return read_disks(await self.graph())

    async def disk(self, name: str) -> Disk:
        """The disk of that name; raises `DiskNotFound` with the candidates."""
        return find_disk(await self.disks(), str(name), vm=self.name, cwd=self.cwd)

    @property
    def cwd(self) -> str | None:
        """QEMU's working directory, against which relative file names count, where it is known."""
        try:
            return os.readlink(f"/proc/{self.peer_pid}/cwd") if self.peer_pid else None
        except OSError:
            return None

    # -- commits ----------------------------------------------------------------------------------

    async def plan(
        self,
        disk: str,
        *,
        policy: AnyPolicy | PolicyCall | dict[str, Any] | str | None = None,
        base: str | int | None = None,
        top: str | int | None = None,
        shallow: bool = False,
        bandwidth: int | str | None = None,
        job_id: str | None = None,
    ) -> Plan:
        """Check a commit without sending anything; arguments and errors are those of `commit`."""
        request = Request(str(disk), base, top, shallow, bandwidth, job_id)
        status = await self._status()
        if status is not None:
            check_vm_state(self.name, status)
        plan = plan_commit(self.name, await self.disk(request.disk), request, policy, self.cwd)
        await self._check_abilities(plan)
        return plan

    async def commit(
        self,
        disk: str,
        *,
        policy: AnyPolicy | PolicyCall | dict[str, Any] | str | None = None,
        base: str | int | None = None,
        top: str | int | None = None,
        shallow: bool = False,
        bandwidth: int | str | None = None,
        only_if: Sequence[str] | None = None,
        timeout: float | None = None,
        job_id: str | None = None,
    ) -> CommitJob:
        """Start a commit (``block-commit``) and return its job once QEMU has taken it.

        `disk` is a qdev id, QOM path, drive alias, node-name or image file; `base` and `top` a
        node-name, a file or an index into the chain (0 = active layer), by default the bottom
        and the active layer; `shallow` makes top's own backing file the base. `bandwidth` is in
        bytes per second, `timeout` in seconds for the whole job, which is cancelled then.
        `only_if` is a command that must succeed before anything is sent.

        Raises `PolicyRequired`, `DiskNotFound`, `ChainError`, `JobConflict`, `VMStateError`,
        `InvalidRequest` or `OnlyIfFailed` before anything is sent; `CommitFailed` if QEMU
        refuses the job. If this is cancelled, so is the job.
        """
        if timeout is not None:
            timeout = parse_seconds(timeout, "timeout")
        if only_if is not None:
            only_if = check_command(only_if, "only_if")
        plan = await self.plan(
            disk,
            policy=policy,
            base=base,
            top=top,
            shallow=shallow,
            bandwidth=bandwidth,
            job_id=job_id,
        )
        if only_if is not None:
            await self._ask_whether(only_if, plan)
        return await self._launch(CommitJob(self, plan, timeout=timeout))

    async def adopt(
        self,
        job_id: str,
        *,
        policy: AnyPolicy | PolicyCall | dict[str, Any] | str = Hold(),  # noqa: B008  (frozen)
        timeout: float | None = None,
    ) -> CommitJob:
        """Take up a commit job that exists already, by its id, whoever started it.

        With `Hold`, the default, it is only followed until something is decided. Raises
        `JobNotFound`, or `JobConflict` where it is no commit job.
        """
        from qmpcommit.commit.policy import parse_policy

        policy = parse_policy(policy)
        jobs = {job["device"]: job for job in await self.execute("query-block-jobs")}
        job = jobs.get(job_id)
        if job is None:
            raise JobNotFound(
                f"QEMU of {self.name} has no block job '{job_id}'"
                f" (its block jobs: {', '.join(jobs) or 'none'})",
                vm=self.name,
                job_id=job_id,
            )
        if job.get("type") != "commit":
            raise JobConflict(
                f"job '{job_id}' of {self.name} is a {job.get('type')} job, not a commit;"
                " nothing was sent",
                vm=self.name,
                job_id=job_id,
            )
        graph = await self.graph()
        plan = _adopted_plan(self.name, graph, job_id, policy)
        following = CommitJob(
            self,
            plan,
            timeout=timeout,
            adopted=True,
            auto_finalize=bool(job.get("auto-finalize", True)),
        )
        following = await self._launch(following)
        await following.seen()
        return following

    async def _launch(self, job: CommitJob) -> CommitJob:
        self._jobs.add(job)
        job.start(lambda: self._jobs.discard(job))
        try:
            await job.started()
        except BaseException:
            await to_the_end(job.abandon())
            raise
        return job

    async def _status(self) -> str | None:
        try:
            return str((await self.execute("query-status")).get("status"))
        except CommandRefused:
            return None  # qemu-storage-daemon runs no guest

    async def _check_abilities(self, plan: Plan) -> None:
        """A keep needs ``block-job-cancel`` with ``force``: better known now than at READY."""
        if not isinstance(plan.policy, Keep):
            return
        features = await self.features()
        if not features.has_argument("block-job-cancel", "force"):
            raise CommitFailed(
                f"QEMU of {self.name} has no block-job-cancel with 'force', the only way to keep"
                " the overlay active; pivot instead. Nothing was sent",
                vm=self.name,
                disk=plan.disk.name,
            )

    async def _ask_whether(self, command: Sequence[str], plan: Plan) -> None:
        ready = Ready(self.name, plan.disk.name, plan.job_id, plan.base, plan.top)
        try:
            status = await run_command(command, ready.environment(), ONLY_IF_TIMEOUT)
        except OSError as error:
            raise OnlyIfFailed(
                f"only_if could not be run: {' '.join(command)}: {error.strerror}."
                " Nothing was sent",
                vm=self.name,
                disk=plan.disk.name,
                command=list(command),
            ) from error
        if status != 0:
            how = f"ended with status {status}" if status is not None else "took too long"
            raise OnlyIfFailed(
                f"{plan.disk} of {self.name} was not committed, because {' '.join(command)} {how}."
                " Nothing was sent",
                vm=self.name,
                disk=plan.disk.name,
                command=list(command),
                exit_status=status,
            )


def _adopted_plan(vm: str, graph: BlockGraph, job_id: str, policy: Any) -> Plan:
    """What is known of a running job from the nodes that it holds."""
    held = graph.jobs.get(job_id)
    nodes = set(held.nodes.values()) if held is not None else set()
    disks = [d for d in read_disks(graph) if job_id in d.jobs]
    disk = disks[0] if disks else Disk(name="?")
    source, target = (held.source, held.target) if held is not None else (None, None)
    layers = [i for i in disk.chain if i.node_name in nodes]
    top = read_image(graph, source) if source in graph.nodes and source else None
    base = read_image(graph, target) if target in graph.nodes and target else None
    nothing = Image(node_name="", filename="(unknown)", driver="")
    top = top or (layers[0] if layers else disk.active or nothing)
    base = base or (layers[-1] if layers else disk.chain[-1] if disk.chain else nothing)
    names = [image.node_name for image in disk.chain]
    between: tuple[Image, ...] = ()
    if top.node_name in names and base.node_name in names:
        between = disk.chain[names.index(top.node_name) + 1 : names.index(base.node_name)]
    return Plan(
        vm=vm,
        disk=disk,
        top=top,
        base=base,
        job_id=job_id,
        two_phase=not names or top.node_name == names[0],
        policy=policy,
        between=between,
    )


async def commit(
    address: str | os.PathLike[str],
    disk: str,
    *,
    policy: AnyPolicy | PolicyCall | dict[str, Any] | str | None = None,
    **options: Any,
) -> CommitOutcome:
    """Commit one disk from start to end: connect, commit, decide, confirm, disconnect.

    Takes what `Session.commit` takes, and raises what it and `CommitJob.wait` raise. If it is
    cancelled, the job is cancelled first.
    """
    async with Session.connect(address) as vm:
        job = await vm.commit(disk, policy=policy, **options)
        return await job.wait()
