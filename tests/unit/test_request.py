"""What can be asked of a commit is the same at every door, and reaches the engine through each."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

import qmpcommit as qc
from qmpcommit.cli.commit import _DECISIONS, commit
from qmpcommit.client.vm import RemoteGroupOptions, RemoteOptions, body_of
from qmpcommit.commit.request import CommitOptions, DiskOptions, GroupOptions, Request
from qmpcommit.commit.stale_layers import Around, Hooks
from qmpcommit.wire.commit import Asked, CommitRequest
from qmpcommit.wire.group import GroupRequest
from qmpcommit.wire.values import Quiescing

ALL = {each.name for each in fields(Request)}
PROCESS = set(Hooks.__annotations__)
"""What only lives in the caller's process; the daemon has two of them as values."""
AS_VALUES = {"on_pivot", "converge"}
GROUP = set(GroupOptions.__annotations__)

GIVEN: dict[str, Any] = {
    "disk": "vda",
    "policy": qc.Hold(5.0),
    "base": "/i/base",
    "top": 0,
    "shallow": True,
    "bandwidth": 4096,
    "delete": True,
    "stale": "delete",
    "on_error": "stop",
    "carry_bitmaps": False,
    "keep_relative": True,
    "filter_node_name": "filter",
    "backing_mask_protocol": True,
    "override": ("claim",),
    "only_if": ("true",),
    "timeout": 7.0,
    "job_id": "mine",
}
"""A value for each that differs from its default."""


def test_all_doors_take_the_same() -> None:
    assert {"disk", *CommitOptions.__annotations__} == ALL == GIVEN.keys()
    assert set(RemoteOptions.__annotations__) == ALL - {"disk"} | AS_VALUES | {"priority"}
    assert set(RemoteGroupOptions.__annotations__) == GROUP | AS_VALUES | {"priority"}
    assert CommitRequest.model_fields.keys() == ALL | AS_VALUES | {"priority"}
    assert Asked.model_fields.keys() == GROUP | AS_VALUES | {"priority"}
    own = {"members", "policy", "hold_limit", *Quiescing.model_fields}
    assert GroupRequest.model_fields.keys() == Asked.model_fields.keys() | own
    assert set(Around._fields) > PROCESS
    doors = inspect.signature(qc.Session.commit).parameters.keys()
    assert doors == {"self", "claim"} | ALL | PROCESS


def test_the_command_has_an_option_for_each() -> None:
    named = {each.name for each in commit.params if isinstance(each, click.Option)}
    otherwise = {"policy": set(_DECISIONS), "stale": {"rename"}, "carry_bitmaps": {"no_bitmaps"}}
    for name in ALL - {"disk", "job_id"} | AS_VALUES:  # its job ids are made for it
        assert otherwise.get(name, {name}) <= named, name


@pytest.mark.parametrize("name", sorted(ALL - {"disk", "delete"}))
def test_each_travels_to_the_daemon_and_reaches_the_library_there(name: str) -> None:
    asked = {"policy": None, name: GIVEN[name]}
    wanted = Request("vda", **asked)
    body = body_of("vda", **asked)
    assert name in body
    arrived = CommitRequest.model_validate(body).asked
    assert getattr(arrived, name) == GIVEN[name]
    assert arrived.leaves == wanted.leaves


def test_what_is_not_asked_does_not_travel() -> None:
    assert body_of("vda") == {"disk": "vda"}
    assert body_of("vda", delete=True, priority=2) == {
        "disk": "vda", "stale": "delete", "priority": 2
    }  # fmt: skip
    several = body_of("vda", base=Path("/i/base"), on_pivot=["true"], converge=2)
    assert several == {"disk": "vda", "base": "/i/base", "on_pivot": ["true"], "converge": 2.0}


@pytest.mark.parametrize("name", sorted(DiskOptions.__annotations__))
def test_each_reaches_every_disk_of_a_promised_group(name: str) -> None:
    members = [{"vm": f"web{number}", "disk": "vda"} for number in (1, 2)]
    other = {"base": None} if name == "shallow" else {"shallow": False}
    options = body_of("", **{name: GIVEN[name]}, **other)
    del options["disk"]
    group = GroupRequest.model_validate({"members": members, "policy": {"kind": "keep"}, **options})
    for request in group.requests("0" * 8):
        expected = "delete" if name in ("delete", "stale") else GIVEN[name]
        seen = request.asked.leaves if name in ("delete", "stale") else getattr(request.asked, name)
        assert seen == expected


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"stale": "burn"}, "stale is"),
        ({"delete": True, "stale": "rename"}, "exclude each other"),
        ({"on_error": "explode"}, "on_error is"),
        ({"only_if": "true"}, "only_if takes a command"),
        ({"timeout": -1}, "timeout"),
        ({"policy": 7}, "is no policy"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_is_said(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(qc.InvalidRequest, match=told):
        Request("vda", **wrong)


def test_what_lives_in_the_process_does_not_travel() -> None:
    async def decide(ready: qc.Ready) -> qc.Keep:
        return qc.Keep()

    with pytest.raises(qc.InvalidRequest, match="can't survive it"):
        body_of("vda", policy=decide)
