"""The daemon's configuration: a TOML file, checked to its last member before anything runs."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)

from qmpcommit.client import DEFAULT_SOCKET
from qmpcommit.daemon.wrong import in_words
from qmpcommit.errors import InvalidRequest
from qmpcommit.wire.cycle import Cycle
from qmpcommit.wire.rules import Flatten
from qmpcommit.wire.values import (
    Connect,
    FilePath,
    Number,
    Pattern,
    QMPAddress,
    Seconds,
    Section,
    Size,
    VMName,
    check_path,
)

MAX_CONFIG = 1 << 20
"""Bytes; a configuration is not larger."""


def _check_glob(pattern: str) -> str:
    if not pattern.startswith("/"):
        raise ValueError("give an absolute path: the daemon's working directory is no place")
    if "*" not in pattern:
        raise ValueError("a glob has a * that stands for the VM's name, as in /run/vms/*/qmp.sock")
    return check_path(pattern)


def _check_tcp(address: str) -> str:
    if not 0 < int(address.rpartition(":")[2]) < 65536:
        raise ValueError("a port is between 1 and 65535")
    return address


class Listen(Section):
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
        return self


class Grant(Section):
    """What some may do with the VMs whose names match one of `vms`.

    `role` is "read" (see them), "operate" (commit, and decide), or "admin" (also make VMs known
    and have them forgotten). `users` and `groups` are names or numbers, those of the Unix socket's
    other end; `tokens` are files, each with a token for TCP, which may be exchanged at any time.
    """

    role: Literal["read", "operate", "admin"]
    users: tuple[str | int, ...] = ()
    groups: tuple[str | int, ...] = ()
    tokens: tuple[FilePath, ...] = ()
    vms: Annotated[tuple[Pattern, ...], Field(min_length=1)] = ("*",)


def _check_folder(pattern: str) -> str:
    if not pattern.startswith("/"):
        raise ValueError("must be an absolute path, or a pattern of one as in /run/vms/*")
    return check_path(pattern)


Folders = tuple[Annotated[FilePath, AfterValidator(_check_folder)], ...]


class Access(Section):
    """Who may do what beside the admins that `[listen]` names, and in which folders.

    What is asked over the API may use `monitors` and `agents` (guest agents' sockets) only in
    these folders and below them, and have overlays made and files deleted only in those of
    `overlays` and `deletions`. Where none are given these are the folders of the configured VMs'
    sockets, and those of the layers of a configured or found VM's own disk.
    """

    grant: tuple[Grant, ...] = ()
    monitors: Folders | None = None
    agents: Folders | None = None
    overlays: Folders | None = None
    deletions: Folders | None = None


class Limits(Section):
    """What runs at once, and what a client may ask.

    `bandwidth` is the budget in bytes per second that running copies share (0: none); `queue`
    how many commits may wait; `gone_after` for how many seconds a VM may be away before its
    commits are given up. A snapshot window that is older than `window_age`, or whose overlay has
    more than `window_size` bytes (0: any), is warned of. `connections` are those to the Unix
    socket that are open at once, `connections_per_user` those of one user, and `connections_tcp`
    those to TCP; where they are as many, one that asks for nothing is cut.
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
    connections: Number = 512
    connections_per_user: Number = 384
    connections_tcp: Number = 128
    followers: int = Field(default=64, strict=True, ge=0)


class Discover(Section):
    """VMs found by their monitors' sockets; what the first ``*`` stands for is the VM's name."""

    glob: Annotated[str, Field(max_length=4096), AfterValidator(_check_glob)]
    connect: Connect = "keep"


class ConfiguredVM(Section):
    """A VM that is always there, running or not."""

    name: VMName
    qmp: QMPAddress
    connect: Connect = "keep"


class Config(Section):
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
    access: Access | None = None
    limits: Limits = Limits()
    discover: tuple[Discover, ...] = ()
    vm: tuple[ConfiguredVM, ...] = ()
    flatten: tuple[Flatten, ...] = ()
    cycle: tuple[Cycle, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Config:
        grants = self.access.grant if self.access is not None else ()
        tokens = [self.listen.token_file, *(path for each in grants for path in each.tokens)]
        if self.listen.tcp is not None and not any(tokens):
            raise ValueError(
                "listen: tcp needs a token_file, or a grant with tokens: whoever can reach a port"
                " is not known"
            )
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
        wrong = in_words(error, Config)
        raise InvalidRequest(f"the configuration {source} is wrong: {wrong}") from None
