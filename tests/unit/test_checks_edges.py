"""The checks before the first byte where something is not known: a note, never a crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.files import Locks
from qmpcommit.block.graph import BlockGraph
from qmpcommit.block.identity import Place
from qmpcommit.commit.checks import (
    CHECKS,
    Finding,
    check_commit,
    finding,
    read_only,
    room,
    sharing,
)
from qmpcommit.commit.plan import Plan
from tests.unit.test_checks import SIZE, found, layer, level, made, protocol


def test_a_file_that_can_not_be_read_is_told_and_the_other_checks_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreadable(case: Any) -> Iterator[Finding]:
        raise PermissionError(13, "Permission denied", "/i/base")
        yield

    monkeypatch.setitem(CHECKS, "corrupt", unreadable)
    graph, plan = made()
    (told,) = found("corrupt", graph, plan)
    assert told.level == "note"
    assert "/i/base: Permission denied" in told.message


def test_sizes_that_qemu_does_not_tell_are_not_compared() -> None:
    for name in ("top", "base"):
        node = layer(name)
        del node["image"]["virtual-size"]
        (told,) = found("size", *made(node))
        assert (told.level, "does not tell" in told.message) == ("note", True)


@pytest.mark.parametrize(("driver", "expected"), [("file", "note"), ("nbd", "refuse")])
def test_a_base_without_a_format_grows_if_its_protocol_does(driver: str, expected: str) -> None:
    base = protocol("base", driver, SIZE // 2)
    base["node-name"] = "base"
    graph, plan = made(base)
    del graph.nodes["base"].children["file"]  # type: ignore[attr-defined]
    assert level("size", graph, plan) == expected


def test_a_base_outside_the_disk_has_no_backing_names_to_compare() -> None:
    graph, plan = made()
    other = replace(plan, disk=replace(plan.disk, chain=plan.disk.chain[:2]))
    (told,) = found("on-disk-backing", graph, other)
    assert (told.level, "not in the disk's chain" in told.message) == ("note", True)


def test_layers_that_the_graph_does_not_have_are_not_checked() -> None:
    graph, plan = made()
    nowhere = replace(plan, base=qc.Image("gone", "/i/gone", "qcow2"))
    assert {f.level for f in check_commit(graph, nowhere)} == {"note"}


def test_whether_a_process_that_ended_declared_a_node_is_not_known(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert read_only._declared_read_only("base", pid) is None


def test_locks_whose_owner_can_not_be_told_are_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(finding, "locate", lambda *_, **__: Place(str(tmp_path), ""))
    monkeypatch.setattr(sharing, "image_locks", lambda *_: Locks("unknown"))
    notes = [f for f in found("base-shared", *made()) if "is locked, but" in f.message]
    assert [f.level for f in notes] == ["note"]


def test_a_layer_that_has_left_the_graph_has_no_backing_name_to_compare() -> None:
    broken: Any = {"backing-filename": "json:{"}
    graph, plan = made(layer("mid", **broken))
    assert level("on-disk-backing", graph, plan) == "refuse"
    top, mid, base = plan.disk.chain
    gone = replace(plan.disk, chain=(top, replace(mid, node_name="gone"), base))
    assert level("on-disk-backing", graph, replace(plan, disk=gone)) == "ok"


@pytest.mark.parametrize("why", ["no header", "a file beside it"])
def test_room_on_a_device_that_is_not_known_to_be_used_is_a_note(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "locate", lambda *_, **__: Place("/dev/vg/base", ""))
    monkeypatch.setattr(room, "is_block_device", lambda _: True)
    monkeypatch.setattr(room, "device_size", lambda _: 1 << 20)
    header = None if why == "no header" else SimpleNamespace(backing=None)
    monkeypatch.setattr(room, "read_header", lambda _: header)
    beside = protocol("data", "host_device"), "base data-file data-file"
    graph, plan = made(beside[0], joined=(beside[1],)) if header else made()
    (told,) = found("free-space", graph, plan)
    assert told.level == "note"
    assert "it is not known what /i/base uses of its 1 MiB" in told.message
    assert told.numbers["needed"] > 1 << 20


def _pivoting() -> tuple[BlockGraph, Plan]:
    graph, plan = made()
    return graph, replace(plan, policy=qc.Pivot())


DIRECT = {"cache": {"direct": True, "no-flush": False}}


@pytest.mark.parametrize("policy", [qc.Pivot(), qc.Keep()])
def test_what_a_pivot_changes_of_the_disk_is_told(policy: qc.Pivot | qc.Keep) -> None:
    nodes = {**layer("top"), "detect_zeroes": "unmap"}, {**protocol("top"), **DIRECT}
    graph, plan = made(*nodes)
    notes = found("runtime", graph, replace(plan, policy=policy))
    if isinstance(policy, qc.Keep):
        assert [each.level for each in notes] == ["ok"]
        return
    (note,) = notes
    assert note.level == "note"
    assert "detect-zeroes off instead of unmap, cache.direct off instead of on" in note.message
    assert [each.level for each in found("runtime", *_pivoting())] == ["ok"]
