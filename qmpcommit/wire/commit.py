"""What the API takes and gives, as pydantic models with examples for its OpenAPI document."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.policy import Policy
from qmpcommit.commit.request import OnError, Request, Stale, check_job_id
from qmpcommit.units import parse_size
from qmpcommit.wire.values import AskedBy, Connect, QMPAddress, Seconds, Timed, VMName


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a NUL byte has no place in a name")
    return text


def _rate(value: Any) -> Any:
    return None if value is None else parse_size(value, "bandwidth")


Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_nul)]
Layer = Name | Annotated[int, Field(strict=True, ge=0, le=65536)]
Command = Annotated[list[Name], Field(min_length=1, max_length=256)]
Rate = Annotated[int | None, BeforeValidator(_rate, json_schema_input_type=int | str | None)]

COMMIT_EXAMPLE: dict[str, Any] = {
    "disk": "vda",
    "policy": {"kind": "pivot"},
    "bandwidth": "50MiB",
    "delete": True,
}

COMMIT_VIEW_EXAMPLE: dict[str, Any] = {
    "id": "5f0c1c1e9b6f4d0f8e2a7c3b1d9e8f70",
    "vm": "web1",
    "disk": "vda",
    "job_id": "qmpcommit-vda-1f2e3d4c",
    "state": "running",
    "phase": "copying",
    "priority": 0,
    "created": 1767225600.0,
    "storage": "253:3",
    "bandwidth": 52428800,
    "progress": {"current": 805306368, "total": 1073741824, "bandwidth": 51380224.0},
    "request": COMMIT_EXAMPLE,
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NewVM(_Model):
    """A VM to add; it is remembered across restarts of the daemon."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"name": "web1", "qmp": "/run/vms/web1/qmp.sock"}]},
    )

    name: VMName
    qmp: QMPAddress
    connect: Connect = "keep"


VMState = Literal["connected", "connecting", "away", "idle"]


class VMView(_Model):
    """A VM as the daemon sees it; `error` is why it is not connected."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "name": "web1",
                    "qmp": "/run/vms/web1/qmp.sock",
                    "connect": "keep",
                    "origin": "discovered",
                    "state": "connected",
                    "pid": 4242,
                }
            ]
        },
    )

    name: str
    qmp: str
    connect: Connect
    origin: Literal["config", "discovered", "api"]
    state: VMState
    pid: int | None = None
    error: str | None = None


class JobView(BaseModel):
    """A block job as ``query-block-jobs`` gives it; `commit` is the commit that owns it."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "device": "qmpcommit-vda-1f2e3d4c",
                    "type": "commit",
                    "len": 1073741824,
                    "offset": 805306368,
                    "speed": 52428800,
                    "status": "running",
                    "ready": False,
                    "commit": "5f0c1c1e9b6f4d0f8e2a7c3b1d9e8f70",
                }
            ]
        },
    )

    device: str
    type: str
    len: int = 0
    offset: int = 0
    speed: int = 0
    status: str = ""
    ready: bool = False
    commit: str | None = None


class Asked(_Model):
    """What is asked of one disk and of several at one instant."""

    base: Layer | None = None
    shallow: bool = False
    bandwidth: Rate = None
    delete: bool = False
    stale: Stale | None = None
    on_pivot: Command | None = None
    on_error: OnError | None = None
    converge: Seconds | None = None
    carry_bitmaps: bool = True
    override: list[Name] = Field(default=[], max_length=64)
    only_if: Command | None = None
    timeout: Seconds | None = None
    priority: int = Field(default=0, ge=-1000, le=1000)


class CommitRequest(Asked):
    """A commit of one disk, as the library's `Session.commit` takes it.

    `priority` puts it before others in the queue (higher first); `timeout` is in seconds from
    now; `bandwidth` in bytes per second, as a number or as text like "50MiB".
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [COMMIT_EXAMPLE]}
    )

    disk: Name
    policy: Policy | None = None
    top: Layer | None = None
    keep_relative: bool = False
    filter_node_name: Name | None = None
    backing_mask_protocol: bool = False
    job_id: Annotated[str, AfterValidator(check_job_id)] | None = None

    @model_validator(mode="after")
    def _check(self) -> CommitRequest:
        if self.delete and self.stale not in (None, "delete"):
            raise ValueError(f"delete and stale={self.stale!r} exclude each other")
        if self.shallow and self.base is not None:
            raise ValueError("give shallow or a base, not both")
        return self

    @property
    def asked(self) -> Request:
        """The same, as the library takes it."""
        return Request(**{each.name: getattr(self, each.name) for each in fields(Request)})

    @property
    def runs_commands(self) -> bool:
        """Whether the daemon would run a command for its client."""
        runs = self.policy is not None and self.policy.runs
        return runs or self.only_if is not None or self.on_pivot is not None


class Decision(_Model):
    """What to do with a commit that is READY; `abort` is possible before, too."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"action": "pivot"}]}
    )

    action: Literal["pivot", "keep", "abort"]


class JobDecision(Decision):
    """What to do with a commit job that the daemon has not begun, and what follows its pivot.

    With `wait` it need not be READY yet. The rest is as for a commit that is asked for.
    """

    wait: bool = False
    delete: bool = False
    stale: Stale | None = None
    on_pivot: Command | None = None
    carry_bitmaps: bool = True
    timeout: Seconds | None = None


class Progress(_Model):
    """How far a copy is: bytes done and to do, and bytes per second."""

    current: int
    total: int
    bandwidth: float
    status: str = ""
    pace: Literal["moving", "slow", "stuck"] = "moving"


def _as_asked(request: Any) -> Any:
    if isinstance(request, BaseModel):
        return request.model_dump(mode="json", exclude_unset=True)
    return request


CommitState = Literal["queued", "running", "done", "failed", "cancelled"]


class CommitView(_Model, Timed):
    """A commit: `state` tells whether it waits, runs or has ended, `phase` where it is.

    `position` is its place in the queue (1: next). `outcome` is there when it is done, `error`
    (with `type` and `message`) when it failed. Times are seconds since 1970; those that end in
    ``_at`` are the same as RFC 3339 has them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [COMMIT_VIEW_EXAMPLE]}
    )

    id: str
    vm: str
    disk: str
    job_id: str
    group: str | None = None
    state: CommitState
    phase: str
    priority: int
    created: float
    created_at: datetime | None = None
    position: int | None = None
    storage: str = ""
    bandwidth: int | None = None
    ready: float | None = None
    ready_at: datetime | None = None
    ended: float | None = None
    ended_at: datetime | None = None
    decision: Literal["pivot", "keep", "abort"] | None = None
    progress: Progress | None = None
    asked_by: AskedBy | None = None
    decided_by: AskedBy | None = None
    request: Annotated[dict[str, Any], BeforeValidator(_as_asked)]
    outcome: CommitOutcome | None = None
    error: dict[str, Any] | None = None


class Problem(BaseModel):
    """What went wrong (RFC 9457); `error` has the library's error with its facts."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:qmpcommit:NotReady",
                    "title": "Not ready",
                    "status": 409,
                    "detail": "job qmpcommit-vda-1f2e3d4c on vda of web1 is not READY",
                }
            ]
        },
    )

    type: str
    title: str
    status: int
    detail: str
    error: dict[str, Any] | None = None
