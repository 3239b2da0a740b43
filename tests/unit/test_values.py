from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

import qmpcommit as qc
from qmpcommit.client.host import commit_view
from qmpcommit.errors import CommandRefused
from qmpcommit.wire.commit import COMMIT_VIEW_EXAMPLE, CommitView

OUTCOME = qc.CommitOutcome(
    status="completed",
    action="pivot",
    vm="web1",
    disk="vda",
    job_id="j",
    base=qc.Image("base", "/b", "qcow2"),
    top=qc.Image("top", "/t", "qcow2", virtual_size=5),
    active=qc.Image("base", "/b", "qcow2"),
    invalidated=["/t"],
    timings=qc.Timings(started=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)),
)


def test_an_outcome_travels_through_json_unchanged() -> None:
    text = OUTCOME.model_dump_json()
    assert qc.CommitOutcome.model_validate_json(text) == OUTCOME
    assert TypeAdapter(qc.CommitOutcome).validate_json(text) == OUTCOME
    assert TypeAdapter(qc.CommitOutcome).dump_json(OUTCOME)
    members = json.loads(text)
    assert members["timings"]["started"] == "2026-01-02T03:04:05.678901+00:00"
    assert members["invalidated"] == ["/t"]
    assert members["top"]["node_name"] == "top"


def test_python_members_keep_their_types() -> None:
    members = OUTCOME.model_dump()
    assert members["timings"]["started"].tzinfo is UTC
    assert qc.CommitOutcome.model_validate(members) == OUTCOME


def test_a_wrong_outcome_is_refused() -> None:
    with pytest.raises(ValidationError):
        qc.CommitOutcome.model_validate({**OUTCOME.model_dump(), "status": "maybe"})


def test_errors_carry_facts() -> None:
    error = CommandRefused("no", vm="web1", error_class="GenericError", desc="x", command="stop")
    assert error.to_dict() == {
        "type": "CommandRefused",
        "message": "no",
        "vm": "web1",
        "error_class": "GenericError",
        "desc": "x",
        "command": "stop",
    }
    assert (error.vm, error.disk, error.job_id) == ("web1", None, None)
    error.add(vm="other", disk="vda")
    assert (error.vm, error.disk) == ("web1", "vda")


@pytest.mark.parametrize("name", dir(qc))
def test_public_names_exist(name: str) -> None:
    assert getattr(qc, name) is not None


@pytest.mark.parametrize(
    "name",
    [
        "ConnectError",
        "MonitorBusy",
        "MonitorLost",
        "VMGone",
        "DiskNotFound",
        "ChainError",
        "PolicyRequired",
        "NotReady",
        "JobConflict",
        "NoSpace",
        "CommitFailed",
        "DeadlineExceeded",
    ],
)
def test_errors_have_one_base(name: str) -> None:
    assert issubclass(getattr(qc, name), qc.QmpCommitError)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_such"):
        getattr(qc, "nothing_such")  # noqa: B009


def test_type_checkers_are_told_the_same_names() -> None:
    stub = Path(qc.__file__).with_suffix(".pyi").read_text()
    assert set(re.findall(r" as (\w+)$", stub, re.M)) | {"__version__"} == set(dir(qc))


def test_what_a_newer_daemon_adds_is_passed_over_at_every_depth() -> None:
    outcome = OUTCOME.model_dump(mode="json")
    outcome |= {"added": 1, "base": outcome["base"] | {"added": 1}}
    shown = COMMIT_VIEW_EXAMPLE | {"state": "done", "outcome": outcome, "added": 1}
    view = commit_view(shown)
    assert view.outcome == OUTCOME
    with pytest.raises(ValueError, match="added"):
        CommitView.model_validate(shown)
