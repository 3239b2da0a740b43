"""What the API shows of the rules of the configuration."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qmpcommit.wire.values import Number, Pattern, Seconds, Section, Size, Timed


class Flatten(Section):
    """A rule: chains that pass a limit are flattened, to `keep` layers.

    `vm` and `disk` are names or patterns (``*``, ``?``, ``[...]``); `depth` is the number of
    layers, and `overlay_size` the bytes allocated above the bottom layer, up to which a chain is
    left as it is; `every` is the seconds between two looks, and the first pause after a failure;
    `bandwidth` is in bytes per second, and `delete` has the files of merged layers deleted.
    Relative backing names stay relative; `keep_relative` makes absolute ones so.
    """

    vm: Pattern
    disk: Pattern = "*"
    keep: Number
    depth: Number | None = None
    overlay_size: Size | None = None
    every: Seconds = Field(default=60.0, ge=0.05)
    bandwidth: Size | None = None
    delete: bool = False
    keep_relative: bool = False

    @model_validator(mode="after")
    def _check(self) -> Flatten:
        if self.depth is None and self.overlay_size is None:
            raise ValueError("give depth, overlay_size or both: a rule needs a limit")
        if self.depth is not None and self.depth < self.keep:
            raise ValueError(
                f"a chain of {self.keep} layers (keep) would pass depth = {self.depth} for ever"
            )
        return self


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


class RuleDisk(Timed, BaseModel):
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
    not_before_at: datetime | None = None


class RuleView(Timed, BaseModel):
    """A rule of the configuration, `number` from 0; times are seconds since 1970.

    `away` has the VMs that could not be asked at the last look, and why.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [RULE_EXAMPLE]})

    kind: Literal["flatten"] = "flatten"
    number: int
    rule: Flatten
    last_look: float | None = None
    last_look_at: datetime | None = None
    last_result: str | None = None
    next_look: float | None = None
    next_look_at: datetime | None = None
    disks: list[RuleDisk] = []
    away: dict[str, str] = {}
