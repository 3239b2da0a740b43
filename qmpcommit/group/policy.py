"""How a group comes to its decisions: one policy for all, or each member's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from qmpcommit.callback import Failed
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.policy import (
    AnyPolicy,
    AskedPolicy,
    Decision,
    PolicyCall,
    PolicyValue,
    Ready,
    Settled,
    immediate,
    settle,
)
from qmpcommit.tasks import stop
from qmpcommit.values import record


@record
class GroupReady(Ready):
    """What a policy for the whole group is told; `members` has each, the rest is the first's.

    Its environment has one line a member in each variable, in the same order.
    """

    members: tuple[Ready, ...] = ()

    def environment(self) -> dict[str, str]:
        """The ``QMPCOMMIT_*`` variables, a line for each member."""
        each = [ready.environment() for ready in self.members]
        return {name: "\n".join(env[name] for env in each) for name in each[0]}


AskedGroupPolicy: TypeAlias = AskedPolicy | Callable[[GroupReady], Awaitable[PolicyValue]]
"""What ``policy=`` takes for a whole group, which is asked once."""


def group_ready(members: Sequence[Ready]) -> GroupReady:
    """What a policy for all of them is told."""
    first = members[0]
    return GroupReady(
        vm=first.vm,
        disk=first.disk,
        job_id=first.job_id,
        base=first.base,
        top=first.top,
        bytes_committed=sum(member.bytes_committed for member in members),
        members=tuple(members),
    )


class Deciding:
    """Asks the policies of a group, each once.

    `policy` is asked for all when all are READY; without it each of `policies` when its own
    member is. `decided` is called with the member's number and what it came to, `failed` with
    what a policy raised.
    """

    def __init__(
        self,
        policy: AnyPolicy | PolicyCall | None,
        policies: Sequence[AnyPolicy | PolicyCall],
        decided: Callable[[int, Settled], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._policy, self._policies = policy, policies
        self._decided, self._failed = decided, failed
        self._called: asyncio.Future[Settled] | None = None

    async def ask(self, jobs: Sequence[CommitJob]) -> None:
        """Come to all decisions; a member that ends before it is READY needs none."""
        if self._policy is not None:
            await self._ask_once(self._policy, jobs)
            return
        asking = [
            asyncio.create_task(self._ask_one(number, policy, job))
            for number, (policy, job) in enumerate(zip(self._policies, jobs, strict=True))
        ]
        try:
            await asyncio.gather(*asking)
        finally:
            for task in asking:
                await stop(task)

    @property
    def called(self) -> bool:
        """Whether somebody has decided in the place of a policy."""
        return self._called is not None and self._called.done()

    def call(self, decision: Decision) -> None:
        """Decide for all in the place of a policy, once; perhaps before it is asked."""
        self._call().set_result(Settled(decision, "caller"))

    def _call(self) -> asyncio.Future[Settled]:
        if self._called is None:
            self._called = asyncio.get_running_loop().create_future()
        return self._called

    async def _ask_once(self, policy: AnyPolicy | PolicyCall, jobs: Sequence[CommitJob]) -> None:
        for job in jobs:
            if not await job.reached():
                return
        ready = group_ready([_ready_of(job) for job in jobs])
        settled = await self._settle(policy, ready)
        if settled is not None:
            for number in range(len(jobs)):
                self._decided(number, settled)

    async def _ask_one(self, number: int, policy: AnyPolicy | PolicyCall, job: CommitJob) -> None:
        if not await job.reached():
            return
        settled = await self._settle(policy, _ready_of(job))
        if settled is not None:
            self._decided(number, settled)

    async def _settle(self, policy: AnyPolicy | PolicyCall, ready: Ready) -> Settled | None:
        """What a policy comes to, unless the caller is first; None where it failed."""
        at_once = immediate(policy)
        if at_once is not None:
            return at_once
        called = self._call()
        settling = asyncio.ensure_future(settle(policy, ready))
        try:
            await asyncio.wait({settling, called}, return_when=asyncio.FIRST_COMPLETED)
            return called.result() if called.done() else settling.result()
        except Failed as failed:
            self._failed(failed.cause)
            return None
        except Exception as error:  # of a check, or an answer that is none
            self._failed(error)
            return None
        finally:
            await stop(settling)


def _ready_of(job: CommitJob) -> Ready:
    plan = job.plan
    return Ready(plan.vm, plan.disk.name, job.id, plan.base, plan.top, job.state.done)
