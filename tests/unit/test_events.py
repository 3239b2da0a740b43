"""Typed events: each by its name, to the microsecond, and nothing that breaks their reader."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from qmpcommit.qmp import events
from qmpcommit.qmp.events import MODELS, UnknownEvent, parse_event

JOB = {"device": "j", "len": 5242880, "offset": 5242880, "speed": 0, "type": "commit"}

SAMPLES: dict[str, dict[str, Any]] = {
    "BLOCK_JOB_READY": JOB,
    "BLOCK_JOB_COMPLETED": {**JOB, "error": "Input/output error"},
    "BLOCK_JOB_CANCELLED": JOB,
    "BLOCK_JOB_ERROR": {"device": "j", "operation": "write", "action": "report"},
    "BLOCK_JOB_PENDING": {"type": "commit", "id": "j"},
    "JOB_STATUS_CHANGE": {"status": "ready", "id": "j"},
    "BLOCK_IO_ERROR": {"device": "", "qom-path": "/machine/peripheral/vd0", "node-name": "top",
                       "reason": "No space left on device", "operation": "write",
                       "action": "stop", "nospace": True},
    "BLOCK_WRITE_THRESHOLD": {"node-name": "n", "amount-exceeded": 1, "write-threshold": 2},
    "BLOCK_IMAGE_CORRUPTED": {"device": "", "node-name": "n", "msg": "m", "fatal": True,
                              "offset": 65536, "size": 512},
    "BLOCK_EXPORT_DELETED": {"id": "e"},
    "QUORUM_FAILURE": {"reference": "r", "sector-num": 1, "sectors-count": 2},
    "QUORUM_REPORT_BAD": {"type": "read", "node-name": "n", "sector-num": 1, "sectors-count": 2},
    "STOP": {}, "RESUME": {}, "POWERDOWN": {}, "SUSPEND": {}, "SUSPEND_DISK": {}, "WAKEUP": {},
    "RESET": {"guest": False, "reason": "host-qmp-system-reset"},
    "SHUTDOWN": {"guest": False, "reason": "host-qmp-quit"},
    "WATCHDOG": {"action": "reset"},
    "GUEST_PANICKED": {"action": "pause", "info": {"type": "hyper-v", "arg1": 1}},
    "GUEST_CRASHLOADED": {"action": "run"},
    "DEVICE_DELETED": {"device": "vd0", "path": "/machine/peripheral/vd0"},
    "DEVICE_UNPLUG_GUEST_ERROR": {"path": "/machine/peripheral/vd0"},
    "DEVICE_TRAY_MOVED": {"device": "cd0", "id": "/machine/x", "tray-open": True},
    "MEMORY_FAILURE": {"recipient": "guest", "action": "inject", "flags": {"recursive": False}},
    "MEMORY_DEVICE_SIZE_CHANGE": {"id": "vm0", "size": 1 << 30, "qom-path": "/machine/x"},
    "MIGRATION": {"status": "completed"},
    "MIGRATION_PASS": {"pass": 2},
    "PR_MANAGER_STATUS_CHANGED": {"id": "p", "connected": False},
    "BALLOON_CHANGE": {"actual": 1 << 30},
    "RTC_CHANGE": {"offset": -5, "qom-path": "/machine/rtc"},
    "VSERPORT_CHANGE": {"id": "channel0", "open": True},
}  # fmt: skip
"""One of each, as real QEMUs send them."""


def message(name: str, data: Any, seconds: int = 1766000000, micro: int = 123456) -> dict[str, Any]:
    return {"event": name, "data": data,
            "timestamp": {"seconds": seconds, "microseconds": micro}}  # fmt: skip


def test_there_is_a_sample_of_every_model() -> None:
    assert set(SAMPLES) == set(MODELS)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_each_event_has_its_own_type(name: str) -> None:
    event = parse_event(message(name, SAMPLES[name]))
    assert type(event) is MODELS[name]
    assert event.name == name
    assert event.timestamp == datetime(2025, 12, 17, 19, 33, 20, 123456, tzinfo=UTC)
    members = event.model_dump(by_alias=True, exclude={"name", "timestamp"}, exclude_unset=True)
    assert members == SAMPLES[name]
    assert (event.job_id == "j") is ("JOB" in name)
    if name.endswith("_PASS"):
        return
    adapter: TypeAdapter[Any] = TypeAdapter(events.AnyEvent)
    assert adapter.validate_python({**SAMPLES[name], "name": name}) == event.model_copy(
        update={"timestamp": None}
    )


def test_attributes_have_python_names() -> None:
    event = parse_event(message("BLOCK_WRITE_THRESHOLD", SAMPLES["BLOCK_WRITE_THRESHOLD"]))
    assert isinstance(event, events.BlockWriteThreshold)
    assert (event.node_name, event.amount_exceeded, event.write_threshold) == ("n", 1, 2)


def test_events_are_frozen() -> None:
    event = parse_event(message("STOP", {}))
    with pytest.raises(ValidationError):
        event.name = "RESUME"


def test_unknown_members_are_kept() -> None:
    event = parse_event(message("STOP", {"because": ["of", "this"]}))
    assert type(event) is events.Stop
    assert event.model_extra == {"because": ["of", "this"]}


def test_new_values_of_an_enumeration_are_no_error() -> None:
    event = parse_event(message("JOB_STATUS_CHANGE", {"id": "j", "status": "levitating"}))
    assert isinstance(event, events.JobStatusChange)
    assert event.status == "levitating"


def test_an_unknown_event() -> None:
    event = parse_event(message("SOMETHING_NEW", {"a": 1}))
    assert isinstance(event, UnknownEvent)
    assert (event.name, event.data, event.problem) == ("SOMETHING_NEW", {"a": 1}, None)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("BLOCK_JOB_READY", {}),
        ("BLOCK_JOB_READY", {**JOB, "len": "many"}),
        ("JOB_STATUS_CHANGE", None),
        ("JOB_STATUS_CHANGE", [1]),
    ],
)
def test_a_known_event_without_its_members_is_kept_as_unknown(name: str, data: Any) -> None:
    event = parse_event(message(name, data))
    assert isinstance(event, UnknownEvent)
    assert event.name == name
    assert event.problem


@pytest.mark.parametrize("nothing", [{}, {"event": 5}, {"event": None}, {"return": {}}])
def test_what_is_no_event(nothing: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'event'"):
        parse_event(nothing)


@pytest.mark.parametrize(
    "stamp",
    [None, 5, {}, {"seconds": -1, "microseconds": -1}, {"seconds": "x", "microseconds": 0},
     {"seconds": 10**30, "microseconds": 0}, {"seconds": True, "microseconds": 0}],
)  # fmt: skip
def test_a_clock_that_failed(stamp: Any) -> None:
    assert parse_event({"event": "STOP", "timestamp": stamp}).timestamp is None


@given(st.integers(0, 4_000_000_000), st.integers(0, 999_999))
def test_times_are_exact_to_the_microsecond(seconds: int, micro: int) -> None:
    when = parse_event(message("STOP", {}, seconds, micro)).timestamp
    assert when is not None
    assert when.tzinfo is UTC
    assert (when - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() == pytest.approx(
        seconds + micro / 1e6, abs=1e-6
    )
    assert when.microsecond == micro


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["name", "id", "device"]), inner)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(MODELS)) | st.text(), JSON, JSON)
def test_no_event_breaks_its_reader(name: str, data: Any, stamp: Any) -> None:
    event = parse_event({"event": name, "data": data, "timestamp": stamp})
    assert event.name == name
    assert event.model_dump_json()
