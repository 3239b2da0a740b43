"""One pydantic model for each event that QEMU emits around disks, jobs and guests.

`parse_event` turns a QMP message into the model of its name; what it does not know, or what
does not have the members that it should, becomes an `UnknownEvent`, so that no event of any
QEMU can break its reader. Unknown members are kept (``event.model_extra``), because newer
QEMUs add them; values of QEMU's enumerations are plain texts for the same reason. Nothing is
converted on the way: `Event.to_message` gives back what came.

Members that an older QEMU does not send are optional. Each model's validator is built when the
first event of its name arrives. Rests on the QMP specification and on QEMU's ``qapi/*.json``.
"""

# Annotations are evaluated as they stand (no ``from __future__ import annotations``): pydantic
# would have to compile each of them again, which takes a few milliseconds of importing this.
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import (
    no_info_wrap_validator_function,
    plain_serializer_function_ser_schema,
)

from qmpcommit.qmp.clock import stamp_of, time_of

__all__ = [
    "MARKERS",
    "MODELS",
    "AnyEvent",
    "BalloonChange",
    "BlockExportDeleted",
    "BlockImageCorrupted",
    "BlockIoError",
    "BlockJobCancelled",
    "BlockJobCompleted",
    "BlockJobError",
    "BlockJobPending",
    "BlockJobReady",
    "BlockWriteThreshold",
    "ConnectionBack",
    "ConnectionLost",
    "DeviceDeleted",
    "DeviceTrayMoved",
    "DeviceUnplugGuestError",
    "DumpCompleted",
    "Event",
    "GuestCrashloaded",
    "GuestPanicked",
    "GuestPvshutdown",
    "JobStatusChange",
    "MemUnplugError",
    "MemoryDeviceSizeChange",
    "MemoryFailure",
    "Migration",
    "MigrationPass",
    "NicRxFilterChanged",
    "Powerdown",
    "PrManagerStatusChanged",
    "QuorumFailure",
    "QuorumReportBad",
    "Reset",
    "Resume",
    "RtcChange",
    "Shutdown",
    "SpiceConnected",
    "SpiceDisconnected",
    "SpiceInitialized",
    "SpiceMigrateCompleted",
    "Stop",
    "Suspend",
    "SuspendDisk",
    "UnknownEvent",
    "VncConnected",
    "VncDisconnected",
    "VncInitialized",
    "VserportChange",
    "Wakeup",
    "Watchdog",
    "parse_event",
]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class Event(BaseModel):
    """Base of all events.

    `name` is the event's name; `timestamp` an aware UTC time with microseconds from QEMU's own
    clock, None where QEMU could not tell it (it writes -1 then). A member of the data that has
    one of these two names is kept as ``data.name`` or ``data.timestamp``.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
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

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler, /
    ) -> CoreSchema:
        """Of `Event` itself: any event, as the QMP message that it came as, and back from that."""
        own = handler(source)
        if cls is not Event:
            return own
        return no_info_wrap_validator_function(
            _any_event, own, serialization=plain_serializer_function_ser_schema(Event.to_message)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler, /
    ) -> dict[str, Any]:
        """Of `Event` itself that of a QMP message."""
        if cls is not Event:
            return handler(schema)
        members = {"event": {"type": "string"}, "timestamp": {"type": "object"}}
        properties = {**members, "data": {"type": "object"}}
        return {"type": "object", "properties": properties, "required": ["event"]}

    def to_message(self) -> dict[str, Any]:
        """The QMP message that this was made of; without ``data`` where it has no members."""
        message: dict[str, Any] = {"event": self.name, "timestamp": stamp_of(self.timestamp)}
        data = self._members()
        if data:
            message["data"] = data
        return message

    def _members(self) -> dict[str, Any]:
        """The event's data, by QMP's names."""
        if type(self) is Event:
            return dict(self.model_extra or {})
        members = self.model_dump(by_alias=True, exclude_unset=True, exclude=set(_OWN))
        return {_NAMES.get(name, name): value for name, value in members.items()}


_OWN = {"name": "data.name", "timestamp": "data.timestamp"}
"""How data members are kept that are named like an `Event`'s own; no QAPI name has a dot."""

_NAMES = {kept: name for name, kept in _OWN.items()}


class UnknownEvent(Event):
    """An event that has no model here, or whose members are not what its model needs.

    `data` are its members as they came; `problem` says what is wrong with it, None for an
    event that merely has no model.
    """

    data: dict[str, Any] = Field(default_factory=dict)
    problem: str | None = None

    def _members(self) -> dict[str, Any]:
        return dict(self.data)


class ConnectionLost(Event):
    """No event of QEMU's: the monitor's connection is lost, and what comes meanwhile is not heard.

    Ask QEMU what it says itself (``query-jobs``) before you trust silence.
    """

    name: Literal["CONNECTION_LOST"] = "CONNECTION_LOST"


class ConnectionBack(Event):
    """No event of QEMU's: the monitor answers again; perhaps it is another QEMU's by now."""

    name: Literal["CONNECTION_BACK"] = "CONNECTION_BACK"


class _JobByDevice(Event):
    """Most events of block jobs carry the job's id as ``device``."""

    device: str

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.device


class _JobById(Event):
    """The other events of jobs carry it as ``id``."""

    id: str

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.id


class _BlockJobProgress(_JobByDevice):
    """`len` and `offset` are bytes, `speed` bytes per second (0: unlimited).

    Both `len` and `offset` can be 0, and `len` can grow: not a thing to divide by.
    """

    type: str
    len: int
    offset: int
    speed: int


class BlockJobReady(_BlockJobProgress):
    """``BLOCK_JOB_READY``: the second phase has begun; somebody has to decide."""

    name: Literal["BLOCK_JOB_READY"]


class BlockJobCompleted(_BlockJobProgress):
    """``BLOCK_JOB_COMPLETED``: the job has ended, well, or with `error` if that is there.

    Says nothing of which image is active now: pivot and keep both end with it.
    """

    name: Literal["BLOCK_JOB_COMPLETED"]
    error: str | None = None


class BlockJobCancelled(_BlockJobProgress):
    """``BLOCK_JOB_CANCELLED``: the job was cancelled by force."""

    name: Literal["BLOCK_JOB_CANCELLED"]


class BlockJobError(_JobByDevice):
    """``BLOCK_JOB_ERROR``: an I/O error in a job; `action` is what QEMU does about it.

    One for each request that failed. Which error it was is not told: the job's ``io-status``
    (``query-block-jobs``) knows whether the storage is full.
    """

    name: Literal["BLOCK_JOB_ERROR"]
    operation: str
    action: str


class BlockJobPending(_JobById):
    """``BLOCK_JOB_PENDING``: the job waits to be finalized, and the disk's I/O with it."""

    name: Literal["BLOCK_JOB_PENDING"]
    type: str


class JobStatusChange(_JobById):
    """``JOB_STATUS_CHANGE``: `status` as in ``query-jobs``."""

    name: Literal["JOB_STATUS_CHANGE"]
    status: str


class BlockIoError(Event):
    """``BLOCK_IO_ERROR``: a guest's request failed; `nospace` where the storage is full.

    `device` is empty where the drive has no alias.
    """

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
    """``BLOCK_IMAGE_CORRUPTED``: an image is damaged; if `fatal`, it is unusable from now on.

    `offset` and `size` are bytes: where, if it is about data in the image.
    """

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
    """``QUORUM_FAILURE``: no majority among a quorum's children.

    In sectors of 512 bytes; `reference` is the quorum's device, or its node.
    """

    name: Literal["QUORUM_FAILURE"]
    reference: str
    sector_num: int
    sectors_count: int


class QuorumReportBad(Event):
    """``QUORUM_REPORT_BAD``: one child of a quorum is wrong (in sectors of 512 bytes)."""

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


class GuestPvshutdown(Event):
    """``GUEST_PVSHUTDOWN``: the guest asked for a shutdown by its panic device."""

    name: Literal["GUEST_PVSHUTDOWN"]


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


class MemUnplugError(Event):
    """``MEM_UNPLUG_ERROR``: a memory device was not let go; older QEMUs only."""

    name: Literal["MEM_UNPLUG_ERROR"]
    device: str
    msg: str


class DeviceTrayMoved(Event):
    """``DEVICE_TRAY_MOVED``: a removable medium's tray opened or closed.

    `device` is the drive's alias, if it has one, else empty; `id` the device's id or QOM path.
    """

    name: Literal["DEVICE_TRAY_MOVED"]
    device: str
    id: str
    tray_open: bool


class MemoryFailure(Event):
    """``MEMORY_FAILURE``: a hardware memory error, and what was done about it.

    `recipient` tells whose memory it was, ``hypervisor`` or ``guest``.
    """

    name: Literal["MEMORY_FAILURE"]
    recipient: str
    action: str
    flags: dict[str, Any]


class MemoryDeviceSizeChange(Event):
    """``MEMORY_DEVICE_SIZE_CHANGE``: a memory device grew or shrank (bytes)."""

    name: Literal["MEMORY_DEVICE_SIZE_CHANGE"]
    size: int
    id: str | None = None
    qom_path: str | None = None


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


class DumpCompleted(Event):
    """``DUMP_COMPLETED``: a dump of the guest's memory has ended, badly if there is `error`.

    `result` is a DumpQueryResult (bytes).
    """

    name: Literal["DUMP_COMPLETED"]
    result: dict[str, Any]
    error: str | None = None


class BalloonChange(Event):
    """``BALLOON_CHANGE``: the guest's memory without the balloon, in bytes."""

    name: Literal["BALLOON_CHANGE"]
    actual: int


class RtcChange(Event):
    """``RTC_CHANGE``: the guest set its clock; `offset` in seconds."""

    name: Literal["RTC_CHANGE"]
    offset: int
    qom_path: str | None = None


class NicRxFilterChanged(Event):
    """``NIC_RX_FILTER_CHANGED``: a network card filters other frames than before.

    `nic` is the card's id, if it has one: the member that QMP calls ``name``.
    """

    name: Literal["NIC_RX_FILTER_CHANGED"]
    path: str
    nic: str | None = Field(default=None, alias="data.name")


class VserportChange(Event):
    """``VSERPORT_CHANGE``: a guest opened or closed a virtio-serial port (the guest agent's)."""

    name: Literal["VSERPORT_CHANGE"]
    id: str
    open: bool


class _Viewer(Event):
    """A viewer of the guest's screen: `server` and `client` tell the two ends' addresses."""

    server: dict[str, Any]
    client: dict[str, Any]


class VncConnected(_Viewer):
    """``VNC_CONNECTED``: a viewer has connected, not authenticated yet."""

    name: Literal["VNC_CONNECTED"]


class VncInitialized(_Viewer):
    """``VNC_INITIALIZED``: a viewer's session is active."""

    name: Literal["VNC_INITIALIZED"]


class VncDisconnected(_Viewer):
    """``VNC_DISCONNECTED``: a viewer has gone."""

    name: Literal["VNC_DISCONNECTED"]


class SpiceConnected(_Viewer):
    """``SPICE_CONNECTED``: a viewer has connected."""

    name: Literal["SPICE_CONNECTED"]


class SpiceInitialized(_Viewer):
    """``SPICE_INITIALIZED``: a viewer's channel is active."""

    name: Literal["SPICE_INITIALIZED"]


class SpiceDisconnected(_Viewer):
    """``SPICE_DISCONNECTED``: a viewer has gone."""

    name: Literal["SPICE_DISCONNECTED"]


class SpiceMigrateCompleted(Event):
    """``SPICE_MIGRATE_COMPLETED``: the viewers have moved along with a migration."""

    name: Literal["SPICE_MIGRATE_COMPLETED"]


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
    | GuestPvshutdown
    | Watchdog
    | GuestPanicked
    | GuestCrashloaded
    | DeviceDeleted
    | DeviceUnplugGuestError
    | MemUnplugError
    | DeviceTrayMoved
    | MemoryFailure
    | MemoryDeviceSizeChange
    | Migration
    | MigrationPass
    | PrManagerStatusChanged
    | DumpCompleted
    | BalloonChange
    | RtcChange
    | NicRxFilterChanged
    | VserportChange
    | VncConnected
    | VncInitialized
    | VncDisconnected
    | SpiceConnected
    | SpiceInitialized
    | SpiceDisconnected
    | SpiceMigrateCompleted,
    Field(discriminator="name"),
]
"""Every event that has a model, discriminated by its name."""


MODELS: Mapping[str, type[Event]] = {
    get_args(model.model_fields["name"].annotation)[0]: model
    for model in get_args(get_args(AnyEvent)[0])
}
"""Event name to model."""


MARKERS: Mapping[str, type[ConnectionLost] | type[ConnectionBack]] = {
    "CONNECTION_LOST": ConnectionLost,
    "CONNECTION_BACK": ConnectionBack,
}
"""What an `EventStream` tells of by itself; no QEMU can."""


def _any_event(value: Any, own: Callable[[Any], Event]) -> Event:
    """An event as it is, of a QMP message, or of the members that ``model_dump`` gives."""
    if isinstance(value, Event) or not isinstance(value, Mapping):
        return value if isinstance(value, Event) else own(value)
    if "event" in value and "name" not in value:
        marker = MARKERS.get(str(value["event"]))
        return marker() if marker is not None else parse_event(value)
    name = str(value.get("name"))
    model = MODELS.get(name) or MARKERS.get(name)
    return own(value) if model is None else model.model_validate(value)


def parse_event(message: Mapping[str, object]) -> Event:
    """The typed event of a QMP message; `UnknownEvent` where it can't be had.

    Raises ValueError only for what is no event at all.
    """
    name = message.get("event")
    if not isinstance(name, str):
        raise ValueError("a QMP event has a member 'event' that is a text")
    when = time_of(message.get("timestamp"))
    data = message.get("data", {})
    if not isinstance(data, Mapping):
        return _unknown(name, when, {}, f"its data is not an object: {data!r:.200}")
    model = MODELS.get(name)
    if model is None:
        return _unknown(name, when, data, None)
    members = {_OWN.get(member, member): value for member, value in data.items()}
    try:
        return model.model_validate({**members, "name": name, "timestamp": when})
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        problem = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in details)
        return _unknown(name, when, data, problem)


def _unknown(
    name: str, when: datetime | None, data: Mapping[str, Any], problem: str | None
) -> UnknownEvent:
    """Made without checking it, so that nothing in it can be refused."""
    return UnknownEvent.model_construct(name=name, timestamp=when, data=dict(data), problem=problem)
