"""One VM: its monitor, its disks and its commits."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, Unpack

from qmpcommit.block.chain import Disk, absolute, find_disk, read_disks
from qmpcommit.block.graph import BlockGraph, read_graph, working_directory
from qmpcommit.block.identity import FileId, OpenFiles, all_told_where, identify
from qmpcommit.commit.checks import Finding, check_commit, check_override, refuse
from qmpcommit.commit.deletable import is_ours
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.migration import look_at_owner
from qmpcommit.commit.objections import refuse_converge, refuse_idle
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.plan import Plan, plan_commit
from qmpcommit.commit.policy import (
    AskedPolicy,
    Hold,
    parse_policy,
)
from qmpcommit.commit.preconditions import (
    ask_whether,
    carrying_of,
    check_abilities,
    check_bitmaps,
    check_commands,
    check_free,
    check_job_id,
    check_overlays,
    told,
)
from qmpcommit.commit.request import (
    CommitOptions,
    Request,
    Stale,
    spelled_out,
    what_of_stale,
)
from qmpcommit.commit.stale_layers import Around, Barrier, Hooks, OnPivot, OnStall
from qmpcommit.errors import (
    ChainError,
    CommitFailed,
    InvalidRequest,
    JobConflict,
    QmpCommitError,
)
from qmpcommit.qmp.monitor import Monitor, MonitorOptions
from qmpcommit.tasks import all_of, to_the_end
from qmpcommit.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

    from qmpcommit.commit.claim import Claim, Owner
    from qmpcommit.commit.driver import Resumed
    from qmpcommit.commit.ledger import Ledger, Noted
    from qmpcommit.commit.pace import Converge
    from qmpcommit.commit.steering import JobNow


class SessionOptions(CommitOptions, Hooks, total=False):
    """What `VM.commit` takes."""


class VM(Monitor):
    """A VM over its QMP monitor.

    ``async with Session.connect(path) as vm`` connects; ``Session.over(client)`` shares a
    connected `qemu.qmp.QMPClient` and leaves it connected. Leaving the block cancels the commits
    that are still running, so that none is left in READY with nobody listening.

    `private` tells that nobody else can reach what this VM exports; `gate` bounds how many
    commits, of many sessions, are cleared up after at once; `claims` are the disks that are
    held, `left_claims` those that could not be let go while the monitor was away; `detaches` has
    its commits claim their disks as what will be left in QEMU on purpose.
    """

    def __init__(
        self, address: str | os.PathLike[str] | None, **options: Unpack[MonitorOptions]
    ) -> None:
        super().__init__(address, **options)
        self._jobs: set[CommitJob] = set()
        self.private = False
        self.detaches = False
        self.claims: set[Claim] = set()
        self.left_claims: list[Owner] = []
        self.gate: asyncio.Semaphore | None = None

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
        pid: int | None = None,
    ) -> Self:
        """A session over a connected client that the embedder owns, and that stays connected.

        If its connection is lost, running commits wait `patience` seconds for the embedder to
        connect it again, unless QEMU's process has ended: that is a `VMGone` at once.

        Which process that is the client's Unix socket tells (``SO_PEERCRED``), as for `connect`.
        `pid` says it where QEMU runs on this host and the socket does not tell: it is TCP, a
        proxy is in between, or somebody else has listened on it and handed it to QEMU. Where
        neither tells, which is logged once (``qemu_process_unknown``):

        * no file is deleted, for nobody can see which files QEMU has open;
        * free space and locks of files are not checked, and findings say so;
        * `cwd` is None, so that a relative file name is one of this process;
        * QEMU's end can't be told from a lost monitor: `MonitorLost` instead of `VMGone`.
        """
        if pid is not None and (isinstance(pid, bool) or not isinstance(pid, int) or pid < 1):
            raise InvalidRequest(f"pid is the id of QEMU's process, a whole number, not {pid!r}")
        return cls(
            None,
            name=name,
            client=client,
            command_timeout=command_timeout,
            patience=patience,
            pid=pid,
        )

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

    async def release(self) -> None:
        """Disconnect and leave the jobs as they are in QEMU, for whoever resumes or adopts them."""
        await to_the_end(self._release())

    async def _release(self) -> None:
        for job in list(self._jobs):
            await job.detach()
        await self._close()

    async def _leave(self) -> None:
        for job in list(self._jobs):
            await job.abandon()
        if self.claims:  # of windows that stay open, for whoever closes them
            from qmpcommit.commit.claim import release_all

            await release_all(self.claims)
        await self._close()

    # -- disks ------------------------------------------------------------------------------------

    async def graph(self) -> BlockGraph:
        """QEMU's block graph as it is now."""
        return await read_graph(self)

    async def disks(self) -> list[Disk]:
        """All disks of the VM with their backing chains, active layer first."""
        graph = await self.graph()
        with self.sensible("the queries of its block graph"):
            disks = read_disks(graph)
        return await asyncio.to_thread(all_told_where, graph, self.peer_pid, disks)

    async def disk(self, name: str) -> Disk:
        """The disk of that name; raises `DiskNotFound` with the candidates."""
        return find_disk(await self.disks(), str(name), vm=self.name, cwd=self.cwd)

    @property
    def cwd(self) -> str | None:
        """QEMU's working directory, against which relative file names count, where it is known."""
        return working_directory(self.peer_pid)

    async def set_write_threshold(self, node: str, threshold: int | str) -> None:
        """Be told by ``BLOCK_WRITE_THRESHOLD`` when a node's file grows past so many bytes.

        For thin volumes that are extended while they fill; `node` is the layer's protocol node
        (its file's), 0 switches it off. The event comes once for each setting
        (``block-set-write-threshold``).
        """
        size = parse_size(threshold, "write threshold")
        arguments = {"node-name": node, "write-threshold": size}
        await self.execute("block-set-write-threshold", arguments)

    # -- block jobs -------------------------------------------------------------------------------

    async def set_bandwidth(self, job_id: str, bandwidth: int | str) -> JobNow:
        """Change the rate of the block job of that id, whoever began it; what it does now.

        In bytes per second, or a text such as ``"50MiB"``; 0 is no limit. Of one's own job
        `CommitJob.set_bandwidth` does the same. Raises `InvalidRequest` for what is no rate,
        `JobNotFound` with the jobs that are, `JobConflict` where the job takes none any more
        (``block-job-set-speed``).
        """
        from qmpcommit.commit.steering import set_speed

        parse_size(bandwidth, "bandwidth")  # before anything is sent
        return await set_speed(self, job_id, bandwidth)

    async def pause_job(self, job_id: str) -> JobNow:
        """Have the block job of that id copy nothing until `resume_job`; what it does now.

        Whoever paused it: QEMU refuses a second pause, so one resume lets the job go on. One that
        is paused already stays so, and `JobNow.changed` is False. What the guest writes meanwhile
        is copied afterwards. Raises `JobNotFound` with the jobs that are, `JobConflict` where the
        job is PENDING or at its end (``job-pause``).
        """
        from qmpcommit.commit.steering import pause_or_resume

        return await pause_or_resume(self, job_id, "pause")

    async def resume_job(self, job_id: str) -> JobNow:
        """Have the block job of that id go on that was paused, or stopped by an I/O error.

        What it does now: where QEMU itself still holds it (a drain), `JobNow.paused` is True
        nevertheless. One that runs goes on running, and `JobNow.changed` is False. Raises as
        `pause_job` (``job-resume``).
        """
        from qmpcommit.commit.steering import pause_or_resume

        return await pause_or_resume(self, job_id, "resume")

    # -- commits ----------------------------------------------------------------------------------

    @spelled_out
    async def plan(
        self,
        disk: str,
        *,
        check: bool = True,
        **options: Unpack[CommitOptions],
    ) -> Plan:
        """Check a commit without sending anything; arguments and errors are those of `commit`.

        Without `check`, the files are not looked at.
        """
        request = Request(disk, **options)
        refuse_idle(request.policy, stale=request.leaves)
        plan, graph = await self._plan(request)
        if not check:
            return plan
        return replace(plan, findings=await self._check(plan, graph))

    async def _check(self, plan: Plan, graph: BlockGraph) -> list[Finding]:
        """Look at the files and the graph before the first byte."""
        return await asyncio.to_thread(check_commit, graph, plan, pid=self.peer_pid, cwd=self.cwd)

    def _look_at_files(self, plan: Plan, graph: BlockGraph) -> tuple[list[Finding], Plan]:
        """What is found, and the plan with what is to be told of its names; in a thread."""
        opened = OpenFiles.of(graph, self.peer_pid, cwd=graph.cwd)
        found = check_commit(
            graph, plan, pid=self.peer_pid, cwd=self.cwd, probe_locks=False, opened=opened
        )
        return found, told(plan, graph, self.peer_pid, opened)

    def _refuse(self, plan: Plan, findings: list[Finding], override: Collection[str]) -> None:
        try:
            refuse(findings, override)
        except QmpCommitError as error:
            error.add(vm=self.name, disk=plan.disk.name)
            raise

    async def look(self) -> tuple[str | None, BlockGraph]:
        """The run state (None for a storage daemon) and the block graph, for `prepare`.

        Raises `VMStateError` where the VM's disks are not its own to write.
        """
        status, graph = await all_of(look_at_owner(self), self.graph())
        return status, graph

    async def _plan(
        self,
        request: Request,
        seen: tuple[str | None, BlockGraph] | None = None,
        *,
        claim: Claim | None = None,
    ) -> tuple[Plan, BlockGraph]:
        status, graph = seen or await self.look()
        with self.sensible("the queries of its block graph"):
            disks = read_disks(graph)
        disk = find_disk(disks, request.disk, vm=self.name, cwd=self.cwd)
        if graph.claims:
            from qmpcommit.commit.claim import check_free

            check_free(self, graph, disk, claim=claim, override=request.override)
        try:
            plan = plan_commit(self.name, disk, request, self.cwd)
        except ChainError as error:
            from qmpcommit.commit.pending import tell_of_recycles

            raise tell_of_recycles(error, graph, str(self.address or "QMP")) from None
        await check_abilities(self, plan, status, cwd=self.cwd, private=self.private)
        await check_overlays(self, plan, graph)
        return await self._named(plan, graph), graph

    async def _named(self, plan: Plan, graph: BlockGraph) -> Plan:
        """With the name that goes into a header, where the commit rewrites one."""
        if plan.two_phase:
            return plan
        from qmpcommit.commit.headers import is_bare, with_backing_file

        masks = False
        if is_bare(graph, plan.base.node_name):
            features = await self.features()
            masks = features.has_argument("block-commit", "backing-mask-protocol")
        return await asyncio.to_thread(
            with_backing_file, plan, graph, self.peer_pid, self.cwd, masks=masks
        )

    @spelled_out
    async def commit(
        self,
        disk: str,
        *,
        on_pivot: OnPivot | None = None,
        on_stall: OnStall | None = None,
        converge: Converge | None = None,
        ledger: Ledger | None = None,
        claim: Claim | None = None,
        **options: Unpack[CommitOptions],
    ) -> CommitJob:
        """Start a commit (``block-commit``) and return its job once QEMU has taken it.

        `disk` is a qdev id, QOM path, drive alias, node-name or image file; `base` and `top` a
        node-name, a file, an index into the chain (0 = active layer) or an `Image` of it, by
        default the bottom and the active layer; `shallow` makes top's own backing file the base.
        `bandwidth` is in bytes per second, `timeout` in seconds for the whole job, which is
        cancelled then.
        `only_if` is a command that must succeed before anything is sent; `override` names checks
        (`qmpcommit.commit.checks.OVERRIDES`) whose refusal does not count.

        After a pivot (or an intermediate commit) the stale layers' nodes are closed; with
        `delete` (or `stale` "rename") their files go, after `on_pivot`, an async callable that
        is given the outcome, has persisted the VM's new disk path. `on_error` is QEMU's: with
        "stop" a full base makes the job wait, `on_stall` is awaited, and the job goes on.
        `converge` holds the guest's writes back where they keep the job from READY, and puts
        the disk's I/O limits back. Dirty bitmaps of the committed layers are carried into the
        base unless `carry_bitmaps` is off. Where the backing names on the way were relative, the
        overlay above an intermediate layer names the base relatively too; `keep_relative` has it
        do so where they were not, `backing_mask_protocol` "raw" for its
        format where QEMU would write a protocol's name; `filter_node_name` names the job's filter.
        `ledger` is told of each step before it is taken (see `Ledger`). Whatever a policy or
        `on_stall` ends with, the job is cancelled, and it is the ``__cause__`` of the
        `CommitFailed`; where `on_pivot` fails no file is deleted, and the outcome's `hook` says so.

        The disk is claimed in QEMU until the job has ended, so that no two work on it at once;
        `claim` is that of whoever has claimed it already for more than this commit.

        Raises `PolicyRequired`, `DiskNotFound`, `ChainError`, `JobConflict`, `VMStateError`,
        `InvalidRequest`, `NoSpace` or `OnlyIfFailed` before anything is sent; `CommitFailed` if
        QEMU refuses the job. If this is cancelled, so is the job.
        """
        from qmpcommit.commit.claim import let_go, take_for

        clock = asyncio.get_running_loop().time
        begun = clock()
        request = Request(disk, **options)
        refuse_idle(request.policy, stale=request.leaves, on_pivot=on_pivot)
        check_override(request.override)
        around = Around(on_pivot=on_pivot, on_stall=on_stall, converge=converge, ledger=ledger)
        job = await self.prepare(request, around, claim=claim)
        await take_for(self, job, override=request.override)
        try:
            if request.only_if is not None:
                await ask_whether(request.only_if, job.plan)
            if request.timeout is not None:
                job.timeout, job.spent = request.timeout, clock() - begun
        except BaseException:
            await let_go(job)
            raise
        return await self.launch(job, override=request.override)

    async def prepare(
        self,
        request: Request,
        around: Around,
        *,
        held: bool = False,
        seen: tuple[str | None, BlockGraph] | None = None,
        claim: Claim | None = None,
    ) -> CommitJob:
        """A checked commit that `launch` can send; nothing was sent yet.

        Raises what `commit` raises before anything is sent. With `held` the policy is only checked
        for what it needs: at READY the job waits for what it is told. `seen` is what `look` gave,
        where several are prepared at once; `claim` is that of whoever has claimed the disk.
        """
        around.check()
        try:
            plan, graph = await self._plan(request, seen, claim=claim)
        except JobConflict as conflict:
            from qmpcommit.commit.pending import name_pending

            raise await name_pending(self, conflict) from None
        if around.converge is not None and not plan.two_phase:
            refuse_converge(self.name, plan.disk, plan.top)
        if request.job_id is not None and around.barrier is None:  # a group's are its own
            await check_job_id(self, plan)
        await check_free(self, plan, self.cwd)
        findings, plan = await asyncio.to_thread(self._look_at_files, plan, graph)
        self._refuse(plan, findings, request.override)
        check_commands(plan, around.on_pivot)
        check_bitmaps(graph, plan)
        plan = replace(plan, findings=findings, policy=Hold() if held else plan.policy)
        if not plan.two_phase:
            from qmpcommit.commit.overlays_above import check_writable

            await check_writable(self, plan, graph, self.cwd, request.override)
        around = around._replace(
            carrying=carrying_of(graph, plan) if request.carry_bitmaps else None,
            files=await asyncio.to_thread(self.files_of, plan) if plan.follows_files else {},
            cwd=self.cwd,
            gate=self.gate,
        )
        if around.prepares(plan) or around.barrier is not None:
            plan.arguments["auto-finalize"] = False
        job = CommitJob(self, plan, around=around)
        job.claim = claim
        return job

    async def launch(self, job: CommitJob, *, override: Collection[str] = ()) -> CommitJob:
        """Send a prepared commit and return it once QEMU has taken it.

        Raises `JobConflict` where its disk is not claimed yet, and another one's; `CommitFailed`.
        """
        from qmpcommit.commit.claim import take_for

        await take_for(self, job, override=override)
        try:
            return await self._launch(job)
        except CommitFailed:
            if not job.state.began:  # QEMU refused; perhaps we can say who is in the way
                self._refuse(job.plan, await self._check(job.plan, await self.graph()), override)
            raise

    @property
    def jobs(self) -> tuple[CommitJob, ...]:
        """The commits of this session that have not ended."""
        return tuple(self._jobs)

    def files_of(self, plan: Plan) -> dict[str, FileId | None]:
        """Which files of this host the layers are, as QEMU has them open: stale ones and base.

        By node-name; the external data files of the stale ones by their own.
        """
        layers = (plan.top, *plan.between, plan.base)
        paths = {image.node_name: absolute(image, self.cwd) for image in layers}
        stale = (image.data_file for image in layers[:-1] if image.data_file)
        paths |= {name: os.path.join(self.cwd or os.getcwd(), name) for name in stale}
        # What another user's monitor says is believed of what it is seen to write to.
        written = plan.two_phase and not is_ours(self.peer_pid)
        return {
            name: identify(path, self.peer_pid, written=written and name == plan.top.node_name)
            for name, path in paths.items()
        }

    async def adopt(
        self,
        job_id: str,
        *,
        policy: AskedPolicy = Hold(),  # noqa: B008  (frozen)
        pending: Literal["finalize", "cancel", "leave"] = "finalize",
        delete: bool = False,
        stale: Stale | None = None,
        on_pivot: OnPivot | None = None,
        carry_bitmaps: bool = True,
        timeout: float | None = None,
        ledger: Ledger | None = None,
    ) -> CommitJob:
        """Take up a commit job that exists already, by its id, whoever started it.

        With `Hold`, the default, it is only followed until something is decided. One that is
        PENDING already holds its disk's I/O, so it is ended at once: finalized, as somebody had
        decided it, or cancelled, which undoes that; "leave" leaves that to an owner who lives. If
        this is cancelled, the job stays as it is.

        `delete`, `stale`, `on_pivot`, `carry_bitmaps` and `timeout` are as for `commit`. Without
        the first three, what is stale is closed where the job was ended here, or is ours and its
        owner has died; of one whose owner lives that is the owner's. Bitmaps of a job that was
        started with ``auto-finalize`` are carried right before the pivot, and the outcome says so.

        `ledger` is told of each step that follows before it is taken.
        Raises `JobNotFound`, `InvalidRequest`, or `JobConflict` where it is no commit job, or its
        bitmaps can't be carried now.
        """
        from qmpcommit.commit.takeover import Asked, adopted

        asked = Asked(
            parse_policy(policy),
            pending=pending,
            stale=what_of_stale(delete, stale),
            on_pivot=on_pivot,
            carry_bitmaps=carry_bitmaps,
            timeout=None if timeout is None else parse_seconds(timeout, "timeout"),
            ledger=ledger,
        )
        asked.check()
        following = await self._launch(await adopted(self, job_id, asked))
        try:
            await following.seen()
        except asyncio.CancelledError:
            await following.detach()  # nobody has it to detach it
            raise
        return following

    async def resume(
        self,
        plan: Plan | Ledger,
        noted: Resumed | None = None,
        *,
        policy: AskedPolicy | None = None,
        files: Mapping[str, FileId | None] | None = None,
        on_pivot: OnPivot | None = None,
        on_stall: OnStall | None = None,
        converge: Converge | None = None,
        timeout: float | None = None,
        ledger: Ledger | None = None,
        barrier: Barrier | None = None,
        claim: Claim | None = None,
    ) -> CommitJob:
        """Go on with a commit whose process died: ``await vm.resume(qc.FileLedger(path))``.

        With a ledger alone it is gone on with from its last note, whatever QEMU has done meanwhile,
        also where the commit had ended: then it ends with the same outcome once more. What is no
        value has to be given again: a `policy` that was a callable, `on_pivot`, `on_stall`. What is
        left of a `timeout` or of a hold counts, if no `timeout` is given. A job that was to be
        begun, and that QEMU does not know, is begun. Raises `JobNotFound` for an empty ledger,
        `InvalidRequest` for one that can't be read, or where something is to be given again.

        Whoever keeps the pieces gives them: `plan` and `files` are what was noted with
        ``block-commit``, `noted` is the last state; the rest is as for `commit`. Whatever of it
        QEMU has done meanwhile is found by asking. `barrier` is awaited while PENDING holds the
        disk, unless what was noted says that it has been passed: it answers None, and the job is
        finalized, or why it is cancelled. A member of a group without one is cancelled there, for
        alone it must not be finalized. The disk is claimed, unless there is a `claim` or somebody
        else has it by now.
        Raises what `Monitor.execute` raises; how the commit itself ends, `CommitJob.wait` tells.
        """
        from qmpcommit.commit.claim import take_again
        from qmpcommit.commit.ledger import files_of, time_left
        from qmpcommit.commit.resuming import never_begun, noted_in, repay, taken_up
        from qmpcommit.commit.takeover import resumed

        again: Noted = {}
        if noted is None:
            assert not isinstance(plan, Plan)
            ledger, again = plan, await noted_in(self, plan)
            plan, noted = taken_up(again, policy, on_pivot, self.peer_pid)
            files, timeout = files_of(again), time_left(again) if timeout is None else timeout
            await repay(self, again, ledger)
        assert isinstance(plan, Plan)
        around = Around(
            on_pivot=on_pivot,
            on_stall=on_stall,
            files=files or {},
            cwd=self.cwd,
            converge=converge,
            ledger=ledger,
            barrier=barrier,
            gate=self.gate,
        )
        if again and await never_begun(self, again, plan):
            return await self._begin_again(plan, around, timeout)
        job = await resumed(self, plan, noted, around, timeout=timeout)
        job.claim = claim
        self._jobs.add(job)
        claims = claim is None and noted.same_vm is not False and self.connected
        job.start(
            lambda: self._jobs.discard(job), claiming=take_again(self, job) if claims else None
        )
        return job

    async def _begin_again(self, plan: Plan, around: Around, timeout: float | None) -> CommitJob:
        """A commit that was noted and never sent; the disk is looked at once more before."""
        carrying = carrying_of(await self.graph(), plan) if plan.carry_bitmaps else None
        job = CommitJob(self, plan, timeout=timeout, around=around._replace(carrying=carrying))
        return await self.launch(job)

    async def _launch(self, job: CommitJob) -> CommitJob:
        self._jobs.add(job)
        job.start(lambda: self._jobs.discard(job))
        try:
            await job.started()
        except BaseException:
            await to_the_end(job.abandon())
            raise
        return job


async def commit(
    address: str | os.PathLike[str],
    disk: str,
    **options: Unpack[SessionOptions],
) -> CommitOutcome:
    """Commit one disk from start to end: connect, commit, decide, confirm, disconnect.

    `address` is the path of a QMP monitor's Unix socket or ``tcp:HOST:PORT``. The rest is what
    `Session.commit` takes, where it is said; the active layer needs a `policy`. Raises what it
    and `CommitJob.wait` raise, `ConnectError` or `MonitorBusy`. If it is cancelled, the job is
    cancelled first.
    """
    async with VM.connect(address) as vm:
        job = await vm.commit(disk, **options)
        return await job.wait()


# ``qmpcommit.commit`` is this function; ``qmpcommit.commit.policy`` is found at it as well.
commit.__dict__ = vars(sys.modules["qmpcommit.commit"])
spelled_out(commit)
