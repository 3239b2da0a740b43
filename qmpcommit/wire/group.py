"""What the API takes and gives of groups: disks that are committed at one instant."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qmpcommit.commit.pending import group_job_id
from qmpcommit.commit.policy import Policy
from qmpcommit.group.members import check_shared
from qmpcommit.group.outcome import GroupOutcome
from qmpcommit.group.run import HOLD_LIMIT
from qmpcommit.wire.commit import Asked, CommitRequest, CommitState, Name
from qmpcommit.wire.values import AskedBy, Quiescing, Seconds, Timed, VMName

GROUP_EXAMPLE: dict[str, Any] = {
    "members": [{"vm": "db1", "disk": "vda"}, {"vm": "db2", "disk": "vda"}],
    "policy": {"kind": "keep"},
    "hold_limit": 2.0,
}

GROUP_VIEW_EXAMPLE: dict[str, Any] = {
    "id": "1f2e3d4c",
    "state": "running",
    "phase": "copying",
    "members": [
        {
            "vm": "db1",
            "disk": "vda",
            "commit": "5f0c1c1e9b6f4d0f8e2a7c3b1d9e8f70",
            "job_id": "qmpcommit-vda-1f2e3d4c.1of2",
        },
        {
            "vm": "db2",
            "disk": "vda",
            "commit": "7a9d8c1b0e6f4d0f8e2a7c3b1d9e8f71",
            "job_id": "qmpcommit-vda-1f2e3d4c.2of2",
        },
    ],
    "created": 1767225600.0,
    "request": GROUP_EXAMPLE,
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupMemberRequest(_Model):
    """One disk of a group; it has a policy of its own, or the group has one for all.

    A `recycle` is its own, for each disk needs its own fresh overlay.
    """

    vm: VMName
    disk: Name
    policy: Policy | None = None


class GroupRequest(Asked, Quiescing):
    """Disks of one VM or of several, committed at one instant: all of them or none.

    `hold_limit` is for how many seconds at most their I/O may be held, `timeout` for how many
    all of it may take, from now; a `policy` for all is asked once, when all are READY. A guest
    whose disks are recycled is paused once for all of them, and goes on when the last has its
    fresh overlay. With `freeze` all guests are quiesced for the instant, when all are READY:
    "agent" freezes their file systems through their agents' sockets in `agents`, by the VMs' names
    (or `agent`, of the only VM), "pause" stops their vCPUs. The rest is as for a commit, and for
    all members.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [GROUP_EXAMPLE]}
    )

    members: list[GroupMemberRequest] = Field(min_length=1, max_length=256)
    policy: Policy | None = None
    hold_limit: Seconds = HOLD_LIMIT

    @model_validator(mode="after")
    def _check(self) -> GroupRequest:
        self.requests("0" * 8)
        self.check_agents(member.vm for member in self.members)
        if self.policy is not None and any(member.policy for member in self.members):
            raise ValueError("give the group a policy, or each member its own, not both")
        if self.policy is None and not all(member.policy for member in self.members):
            raise ValueError("give the group a policy, or each member its own")
        check_shared(self.policy, len(self.members))
        return self

    def requests(self, group: str) -> list[CommitRequest]:
        """The members' commits, in the group of that id; raises ValueError."""
        shared = Asked.model_fields.keys() - {"timeout"}  # which is the group's
        options = {name: getattr(self, name) for name in shared}
        many = len(self.members)
        return [
            CommitRequest(
                disk=member.disk,
                policy=member.policy or self.policy,
                job_id=group_job_id(member.disk, group, number, many),
                **options,
            )
            for number, member in enumerate(self.members, 1)
        ]


class GroupMemberView(_Model):
    """One disk of a group: its commit, which `GET /v1/commits/{id}` shows, and its job in QEMU."""

    vm: str
    disk: str
    commit: str
    job_id: str


class GroupView(_Model, Timed):
    """A group: `state` tells whether it waits, runs or has ended, `phase` where it is.

    `outcome` is there when it is done, `error` (with `type`, `message` and each member's own end
    in `outcomes`) when it failed. Times are seconds since 1970; those that end
    in ``_at`` are the same as RFC 3339 has them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [GROUP_VIEW_EXAMPLE]}
    )

    id: str
    state: CommitState
    phase: str = ""
    members: list[GroupMemberView]
    created: float
    created_at: datetime | None = None
    position: int | None = None
    ended: float | None = None
    ended_at: datetime | None = None
    decision: Literal["pivot", "keep", "abort"] | None = None
    asked_by: AskedBy | None = None
    request: dict[str, Any]
    outcome: GroupOutcome | None = None
    error: dict[str, Any] | None = None
