"""Typed events: each by its name, to the microsecond, and nothing that breaks their reader."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

import qmpcommit as qc
from qmpcommit.qmp import events
from qmpcommit.qmp.events import MODELS, UnknownEvent, parse_event
from qmpcommit.qmp.subscriptions import EventStream, Subscribers

JOB = {"device": "j", "len": 5242880, "offset": 5242880, "speed": 0, "type": "commit"}

VIEWER = {
    "server": {"host": "127.0.0.1", "service": "5900", "family": "ipv4", "websocket": False},
    "client": {"host": "127.0.0.1", "service": "40000", "family": "ipv4", "websocket": False},
}

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
    "GUEST_PVSHUTDOWN": {},
    "MEM_UNPLUG_ERROR": {"device": "dimm1", "msg": "busy"},
    "DUMP_COMPLETED": {"result": {"status": "completed", "completed": 5, "total": 5}},
    "NIC_RX_FILTER_CHANGED": {"name": "net0", "path": "/machine/peripheral/net0"},
    "VNC_CONNECTED": VIEWER, "VNC_INITIALIZED": VIEWER, "VNC_DISCONNECTED": VIEWER,
    "SPICE_CONNECTED": VIEWER, "SPICE_INITIALIZED": VIEWER, "SPICE_DISCONNECTED": VIEWER,
    "SPICE_MIGRATE_COMPLETED": {},
}  # fmt: skip
"""One of each, as real QEMUs send them."""

OPTIONAL: dict[str, set[str]] = {
    "BLOCK_JOB_COMPLETED": {"error"},
    "RESET": {"reason"},
    "SHUTDOWN": {"reason"},
    "BLOCK_IO_ERROR": {"qom-path", "node-name", "nospace"},
    "BLOCK_IMAGE_CORRUPTED": {"node-name", "offset", "size"},
    "GUEST_PANICKED": {"info"},
    "DEVICE_DELETED": {"device"},
    "MEMORY_DEVICE_SIZE_CHANGE": {"id", "qom-path"},
    "RTC_CHANGE": {"qom-path"},
    "NIC_RX_FILTER_CHANGED": {"name"},
}
"""What is not there in some version, or never has to be."""

RECORDED = [
    '{"timestamp": {"seconds": 1795437717, "microseconds": 969195}, "event": "JOB_STATUS_CHANGE",'
    ' "data": {"status": "created", "id": "j"}}',
    '{"timestamp": {"seconds": 1795437717, "microseconds": 997412}, "event": "BLOCK_JOB_READY",'
    ' "data": {"device": "j", "len": 4194304, "offset": 4194304, "speed": 0, "type": "commit"}}',
    '{"timestamp": {"seconds": 1795437718, "microseconds": 59022}, "event": "BLOCK_JOB_COMPLETED",'
    ' "data": {"device": "j", "len": 4194304, "offset": 4194304, "speed": 0, "type": "commit"}}',
    '{"timestamp": {"seconds": 1795437745, "microseconds": 344480}, "event": "BLOCK_JOB_COMPLETED",'
    ' "data": {"device": "j", "len": 4194304, "offset": 0, "speed": 0, "type": "commit",'
    ' "error": "Input/output error"}}',
    '{"timestamp": {"seconds": 1795437719, "microseconds": 374647}, "event": "BLOCK_JOB_CANCELLED",'
    ' "data": {"device": "j", "len": 4194304, "offset": 4194304, "speed": 0, "type": "commit"}}',
    '{"timestamp": {"seconds": 1795437740, "microseconds": 615273}, "event": "BLOCK_JOB_ERROR",'
    ' "data": {"device": "j", "operation": "write", "action": "report"}}',
    '{"timestamp": {"seconds": 1795437722, "microseconds": 942835}, "event": "BLOCK_JOB_PENDING",'
    ' "data": {"type": "commit", "id": "j"}}',
    '{"timestamp": {"seconds": 1795437800, "microseconds": 844160}, "event": "STOP"}',
    '{"timestamp": {"seconds": 1795437801, "microseconds": 166115}, "event": "RESET",'
    ' "data": {"guest": false, "reason": "host-qmp-system-reset"}}',
    '{"timestamp": {"seconds": 1795437739, "microseconds": 824020}, "event": "POWERDOWN"}',
]
"""Lines that QEMU 5.2, 7.2, 10.0 and 11.1 wrote."""


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
    assert event.to_message().get("data", {}) == SAMPLES[name]
    assert not event.model_extra, "a member without a field"
    assert event.job_id == ("j" if "JOB" in name else None)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_may_be_missing(name: str) -> None:
    data = {key: value for key, value in SAMPLES[name].items() if key not in OPTIONAL.get(name, ())}
    event = parse_event(message(name, data))
    assert type(event) is MODELS[name]
    assert event.to_message().get("data", {}) == data


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_may_not_be_missing(name: str) -> None:
    for key in SAMPLES[name].keys() - OPTIONAL.get(name, set()):
        data = {other: value for other, value in SAMPLES[name].items() if other != key}
        event = parse_event(message(name, data))
        assert isinstance(event, UnknownEvent)
        assert key in (event.problem or "")


def test_the_union_is_discriminated_by_name() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(events.AnyEvent)
    for name, data in SAMPLES.items():
        event = parse_event(message(name, data))
        assert adapter.validate_python(event.model_dump(by_alias=True)) == event
        assert adapter.validate_json(event.model_dump_json(by_alias=True)) == event
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        adapter.validate_python({"name": "SOMETHING_NEW"})


@pytest.mark.parametrize("line", RECORDED)
def test_recorded_events(line: str) -> None:
    raw = json.loads(line)
    event = parse_event(raw)
    assert type(event) is MODELS[raw["event"]]
    assert event.to_message() == raw


def test_a_member_that_is_called_name() -> None:
    event = parse_event(message("NIC_RX_FILTER_CHANGED", SAMPLES["NIC_RX_FILTER_CHANGED"]))
    assert isinstance(event, events.NicRxFilterChanged)
    assert (event.name, event.nic) == ("NIC_RX_FILTER_CHANGED", "net0")


def test_new_members_that_are_called_as_an_events_own() -> None:
    raw = message("STOP", {"name": "x", "timestamp": 5})
    event = parse_event(raw)
    assert type(event) is events.Stop
    assert event.timestamp is not None
    assert event.model_extra == {"data.name": "x", "data.timestamp": 5}
    assert event.to_message() == raw


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
    assert event.to_message() == message("SOMETHING_NEW", {"a": 1})


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("BLOCK_JOB_READY", {}),
        ("BLOCK_JOB_READY", {**JOB, "len": "many"}),
        ("JOB_STATUS_CHANGE", None),
        ("JOB_STATUS_CHANGE", [1]),
        ("STOP", [1]),
        ("STOP", None),
        ("VSERPORT_CHANGE", {"id": "channel0", "open": "yes"}),
        ("BALLOON_CHANGE", {"actual": True}),
    ],
)
def test_a_known_event_without_its_members_is_kept_as_unknown(name: str, data: Any) -> None:
    event = parse_event(message(name, data))
    assert isinstance(event, UnknownEvent)
    assert event.name == name
    assert event.problem
    assert event.data == (data if isinstance(data, dict) else {})
    assert event.job_id is None


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
    event = parse_event({"event": "STOP", "timestamp": stamp})
    assert type(event) is events.Stop
    assert event.timestamp is None
    assert event.to_message()["timestamp"] == {"seconds": -1, "microseconds": -1}


@given(st.integers(0, 4_000_000_000), st.integers(0, 999_999))
def test_times_are_exact_to_the_microsecond(seconds: int, micro: int) -> None:
    when = parse_event(message("STOP", {}, seconds, micro)).timestamp
    assert when is not None
    assert when.tzinfo is UTC
    since = when - datetime(1970, 1, 1, tzinfo=UTC)
    assert since // timedelta(microseconds=1) == seconds * 1_000_000 + micro


TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
"""Half surrogates too: JSON can hold them."""

KEYS = TEXT | st.sampled_from(
    sorted({key for data in SAMPLES.values() for key in data} | {"timestamp", "problem", "data"})
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)

NUMBERS = st.integers() | st.floats() | st.booleans() | st.just(10**400)
STAMPS = JSON | st.fixed_dictionaries({"seconds": NUMBERS, "microseconds": NUMBERS})

NAMES = st.sampled_from(sorted(MODELS)) | TEXT


@given(NAMES, JSON, JSON)
def test_no_event_breaks_its_reader(name: str, data: Any, stamp: Any) -> None:
    event = parse_event({"event": name, "data": data, "timestamp": stamp})
    assert event.name == name
    assert repr(event)


@given(NAMES, st.dictionaries(KEYS, JSON, max_size=4))
def test_no_data_is_lost(name: str, data: dict[str, Any]) -> None:
    known = {**SAMPLES.get(name, {}), **data}
    for raw in (message(name, data), message(name, known)):
        assert parse_event(raw).to_message().get("data", {}) == raw["data"]


@given(st.sampled_from(sorted(MODELS)), st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_unknown_members_never_make_an_event_unknown(name: str, more: dict[str, Any]) -> None:
    event = parse_event(message(name, {**more, **SAMPLES[name]}))
    if not OPTIONAL.get(name, set()) & more.keys():
        assert type(event) is MODELS[name]


class Kept(BaseModel):
    """A row of an embedder's."""

    event: qc.Event


STRANGE: dict[str, Any] = {"BLOCK_JOB_READY": {"device": 7}, "OF_TOMORROW": {"x": [1, None]}}


@pytest.mark.parametrize("name", [*SAMPLES, *STRANGE])
def test_a_field_of_any_event_comes_back_as_it_was(name: str) -> None:
    stamp = {"seconds": 1780000000, "microseconds": 123456}
    data = {**(STRANGE.get(name) or SAMPLES[name]), "of-tomorrow": {"a": 1}}
    event = parse_event({"event": name, "timestamp": stamp, "data": data})
    kept = Kept(event=event)
    for again in (
        Kept.model_validate_json(kept.model_dump_json()),
        Kept.model_validate(kept.model_dump()),
        Kept.model_validate(kept.model_dump(mode="json")),
    ):
        assert type(again.event) is type(event)
        assert again.event.to_message() == event.to_message()
        assert again == kept


def test_a_field_of_any_event_takes_markers_and_members_too() -> None:
    for marker in (events.ConnectionLost(), events.ConnectionBack()):
        assert Kept.model_validate_json(Kept(event=marker).model_dump_json()).event == marker
    event = parse_event({"event": "STOP"})
    assert Kept.model_validate({"event": event.model_dump()}).event == event
    assert Kept.model_validate({"event": {"name": "NEW"}}).event.to_message()["event"] == "NEW"
    with pytest.raises(ValidationError):
        Kept.model_validate({"event": 7})
    assert Kept.model_json_schema()["properties"]["event"]["required"] == ["event"]


def test_events_are_a_module_of_the_package() -> None:
    assert qc.events.parse_event is parse_event
    assert {model.__name__ for model in MODELS.values()} < set(qc.events.__all__)
    assert {"AnyEvent", "ConnectionLost", "EventStream", "UnknownEvent"} < set(qc.events.__all__)


async def test_a_lost_connection_is_told_between_the_events() -> None:
    everybody = Subscribers()
    with (
        EventStream(everybody, frozenset(), 10) as stream,
        EventStream(everybody, frozenset(["STOP"]), 10) as stops,
        EventStream(everybody, frozenset(["CONNECTION_LOST"]), 10) as losses,
    ):
        everybody.link(True)  # the first time it is connected
        everybody.message({"event": "STOP"})
        everybody.link(False)
        everybody.link(True)
        everybody.message({"event": "CONNECTION_LOST"})  # of a QEMU that lies
        everybody.end()
        told = [event async for event in stream]
        assert [each.name for each in told] == [
            "STOP", "CONNECTION_LOST", "CONNECTION_BACK", "CONNECTION_LOST",
        ]  # fmt: skip
        assert [type(each).__name__ for each in told[1:]] == [
            "ConnectionLost", "ConnectionBack", "UnknownEvent",
        ]  # fmt: skip
        assert [event.name async for event in stops] == ["STOP"]
        assert [data async for data in losses.raw()] == [{}]
