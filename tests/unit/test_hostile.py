"""Whatever arrives, from a monitor, a client or a file: our own errors, and no others."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import qmpcommit as qc
from qmpcommit.block.bitmaps import plan_carrying
from qmpcommit.block.chain import read_disks
from qmpcommit.block.graph import build_graph
from qmpcommit.commit.job_events import Hearing
from qmpcommit.commit.ledger import load_state
from qmpcommit.commit.policy import KINDS, parse_policy
from qmpcommit.daemon.config import parse
from qmpcommit.qmp.address import Address
from qmpcommit.qmp.events import parse_event
from qmpcommit.units import parse_seconds, parse_size
from qmpcommit.wire.commit import CommitRequest, Decision, NewVM

WORDS = [
    "event", "data", "timestamp", "id", "device", "status", "type", "len", "offset", "error",
    "seconds", "microseconds", "kind", "pivot", "keep", "hold", "check", "recycle", "command",
    "timeout", "otherwise", "passed", "failed", "overlay", "policy", "disk", "base", "top",
    "BLOCK_JOB_READY", "JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "SHUTDOWN", "node-name",
    "file", "image", "drv", "qcow2", "backing", "inserted", "children", "child", "name", "ready",
    "listen", "socket", "limits", "vm", "qmp", "state", "bandwidth", "50MiB", "j",
]  # fmt: skip
text = st.sampled_from(WORDS) | st.text(max_size=20)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
anything = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=5),
    max_leaves=20,
)
thing = st.dictionaries(text, anything, max_size=6)


@settings(max_examples=500)
@given(name=text, data=anything, stamp=anything)
def test_events(name: str, data: Any, stamp: Any) -> None:
    message = {"event": name, "data": data, "timestamp": stamp}
    assert parse_event(message) is not None
    Hearing("j", lambda fact: None).message(message)


of_a_kind = st.builds(
    lambda kind, more: {**more, "kind": kind}, st.sampled_from(list(KINDS)), thing
)


@settings(max_examples=500)
@given(value=of_a_kind | anything | st.text(max_size=60))
def test_policies(value: Any) -> None:
    with suppress(qc.InvalidRequest, qc.PolicyRequired):
        parse_policy(value)


@given(depth=st.integers(0, 5000))
@settings(max_examples=20)
def test_deep_policies(depth: int) -> None:
    with suppress(qc.InvalidRequest):
        parse_policy('{"kind": "hold", "otherwise": ' * depth + "1" + "}" * depth)


@settings(max_examples=500)
@given(value=scalar)
def test_sizes_times_and_addresses(value: Any) -> None:
    with suppress(qc.InvalidRequest):
        assert parse_size(value, "size") >= 0
    with suppress(qc.InvalidRequest):
        assert parse_seconds(value, "time") >= 0
    if isinstance(value, str):
        with suppress(qc.InvalidRequest):
            str(Address.parse(value))


@settings(max_examples=500)
@given(raw=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_configurations_of_any_bytes(raw: bytes) -> None:
    with suppress(qc.InvalidRequest):
        parse(raw, "c")


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(k)} = {toml(v)}' for k, v in value.items())}}}"
    return repr(value) if isinstance(value, int) else '"x"'


@settings(max_examples=500)
@given(members=thing)
def test_configurations_of_wrong_types(members: dict[str, Any]) -> None:
    raw = "".join(f"{json.dumps(name)} = {toml(value)}\n" for name, value in members.items())
    with suppress(qc.InvalidRequest):
        parse(raw.encode("utf-8", "replace"), "c")


@settings(max_examples=500)
@given(body=thing)
def test_requests(body: dict[str, Any]) -> None:
    for model in (CommitRequest, Decision, NewVM):
        with suppress(ValidationError):
            model.model_validate_json(json.dumps(body))


@settings(max_examples=300)
@given(state=thing)
def test_states_of_a_damaged_record(state: dict[str, Any]) -> None:
    with suppress(ValueError, TypeError, KeyError):
        load_state(state)


node = st.fixed_dictionaries(
    {"node-name": text, "drv": st.sampled_from(["qcow2", "file", "throttle"]), "file": text},
    optional={"backing_file": text, "image": thing, "children": st.just([]), "ro": st.booleans()},
)


@settings(max_examples=300)
@given(nodes=st.lists(node, max_size=5))
def test_graphs_that_make_no_sense(nodes: list[dict[str, Any]]) -> None:
    """Names twice, loops, backing files that are nobody's: read, and found to be no disk."""
    graph = build_graph(nodes, [], [], None)
    read_disks(graph)
    for name in graph.nodes:
        graph.chain(name)
        graph.leaf(name)
        graph.root(name)
        plan_carrying(graph, [name], name)
