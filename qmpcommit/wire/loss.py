"""What the API shows of promises that a damaged journal may have lost."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qmpcommit.wire.values import Timed

How = Literal["gone", "old", "over", "perhaps"]


class LostPromise(BaseModel):
    """A promise that is not known as it was.

    `how`: nothing of it can be read (gone), its last steps are lost (old), its end is lost (over),
    or it can't be known whether something of it is lost (perhaps).
    """

    model_config = ConfigDict(frozen=True)

    kind: str = Field(examples=["commit"])
    id: str
    vm: str = Field(examples=["web1"])
    disk: str = Field(examples=["vda"])
    job_id: str = Field(examples=["qmpcommit-vda-1f2e3d4c"])
    how: How


class LossView(Timed, BaseModel):
    """A journal that was set aside: when, why, where it is kept, and what may be missing.

    `at` is in seconds since 1970, `time` the same as RFC 3339 has it. Where `all_named` is false
    there may have been other promises than these.
    """

    model_config = ConfigDict(frozen=True)

    at: float
    time: datetime | None = None
    why: str = Field(examples=["its last 3 transactions are lost"])
    kept: str
    all_named: bool
    promises: list[LostPromise]
