"""What the API takes to steer a job that runs, and to lay overlays that stay."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qmpcommit.wire.commit import Name, Rate
from qmpcommit.wire.values import FilePath, check_overlay


class Steering(BaseModel):
    """What a block job is to do, whoever began it: "pause", "resume" or "speed".

    `bandwidth`, in bytes per second, is for "speed"; 0 is no limit.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"action": "speed", "bandwidth": "50MiB"}]},
    )

    action: Literal["pause", "resume", "speed"]
    bandwidth: Rate = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.action == "speed") is (self.bandwidth is None):
            raise ValueError("bandwidth goes with the action speed, and with that alone")
        return self


OVERLAYS_EXAMPLE: dict[str, Any] = {"disks": ["vda", "vdb"], "freeze": "pause"}


class OverlaysRequest(BaseModel):
    """Fresh overlays over disks of a VM, which stay; as the library's `Session.overlay` takes it.

    All are laid at one instant. Each is beside the file that it lies over, or `overlay`: a new
    file, or a folder for it or them. `freeze` quiesces the guest for that instant, with "agent"
    through its guest agent's socket `agent`.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [OVERLAYS_EXAMPLE]}
    )

    disks: list[Name] = Field(min_length=1, max_length=256)
    overlay: FilePath | None = None
    overlay_options: dict[str, Any] | None = None
    overlay_secret: str | None = None
    freeze: Literal["agent", "pause"] | None = None
    agent: FilePath | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_overlay(self.overlay_options, self.overlay_secret)
        if (self.freeze == "agent") is (self.agent is None):
            raise ValueError("freeze by the agent and the socket of the guest agent go together")
        return self
