"""What a fresh overlay is, as a function of what it follows."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.chain import Disk
from qmpcommit.block.command_line import parse_command_line, read_command_line
from qmpcommit.commit.overlay.like import declared_options, iteration_time, likeness, unfit
from qmpcommit.commit.overlay.options import OverlayOptions
from tests.unit.test_checks import layer, made, protocol

NONE = OverlayOptions()


def like(*nodes: dict[str, Any], asked: OverlayOptions = NONE, **more: Any) -> Any:
    graph, _ = made(*nodes)
    given = {"declared": {}, "file_declared": {}, "encrypted": False, "lasting": True, **more}
    return likeness(graph, "top", asked, **given)


@pytest.mark.parametrize(
    ("data", "made_so"),
    [
        ({"compat": "1.1", "lazy-refcounts": False, "compression-type": "zlib"}, {}),
        (
            {
                "compat": "1.1", "lazy-refcounts": True, "refcount-bits": 64,
                "compression-type": "zstd", "extended-l2": True,
            },
            {
                "lazy-refcounts": True, "refcount-bits": 64, "compression-type": "zstd",
                "extended-l2": True,
            },
        ),
        ({"compat": "0.10"}, {"version": "v2"}),
    ],
)  # fmt: skip
def test_an_overlay_is_formatted_as_the_one_before(data: Any, made_so: Any) -> None:
    assert like(layer("top", data=data)).create == {"cluster-size": 65536, **made_so}


def test_what_only_lasts_for_a_window_can_hold_what_windows_need() -> None:
    assert like(layer("top", data={"compat": "0.10"}), lasting=False).create == {
        "cluster-size": 65536
    }


def test_over_another_format_qemu_says_how() -> None:
    assert like(layer("top", "raw")).create == {}
    graph, _ = made()
    asked = OverlayOptions({"discard": "unmap", "file": {"aio": "native"}})
    gone = likeness(graph, "gone", asked, declared=None, file_declared=None, encrypted=False,
                    lasting=True)  # fmt: skip
    assert gone == ({}, {"discard": "unmap"}, {"aio": "native"}, ())


DIRECT = {"cache": {"writeback": True, "direct": True, "no-flush": False}}


@pytest.mark.parametrize(
    ("top", "below", "more", "node", "file"),
    [
        ({}, {}, {}, {}, {}),
        (DIRECT, DIRECT, {}, {"cache": {"direct": True}}, {"cache": {"direct": True}}),
        ({"detect_zeroes": "on"}, {}, {}, {"detect-zeroes": "on"}, {}),
        ({"detect_zeroes": "unmap"}, {}, {}, {"detect-zeroes": "unmap", "discard": "unmap"}, {}),
        (
            {}, {},
            {"declared": {"discard": "on"}, "file_declared": {"discard": "unmap", "aio": "native",
                                                              "locking": "off"}},
            {"discard": "unmap"}, {"discard": "unmap", "aio": "native", "locking": "off"},
        ),
        (  # within its parent: QEMU has it discard
            {}, {}, {"declared": {"file.aio": "io_uring"}, "file_declared": None},
            {}, {"discard": "unmap", "aio": "io_uring"},
        ),
        (  # a -drive
            {}, {}, {"declared": {"discard": "unmap", "aio": "native", "file.locking": "off"},
                     "file_declared": None},
            {"discard": "unmap"}, {"discard": "unmap", "aio": "native", "locking": "off"},
        ),
    ],
)  # fmt: skip
def test_an_overlay_is_opened_as_the_one_before(
    top: Any, below: Any, more: Any, node: Any, file: Any
) -> None:
    found = like({**layer("top"), **top}, {**protocol("top"), **below}, **more)
    assert (found.node, found.file, found.warnings) == (node, file, ())


def test_what_is_asked_for_counts() -> None:
    asked = OverlayOptions({"cache": {"no-flush": True}, "l2-cache-size": 1, "file": {"aio": "x"}})
    found = like({**layer("top"), **DIRECT}, asked=asked, declared=None)
    assert found.node == {"cache": {"direct": True, "no-flush": True}, "l2-cache-size": 1}
    assert found.file == {"aio": "x"}
    assert found.warnings == ()


def test_what_may_be_lost_is_told() -> None:
    (told,) = like(declared=None).warnings
    assert "discard, aio and locking" in told
    assert like(declared=None, lasting=False).warnings == ()


def luks(name: str) -> dict[str, Any]:
    slots = [{"active": True, "iters": 1}, {"active": False}]
    own = {"format": "luks", "cipher-alg": "aes-256", "uuid": "u", "slots": slots}
    data = {"encrypt": own}
    return layer(name, encrypted=True, data=data)


def test_an_encrypted_disk_gets_an_encrypted_overlay_or_none() -> None:
    secret = OverlayOptions(secret="s0")
    found = like(luks("top"), asked=secret, encrypted=True)
    key = {"format": "luks", "key-secret": "s0"}
    assert found.create["encrypt"] == {**key, "cipher-alg": "aes-256", "iter-time": 1}
    assert iteration_time("unheard of", 1) == iteration_time("sha256", 1 << 60) == 2000
    assert found.node["encrypt"] == key
    for node in (luks("top"), luks("base"), protocol("top", "luks")):
        graph, _ = made(node)
        assert "in clear" in str(unfit(graph, "top", "base", NONE))
        assert unfit(graph, "top", "base", secret) is None
    graph, _ = made()
    assert "not encrypted" in str(unfit(graph, "top", "base", secret))
    assert unfit(graph, "top", "base", NONE) is None


def test_a_layer_whose_data_are_elsewhere_is_followed_by_a_window_only() -> None:
    graph, _ = made(protocol("data"), joined=("top data-file data-file",))
    assert "data_file" in str(unfit(graph, "top", "base", NONE))
    assert unfit(graph, "top", "base", NONE, lasting=False) is None


@pytest.mark.parametrize(
    "options",
    ["[]", "{", {"driver": "raw"}, {"file": "node"}, {"file": {"filename": "/x"}},
     {"encrypt": {}}],
)  # fmt: skip
def test_what_can_not_be_asked_for_is_refused(options: Any) -> None:
    with pytest.raises(qc.InvalidRequest, match="overlay_options"):
        OverlayOptions.of(options)


def test_a_policy_carries_what_is_asked() -> None:
    policy = qc.Recycle("f", overlay_options={"file": {"aio": "native"}}, overlay_secret="s0")
    again = qc.Recycle.model_validate_json(policy.model_dump_json())
    assert again == policy
    assert again.asked == OverlayOptions({"file": {"aio": "native"}}, "s0")
    with pytest.raises(qc.InvalidRequest, match="secret"):
        qc.Recycle("f", overlay_secret="")


LINE = [
    "qemu", "-blockdev", json.dumps({"driver": "file", "node-name": "f", "filename": "/a,b",
                                     "aio": "native", "discard": "unmap"}),
    "-blockdev", "driver=qcow2,node-name=n,file=f,discard=unmap",
    "-blockdev", "driver=qcow2,node-name=m,file.driver=file,file.node-name=mf,file.aio=native",
    "-blockdev", "{",
    "-drive", "if=none,id=d,file=/x,,y,discard=unmap", "-drive", "file=/z,aio=native",
    "-device", "virtio-blk-pci,drive=n,id=vda", "-device", "virtio-blk-pci,drive=d,id=vdb",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "disk", "ours", "discard", "below"),
    [
        ("n", Disk("vda"), False, "unmap", "unmap"),
        ("m", Disk("vdm"), False, None, None),
        ("mf", Disk("vdm"), False, None, None),
        ("other", Disk("vda", qdev="vda"), False, "unknown", "unknown"),
        ("other", Disk("vda", qdev="vda"), True, "unmap", "unmap"),
        ("other", Disk("vdb", qdev="vdb"), True, "unmap", None),
        ("other", Disk("vdc"), True, "unknown", "unknown"),
        ("#block1", Disk("d", device="d"), False, "unmap", None),
        ("#block2", Disk("z", device="z"), False, None, None),
        ("#block3", Disk("q", device="q"), False, "unknown", "unknown"),
    ],
)
def test_the_command_line_tells_what_no_query_does(
    name: str, disk: Disk, ours: bool, discard: str | None, below: str | None
) -> None:
    file = {"#block2": "/z"}.get(name, "/i/top")
    graph, _ = made({**layer("top", filename=file), "node-name": name})
    line = parse_command_line(LINE)
    declared, file_declared = declared_options(line, graph, disk, name, ours=ours)
    assert (declared or {"discard": "unknown"}).get("discard") == discard
    if below != "unknown":
        assert (file_declared or {}).get("discard") == below
    assert declared_options(None, graph, disk, name, ours=ours) == (None, None)


def test_a_command_line_is_read_where_it_can_be() -> None:
    assert read_command_line(os.getpid()) is not None
    assert read_command_line(None) is None
