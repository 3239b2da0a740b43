"""What a schema says that a QEMU can do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from qmpcommit.qmp.features import Features

SCHEMA: list[dict[str, Any]] = [
    {"name": "block-commit", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {"name": "block-job-complete", "meta-type": "command", "arg-type": "2",
     "features": ["deprecated"]},
    {"name": "blockdev-add", "meta-type": "command", "arg-type": "3"},
    {"name": "stop", "meta-type": "command", "arg-type": "0"},
    {"name": "BLOCK_JOB_READY", "meta-type": "event", "arg-type": "2"},
    {"name": "BLOCK_JOB_OLD", "meta-type": "event", "arg-type": "0", "features": ["deprecated"]},
    {"name": "0", "meta-type": "object", "members": []},
    {"name": "1", "meta-type": "object", "members": [{"name": "job-id", "type": "str"},
                                                       {"name": "top-node", "type": "str"}]},
    {"name": "2", "meta-type": "object", "members": [{"name": "device", "type": "str"}]},
    {"name": "3", "meta-type": "object", "members": [{"name": "driver", "type": "4"}],
     "tag": "driver", "variants": [{"case": "qcow2", "type": "5"}, {"case": "again", "type": "3"}]},
    {"name": "5", "meta-type": "object", "members": [{"name": "lazy-refcounts", "type": "b"}]},
]  # fmt: skip
FEATURES = Features.from_schema(SCHEMA)


@pytest.mark.parametrize(
    ("command", "argument", "there"),
    [
        ("block-commit", "top-node", True),
        ("block-commit", "top", False),
        ("blockdev-add", "driver", True),
        ("blockdev-add", "lazy-refcounts", True),
        ("blockdev-add", "case", False),
        ("stop", "x", False),
        ("nothing", "x", False),
        ("BLOCK_JOB_READY", "device", False),
        ("1", "job-id", False),
    ],
)
def test_arguments(command: str, argument: str, there: bool) -> None:
    assert FEATURES.has_argument(command, argument) is there


def test_commands_events_and_deprecations() -> None:
    assert FEATURES.has_command("stop")
    assert not FEATURES.has_command("BLOCK_JOB_READY")
    assert not FEATURES.has_command("start")
    assert FEATURES.has_event("BLOCK_JOB_READY")
    assert not FEATURES.has_event("stop")
    assert FEATURES.is_deprecated("block-job-complete")
    assert not FEATURES.is_deprecated("stop")
    assert not FEATURES.is_deprecated("nothing")
    assert not FEATURES.is_deprecated("BLOCK_JOB_OLD"), "an event is no command"


def test_an_empty_or_odd_schema_has_nothing() -> None:
    assert not Features.from_schema([]).has_command("stop")
    assert not Features.from_schema([{}, {"name": 5}]).has_argument("5", "x")


def test_features_are_frozen() -> None:
    with pytest.raises(AttributeError):
        FEATURES.entries = {}  # type: ignore[misc]


def test_nothing_is_resolved_before_it_is_asked() -> None:
    class Untouched(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            assert key == "name", "only names are looked at"
            return super().get(key, default)

    Features.from_schema([Untouched(entry) for entry in SCHEMA])


def test_features_load_without_pydantic() -> None:
    code = "import sys, qmpcommit.qmp.features; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
