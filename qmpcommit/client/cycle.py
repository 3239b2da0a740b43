"""The daemon's golden cycles and rules, and a round that it has begun, as its client sees them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from qmpcommit.client.job import HOLD
from qmpcommit.client.problems import error_from
from qmpcommit.errors import DaemonError, QmpCommitError

if TYPE_CHECKING:
    from qmpcommit.client.host import Client
    from qmpcommit.client.http import Reply
    from qmpcommit.client.vm import RemoteVM
    from qmpcommit.wire.cycle import CycleView, RoundView
    from qmpcommit.wire.loss import LossView
    from qmpcommit.wire.rules import RuleView


class RemoteRound:
    """One round of a cycle, which goes on whoever waits for it; `view` is what was last seen.

    Waiting goes on over a restart of the daemon, as long as `Client.patience` allows, and ends
    with `DaemonLost` otherwise.
    """

    def __init__(self, vm: RemoteVM, view: RoundView) -> None:
        self._vm = vm
        self.id, self.view = view.id, view

    def __repr__(self) -> str:
        return f"<RemoteRound {self.id} of {self._vm.name!r}>"

    async def wait(self) -> RoundView:
        """How it ended, or the `QmpCommitError` that it ended with, as the library's own."""
        while self.view.ended is None:
            await self._look()
        if self.view.error is not None:
            raise error_from(self.view.error)
        return self.view

    async def _look(self) -> None:
        path = f"/v1/cycles/{self.id}?wait={HOLD:g}"
        try:
            self.view = _seen(self._vm, await self._vm.client.ask("GET", path, hold=HOLD))
        except DaemonError as error:
            if error.status != 503:  # it is busy, and it is there
                raise


async def begin(vm: RemoteVM, disk: str, key: str | None = None) -> RemoteRound:
    """Have a round begun; raises as `RemoteVM.cycle` does before it waits."""
    headers = {"idempotency-key": key or uuid.uuid4().hex}
    body = {"disk": str(disk)}
    reply = await vm.client.ask("POST", f"{vm.path}/cycles", body, headers=headers)
    return RemoteRound(vm, _seen(vm, reply))


def _seen(vm: RemoteVM, reply: Reply) -> RoundView:
    from qmpcommit.client.host import view_as
    from qmpcommit.wire.cycle import RoundView

    try:
        return view_as(RoundView, vm.client.parse(reply))  # type: ignore[no-any-return]
    except QmpCommitError as error:
        error.add(vm=vm.name)
        raise


async def list_cycles(client: Client) -> list[CycleView]:
    """`Client.cycles`."""
    from qmpcommit.wire.cycle import Cycle, CycleView

    found = client.parse_list(await client.ask("GET", "/v1/cycles"))
    return [_configured(CycleView, "cycle", Cycle, each) for each in found]


async def list_rules(client: Client) -> list[RuleView]:
    """`Client.rules`."""
    from qmpcommit.wire.rules import Flatten, RuleView

    found = client.parse_list(await client.ask("GET", "/v1/rules"))
    return [_configured(RuleView, "rule", Flatten, each) for each in found]


async def list_losses(client: Client) -> list[LossView]:
    """`Client.losses`."""
    from qmpcommit.client.host import view_as
    from qmpcommit.wire.loss import LossView

    found = client.parse_list(await client.ask("GET", "/v1/losses"))
    return [view_as(LossView, each) for each in found]


def _configured(model: Any, member: str, section: Any, value: Any) -> Any:
    """A view with a section of the configuration in it, which itself takes no unknown members."""
    from qmpcommit.client.host import view_as

    if isinstance(value, dict) and member in value:
        value = {**value, member: view_as(section, value[member])}
    return view_as(model, value)
