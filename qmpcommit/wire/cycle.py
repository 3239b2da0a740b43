"""What the API takes and shows of cycles and their rounds."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qmpcommit.wire.commit import Name
from qmpcommit.wire.values import (
    AskedBy,
    CommandWord,
    FilePath,
    Pattern,
    Quiescing,
    Seconds,
    Section,
    Timed,
    VMName,
    check_overlay,
)


class CycleDisk(Section):
    """A disk that always ends as those of the same cycle do."""

    vm: VMName
    disk: Pattern


class Cycle(Quiescing):
    """A schedule: an overlay's changes are carried into the base if they deserve it, or discarded.

    A round comes `every` so many seconds, or daily `at` a time of this host. The command
    `keep_if`, which gets `timeout` seconds, says by its exit status whether the base takes the
    overlay's changes (0) or they are thrown away (1 to 125); anything else changes nothing.
    Either way an empty overlay begins, in `overlay_dir` or beside the former one, which `delete`
    has deleted. It is like the former one; `overlay_options` (members of QEMU's ``blockdev-add``)
    and `overlay_secret` (the id of a secret of QEMU's) say what QEMU does not tell of that. After a
    discard the `guest` is reset, or stays stopped.

    `together` names further disks, of this VM or of others, that always end the same way: all are
    kept at one instant, or all are discarded before any of the guests goes on, or nothing is
    changed. `keep_if` is asked once for all of them, with a line a disk in each variable.

    With `freeze` the guests are quiesced for the instant of what is kept: their file systems
    through their agents, or their vCPUs, which a recycle stops anyway.
    """

    vm: VMName
    disk: Pattern
    together: Annotated[tuple[CycleDisk, ...], Field(max_length=255)] = ()
    every: Annotated[Seconds, Field(ge=0.05)] | None = None
    at: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")] | None = None
    keep_if: Annotated[tuple[CommandWord, ...], Field(min_length=1, max_length=256)]
    timeout: Seconds = Field(default=60.0, gt=0)
    overlay_dir: FilePath | None = None
    overlay_options: dict[str, Any] | None = None
    overlay_secret: str | None = None
    guest: Literal["reset", "stop"]
    delete: bool = False

    @model_validator(mode="after")
    def _check(self) -> Cycle:
        if (self.every is None) == (self.at is None):
            raise ValueError("give every or at: when its rounds come")
        if self.overlay_dir is not None and not self.overlay_dir.startswith("/"):
            raise ValueError("overlay_dir is an absolute path")
        self.check_agents(vm for vm, _ in self.disks)
        check_overlay(self.overlay_options, self.overlay_secret)
        return self

    @property
    def disks(self) -> tuple[tuple[str, str], ...]:
        """All its disks in their order, each with its VM first."""
        return ((self.vm, self.disk), *((each.vm, each.disk) for each in self.together))


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


class RoundView(Timed, BaseModel):
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
    created_at: datetime | None = None
    ended: float | None = None
    ended_at: datetime | None = None
    overlay: str | None = None
    commit: str | None = None
    disks: list[RoundDisk] = []
    group: str | None = None
    result: Literal["kept", "discarded"] | None = None
    warnings: list[str] = []
    asked_by: AskedBy | None = None
    error: dict[str, Any] | None = None


class CycleView(Timed, BaseModel):
    """A ``[[cycle]]`` of the configuration: when it comes next, what runs, and what came of it.

    Times are seconds since 1970; those that end in ``_at`` are the same as RFC 3339 has them.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [CYCLE_EXAMPLE]})

    cycle: Cycle
    next_round: float | None = None
    next_round_at: datetime | None = None
    running: RoundView | None = None
    last: RoundView | None = None
    last_kept: float | None = None
    last_kept_at: datetime | None = None
