"""A group whose process died goes on from its ledger: ``qc.resume(ledger, vms)``.

What was to be finalized is finalized, what nobody had decided is followed and decided, and what
was between the two is cancelled, which QEMU undoes, and begun again. Guests that stand still go on
first; but those of recycles that are finalized when all of their fresh overlays are laid.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qmpcommit import errors
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.ledger import Noted, files_of, plan_of, rest_of_hold, resumed_of
from qmpcommit.commit.outcome import Timings
from qmpcommit.commit.policy import Hold, parse_policy
from qmpcommit.commit.resuming import repay, vm_of
from qmpcommit.commit.stale_layers import Barrier
from qmpcommit.errors import InvalidRequest, QmpCommitError
from qmpcommit.group.book import GroupBook
from qmpcommit.group.members import GroupMember
from qmpcommit.group.noted import NotedGroup, Shown, Way, resume, shown_of
from qmpcommit.group.outcome import GroupOutcome, MemberEnd, error_of, is_clean, outcome_of
from qmpcommit.group.resume import ResumableGroup
from qmpcommit.guest.marks import mark_of_group, unmark
from qmpcommit.guest.quiesce import HOW, Sockets, thaw
from qmpcommit.guest.run_state import go_on
from qmpcommit.qmp.process import is_same, process_identity
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.stale_layers import Hooks
    from qmpcommit.commit.vm import VM
    from qmpcommit.group.policy import AskedGroupPolicy

HEAD_START = 0.2
"""Seconds that a guest's thaw gets before the jobs are ended that hold its disks."""


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


class _Resumption:
    """One group on its way from its notes to its end."""

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
        self._hooks: dict[str, Any] = {n: hook for n, hook in hooks.items() if hook is not None}
        self._members = [self._member(number) for number in range(len(self._group.members))]
        self._book = GroupBook(ledger, self._members, self._id)
        self._go_on_with(self._book)
        self._problems: list[str] = []
        self._paused: dict[str, float] = {}
        self._settled = {
            number: asyncio.Event()
            for number, member in enumerate(self._group.members)
            if member.begun
        }

    def _member(self, number: int) -> GroupMember:
        options = dict(self._value["options"][number])
        disk = options.pop("disk")
        policies = self._value["policies"]
        policy = None if policies is None else policies[number] or self._given
        vm = self._vms[self._group.members[number].vm]
        return GroupMember(vm, disk, policy, {**options, **self._hooks})

    def _go_on_with(self, book: GroupBook) -> None:
        book.goes_on_from(self._value, {vm: key for key, vm in self._vms.items()})

    async def run(self) -> GroupOutcome:
        if self._group.over:
            return self._ended_before()
        hooked = any(member.noted.get("hooked") for member in self._group.members)
        if hooked and "on_pivot" not in self._hooks:
            raise InvalidRequest(
                f"the group commit {self._id} was begun with an on_pivot, which no ledger holds:"
                " give it again, as in resume(ledger, vms, on_pivot=...). Nothing was done"
            )
        shown = await self._look()
        way = resume(self._group, shown)
        if way in (Way.BEGIN, Way.FOLLOW):
            self._check_policies()
            await to_the_end(self._guests_go_on(waiting=False))
        else:
            # What somebody has cancelled, or has failed, is not tried again unasked.
            ended = self._group.finalizes or Shown.FAILED in shown
            torn = not ended and not any(member.aborted for member in self._group.members)
            torn = torn or "again" in self._value  # as a former process has noted
            if torn:
                await self._book.again()
            ends = await to_the_end(self._settle(way))
            if not torn or not all(is_clean(end) for end in ends):
                return await self._conclude(way, ends)
            self._check_policies()
        self._value = self._book.value
        commit = self._made(way)
        if way is not Way.FOLLOW:
            return await commit.run()
        resuming = [partial(self._follow, number) for number in range(len(self._members))]
        return await commit.go_on(resuming)

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

    async def _look(self) -> list[Shown]:
        """What QEMU shows of each member (``query-jobs``)."""
        listed = {key: await vm.execute("query-jobs") for key, vm in self._vms.items()}
        shown = []
        for member in self._group.members:
            job_id = member.noted["plan"]["job_id"] if member.begun else ""
            jobs = (job for job in listed[member.vm] if job.get("id") == job_id)
            gone = member.begun and self._same_vm(member.vm, member.noted) is False
            shown.append(Shown.GONE if gone else shown_of(next(jobs, None)))
        return shown

    def _same_vm(self, key: str, noted: Mapping[str, Any]) -> bool | None:
        return is_same(noted.get("identity", ""), process_identity(self._vms[key].peer_pid))

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
        self._book = commit.book
        return commit

    def _left_of(self, policy: Any, *numbers: int) -> Any:
        """A hold, less the time that has passed since these members were READY."""
        noted = [self._group.members[number].noted for number in numbers]
        if not isinstance(policy, Hold) or not all("ready" in each for each in noted):
            return policy
        return rest_of_hold(policy, {"ready": max(each["ready"] for each in noted)})

    async def _follow(self, number: int, barrier: Barrier) -> CommitJob:
        """Take one up that was not decided; while it is READY its group decides."""
        return await self._resume(number, None, barrier)

    async def _resume(self, number: int, way: Way | None, barrier: Barrier | None) -> CommitJob:
        member = self._group.members[number]
        noted, vm = self._book.member(number), self._vms[member.vm]
        resumed = resumed_of(noted, same_vm=self._same_vm(member.vm, noted), alone=False)
        resumed = resumed._replace(undoes=way is Way.CANCEL, finalizes=way is Way.FINALIZE)
        ledger = self._book.of(number)
        await repay(vm, noted, ledger)
        return await vm.resume(
            plan_of(noted, Hold()),
            resumed,
            files=files_of(noted),
            barrier=barrier,
            ledger=ledger,
            **self._hooks,
        )

    # -- settled one by one -----------------------------------------------------------------------

    async def _settle(self, way: Way) -> list[MemberEnd]:
        """End all jobs, as it was noted: finalize them, or cancel them."""
        guests = asyncio.create_task(self._guests_go_on(waiting=way is Way.FINALIZE))
        # First of all; but a thaw may write to a disk that is held, and waits for it then.
        await asyncio.wait([guests], timeout=HEAD_START)
        ends = await asyncio.gather(*(self._settle_one(number, way) for number in self._settled))
        await guests
        stood = self._book.noted.quiesced
        return [
            stood_still(end, self._paused.get(key), stood.get(key))
            for number, end in zip(self._settled, ends, strict=True)
            for key in [self._group.members[number].vm]
        ]

    async def _settle_one(self, number: int, way: Way) -> MemberEnd:
        """One member, by itself."""
        try:
            job = await self._resume(number, way, None)
            settling = asyncio.create_task(job.settled())
            settling.add_done_callback(lambda _: self._settled[number].set())
            await job.ended()
            await settling
            state = job.state
            return MemberEnd(job.plan, state, job.timings, job.outcome, job.error, state.ordered)
        except QmpCommitError as error:  # its VM went away just now
            noted = resumed_of(self._book.member(number), same_vm=None, alone=False)
            plan = plan_of(self._book.member(number), Hold())
            times = Timings(**noted.times)
            return MemberEnd(plan, noted.state, times, None, error, noted.state.ordered)
        finally:
            self._settled[number].set()

    async def _guests_go_on(self, *, waiting: bool) -> None:
        """Let all guests go on; with `waiting` those whose disks are recycled after that."""
        keys = dict.fromkeys(member.vm for member in self._group.members)
        await asyncio.gather(*(self._guest_goes_on(key, waiting=waiting) for key in keys))

    async def _guest_goes_on(self, key: str, *, waiting: bool) -> None:
        vm, owner = self._vms[key], mark_of_group(self._id)
        mine = [number for number in self._settled if self._group.members[number].vm == key]
        since = asyncio.get_running_loop().time()
        if waiting and any(self._group.members[number].recycles for number in mine):
            for number in mine:
                await self._settled[number].wait()
        paused = [
            number
            for number in mine
            if self._group.members[number].noted.get("stopped")
            and self._same_vm(key, self._group.members[number].noted) is not False
        ]
        guest = self._group.frozen.get(key)
        try:
            if paused:
                remark = await go_on(vm)
                self._problems += [remark] if remark else []
                for number in paused:
                    with suppress(Exception):  # it goes on, and is continued again at the worst
                        await self._book.of(number).note("cont")
                self._paused[key] = asyncio.get_running_loop().time() - since
            if guest is not None and self._same_vm(key, guest._asdict()) is not False:
                await thaw(vm, guest.how, self._agents[key] or guest.agent, ran=True)
                self._book.goes_on_again(key, time.time() - guest.since)
            elif guest is not None:
                self._book.goes_on_again(key)  # with its QEMU the guest has gone
            for how in HOW:  # a mark is set before anything is noted, and stays until all is
                await unmark(vm, owner, how)
        except QmpCommitError as error:
            self._problems.append(error.message)

    async def _conclude(self, way: Way, ends: Sequence[MemberEnd]) -> GroupOutcome:
        group, finalized = self._group, way is Way.FINALIZE
        wanted = group.aborted_by
        undone = all(e.outcome is not None and e.outcome.action == "abort" for e in ends)
        why = "" if finalized else "the process that held its disks ended before all were decided"
        error = error_of(ends, why=why, culprit=None, finalized=finalized, problems=self._problems)
        if error is None or (wanted and undone):
            outcome = outcome_of(self._id, ends, by=wanted or group.by)
            outcome = replace(outcome, warnings=[*self._problems, *outcome.warnings])
            await self._book.end(outcome=outcome.model_dump(mode="json"))
            return outcome
        if not any(isinstance(end.error, errors.MonitorLost) for end in ends):
            await self._book.end(error=error.as_json())
        raise error


def stood_still(end: MemberEnd, paused: float | None, quiesced: float | None) -> MemberEnd:
    """The end of one, with for how long its guest was seen to wait."""
    outcome = end.outcome
    if outcome is None:
        return end
    if outcome.action == "recycle" and paused is not None:
        outcome = replace(outcome, guest_paused=paused)
    return end._replace(outcome=replace(outcome, quiesced=quiesced))
