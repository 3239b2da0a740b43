"""Disks and chains from replies as real QEMUs give them (shortened)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.chain import (
    BackingChain,
    find_again,
    find_disk,
    qdev_id,
    qom_path,
    read_disks,
)
from qmpcommit.block.graph import BlockGraph, build_graph
from qmpcommit.commit.request import Request

Raw = dict[str, Any]


def node(name: str, drv: str, file: str, **more: Any) -> Raw:
    return {"node-name": name, "drv": drv, "file": file, "ro": False,
            "image": {"filename": file, "virtual-size": 64, "actual-size": 8}, **more}  # fmt: skip


def edges(*pairs: str) -> Raw:
    """``parent child edge`` triples; ``job:`` and ``dev:`` mark what is no node."""
    kinds = {"job": "block-job", "dev": "block-backend"}
    names: dict[str, int] = {}
    found = []
    for pair in pairs:
        parent, child, edge = pair.split()
        for end in (parent, child):
            names.setdefault(end, len(names) + 1)
        found.append({"parent": names[parent], "child": names[child], "name": edge})
    nodes = [
        {"id": number, "type": kinds.get(kind, "block-driver"), "name": rest or kind}
        for end, number in names.items()
        for kind, _, rest in [end.partition(":")]
    ]
    return {"nodes": nodes, "edges": found}


def device(root: str | None, qdev: str = "", alias: str = "", **more: Any) -> Raw:
    inserted = {"inserted": {"node-name": root}} if root else {}
    return {"device": alias, "qdev": qdev, "removable": False, **inserted, **more}


NODES = [
    node("top", "qcow2", "/i/top.qcow2"),
    node("top-file", "file", "/i/top.qcow2"),
    node("base", "qcow2", "/i/base.qcow2"),
    node("base-file", "file", "/i/base.qcow2"),
]
BELOW = ("top top-file file", "top base backing", "base base-file file")
VD0 = "/machine/peripheral/vd0/virtio-backend"


def graph(
    *more_edges: str,
    nodes: list[Raw] | None = None,
    devices: list[Raw] | None = None,
    exports: list[Raw] | None = None,
) -> BlockGraph:
    nodes = NODES if nodes is None else NODES + nodes
    devices = [device("top", VD0)] if devices is None else devices
    return build_graph(nodes, devices, exports or [], edges(*BELOW, *more_edges))


def names(disk: qc.Disk) -> list[str]:
    return [image.node_name for image in disk.chain]


def test_a_blockdev_disk() -> None:
    (disk,) = read_disks(graph())
    assert (disk.name, disk.root, names(disk)) == ("vd0", "top", ["top", "base"])
    assert disk.active == disk.chain[0]
    for name in ("vd0", VD0, "top", "/i/top.qcow2"):
        assert find_disk([disk], name, vm="v") is disk


def test_a_legacy_drive_and_an_empty_cdrom() -> None:
    devices = [
        device("top", VD0, "drive0"),
        device(None, "/machine/peripheral-anon/device[0]", "cd0", removable=True),
        device(None, "", "floppy0"),
    ]
    disk, cdrom, floppy = read_disks(graph(devices=devices))
    assert find_disk([disk, cdrom], "drive0", vm="v") is disk
    assert (cdrom.name, cdrom.chain, cdrom.active, cdrom.removable) == ("cd0", (), None, True)
    assert floppy.name == "floppy0"


def test_filters_are_seen_through() -> None:
    filters = [node("thr", "throttle", "json:{}"), node("cor", "copy-on-read", "json:{}")]
    more = ("thr cor file", "cor top file")
    (disk,) = read_disks(graph(*more, nodes=filters, devices=[device("thr", VD0)]))
    assert (disk.root, disk.filters, names(disk)) == ("thr", ("thr", "cor"), ["top", "base"])
    assert find_disk([disk], "thr", vm="v") is disk


def test_a_filter_beside_the_disk_is_not_the_disks() -> None:
    filters = [node("thr", "throttle", "json:{}"), node("thr2", "throttle", "json:{}")]
    beside = ("thr top file", "thr2 top file")
    served = [{"id": "e1", "node-name": "thr"}]
    found = graph(*beside, nodes=filters, devices=[device("top", VD0)], exports=served)
    (disk,) = read_disks(found)
    assert (disk.root, disk.filters, disk.exports) == ("top", (), ("e1",))
    assert disk.head == "thr"  # block-commit wants a node that nothing lies over
    (disk,) = read_disks(graph(*beside, nodes=filters, devices=[], exports=served))
    assert (disk.root, disk.filters) == ("thr", ("thr",))
    served.append({"id": "e2", "node-name": "top"})
    (disk,) = read_disks(graph(*beside, nodes=filters, devices=[], exports=served))
    assert (disk.root, disk.filters, disk.exports) == ("top", (), ("e1", "e2"))


def test_a_filter_between_two_layers_is_no_layer() -> None:
    chain = build_graph(
        [*NODES, node("cor", "copy-on-read", "x")],
        [device("top", VD0)],
        [],
        edges("top top-file file", "top cor backing", "cor base file", "base base-file file"),
    )
    assert names(read_disks(chain)[0]) == ["top", "base"]


def test_the_jobs_own_filter_and_its_job() -> None:
    job = ("#b1 top backing", "job:j #b1 main", "job:j top source", "job:j base target")
    for shown in ("top", "#b1"):  # with filter-node-name QEMU shows the filter
        held = graph(*job, nodes=[node("#b1", "mirror_top", "x")], devices=[device(shown, VD0)])
        (disk,) = read_disks(held)
        assert (disk.root, names(disk), disk.jobs) == ("#b1", ["top", "base"], ("j",))
        assert (held.jobs["j"].source, held.jobs["j"].target) == ("top", "base")


def test_a_storage_daemon_has_exports_and_open_chains() -> None:
    (disk,) = read_disks(graph(devices=[], exports=[{"id": "e0", "node-name": "top"}]))
    assert (disk.name, disk.exports, names(disk)) == ("top", ("e0",), ["top", "base"])
    assert find_disk([disk], "e0", vm="v") is disk
    (disk,) = read_disks(graph(devices=[]))
    assert (disk.name, names(disk)) == ("top", ["top", "base"])


def test_after_a_pivot_the_old_overlay_is_no_disk_of_a_storage_daemon() -> None:
    (disk,) = read_disks(graph(devices=[], exports=[{"id": "e0", "node-name": "base"}]))
    assert (disk.name, names(disk)) == ("base", ["base"])


def test_an_export_of_a_devices_disk_is_the_same_disk() -> None:
    (disk,) = read_disks(graph(exports=[{"id": "backup", "node-name": "top"}]))
    assert (disk.name, disk.exports) == ("vd0", ("backup",))


def test_edges_are_taken_from_children_where_qemu_tells_them() -> None:
    nodes = [
        node("top", "qcow2", "/t", children=[{"child": "backing", "node-name": "base"},
                                             {"child": "file", "node-name": "f"}]),
        node("base", "qcow2", "/b", children=[]),
        node("f", "file", "/t", children=[]),
    ]  # fmt: skip
    (disk,) = read_disks(build_graph(nodes, [device("top", VD0)], [], None))
    assert [image.filename for image in disk.chain] == ["/t", "/b"]


def test_without_any_edges_layers_are_joined_by_file_names() -> None:
    nodes = [
        {**node("top", "qcow2", "/t"), "backing_file": "/b"},
        {**node("base", "qcow2", "/b"), "image": {"filename": "/b", "cluster-size": 65536}},
        node("bf", "file", "/b"),
    ]
    (disk,) = read_disks(build_graph(nodes, [device("top", VD0)], [], None))
    assert names(disk) == ["top", "base"]


def test_json_names_show_the_file_where_there_is_one() -> None:
    shown = 'json:{"driver": "qcow2"}'
    nodes = [node("top", "qcow2", shown), node("f", "file", "/i/top.qcow2")]
    (disk,) = read_disks(build_graph(nodes, [device("top", VD0)], [], edges("top f file")))
    image = disk.chain[0]
    assert (image.filename, image.shown) == ("/i/top.qcow2", shown)
    assert find_disk([disk], shown, vm="v") is disk
    assert find_disk([disk], "/i/top.qcow2", vm="v") is disk


def test_protocol_names_are_only_themselves() -> None:
    nodes = [node("top", "qcow2", "nbd://h/x"), node("f", "nbd", "nbd://h/x")]
    (disk,) = read_disks(build_graph(nodes, [device("top", VD0)], [], edges("top f file")))
    assert disk.chain[0].filename == "nbd://h/x"
    assert find_disk([disk], "nbd://h/x", vm="v") is disk
    with pytest.raises(qc.DiskNotFound):
        find_disk([disk], "nbd://h//x", vm="v")


@pytest.mark.parametrize(
    ("shown", "name", "found"),
    [
        ("nbd+unix:///x?socket=/s", "nbd:unix:/s:exportname=x", True),
        ("nbd+unix:///x?socket=/s", "nbd+unix:///x?socket=%2Fs", True),
        ("nbd+unix:///x?socket=/s", "nbd:unix:/s:exportname=y", False),
        ("nbd://h:10809/x", "nbd:h:10809:exportname=x", True),
        ("nbd://h:10809/x", "nbd://h/x", True),
        (
            "nbd://h:1/x",
            'json:{"driver": "qcow2", "file": {"driver": "nbd", "export": "x", "server":'
            ' {"type": "inet", "host": "h", "port": "1"}}}',
            True,
        ),
        ("rbd:pool/x", "nbd:h:1", False),
        ("/i/x", "file:/i/x", True),
        ("/i/x", 'json:{"driver": "file", "filename": "/i/x"}', True),
        ("/i/x", 'json:{"driver": "qcow2", "file.driver": "file", "file.filename": "/i/x"}', True),
        ("/i/x", 'json:{"driver": "raw", "offset": 512, "file.filename": "/i/x"}', False),
        ("/i/x", "rbd:/i/x", False),
        ("/i/x", "json:[", False),
        ("/dev/fdset/3", "/i/given", True),
        ("/dev/fdset/3", "/dev/fdset/3", True),
        ("/dev/fdset/3", "/i/x", False),
    ],
)
def test_a_layer_is_found_by_every_name_that_means_it(shown: str, name: str, found: bool) -> None:
    given = {"/dev/fdset/3": "/i/given"}
    nodes = [node("top", "qcow2", shown), node("f", "file", shown)]
    nodes[1]["drv"] = "nbd" if shown.startswith("nbd") else "file"
    made = build_graph(nodes, [device("top", VD0)], [], edges("top f file"))
    (disk,) = read_disks(made._replace(given=given))
    if found:
        assert find_disk([disk], name, vm="v") is disk
    else:
        with pytest.raises(qc.DiskNotFound):
            find_disk([disk], name, vm="v")


def test_files_through_symlinks_and_relative_names(tmp_path: Path) -> None:
    real = tmp_path / "real.qcow2"
    real.touch()
    link = tmp_path / "link.qcow2"
    link.symlink_to(real)
    nodes = [node("top", "qcow2", "real.qcow2"), node("f", "file", "real.qcow2")]
    (disk,) = read_disks(build_graph(nodes, [device("top", VD0)], [], edges("top f file")))
    for name in ("real.qcow2", str(real), str(link), os.path.relpath(link)):
        assert find_disk([disk], name, vm="v", cwd=str(tmp_path)) is disk
    with pytest.raises(qc.DiskNotFound):
        find_disk([disk], str(real), vm="v", cwd="/")


def test_unknown_and_ambiguous_names_list_the_candidates() -> None:
    two = [device("top", VD0), device("base", "/machine/peripheral/vd1/virtio-backend", "vd0")]
    disks = read_disks(graph(devices=two))
    with pytest.raises(qc.DiskNotFound, match="no disk 'x' on web1: its disks are vd0, vd1") as e:
        find_disk(disks, "x", vm="web1")
    assert e.value.candidates == ["vd0", "vd1"]
    paths = r"vd0 \(/machine/peripheral/vd0\) and vd1 \(/machine/peripheral/vd1\)"
    with pytest.raises(qc.DiskNotFound, match=f"ambiguous on web1: it means {paths}") as e:
        find_disk(disks, "vd0", vm="web1")
    assert e.value.candidates == ["vd0", "vd1"]
    for disk in disks:
        assert find_disk(disks, f"/machine/peripheral/{disk.name}", vm="web1") is disk
    with pytest.raises(qc.DiskNotFound, match="it has no disks"):
        find_disk([], "x", vm="web1")


def test_a_name_without_a_letter_is_none() -> None:
    (disk,) = read_disks(graph())  # which has no alias
    with pytest.raises(qc.DiskNotFound, match="no disk ''"):
        find_disk([disk], "", vm="web1")


def test_a_backing_layers_name_is_no_disk_but_says_whose_it_is() -> None:
    (disk,) = read_disks(graph())
    with pytest.raises(qc.DiskNotFound, match="backing layer of vd0"):
        find_disk([disk], "base", vm="v")


def test_finding_a_disk_again() -> None:
    (before,) = read_disks(graph())
    (after,) = read_disks(graph(devices=[device("base", VD0)]))
    assert find_again([after], before) is after
    assert find_again([], before) is None
    (export,) = read_disks(graph(devices=[], exports=[{"id": "e0", "node-name": "top"}]))
    (moved,) = read_disks(graph(devices=[], exports=[{"id": "e0", "node-name": "base"}]))
    assert find_again([moved], export) is moved


@pytest.mark.parametrize(
    ("qdev", "expected"),
    [
        (VD0, "vd0"),
        ("/machine/peripheral/scsi0", "scsi0"),
        ("/machine/peripheral-anon/device[0]", ""),
        ("ide0-cd0", "ide0-cd0"),
        ("", ""),
    ],
)
def test_ids_from_qom_paths(qdev: str, expected: str) -> None:
    assert qdev_id(qdev) == expected


@pytest.mark.parametrize(
    ("qdev", "path"),
    [
        (VD0, "/machine/peripheral/vd0"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "/machine/peripheral-anon/device[0]"),
        ("/machine/peripheral/scsi0", "/machine/peripheral/scsi0"),
        ("ide0-cd0", "/machine/peripheral/ide0-cd0"),
        ("", ""),
    ],
)
def test_the_devices_own_path(qdev: str, path: str) -> None:
    assert qom_path(qdev) == path
    (disk,) = read_disks(graph(devices=[device("top", qdev)]))
    assert not path or find_disk([disk], path, vm="v") is disk


def test_layers_by_index_node_name_and_file() -> None:
    chain = BackingChain(read_disks(graph())[0])
    named = (1, "1", "base", "/i/base.qcow2", Path("/i/base.qcow2"), chain.disk.chain[1])
    assert [chain.find(layer, "base") for layer in named] == [1] * len(named)
    assert chain.find(0, "top") == 0
    for wrong in (2, -1, "2", "x", "", True, 1.5):
        with pytest.raises(qc.ChainError, match="Nothing was sent"):
            chain.find(wrong, "base")  # type: ignore[arg-type]


def test_layers_as_a_daemon_is_asked_for_them() -> None:
    base = read_disks(graph())[0].chain[1]
    body = Request("vda", qc.Pivot(), base=base, top=Path("/i/top.qcow2")).body()
    assert (body["base"], body["top"]) == ("base", "/i/top.qcow2")
    assert Request("vda", qc.Pivot(), top=0).body()["top"] == 0


def test_a_node_that_is_called_like_a_number() -> None:
    nodes = [node("t", "qcow2", "/t"), node("0", "qcow2", "/b")]
    (disk,) = read_disks(build_graph(nodes, [device("t", VD0)], [], edges("t 0 backing")))
    assert BackingChain(disk).find("0", "base") == 1
    assert BackingChain(disk).find(0, "base") == 0


def test_a_chain_in_a_circle_ends() -> None:
    nodes = [node("a", "throttle", "/a"), node("b", "qcow2", "/b")]
    circle = build_graph(nodes, [device("a", VD0)], [], edges("a a file", "b b backing"))
    assert read_disks(circle)[0].chain == ()
    assert circle.chain("b") == ["b"]
