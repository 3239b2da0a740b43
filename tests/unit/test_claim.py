"""What a claim tells by the names of its nodes, and whether its owner lives."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qmpcommit as qc
from qmpcommit.block.chain import Disk, Image, read_disks
from qmpcommit.block.graph import build_graph
from qmpcommit.commit import claim
from qmpcommit.commit.checks import OVERRIDES
from qmpcommit.commit.claim import (
    WORK,
    Here,
    Owner,
    layers_of,
    lives,
    node_of,
    number_of,
    owner_in,
    owners_among,
    told,
)
from qmpcommit.names import NODE_NAME_LENGTH
from qmpcommit.qmp.process import began as process_began

DIGITS = st.text("0123456789abcdef", min_size=8, max_size=8)
OWNERS = st.builds(
    lambda nonce, verb, pid, began, place, since, tag, layer, commit: Owner(
        "0123456789",
        f"qmpc-0123456789n{nonce}.{verb}",
        nonce,
        verb,
        pid,
        began,
        place,
        since,
        tag,
        layer,
        *commit,
    ),
    DIGITS,
    st.sampled_from(sorted(WORK)),
    st.integers(0, 2**22),
    st.integers(0, 10**10),
    st.sampled_from(["", "abcdef", "123456"]),
    st.integers(0, 2**33),
    st.one_of(st.just(""), DIGITS),
    st.sampled_from(["", "0123456789"]),
    st.sampled_from([("", "", ""), ("abcdef0123", "0123456", "abcdef0")]),
)


def names_of(node: Mapping[str, Any]) -> Iterator[str]:
    yield node["node-name"]
    if "file" in node:
        yield from names_of(node["file"])


@given(OWNERS)
def test_what_is_told_is_read_back(owner: Owner) -> None:
    names = list(names_of(node_of(owner)))
    assert max(map(len, names)) <= NODE_NAME_LENGTH
    assert owners_among(reversed(names)) == {owner.disk: owner}


def test_a_claim_of_another_version_is_one_all_the_same() -> None:
    (owner,) = owners_among(["qmpcommit-claim-0123456789", "qmpc-0123456789x", "vda"]).values()
    assert owner == Owner("0123456789")
    assert lives(owner) is None
    assert told(owner) == (
        "another program's work of a process that is not told of another host or container"
    )


def image(node: str) -> Image:
    return Image(node, f"/{node}", "qcow2")


def test_what_stands_for_a_disk_stays_while_its_overlays_come_and_go() -> None:
    short, long = (image("base"),), (image("top"), image("base"))
    kinds: list[dict[str, Any]] = [
        {"qdev": "/machine/peripheral/vda"},
        {"device": "drive0"},
        {"exports": ("b", "a")},
    ]
    numbers = [number_of(Disk(name="x", chain=long, **kind)) for kind in kinds]
    assert numbers == [number_of(Disk(name="y", chain=short, **kind)) for kind in kinds]
    assert len(set(numbers)) == len(kinds)
    assert number_of(Disk(name="x")) != number_of(Disk(name="y"))


@pytest.mark.parametrize(
    ("exports", "held"),
    [
        ("e=a f=b", "a"),
        ("d=a e=a f=b", "a"),
        ("d=a f=b", "a"),
        ("e=lone f=b", "lone"),
        ("", "a"),
    ],
)
def test_a_disk_that_has_other_users_by_now_is_held_still(exports: str, held: str) -> None:
    """It is known by its layer, and the one beside it over the same base is not held."""
    disk = Disk(name="x", chain=(image("a"), image("base")), exports=("e",))
    owner = Owner(number_of(disk), "n", "00000000", "window", layer=layers_of(disk)[0])
    names = ["base", "a", "b", "lone", *names_of(node_of(owner))]
    edges = {
        "nodes": [{"id": i, "type": "block-driver", "name": n} for i, n in enumerate(names)],
        "edges": [{"parent": i, "child": 0, "name": "backing"} for i in (1, 2)],
    }
    serves = [each.split("=") for each in exports.split()]
    graph = build_graph(
        [{"node-name": name, "drv": "qcow2"} for name in names],
        [],
        [{"id": id_, "node-name": node, "type": "nbd"} for id_, node in serves],
        edges,
    )
    assert [d.name for d in read_disks(graph) if owner_in(graph, d) is not None] == [held]


def test_claims_are_no_disks() -> None:
    owner = Owner("0123456789", "qmpc-0123456789n00000000.commit", "00000000", "commit")
    names = list(names_of(node_of(owner)))
    nodes = [{"node-name": name, "drv": "raw", "file": "null-co://"} for name in [*names, "x"]]
    edges = {
        "nodes": [{"id": i, "type": "block-driver", "name": n} for i, n in enumerate(names)],
        "edges": [{"parent": i, "child": i + 1, "name": "file"} for i in range(len(names) - 1)],
    }
    graph = build_graph(nodes, [], [], edges)
    assert read_disks(graph) == []
    assert list(graph.nodes) == ["x"]
    assert graph.claims == set(names)


def of(pid: int, began: int, place: str) -> Owner:
    return Owner("0123456789", "node", "00000000", "window", pid, began, place, 1)


def test_whether_a_process_lives_is_known_of_those_that_can_be_seen() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen(["cat"], stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"x")
        process.stdin.flush()
        process.stdout.read(1)  # it runs what it was started for
        began = process_began(process.pid)
        assert began is not None
        here = claim.here()
        assert lives(of(process.pid, began, here.place)) is True
        assert lives(of(process.pid, began - 1, here.place)) is False  # its number was given again
        assert lives(of(process.pid, began, "other0")) is None
        assert lives(of(here.pid, here.began, here.place)) is False  # not ours any more
        assert "of cat (process" in told(of(process.pid, began, here.place))
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert lives(of(process.pid, began, here.place)) is False  # its parent has not asked yet
    process.communicate()
    assert lives(of(process.pid, began, here.place)) is False


def refused(*_: object) -> None:
    raise PermissionError


@pytest.mark.parametrize(
    ("hidden", "known"),
    [
        ({"claim.os.path.exists": lambda path: False}, None),
        ({"claim.process_began": refused}, None),
        ({"claim.os.kill": refused}, True),
    ],
)
def test_a_process_that_is_hidden_counts_as_living(
    hidden: dict[str, Any], known: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, here = os.getppid(), claim.here()
    began = process_began(parent)
    assert began is not None
    for name, value in hidden.items():
        monkeypatch.setattr(f"qmpcommit.commit.{name}", value)
    assert lives(of(parent, began, here.place)) is known


def test_where_proc_is_another_namespaces_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    readlink = os.readlink
    monkeypatch.setattr(
        os, "readlink", lambda path: "1" if path == "/proc/self" else readlink(path)
    )
    here = claim._here.__wrapped__(os.getpid())
    assert here.place == ""
    monkeypatch.setattr(claim, "here", lambda: here)
    assert lives(of(here.pid, here.began, "")) is None


def test_without_proc_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "process_began", refused)
    assert claim._here.__wrapped__(7) == Here(7, 0, "")


def test_a_process_that_ends_while_it_is_looked_at_is_dead() -> None:
    assert process_began(2**22) is None


def test_a_script_is_called_by_its_name() -> None:
    program = claim._program(os.getpid())
    assert program
    assert not program.startswith("python")
    assert claim._program(0) == ""


def test_an_override_that_there_is_not_is_refused() -> None:
    from qmpcommit.commit.checks import refuse

    assert "claim" in OVERRIDES
    refuse([], ["claim"])
    with pytest.raises(qc.InvalidRequest, match=r"free-space.*claim"):
        refuse([], ["claims"])


async def test_what_could_not_be_let_go_waits_for_the_next_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, refusals = Owner("0123456789", nonce="01234567"), [True, False]

    async def delete(vm: object, left: Owner) -> None:
        assert left == owner
        if refusals.pop(0):
            raise qc.MonitorLost("the monitor is away")

    monkeypatch.setattr(claim, "_delete", delete)
    vm: Any = SimpleNamespace(left_claims=[owner])
    with pytest.raises(qc.MonitorLost):
        await claim.clear_left(vm)
    assert vm.left_claims == [owner]
    await claim.clear_left(vm)
    assert (vm.left_claims, refusals) == ([], [])
