"""``--daemon commit`` with several disks: done by the daemon, and followed from here."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.bar import Bar
from qmpcommit.cli.group import (
    CANCELLED,
    DECIDED,
    Named,
    group_text,
    of_all,
    policies_of,
    status_of,
)
from qmpcommit.cli.options import Answer, Interrupted
from qmpcommit.cli.remote import connect
from qmpcommit.cli.running import Run
from qmpcommit.commit.job import GRACE
from qmpcommit.errors import DaemonLost, DeadlineExceeded, QmpCommitError
from qmpcommit.tasks import stop

if TYPE_CHECKING:
    from qmpcommit.client.group import RemoteGroup
    from qmpcommit.client.host import Client
    from qmpcommit.client.job import RemoteJob
    from qmpcommit.commit.policy import AnyPolicy
    from qmpcommit.group.outcome import GroupOutcome


def check(policy: AnyPolicy) -> None:
    """What the daemon does not do with several disks; raises `click.UsageError`."""
    if policy.held:
        raise click.UsageError(
            "A group that the daemon holds is decided over its API (POST"
            " /v1/groups/ID/decision), not here"
        )


async def commit(
    running: Run, named: Named, request: Mapping[str, Any], hold_limit: float
) -> Answer:
    """Commit them at one instant; Ctrl-C and the deadline have the daemon cancel all."""
    async with connect(running.options) as host:
        outcome = await _Following(running, host).follow(named, request, hold_limit)
    return Answer(
        outcome.model_dump(mode="json"),
        group_text(outcome),
        status=status_of(request["policy"], outcome),
        quiet=running.options.quiet,
    )


class _Following:
    """Follows one group of the daemon; a second Ctrl-C leaves it there."""

    def __init__(self, run: Run, host: Client) -> None:
        self._run, self._host = run, host
        self._group: RemoteGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: asyncio.Task[GroupOutcome] | None = None
        self._left = ""
        run.on_signal = self._signal
        run.on_deadline = self._deadline

    async def follow(
        self, named: Named, request: Mapping[str, Any], hold_limit: float
    ) -> GroupOutcome:
        """Raises what `Client.commit_group` and `RemoteGroup.wait` raise, and `Interrupted`."""
        policy, own = policies_of(request["policy"], named)
        try:
            group = self._group = await self._host.commit_group(
                [
                    (self._host.vm(name), disk, each)
                    for (name, disk), each in zip(named, own, strict=True)
                ],
                policy=policy,
                hold_limit=hold_limit,
                **{**of_all(request), "timeout": self._run.remaining},
            )
        except asyncio.CancelledError as cancelled:
            why = "nothing is left of it"
            if isinstance(cancelled.__cause__, QmpCommitError):
                why = str(cancelled.__cause__)
            if self._run.timed_out:
                raise self._run.too_late(f"the daemon did not promise it ({why})") from None
            raise Interrupted(f"interrupted before the daemon had promised it; {why}") from None
        if self._run.signals:
            self._beside(self._abort(group))
        self._waiting = asyncio.create_task(group.wait())
        try:
            async with Bar(self._run.options, "", ready="of a group").of_found(
                lambda: self._members(group)
            ):
                await asyncio.wait({self._waiting})
            return self._result(group, self._waiting)
        finally:
            await stop(self._waiting)
            for task in list(self._tasks):
                await stop(task)

    async def _members(self, group: RemoteGroup) -> list[tuple[RemoteJob, str]]:
        """Its commits, with what they are called in a bar."""
        members = group.view.members
        several = len({each.vm for each in members}) > 1
        return [
            (
                await self._host.commit(each.commit),
                f"{each.vm} {each.disk}" if several else each.disk,
            )
            for each in members
        ]

    def _result(self, group: RemoteGroup, waiting: asyncio.Task[GroupOutcome]) -> GroupOutcome:
        doing = "was told to cancel it" if self._run.signals else "goes on with it"
        goes_on = f"Group {group.id} is left with the daemon, which {doing}"
        if waiting.cancelled():
            if self._left == "deadline":
                seconds = self._run.options.timeout
                raise DeadlineExceeded(f"the group did not end within {seconds:g} s. {goes_on}")
            raise Interrupted(f"interrupted twice. {goes_on}")
        error = waiting.exception()
        if isinstance(error, DaemonLost):
            raise DaemonLost(f"{error}. {goes_on}", **error.facts) from None
        if self._run.signals and isinstance(error, QmpCommitError):
            raise Interrupted(f"interrupted. {error}", **error.facts) from None
        if self._run.signals:
            outcome = waiting.result()
            sent = CANCELLED
            if outcome.status == "completed":
                sent = DECIDED
            raise Interrupted(f"interrupted; {sent}")
        return waiting.result()

    def _signal(self, times: int) -> None:
        if self._group is None:
            if times > 1:
                self._run.cancel()
            return  # else it is aborted when it is known which
        if times == 1:
            self._beside(self._abort(self._group))
        elif times > 1:
            self._leave("interrupted")

    def _deadline(self) -> None:
        if self._group is None:
            self._run.cancel()
        else:
            self._beside(self._too_late())

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abort(self, group: RemoteGroup) -> None:
        with suppress(QmpCommitError):  # it was decided, or has ended: the waiting tells
            await group.abort()

    async def _too_late(self) -> None:
        """The daemon has the same deadline; where it does not keep it, we leave."""
        await asyncio.sleep(GRACE)
        self._leave("deadline")

    def _leave(self, why: str) -> None:
        self._left = self._left or why
        if self._waiting is not None:
            self._waiting.cancel()
