"""Typed returns, as QEMU 5.2 and 11.1 answered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qmpcommit.qmp import schema
from qmpcommit.qmp.schema import (
    BlockDeviceInfo,
    BlockDirtyInfo,
    BlockExportInfo,
    BlockInfo,
    BlockJobInfo,
    ImageInfo,
    JobInfo,
    Return,
    SchemaInfo,
    StatusInfo,
    VersionInfo,
)

QCOW2 = {
    "type": "qcow2",
    "data": {"compat": "1.1", "lazy-refcounts": False, "refcount-bits": 16, "corrupt": False},
}
BASE_IMAGE: dict[str, Any] = {
    "virtual-size": 67108864, "filename": "/vm/base.qcow2", "cluster-size": 65536,
    "format": "qcow2", "actual-size": 200704, "format-specific": QCOW2, "dirty-flag": False,
}  # fmt: skip
TOP_IMAGE: dict[str, Any] = {
    "backing-filename-format": "qcow2", "virtual-size": 67108864, "filename": "/vm/top.qcow2",
    "cluster-size": 65536, "format": "qcow2", "actual-size": 4460544, "format-specific": QCOW2,
    "full-backing-filename": "/vm/base.qcow2", "backing-filename": "base.qcow2",
    "dirty-flag": False,
}  # fmt: skip
LIMITS = {"request-alignment": 1, "min-mem-alignment": 1, "opt-mem-alignment": 4096}
BITMAP: dict[str, Any] = {
    "name": "bm0", "recording": True, "persistent": True, "busy": False, "granularity": 65536,
    "count": 131072,
}  # fmt: skip
NODE: dict[str, Any] = {
    "iops_rd": 0, "detect_zeroes": "off", "image": TOP_IMAGE, "iops_wr": 1, "ro": False,
    "node-name": "top", "backing_file_depth": 1, "drv": "qcow2", "iops": 2, "bps_wr": 3,
    "write_threshold": 4, "backing_file": "base.qcow2", "encrypted": False, "bps": 5, "bps_rd": 6,
    "cache": {"no-flush": False, "direct": True, "writeback": True}, "file": "/vm/top.qcow2",
}  # fmt: skip
NODES = {
    "5.2": {**NODE, "dirty-bitmaps": [{**BITMAP, "status": "active"}],
            "encryption_key_missing": False},
    "11.1": {**NODE, "dirty-bitmaps": [BITMAP], "active": True,
             "image": {**TOP_IMAGE, "limits": LIMITS},
             "children": [{"node-name": "base", "child": "backing"},
                          {"node-name": "top-file", "child": "file"}]},
}  # fmt: skip
DEVICE: dict[str, Any] = {
    "io-status": "ok", "device": "", "locked": False, "removable": False, "type": "unknown",
    "qdev": "/machine/peripheral/vd0/virtio-backend",
    "inserted": {**NODE, "image": {**TOP_IMAGE, "backing-image": BASE_IMAGE}},
}  # fmt: skip
CONCLUDED = {
    "auto-finalize": True, "io-status": "ok", "device": "j", "auto-dismiss": False, "busy": False,
    "len": 4194304, "offset": 65536, "status": "concluded", "paused": False, "speed": 7,
    "ready": False, "type": "commit", "error": "Operation canceled",
}  # fmt: skip
JOB = {"current-progress": 5, "status": "ready", "total-progress": 6, "type": "commit", "id": "j"}
VERSION = {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": "Debian 1:11.1.3+ds-1"}
EXPORT = {"id": "e", "type": "nbd", "node-name": "top", "shutting-down": False}

REPLIES: list[tuple[type[Return], dict[str, Any]]] = [
    (BlockDeviceInfo, NODES["5.2"]),
    (BlockDeviceInfo, NODES["11.1"]),
    (BlockInfo, DEVICE),
    (BlockInfo, {"device": "cd0", "locked": False, "removable": True, "tray_open": True,
                 "type": "unknown"}),
    (ImageInfo, TOP_IMAGE),
    (BlockDirtyInfo, BITMAP),
    (BlockJobInfo, CONCLUDED),
    (BlockJobInfo, {**CONCLUDED, "type": "mirror", "actively-synced": True}),
    (JobInfo, JOB),
    (JobInfo, {**JOB, "error": "No space left on device"}),
    (StatusInfo, {"status": "prelaunch", "singlestep": False, "running": False}),
    (StatusInfo, {"status": "running", "running": True}),
    (VersionInfo, VERSION),
    (BlockExportInfo, EXPORT),
    (SchemaInfo, {"name": "block-job-complete", "meta-type": "command", "arg-type": "62",
                  "ret-type": "0", "features": ["deprecated"]}),
    (SchemaInfo, {"name": "STOP", "meta-type": "event", "arg-type": "0"}),
    (SchemaInfo, {"name": "7", "meta-type": "object", "tag": "type", "members": [
        {"name": "type", "type": "8"}], "variants": [{"case": "x", "type": "0"}]}),
    (SchemaInfo, {"name": "8", "meta-type": "enum", "values": ["x"], "members": [{"name": "x"}]}),
    (SchemaInfo, {"name": "[8]", "meta-type": "array", "element-type": "8"}),
    (SchemaInfo, {"name": "int", "meta-type": "builtin", "json-type": "int"}),
    (SchemaInfo, {"name": "9", "meta-type": "alternate", "members": [{"type": "str"}]}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "reply"), REPLIES)
def test_replies_parse_and_come_back(model: type[Return], reply: dict[str, Any]) -> None:
    value = model.model_validate(reply)
    assert value.model_dump(by_alias=True, exclude_unset=True) == reply
    assert model.model_validate_json(value.model_dump_json(by_alias=True)) == model.model_validate(
        value.model_dump(by_alias=True)
    )


def test_only_what_is_new_or_old_has_no_field() -> None:
    extra = {
        (type(value).__name__, name)
        for value in (model.model_validate(reply) for model, reply in REPLIES)
        for name in value.model_extra or {}
    }
    assert extra == {("BlockDeviceInfo", "encryption_key_missing"), ("StatusInfo", "singlestep")}


def test_a_chain_is_nested() -> None:
    device = BlockInfo.model_validate(DEVICE)
    assert device.inserted is not None
    assert (device.qdev, device.inserted.node_name) == (DEVICE["qdev"], "top")
    below = device.inserted.image.backing_image
    assert isinstance(below, ImageInfo)
    assert (below.filename, below.virtual_size, below.actual_size) == (
        "/vm/base.qcow2", 67108864, 200704)  # fmt: skip
    assert below.backing_image is None


def test_attributes_of_a_node() -> None:
    node = BlockDeviceInfo.model_validate(NODES["11.1"])
    assert (node.drv, node.file, node.ro, node.active) == ("qcow2", "/vm/top.qcow2", False, True)
    assert (node.backing_file, node.backing_file_depth) == ("base.qcow2", 1)
    assert (node.iops_wr, node.iops, node.bps_wr, node.write_threshold) == (1, 2, 3, 4)
    assert (node.bps, node.bps_rd, node.detect_zeroes) == (5, 6, "off")
    assert node.cache is not None
    assert (node.cache.direct, node.cache.no_flush) == (True, False)
    assert node.children is not None
    assert [(edge.child, edge.node_name) for edge in node.children] == [
        ("backing", "base"), ("file", "top-file")]  # fmt: skip
    assert node.image.model_extra == {"limits": LIMITS}
    assert node.dirty_bitmaps is not None
    (bitmap,) = node.dirty_bitmaps
    assert (bitmap.name, bitmap.count, bitmap.granularity) == ("bm0", 131072, 65536)
    assert (bitmap.persistent, bitmap.busy, bitmap.inconsistent) == (True, False, False)


def test_attributes_of_jobs() -> None:
    block_job = BlockJobInfo.model_validate(CONCLUDED)
    assert block_job.job_id == block_job.device == "j"
    assert (block_job.len, block_job.offset, block_job.speed) == (4194304, 65536, 7)
    assert (block_job.auto_finalize, block_job.auto_dismiss) == (True, False)
    assert (block_job.io_status, block_job.error) == ("ok", "Operation canceled")
    assert block_job.actively_synced is None
    job = JobInfo.model_validate(JOB)
    assert (job.id, job.current_progress, job.total_progress, job.error) == ("j", 5, 6, None)


def test_attributes_of_the_rest() -> None:
    version = VersionInfo.model_validate(VERSION)
    assert (version.qemu.major, version.qemu.minor, version.qemu.micro) == (11, 1, 3)
    export = BlockExportInfo.model_validate(EXPORT)
    assert (export.node_name, export.shutting_down) == ("top", False)
    entry = SchemaInfo.model_validate({"name": "stop", "meta-type": "command", "ret-type": "0"})
    assert (entry.meta_type, entry.ret_type, entry.arg_type, entry.features) == (
        "command", "0", None, [])  # fmt: skip


def test_new_values_of_enumerations_are_no_error() -> None:
    assert JobInfo.model_validate({**JOB, "status": "levitating"}).status == "levitating"
    assert BlockJobInfo.model_validate({**CONCLUDED, "io-status": "odd"}).io_status == "odd"
    assert StatusInfo.model_validate({"status": "odd", "running": True}).status == "odd"


def test_returns_are_frozen() -> None:
    job = JobInfo.model_validate(JOB)
    with pytest.raises(ValidationError):
        job.status = "null"


@given(
    st.sampled_from(REPLIES),
    st.dictionaries(
        st.text(max_size=8).map("x-{}".format), st.none() | st.integers() | st.text(), max_size=3
    ),
)
def test_unknown_members_are_kept(
    case: tuple[type[Return], dict[str, Any]], more: dict[str, Any]
) -> None:
    model, reply = case
    value = model.model_validate({**reply, **more})
    assert more.items() <= (value.model_extra or {}).items()
    assert value.model_dump(by_alias=True, exclude_unset=True) == {**reply, **more}


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValidationError, match="current-progress"):
        JobInfo.model_validate({"id": "j", "type": "commit", "status": "ready"})


def test_every_model_has_been_read_here() -> None:
    every = {
        value for value in vars(schema).values()
        if isinstance(value, type) and issubclass(value, Return) and value is not Return
    }  # fmt: skip
    nested = {schema.NodeChild, schema.BlockdevCacheInfo, schema.VersionTriple}
    assert every == {model for model, _ in REPLIES} | nested
