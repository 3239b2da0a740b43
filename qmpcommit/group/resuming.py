"""A group whose process died goes on from its ledger: ``qc.resume(ledger, vms)``.

What was to be finalized is finalized, what nobody had decided is followed and decided, and what
was between the two is cancelled, which QEMU undoes, and begun again. Guests that stand still go on
first; but those of recycles that are finalized when all of their fresh overlays are laid.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qmpcommit import errors
from qmpcommit.commit.claim import clear_dead_of
from qmpcommit.commit.ledger import Noted, rest_of
from qmpcommit.commit.policy import parse_policy
from qmpcommit.commit.resuming import vm_of
from qmpcommit.errors import InvalidRequest, QmpCommitError
from qmpcommit.group.book import GroupBook
from qmpcommit.group.members import GroupMember
from qmpcommit.group.noted import NotedGroup, Shown, Way
from qmpcommit.group.outcome import GroupOutcome, MemberEnd, is_clean
from qmpcommit.group.resume import ResumableGroup
from qmpcommit.group.settling import Settling
from qmpcommit.guest.sockets import Sockets
from qmpcommit.qmp.process import process_identity
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.stale_layers import Hooks
    from qmpcommit.commit.vm import VM
    from qmpcommit.group.policy import AskedGroupPolicy


async def resume_group(
    ledger: Ledger,
    noted: Noted,
    vms: Sequence[VM],
    *,
    agents: Sockets[Any],
    policy: AskedGroupPolicy | None,
    hooks: Hooks,
) -> GroupOutcome:
    """Go on with a group from its notes, to its end; raises what `GroupCommit.run` raises.

    And `InvalidRequest` where a VM is missing, or what was a callable and is not given again.
    """
    try:
        group = _Resumption(ledger, noted, vms, agents, policy, hooks)
    except QmpCommitError:
        raise
    except Exception as error:  # whatever has become of it on its way
        raise InvalidRequest(f"what the ledger holds can't be understood: {error!r}") from error
    return await group.run()


class _Resumption(Settling):
    """One group on its way from its notes to its end."""

    called = "process"
    book: GroupBook

    def __init__(  # noqa: PLR0917
        self,
        ledger: Ledger,
        noted: Noted,
        vms: Sequence[VM],
        agents: Sockets[Any],
        policy: AskedGroupPolicy | None,
        hooks: Hooks,
    ) -> None:
        self._ledger, self._value, self._id = ledger, dict(noted), str(noted["known_as"])
        self._group = NotedGroup.load(noted)
        left, self._vms = list(vms), {}  # type: ignore[var-annotated]
        for key, known in noted["vms"].items():
            self._vms[key] = vm_of(left, known["name"], known["identity"], alone=not self._vms)
            left.remove(self._vms[key])
        self._agents = {
            key: agents.get(vm) or noted["agents"].get(key) for key, vm in self._vms.items()
        }
        self._given = None if policy is None else parse_policy(policy)
        self._given_hooks = {n: hook for n, hook in hooks.items() if hook is not None}
        self._members = [self._member(number) for number in range(len(self._group.members))]
        log = self._members[0].vm.log.bind(group=self._id)
        book = GroupBook(ledger, self._members, self._id)
        super().__init__(self._id, book, log, self._value["freeze"], self._agents)
        self._go_on_with(book)

    def _member(self, number: int) -> GroupMember:
        options = dict(self._value["options"][number])
        disk = options.pop("disk")
        policies = self._value["policies"]
        policy = None if policies is None else policies[number] or self._given
        vm = self._vms[self._group.members[number].vm]
        return GroupMember(vm, disk, policy, {**options, **self._given_hooks})

    def _go_on_with(self, book: GroupBook) -> None:
        book.goes_on_from(self._value, {vm: key for key, vm in self._vms.items()})

    async def run(self) -> GroupOutcome:
        """Also where its disks are called otherwise by now, what a killed process claimed goes."""
        try:
            return await self._run()
        finally:
            with suppress(QmpCommitError):  # a monitor is away
                await to_the_end(clear_dead_of(self._vms.values(), "group", "commit"))

    async def _run(self) -> GroupOutcome:
        if self._group.over:
            return self._ended_before()
        hooked = any(member.noted.get("hooked") for member in self._group.members)
        if hooked and "on_pivot" not in self._given_hooks:
            raise InvalidRequest(
                f"the group commit {self._id} was begun with an on_pivot, which no ledger holds:"
                " give it again, as in resume(ledger, vms, on_pivot=...). Nothing was done"
            )
        way = await self.way(look=True)
        if way in (Way.BEGIN, Way.FOLLOW):
            self._check_policies()
            await to_the_end(self.guests_go_on())
        else:
            # What somebody has cancelled, or has failed, is not tried again unasked.
            ended = self._group.finalizes or Shown.FAILED in self.shown
            torn = not ended and not any(member.aborted for member in self._group.members)
            torn = torn or "again" in self._value  # as a former process has noted
            if torn:
                await self.book.again()
            ends = await to_the_end(self.settle(way))
            if not torn or not all(is_clean(end) for end in ends):
                return await self._conclude(way, ends)
            self._check_policies()
        self._value = self.book.noted
        commit = self._made(way)
        if way is not Way.FOLLOW:
            return await commit.run()
        return await commit.go_on(
            [partial(self.take_up, member.vm, n) for n, member in enumerate(self._members)]
        )

    def _ended_before(self) -> GroupOutcome:
        outcome, error = self._value.get("outcome"), self._value.get("error")
        if outcome is not None:
            return GroupOutcome.model_validate(outcome)
        said = dict(error or {"type": "GroupFailed", "message": "the group commit was cancelled"})
        kind = getattr(errors, said.pop("type"), QmpCommitError)
        raise kind(said.pop("message"), **said)

    def _check_policies(self) -> None:
        policies = self._value["policies"]
        missing = self._value["asks"] if policies is None else None in policies
        if missing and self._given is None:
            raise InvalidRequest(
                f"a policy of the group commit {self._id} was a callable, which no ledger holds:"
                " give it again, as in resume(ledger, vms, policy=...)"
            )

    # -- followed, or begun -----------------------------------------------------------------------

    def _made(self, way: Way) -> ResumableGroup:
        value, timeout = self._value, self._value["timeout"]
        if timeout is not None:
            passed = max(0.0, time.time() - value["since"])
            timeout = max(0.001, timeout - passed)
        policy = self._given or value["policy"] if value["policies"] is None else None
        if way is Way.FOLLOW and policy is not None:
            policy = self._left_of(parse_policy(policy), *range(len(self._members)))
        members = [
            member
            if way is not Way.FOLLOW or member.policy is None
            else member._replace(policy=self._left_of(parse_policy(member.policy), number))
            for number, member in enumerate(self._members)
        ]
        commit = ResumableGroup(
            members,
            policy=policy,
            hold_limit=value["hold_limit"],
            freeze=value["freeze"],
            agents={self._vms[key]: agent for key, agent in self._agents.items() if agent},
            known_as=self._id,
            only_if=value["only_if"],
            timeout=timeout,
            ledger=self._ledger,
        )
        assert commit.book is not None
        self._go_on_with(commit.book)
        self.book = commit.book
        return commit

    def _left_of(self, policy: Any, *numbers: int) -> Any:
        """A policy, less the time that has passed since these members were READY."""
        noted = [self._group.members[number].noted for number in numbers]
        if not all("ready" in each for each in noted):
            return policy
        return rest_of(policy, {"ready": max(each["ready"] for each in noted)})

    # -- settled ----------------------------------------------------------------------------------

    async def _jobs(self, key: str) -> tuple[str, list[dict[str, Any]]]:
        vm = self._vms[key]
        return process_identity(vm.peer_pid), await vm.execute("query-jobs")

    def _reach(self, key: str) -> AbstractAsyncContextManager[VM]:
        return nullcontext(self._vms[key])  # which connects again by itself

    async def _back(self, number: int, error: QmpCommitError) -> None:
        raise error

    def _hooks(self, number: int) -> Mapping[str, Any]:
        return self._given_hooks

    async def _conclude(self, way: Way, ends: Sequence[MemberEnd]) -> GroupOutcome:
        end = self.end_of(way, ends, self._group.aborted_by)
        if isinstance(end, GroupOutcome):
            end = replace(end, warnings=[*self.problems, *end.warnings])
            await self.book.end(outcome=end.model_dump(mode="json"))
            return end
        if not any(isinstance(each.error, errors.MonitorLost) for each in ends):
            await self.book.end(error=end.as_json())
        raise end
