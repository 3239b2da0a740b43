"""A snapshot window that the daemon holds open for a client, by a lease that the client renews."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from qmpcommit.client.problems import error_from, sensible
from qmpcommit.client.taking_back import wanted
from qmpcommit.client.vm import name_of
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.errors import (
    DaemonLost,
    JobConflict,
    QmpCommitError,
    WindowError,
    WindowNotFound,
)
from qmpcommit.guest.run_state import How
from qmpcommit.tasks import stop, to_the_end
from qmpcommit.units import parse_seconds, parse_size
from qmpcommit.window.records import Frozen, GroupWindow, Window

if TYPE_CHECKING:
    from qmpcommit.client.host import Client
    from qmpcommit.client.vm import RemoteVM

HOLD = 20.0
"""Seconds that the daemon is asked to wait for the window's end."""

_WINDOW = "window"


@asynccontextmanager
async def snapshot(
    vm: RemoteVM,
    disks: Sequence[str],
    *,
    overlay_dir: str | os.PathLike[str] | None = None,
    overlay_options: Mapping[str, Any] | None = None,
    overlay_secret: str | None = None,
    freeze: How | None = None,
    agent: str | os.PathLike[str] | None = None,
    bandwidth: int | str | None = None,
    lease: float = 60.0,
) -> AsyncIterator[Window]:
    """A window over these disks for the length of the block; see `RemoteVM.snapshot`."""
    if isinstance(disks, str) or not disks:
        raise WindowError("name the disks of the window as a list, at least one", vm=vm.name)
    asked = {
        "disks": list(disks),
        "agent": None if agent is None else os.fspath(agent),
        **_common(overlay_dir, overlay_options, overlay_secret, freeze, bandwidth, lease),
    }
    held = _Held(vm.client, vm.name)
    view = await held.open(f"{vm.path}/windows", asked)
    try:
        window = _window(view)
        yield window
    finally:
        outcomes = _outcomes(await held.close())
    window.outcomes = outcomes
    held.check()


@asynccontextmanager
async def group_snapshot(
    client: Client,
    disks: Iterable[tuple[RemoteVM | str, str]],
    *,
    overlay_dir: str | os.PathLike[str] | None = None,
    overlay_options: Mapping[str, Any] | None = None,
    overlay_secret: str | None = None,
    freeze: How = "pause",
    agents: Mapping[Any, str | os.PathLike[str]] | None = None,
    bandwidth: int | str | None = None,
    lease: float = 60.0,
) -> AsyncIterator[GroupWindow[str]]:
    """A window over disks of several VMs for the length of the block; see `Client.snapshot`."""
    members = [{"vm": name_of(vm), "disk": str(disk)} for vm, disk in disks]
    if not members:
        raise WindowError("name the disks of the window, at least one")
    asked = {
        "members": members,
        "agents": {name_of(vm): os.fspath(agent) for vm, agent in (agents or {}).items()},
        **_common(overlay_dir, overlay_options, overlay_secret, freeze, bandwidth, lease),
    }
    names = list(dict.fromkeys(member["vm"] for member in members))
    held = _Held(client, ", ".join(names))
    view = await held.open("/v1/windows", asked)
    try:
        with sensible(_WINDOW):
            window = GroupWindow({each["vm"]: _window(each) for each in _each(view)})
        yield window
    finally:
        ended = await held.close()
    with sensible(_WINDOW):
        for each in _each(ended):
            window.of[each["vm"]].outcomes = _outcomes(each)
    held.check()


class _Held:
    """A window that is held open here: its lease is renewed until it is closed."""

    def __init__(self, client: Client, vm: str) -> None:
        self._client, self._vm = client, vm
        self._path, self._name = "", ""
        self._early = False
        self._renewing: asyncio.Task[None] | None = None

    async def open(self, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Open it; it is what the daemon shows of it. One that nobody waits for is closed."""
        view = await wanted(self._open(path, asked), self._take_back, self._unanswered)
        renewing = self._renew(asked["lease"])
        self._renewing = asyncio.create_task(renewing, name=f"lease of {self._name}")
        return view

    async def _open(self, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"idempotency-key": uuid.uuid4().hex}
        body = {name: value for name, value in asked.items() if value is not None}
        view = self._parse(await self._client.ask("POST", path, body, headers=headers))
        with sensible(_WINDOW):
            self._path, self._name = f"/v1/windows/{view['id']}", str(view["name"])
        return view

    async def _take_back(self, opened: dict[str, Any]) -> None:
        self._parse(await self._client.ask("DELETE", self._path))

    def _unanswered(self) -> DaemonLost:
        return DaemonLost(
            f"the daemon did not answer whether it has opened a window on {self._vm}; perhaps"
            " it has, and closes it when its lease has ended",
            vm=self._vm,
        )

    async def close(self) -> dict[str, Any]:
        """Have it closed, and wait for its end; raises the error that it ended with."""
        return await to_the_end(self._close())

    def check(self) -> None:
        """Raise `WindowError` where it was closed before `close` was called."""
        if self._early:
            raise WindowError(
                f"the window {self._name} on {self._vm} was closed before it was done with: its"
                " lease had ended, or somebody closed it. Nothing is lost, but what was read from"
                " its files is perhaps not of one instant: repeat it",
                vm=self._vm,
            )

    async def _renew(self, lease: float) -> None:
        while True:
            await asyncio.sleep(lease / 3)
            try:
                asked = {"seconds": lease}
                self._parse(await self._client.ask("POST", f"{self._path}/lease", asked))
            except (JobConflict, WindowNotFound):
                return  # it was closed by somebody else, which its end tells
            except QmpCommitError:
                continue  # the daemon may be back, or have room, before the lease ends

    async def _close(self) -> dict[str, Any]:
        if self._renewing is not None:
            await stop(self._renewing)
        view = self._parse(await self._client.ask("GET", self._path))
        self._early = view.get("state") != "open"
        view = self._parse(await self._client.ask("DELETE", self._path))
        while view.get("ended") is None:
            path = f"{self._path}?wait={HOLD:g}"
            view = self._parse(await self._client.ask("GET", path, hold=HOLD))
        with sensible(_WINDOW):
            if view["error"] is not None:
                raise error_from(view["error"])
        return view

    def _parse(self, reply: Any) -> dict[str, Any]:
        try:
            found = self._client.parse(reply)
        except QmpCommitError as error:
            error.add(vm=self._vm)
            raise
        with sensible(_WINDOW):
            if not isinstance(found, dict):
                raise TypeError(f"a {type(found).__name__}")
        return found


def _common(  # noqa: PLR0917
    overlay_dir: str | os.PathLike[str] | None,
    overlay_options: Mapping[str, Any] | None,
    overlay_secret: str | None,
    freeze: How | None,
    bandwidth: int | str | None,
    lease: float,
) -> dict[str, Any]:
    return {
        "overlay_dir": None if overlay_dir is None else os.fspath(overlay_dir),
        "overlay_options": None if overlay_options is None else dict(overlay_options),
        "overlay_secret": overlay_secret,
        "freeze": freeze,
        "bandwidth": None if bandwidth is None else parse_size(bandwidth, "bandwidth"),
        "lease": parse_seconds(lease, "lease"),
    }


def _each(view: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The windows on its VMs; one on a single VM tells of itself."""
    return list(view["windows"]) or [view]


def _window(view: Mapping[str, Any]) -> Window:
    with sensible(_WINDOW):
        frozen = {
            name: Frozen.model_validate(each, extra="ignore")
            for name, each in view["disks"].items()
        }
        window = Window(str(view["name"]), frozen)
        window.quiesced = view["quiesced"]
    return window


def _outcomes(view: Mapping[str, Any]) -> list[CommitOutcome]:
    with sensible(_WINDOW):
        return [CommitOutcome.model_validate(each, extra="ignore") for each in view["outcomes"]]
