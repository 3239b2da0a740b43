"""The checks before the first byte, on graphs and files made for them."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block import files, identity
from qmpcommit.block.chain import find_disk, read_disks
from qmpcommit.block.command_line import parse_command_line
from qmpcommit.block.graph import BlockGraph, build_graph
from qmpcommit.commit.checks import NAMES, Finding, check_commit, growth, read_only, refuse
from qmpcommit.commit.plan import Plan, plan_commit
from qmpcommit.commit.request import Request
from tests.ground.images import MIB
from tests.unit.test_chain import edges

Raw = dict[str, Any]
SIZE = 1024 * MIB


def layer(name: str, drv: str = "qcow2", held: int = 8 * MIB, **more: Any) -> Raw:
    """A format node; `more` are members of its image, `data` of its format's."""
    image: Raw = {"filename": f"/i/{name}", "virtual-size": SIZE, "actual-size": held}
    if drv == "qcow2":
        image["cluster-size"] = 65536
        image["format-specific"] = {"type": "qcow2", "data": {"refcount-bits": 16}}
    below = {"base": None, "mid": "base", "top": "mid"}.get(name)
    if below:
        image["backing-filename"] = image["full-backing-filename"] = f"/i/{below}"
    data = more.pop("data", {})
    image.update(more)
    if data:
        image.setdefault("format-specific", {"data": {}})["data"].update(data)
    return {"node-name": name, "drv": drv, "file": f"/i/{name}", "ro": False,
            "image": image}  # fmt: skip


def protocol(name: str, drv: str = "file", length: int = SIZE, **more: Any) -> Raw:
    image = {"filename": f"/i/{name}", "virtual-size": length, "actual-size": 0}
    return {"node-name": f"{name}-file", "drv": drv, "file": f"/i/{name}", "ro": False,
            "image": image, **more}  # fmt: skip


def made(
    *nodes: Raw,
    joined: tuple[str, ...] = (),
    devices: list[Raw] | None = None,
    exports: list[Raw] | None = None,
    **request: Any,
) -> tuple[BlockGraph, Plan]:
    """``base <- mid <- top``, committed as `request` says; `nodes` replace these or are more."""
    usual = [make(name) for name in ("top", "mid", "base") for make in (layer, protocol)]
    graph = build_graph(
        {node["node-name"]: node for node in (*usual, *nodes)}.values(),
        [{"device": "", "qdev": "vda", "inserted": {"node-name": "top"}}, *(devices or ())],
        exports or [],
        edges(
            "top top-file file", "top mid backing", "mid mid-file file", "mid base backing",
            "base base-file file", *joined,
        ),
    )  # fmt: skip
    disk = find_disk(read_disks(graph), "vda", vm="v")
    policy = None if "top" in request else qc.Keep()
    return graph, plan_commit("v", disk, Request("vda", policy, **request))


def found(name: str, graph: BlockGraph, plan: Plan, **options: Any) -> list[Finding]:
    findings = check_commit(graph, plan, **options)
    assert list(dict.fromkeys(f.name for f in findings)) == list(NAMES)
    return [f for f in findings if f.name == name]


def level(name: str, graph: BlockGraph, plan: Plan) -> str:
    (finding,) = [f for f in found(name, graph, plan) if "locks of other" not in f.message] or [
        Finding(name, "ok", "")
    ]
    return finding.level


def test_a_sound_chain() -> None:
    graph, plan = made()
    findings = check_commit(graph, plan)
    assert {f.level for f in findings} == {"ok", "note"}
    notes = [f for f in findings if f.level == "note"]
    assert [f.name for f in notes] == ["free-space", "base-shared", "replaced-file"]
    assert all("not known to run on this host" in f.message for f in notes)
    refuse(findings)


# -- what the base grows by ---------------------------------------------------------------------


def test_growth_is_what_the_layers_hold() -> None:
    data, needed = growth(*made())
    assert data == 16 * MIB
    assert data < needed < data + MIB


def test_growth_is_bounded_by_the_virtual_size() -> None:
    data, needed = growth(*made(layer("top", held=5 * SIZE), layer("base", held=0)))
    assert data == SIZE
    assert SIZE < needed < SIZE + MIB


def test_growth_of_a_raw_base_needs_no_tables() -> None:
    raw = layer("base", "raw", held=0)
    assert growth(*made(raw)) == (16 * MIB, 16 * MIB)


def test_a_base_that_holds_everything_does_not_grow() -> None:
    big = layer("top", held=SIZE)
    assert growth(*made(big, layer("base", "raw", held=SIZE))) == (SIZE, 0)
    assert growth(*made(big, layer("base", "raw", held=SIZE - MIB))) == (SIZE, MIB)
    assert growth(*made(big, layer("base", held=SIZE)))[1] < MIB
    with_snapshot = layer("base", held=SIZE, snapshots=[{"id": "1"}])
    assert growth(*made(big, with_snapshot))[1] > SIZE


def test_small_clusters_of_an_overlay_make_large_ones_of_the_base() -> None:
    small_clusters: Raw = {"cluster-size": 4096}
    small = layer("top", **small_clusters)
    raw = layer("base", "raw", held=0)
    assert growth(*made(small, raw)) == (16 * MIB, 8 * MIB * 16 + 8 * MIB)
    subclusters = layer("top", data={"extended-l2": True})
    assert growth(*made(subclusters, raw)) == (16 * MIB, 8 * MIB * 32 + 8 * MIB)


def test_an_overlay_on_a_device_counts_whole() -> None:
    graph, plan = made()
    graph = graph._replace(
        nodes={**graph.nodes, "top-file": graph.nodes["top-file"]._replace(driver="host_device")}
    )
    assert growth(graph, plan)[0] == SIZE


def test_only_the_layers_that_are_committed_count() -> None:
    assert growth(*made(shallow=True))[0] == 8 * MIB
    assert growth(*made(top="mid"))[0] == 8 * MIB


# -- sizes ----------------------------------------------------------------------------------------

SMALL: Raw = {"virtual-size": SIZE // 2}
LARGE: Raw = {"virtual-size": 2 * SIZE}


@pytest.mark.parametrize(
    ("base", "under", "expected"),
    [
        (layer("base", **SMALL), protocol("base"), "note"),
        (layer("base", **SMALL), protocol("base", "host_device"), "note"),
        (layer("base", "raw", **SMALL), protocol("base", length=SIZE // 2), "note"),
        (layer("base", "raw", **SMALL), protocol("base", "host_device"), "refuse"),
        (layer("base", "raw", **SMALL), protocol("base", "nbd"), "refuse"),
        (layer("base", "raw", **SMALL), protocol("base", length=SIZE), "refuse"),
        (layer("base", "vmdk", **SMALL), protocol("base"), "refuse"),
        (layer("base", "vmdk"), protocol("base"), "ok"),
        (layer("base", **LARGE), protocol("base"), "note"),
    ],
)
def test_size(base: Raw, under: Raw, expected: str) -> None:
    graph, plan = made(base, under)
    (finding,) = found("size", graph, plan)
    assert finding.level == expected, finding
    if expected == "refuse":
        assert finding.numbers == {"base": SIZE // 2, "needed": SIZE}
        with pytest.raises(qc.NoSpace, match=r"\[size\].*Nothing was sent$"):
            refuse([finding])


# -- who else uses the base ---------------------------------------------------------------------


OTHER = (layer("other"), protocol("other"))
VDB = {"device": "", "qdev": "vdb", "inserted": {"node-name": "other"}}


def over(below: str) -> tuple[str, str]:
    return ("other other-file file", f"other {below} backing")


def test_another_overlay_on_the_base() -> None:
    graph, plan = made(*OTHER, joined=over("base"), devices=[VDB])
    (finding, _) = found("base-shared", graph, plan)
    assert finding.level == "refuse"
    assert "the node 'other' (/i/other) of the device vdb" in finding.message


def test_another_overlay_that_nothing_uses() -> None:
    graph, plan = made(*OTHER, joined=over("base"))
    (finding, _) = found("base-shared", graph, plan)
    assert finding.level == "note"
    assert "the node 'other' (/i/other) (blockdev-del" in finding.message
    (finding, _) = found("base-shared", *made(*OTHER, joined=(*over("base"), "job:j other source")))
    assert finding.level == "refuse"
    assert "of the job 'j'" in finding.message


def test_another_overlay_on_a_layer_between_but_not_on_top() -> None:
    options: Raw = {"joined": over("mid"), "devices": [VDB]}
    assert level("base-shared", *made(*OTHER, **options)) == "refuse"
    assert level("base-shared", *made(*OTHER, **options, top="mid")) == "ok"
    assert level("base-shared", *made(*OTHER, joined=over("base"), base="mid")) == "ok"


def test_a_device_an_export_or_a_filter_on_the_base() -> None:
    device = {"device": "cd0", "inserted": {"node-name": "base"}}
    assert level("base-shared", *made(devices=[device])) == "refuse"
    graph, plan = made(exports=[{"id": "e0", "node-name": "base"}])
    assert "export 'e0'" in found("base-shared", graph, plan)[0].message
    throttle = {"node-name": "t0", "drv": "throttle", "file": "/i/base", "ro": True}
    graph, plan = made(
        throttle, joined=("t0 base file",), exports=[{"id": "e0", "node-name": "t0"}]
    )
    (finding, _) = found("base-shared", graph, plan)
    assert "filter 't0' (/i/base) of the export 'e0'" in finding.message


def test_the_same_file_in_another_node() -> None:
    again = layer("again"), {**protocol("again"), "file": "/i/base"}
    graph, plan = made(*again, joined=("again again-file file",))
    assert "the node 'again'" in found("base-shared", graph, plan)[0].message


def test_a_filter_inside_the_chain_is_no_other_user() -> None:
    filters = [{"node-name": "cor", "drv": "copy-on-read", "file": "/i/mid", "ro": True}]
    graph, plan = made(*filters, joined=("cor base file",))
    assert level("base-shared", graph, plan) == "note"
    chain = [n.raw for n in graph.nodes.values()]
    joined = edges("top top-file file", "top mid backing", "mid mid-file file", "mid cor backing",
                   "cor base file", "base base-file file")  # fmt: skip
    graph = build_graph(chain, [], [], joined)
    disk = find_disk(read_disks(graph), "top", vm="v")
    plan = plan_commit("v", disk, Request("top", qc.Keep()))
    assert level("base-shared", graph, plan) == "ok"


@pytest.mark.parametrize(("driver", "top", "expected"), [
    ("throttle", 0, "ok"), ("compress", 0, "refuse"), ("throttle", 1, "refuse"),
])  # fmt: skip
def test_a_filter_over_the_base_is_kept_or_its_loss_is_refused(
    driver: str, top: int, expected: str
) -> None:
    graph, plan = made({"node-name": "thr", "drv": driver, "file": "/i/base", "ro": False})
    raw = [node.raw for node in graph.nodes.values()]
    joined = edges("top top-file file", "top mid backing", "mid mid-file file", "mid thr backing",
                   "thr base file", "base base-file file")  # fmt: skip
    graph = build_graph(raw, graph.devices, [], joined)
    disk = find_disk(read_disks(graph), "vda", vm="v")
    base = "thr" if driver == "throttle" else "base"
    policy = qc.Keep() if top == 0 else None
    plan = plan_commit("v", disk, Request("vda", policy, base=base, top=top))
    assert plan.base.node_name == "base"
    assert level("lost-filter", graph, plan) == expected
    told = found("lost-filter", graph, plan)[0].message
    assert ("block_set_io_throttle" in told) is (driver == "throttle" and expected == "refuse")
    assert level("lost-filter", graph, replace(plan, arguments={})) == "ok"  # taken up


# -- what the layers are --------------------------------------------------------------------------


def test_a_corrupt_layer() -> None:
    corrupt: Raw = {"data": {"corrupt": True}}
    for name in ("base", "mid"):
        assert level("corrupt", *made(layer(name, **corrupt))) == "refuse"
    assert level("corrupt", *made(layer("base", **corrupt), shallow=True)) == "ok"


def test_encryption() -> None:
    luks: Raw = {"encrypted": True, "data": {"encrypt": {"format": "luks"}}}
    assert level("encrypted", *made(layer("base", **luks))) == "refuse"
    assert level("encrypted", *made(layer("top", **luks))) == "refuse"
    assert level("encrypted", *made(layer("base", "luks"))) == "refuse"
    all_of_them = made(layer("top", **luks), layer("mid", **luks), layer("base", **luks))
    assert level("encrypted", *all_of_them) == "note"


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        ("/i/base", "ok"),
        ("/i/../i/base", "ok"),
        ("file:/i/base", "ok"),
        ('json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/i/base"}}', "ok"),
        ('json:{"file.filename": "/i/base"}', "ok"),
        ('json:{"driver": "file", "filename": "/i/base"}', "note"),
        ("/i/old", "note"),  # it may be a link on the host of this QEMU, which is not known
        ("nbd://host/base", "note"),
        ("json:{", "refuse"),
        ("", "note"),
    ],
)
def test_backing_names_on_disk(full: str, expected: str) -> None:
    names: Raw = {"backing-filename": full, "full-backing-filename": full}
    assert level("on-disk-backing", *made(layer("mid", **names))) == expected
    assert level("on-disk-backing", *made(layer("mid", **names), shallow=True)) == "ok"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("driver=file,node-name=f,read-only=on,filename=a,,b", True),
        ("driver=file,node-name=f,filename=read-only=on", False),
        ("driver=qcow2,node-name=b,read-only=on,file.driver=file,file.node-name=f", False),
        ("driver=qcow2,node-name=b,file.read-only=on,file.node-name=f", True),
        ('{"driver": "file", "node-name": "f", "read-only": true}', True),
        ('{"node-name": "b", "read-only": true, "file": {"node-name": "f"}}', False),
        ("driver=file,node-name=g,read-only=on", None),
        ("{", None),
    ],
)
def test_read_only_on_a_command_line(option: str, expected: bool | None) -> None:
    options = parse_command_line(["qemu", "-blockdev", option]).of_node("f")
    assert (None if options is None else read_only.is_on(options.get("read-only"))) is expected


# -- one error for all ----------------------------------------------------------------------------


def test_refuse_names_all_at_once() -> None:
    space = Finding("free-space", "refuse", "no room", {"needed": 2, "free": 1})
    shared = Finding("base-shared", "refuse", "others read it")
    fine = [Finding("corrupt", "ok", ""), Finding("encrypted", "note", "two keys")]
    refuse(fine)
    with pytest.raises(qc.NoSpace, match=r"Nothing was sent$"):
        refuse([space, *fine])
    with pytest.raises(qc.ChainError) as error:
        refuse([space, shared, *fine])
    assert error.value.message == (
        "[free-space] no room. [base-shared] others read it. Nothing was sent"
    )
    assert error.value.to_dict()["checks"] == ["free-space", "base-shared"]
    refuse([space, shared, *fine], ["free-space", "base-shared"])
    with pytest.raises(qc.NoSpace):
        refuse([space, shared], {"base-shared"})
    with pytest.raises(qc.InvalidRequest, match=r"'space'.*free-space, size.*Nothing was sent"):
        refuse([], ["space"])


def test_layers_that_are_not_in_the_graph() -> None:
    _, plan = made()
    findings = check_commit(build_graph([], [], [], None), plan)
    assert {f.level for f in findings} == {"note"}


# -- files ----------------------------------------------------------------------------------------


def test_locate(folder: Path) -> None:
    me = os.getpid()
    path = folder / "file"
    path.write_bytes(b"x")
    assert identity.locate(str(path), pid=None).reason
    for name in ("nbd://host/x", "json:{}", "/dev/fdset/1", str(folder), str(folder / "nothing")):
        place = identity.locate(name, pid=me)
        assert not place.path, name
        assert place.reason
    assert "another file open" in identity.locate(str(path), pid=me).reason
    with path.open("rb"):
        assert identity.locate(str(path), pid=me).path == str(path)
        assert identity.locate("file", pid=me, cwd=str(folder)).path == str(path)


def test_links_below_another_root(folder: Path) -> None:
    (folder / "root/images").mkdir(parents=True)
    (folder / "root/images/file").write_bytes(b"x")
    (folder / "root/link").symlink_to("/images/./file")
    (folder / "root/dir").symlink_to("images")
    (folder / "root/loop").symlink_to("/loop")
    root = str(folder / "root")
    for name in ("/images/file", "/link", "/dir/file", "/dir/../link"):
        assert identity._inside(root, name) == f"{root}/images/file"
    with pytest.raises(OSError, match="links"):
        identity._inside(root, "/loop")


def test_a_file_that_is_no_qcow2(folder: Path) -> None:
    path = folder / "raw"
    for data in (b"", b"QFI\xfb", b"\0" * 4096):
        path.write_bytes(data)
        assert files.read_header(str(path)) is None


def test_an_old_header(folder: Path) -> None:
    path = folder / "v2"
    name = b"/i/base"
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 200, len(name), 16, SIZE, 0, 2, 65536, 131072, 1, 0, 0
    )
    path.write_bytes(header.ljust(200, b"\0") + name)
    found = files.read_header(str(path))
    assert found is not None
    assert (found.version, found.cluster_size, found.virtual_size) == (2, 65536, SIZE)
    assert (found.backing, found.backing_format, found.refcount_bits) == ("/i/base", "", 16)
