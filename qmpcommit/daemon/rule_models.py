"""What the API shows of the rules of the configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qmpcommit.daemon.config import Flatten

RULE_EXAMPLE: dict[str, Any] = {
    "kind": "flatten",
    "number": 0,
    "rule": {"vm": "web*", "disk": "*", "keep": 2, "depth": 8, "every": 60.0, "delete": True},
    "last_look": 1767225600.0,
    "last_result": "1 disks: 1 being flattened, 0 failing",
    "next_look": 1767225660.0,
    "disks": [
        {
            "vm": "web1",
            "disk": "vda",
            "layers": 9,
            "overlay_size": 21474836480,
            "state": "promised",
            "why": "it has 9 layers, more than 8",
            "commit": "5f0c1c1e9b6f4d0f8e2a7c3b1d9e8f70",
            "failures": 0,
            "not_before": None,
        }
    ],
    "away": {},
}


class RuleDisk(BaseModel):
    """A disk that a rule is for, as it was seen last.

    `overlay_size` is the bytes allocated above the bottom layer. `state` is "within" its limits;
    "left-alone", because of a window, a block job or another's commit; "promised", with the
    `commit` of the step that waits or runs; "done" with a step; or "backing-off" until
    `not_before` (seconds since 1970), after so many `failures` in a row. `why` says more.
    """

    model_config = ConfigDict(
        frozen=True, json_schema_extra={"examples": [RULE_EXAMPLE["disks"][0]]}
    )

    vm: str
    disk: str
    layers: int
    overlay_size: int
    state: Literal["within", "left-alone", "promised", "done", "backing-off"]
    why: str = ""
    commit: str | None = None
    failures: int = 0
    not_before: float | None = None


class RuleView(BaseModel):
    """A rule of the configuration, `number` from 0; times are seconds since 1970.

    `away` has the VMs that could not be asked at the last look, and why.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [RULE_EXAMPLE]})

    kind: Literal["flatten"] = "flatten"
    number: int
    rule: Flatten
    last_look: float | None = None
    last_result: str | None = None
    next_look: float | None = None
    disks: list[RuleDisk] = []
    away: dict[str, str] = {}
