"""What the API takes and shows of cycles and their rounds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qmpcommit.daemon.config import Cycle
from qmpcommit.daemon.models import Name

ROUND_EXAMPLE: dict[str, Any] = {
    "id": "5f0c1c1e9b6f4d0f8e2a7c3b1d9e8f70",
    "vm": "web1",
    "disk": "vda",
    "state": "done",
    "created": 1767225600.0,
    "ended": 1767225612.0,
    "overlay": "/vms/web1/scratch.cycle-20260101T000000Z-1f2e3d4c.qcow2",
    "commit": "0e1d2c3b4a59687786950a1b2c3d4e5f",
    "disks": [
        {
            "vm": "web1",
            "disk": "vda",
            "overlay": "/vms/web1/scratch.cycle-20260101T000000Z-1f2e3d4c.qcow2",
            "commit": "0e1d2c3b4a59687786950a1b2c3d4e5f",
        }
    ],
    "group": None,
    "result": "kept",
    "warnings": [],
    "error": None,
}
CYCLE_EXAMPLE: dict[str, Any] = {
    "cycle": {
        "vm": "web1",
        "disk": "vda",
        "at": "03:00",
        "keep_if": ["/usr/local/bin/is-good"],
        "guest": "reset",
        "delete": True,
    },
    "next_round": 1767236400.0,
    "running": None,
    "last": ROUND_EXAMPLE,
    "last_kept": 1767225612.0,
}


class RoundRequest(BaseModel):
    """A round to be run now; the VM and the disk must have a ``[[cycle]]``."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"disk": "vda"}]}
    )

    disk: Name


class RoundDisk(BaseModel):
    """A disk of a round: its new overlay, and the commit that has carried the former one's changes.

    All disks of a round end the same way.
    """

    model_config = ConfigDict(
        frozen=True, json_schema_extra={"examples": [ROUND_EXAMPLE["disks"][0]]}
    )

    vm: str
    disk: str
    overlay: str | None = None
    commit: str | None = None


class RoundView(BaseModel):
    """A round: `state` is "asking" its command, "keeping", "discarding", or how it ended.

    `result` is there when it is done; `overlay` is the new one, `commit` the one that carries the
    former overlay's changes into the base. `disks` has that of each disk, the first one included,
    and `group` is the group commit of several. `error` tells why it failed, and what the disk
    is in.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [ROUND_EXAMPLE]})

    id: str
    vm: str
    disk: str
    state: Literal["new", "asking", "keeping", "discarding", "done", "failed", "cancelled"]
    created: float
    ended: float | None = None
    overlay: str | None = None
    commit: str | None = None
    disks: list[RoundDisk] = []
    group: str | None = None
    result: Literal["kept", "discarded"] | None = None
    warnings: list[str] = []
    error: dict[str, Any] | None = None


class CycleView(BaseModel):
    """A ``[[cycle]]`` of the configuration: when it comes next, what runs, and what came of it.

    Times are seconds since 1970.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [CYCLE_EXAMPLE]})

    cycle: Cycle
    next_round: float | None = None
    running: RoundView | None = None
    last: RoundView | None = None
    last_kept: float | None = None
