"""The values that requests and the configuration are made of, each checked where it comes in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qmpcommit.errors import InvalidRequest
from qmpcommit.guest.hold import check_names
from qmpcommit.qmp.address import Address
from qmpcommit.units import parse_seconds, parse_size

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """A VM's name, fit for a path of the API; raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a VM's name is up to 64 letters, digits, '.', '_' and '-', beginning with a letter or"
            " digit"
        )
    return name


def check_address(address: str) -> str:
    """A monitor's address; raises ValueError."""
    Address.parse(address)
    return address


def check_path(path: str) -> str:
    """Raises ValueError."""
    if "\0" in path:
        raise ValueError("a NUL byte has no place in a path")
    return path


def _size(value: Any) -> int:
    return parse_size(value, "size")


def _seconds(value: Any) -> float:
    return parse_seconds(value, "time")


VMName = Annotated[
    str,
    Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"}),
    AfterValidator(check_name),
]
QMPAddress = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_address)]
Size = Annotated[int, BeforeValidator(_size)]
Seconds = Annotated[float, BeforeValidator(_seconds)]
Connect = Literal["keep", "on-demand"]
FilePath = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_path)]
Number = Annotated[int, Field(strict=True, ge=1)]
CommandWord = Annotated[str, Field(max_length=4096), AfterValidator(check_path)]
Pattern = Annotated[str, Field(min_length=1, max_length=4096)]


class AskedBy(BaseModel):
    """Who asked for something: in words and as a number, with which role, and from where.

    A user of the Unix socket has a `uid`, and its process as `address`; the bearer of a token the
    address of its end.
    """

    model_config = ConfigDict(frozen=True)

    who: str = Field(examples=["user 1000"])
    uid: int | None = None
    role: Literal["none", "read", "operate", "admin"] = Field(examples=["operate"])
    address: str = Field(examples=["process 4711"])


def moment(seconds: Any) -> datetime | None:
    """Seconds since 1970 as a time of UTC; None for what is none, or none of this calendar."""
    with suppress(TypeError, ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(seconds, UTC)
    return None


def told_as(name: str) -> str:
    """How a time that a view has as seconds since 1970 is called where it is RFC 3339's."""
    return "time" if name == "at" else f"{name}_at"


class Timed(BaseModel):
    """A view that has each time twice: as seconds since 1970, and as RFC 3339 has it."""

    @model_validator(mode="before")
    @classmethod
    def _tell_times(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        names = [name for name in given if told_as(name) in cls.model_fields]
        return {**{told_as(name): moment(given[name]) for name in names}, **given}


class Section(BaseModel):
    """A part of a configuration or request; what it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_sockets(vms: Iterable[str], agents: Mapping[str, str]) -> None:
    """Raises ValueError where one of these VMs has no guest agent's socket there."""
    try:
        check_names(vm for vm in vms if vm not in agents)
    except InvalidRequest as error:
        raise ValueError(error.message) from None


class Quiescing(Section):
    """How guests are quiesced around one instant: `freeze` is "agent", "pause", or none.

    "agent" has each guest's agent flush and freeze its file systems: `agents` are the agents'
    sockets by the VMs' names, `agent` is that of the only VM. "pause" stops the vCPUs.
    """

    freeze: Literal["agent", "pause"] | None = None
    agent: FilePath | None = None
    agents: dict[VMName, FilePath] = Field(default={}, max_length=256)

    def check_agents(self, vms: Iterable[str]) -> None:
        """Raises ValueError where one of these VMs has no socket and needs it."""
        names = list(dict.fromkeys(vms))
        if self.agent is not None and (len(names) > 1 or self.agents):
            raise ValueError("agent is for one VM; give several VMs agents, by their names")
        if self.freeze == "agent":
            check_sockets(names, self.sockets(names))

    def sockets(self, vms: Iterable[str]) -> dict[str, str]:
        """The agents' sockets of these VMs."""
        return {**({} if self.agent is None else dict.fromkeys(vms, self.agent)), **self.agents}


def check_overlay(options: dict[str, Any] | None, secret: str | None) -> None:
    """Raise ValueError for what can't be asked of a fresh overlay."""
    from qmpcommit.commit.overlay.options import OverlayOptions

    try:
        OverlayOptions.of(options, secret)
    except InvalidRequest as error:
        raise ValueError(error.message) from None
