"""The daemon's configuration: a TOML file, checked to its last member before anything runs."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from qmpcommit.client import DEFAULT_SOCKET
from qmpcommit.commit.quiesce import check_names
from qmpcommit.errors import InvalidRequest
from qmpcommit.qmp.address import Address
from qmpcommit.units import parse_seconds, parse_size

MAX_CONFIG = 1 << 20
"""Bytes; a configuration is not larger."""

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


def _check_path(path: str) -> str:
    if "\0" in path:
        raise ValueError("a NUL byte has no place in a path")
    return path


def _check_glob(pattern: str) -> str:
    if not pattern.startswith("/"):
        raise ValueError("give an absolute path: the daemon's working directory is no place")
    if "*" not in pattern:
        raise ValueError("a glob has a * that stands for the VM's name, as in /run/vms/*/qmp.sock")
    return _check_path(pattern)


def _check_tcp(address: str) -> str:
    if not 0 < int(address.rpartition(":")[2]) < 65536:
        raise ValueError("a port is between 1 and 65535")
    return address


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
FilePath = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_check_path)]
Number = Annotated[int, Field(strict=True, ge=1)]
CommandWord = Annotated[str, Field(max_length=4096), AfterValidator(_check_path)]
Pattern = Annotated[str, Field(min_length=1, max_length=4096)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def check_sockets(vms: Iterable[str], agents: Mapping[str, str]) -> None:
    """Raises ValueError where one of these VMs has no guest agent's socket there."""
    try:
        check_names(vm for vm in vms if vm not in agents)
    except InvalidRequest as error:
        raise ValueError(error.message) from None


class Quiescing(_Section):
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


class Listen(_Section):
    """Where the API is served, and to whom.

    `users` and `groups` are those who may use the Unix socket, beside root and the daemon's own
    user: names or numbers. `tcp` is a loopback address, HOST:PORT, which needs the bearer token
    in `token_file`.
    """

    socket: FilePath = DEFAULT_SOCKET
    mode: str = Field(default="0660", pattern=r"^0?[0-7]{3}$")
    group: str | None = None
    users: tuple[str | int, ...] = ()
    groups: tuple[str | int, ...] = ()
    tcp: Annotated[
        str | None,
        Field(pattern=r"^(127\.\d+\.\d+\.\d+|\[::1\]|localhost):\d{1,5}$"),
    ] = None
    token_file: FilePath | None = None

    @model_validator(mode="after")
    def _check(self) -> Listen:
        if self.tcp is not None:
            _check_tcp(self.tcp)
        if self.tcp is not None and self.token_file is None:
            raise ValueError("tcp needs a token_file: whoever can reach a port is not known")
        return self


class Limits(_Section):
    """What runs at once, and what a client may ask.

    `bandwidth` is the budget in bytes per second that running copies share (0: none); `queue`
    how many commits may wait; `gone_after` for how many seconds a VM may be away before its
    commits are given up. A snapshot window that is older than `window_age`, or whose overlay has
    more than `window_size` bytes (0: any), is warned of.
    """

    commits: Number = 16
    per_vm: Number = 2
    per_storage: Number = 4
    bandwidth: Size = 0
    queue: int = Field(default=10_000, strict=True, ge=0)
    connects: Number = 32
    gone_after: Seconds = 60.0
    window_age: Seconds = 86400.0
    window_size: Size = 10 * 1024**3
    request_size: Size = Field(default=65536, ge=1024)
    request_time: Seconds = Field(default=30.0, ge=0.1)
    requests: Number = 256
    followers: int = Field(default=64, strict=True, ge=0)


class Discover(_Section):
    """VMs found by their monitors' sockets; what the first ``*`` stands for is the VM's name."""

    glob: Annotated[str, Field(max_length=4096), AfterValidator(_check_glob)]
    connect: Connect = "keep"


class ConfiguredVM(_Section):
    """A VM that is always there, running or not."""

    name: VMName
    qmp: QMPAddress
    connect: Connect = "keep"


class Flatten(_Section):
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


def check_overlay(options: dict[str, Any] | None, secret: str | None) -> None:
    """Raise ValueError for what can't be asked of a fresh overlay."""
    from qmpcommit.commit.overlay_options import OverlayOptions

    try:
        OverlayOptions.of(options, secret)
    except InvalidRequest as error:
        raise ValueError(error.message) from None


class CycleDisk(_Section):
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


class Config(_Section):
    """All of it.

    `state` is the folder of the journal; `commands` tells whether clients may have commands run
    (``only_if``, a check, ``on_pivot``), which are run as the daemon's user; `retain_days` is for
    how long ended commits are kept.
    """

    state: FilePath = "/var/lib/qmpcommit"
    log: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    commands: bool = False
    retain_days: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    discover_every: Seconds = Field(default=2.0, ge=0.05)
    listen: Listen = Listen()
    limits: Limits = Limits()
    discover: tuple[Discover, ...] = ()
    vm: tuple[ConfiguredVM, ...] = ()
    flatten: tuple[Flatten, ...] = ()
    cycle: tuple[Cycle, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Config:
        names = [vm.name for vm in self.vm]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several VMs are called {', '.join(twice)}")
        disks = [place for cycle in self.cycle for place in cycle.disks]
        again = sorted({f"{vm} {disk}" for vm, disk in disks if disks.count((vm, disk)) > 1})
        if again:
            raise ValueError(f"cycles name a disk more than once: {', '.join(again)}")
        for cycle in self.cycle:
            self._check_room_for(cycle)
        return self

    def _check_room_for(self, cycle: Cycle) -> None:
        """Disks that are kept at one instant are committed at once."""
        vms = [vm for vm, _ in cycle.disks]
        of_one = max(vms.count(vm) for vm in vms)
        for name, needed in (("commits", len(vms)), ("per_vm", of_one)):
            limit = getattr(self.limits, name)
            if needed > limit:
                raise ValueError(
                    f"the cycle of {cycle.disk} of {cycle.vm} commits {needed} disks at once, and"
                    f" limits.{name} is {limit}"
                )


def load(path: str | os.PathLike[str]) -> Config:
    """Read a configuration; raises `InvalidRequest` that names each wrong member."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise InvalidRequest(f"the configuration {path} can't be read: {error.strerror}") from None
    if len(raw) > MAX_CONFIG:
        raise InvalidRequest(f"the configuration {path} is larger than {MAX_CONFIG} bytes")
    return parse(raw, str(path))


def parse(raw: bytes, source: str) -> Config:
    """A configuration from its text; raises `InvalidRequest`."""
    try:
        return Config.model_validate(tomllib.loads(raw.decode()))
    except UnicodeDecodeError:
        raise InvalidRequest(f"the configuration {source} is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise InvalidRequest(f"the configuration {source} is no TOML: {error}") from None
        wrong = "; ".join(f"{_path(each['loc'])}: {each['msg']}" for each in error.errors())
        raise InvalidRequest(f"the configuration {source} is wrong: {wrong}") from None


def _path(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location) or "top"
