"""What a job was that had concluded before anybody asked, from claims and from the block graph."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.graph import BlockGraph, build_graph
from qmpcommit.commit.claim import Owner, job_number, layer_number, node_of, number_of
from qmpcommit.commit.concluded import Found, concluded_plan
from qmpcommit.commit.plan import UNKNOWN
from tests.unit.test_claim import names_of

VDA = qc.Disk(name="vda", device="vda", qdev="d0")


def claim(top: str, base: str, job: str = "j", disk: qc.Disk = VDA) -> list[str]:
    owner = Owner(
        number_of(disk), "n", layer=layer_number("top"), job=job_number(job),
        top=layer_number(top)[:7], base=layer_number(base)[:7],
    )  # fmt: skip
    return list(names_of(node_of(owner)))


def found(
    *chains: str, users: dict[str, str], claims: list[str] | None = None, job: str = "j"
) -> Found:
    """Of layers drawn as ``top mid base``; `users` tell which node each drive uses."""
    drawn = [chain.split() for chain in chains]
    names = list(dict.fromkeys(name for chain in drawn for name in chain)) + (claims or [])
    ids = {name: number for number, name in enumerate(names)}
    edges = {(ids[a], ids[b]) for chain in drawn for a, b in pairwise(chain)}
    graph: BlockGraph = build_graph(
        [{"node-name": name, "drv": "qcow2", "file": f"/i/{name}"} for name in names],
        [
            {"device": drive, "qdev": f"d{n}", "inserted": {"node-name": node}}
            for n, (drive, node) in enumerate(users.items())
        ],
        [],
        {
            "nodes": [{"id": i, "type": "block-driver", "name": name} for name, i in ids.items()],
            "edges": [{"parent": a, "child": b, "name": "backing"} for a, b in edges],
        },
    )
    return concluded_plan("web1", graph, job, qc.Pivot())


def shown(seen: Found) -> tuple[str, ...]:
    plan = seen.plan
    between = " ".join(image.node_name for image in plan.between)
    return plan.disk.device, plan.top.node_name, between, plan.base.node_name


def test_a_claim_tells_of_the_disk_and_the_layers() -> None:
    seen = found("top mid base", users={"vda": "base"}, claims=claim("top", "base"))
    assert shown(seen) == ("vda", "top", "mid", "base")
    assert (seen.known, seen.remark, seen.plan.two_phase) == (True, "", True)
    kept = found("top mid base", users={"vda": "top"}, claims=claim("top", "mid"))
    assert shown(kept) == ("vda", "top", "", "mid")


def test_a_layer_that_qemu_has_closed_is_unknown() -> None:
    seen = found("base", users={"vda": "base"}, claims=claim("top", "base"))
    assert (seen.plan.top, seen.plan.base.node_name, seen.known) == (UNKNOWN, "base", True)


def test_a_claim_tells_of_an_intermediate_layer() -> None:
    claims = claim("mid", "base")
    seen = found("top base", "mid base", users={"vda": "top"}, claims=claims)
    assert (shown(seen), seen.plan.two_phase) == (("vda", "mid", "", "base"), False)


def test_a_disk_that_has_other_users_by_now_is_known_by_its_base() -> None:
    gone = qc.Disk(name="gone", qdev="gone")
    claims = claim("top", "base", disk=gone)
    seen = found("x", "base", users={"a": "x", "b": "base"}, claims=claims)
    assert shown(seen) == ("b", "", "", "base")


@pytest.mark.parametrize(
    "claims", [claim("top", "base", job="other"), claim("top", "gone"), []], ids=str
)
def test_without_a_word_of_its_own_it_is_known_by_what_lies_stale(claims: Any) -> None:
    seen = found("top mid base", "o", users={"vda": "base", "vdb": "o"}, claims=claims)
    assert shown(seen) == ("vda", "top", "mid", "base")
    assert "is what the block graph shows" in seen.remark


def test_what_may_be_one_of_several_is_not_known() -> None:
    two = found("a base", "b low", users={"vda": "base", "vdb": "low"})
    assert (two.known, two.plan.disk.name) == (False, "?")
    named = found("a base", "b low", users={"vda": "base", "vdb": "low"}, job="vdb")
    assert shown(named) == ("vdb", "b", "", "low")
    kept = found("top base", users={"vda": "top"}, job="qmpcommit-d0-01234567")
    assert (kept.known, kept.plan.disk.device) == (False, "vda")
