"""A snapshot window that the daemon holds open for a client, by a lease that the client renews."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from qmpcommit.client.problems import error_from
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.quiesce import How
from qmpcommit.commit.window_records import Frozen, Window
from qmpcommit.errors import ConnectError, DaemonError, MonitorLost, QmpCommitError, WindowError
from qmpcommit.tasks import stop, to_the_end
from qmpcommit.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from qmpcommit.client.vm import RemoteVM

HOLD = 20.0
"""Seconds that the daemon is asked to wait for the window's end."""


@asynccontextmanager
async def snapshot(
    vm: RemoteVM,
    disks: Sequence[str],
    *,
    overlay_dir: str | os.PathLike[str] | None = None,
    freeze: How | None = None,
    agent: str | os.PathLike[str] | None = None,
    bandwidth: int | str | None = None,
    lease: float = 60.0,
) -> AsyncIterator[Window]:
    """A window over these disks for the length of the block; see `RemoteVM.snapshot`."""
    if isinstance(disks, str) or not disks:
        raise WindowError("name the disks of the window as a list, at least one", vm=vm.name)
    lease = parse_seconds(lease, "lease")
    asked = {
        "disks": list(disks),
        "overlay_dir": None if overlay_dir is None else os.fspath(overlay_dir),
        "freeze": freeze,
        "agent": None if agent is None else os.fspath(agent),
        "bandwidth": None if bandwidth is None else parse_size(bandwidth, "bandwidth"),
        "lease": lease,
    }
    headers = {"idempotency-key": uuid.uuid4().hex}
    body = {name: value for name, value in asked.items() if value is not None}
    # A cancelled client's window is closed by its lease.
    view = _parse(vm, await vm.client.ask("POST", f"{vm.path}/windows", body, headers=headers))
    path = f"/v1/windows/{view['id']}"
    members = ("disk", "filename", "overlay", "node_name")
    frozen = {
        name: Frozen(**{member: each[member] for member in members})
        for name, each in view["disks"].items()
    }
    window = Window(view["name"], frozen)
    window.quiesced = view["quiesced"]
    renewing = asyncio.create_task(_renew(vm, path, lease), name=f"lease of {window.name}")
    try:
        yield window
    finally:
        await stop(renewing)
        early, window.outcomes = await to_the_end(_close(vm, path))
    if early:
        raise WindowError(
            f"the window {window.name} on {vm.name} was closed before it was done with: its lease"
            " had ended, or somebody closed it. Nothing is lost, but what was read from its files"
            " is perhaps not of one instant: repeat it",
            vm=vm.name,
        )


async def _renew(vm: RemoteVM, path: str, lease: float) -> None:
    while True:
        await asyncio.sleep(lease / 3)
        try:
            _parse(vm, await vm.client.ask("POST", f"{path}/lease", {"seconds": lease}))
        except (ConnectError, MonitorLost):
            continue  # it may be back before the lease ends
        except QmpCommitError:
            return  # it was closed by somebody else, which its end tells


async def _close(vm: RemoteVM, path: str) -> tuple[bool, list[CommitOutcome]]:
    """Have it closed, and wait for its end; whether it was closed already, and the outcomes.

    Raises the error that it ended with.
    """
    view = _parse(vm, await vm.client.ask("GET", path))
    early = view["state"] != "open"
    view = _parse(vm, await vm.client.ask("DELETE", path))
    while view["ended"] is None:
        view = _parse(vm, await vm.client.ask("GET", f"{path}?wait={HOLD:g}", hold=HOLD))
    if view["error"] is not None:
        raise error_from(view["error"])
    return early, [CommitOutcome.model_validate(each) for each in view["outcomes"]]


def _parse(vm: RemoteVM, reply: Any) -> dict[str, Any]:
    try:
        found = vm.client.parse(reply)
    except QmpCommitError as error:
        error.add(vm=vm.name)
        raise
    if not isinstance(found, dict):
        raise DaemonError("the daemon's answer is no window", vm=vm.name)
    return found
