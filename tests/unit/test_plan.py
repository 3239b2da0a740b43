from __future__ import annotations

from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.plan import (
    JOB_PREFIX,
    Request,
    check_job_id,
    check_vm_state,
    new_job_id,
    plan_commit,
)
from qmpcommit.errors import InvalidRequest, VMStateError

LAYERS = tuple(qc.Image(n, f"/i/{n}.qcow2", "qcow2") for n in ("top", "mid", "low", "base"))
DISK = qc.Disk(name="vda", chain=LAYERS, root="thr")


def plan(policy: object = None, disk: qc.Disk = DISK, **request: Any) -> qc.Plan:
    return plan_commit("web1", disk, Request("vda", **request), policy)


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
    made = plan(qc.Keep(), **request_)
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


@pytest.mark.parametrize("status", ["inmigrate", "postmigrate", "finish-migrate"])
def test_states_in_which_the_disks_are_anothers(status: str) -> None:
    with pytest.raises(VMStateError, match=status):
        check_vm_state("web1", status)


@pytest.mark.parametrize("status", ["running", "paused", "prelaunch", "io-error", "shutdown"])
def test_states_in_which_a_commit_is_fine(status: str) -> None:
    check_vm_state("web1", status)
