"""The name that an overlay's header must carry for the image below it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block import backing_name
from qmpcommit.block.backing_name import (
    BackingName,
    View,
    Written,
    detours,
    is_within,
    leads_to,
    name_below,
    parts_of,
    relative_name,
    written_below,
)
from qmpcommit.block.graph import BlockGraph, build_graph
from qmpcommit.block.identity import FileId, file_id
from qmpcommit.block.network_name import Export, export_of, shown_export, written_export
from qmpcommit.commit.headers import with_backing_file
from tests.unit.test_checks import made

Raw = dict[str, Any]
UNSEEN = View(cwd="/run")


def node(name: str, file: str, drv: str = "qcow2", backing: str = "", said: str = "") -> list[Raw]:
    """A layer over a file node; `said` is what its header names."""
    children = [{"child": "file", "node-name": f"{name}-file"}]
    if backing:
        children.append({"child": "backing", "node-name": backing})
    info = {"filename": file, "backing-filename": said} if said else {"filename": file}
    leaf = {"node-name": f"{name}-file", "drv": "file", "file": file}
    return [
        {"node-name": name, "drv": drv, "file": file, "children": children, "image": info},
        leaf,
    ]


def graph_of(*nodes: list[Raw]) -> BlockGraph:
    return build_graph([each for pair in nodes for each in pair], [], [], None)


def over(base: list[Raw], *said: str, folder: str = "/v") -> BlockGraph:
    """``top`` over ``mid`` over this base; `said` is what the two headers name, top's first."""
    top, mid = said
    return graph_of(
        node("top", f"{folder}/top", backing="mid", said=top),
        node("mid", f"{folder}/mid", backing="base", said=mid),
        base,
    )


def seen(*paths: Path, cwd: str | None = "/") -> View:
    """A QEMU that has these files open, and sees what we see."""
    return View("", cwd, frozenset(each for path in paths if (each := file_id(str(path)))))


def named(graph: BlockGraph, overlay: str, view: View, **more: Any) -> BackingName:
    return name_below(graph, "base", overlay, view, through=("top", "mid"), **more)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder ``vm`` with its layers, ``gold`` with a base, and another base of that name."""
    for name in ("vm", "gold", "vm/sub"):
        (tmp_path / name).mkdir()
    for name in ("vm/top", "vm/mid", "vm/base", "gold/base", "base"):
        (tmp_path / name).touch()
    return tmp_path.resolve()


def test_a_name_is_on_real_paths(place: Path) -> None:
    (place / "link").symlink_to("vm/sub")
    base = f"{place}/link/../../gold/base"
    graph = over(node("base", base, "raw"), "/v/mid", base)
    view = seen(place / "gold/base")
    assert named(graph, f"{place}/vm/top", view) == (f"{place}/gold/base", "raw")
    asked = named(graph, f"{place}/link/top", view, relative=True)
    assert asked == ("../../gold/base", "raw")
    assert asked.relative


def test_names_that_lead_through_folders_that_are_gone_are_found_again(place: Path) -> None:
    base = f"{place}/vm/gone/../../gold/base"
    graph = over(node("base", base), "/v/mid", base)
    assert named(graph, "/v/top", seen(place / "gold/base")).text == f"{place}/gold/base"
    nothing = named(graph, "/v/top", seen(place / "vm/base"))
    assert nothing.text == base  # what QEMU has is in no file of that name


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (("mid", "base"), "base"),
        (("mid", "{place}/vm/base"), "{place}/vm/base"),
        (("{place}/vm/mid", "base"), "{place}/vm/base"),
    ],
)
def test_what_was_relative_stays_so(said: tuple[str, str], text: str, place: Path) -> None:
    top, mid = (each.format(place=place) for each in said)
    graph = over(node("base", f"{place}/vm/base"), top, mid, folder=f"{place}/vm")
    view = seen(place / "vm/base")
    assert named(graph, f"{place}/vm/top", view).text == text.format(place=place)
    assert named(graph, f"{place}/vm/sub/top", view).text == f"{place}/vm/base"
    assert named(graph, f"{place}/vm/top", view, relative=True).text == "base"
    assert named(graph, f"{place}/vm/top", view, relative=False).text == f"{place}/vm/base"


def test_a_link_that_leads_out_is_not_climbed_out_of_unless_that_is_wanted(place: Path) -> None:
    (place / "vm/images").symlink_to(place / "gold")
    base = node("base", f"{place}/vm/images/base")
    graph = over(base, "images/mid", "base", folder=f"{place}/vm")
    view = seen(place / "gold/base")
    assert named(graph, f"{place}/vm/top", view).text == f"{place}/gold/base"
    assert named(graph, f"{place}/vm/top", view, relative=True).text == "../gold/base"


def test_a_link_beside_the_overlay_moves_along(place: Path) -> None:
    (place / "vm/base").unlink()
    (place / "vm/base").symlink_to(place / "gold/base")
    graph = over(node("base", f"{place}/vm/base"), "mid", "base", folder=f"{place}/vm")
    view = seen(place / "gold/base")
    assert named(graph, f"{place}/vm/top", view).text == "base"
    assert named(graph, f"{place}/vm/top", view, relative=False).text == f"{place}/gold/base"


def test_an_overlay_that_is_a_link_has_no_relative_name_unless_both_folders_do(place: Path) -> None:
    (place / "top").symlink_to("vm/top")
    view = seen(place / "vm/base")
    assert relative_name(f"{place}/vm/base", f"{place}/top", view) is None
    (place / "vm/other").symlink_to("top")
    assert relative_name(f"{place}/vm/base", f"{place}/vm/other", view) == "base"


def test_a_relative_name_is_taken_for_no_uri(place: Path) -> None:
    for name in ("nbd:x", "json:{}", "a b,c%20"):
        (place / "vm" / name).touch()
        found = relative_name(str(place / "vm" / name), f"{place}/vm/top", seen())
        assert found == (f"./{name}" if ":" in name else name)


def test_a_device_keeps_its_link(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = FileId(-1, 7)
    monkeypatch.setattr(backing_name, "file_id", lambda path: volume)
    (place / "lv").symlink_to("dm-3")
    view = View("", "/", frozenset([volume]))
    for opened, said, text in (
        ("lv", "/other", "/other"),
        ("dm-3", f"{place}/lv", f"{place}/lv"),
        ("lv", f"{place}/dm-3", f"{place}/lv"),
        ("dm-3", f"{place}/dm-3", f"{place}/dm-3"),
    ):
        graph = over(node("base", f"{place}/{opened}", "raw"), "/v/mid", said)
        assert named(graph, "/v/top", view).text == text


def test_a_file_by_descriptor_has_the_name_that_a_header_tells(place: Path) -> None:
    base = node("base", "/dev/fdset/3")
    graph = over(base, "mid", "base", folder=f"{place}/vm")
    view = seen(place / "vm/base")
    assert named(graph, f"{place}/vm/top", view).text == "base"
    for odd in (seen(place / "base"), UNSEEN):
        with pytest.raises(qc.ChainError, match="file descriptor"):
            named(graph, f"{place}/vm/top", odd)


def test_where_files_can_not_be_seen_names_are_as_qemu_has_them() -> None:
    graph = over(node("base", "/v/sub/base"), "/v/mid", "/v/sub/base")
    assert named(graph, "/v/top", UNSEEN).text == "/v/sub/base"
    assert named(graph, "/v/top", UNSEEN, relative=True).text == "sub/base"
    assert named(graph, "/w/top", UNSEEN, relative=True).text == "/v/sub/base"
    relative = over(node("base", "b/base"), "/v/mid", "/v/b/base")
    assert named(relative, "a/top", UNSEEN).text == "/run/b/base"
    unknown = View()
    assert named(relative, "a/top", unknown).text == "../b/base"
    with pytest.raises(qc.ChainError, match="working directory"):
        named(relative, "/a/top", unknown)
    assert named(graph, "top", unknown, relative=True).text == "/v/sub/base"
    with pytest.raises(qc.ChainError, match="no node"):
        name_below(graph, "gone", "/v/top", UNSEEN)


def slice_of(inner: str, **window: int) -> list[Raw]:
    """A raw node that shows a part of a file; `inner` is what is in it, perhaps."""
    file = {"driver": "file", "filename": "/v/all"}
    shown = f"json:{json.dumps({'driver': 'raw', **window, 'file': file})}"
    base, leaf = node("base" if inner == "raw" else "part", "/v/all", "raw")
    base["file"] = shown
    if inner == "raw":
        return [base, leaf]
    outer = {"node-name": "base", "drv": inner, "file": f"json:{'x' * 5000}",
             "children": [{"child": "file", "node-name": "part"}]}  # fmt: skip
    return [outer, base, leaf]


def test_a_slice_is_called_by_all_its_options() -> None:
    graph = over(slice_of("raw", offset=512, size=1024), "/v/mid", "/v/all")
    name = named(graph, "/v/top", UNSEEN, relative=True)
    assert name.format == "raw"
    assert json.loads(name.text.removeprefix("json:")) == {
        "driver": "raw", "offset": 512, "size": 1024,
        "file": {"driver": "file", "filename": "/v/all"}}  # fmt: skip
    inside = over(slice_of("qcow2", offset=512), "/v/mid", "/v/all")
    name = named(inside, "/v/top", UNSEEN)
    assert name.format == "qcow2"
    assert json.loads(name.text.removeprefix("json:")) == {
        "driver": "qcow2",
        "file": {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "/v/all"}},
    }
    for each in (graph, inside):
        right = Written(named(each, "/v/top", UNSEEN).text, "", "")
        assert leads_to(each, "mid", "base", right, UNSEEN) == "same"
        whole = Written("/v/all", "raw", "")
        assert leads_to(each, "mid", "base", whole, UNSEEN) == "part"
    whole_raw = over(slice_of("raw"), "/v/mid", "/v/all")
    assert named(whole_raw, "/v/top", UNSEEN) == ("/v/all", "raw")


def network(shown: str, drv: str = "nbd", layer: str = "raw") -> list[Raw]:
    base, leaf = node("base", shown, layer)
    return [base, leaf | {"drv": drv}]


@pytest.mark.parametrize(
    ("shown", "said", "text"),
    [
        ("nbd://h:1/a//b", "/x", "nbd://h:1/a//b"),
        ("nbd://h:1//a", "/x", "nbd://h:1/%2Fa"),
        ("nbd://::1:9/a", "/x", "nbd://[::1]:9/a"),
        ("nbd+unix:///e x?socket=/s 1", "/x", "nbd+unix:///e%20x?socket=/s%201"),
        ("nbd+unix:///e?socket=s", "/x", "nbd+unix:///e?socket=/run/s"),
        ("nbd+unix:///e?socket=/s", "nbd:unix:/s:exportname=e", "nbd:unix:/s:exportname=e"),
        ("nbd+unix:///e?socket=/s", "nbd:unix:/t:exportname=e", "nbd+unix:///e?socket=/s"),
        ("https://h/a//b.raw", "/x", "https://h/a//b.raw"),
    ],
)
def test_a_network_image_is_called_by_a_uri_that_means_it(shown: str, said: str, text: str) -> None:
    graph = over(network(shown), "/v/mid", said)
    assert named(graph, "/v/top", UNSEEN, relative=True) == (text, "raw")
    written = Written(text, "raw", "")
    assert leads_to(graph, "mid", "base", written, UNSEEN) in ("same", "other")


def test_options_that_no_uri_holds_stay_options() -> None:
    odd_path = over(network("nbd+unix:///e?socket=/s%1"), "/v/mid", "/x")
    name = named(odd_path, "/v/top", UNSEEN)
    unix = {"driver": "nbd", "export": "e", "server": {"type": "unix", "path": "/s%1"}}
    assert json.loads(name.text.removeprefix("json:")) == {"driver": "raw", "file": unix}
    assert leads_to(odd_path, "mid", "base", Written(name.text, "raw", ""), UNSEEN) == "same"
    tls = {"driver": "nbd", "export": "e", "tls-creds": "t",
           "server": {"type": "inet", "host": "h", "port": "1"}}  # fmt: skip
    said = f"json:{json.dumps({'driver': 'raw', 'file': tls})}"
    graph = over(network("nbd://h:1/e"), "/v/mid", said)
    assert named(graph, "/v/top", UNSEEN).text == said
    shown = over(network(f"json:{json.dumps(tls)}", layer="qcow2"), "/v/mid", "/x")
    name = named(shown, "/v/top", UNSEEN)
    assert name.format == "qcow2"
    inner = json.loads(name.text.removeprefix("json:"))
    assert inner == {"driver": "qcow2", "file": tls}
    odd = {"driver": "rbd", "pool": "p", "image": "i"}
    other = over(network(f"json:{json.dumps(odd)}", "rbd"), "/v/mid", "/x")
    name = named(other, "/v/top", UNSEEN)
    assert json.loads(name.text.removeprefix("json:")) == {"driver": "raw", "file": odd}
    assert leads_to(other, "mid", "base", Written(name.text, "raw", ""), UNSEEN) == "same"


def test_exports_in_every_spelling() -> None:
    export = Export(path="/s", name="e")
    for text in ("nbd:unix:/s:exportname=e", "nbd+unix:///e?socket=/s"):
        assert written_export(text) == export
    tcp = Export(host="h", port="10809", name="e")
    for text in ("nbd://h/e", "nbd+tcp://h:10809/e", "nbd:h:10809:exportname=e"):
        assert written_export(text) == tcp
    assert export_of({"server.path": "/s", "export": "e"}) == export
    assert export_of({"host": "h", "export": "e"}) == tcp
    assert export_of({"driver": "file"}) is None
    for odd in ("nbd://h:x/e", "nbd+unix:///e", "https://h/e"):
        assert written_export(odd) is None
    for odd in ("nbd+unix:///e", "nbd://h/e", "/x"):
        assert shown_export(odd) is None


def test_a_header_is_compared_by_files_not_by_names(place: Path) -> None:
    (place / "link").symlink_to("gold")
    base = place / "gold/base"
    graph = over(node("base", f"{place}/link/base"), "/v/mid", "/x", folder=f"{place}/vm")
    view = seen(base)

    def verdict(text: str, fmt: str = "qcow2", view: View = view) -> str:
        return leads_to(graph, "mid", "base", Written(text, fmt, ""), view)

    assert verdict(str(base)) == verdict("../gold/base") == verdict("../gold/base", "") == "same"
    assert verdict("base") == verdict("/nowhere/base") == "other"
    assert verdict(str(base), "raw") == "part"
    assert verdict("nbd://h/e") == "unknown"
    replaced = seen(place / "vm/base")  # what QEMU has is not what the name leads to now
    assert verdict("base", view=replaced) == "same"
    assert verdict(str(base), view=replaced) == "unknown"


def test_parts_see_through_filters() -> None:
    base, leaf = node("base", "/v/base")
    filtered = {"node-name": "slow", "drv": "throttle", "file": "json:{}",
                "children": [{"child": "file", "node-name": "base-file"}]}  # fmt: skip
    base["children"][0]["node-name"] = "slow"
    parts = parts_of(graph_of([base, filtered], [leaf, leaf]), "base")
    assert (parts.format, parts.name, parts.plain) == ("qcow2", "/v/base", True)


def test_another_root_is_looked_at_through_qemus_process(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a QEMU in a mount namespace of its own, or with another root."""
    pid = os.getpid()
    (place / "link").symlink_to(place / "gold")
    with (place / "gold/base").open() as file:
        monkeypatch.setattr(backing_name, "names_are_ours", lambda pid: False)
        view = View.of(pid, str(place))
        assert view.root == f"/proc/{pid}/root"
        graph = over(node("base", "link/base"), "/v/mid", f"{place}/gold/base")
        assert named(graph, f"{place}/vm/top", view).text == f"{place}/gold/base"
        assert not file.closed
    monkeypatch.setattr(backing_name, "_link", lambda path: "/jail")
    assert View.of(pid, "/jail/vms").cwd == "/vms"
    assert View.of(pid, "/elsewhere").cwd == "/elsewhere"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert View.of(pid, "/vms") == View(cwd="/vms")
    assert View.of(None, "/vms") == View(cwd="/vms")


def test_links_that_lead_in_a_circle_end(place: Path) -> None:
    (place / "round").symlink_to("round")
    assert seen().real(f"{place}/round") == f"{place}/round"
    assert seen().real("/") == "/"


def test_a_header_that_can_not_be_read_is_as_qemu_read_it(place: Path) -> None:
    graph = over(node("base", "/v/base"), "mid", "base", folder=f"{place}/vm")
    for there in (True, False):
        (written,) = written_below(graph, "top", seen())
        assert (written.text, written.source) == ("mid", "as QEMU read it")
        (place / "vm/top").unlink(missing_ok=not there)
    assert name_below(graph, "base", "/v/top", UNSEEN, through=("gone",)).text == "/v/base"


def test_the_name_of_a_plan_is_for_all_overlays_over_its_top() -> None:
    graph, plan = made(shallow=True, top="mid")
    named_so = with_backing_file(plan, graph, None, "/run", masks=False)
    assert named_so.arguments["backing-file"] == "/i/base"
    alone = graph._replace(parents={})
    assert with_backing_file(plan, alone, None, "/run", masks=False) == plan
    bare = graph.nodes["base"]._replace(children={}, driver="file", raw={"file": "/i/base"})
    bared = graph._replace(nodes={**graph.nodes, "base": bare})
    for masks in (False, True):
        so = with_backing_file(plan, bared, None, "/run", masks=masks).arguments
        assert (so["backing-file"], so.get("backing-mask-protocol", False)) == ("/i/base", masks)
    fd = graph.nodes["base-file"]._replace(raw={"file": "/dev/fdset/1"})
    given = graph._replace(nodes={**graph.nodes, "base-file": fd})
    with pytest.raises(qc.ChainError, match="file descriptor") as told:
        with_backing_file(plan, given, None, "/run", masks=False)
    assert (told.value.vm, told.value.disk) == ("v", "vda")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/a/b", []), ("/a/../b", ["/a"]), ("/a/b/../../c/../d", ["/a/b", "/a/b/..", "/a/b/../../c"]),
     ("/../a", ["/"])],
)  # fmt: skip
def test_folders_that_a_name_only_goes_through(path: str, expected: list[str]) -> None:
    assert detours(path) == expected


def test_what_is_within_a_folder() -> None:
    assert is_within("/a/b", "/a")
    assert is_within("/a", "/a")
    assert is_within("/a", "/")
    assert not is_within("/ab", "/a")
