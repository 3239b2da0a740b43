"""What the API takes and gives of snapshot windows, as pydantic models with examples."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.daemon.config import FilePath, Seconds
from qmpcommit.daemon.models import Name, Rate

LONGEST_LEASE = 86400.0
"""Seconds."""

WindowState = Literal["opening", "open", "closing", "done", "failed", "orphan"]

WINDOW_EXAMPLE: dict[str, Any] = {"disks": ["vda", "vdb"], "freeze": "pause", "lease": 60}

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
    "created": 1767225600.0,
    "quiesced": 0.012,
    "lease": 60.0,
    "expires": 1767225660.0,
    "commits": [],
    "outcomes": [],
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WindowRequest(_Model):
    """A window over disks of one VM, as the library's `Session.snapshot` takes it.

    `freeze` quiesces the guest around the instant: "pause" stops its vCPUs, "agent" freezes its
    file systems through the guest agent's socket `agent`. `lease` is for how many seconds the
    window stays open unless it is renewed; `bandwidth`, in bytes per second, is that of the
    commits that close it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [WINDOW_EXAMPLE]}
    )

    disks: list[Name] = Field(min_length=1, max_length=256)
    overlay_dir: FilePath | None = None
    freeze: Literal["agent", "pause"] | None = None
    agent: FilePath | None = None
    bandwidth: Rate = None
    lease: Seconds = Field(default=60.0, gt=0, le=LONGEST_LEASE)

    @model_validator(mode="after")
    def _check(self) -> WindowRequest:
        if self.freeze == "agent" and self.agent is None:
            raise ValueError('freeze="agent" needs the socket of the guest agent (agent)')
        return self


class Renewal(_Model):
    """For how many seconds from now a window stays open; as long as its lease where not given."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"seconds": 60}]}
    )

    seconds: Seconds | None = Field(default=None, gt=0, le=LONGEST_LEASE)


class WindowDisk(_Model):
    """A disk in a window: `filename` stands still, and the guest writes to `overlay`.

    `size` is the overlay's, in bytes; None where its file can't be looked at, or is gone.
    """

    disk: str
    filename: str
    overlay: str
    node_name: str
    size: int | None = None


class WindowView(_Model):
    """A window; `disks` are by the names that they were asked for by.

    `quiesced` is for how many seconds the guest stood still, `expires` when the lease ends
    (seconds since 1970, like all times). `commits` are the commits that close it, `outcomes` what
    came of them. `problem` says what keeps it waiting, `error` why it failed. One whose state is
    "orphan" was opened by nobody here, and has its name for an id.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [WINDOW_VIEW_EXAMPLE]}
    )

    id: str
    vm: str
    state: WindowState
    name: str
    disks: dict[str, WindowDisk] = {}
    created: float | None = None
    quiesced: float | None = None
    lease: float | None = None
    expires: float | None = None
    ended: float | None = None
    commits: list[str] = []
    outcomes: list[CommitOutcome] = []
    problem: str | None = None
    error: dict[str, Any] | None = None
