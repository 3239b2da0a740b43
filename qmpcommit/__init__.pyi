"""The public names, for type checkers; `__init__.py` loads them when they are used."""

import os
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import Literal, Unpack

from typing_extensions import deprecated

from qmpcommit import client as client
from qmpcommit import events as events
from qmpcommit.block.chain import Disk as Disk
from qmpcommit.block.chain import Image as Image
from qmpcommit.callback import Notes
from qmpcommit.client.events import DaemonEvent as DaemonEvent
from qmpcommit.client.group import RemoteGroup as RemoteGroup
from qmpcommit.client.host import Client as Client
from qmpcommit.client.job import RemoteJob as RemoteJob
from qmpcommit.client.vm import RemoteOptions as RemoteOptions
from qmpcommit.client.vm import RemoteVM as RemoteVM
from qmpcommit.commit.converge import ConvergeReport as ConvergeReport
from qmpcommit.commit.file_ledger import FileLedger as FileLedger
from qmpcommit.commit.job import CommitJob as CommitJob
from qmpcommit.commit.ledger import Ledger as Ledger
from qmpcommit.commit.ledger import add_note as add_note
from qmpcommit.commit.outcome import CommitOutcome as CommitOutcome
from qmpcommit.commit.outcome import JobProgress as JobProgress
from qmpcommit.commit.outcome import Timings as Timings
from qmpcommit.commit.pace import Converge as Converge
from qmpcommit.commit.pending import resolve_pending as resolve_pending
from qmpcommit.commit.phases import Phase as Phase
from qmpcommit.commit.plan import Plan as Plan
from qmpcommit.commit.policy import Abort as Abort
from qmpcommit.commit.policy import AskedPolicy as AskedPolicy
from qmpcommit.commit.policy import Check as Check
from qmpcommit.commit.policy import Decision as Decision
from qmpcommit.commit.policy import Hold as Hold
from qmpcommit.commit.policy import Keep as Keep
from qmpcommit.commit.policy import Pivot as Pivot
from qmpcommit.commit.policy import Policy as Policy
from qmpcommit.commit.policy import PolicyValue as PolicyValue
from qmpcommit.commit.policy import Ready as Ready
from qmpcommit.commit.policy import Recycle as Recycle
from qmpcommit.commit.stale_layers import Stall as Stall
from qmpcommit.commit.steering import JobNow as JobNow
from qmpcommit.commit.vm import SessionOptions as SessionOptions
from qmpcommit.commit.vm import commit as commit
from qmpcommit.cycles.discarding import Discarded as Discarded
from qmpcommit.cycles.run import CycleOptions as CycleOptions
from qmpcommit.cycles.run import DiscardOptions as DiscardOptions
from qmpcommit.cycles.run import KeepAllIf as KeepAllIf
from qmpcommit.cycles.run import KeepIf as KeepIf
from qmpcommit.cycles.run import Round as Round
from qmpcommit.cycles.run import SessionCycleOptions as SessionCycleOptions
from qmpcommit.cycles.run import cycle as cycle
from qmpcommit.cycles.run import discard as discard
from qmpcommit.errors import ChainError as ChainError
from qmpcommit.errors import CommandRefused as CommandRefused
from qmpcommit.errors import CommitFailed as CommitFailed
from qmpcommit.errors import CommitNotFound as CommitNotFound
from qmpcommit.errors import ConnectError as ConnectError
from qmpcommit.errors import DaemonError as DaemonError
from qmpcommit.errors import DaemonLost as DaemonLost
from qmpcommit.errors import DaemonUnreachable as DaemonUnreachable
from qmpcommit.errors import DeadlineExceeded as DeadlineExceeded
from qmpcommit.errors import DiskNotFound as DiskNotFound
from qmpcommit.errors import GroupFailed as GroupFailed
from qmpcommit.errors import GroupSplit as GroupSplit
from qmpcommit.errors import InvalidRequest as InvalidRequest
from qmpcommit.errors import JobConflict as JobConflict
from qmpcommit.errors import JobDetached as JobDetached
from qmpcommit.errors import JobNotFound as JobNotFound
from qmpcommit.errors import KeyReused as KeyReused
from qmpcommit.errors import MonitorBusy as MonitorBusy
from qmpcommit.errors import MonitorLost as MonitorLost
from qmpcommit.errors import NoSpace as NoSpace
from qmpcommit.errors import NotReady as NotReady
from qmpcommit.errors import OnlyIfFailed as OnlyIfFailed
from qmpcommit.errors import OperationError as OperationError
from qmpcommit.errors import PolicyRequired as PolicyRequired
from qmpcommit.errors import ProtocolViolation as ProtocolViolation
from qmpcommit.errors import QmpCommitError as QmpCommitError
from qmpcommit.errors import QueueFull as QueueFull
from qmpcommit.errors import QuiesceFailed as QuiesceFailed
from qmpcommit.errors import RemoteJobDetached as RemoteJobDetached
from qmpcommit.errors import RequestError as RequestError
from qmpcommit.errors import SessionClosed as SessionClosed
from qmpcommit.errors import VMGone as VMGone
from qmpcommit.errors import VMNotFound as VMNotFound
from qmpcommit.errors import VMStateError as VMStateError
from qmpcommit.errors import WindowError as WindowError
from qmpcommit.errors import WindowNotFound as WindowNotFound
from qmpcommit.group.members import GroupMember as GroupMember
from qmpcommit.group.outcome import GroupOutcome as GroupOutcome
from qmpcommit.group.policy import AskedGroupPolicy as AskedGroupPolicy
from qmpcommit.group.policy import GroupReady as GroupReady
from qmpcommit.group.run import CommitGroupOptions as CommitGroupOptions
from qmpcommit.group.run import GroupCommit as GroupCommit
from qmpcommit.group.run import commit_group as commit_group
from qmpcommit.guest.hold import Quiet as Quiet
from qmpcommit.guest.hold import freeze as freeze
from qmpcommit.guest.run_state import thaw as thaw
from qmpcommit.offline_session import offline as offline
from qmpcommit.preloading import preload as preload
from qmpcommit.qmp.events import Event as Event
from qmpcommit.qmp.events import UnknownEvent as UnknownEvent
from qmpcommit.recovery.doing import recover as recover
from qmpcommit.recovery.findings import Finding as Finding
from qmpcommit.recovery.findings import Recovered as Recovered
from qmpcommit.recovery.resume import Outcomes as Outcomes
from qmpcommit.recovery.resume import resume as resume
from qmpcommit.session import Session as Session
from qmpcommit.window.group import snapshot as snapshot
from qmpcommit.window.overlays import LaidOverlay as LaidOverlay
from qmpcommit.window.overlays import Snapshot as Snapshot
from qmpcommit.window.records import Frozen as Frozen
from qmpcommit.window.records import GroupWindow as GroupWindow
from qmpcommit.window.records import NotedWindow as NotedWindow
from qmpcommit.window.records import OpenWindow as OpenWindow
from qmpcommit.window.records import Window as Window
from qmpcommit.window.run import OpenOptions
from qmpcommit.window.run import new_window_name as new_window_name

__version__: str

@deprecated("it is vm.open_window(disks, ...) now")
async def open_window(
    vm: Session,
    disks: Iterable[str],
    *,
    overlay_dir: str | os.PathLike[str] | None = None,
    agent: str | os.PathLike[str] | None = None,
    **options: Unpack[OpenOptions],
) -> Window: ...
@deprecated("it is qmpcommit.freeze(vm, how, ...) now")
def quiesced(
    vm: Session,
    how: Literal["agent", "pause"] | None,
    *,
    agent: str | os.PathLike[str] | None = None,
    limit: float = 10.0,
    ledger: Notes | None = None,
) -> AbstractAsyncContextManager[Quiet]: ...
@deprecated("it is vm.close_window(window, ...) now")
async def close_window(
    vm: Session,
    window: Window | Iterable[Frozen],
    *,
    bandwidth: int | str | None = None,
    ledger: Notes | None = None,
) -> list[CommitOutcome]: ...
@deprecated("it is vm.recover_window(noted, ...) now")
async def recover_window(
    vm: Session, noted: NotedWindow, *, held: bool = True
) -> Window | None: ...
