"""A session with one VM: its monitor, its disks and its commits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from qmpcommit.block.chain import Disk, Layer, absolute, find_disk, read_disks
from qmpcommit.block.graph import BlockGraph, read_graph, working_directory
from qmpcommit.block.identity import FileId, all_told_where, identify
from qmpcommit.commit.checks import Finding, check_commit, check_override, refuse
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.migration import look_at_owner
from qmpcommit.commit.objections import refuse_converge, refuse_idle
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.plan import Plan, Request, plan_commit
from qmpcommit.commit.policy import (
    AnyPolicy,
    Hold,
    PolicyCall,
    check_command,
    parse_policy,
)
from qmpcommit.commit.preconditions import (
    ask_whether,
    carrying_of,
    check_abilities,
    check_commands,
    check_free,
    check_job_id,
    check_overlays,
    told,
)
from qmpcommit.commit.stale_layers import Around, Barrier, OnPivot, OnStall
from qmpcommit.errors import (
    CommitFailed,
    InvalidRequest,
    JobConflict,
    QmpCommitError,
)
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import to_the_end
from qmpcommit.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

    from qmpcommit.commit.claim import Claim, Owner
    from qmpcommit.commit.driver import Resumed
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.pace import Converge
    from qmpcommit.cycles.flatten import Flattening
    from qmpcommit.cycles.run import CycleOptions, Discarded, DiscardOptions, KeepIf, Round
    from qmpcommit.group.outcome import GroupOutcome
    from qmpcommit.guest.quiesce import Notes
    from qmpcommit.window.records import OpenWindow, Window


class Session(Monitor):
    """A VM over its QMP monitor.

    ``async with Session.connect(path) as vm`` connects; ``Session.over(client)`` shares a
    connected `qemu.qmp.QMPClient` and leaves it connected. Leaving the block cancels the commits
    that are still running, so that none is left in READY with nobody listening.

    `private` tells that nobody else can reach what this VM exports; `gate` bounds how many
    commits, of many sessions, are cleared up after at once; `claims` are the disks that are
    held, `left_claims` those that could not be let go while the monitor was away.
    """

    def __init__(self, address: str | os.PathLike[str] | None, **options: Any) -> None:
        super().__init__(address, **options)
        self._jobs: set[CommitJob] = set()
        self.private = False
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

    # -- commits ----------------------------------------------------------------------------------

    async def plan(
        self,
        disk: str,
        *,
        policy: AnyPolicy | PolicyCall | dict[str, Any] | str | None = None,
        check: bool = True,
        **request: Any,
    ) -> Plan:
        """Check a commit without sending anything; arguments and errors are those of `commit`.

        Without `check`, the files are not looked at.
        """
        asked = Request(disk=str(disk), **request)
        policy = None if policy is None else parse_policy(policy)
        refuse_idle(policy, stale=asked.stale)
        plan, graph = await self._plan(asked, policy)
        if not check:
            return plan
        return replace(plan, findings=await self._check(plan, graph))

    async def _check(
        self, plan: Plan, graph: BlockGraph, *, probe_locks: bool = True
    ) -> list[Finding]:
        """Look at the files and the graph before the first byte."""
        return await asyncio.to_thread(
            check_commit,
            graph,
            plan,
            pid=self.peer_pid,
            cwd=self.cwd,
            probe_locks=probe_locks,
        )

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
        return await look_at_owner(self), await self.graph()

    async def _plan(
        self,
        request: Request,
        policy: Any,
        seen: tuple[str | None, BlockGraph] | None = None,
        *,
        claim: Claim | None = None,
        override: Collection[str] = (),
    ) -> tuple[Plan, BlockGraph]:
        status, graph = seen or await self.look()
        with self.sensible("the queries of its block graph"):
            disks = read_disks(graph)
        disk = find_disk(disks, request.disk, vm=self.name, cwd=self.cwd)
        if graph.claims:
            from qmpcommit.commit.claim import check_free

            check_free(self, graph, disk, claim=claim, override=override)
        plan = plan_commit(self.name, disk, request, policy, self.cwd)
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

    async def commit(
        self,
        disk: str,
        *,
        policy: AnyPolicy | PolicyCall | dict[str, Any] | str | None = None,
        base: Layer | None = None,
        top: Layer | None = None,
        shallow: bool = False,
        bandwidth: int | str | None = None,
        delete: bool = False,
        stale: Literal["leave", "rename", "delete"] | None = None,
        on_pivot: OnPivot | None = None,
        on_error: Literal["report", "stop", "ignore", "enospc"] | None = None,
        on_stall: OnStall | None = None,
        converge: Converge | None = None,
        carry_bitmaps: bool = True,
        keep_relative: bool = False,
        filter_node_name: str | None = None,
        backing_mask_protocol: bool = False,
        override: Collection[str] = (),
        only_if: Sequence[str] | None = None,
        timeout: float | None = None,
        job_id: str | None = None,
        ledger: Ledger | None = None,
        claim: Claim | None = None,
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
        `ledger` is told of each step before it is taken.

        The disk is claimed in QEMU until the job has ended, so that no two work on it at once;
        `claim` is that of whoever has claimed it already for more than this commit.

        Raises `PolicyRequired`, `DiskNotFound`, `ChainError`, `JobConflict`, `VMStateError`,
        `InvalidRequest`, `NoSpace` or `OnlyIfFailed` before anything is sent; `CommitFailed` if
        QEMU refuses the job. If this is cancelled, so is the job.
        """
        from qmpcommit.commit.claim import let_go, take_for

        clock = asyncio.get_running_loop().time
        begun = clock()
        if timeout is not None:
            timeout = parse_seconds(timeout, "timeout")
        if only_if is not None:
            only_if = check_command(only_if, "only_if")
        if delete and stale not in (None, "delete"):
            raise InvalidRequest(f"delete and stale={stale!r} exclude each other")
        request = Request(
            disk=str(disk),
            base=base,
            top=top,
            shallow=shallow,
            bandwidth=bandwidth,
            job_id=job_id,
            stale=stale or ("delete" if delete else "leave"),
            on_error=on_error,
            carry_bitmaps=carry_bitmaps,
            keep_relative=keep_relative,
            filter_node_name=filter_node_name,
            backing_mask_protocol=backing_mask_protocol,
        )
        policy = None if policy is None else parse_policy(policy)
        refuse_idle(policy, stale=request.stale, on_pivot=on_pivot)
        check_override(override)
        around = Around(on_pivot=on_pivot, on_stall=on_stall, converge=converge, ledger=ledger)
        job = await self.prepare(request, policy, around, override=override, claim=claim)
        await take_for(self, job, override=override)
        try:
            if only_if is not None:
                await ask_whether(only_if, job.plan)
            if timeout is not None:
                job.timeout, job.spent = timeout, clock() - begun
        except BaseException:
            await let_go(job)
            raise
        return await self.launch(job, override=override)

    async def prepare(
        self,
        request: Request,
        policy: AnyPolicy | PolicyCall | dict[str, Any] | str | None,
        around: Around,
        *,
        override: Collection[str] = (),
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
            plan, graph = await self._plan(request, policy, seen, claim=claim, override=override)
        except JobConflict as conflict:
            from qmpcommit.commit.pending import name_pending

            raise await name_pending(self, conflict) from None
        if around.converge is not None and not plan.two_phase:
            refuse_converge(self.name, plan.disk, plan.top)
        if request.job_id is not None and around.barrier is None:  # a group's are its own
            await check_job_id(self, plan)
        await check_free(self, plan, self.cwd)
        findings = await self._check(plan, graph, probe_locks=False)
        self._refuse(plan, findings, override)
        plan = await asyncio.to_thread(told, plan, graph, self.peer_pid)
        check_commands(plan, around.on_pivot)
        plan = replace(plan, findings=findings, policy=Hold() if held else plan.policy)
        if not plan.two_phase:
            from qmpcommit.commit.overlays_above import check_writable

            await check_writable(self, plan, graph, self.cwd, override)
        around = around._replace(
            carrying=carrying_of(graph, plan) if request.carry_bitmaps else None,
            files=await asyncio.to_thread(self._files_of, plan) if request.stale != "leave" else {},
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

    async def commit_group(
        self,
        disks: Mapping[str, AnyPolicy | PolicyCall | dict[str, Any] | str]
        | Iterable[str | tuple[str, AnyPolicy | PolicyCall | dict[str, Any] | str]],
        *,
        freeze: Literal["agent", "pause"] | None = None,
        agent: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> GroupOutcome:
        """Commit several disks at one instant: all of them or none.

        `disks` gives each its policy (a mapping, or tuples), or only names them, with one `policy`
        for all. All jobs become READY, all disks are held for some milliseconds, and all bases show
        that one instant. `freeze` quiesces the guest around it: its file systems through the guest
        agent's socket `agent`, or its vCPUs. The rest is as for `GroupCommit`, whose `run` this is.
        """
        from qmpcommit.group.run import GroupCommit

        if isinstance(disks, str):
            raise InvalidRequest(f"name the disks of a group as a list, as in ['{disks}']")
        named = disks.items() if isinstance(disks, Mapping) else disks
        members = [(self, *each) if isinstance(each, tuple) else (self, each) for each in named]
        agents = {} if agent is None else {self: agent}
        return await GroupCommit(members, freeze=freeze, agents=agents, **options).run()

    def snapshot(
        self,
        disks: Iterable[str],
        *,
        overlay_dir: str | os.PathLike[str] | None = None,
        overlay_options: Mapping[str, Any] | None = None,
        overlay_secret: str | None = None,
        freeze: Literal["agent", "pause"] | None = None,
        agent: str | os.PathLike[str] | None = None,
        bandwidth: int | str | None = None,
        ledger: Notes | None = None,
        override: Collection[str] = (),
    ) -> AbstractAsyncContextManager[Window]:
        """A window in which the disks' files stand still: ``async with vm.snapshot(["vda"])``.

        Fresh overlays, in `overlay_dir` or beside the files, are laid over all disks in one
        ``transaction``; ``window["vda"].filename`` is then one instant's image, stable with all
        below it (its `astray` says where that name is another file here, as for a QEMU in a
        container), and readable while the guest runs (where ``-blockdev`` opened the layers below
        for writing, readers need QEMU's force-share, ``qemu-img convert -U``, which does no harm
        here). They are like those files; `overlay_options` and `overlay_secret` say what those of
        a `Recycle` say. `freeze` quiesces the guest for that instant: its file systems through the
        guest agent's socket `agent`, or its vCPUs. On leaving, however the body ends, each overlay
        is committed back with at most `bandwidth` bytes per second, pivoted away and deleted.
        `ledger` is told of each step before it is
        taken; `open_window`, `close_window` and `recover_window` do the same in pieces, which may
        be done by different processes. The disks are claimed until it is closed; with "claim" in
        `override` they are taken over from whoever holds them.

        Raises `DiskNotFound`, `JobConflict`, `QuiesceFailed` or `WindowError`; if it does not
        open nothing is left of it, and if it does not close the error names the overlays that
        the guest still writes to. `WindowError` also says where somebody else has changed the
        files meanwhile, so that what was read is no instant's image.
        """
        from qmpcommit.window.run import snapshot

        return snapshot(
            self,
            disks,
            overlay_dir=overlay_dir,
            overlay_options=overlay_options,
            overlay_secret=overlay_secret,
            freeze=freeze,
            agent=agent,
            bandwidth=bandwidth,
            ledger=ledger,
            override=override,
        )

    async def windows(self) -> list[OpenWindow]:
        """The overlays of snapshot windows that are open, with their age and size."""
        from qmpcommit.window.run import windows

        return await windows(self)

    async def close_windows(
        self,
        *,
        bandwidth: int | str | None = None,
        agent: str | os.PathLike[str] | None = None,
        overlay_dir: str | os.PathLike[str] | None = None,
        override: Collection[str] = (),
    ) -> list[CommitOutcome]:
        """Close the windows that a crash has left on this VM, at whatever step.

        A guest that is still quiesced for one goes on first (`agent` is its guest agent's socket,
        where it was frozen through that); commits that were begun are taken up. Nodes and files
        that were made and are not used are removed, the files beside the disks' own and in
        `overlay_dir`. A window whose owner lives is not touched, unless "claim" is in `override`.

        Raises `WindowError` that names what stays and why, `JobConflict` that names the owners of
        what is not theirs to close who ask.
        """
        from qmpcommit.window.run import close_windows

        return await close_windows(
            self, bandwidth=bandwidth, agent=agent, overlay_dir=overlay_dir, override=override
        )

    def flatten(
        self,
        disk: str,
        *,
        keep: int,
        delete: bool = False,
        bandwidth: int | str | None = None,
        keep_relative: bool = False,
        override: Collection[str] = (),
    ) -> Flattening:
        """Bring a chain down to `keep` layers, from the bottom up: ``async for outcome in ...``.

        Each step leaves a valid chain, so it may be stopped after any; ``await`` makes all of them
        and gives their outcomes. The disk is claimed all the time. Relative backing names stay
        relative, and with `keep_relative` absolute ones become so too. `override` is as for
        `commit`. Raises what `commit` and `CommitJob.wait` raise.
        """
        from qmpcommit.cycles.flatten import flatten

        return flatten(
            self,
            disk,
            keep=keep,
            delete=delete,
            bandwidth=bandwidth,
            keep_relative=keep_relative,
            override=override,
        )

    @overload
    async def discard(self, disk: str, **options: Unpack[DiscardOptions]) -> Discarded: ...
    @overload
    async def discard(
        self, disk: list[str] | tuple[str, ...], **options: Unpack[DiscardOptions]
    ) -> tuple[Discarded, ...]: ...
    async def discard(
        self, disk: str | list[str] | tuple[str, ...], **options: Unpack[DiscardOptions]
    ) -> Discarded | tuple[Discarded, ...]:
        """Throw the active overlay's changes away: the disk starts again from its base.

        The guest stands still while a fresh, empty `overlay` (a new file, or a folder for one; by
        default beside the former) takes the former's place; then it is reset and goes on, or is
        left stopped, as `guest` says ("reset" or "stop"). A running guest's disk is never exchanged
        without that word. The overlay is like the former one; `overlay_options` and
        `overlay_secret` say what those of a `Recycle` say. With `delete` the former overlay's file
        goes. Of several disks all are
        discarded or none is; for those of several VMs there is ``qc.discard([(vm, "vda"), ...])``.
        One that was killed half-way is finished by the next.

        Not after a commit that was aborted or has failed: its base may hold part of the overlay's
        data, and is whole under it only.

        Raises `VMStateError`, `ChainError`, `JobConflict` or `CommitFailed`, and the disk and the
        guest are as they were. Rests on ``blockdev-snapshot`` and ``blockdev-reopen``.
        """
        from qmpcommit.cycles.run import discard

        ends = await discard(self._places(disk), **options)
        return ends[0] if isinstance(disk, str) else ends

    @overload
    def cycle(
        self,
        disk: str,
        *,
        keep_if: KeepIf,
        every: None = None,
        agent: str | os.PathLike[str] | None = None,
        **options: Unpack[CycleOptions],
    ) -> Coroutine[Any, Any, Round]: ...
    @overload
    def cycle(
        self,
        disk: list[str] | tuple[str, ...],
        *,
        keep_if: KeepIf,
        every: None = None,
        agent: str | os.PathLike[str] | None = None,
        **options: Unpack[CycleOptions],
    ) -> Coroutine[Any, Any, tuple[Round, ...]]: ...
    @overload
    def cycle(
        self, disk: str, *, keep_if: KeepIf, every: float, **options: Any
    ) -> AsyncIterator[Round]: ...
    @overload
    def cycle(
        self,
        disk: list[str] | tuple[str, ...],
        *,
        keep_if: KeepIf,
        every: float,
        **options: Any,
    ) -> AsyncIterator[tuple[Round, ...]]: ...
    def cycle(
        self,
        disk: str | list[str] | tuple[str, ...],
        *,
        keep_if: KeepIf,
        every: float | None = None,
        **options: Any,
    ) -> Coroutine[Any, Any, Round | tuple[Round, ...]] | AsyncIterator[Any]:
        """One round of a golden cycle: the overlay's changes go into the base, or are thrown away.

        `keep_if` says which: a command, which learns VM, disk, base and top from ``QMPCOMMIT_*``
        variables and has `timeout` seconds (exit status 0 keeps, 1 to 125 discard), or an async
        callable that is given a `Ready`. What deserves it is carried into the base by a `Recycle`,
        what does not is discarded as by `discard`; either way an empty overlay begins. `options`
        are `timeout`, those of `discard`, and `freeze` with its `agent`: what is kept is then
        taken while the guest stands still, its file systems frozen through the guest agent's
        socket `agent` ("agent"), or its vCPUs stopped, as for `commit_group` ("pause"; a recycle
        does that anyway). A discard needs none: nothing of the overlay is left.

        Of several disks it is asked once, with a `GroupReady` (a command has a line for each in
        every variable), and all are kept at one instant or all discarded; for those of several VMs
        there is ``qc.cycle([(vm, "vda"), ...])``.

        With `every` it is a round every so many seconds, as `cycles`.

        Raises `CommitFailed` where the command gives no answer, and nothing was changed; else what
        `commit` and `discard` raise.
        """
        if every is not None:
            return self.cycles(disk, every=every, keep_if=keep_if, **options)
        return self._cycle(disk, keep_if=keep_if, **options)

    async def _cycle(
        self,
        disk: str | list[str] | tuple[str, ...],
        *,
        keep_if: KeepIf,
        agent: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Round | tuple[Round, ...]:
        from qmpcommit.cycles.run import cycle

        agents = {} if agent is None else {self: agent}
        ends = await cycle(self._places(disk), keep_if=keep_if, agents=agents, **options)
        return ends[0] if isinstance(disk, str) else ends

    @overload
    def cycles(self, disk: str, *, every: float, **options: Any) -> AsyncIterator[Round]: ...
    @overload
    def cycles(
        self, disk: list[str] | tuple[str, ...], *, every: float, **options: Any
    ) -> AsyncIterator[tuple[Round, ...]]: ...
    async def cycles(
        self, disk: str | list[str] | tuple[str, ...], *, every: float, **options: Any
    ) -> AsyncIterator[Any]:
        """A round every so many seconds: ``async for round in vm.cycles("vda", every=3600, ...)``.

        `options` are those of `cycle`, whose errors end it. Stop whenever no round runs; one that
        is cancelled while it exchanges ends first.
        """
        from qmpcommit.cycles.run import cycles

        agent = options.pop("agent", None)
        agents = {} if agent is None else {self: agent}
        async for ends in cycles(self._places(disk), every=every, agents=agents, **options):
            yield ends[0] if isinstance(disk, str) else ends

    def _places(self, disk: str | list[str] | tuple[str, ...]) -> list[tuple[Session, str]]:
        return [(self, name) for name in ([disk] if isinstance(disk, str) else disk)]

    @property
    def jobs(self) -> tuple[CommitJob, ...]:
        """The commits of this session that have not ended."""
        return tuple(self._jobs)

    def _files_of(self, plan: Plan) -> dict[str, FileId | None]:
        """Which files of this host the layers are, as QEMU has them open: stale ones and base.

        By node-name; the external data files of the stale ones by their own.
        """
        layers = (plan.top, *plan.between, plan.base)
        paths = {image.node_name: absolute(image, self.cwd) for image in layers}
        stale = (image.data_file for image in layers[:-1] if image.data_file)
        paths |= {name: os.path.join(self.cwd or os.getcwd(), name) for name in stale}
        return {name: identify(path, self.peer_pid) for name, path in paths.items()}

    async def adopt(
        self,
        job_id: str,
        *,
        policy: AnyPolicy | PolicyCall | dict[str, Any] | str = Hold(),  # noqa: B008  (frozen)
        pending: Literal["finalize", "cancel"] = "finalize",
        timeout: float | None = None,
    ) -> CommitJob:
        """Take up a commit job that exists already, by its id, whoever started it.

        With `Hold`, the default, it is only followed until something is decided. One that is
        PENDING already holds its disk's I/O, so it is ended at once: finalized, as somebody had
        decided it, or cancelled, which undoes that. If this is cancelled, the job stays as it is.
        Raises `JobNotFound`, or `JobConflict` where it is no commit job.
        """
        from qmpcommit.commit.takeover import adopted

        asked = parse_policy(policy)
        following = await self._launch(
            await adopted(self, job_id, asked, undoes=pending == "cancel", timeout=timeout)
        )
        try:
            await following.seen()
        except asyncio.CancelledError:
            await following.detach()  # nobody has it to detach it
            raise
        return following

    async def resume(
        self,
        plan: Plan,
        noted: Resumed,
        *,
        files: Mapping[str, FileId | None] | None = None,
        on_pivot: OnPivot | None = None,
        on_stall: OnStall | None = None,
        converge: Converge | None = None,
        timeout: float | None = None,
        ledger: Ledger | None = None,
        barrier: Barrier | None = None,
        claim: Claim | None = None,
    ) -> CommitJob:
        """Go on with a commit whose process died, from what its `Ledger` holds.

        `plan` and `files` are what was noted with ``block-commit``, `noted` is the last state;
        the rest is as for `commit`. Whatever of it QEMU has done meanwhile is found by asking.
        `barrier` is awaited while PENDING holds the disk, unless what was noted says that it has
        been passed: it answers None, and the job is finalized, or why it is cancelled. A member
        of a group without one is cancelled there, for alone it must not be finalized. The disk is
        claimed, unless there is a `claim` or somebody else has it by now.
        Raises what `Monitor.execute` raises; how the commit itself ends, `CommitJob.wait` tells.
        """
        from qmpcommit.commit.claim import take_again
        from qmpcommit.commit.takeover import resumed

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
        job = await resumed(self, plan, noted, around, timeout=timeout)
        job.claim = claim
        self._jobs.add(job)
        claims = claim is None and noted.same_vm is not False and self.connected
        job.start(
            lambda: self._jobs.discard(job), claiming=take_again(self, job) if claims else None
        )
        return job

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
