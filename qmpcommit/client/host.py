"""The client of a daemon: its VMs, its commits and its events."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack
from urllib.parse import quote, urlencode

from qmpcommit.client import default_daemon
from qmpcommit.client.events import Events
from qmpcommit.client.http import Lost, Reply, Wire
from qmpcommit.client.problems import problem, sensible, transient
from qmpcommit.errors import (
    CommitNotFound,
    DaemonError,
    DaemonLost,
    DaemonUnreachable,
    InvalidRequest,
    VMNotFound,
)
from qmpcommit.former import former
from qmpcommit.qmp.address import Address
from qmpcommit.units import parse_seconds

if TYPE_CHECKING:
    from qmpcommit.client.group import RemoteGroup
    from qmpcommit.client.job import RemoteJob
    from qmpcommit.client.vm import RemoteGroupOptions, RemoteVM
    from qmpcommit.commit.policy import AskedPolicy
    from qmpcommit.guest.run_state import How
    from qmpcommit.window.records import GroupWindow
    from qmpcommit.wire.commit import CommitView, VMView
    from qmpcommit.wire.cycle import CycleView
    from qmpcommit.wire.loss import LossView
    from qmpcommit.wire.rules import RuleView

PAUSE = (0.02, 0.5)
"""Seconds between two tries, at first and at most."""


class Client:
    """A client of ``qmpcommitd``; ``async with Client(...) as host`` connects.

    `socket` is the path of the daemon's socket or ``tcp:HOST:PORT``, which needs the bearer
    `token`; where it is left out, $QMPCOMMIT_DAEMON or the system's daemon. A request has `timeout`
    seconds; a daemon that was there and does not answer (it is being restarted) is asked again for
    `patience` seconds. Every request is made so that asking again has no second effect. Leaving the
    block ends the waiting, never a commit: the daemon has promised it. Entering raises
    `DaemonUnreachable`, or `DaemonError` for a refusal.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        patience: float = 30.0,
    ) -> None:
        try:
            address = Address.parse(default_daemon() if socket is None else socket)
        except InvalidRequest as error:
            raise InvalidRequest(f"the daemon's address is wrong: {error.message}") from None
        self.timeout = parse_seconds(timeout, "timeout")
        self.patience = parse_seconds(patience, "patience")
        self.wire = Wire(address, token)
        self.met = False

    def __repr__(self) -> str:
        return f"<Client of the daemon at {str(self.wire.address)!r}>"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """See whether a daemon answers; raises as entering does."""
        answer = self.parse(await self.ask("GET", "/healthz"))
        if not isinstance(answer, dict) or answer.get("status") != "ok":
            raise DaemonError(
                f"what answers at {self.wire.address} is no qmpcommitd",
                address=str(self.wire.address),
            )

    async def close(self) -> None:
        """Hang up; the daemon's commits go on."""
        await self.wire.close()

    # -- VMs --------------------------------------------------------------------------------------

    async def vms(self) -> list[VMView]:
        """The VMs that the daemon knows, by name."""
        return [vm_view(each) for each in self.parse_list(await self.ask("GET", "/v1/vms"))]

    def vm(self, name: str) -> RemoteVM:
        """The VM of that name; nothing is asked yet. Raises `VMNotFound` for what is no name."""
        from qmpcommit.client.vm import RemoteVM
        from qmpcommit.wire.values import check_name

        try:
            return RemoteVM(self, check_name(str(name)))
        except ValueError as error:
            raise VMNotFound(
                f"'{name}' can't be a VM of the daemon: {error}. Ask the daemon by a VM's name, not"
                " by its monitor's address",
                vm=str(name),
            ) from None

    async def add_vm(
        self,
        name: str,
        qmp: str | os.PathLike[str],
        *,
        connect: Literal["keep", "on-demand"] = "keep",
    ) -> RemoteVM:
        """Make a VM known by the address of its monitor; it stays known across restarts.

        With "on-demand" the monitor is connected only while it is needed. Adding it again has
        no effect; raises `JobConflict` where the name means another VM, and `InvalidRequest`.
        """
        body = {"name": str(name), "qmp": os.fspath(qmp), "connect": connect}
        self.parse(await self.ask("POST", "/v1/vms", body))
        return self.vm(name)

    async def remove_vm(self, name: str) -> None:
        """Forget a VM; raises `VMNotFound`, or `JobConflict` while it has commits."""
        vm = self.vm(name)
        reply = await self.ask("DELETE", vm.path)
        if not (reply.again and reply.status == 404):  # the first time it was heard
            self.parse(reply)

    # -- commits ----------------------------------------------------------------------------------

    async def commits(
        self,
        *,
        vm: str | None = None,
        disk: str | None = None,
        state: Literal["queued", "running", "done", "failed", "cancelled"] | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[RemoteJob]:
        """Commits, the newest first, those that have ended included; at most `limit` (1000).

        `after` is the id of a commit behind which they go on.
        """
        from qmpcommit.client.job import RemoteJob

        asked = {"vm": vm, "disk": disk, "state": state, "limit": limit, "after": after}
        query = urlencode({name: value for name, value in asked.items() if value is not None})
        found = self.parse_list(await self.ask("GET", f"/v1/commits?{query}"))
        return [RemoteJob(self, commit_view(each)) for each in found]

    async def commit(self, commit_id: str) -> RemoteJob:
        """The commit with that id, whoever asked for it; raises `CommitNotFound`."""
        from qmpcommit.client.job import RemoteJob

        if not commit_id or commit_id.strip("0123456789abcdef"):
            raise CommitNotFound(f"'{commit_id}' is no commit's id")
        found = self.parse(await self.ask("GET", f"/v1/commits/{quote(commit_id)}"))
        return RemoteJob(self, commit_view(found))

    # -- groups -----------------------------------------------------------------------------------

    async def commit_group(
        self,
        members: Iterable[
            tuple[RemoteVM | str, str] | tuple[RemoteVM | str, str, AskedPolicy | None]
        ],
        *,
        policy: AskedPolicy | None = None,
        hold_limit: float | None = None,
        freeze: How | None = None,
        agents: Mapping[Any, str | os.PathLike[str]] | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[RemoteGroupOptions],
    ) -> RemoteGroup:
        """Have the daemon commit disks at one instant: all of them or none.

        `members` are tuples of a VM (or its name), a disk and, unless one `policy` is given to
        all, a policy. Their I/O is held for at most `hold_limit` seconds (2 by default).
        `freeze` quiesces all guests around the instant; `agents` are the sockets of the guest
        agents on the daemon's host, by VM or its name. `options` are those of `RemoteVM.commit`
        that make sense for several disks. Raises what that raises; if this is cancelled, so is a
        group that was promised meanwhile.
        """
        from qmpcommit.client.group import commit_group

        return await commit_group(
            self,
            members,
            policy=policy,
            hold_limit=hold_limit,
            freeze=freeze,
            agents=agents,
            idempotency_key=idempotency_key,
            options=options,
        )

    async def group(self, group_id: str) -> RemoteGroup:
        """The group with that id, whoever asked for it; raises `CommitNotFound`."""
        from qmpcommit.client.group import find_group

        return await find_group(self, group_id)

    async def groups(self, *, limit: int = 100) -> list[RemoteGroup]:
        """Groups, the newest first, those that have ended included; at most `limit` (1000)."""
        from qmpcommit.client.group import list_groups

        return await list_groups(self, limit)

    # -- windows ----------------------------------------------------------------------------------

    @former(overlay_dir="overlay")
    def snapshot(
        self,
        disks: Iterable[tuple[RemoteVM | str, str]],
        *,
        freeze: How = "pause",
        agents: Mapping[Any, str | os.PathLike[str]] | None = None,
        overlay: str | os.PathLike[str] | None = None,
        overlay_options: Mapping[str, Any] | None = None,
        overlay_secret: str | None = None,
        bandwidth: int | str | None = None,
        lease: float = 60.0,
    ) -> AbstractAsyncContextManager[GroupWindow[str]]:
        """One instant of several VMs: ``async with host.snapshot([("web1", "vda"), ...])``.

        As `qc.snapshot`, for all or none; ``window["web1", "vda"].filename`` stands still. The
        daemon holds it open as `RemoteVM.snapshot` says. `agents` are the sockets of the guest
        agents on the daemon's host, by VM or its name. Raises what `RemoteVM.snapshot` raises;
        where a VM's window can't be closed, the others are, and `WindowError` tells which stays.
        """
        from qmpcommit.client.window import group_snapshot

        return group_snapshot(
            self,
            disks,
            overlay_dir=overlay,
            overlay_options=overlay_options,
            overlay_secret=overlay_secret,
            freeze=freeze,
            agents=agents,
            bandwidth=bandwidth,
            lease=lease,
        )

    # -- the configuration's cycles and rules -----------------------------------------------------

    async def cycles(self) -> list[CycleView]:
        """The golden cycles: when each comes next, the round that runs, and what came of the last.

        `RemoteVM.cycle` runs a round now.
        """
        from qmpcommit.client.cycle import list_cycles

        return await list_cycles(self)

    async def rules(self) -> list[RuleView]:
        """The flatten rules: what each saw last, what came of it, and when it looks again."""
        from qmpcommit.client.cycle import list_rules

        return await list_rules(self)

    async def losses(self) -> list[LossView]:
        """Damaged journals that the daemon has set aside, and the promises that may be missing."""
        from qmpcommit.client.cycle import list_losses

        return await list_losses(self)

    # -- events -----------------------------------------------------------------------------------

    def events(
        self,
        after: int | None = None,
        *,
        vm: str | None = None,
        commit: str | None = None,
        kinds: Sequence[str] = (),
    ) -> Events:
        """Every change of state from now on, or from behind the event with the number `after`.

        `vm`, `commit` and `kinds` (those of `DaemonEvent`) tell of which ones only.
        """
        return Events(self, after=after, vm=vm, commit=commit, kinds=kinds)

    # -- asking -----------------------------------------------------------------------------------

    def tries(self, what: str) -> Tries:
        """Counts the failures of one request."""
        return Tries(self, what)

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        hold: float = 0.0,
        repeats: bool = True,
    ) -> Reply:
        """One request, again while the daemon is away; `hold` is how long it may wait there.

        Asking again must have no second effect; `Reply.again` tells that it may have happened.
        What has one is asked again only while it has not arrived, without `repeats`.
        Raises `DaemonUnreachable` or `DaemonLost`.
        """
        raw = None if body is None else json.dumps(body).encode()
        tries = self.tries("what was asked of it may have been done")
        again = False
        while True:
            try:
                reply = await self.wire.exchange(
                    method, path, headers or {}, raw, timeout=self.timeout + hold
                )
            except Lost as lost:
                again = again or lost.connected
                if lost.connected and not repeats:
                    address = str(self.wire.address)
                    raise DaemonLost(
                        f"the daemon at {address} does not answer any more ({lost}): what was asked"
                        " of it may have been done. Look before you ask again",
                        address=address,
                    ) from None
                await tries.failed(lost)
                continue
            self.met = True
            if not transient(reply) or tries.exhausted or not repeats:
                return reply._replace(again=again)
            again = True  # it may have begun before it was too late
            await tries.failed(Lost("it is too busy", connected=True))

    def parse(self, reply: Reply) -> Any:
        """What a success says; raises the error that a refusal tells of."""
        if not 200 <= reply.status < 300:
            raise problem(reply, self.wire.address)
        return reply.json

    def parse_list(self, reply: Reply) -> list[Any]:
        """As `parse`, of what is a list; raises `DaemonError` where it is none."""
        found = self.parse(reply)
        with sensible("list"):
            if not isinstance(found, list):
                raise TypeError(f"a {type(found).__name__}")
        return found


class Tries:
    """How long a daemon that does not answer is asked again."""

    def __init__(self, client: Client, what: str) -> None:
        self._client, self._what = client, what
        self._since: float | None = None
        self._pause = PAUSE[0]

    @property
    def exhausted(self) -> bool:
        """Whether the client's patience is at its end."""
        now = asyncio.get_running_loop().time()
        return self._since is not None and now - self._since >= self._client.patience

    async def failed(self, lost: Lost) -> None:
        """Wait a little before another try; raises `DaemonUnreachable` or `DaemonLost`."""
        address = str(self._client.wire.address)
        if not self._client.met:
            raise DaemonUnreachable(_unreachable(address, lost), address=address) from None
        if self._since is None:
            self._since = asyncio.get_running_loop().time()
        if self.exhausted:
            raise DaemonLost(
                f"the daemon at {address} does not answer any more ({lost}): {self._what}. What it"
                " has promised it goes on with when it runs again; ask then",
                address=address,
            ) from None
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 1.5, PAUSE[1])


def _unreachable(address: str, lost: Lost) -> str:
    if lost.denied:
        return (
            f"the daemon's socket {address} may not be used by this user: join the group that it"
            " belongs to, or ask as another user"
        )
    return (
        f"no daemon answers at {address} ({lost}). Nothing was asked of it; see that qmpcommitd"
        " runs, and where it listens"
    )


def commit_view(value: object) -> CommitView:
    """A commit as the daemon shows it; members of a newer daemon are passed over."""
    from qmpcommit.wire.commit import CommitView

    return view_as(CommitView, value)  # type: ignore[no-any-return]


def vm_view(value: object) -> VMView:
    """A VM as the daemon shows it."""
    from qmpcommit.wire.commit import VMView

    return view_as(VMView, value)  # type: ignore[no-any-return]


def view_as(model: Any, value: object) -> Any:
    """What the daemon shows, as that model; members of a newer daemon are passed over."""
    try:
        return model.model_validate(value, extra="ignore")
    except (ValueError, RecursionError) as error:
        raise DaemonError(
            f"the daemon shows something else than a {model.__name__}: {error}"
        ) from None
