"""Typed returns of the queries that a VM manager asks around its disks.

Frozen pydantic models; members that a newer QEMU adds are kept (``model_extra``), values of
enumerations are plain texts. Sizes are bytes. Rests on QEMU's ``qapi/block-core.json``,
``qapi/job.json``, ``qapi/run-state.json`` and ``qapi/introspect.json``.
"""

from __future__ import annotations

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


class DirtyBitmap(Return):
    """BlockDirtyInfo: one dirty bitmap of a node; `count` is what it marks, in bytes."""

    name: str | None = None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool = False


class ImageInfo(Return):
    """ImageInfo: an image file as QEMU has opened it."""

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
    backing_image: ImageInfo | None = None
    format_specific: dict[str, Any] | None = None


class NodeChild(Return):
    """BlockdevChild: an edge of the block graph, told since QEMU 10.1."""

    child: str
    node_name: str


class BlockDeviceInfo(Return):
    """BlockDeviceInfo: a block node and its limits (rates in bytes or requests per second)."""

    file: str
    node_name: str | None = None
    ro: bool
    drv: str
    backing_file: str | None = None
    backing_file_depth: int
    encrypted: bool
    detect_zeroes: str
    bps: int
    bps_rd: int = Field(alias="bps_rd")
    bps_wr: int = Field(alias="bps_wr")
    iops: int
    iops_rd: int = Field(alias="iops_rd")
    iops_wr: int = Field(alias="iops_wr")
    image: ImageInfo
    write_threshold: int = Field(alias="write_threshold")
    dirty_bitmaps: list[DirtyBitmap] | None = None
    children: list[NodeChild] | None = None
    active: bool | None = None


class BlockInfo(Return):
    """BlockInfo: a guest's device and the medium in it."""

    device: str
    qdev: str | None = None
    type: str = ""
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | None = None
    tray_open: bool | None = Field(default=None, alias="tray_open")
    io_status: str | None = None


class BlockJobInfo(Return):
    """BlockJobInfo: a block job; `device` is its id, `len` and `offset` are bytes."""

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


class JobInfo(Return):
    """JobInfo: a job of any kind and how far it is."""

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
    """SchemaInfo: one entry of QEMU's description of its own protocol."""

    name: str
    meta_type: str
    features: list[str] = Field(default_factory=list)
