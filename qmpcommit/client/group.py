"""A group that the daemon has promised, as its client sees it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from qmpcommit.client.job import HOLD
from qmpcommit.client.problems import error_from
from qmpcommit.client.taking_back import wanted
from qmpcommit.client.vm import RemoteGroupOptions, body_of, name_of
from qmpcommit.commit.request import policy_body
from qmpcommit.errors import (
    CommitFailed,
    CommitNotFound,
    DaemonError,
    DaemonLost,
    JobConflict,
)
from qmpcommit.units import parse_seconds

if TYPE_CHECKING:
    from qmpcommit.client.host import Client
    from qmpcommit.client.http import Reply
    from qmpcommit.group.outcome import GroupOutcome
    from qmpcommit.guest.run_state import How
    from qmpcommit.wire.group import GroupView


class RemoteGroup:
    """One group of the daemon, as `GroupCommit`; made by `Client.commit_group`.

    `view` is what was last seen of it. Waiting goes on over a restart of the daemon, as long as
    `Client.patience` allows, and ends with `DaemonLost` otherwise; the group goes on in any case.
    """

    def __init__(self, client: Client, view: GroupView) -> None:
        self._client = client
        self.id, self.view = view.id, view

    def __repr__(self) -> str:
        return f"RemoteGroup({self.id!r}, state={self.state!r})"

    @property
    def state(self) -> str:
        """``queued``, ``running``, ``done``, ``failed`` or ``cancelled``, when last seen."""
        return self.view.state

    @property
    def done(self) -> bool:
        """Whether the outcome, or the error, is there."""
        return self.state not in ("queued", "running")

    async def refresh(self) -> GroupView:
        """Look at it again."""
        return await self._look()

    async def wait(self) -> GroupOutcome:
        """The outcome, or the `QmpCommitError` that the group ended with, as the library's own.

        Cancelling the wait does not cancel the group: see `abort`.
        """
        while not self.done:
            await self._look(HOLD)
        if self.view.outcome is not None:
            return self.view.outcome
        if self.view.error is not None:
            raise error_from(self.view.error)
        raise CommitFailed(
            f"the group {self.id} was cancelled before all of its jobs had begun. No disk was"
            " pivoted or kept",
            begun=False,
        )

    async def pivot(self) -> None:
        """Decide for the bases, and return when the daemon has taken it.

        Raises `NotReady` where not all are READY (the group goes on unharmed), `JobConflict`
        where it is decided already or has ended.
        """
        await self.decide("pivot")

    async def keep(self) -> None:
        """Decide for the overlays; as `pivot`."""
        await self.decide("keep")

    async def abort(self) -> None:
        """Cancel all of it; raises `JobConflict` where it is being finalized or has ended."""
        await self.decide("abort")

    async def decide(self, action: Literal["pivot", "keep", "abort"]) -> None:
        """Decide for all; as `pivot`."""
        path = f"/v1/groups/{self.id}/decision"
        reply = await self._client.ask("POST", path, {"action": action})
        try:
            self._see(reply)
        except JobConflict:
            # The first time it was heard, perhaps, and the reply was lost.
            if not reply.again or (await self._look()).decision != action:
                raise

    async def _look(self, hold: float = 0.0) -> GroupView:
        path = f"/v1/groups/{self.id}" + (f"?wait={hold:g}" if hold else "")
        try:
            return self._see(await self._client.ask("GET", path, hold=hold))
        except DaemonError as error:
            if error.status != 503 or not hold:
                raise
            return self.view  # it is busy, and it is there

    def _see(self, reply: Reply) -> GroupView:
        self.view = _view(self._client.parse(reply))
        return self.view


async def commit_group(
    client: Client,
    members: Iterable[tuple[Any, ...]],
    *,
    policy: Any,
    hold_limit: float | None,
    freeze: How | None,
    agents: Mapping[Any, str | os.PathLike[str]] | None,
    idempotency_key: str | None,
    options: RemoteGroupOptions,
) -> RemoteGroup:
    """`Client.commit_group`, whose arguments these are."""
    unknown = sorted(set(options) - set(RemoteGroupOptions.__annotations__))
    if unknown:
        raise TypeError(f"a group commit of the daemon takes no such option: {unknown[0]}")
    body = body_of("", policy=policy, **options)
    del body["disk"]
    if hold_limit is not None:
        body["hold_limit"] = parse_seconds(hold_limit, "hold limit")
    if freeze is not None:
        body["freeze"] = freeze
    if agents:
        body["agents"] = {name_of(vm): os.fspath(agent) for vm, agent in agents.items()}
    body["members"] = []
    for name, disk, *own in members:
        member: dict[str, Any] = {"vm": name_of(name), "disk": str(disk)}
        if own and own[0] is not None:
            member["policy"] = policy_body(own[0])
        body["members"].append(member)
    group, _ = await wanted(_promise(client, body, idempotency_key), _take_back, _unanswered)
    return group


async def _promise(
    client: Client, body: dict[str, Any], key: str | None
) -> tuple[RemoteGroup, bool]:
    """The promised group, and whether it is new."""
    headers = {"idempotency-key": key or uuid.uuid4().hex}
    reply = await client.ask("POST", "/v1/groups", body, headers=headers)
    group = RemoteGroup(client, _view(client.parse(reply)))
    return group, key is None or reply.again or "idempotent-replay" not in reply.headers


async def _take_back(promised: tuple[RemoteGroup, bool]) -> None:
    group, new = promised
    if new:
        await group.abort()


def _unanswered() -> DaemonLost:
    return DaemonLost(
        "the daemon did not answer whether it has promised the group; perhaps it has. See"
        " GET /v1/groups"
    )


async def find_group(client: Client, group_id: str) -> RemoteGroup:
    """`Client.group`."""
    if not group_id or group_id.strip("0123456789abcdef"):
        raise CommitNotFound(f"'{group_id}' is no group's id")
    found = client.parse(await client.ask("GET", f"/v1/groups/{quote(group_id)}"))
    return RemoteGroup(client, _view(found))


async def list_groups(client: Client, limit: int) -> list[RemoteGroup]:
    """`Client.groups`."""
    found = client.parse_list(await client.ask("GET", f"/v1/groups?limit={limit}"))
    return [RemoteGroup(client, _view(each)) for each in found]


def _view(value: object) -> GroupView:
    from qmpcommit.client.host import view_as
    from qmpcommit.wire.group import GroupView

    return view_as(GroupView, value)  # type: ignore[no-any-return]
