"""What a VM shows of a death, and what is found in it: enumerated, without a QEMU."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qmpcommit.block.chain import Disk, read_disks
from qmpcommit.block.graph import build_graph
from qmpcommit.block.throttle import Noted
from qmpcommit.commit.claim import job_number, layer_number, number_of, owners_among
from qmpcommit.commit.overlay.file import is_being_made, make_file, maker_of
from qmpcommit.commit.pending import group_job_id
from qmpcommit.guest.marks import mark_of_discard, mark_of_flush, mark_of_recycle
from qmpcommit.qmp.process import is_alive, process_identity
from qmpcommit.recovery.findings import Decide, Finding
from qmpcommit.recovery.jobs import Groups, pending_order
from qmpcommit.recovery.lookup import ORDER, look_up
from qmpcommit.recovery.seen import Seen

JOB = "qmpcommit-vda-0123abcd"
QDEV = "/machine/peripheral/vda/virtio-backend"
GROUP = "0a0b0c0d"
FRESH = f"{JOB}-top"
DISCARD = "qmpcommit-d0a0b0c0d-1234-top"
FLUSH = f"qmpcommit-{mark_of_flush(number_of(Disk('vda', qdev=QDEV)))}-paused"
OWNERS = ("dead", "living", "nobody")


def layer(name: str, below: str | None = None) -> dict[str, Any]:
    children = [{"child": "file", "node-name": f"{name}-f"}]
    if below is not None:
        children.append({"child": "backing", "node-name": below})
    return {"node-name": name, "drv": "qcow2", "file": f"/vms/{name}", "children": children}


def job(status: str, job_id: str = JOB, kind: str = "commit", error: str = "") -> dict[str, Any]:
    return {"id": job_id, "type": kind, "status": status, **({"error": error} if error else {})}


def show(
    jobs: Sequence[Mapping[str, Any]] = (),
    *,
    chain: Sequence[str] = ("top", "base"),
    others: Sequence[dict[str, Any]] = (),
    owner: str = "dead",
    verb: str = "commit",
    tag: str = "",
    status: str = "running",
    names: Mapping[str, str] | None = None,
    vm: str = "vm1",
    group: str = "",
    of: str = "",
    was: str = "",
) -> Seen:
    """A VM with the disk vda, on which these nodes are left, and whom its claim names."""
    below = [*chain[1:], None]
    nodes = [layer(name, under) for name, under in zip(chain, below, strict=True)]
    nodes += others
    files = [
        {"node-name": f"{n['node-name']}-f", "drv": "file", "file": n["file"]}
        for n in nodes
        if n["drv"] == "qcow2"
    ]
    inserted = {"node-name": chain[0], **({"group": group, "bps_wr": 1} if group else {})}
    device = {"device": "", "qdev": QDEV, "inserted": inserted}
    graph = build_graph([*nodes, *files], [device], [], None)
    disks = tuple(read_disks(graph))
    if owner == "nobody":
        return _seen(vm, status, jobs, graph, names)
    number = number_of(disks[0])
    claims = {f"qmpcommit-claim-{number}", f"qmpc-{number}n0000000a.{verb}"}
    if tag:
        claims.add(f"qmpc-{number}f{tag}")
    if of:
        claims.add(f"qmpc-{number}j{job_number(of)}")
    if was:
        claims.add(f"qmpc-{number}b{layer_number(was)}")
    (held,) = owners_among(claims).values()
    graph = graph._replace(claims=frozenset(claims))
    shown = _seen(vm, status, jobs, graph, names)
    return shown._replace(living=(held,)) if owner == "living" else shown._replace(dead=(held,))


def _seen(
    vm: str,
    status: str,
    jobs: Sequence[Mapping[str, Any]],
    graph: Any,
    names: Mapping[str, str] | None,
) -> Seen:
    listed = {str(each["id"]): each for each in jobs}
    disks = tuple(read_disks(graph))
    return Seen(vm, f"{vm}.sock", status, listed, graph, disks, names=names or {})


def kinds(found: Sequence[Finding]) -> list[str]:
    return [each.kind for each in found if each.kind != "claim"]


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "creating": ({"jobs": [job("concluded", f"{JOB}-create-qcow2", "create")]}, "dismissed"),
    "held": ({"jobs": [job("pending")]}, "undone"),
    "made": (
        {"jobs": [job("ready")], "others": [layer(FRESH)], "names": {FRESH: "base"}},
        "closed, and its file deleted",
    ),
    "pivoted": (
        {
            "jobs": [job("concluded")],
            "chain": ["base"],
            "others": [layer(FRESH), layer("top", "base")],
            "names": {FRESH: "base"},
            "status": "paused",
        },
        "laid over the base",
    ),
    "discarding": (
        {
            "chain": [DISCARD, "top", "base"],
            "names": {DISCARD: "base"},
            "status": "paused",
            "verb": "disc",
        },
        "undone",
    ),
    "discarded": (
        {
            "chain": [DISCARD, "base"],
            "others": [layer("top", "base")],
            "names": {DISCARD: "base"},
            "status": "paused",
            "verb": "disc",
        },
        "brought to its end",
    ),
    "in its last flush": (
        {
            "jobs": [job("running")],
            "others": [{"node-name": FLUSH, "drv": "null-co", "file": "null-co://"}],
            "status": "paused",
        },
        "goes on",
    ),
    "ended": ({"jobs": [job("concluded")]}, "dismissed"),
    "stale": ({"chain": ["base"], "others": [layer("top", "base")]}, "closed"),
}
"""What is shown of each, and what is done first."""


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("owner", OWNERS)
def test_what_is_left_is_found_unless_its_owner_lives(left: str, owner: str) -> None:
    shown, does = LEFT[left]
    found = look_up([show(owner=owner, **shown)])
    if owner == "living":
        assert found == []
    elif (left, owner) == ("stale", "nobody"):
        assert found == []  # a layer that somebody has opened for a purpose of their own
    else:
        assert found[0].does
        assert does in found[0].next
        assert [ORDER.index(e.kind) for e in found] == sorted(ORDER.index(e.kind) for e in found)


@pytest.mark.parametrize("left", LEFT)
def test_whoever_may_live_is_left_alone_and_told(left: str) -> None:
    seen = show(owner="living", **LEFT[left][0])
    found = look_up([seen._replace(unsure=seen.living)])
    assert [each.kind for each in found] == ["claim"]
    assert not found[0].does
    assert "--override claim" in found[0].next


@pytest.mark.parametrize("decide", [None, "pivot", "keep", "abort"])
@pytest.mark.parametrize("status", ["created", "running", "paused", "ready", "standby"])
def test_what_nobody_decided_only_the_caller_does(status: str, decide: Decide | None) -> None:
    found = look_up([show([job(status)])], decide)
    assert kinds(found) == ["ready" if status in ("ready", "standby") else "copying"]
    assert found[0].does is (decide is not None)
    assert found[-1].kind == "claim", "it tells of whom the job was"
    assert not found[-1].does


def test_what_is_not_ours_is_not_found() -> None:
    foreign = [job("pending", "theirs"), job("concluded", "theirs2"), job("ready", "mirror0")]
    others = [layer("theirs-top"), {**layer("null"), "drv": "null-co"}]
    assert look_up([show(foreign, others=others, owner="nobody")], "abort") == []


STATUSES = {
    "pending": job("pending"),
    "finalized": job("concluded"),
    "undone": job("concluded", error="Operation canceled"),
    "ready": job("ready"),
    "gone": None,
}


@pytest.mark.parametrize("first", STATUSES)
@pytest.mark.parametrize("second", STATUSES)
@pytest.mark.parametrize("where", ["one VM", "two VMs", "one VM of two"])
@pytest.mark.parametrize("decide", [None, "keep", "abort"])
def test_a_group_is_ended_as_one(
    first: str, second: str, where: str, decide: Decide | None
) -> None:
    """What is held goes the way of what was finalized, wherever that is; or nobody knows."""
    members = []
    for number, status in enumerate((first, second), 1):
        member = STATUSES[status]
        job_id = group_job_id("vda" if number == 1 else "vdb", GROUP, number, 2)
        members.append([] if member is None else [{**member, "id": job_id}])
    if where == "one VM":
        seen = [show(members[0] + members[1], verb="group", tag=GROUP)]
    elif where == "two VMs":
        seen = [show(members[0], verb="group"), show(members[1], verb="group", vm="vm2")]
    else:
        seen = [show(members[0], verb="group")]
        second = "gone"
    held = [
        str(each["id"])
        for each in itertools.chain(*members[: 1 if where == "one VM of two" else 2])
        if each["status"] == "pending"
    ]
    orders = {pending_order(each, Groups(seen), decide) for each in held}
    assert len(orders) <= 1
    found = {each.what: each for each in look_up(seen, decide) if each.kind == "pending"}
    assert set(found) == set(held)
    if not held:
        return
    (order,) = orders
    if "finalized" in (first, second):
        assert order == "job-finalize"
    elif "gone" not in (first, second) or where == "one VM":
        assert order == "job-cancel"
    else:  # it may have been finalized on a VM that is not looked at
        assert order == {None: None, "keep": "job-finalize", "abort": "job-cancel"}[decide]
    assert all(each.does is (order is not None) for each in found.values())


def test_what_tells_of_the_others_is_not_dismissed_before_they_are_known() -> None:
    ids = [group_job_id(disk, GROUP, n, 2) for n, disk in enumerate(("vda", "vdb"), 1)]
    one = show([job("concluded", ids[0])], verb="group")
    (told, _) = look_up([one])
    assert told.kind == "concluded"
    assert not told.does
    both = look_up([one, show([job("pending", ids[1])], verb="group", vm="vm2")])
    assert kinds(both) == ["pending", "concluded"]
    assert both[0].next == f"It is finalized: group {GROUP} was finalized"
    assert both[1].does


@pytest.mark.parametrize("others", [1, 2])
def test_a_member_whose_claim_was_left_with_no_job_had_ended(others: int) -> None:
    """It was dismissed on another VM: what tells of it alone is not needed any more."""
    ids = [group_job_id("vda", GROUP, n, 1 + others) for n in (1, 2)]
    one = show([job("concluded", ids[0])], verb="group")
    for of, does in (("", False), (ids[0], False), (ids[1], others == 1)):
        there = show(verb="group", vm="vm2", of=of)
        (told,) = (each for each in look_up([one, there]) if each.kind == "concluded")
        assert told.does is does
    pending = show([job("pending", ids[0])], verb="group")
    held = show(verb="group", vm="vm2", of=ids[1])
    assert not look_up([pending, held])[0].does, "that one may have been finalized"


def test_a_group_that_never_began_whole_is_not_torn() -> None:
    seen = [show([job("ready", group_job_id("vda", GROUP, 1, 2))], verb="group", tag=GROUP)]
    assert "cancelled" in look_up(seen, "pivot")[0].next
    assert "'abort'" in look_up(seen, "abort")[0].next


def marked(owner: str, done: str) -> dict[str, Any]:
    return {"node-name": f"qmpcommit-{owner}-{done}", "drv": "null-co"}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("status", ["paused", "prelaunch", "running", "io-error"])
def test_a_guest_that_stands_still_for_somebody_who_is_gone(owner: str, status: str) -> None:
    number = number_of(show().disks[0])
    for mark in (mark_of_recycle(number), mark_of_discard(number), "g0a0b0c0d", "w0a0b0c0d"):
        verb, tag = ("window", mark[1:]) if mark[0] == "w" else ("group", "")
        seen = show(others=[marked(mark, "paused")], owner=owner, status=status,
                    verb=verb, tag=tag)  # fmt: skip
        found = look_up([seen])
        assert kinds(found) == ([] if owner == "living" else ["frozen"])
        if owner != "living":
            goes = status in ("paused", "prelaunch")
            assert (found[0].next == "It goes on") is goes


def test_a_guest_does_not_go_on_before_its_overlay_lies() -> None:
    number = number_of(show(chain=["base"]).disks[0])
    mark = marked(mark_of_recycle(number), "paused")
    shown = {**LEFT["pivoted"][0], "others": [layer(FRESH), mark]}
    assert kinds(look_up([show(**shown)])) == ["recycle", "frozen", "concluded"]
    unknown = look_up([show(**{**shown, "names": {}})])
    assert [each.does for each in unknown][:2] == [False, False]
    assert "until its disks are whole again" in unknown[1].next


@pytest.mark.parametrize(("done", "does"), [("reset", "It is reset"), ("paused", "stays stopped")])
def test_a_guest_whose_disk_was_thrown_away(done: str, does: str) -> None:
    shown = {**LEFT["discarded"][0], "others": []}
    number = number_of(show(**shown).disks[0])
    found = look_up([show(**{**shown, "others": [marked(mark_of_discard(number), done)]})])
    assert kinds(found) == ["frozen"]
    assert does in found[0].next


def test_discards_over_several_vms_all_go_one_way() -> None:
    laid = show(**LEFT["discarding"][0])
    swapped = show(vm="vm2", **LEFT["discarded"][0])
    assert "undone" in look_up([laid])[0].next
    both = [each for each in look_up([laid, swapped]) if each.kind == "discard"]
    assert len(both) == 2
    assert all("brought to its end" in each.next for each in both)


def test_limits_that_a_killed_commit_has_left_are_told() -> None:
    found = look_up([show(group="qmpcommit:vda")])
    assert kinds(found) == ["throttle"]
    assert not found[0].does
    assert look_up([show(group="qmpcommit:vda", owner="living")]) == []
    assert look_up([show(group="theirs", owner="nobody")]) == []


@pytest.mark.parametrize("group", ["", "qmpcommit:vda"])
def test_limits_that_a_killed_commit_has_noted_are_put_back(group: str) -> None:
    limits = (Noted("q", QDEV, "ä b"),)
    assert Noted.read(limits[0].id) == limits[0]
    found = look_up([show(group=group)._replace(limits=limits)])
    assert [(each.kind, each.disk, each.does) for each in found] == [
        ("throttle", "vda", True),
        ("claim", "vda", True),
    ]
    assert look_up([show(group=group, owner="living")._replace(limits=limits)]) == []
    other = (Noted("f", "gone"),)
    assert [e.does for e in look_up([show(owner="nobody")._replace(limits=other)])] == [True]
    assert look_up([show(owner="living")._replace(limits=other)]) == []


def test_an_empty_file_is_deleted() -> None:
    found = look_up([show(owner="nobody")._replace(files=("/vms/fresh",))])
    assert [(each.kind, each.what, each.does) for each in found] == [("file", "/vms/fresh", True)]


def test_a_file_that_whoever_lives_may_have_made_just_now_is_left_alone() -> None:
    for owner, found in (("living", []), ("dead", ["file", "claim"]), ("nobody", ["file"])):
        seen = show(owner=owner)._replace(files=("/vms/fresh.qcow2",))
        assert [each.kind for each in look_up([seen])] == found


def test_who_made_a_file_is_seen_by_it(tmp_path: Path) -> None:
    made = make_file(str(tmp_path / "fresh"), "")
    made.close()
    maker = maker_of(made.path)
    if not maker:
        pytest.skip("no extended attributes here")
    assert is_alive(maker)
    assert not is_being_made(made.path)  # by another process, that is
    os.setxattr(made.path, "user.qmpcommit", process_identity(os.getppid()).encode())
    assert is_being_made(made.path)
    os.setxattr(made.path, "user.qmpcommit", f"{os.getppid()}.1".encode())
    assert not is_being_made(made.path)


def test_a_recycle_s_overlay_that_was_active_is_no_empty_one() -> None:
    """Its format node is closed already, and its file's node is not."""
    file = {"node-name": f"{JOB}-file", "drv": "file", "file": "/vms/r9"}
    seen = show(chain=["r13", "base"], others=[file], was=FRESH)
    found = look_up([seen])
    assert kinds(found) == ["node"]
    assert "/vms/r9 is stale" in found[0].message
    assert "writes to /vms/r13 now" in found[0].message
    assert "Never boot it" in found[0].next
    other = look_up([show(chain=["r13", "base"], others=[file], was="another")])
    assert kinds(other) == ["recycle"]
