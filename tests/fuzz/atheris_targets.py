"""Coverage-guided fuzzing of what reads foreign data, with atheris; no part of the test run.

    ./tests/run.sh --fuzz SECONDS [TARGET]
    python -m tests.fuzz.atheris_targets TARGET [CORPUS_FOLDER] [-max_total_time=600] [...]

TARGET is one of `TARGETS`; what follows is libFuzzer's. An exception that is none of ours ends it,
and the input is left in a file. `-runs=0` only replays a corpus.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["qmpcommit", "tomllib"]):
    import qmpcommit as qc
    from qmpcommit.block.bitmaps import plan_carrying
    from qmpcommit.block.chain import read_disks
    from qmpcommit.block.graph import build_graph
    from qmpcommit.commit.job_events import Hearing
    from qmpcommit.commit.policy import parse_policy
    from qmpcommit.daemon.config import parse
    from qmpcommit.qmp.events import MODELS, parse_event

WORDS = [
    "event", "data", "timestamp", "id", "device", "status", "type", "len", "offset", "error",
    "seconds", "microseconds", "kind", "pivot", "keep", "abort", "hold", "check", "recycle",
    "command", "timeout", "otherwise", "passed", "failed", "overlay", "node-name", "file", "image",
    "drv", "qcow2", "throttle", "backing", "backing_file", "inserted", "children", "child", "name",
    "ready", "qdev", "filename", "virtual-size", "dirty-bitmaps", "busy", "recording",
    "a", "b", "commit", "null", "concluded",
    "format", "backing-image", "json:{}", "json:{\"driver\":\"qcow2\"}", "node", "speed", "action",
]  # fmt: skip
DEPTH = 5


@atheris.instrument_func  # type: ignore[untyped-decorator]
def anything(data: Any, depth: int = DEPTH) -> Any:
    """A JSON value, mostly made of words that mean something."""
    match data.ConsumeIntInRange(0, 9 if depth else 5):
        case 0:
            return None
        case 1:
            return data.ConsumeBool()
        case 2:
            return data.ConsumeInt(8)
        case 3:
            return data.ConsumeFloat()
        case 4:
            return data.ConsumeUnicode(data.ConsumeIntInRange(0, 20))
        case 5:
            return data.PickValueInList(WORDS)
        case 6:
            return [anything(data, depth - 1) for _ in range(data.ConsumeIntInRange(0, 4))]
        case _:
            return members(data, depth)


def members(data: Any, depth: int = DEPTH) -> dict[str, Any]:
    """A JSON object."""
    return {
        data.PickValueInList(WORDS): anything(data, depth - 1)
        for _ in range(data.ConsumeIntInRange(0, 6))
    }


def events(raw: bytes) -> None:
    """Every message is some event."""
    data = atheris.FuzzedDataProvider(raw)
    name = data.PickValueInList(sorted(MODELS))
    own = [field.alias or known for known, field in MODELS[name].model_fields.items()]
    told = anything(data, 1)
    if data.ConsumeBool():
        told = {each: anything(data, 2) for each in own if data.ConsumeIntInRange(0, 3)}
    message = {"event": name, "data": told, "timestamp": anything(data, 2)}
    assert parse_event(message) is not None
    Hearing("a", lambda fact: None).message(message)


def policies(raw: bytes) -> None:
    """A policy, or our error; as an object and as text."""
    data = atheris.FuzzedDataProvider(raw)
    value = anything(data)
    for form in (value, json.dumps(value), raw.decode("utf-8", "replace")):
        with suppress(qc.InvalidRequest, qc.PolicyRequired):
            parse_policy(form)


def graphs(raw: bytes) -> None:
    """Nodes and devices that make no sense are read, and are no disks."""
    data = atheris.FuzzedDataProvider(raw)
    nodes = []
    for _ in range(data.ConsumeIntInRange(0, 5)):
        plain = {"node-name": data.PickValueInList(WORDS), "drv": data.PickValueInList(WORDS),
                 "file": data.PickValueInList(WORDS)}  # fmt: skip
        nodes.append({**members(data), **plain})
    devices = [members(data) for _ in range(data.ConsumeIntInRange(0, 3))]
    # What has another shape altogether raises these: `sensible` makes them a `ProtocolViolation`.
    with suppress(AttributeError, LookupError, TypeError, ValueError):
        graph = build_graph(nodes, devices, [], None)
        read_disks(graph)
        for name in graph.nodes:
            graph.chain(name)
            graph.leaf(name)
            graph.root(name)
            plan_carrying(graph, [name], name)


def configurations(raw: bytes) -> None:
    """A configuration, or our error that says what is wrong."""
    with suppress(qc.InvalidRequest):
        parse(raw, "c")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "events": events,
    "policies": policies,
    "graphs": graphs,
    "configurations": configurations,
}


def main() -> None:
    """Fuzz the target that is named first."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__ + "\nTargets: " + ", ".join(TARGETS))
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
