"""Typed returns of the queries that a VM manager asks around its disks.

Frozen pydantic models named as in QAPI; members that a newer QEMU adds are kept
(``model_extra``), those that an older one does not tell are optional, values of enumerations
are plain texts. Sizes are bytes. Rests on QEMU's ``qapi/block-core.json``,
``qapi/block-export.json``, ``qapi/job.json``, ``qapi/run-state.json``, ``qapi/control.json``
and ``qapi/introspect.json``.
"""

# No ``from __future__ import annotations``: see `qmpcommit.qmp.events`.
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class Return(BaseModel):
    """Base of all returns."""

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        populate_by_name=True,
        alias_generator=_dashed,
        defer_build=True,
    )


class BlockDirtyInfo(Return):
    """BlockDirtyInfo: one dirty bitmap of a node; `count` is what it marks, in bytes.

    A bitmap without a `name` belongs to a job. `busy` ones are in use by an operation;
    `inconsistent` ones were not closed properly and can only be removed.
    """

    name: str | None = None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool = False


class ImageInfo(Return):
    """ImageInfo: an image file as QEMU has opened it, and in `backing_image` what is below.

    `virtual_size` is what the guest sees, `actual_size` what it takes on the host.
    """

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None = None
    dirty_flag: bool | None = None
    cluster_size: int | None = None
    encrypted: bool | None = None
    compressed: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    snapshots: list[dict[str, Any]] | None = None
    backing_image: "ImageInfo | None" = None
    format_specific: dict[str, Any] | None = None


class NodeChild(Return):
    """BlockdevChild: an edge of the block graph; not every QEMU tells them."""

    child: str
    node_name: str


class BlockdevCacheInfo(Return):
    """BlockdevCacheInfo: how a node caches."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockDeviceInfo(Return):
    """BlockDeviceInfo: a block node and its limits (rates in bytes or requests per second).

    `backing_file_depth` counts the layers below; a flat ``query-named-block-nodes`` does not
    tell them, so it is 0 and the `image` has no `backing_image` there. `write_threshold` is 0
    where none is set.
    """

    file: str
    node_name: str | None = None
    ro: bool
    drv: str
    backing_file: str | None = Field(default=None, alias="backing_file")
    backing_file_depth: int = Field(alias="backing_file_depth")
    encrypted: bool
    detect_zeroes: str = Field(alias="detect_zeroes")
    bps: int
    bps_rd: int = Field(alias="bps_rd")
    bps_wr: int = Field(alias="bps_wr")
    iops: int
    iops_rd: int = Field(alias="iops_rd")
    iops_wr: int = Field(alias="iops_wr")
    image: ImageInfo
    cache: BlockdevCacheInfo | None = None
    write_threshold: int = Field(alias="write_threshold")
    dirty_bitmaps: list[BlockDirtyInfo] | None = None
    children: list[NodeChild] | None = None
    active: bool | None = None


class BlockInfo(Return):
    """BlockInfo: a guest's device and the medium in it.

    `device` is the drive's alias, empty for one that was attached by node-name; `qdev` the
    device's id or QOM path. `inserted` is the node that the guest uses, None without a medium.
    """

    device: str
    qdev: str | None = None
    type: str = ""
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | None = None
    tray_open: bool | None = Field(default=None, alias="tray_open")
    io_status: str | None = None


class BlockJobInfo(Return):
    """BlockJobInfo: a block job; `device` is its id, `len` and `offset` are bytes.

    `speed` is a limit in bytes per second, 0 for none. Go by `status`: `paused` and `ready` say
    less than their names (a job that waits to be finalized is paused and not ready).
    `actively_synced` is told of mirrors only.
    """

    type: str
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: str
    ready: bool
    status: str
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None
    actively_synced: bool | None = None

    @property
    def job_id(self) -> str:
        """The job's id, by the name that it has elsewhere."""
        return self.device


class JobInfo(Return):
    """JobInfo: a job of any kind and how far it is, in a unit of the job's own choice.

    A concluded job has an `error` if it failed or was cancelled.
    """

    id: str
    type: str
    status: str
    current_progress: int
    total_progress: int
    error: str | None = None


class StatusInfo(Return):
    """StatusInfo: whether the guest runs."""

    running: bool
    status: str


class VersionTriple(Return):
    """QEMU's version number."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"


class VersionInfo(Return):
    """VersionInfo: for people; what QEMU can do is asked of its schema."""

    qemu: VersionTriple
    package: str


class BlockExportInfo(Return):
    """BlockExportInfo: a node served to others."""

    id: str
    type: str
    node_name: str
    shutting_down: bool


class SchemaInfo(Return):
    """SchemaInfo: one entry of QEMU's description of its own protocol.

    `name` is real for commands and events and made up for types (``"217"``). Which of the
    others an entry has depends on its `meta_type`: a command has `arg_type`, `ret_type` and
    `allow_oob`; an event `arg_type`; an object `members`, and if it is a union `tag` and
    `variants`; an alternate `members`; an enum `values`; an array `element_type`; a builtin
    `json_type`. `members` are told raw, for a newer QEMU's enum has them too.
    """

    name: str
    meta_type: str
    features: list[str] = Field(default_factory=list)
    arg_type: str | None = None
    ret_type: str | None = None
    allow_oob: bool | None = None
    members: list[dict[str, Any]] | None = None
    tag: str | None = None
    variants: list[dict[str, Any]] | None = None
    values: list[str] | None = None
    element_type: str | None = None
    json_type: str | None = None
