"""Which overlays lie above, and what is told of those that can't be looked at."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block import files, qcow2
from qmpcommit.block.chain import find_disk, read_disks
from qmpcommit.block.graph import BlockGraph, build_graph
from qmpcommit.block.identity import FileId, OpenFiles, file_id
from qmpcommit.commit.checks.finding import Case, Finding
from qmpcommit.commit.checks.header_above import header_above
from qmpcommit.commit.overlays_above import OverlaysAbove, check_writable
from qmpcommit.commit.plan import Plan, plan_commit
from qmpcommit.commit.request import Request
from qmpcommit.errors import CommandRefused
from qmpcommit.qmp.features import Features
from qmpcommit.qmp.monitor import Monitor
from tests.ground.images import MIB, create, run
from tests.ground.qemu import QEMU
from tests.unit.test_chain import edges
from tests.unit.test_checks import layer, protocol

Raw = dict[str, Any]
CHAIN = ("top mid backing", "top top-file file", "mid base backing", "mid mid-file file",
         "base base-file file")  # fmt: skip


def made(*nodes: Raw, joined: tuple[str, ...] = CHAIN) -> tuple[BlockGraph, Plan]:
    """``base <- mid <- top``, of which `mid` is committed; `nodes` replace these or are more."""
    usual = [make(name) for name in ("top", "mid", "base") for make in (layer, protocol)]
    graph = build_graph(
        {node["node-name"]: node for node in (*usual, *nodes)}.values(),
        [{"device": "", "qdev": "vda", "inserted": {"node-name": "top"}}],
        [],
        edges(*joined),
    )
    disk = find_disk(read_disks(graph), "vda", vm="v")
    return graph, plan_commit("v", disk, Request("vda", top="mid"))


def read_only(name: str = "top", at: Path | None = None, **more: Any) -> tuple[Raw, Raw]:
    """A layer and its file's node, neither of which can be written as it is."""
    file = str(at or f"/i/{name}")
    own = protocol(name, **more)
    return layer(name) | {"ro": True, "file": file}, own | {"ro": True, "file": file}


def told(graph: BlockGraph, plan: Plan, pid: int | None = None) -> list[Finding]:
    opened = OpenFiles.of(graph, pid)
    return list(header_above(Case(graph, plan, pid, None, opened=opened)))


def test_an_overlay_that_is_open_for_writing_is_none_to_talk_of() -> None:
    assert told(*made()) == []


def test_a_filter_between_keeps_qemu_from_writing_the_name() -> None:
    throttle = {"node-name": "thr", "drv": "throttle", "file": "/i/mid", "image": {}}
    graph, plan = made(throttle, joined=("top thr backing", "thr mid file", *CHAIN[1:]))
    (finding,) = told(graph, plan)
    assert (finding.level, finding.final) == ("refuse", False)
    assert "through the filter 'thr'" in finding.message
    job = {"node-name": "c", "drv": "commit_top", "file": "/i/mid", "image": {}}
    graph, plan = made(job, joined=("top c backing", "c mid backing", *CHAIN[1:]))
    assert told(graph, plan) == []  # the job's own goes with it


@pytest.mark.parametrize(
    ("above", "why"),
    [
        (layer("top", "qcow"), "of a qcow image"),
        (layer("top", data={"data-file-raw": True}), "data_file_raw"),
    ],
)
def test_what_can_not_be_given_a_name_is_final(above: Raw, why: str) -> None:
    (finding,) = told(*made(above))
    assert finding.final
    assert why in finding.message


def test_what_can_not_be_looked_at_is_a_note(tmp_path: Path) -> None:
    for nodes, pid in (
        (read_only(), None),
        (read_only(drv="nbd"), os.getpid()),
        (read_only(), os.getpid()),  # its command line does not tell of the node
    ):
        (finding,) = told(*made(*nodes), pid=pid)
        assert finding.level == "note"
        assert "it is not known from here" in finding.message


def test_a_file_that_is_open_for_writing_is_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "top"
    create(path, MIB)
    nodes = read_only(at=path)
    nodes[1]["ro"] = False
    file = file_id(str(path))
    assert file is not None
    with path.open("rb"):
        assert not files.opened_for_writing(os.getpid(), file)
        with path.open("r+b"):
            assert files.opened_for_writing(os.getpid(), file)
            module = importlib.import_module("qmpcommit.commit.checks.header_above")
            monkeypatch.setattr(module, "read_only_because", lambda *_: "why")
            assert told(*made(*nodes), pid=os.getpid()) == []
        (finding,) = told(*made(*nodes), pid=os.getpid())
        assert "since it can't: why" in finding.message
    assert not files.opened_for_writing(os.getpid(), FileId(0, 0))


def test_what_is_no_qcow2_or_is_cut_off_tells_nothing(tmp_path: Path) -> None:
    none, other, cut = tmp_path / "none", tmp_path / "other", tmp_path / "cut"
    other.write_bytes(bytes(512))
    disk = create(tmp_path / "disk", 64 * MIB)
    run(QEMU.img, "bitmap", "--add", disk, "b")
    with_bitmap = qcow2.name_room(str(disk), "qcow2")
    run(QEMU.img, "bitmap", "--remove", disk, "b")
    assert with_bitmap == qcow2.name_room(str(disk), "qcow2") == 1023
    cut.write_bytes(disk.read_bytes()[:110])
    for path in (none, other):
        assert qcow2.snapshot_count(str(path)) == 0
        assert qcow2.unwritten(str(path)) is None
    for path in (none, other, cut):
        assert qcow2.name_room(str(path), "qcow2") is None
    assert qcow2.unwritten(str(cut)) is None


class Daemon(Monitor):
    """A storage daemon's monitor: it has no HMP, or `says` what that says."""

    connected = True
    says: str | None = None
    asked: list[str]

    async def execute(self, command: str, arguments: Any = None, **more: object) -> Any:
        if self.says is None:
            raise CommandRefused("no", error_class="CommandNotFound", desc="no")
        self.asked.append(arguments["command-line"])
        return self.says if "-w" in arguments["command-line"] else "it stays"

    async def features(self) -> Features:
        return Features({})


async def test_where_qemu_can_not_be_asked_what_is_not_known_is_refused() -> None:
    graph, plan = made(*read_only())
    plan = replace(plan, findings=told(graph, plan, os.getpid()))
    with pytest.raises(qc.ChainError, match=r"not known from here .*override 'header-above'"):
        await check_writable(Daemon("/nowhere"), plan, graph, None)
    await check_writable(Daemon("/nowhere"), plan, graph, None, ["header-above"])


async def test_what_is_final_is_told_without_asking_qemu() -> None:
    graph, plan = made(layer("top", "qcow"))
    assert "of a qcow image" in str(await OverlaysAbove(Daemon("/nowhere"), plan, None).open(graph))


async def test_those_that_were_opened_are_closed_when_one_can_not_be() -> None:
    graph, plan = made(*read_only())
    monitor = Daemon("/nowhere")
    monitor.says, monitor.asked = "", []
    above = OverlaysAbove(monitor, plan, None)
    assert await above.open(graph) is None
    assert above.opened == ["top"]
    above.opened.append("gone")  # a node that nobody knows is only asked about
    assert await above.open(graph) is None  # it is open already
    await above.close()
    assert monitor.asked == [
        'qemu-io top "reopen -w"',
        'qemu-io top "reopen -r"',
        'qemu-io gone "reopen -r"',
    ]
    monitor.says = "Permission denied\r\n"
    why = await above.open(graph)
    assert why == (
        "QEMU can't open /i/top (node 'top') for writing, whose header it has to change:"
        " Permission denied; it would crash at the job's end, and the guest with it"
    )
    assert above.opened == []
