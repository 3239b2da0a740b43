"""What the API takes and gives of snapshot windows, as pydantic models with examples."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.wire.commit import Name, Rate
from qmpcommit.wire.values import (
    AskedBy,
    FilePath,
    Seconds,
    Timed,
    VMName,
    check_overlay,
    check_sockets,
)

LONGEST_LEASE = 86400.0
"""Seconds."""

WindowState = Literal["opening", "open", "closing", "done", "failed", "orphan"]

VM_WINDOW_EXAMPLE: dict[str, Any] = {"disks": ["vda", "vdb"], "freeze": "pause", "lease": 60}

WINDOW_EXAMPLE: dict[str, Any] = {
    "members": [{"vm": "web1", "disk": "vda"}, {"vm": "db1", "disk": "vda"}],
    "freeze": "pause",
    "lease": 60,
}

WINDOW_VIEW_EXAMPLE: dict[str, Any] = {
    "id": "0c1e9b6f4d0f8e2a7c3b1d9e8f705f0c",
    "vm": "web1",
    "state": "open",
    "name": "20260101T000000Z-1f2e3d4c",
    "disks": {
        "vda": {
            "disk": "vda",
            "filename": "/vms/web1/vda.qcow2",
            "overlay": "/vms/web1/vda.qmpcommit-window-20260101T000000Z-1f2e3d4c.qcow2",
            "node_name": "qmpcommit-w1f2e3d4c-0-top",
            "size": 196608,
        }
    },
    "windows": [],
    "created": 1767225600.0,
    "quiesced": 0.012,
    "lease": 60.0,
    "expires": 1767225660.0,
    "commits": [],
    "outcomes": [],
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Request(_Model):
    """What windows over one VM and over several have in common."""

    overlay_dir: FilePath | None = None
    overlay_options: dict[str, Any] | None = None
    overlay_secret: str | None = None
    freeze: Literal["agent", "pause"] | None = None
    bandwidth: Rate = None
    lease: Seconds = Field(default=60.0, gt=0, le=LONGEST_LEASE)

    @model_validator(mode="after")
    def _check_overlay(self) -> Self:
        check_overlay(self.overlay_options, self.overlay_secret)
        return self


class WindowMember(_Model):
    """One disk of a window over several VMs."""

    vm: VMName
    disk: Name


class WindowRequest(_Request):
    """A window over disks of several VMs at one instant, as the library's `qc.snapshot` takes it.

    All of their overlays are laid, or none. Each guest is quiesced by `freeze` until they are:
    "pause" stops its vCPUs, "agent" freezes its file systems through its guest agent's socket in
    `agents`, by the VM's name. `lease` is for how many seconds the window stays open unless it is
    renewed; `bandwidth`, in bytes per second, is that of each of the commits that close it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [WINDOW_EXAMPLE]}
    )

    members: list[WindowMember] = Field(min_length=1, max_length=256)
    agents: dict[VMName, FilePath] = Field(default={}, max_length=256)

    @property
    def disks(self) -> dict[str, list[str]]:
        """The disks of each VM."""
        found: dict[str, list[str]] = {}
        for member in self.members:
            found.setdefault(member.vm, []).append(member.disk)
        return found

    @model_validator(mode="after")
    def _check(self) -> WindowRequest:
        vms = self.disks
        if self.freeze is None and len(vms) > 1:
            raise ValueError(
                "several VMs have one instant only while their guests stand still: give freeze,"
                ' "pause" or "agent"'
            )
        if self.freeze == "agent":
            check_sockets(vms, self.agents)
        return self


class VMWindowRequest(_Request):
    """A window over disks of one VM, as the library's `Session.snapshot` takes it.

    `freeze` quiesces the guest around the instant: "pause" stops its vCPUs, "agent" freezes its
    file systems through the guest agent's socket `agent`. `lease` is for how many seconds the
    window stays open unless it is renewed; `bandwidth`, in bytes per second, is that of the
    commits that close it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [VM_WINDOW_EXAMPLE]}
    )

    disks: list[Name] = Field(min_length=1, max_length=256)
    agent: FilePath | None = None

    @model_validator(mode="after")
    def _check(self) -> VMWindowRequest:
        if self.freeze == "agent" and self.agent is None:
            raise ValueError('freeze="agent" needs the socket of the guest agent (agent)')
        return self

    def of(self, vm: str) -> WindowRequest:
        """The same, for that VM."""
        return WindowRequest(
            members=[WindowMember(vm=vm, disk=disk) for disk in self.disks],
            agents={} if self.agent is None else {vm: self.agent},
            overlay_dir=self.overlay_dir,
            overlay_options=self.overlay_options,
            overlay_secret=self.overlay_secret,
            freeze=self.freeze,
            bandwidth=self.bandwidth,
            lease=self.lease,
        )


class Renewal(_Model):
    """For how many seconds from now a window stays open; as long as its lease where not given."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"seconds": 60}]}
    )

    seconds: Seconds | None = Field(default=None, gt=0, le=LONGEST_LEASE)


class WindowDisk(_Model):
    """A disk in a window: `filename` stands still, and the guest writes to `overlay`.

    `size` is the overlay's, in bytes; None where its file can't be looked at, or is gone.
    `astray` says why `filename` does not lead to QEMU's file from this host's own view.
    """

    disk: str
    filename: str
    overlay: str
    node_name: str
    size: int | None = None
    astray: str = ""


class VMWindowView(_Model):
    """A window on one of its VMs; `disks` are by the names that they were asked for by.

    `name` is in the overlays' names, `quiesced` for how many seconds the guest stood still.
    `commits` are the commits that close it, `outcomes` what came of them.
    """

    vm: str
    name: str
    disks: dict[str, WindowDisk] = {}
    quiesced: float | None = None
    commits: list[str] = []
    outcomes: list[CommitOutcome] = []


class WindowView(_Model, Timed):
    """A window; `disks` are by the names that they were asked for by.

    One over several VMs has no `disks` but `windows`, one on each VM, and `vm` and `name` are
    theirs, with commas between. `quiesced` is for how many seconds a guest stood still at most,
    `expires` when the lease ends (seconds since 1970, like all times but those
    that end in ``_at``, which are RFC 3339's). `commits` are the commits
    that close it, `outcomes` what came of them. `problem` says what keeps it waiting, `error` why
    it failed. One whose state is "orphan" was opened by nobody here, and has its name for an id.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [WINDOW_VIEW_EXAMPLE]}
    )

    id: str
    vm: str
    state: WindowState
    name: str
    disks: dict[str, WindowDisk] = {}
    windows: list[VMWindowView] = []
    created: float | None = None
    created_at: datetime | None = None
    quiesced: float | None = None
    lease: float | None = None
    expires: float | None = None
    expires_at: datetime | None = None
    ended: float | None = None
    ended_at: datetime | None = None
    commits: list[str] = []
    outcomes: list[CommitOutcome] = []
    asked_by: AskedBy | None = None
    problem: str | None = None
    error: dict[str, Any] | None = None
