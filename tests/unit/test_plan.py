from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.graph import BlockGraph, build_graph
from qmpcommit.commit.pending import group_job_id
from qmpcommit.commit.plan import adopted_plan, is_named_in, new_job_id, plan_commit
from qmpcommit.commit.request import Request, check_job_id
from qmpcommit.errors import InvalidRequest
from qmpcommit.names import JOB_PREFIX

LAYERS = tuple(qc.Image(n, f"/i/{n}.qcow2", "qcow2") for n in ("top", "mid", "low", "base"))
DISK = qc.Disk(name="vda", chain=LAYERS, root="thr")


def plan(policy: object = None, disk: qc.Disk = DISK, **request: Any) -> qc.Plan:
    return plan_commit("web1", disk, Request("vda", policy, **request))


def test_the_default_is_the_whole_chain_into_its_bottom() -> None:
    made = plan(qc.Pivot())
    assert made.two_phase
    assert (made.top, made.base, made.between) == (LAYERS[0], LAYERS[3], LAYERS[1:3])
    assert made.arguments == {
        "job-id": made.job_id,
        "device": "thr",
        "top-node": "top",
        "base-node": "base",
        "auto-dismiss": False,
    }
    assert made.invalidated == ["/i/top.qcow2", "/i/mid.qcow2", "/i/low.qcow2"]


@pytest.mark.parametrize(
    ("request_", "top", "base"),
    [
        ({"shallow": True}, 0, 1),
        ({"base": "low"}, 0, 2),
        ({"base": "/i/mid.qcow2"}, 0, 1),
        ({"top": "mid"}, 1, 3),
        ({"top": 1, "base": 2}, 1, 2),
        ({"top": "low", "shallow": True}, 2, 3),
        ({"top": "top", "base": 3}, 0, 3),
    ],
)
def test_layers(request_: dict[str, Any], top: int, base: int) -> None:
    made = plan(qc.Pivot(), **request_)
    assert (made.top, made.base) == (LAYERS[top], LAYERS[base])
    assert made.two_phase is (top == 0)


def test_an_intermediate_layer_needs_no_policy_and_the_active_layer_does() -> None:
    assert plan(None, top="mid").policy is None
    for request in ({}, {"top": 0}, {"top": "top"}):
        with pytest.raises(qc.PolicyRequired) as error:
            plan(None, **request)
        assert (error.value.vm, error.value.disk) == ("web1", "vda")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"base": "mid", "top": "mid"}, "same layer"),
        ({"base": "top"}, "same layer"),
        ({"base": "mid", "top": "low"}, "not below"),
        ({"top": "base"}, "bottom"),
        ({"top": "base", "base": "base"}, "bottom"),
        ({"base": "nowhere"}, "is no layer"),
        ({"top": 4}, "no layer 4"),
    ],
)
def test_wrong_layers(request_: dict[str, Any], words: str) -> None:
    with pytest.raises(qc.ChainError, match=words) as error:
        plan(qc.Pivot(), **request_)
    assert "Nothing was sent" in error.value.message
    assert (error.value.vm, error.value.disk) == ("web1", "vda")


def test_a_disk_without_backing_file_or_medium() -> None:
    with pytest.raises(qc.ChainError, match="no backing file"):
        plan(qc.Pivot(), qc.Disk(name="vda", chain=LAYERS[:1]))
    with pytest.raises(qc.ChainError, match="no medium"):
        plan(qc.Pivot(), qc.Disk(name="cd0"))


def test_a_job_already_on_the_chain() -> None:
    with pytest.raises(qc.JobConflict, match="job7") as error:
        plan(qc.Pivot(), qc.Disk(name="vda", chain=LAYERS, jobs=("job7",)))
    assert error.value.job_id == "job7"


def test_shallow_and_a_base_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest):
        plan(qc.Pivot(), shallow=True, base="base")


@pytest.mark.parametrize(
    ("bandwidth", "speed"),
    [("50MiB", 50 << 20), (1000, 1000), (None, None), (0, None), ("0", None)],
)
def test_bandwidth(bandwidth: Any, speed: int | None) -> None:
    assert plan(qc.Pivot(), bandwidth=bandwidth).arguments.get("speed") == speed


@pytest.mark.parametrize("bandwidth", ["fast", "-1", -1, 2**63])
def test_a_malformed_bandwidth(bandwidth: Any) -> None:
    with pytest.raises(InvalidRequest, match="bandwidth"):
        plan(qc.Pivot(), bandwidth=bandwidth)


def test_job_ids_are_ours_well_formed_and_differ() -> None:
    disk = qc.Disk(name="/machine/peripheral-anon/device[0]" * 9)
    ids = {new_job_id(disk.name) for _ in range(50)}
    assert len(ids) == 50
    for job_id in ids:
        assert job_id.startswith(JOB_PREFIX)
        assert check_job_id(job_id) == job_id
        assert len(job_id) < 80
    assert plan(qc.Pivot(), job_id="mine-1").arguments["job-id"] == "mine-1"
    assert new_job_id("#[]").startswith(f"{JOB_PREFIX}disk-")


@pytest.mark.parametrize("job_id", ["", "1bad", "a b", "ä", "a" * 256, "a\n"])
def test_an_ill_formed_job_id(job_id: str) -> None:
    with pytest.raises(InvalidRequest):
        plan(qc.Pivot(), job_id=job_id)


def test_a_plan_tells_what_was_asked_for() -> None:
    made = plan(qc.Pivot(), on_error="stop", filter_node_name="flt", stale="delete")
    assert (made.vm, made.disk, made.policy, made.stale) == ("web1", DISK, qc.Pivot(), "delete")
    assert made.arguments["on-error"] == "stop"
    assert made.arguments["filter-node-name"] == "flt"
    assert "backing-mask-protocol" not in made.arguments
    assert plan(qc.Pivot(), backing_mask_protocol=True).arguments["backing-mask-protocol"] is True
    assert plan(qc.Pivot()).stale == "leave"
    assert plan(qc.Pivot(), top="mid").policy == qc.Pivot()


@pytest.mark.parametrize("on_error", ["report", "stop", "ignore", "enospc"])
def test_what_an_error_on_the_storage_leads_to(on_error: Any) -> None:
    made = plan(qc.Pivot(), on_error=on_error)
    assert made.arguments["on-error"] == on_error
    assert made.stalls is (on_error in ("stop", "enospc"))
    assert not plan(qc.Pivot()).stalls


def test_requests_that_are_none() -> None:
    for stale in ("leave", "rename", "delete"):
        assert plan(qc.Pivot(), stale=stale).stale == stale
    with pytest.raises(InvalidRequest, match=r"stale .*'burn'"):
        plan(qc.Pivot(), stale="burn")
    with pytest.raises(InvalidRequest, match=r"on_error .*'panic'"):
        plan(qc.Pivot(), on_error="panic")
    with pytest.raises(InvalidRequest, match="shallow or a base, not both"):
        plan(qc.Pivot(), shallow=True, base="base")
    with pytest.raises(InvalidRequest, match="'a b' is no job id"):
        plan(qc.Pivot(), job_id="a b")


def test_a_wrong_layer_says_which_was_meant() -> None:
    with pytest.raises(qc.ChainError, match=r"^top"):
        plan(qc.Pivot(), top="nowhere")
    with pytest.raises(qc.ChainError, match=r"^base"):
        plan(qc.Pivot(), base="nowhere")


def test_a_wrong_bandwidth_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no bandwidth;"):
        plan(qc.Pivot(), bandwidth="fast")


def test_the_shortest_chain_has_two_layers() -> None:
    made = plan(qc.Pivot(), qc.Disk(name="vda", chain=LAYERS[:2]))
    assert (made.top, made.base, made.between) == (*LAYERS[:2], ())


def test_all_jobs_of_a_disk_are_told() -> None:
    with pytest.raises(qc.JobConflict, match=r"job7, job8\. Wait"):
        plan(qc.Pivot(), qc.Disk(name="vda", chain=LAYERS, jobs=("job7", "job8")))


def test_a_job_id_has_room_for_the_end_of_a_name() -> None:
    """QOM paths differ in their ends."""
    made = new_job_id("/" + "x" * 40 + "aZ9" + "." * 28)
    assert made.removeprefix(f"{JOB_PREFIX}").rpartition("-")[0] == "xaZ9" + "." * 28
    assert len(made.rpartition("-")[2]) == 8
    assert check_job_id("a" * 255) == "a" * 255


# -- a job that runs already ----------------------------------------------------------------------


def graph(job: dict[str, str] | None, *, gone: tuple[str, ...] = ()) -> BlockGraph:
    """The chain top - mid - low - base under a device, and what the job ``j`` holds of it."""
    names = ("top", "mid", "low", "base")
    nodes: list[dict[str, Any]] = [
        {"node-name": name, "drv": "qcow2", "file": f"/i/{name}.qcow2"}
        for name in names
        if name not in gone
    ]
    ids = {name: i for i, name in enumerate((*names, "j"))}
    edges = [
        {"parent": ids[over], "child": ids[under], "name": "backing"}
        for over, under in pairwise(names)
        if over not in gone and under not in gone
    ]
    edges += [{"parent": ids["j"], "child": ids[n], "name": e} for e, n in (job or {}).items()]
    vertices = [{"id": ids[n], "type": "block-driver", "name": n} for n in names]
    vertices.append({"id": ids["j"], "type": "block-job", "name": "j"})
    device = {"device": "vda", "qdev": "d0", "inserted": {"node-name": "top"}}
    return build_graph(
        nodes, [] if "top" in gone else [device], [], {"nodes": vertices, "edges": edges}
    )


def adopted(job: dict[str, str] | None, *, gone: tuple[str, ...] = ()) -> qc.Plan:
    return adopted_plan("web1", graph(job, gone=gone), "j", qc.Keep())


def names_of(made: qc.Plan) -> tuple[str, str, tuple[str, ...]]:
    return made.top.node_name, made.base.node_name, tuple(i.node_name for i in made.between)


def test_an_adopted_commit_of_the_active_layer() -> None:
    made = adopted({"source": "top", "target": "base"})
    assert (made.vm, made.job_id, made.policy) == ("web1", "j", qc.Keep())
    assert (made.disk.name, len(made.disk.chain)) == ("d0", 4)
    assert made.two_phase
    assert names_of(made) == ("top", "base", ("mid", "low"))


def test_an_adopted_commit_of_an_intermediate_layer() -> None:
    made = adopted({"source": "mid", "target": "base"})
    assert not made.two_phase
    assert names_of(made) == ("mid", "base", ("low",))


def test_an_adopted_job_whose_edges_have_other_names() -> None:
    made = adopted({"top": "mid", "main node": "low"})
    assert names_of(made) == ("mid", "low", ())
    made = adopted({"source": "mid", "target": "low", "above": "top", "below": "base"})
    assert names_of(made) == ("mid", "low", ())
    # The main node of an intermediate layer's commit is the disk's root, which is not committed.
    made = adopted({"main node": "top", "intermediate node": "mid", "base": "low"})
    assert names_of(made) == ("mid", "low", ())
    assert not made.two_phase


def test_an_adopted_job_whose_layer_is_gone_from_the_graph() -> None:
    made = adopted({"source": "mid", "target": "base"}, gone=("base",))
    assert names_of(made)[0] == "mid"


def test_an_adopted_job_whose_base_is_not_in_the_chain_any_more() -> None:
    made = adopted({"source": "top", "target": "base"}, gone=("low",))
    assert names_of(made) == ("top", "base", ())
    assert adopted({"source": "top", "target": "mid"}, gone=("top",)).base.node_name == "mid"


def test_an_adopted_job_that_nothing_is_known_of() -> None:
    made = adopted(None)
    assert (made.disk.name, made.disk.chain, made.between) == ("?", (), ())
    assert made.two_phase
    nothing = qc.Image(node_name="", filename="(unknown)", driver="")
    assert (made.top, made.base) == (nothing, nothing)


def test_what_a_job_id_of_ours_tells_of_its_disk() -> None:
    disk = qc.Disk(name="/machine/vda 1")
    assert is_named_in(new_job_id(disk.name), disk)
    assert is_named_in(group_job_id(disk.name, "0123abcd", 1, 2), disk)
    assert not is_named_in(new_job_id("vda"), disk)
    assert not is_named_in("mine", disk)
