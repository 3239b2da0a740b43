"""A session with one VM: all that the library does with it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.policy import AskedPolicy
from qmpcommit.commit.vm import VM
from qmpcommit.errors import InvalidRequest
from qmpcommit.former import former
from qmpcommit.guest.sockets import socket_of, sockets_of

if TYPE_CHECKING:
    from qmpcommit.callback import Notes
    from qmpcommit.cycles.discarding import Discarded
    from qmpcommit.cycles.flatten import Flattening
    from qmpcommit.cycles.run import (
        CycleOptions,
        DiscardOptions,
        KeepAllIf,
        KeepIf,
        Round,
        SessionCycleOptions,
    )
    from qmpcommit.group.outcome import GroupOutcome
    from qmpcommit.group.run import CommitGroupOptions
    from qmpcommit.guest.sockets import Agents
    from qmpcommit.recovery.findings import Recovered
    from qmpcommit.window.overlays import Snapshot
    from qmpcommit.window.records import Frozen, NotedWindow, OpenWindow, Window
    from qmpcommit.window.run import OpenOptions


class Session(VM):
    """A VM, and what is done with it beyond one commit: groups, windows, cycles."""

    @former(agent="agents")
    async def commit_group(
        self,
        disks: Mapping[str, AskedPolicy] | Iterable[str | tuple[str, AskedPolicy]],
        *,
        agents: Agents | None = None,
        **options: Unpack[CommitGroupOptions],
    ) -> GroupOutcome:
        """Commit several disks at one instant: all of them or none.

        `disks` gives each its policy (a mapping, or tuples), or only names them, with one `policy`
        for all. All jobs become READY, all disks are held for some milliseconds, and all bases show
        that one instant. `freeze` quiesces the guest around it: its file systems through the guest
        agent's socket `agents`, or its vCPUs. The rest is as for `GroupCommit`, whose `run` this
        is.
        """
        from qmpcommit.group.run import GroupCommit

        if isinstance(disks, str):
            raise InvalidRequest(f"name the disks of a group as a list, as in ['{disks}']")
        named = disks.items() if isinstance(disks, Mapping) else disks
        members = [(self, *each) if isinstance(each, tuple) else (self, each) for each in named]
        return await GroupCommit(members, agents=sockets_of(agents, self), **options).run()

    @former(agent="agents", overlay_dir="overlay")
    def snapshot(
        self,
        disks: Iterable[str],
        *,
        overlay: str | os.PathLike[str] | None = None,
        overlay_options: Mapping[str, Any] | None = None,
        overlay_secret: str | None = None,
        freeze: Literal["agent", "pause"] | None = None,
        agents: Agents | None = None,
        bandwidth: int | str | None = None,
        ledger: Notes | None = None,
        override: Collection[str] = (),
    ) -> AbstractAsyncContextManager[Window]:
        """A window in which the disks' files stand still: ``async with vm.snapshot(["vda"])``.

        Fresh overlays, in the folder `overlay` or beside the files, are laid over all disks in one
        ``transaction``; ``window["vda"].filename`` is then one instant's image, stable with all
        below it (its `astray` says where that name is another file here, as for a QEMU in a
        container), and readable while the guest runs (where ``-blockdev`` opened the layers below
        for writing, readers need QEMU's force-share, ``qemu-img convert -U``, which does no harm
        here). They are like those files; `overlay_options` and `overlay_secret` say what those of
        a `Recycle` say. `freeze` quiesces the guest for that instant: its file systems through the
        guest agent's socket `agents`, or its vCPUs. On leaving, however the body ends, each overlay
        is committed back with at most `bandwidth` bytes per second, pivoted away and deleted.
        `ledger` is told of each step before it is
        taken, and ``qc.resume(ledger, vm)`` closes the window of a process that was killed;
        `open_window`, `close_window` and `recover_window` do the same in pieces, which may
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
            overlay_dir=overlay,
            overlay_options=overlay_options,
            overlay_secret=overlay_secret,
            freeze=freeze,
            agent=socket_of(agents, self),
            bandwidth=bandwidth,
            ledger=ledger,
            override=override,
        )

    @former(agent="agents")
    async def overlay(
        self,
        disks: Iterable[str],
        *,
        overlay: str | os.PathLike[str] | None = None,
        overlay_options: Mapping[str, Any] | None = None,
        overlay_secret: str | None = None,
        freeze: Literal["agent", "pause"] | None = None,
        agents: Agents | None = None,
        override: Collection[str] = (),
    ) -> Snapshot:
        """Lay fresh overlays over disks, which stay: ``await vm.overlay(["vda", "vdb"])``.

        All at one instant, in one ``transaction``. From then on the guest writes to the overlays,
        and what lies below does not change any more, until a commit merges them away or carries
        what they have gathered. Each is beside the file that it lies over, or `overlay`: a new
        file, or a folder for it or them. They are like the files that they follow, dirty bitmaps
        included; `overlay_options` and `overlay_secret` say what those of a `Recycle` say. `freeze`
        quiesces the guest for that instant: its file systems through the guest agent's socket
        `agents`, or its vCPUs. With "claim" in `override` disks are taken over from whoever holds
        them.

        Raises `DiskNotFound`, `ChainError`, `JobConflict`, `CommitFailed`, `QuiesceFailed` or
        `WindowError`, and then nothing is left of it, no file and no node; or `WindowError` names
        in `overlays` those that lie nevertheless. Rests on ``blockdev-snapshot``.
        """
        from qmpcommit.window.overlays import lay_overlays

        return await lay_overlays(
            self,
            disks,
            overlay=overlay,
            overlay_options=overlay_options,
            overlay_secret=overlay_secret,
            freeze=freeze,
            agent=socket_of(agents, self),
            override=override,
        )

    @former(agent="agents", overlay_dir="overlay")
    async def open_window(
        self,
        disks: Iterable[str],
        *,
        overlay: str | os.PathLike[str] | None = None,
        agents: Agents | None = None,
        **options: Unpack[OpenOptions],
    ) -> Window:
        """Open a window that stays open until `close_window`; `snapshot` closes it by itself.

        `name` is one that ``qc.new_window_name()`` made. `ledger` is told of each step before it is
        taken: ``create`` (with `window`, a `NotedWindow`), ``freeze``, ``lay``, ``thaw``, and at
        last ``open``. From ``create`` on `recover_window` can go on in another process; a `Ledger`
        keeps what ``qc.resume`` has to know, which closes it. `meet` is awaited when the guest
        stands still, and again when the overlays are laid and it does so yet: windows of several
        VMs that meet there show one instant (``meet=asyncio.Barrier(2).wait``).

        Raises what `snapshot` raises, and then nothing is left of it.
        """
        from qmpcommit.window.run import open_window

        socket = socket_of(agents, self)
        return await open_window(self, disks, overlay_dir=overlay, agent=socket, **options)

    async def close_window(
        self,
        window: Window | Iterable[Frozen],
        *,
        bandwidth: int | str | None = None,
        ledger: Notes | None = None,
    ) -> list[CommitOutcome]:
        """Commit the overlays of a window back, pivot, close and delete them.

        `window` is what `open_window` or `recover_window` gave, or the disks that were noted. A
        commit of an overlay that a killed process left behind is taken up where it is; an overlay
        that no disk uses any more has no outcome. `ledger` is told ``close``, with the files of the
        overlays, before the first commit is sent. A cancellation is raised when it has ended.

        Raises `WindowError` that names the overlays that stay; or says, where it is closed, that
        what was read is no instant's image, for somebody else has worked on its disks.
        """
        from qmpcommit.window.run import close_window

        return await close_window(self, window, bandwidth=bandwidth, ledger=ledger)

    async def recover_window(self, noted: NotedWindow, *, held: bool = True) -> Window | None:
        """Take up a window whose process was killed at any step, from its ``create`` note on.

        The guest goes on first, whatever it was quiesced by. Then what was laid is an open window,
        which the caller may leave open or close; of what was not laid, or was closed already,
        nothing is left but what may hold data, as where the VM was started anew without it:
        `close_window` of that tells why it stays. None where no disk writes to an overlay of it.
        Safe to repeat. Whoever knows that its guest was let go on, or was never quiesced, says so
        with `held`: its agent need not answer then.

        Raises `QuiesceFailed` where the guest may still be frozen, `WindowError` where QEMU still
        creates an overlay of it.
        """
        from qmpcommit.window.run import recover_window

        return await recover_window(self, noted, held=held)

    async def windows(self) -> list[OpenWindow]:
        """The overlays of snapshot windows that are open, with their age and size."""
        from qmpcommit.window.run import windows

        return await windows(self)

    @former(agent="agents", overlay_dir="overlay")
    async def close_windows(
        self,
        *,
        bandwidth: int | str | None = None,
        agents: Agents | None = None,
        overlay: str | os.PathLike[str] | None = None,
        override: Collection[str] = (),
    ) -> list[CommitOutcome]:
        """Close the windows that a crash has left on this VM, at whatever step.

        A guest that is still quiesced for one goes on first (`agents` is its guest agent's socket,
        where it was frozen through that); commits that were begun are taken up. Nodes and files
        that were made and are not used are removed, the files beside the disks' own and in the
        folder `overlay`. A window whose owner lives is not touched, unless "claim" is in
        `override`, nor one whose file another process still reads, as a backup that has outlived
        its owner does, unless "reader" is.

        Raises `WindowError` that names what stays and why, `JobConflict` that names the owners of
        what is not theirs to close who ask.
        """
        from qmpcommit.window.run import close_windows

        return await close_windows(
            self,
            bandwidth=bandwidth,
            agent=socket_of(agents, self),
            overlay_dir=overlay,
            override=override,
        )

    @former(agent="agents")
    async def recover(
        self,
        *,
        agents: Agents | None = None,
        decide: Literal["pivot", "keep", "abort"] | None = None,
        look_only: bool = False,
        folders: Collection[str | os.PathLike[str]] = (),
        override: Collection[str] = (),
    ) -> Recovered:
        """Put right what a death has left on this VM, at whatever step.

        Of a library's process, a command or a daemon: jobs that hold a disk, recycles and discards
        that were interrupted, guests that stand still, jobs that nobody dismisses, stale nodes,
        windows, empty files, claims. The rest is as for ``qc.recover([vm1, vm2])``, which resolves
        a group over several VMs as one; `agents` is the guest agent's socket.

        Raises what `Monitor.execute` raises where the VM is away.
        """
        from qmpcommit.recovery.doing import recover

        return await recover(
            [self],
            agents=sockets_of(agents, self),
            decide=decide,
            look_only=look_only,
            folders=folders,
            override=override,
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
        **options: Unpack[SessionCycleOptions],
    ) -> Coroutine[Any, Any, Round]: ...
    @overload
    def cycle(
        self,
        disk: list[str] | tuple[str, ...],
        *,
        keep_if: KeepAllIf,
        every: None = None,
        **options: Unpack[SessionCycleOptions],
    ) -> Coroutine[Any, Any, tuple[Round, ...]]: ...
    @overload
    def cycle(
        self, disk: str, *, keep_if: KeepIf, every: float, **options: Unpack[SessionCycleOptions]
    ) -> AsyncIterator[Round]: ...
    @overload
    def cycle(
        self,
        disk: list[str] | tuple[str, ...],
        *,
        keep_if: KeepAllIf,
        every: float,
        **options: Unpack[SessionCycleOptions],
    ) -> AsyncIterator[tuple[Round, ...]]: ...
    @former(agent="agents")
    def cycle(
        self,
        disk: str | list[str] | tuple[str, ...],
        *,
        keep_if: KeepAllIf,
        every: float | None = None,
        **options: Unpack[SessionCycleOptions],
    ) -> Coroutine[Any, Any, Round | tuple[Round, ...]] | AsyncIterator[Any]:
        """One round of a golden cycle: the overlay's changes go into the base, or are thrown away.

        `keep_if` says which: a command, which learns VM, disk, base and top from ``QMPCOMMIT_*``
        variables (exit status 0 keeps, 1 to 125 discard), or an async callable that is given a
        `Ready`; it has `timeout` seconds. What deserves it is carried into the base by a `Recycle`,
        what does not is discarded as by `discard`; either way an empty overlay begins. `options`
        are `timeout`, those of `discard`, and `freeze` with its `agents`: what is kept is then
        taken while the guest stands still, its file systems frozen through the guest agent's
        socket `agents` ("agent"), or its vCPUs stopped, as for `commit_group` ("pause"; a recycle
        does that anyway). A discard needs none: nothing of the overlay is left.

        Of several disks it is asked once, with a `GroupReady` (a command has a line for each in
        every variable), and all are kept at one instant or all discarded; for those of several VMs
        there is ``qc.cycle([(vm, "vda"), ...])``.

        With `every` it is a round every so many seconds, as `cycles`.

        Raises `CommitFailed` where the command gives no answer, and nothing was changed; else what
        `commit` and `discard` raise.
        """
        if every is not None:
            return self._cycles(disk, every=every, keep_if=keep_if, **options)
        return self._cycle(disk, keep_if=keep_if, **options)

    async def _cycle(
        self,
        disk: str | list[str] | tuple[str, ...],
        *,
        keep_if: KeepAllIf,
        agents: Agents | None = None,
        **options: Unpack[CycleOptions],
    ) -> Round | tuple[Round, ...]:
        from qmpcommit.cycles.run import cycle

        sockets = sockets_of(agents, self)
        ends = await cycle(self._places(disk), keep_if=keep_if, agents=sockets, **options)
        return ends[0] if isinstance(disk, str) else ends

    @overload
    def cycles(
        self, disk: str, *, every: float, keep_if: KeepIf, **options: Unpack[SessionCycleOptions]
    ) -> AsyncIterator[Round]: ...
    @overload
    def cycles(
        self,
        disk: list[str] | tuple[str, ...],
        *,
        every: float,
        keep_if: KeepAllIf,
        **options: Unpack[SessionCycleOptions],
    ) -> AsyncIterator[tuple[Round, ...]]: ...
    @former(agent="agents")
    def cycles(
        self,
        disk: str | list[str] | tuple[str, ...],
        *,
        every: float,
        keep_if: KeepAllIf,
        **options: Unpack[SessionCycleOptions],
    ) -> AsyncIterator[Any]:
        """A round every so many seconds: ``async for round in vm.cycles("vda", every=3600, ...)``.

        `options` are those of `cycle`, whose errors end it. Stop whenever no round runs; one that
        is cancelled while it exchanges ends first.
        """
        return self._cycles(disk, every=every, keep_if=keep_if, **options)

    async def _cycles(
        self,
        disk: str | list[str] | tuple[str, ...],
        *,
        every: float,
        keep_if: KeepAllIf,
        agents: Agents | None = None,
        **options: Unpack[CycleOptions],
    ) -> AsyncIterator[Any]:
        from qmpcommit.cycles.run import cycles

        sockets = sockets_of(agents, self)
        rounds = cycles(self._places(disk), every=every, keep_if=keep_if, agents=sockets, **options)
        async for ends in rounds:
            yield ends[0] if isinstance(disk, str) else ends

    def _places(self, disk: str | list[str] | tuple[str, ...]) -> list[tuple[Session, str]]:
        return [(self, name) for name in ([disk] if isinstance(disk, str) else disk)]
