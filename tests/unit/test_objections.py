"""What can't be asked is refused, and what can be is not."""

from __future__ import annotations

from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.objections import refuse_idle
from qmpcommit.commit.plan import plan_commit
from qmpcommit.commit.request import Request
from qmpcommit.daemon.asked import check_asked
from qmpcommit.errors import InvalidRequest
from qmpcommit.wire.commit import CommitRequest

LAYERS = tuple(qc.Image(n, f"/i/{n}.qcow2", "qcow2") for n in ("top", "mid", "low", "base"))
DISK = qc.Disk(name="vda", chain=LAYERS, root="top")


async def decide(ready: qc.Ready) -> qc.Pivot:
    """What an embedder's own policy may look like."""
    return qc.Pivot()


NO_PIVOT = {
    "keep": qc.Keep(),
    "abort": qc.Abort(),
    "keep or abort": qc.Check(["true"], passed=qc.Keep(), failed=qc.Abort()),
}
PIVOTS: dict[str, Any] = {
    "pivot": qc.Pivot(),
    "recycle": qc.Recycle("/i/fresh"),
    "hold": qc.Hold(),
    "check": qc.Check(["true"]),
    "check that keeps": qc.Check(["true"], passed=qc.Keep(), failed=qc.Recycle("/i/fresh")),
    "callable": decide,
}


@pytest.mark.parametrize("policy", [*NO_PIVOT, *PIVOTS])
def test_no_decision_is_asked_for_an_intermediate_layer(policy: str) -> None:
    asked = {**NO_PIVOT, **PIVOTS}[policy]
    for top in (1, "low"):
        if policy == "pivot":
            assert not plan_commit("web1", DISK, Request("vda", asked, top=top)).two_phase
            continue
        with pytest.raises(InvalidRequest, match=r"one phase.*Nothing was sent") as refused:
            plan_commit("web1", DISK, Request("vda", asked, top=top, stale="delete"))
        assert (refused.value.vm, refused.value.disk) == ("web1", "vda")
        assert getattr(asked, "kind", "a policy of your own") in refused.value.message
    assert plan_commit("web1", DISK, Request("vda", asked, top=0)).two_phase


@pytest.mark.parametrize("options", [{"stale": "delete"}, {"stale": "rename"}, {"on_pivot": 1}])
def test_what_only_a_pivot_makes_possible_needs_one(options: dict[str, Any]) -> None:
    for what, policy in NO_PIVOT.items():
        refuse_idle(policy)
        word = options.get("stale", "persist")
        with pytest.raises(InvalidRequest, match=f"after an? {what.split()[0]}.*{word}"):
            refuse_idle(policy, **options)
    for policy in (None, *PIVOTS.values()):
        refuse_idle(policy, **options)


def test_what_is_asked_of_a_group_has_an_effect_on_one_of_its_members() -> None:
    keep = CommitRequest(disk="a", policy=qc.Keep(), delete=True)
    pivot = CommitRequest(disk="b", policy=qc.Pivot(), delete=True)
    check_asked([keep, pivot])
    with pytest.raises(InvalidRequest, match="a keep"):
        check_asked([keep, keep])
    with pytest.raises(InvalidRequest, match="there is no check 'frob'"):
        check_asked([pivot, CommitRequest(disk="b", policy=qc.Pivot(), override=["frob"])])
