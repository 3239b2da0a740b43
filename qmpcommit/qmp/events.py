"""One pydantic model for each event that QEMU emits around disks, jobs and guests.

`parse_event` turns a QMP message into the model of its name; what it does not know, or what
does not have the members that it should, becomes an `UnknownEvent`, so that no event of any
QEMU can break its reader. Unknown members are kept (``event.model_extra``), because newer
QEMUs add them; values of QEMU's enumerations are plain texts for the same reason.

Rests on the QMP specification and on QEMU's ``qapi/*.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class Event(BaseModel):
    """Base of all events.

    `name` is the event's name; `timestamp` an aware UTC time with microseconds from QEMU's own
    clock, None where QEMU could not tell it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        populate_by_name=True,
        alias_generator=_dashed,
        defer_build=True,
    )

    name: str
    timestamp: datetime | None = None

    @property
    def job_id(self) -> str | None:
        """The id of the job that this is about; None for what is not about a job."""
        return None


class UnknownEvent(Event):
    """An event that has no model here, or whose members are not what its model needs.

    `data` are its members as they came, `problem` says what was wrong with a known event's.
    """

    data: dict[str, Any] = Field(default_factory=dict)
    problem: str | None = None


class _BlockJobEvent(Event):
    """Block jobs carry their id as ``device``."""

    type: str
    device: str

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.device


class _BlockJobProgress(_BlockJobEvent):
    """`len` and `offset` are bytes, `speed` bytes per second (0: unlimited)."""

    len: int
    offset: int
    speed: int


class BlockJobReady(_BlockJobProgress):
    """``BLOCK_JOB_READY``: the second phase has begun; somebody has to decide."""

    name: Literal["BLOCK_JOB_READY"]


class BlockJobCompleted(_BlockJobProgress):
    """``BLOCK_JOB_COMPLETED``: the job has ended, well, or with `error` if that is there."""

    name: Literal["BLOCK_JOB_COMPLETED"]
    error: str | None = None


class BlockJobCancelled(_BlockJobProgress):
    """``BLOCK_JOB_CANCELLED``: the job was cancelled by force."""

    name: Literal["BLOCK_JOB_CANCELLED"]


class BlockJobError(Event):
    """``BLOCK_JOB_ERROR``: an I/O error in a job; `action` is what QEMU does about it."""

    name: Literal["BLOCK_JOB_ERROR"]
    device: str
    operation: str
    action: str

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.device


class BlockJobPending(Event):
    """``BLOCK_JOB_PENDING``: the job waits to be finalized, and the disk's I/O with it."""

    name: Literal["BLOCK_JOB_PENDING"]
    type: str
    id: str

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.id


class JobStatusChange(Event):
    """``JOB_STATUS_CHANGE``: `status` as in ``query-jobs``."""

    name: Literal["JOB_STATUS_CHANGE"]
    id: str
    status: str

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.id


class BlockIoError(Event):
    """``BLOCK_IO_ERROR``: a guest's request failed; `nospace` where the storage is full."""

    name: Literal["BLOCK_IO_ERROR"]
    device: str
    operation: str
    action: str
    reason: str
    node_name: str | None = None
    qom_path: str | None = None
    nospace: bool = False


class BlockWriteThreshold(Event):
    """``BLOCK_WRITE_THRESHOLD``: the node's file has grown past a threshold, all in bytes."""

    name: Literal["BLOCK_WRITE_THRESHOLD"]
    node_name: str
    amount_exceeded: int
    write_threshold: int


class BlockImageCorrupted(Event):
    """``BLOCK_IMAGE_CORRUPTED``: an image is damaged; if `fatal`, it is unusable from now on."""

    name: Literal["BLOCK_IMAGE_CORRUPTED"]
    device: str
    msg: str
    fatal: bool
    node_name: str | None = None
    offset: int | None = None
    size: int | None = None


class BlockExportDeleted(Event):
    """``BLOCK_EXPORT_DELETED``: a block export is gone."""

    name: Literal["BLOCK_EXPORT_DELETED"]
    id: str


class QuorumFailure(Event):
    """``QUORUM_FAILURE``: no majority among a quorum's children."""

    name: Literal["QUORUM_FAILURE"]
    reference: str
    sector_num: int
    sectors_count: int


class QuorumReportBad(Event):
    """``QUORUM_REPORT_BAD``: one child of a quorum is wrong."""

    name: Literal["QUORUM_REPORT_BAD"]
    type: str
    node_name: str
    sector_num: int
    sectors_count: int
    error: str | None = None


class Stop(Event):
    """``STOP``: the guest's processors have stopped."""

    name: Literal["STOP"]


class Resume(Event):
    """``RESUME``: the guest's processors run again."""

    name: Literal["RESUME"]


class Reset(Event):
    """``RESET``: the machine was reset."""

    name: Literal["RESET"]
    guest: bool
    reason: str | None = None


class Shutdown(Event):
    """``SHUTDOWN``: the machine was shut down; QEMU usually ends after it."""

    name: Literal["SHUTDOWN"]
    guest: bool
    reason: str | None = None


class Powerdown(Event):
    """``POWERDOWN``: the guest was asked to power down."""

    name: Literal["POWERDOWN"]


class Suspend(Event):
    """``SUSPEND``: the guest sleeps in memory."""

    name: Literal["SUSPEND"]


class SuspendDisk(Event):
    """``SUSPEND_DISK``: the guest sleeps on disk."""

    name: Literal["SUSPEND_DISK"]


class Wakeup(Event):
    """``WAKEUP``: the guest is awake again."""

    name: Literal["WAKEUP"]


class Watchdog(Event):
    """``WATCHDOG``: the guest's watchdog ran out."""

    name: Literal["WATCHDOG"]
    action: str


class GuestPanicked(Event):
    """``GUEST_PANICKED``: the guest's kernel panicked."""

    name: Literal["GUEST_PANICKED"]
    action: str
    info: dict[str, Any] | None = None


class GuestCrashloaded(Event):
    """``GUEST_CRASHLOADED``: the guest handles its own crash."""

    name: Literal["GUEST_CRASHLOADED"]
    action: str
    info: dict[str, Any] | None = None


class DeviceDeleted(Event):
    """``DEVICE_DELETED``: a device is unplugged; `device` is its id, if it had one."""

    name: Literal["DEVICE_DELETED"]
    path: str
    device: str | None = None


class DeviceUnplugGuestError(Event):
    """``DEVICE_UNPLUG_GUEST_ERROR``: the guest refused to let a device go."""

    name: Literal["DEVICE_UNPLUG_GUEST_ERROR"]
    path: str
    device: str | None = None


class DeviceTrayMoved(Event):
    """``DEVICE_TRAY_MOVED``: a removable medium's tray opened or closed."""

    name: Literal["DEVICE_TRAY_MOVED"]
    device: str
    id: str
    tray_open: bool


class MemoryFailure(Event):
    """``MEMORY_FAILURE``: a hardware memory error, and what was done about it."""

    name: Literal["MEMORY_FAILURE"]
    recipient: str
    action: str
    flags: dict[str, Any]


class MemoryDeviceSizeChange(Event):
    """``MEMORY_DEVICE_SIZE_CHANGE``: a memory device grew or shrank (bytes)."""

    name: Literal["MEMORY_DEVICE_SIZE_CHANGE"]
    size: int
    qom_path: str
    id: str | None = None


class Migration(Event):
    """``MIGRATION``: the migration's status changed."""

    name: Literal["MIGRATION"]
    status: str


class MigrationPass(Event):
    """``MIGRATION_PASS``: another pass over memory began."""

    name: Literal["MIGRATION_PASS"]
    pass_: int = Field(alias="pass")


class PrManagerStatusChanged(Event):
    """``PR_MANAGER_STATUS_CHANGED``: a persistent-reservation helper came or went."""

    name: Literal["PR_MANAGER_STATUS_CHANGED"]
    id: str
    connected: bool


class BalloonChange(Event):
    """``BALLOON_CHANGE``: the guest's memory without the balloon, in bytes."""

    name: Literal["BALLOON_CHANGE"]
    actual: int


class RtcChange(Event):
    """``RTC_CHANGE``: the guest set its clock; `offset` in seconds."""

    name: Literal["RTC_CHANGE"]
    offset: int


class VserportChange(Event):
    """``VSERPORT_CHANGE``: a guest opened or closed a virtio-serial port (the guest agent's)."""

    name: Literal["VSERPORT_CHANGE"]
    id: str
    open: bool


AnyEvent: TypeAlias = Annotated[
    BlockJobReady
    | BlockJobCompleted
    | BlockJobCancelled
    | BlockJobError
    | BlockJobPending
    | JobStatusChange
    | BlockIoError
    | BlockWriteThreshold
    | BlockImageCorrupted
    | BlockExportDeleted
    | QuorumFailure
    | QuorumReportBad
    | Stop
    | Resume
    | Reset
    | Shutdown
    | Powerdown
    | Suspend
    | SuspendDisk
    | Wakeup
    | Watchdog
    | GuestPanicked
    | GuestCrashloaded
    | DeviceDeleted
    | DeviceUnplugGuestError
    | DeviceTrayMoved
    | MemoryFailure
    | MemoryDeviceSizeChange
    | Migration
    | MigrationPass
    | PrManagerStatusChanged
    | BalloonChange
    | RtcChange
    | VserportChange,
    Field(discriminator="name"),
]
"""Every event that has a model, discriminated by its name."""


def _models() -> dict[str, type[Event]]:
    union = AnyEvent.__args__[0].__args__
    return {model.model_fields["name"].annotation.__args__[0]: model for model in union}


MODELS = _models()
"""Event name to model."""


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_event(message: Mapping[str, Any]) -> Event:
    """The typed event of a QMP message; `UnknownEvent` where it can't be had.

    Raises ValueError only for what is no event at all.
    """
    name = message.get("event")
    if not isinstance(name, str):
        raise ValueError("a QMP event has a member 'event' that is a text")
    raw = message.get("data")
    data: dict[str, Any] = dict(raw) if isinstance(raw, Mapping) else {}
    when = _time(message.get("timestamp"))
    model = MODELS.get(name)
    if model is None:
        return UnknownEvent(name=name, timestamp=when, data=data)
    try:
        return model.model_validate({**data, "name": name, "timestamp": when})
    except ValidationError as error:
        problem = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return UnknownEvent(name=name, timestamp=when, data=data, problem=problem)


def _time(stamp: object) -> datetime | None:
    """QMP's ``{"seconds", "microseconds"}``; QEMU writes -1 where its clock failed."""
    if not isinstance(stamp, Mapping):
        return None
    seconds, microseconds = stamp.get("seconds"), stamp.get("microseconds")
    if type(seconds) is not int or type(microseconds) is not int or min(seconds, microseconds) < 0:
        return None
    try:
        return datetime.fromtimestamp(0, UTC) + timedelta(
            seconds=seconds, microseconds=microseconds
        )
    except OverflowError:
        return None
