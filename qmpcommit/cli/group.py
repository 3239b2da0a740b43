"""``qmpcommit commit`` with several disks: one instant for all of them, or none is committed."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.bar import Bar
from qmpcommit.cli.freezing import tell_of_frozen
from qmpcommit.cli.held import tell_of_held
from qmpcommit.cli.options import Answer, Interrupted
from qmpcommit.cli.show import outcome_text, show_seconds
from qmpcommit.cli.telling import echo, one_line
from qmpcommit.errors import InvalidRequest, JobConflict, NotReady, QmpCommitError

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.policy import AnyPolicy
    from qmpcommit.group.outcome import GroupOutcome
    from qmpcommit.group.run import GroupCommit
    from qmpcommit.session import Session

Named = Sequence[tuple[str, str]]
"""Pairs of a monitor and a disk."""

CANCELLED = (
    "all jobs were cancelled; no disk was pivoted or kept. The bases may hold part of the overlays'"
    " data and are valid only under them"
)
WORD = 40
"""Characters of what was typed that are told again."""

DECIDED = "the disks had been decided already and were committed, all of them"
"""What an interrupted command says of its group, where it was in time and where it was too late."""


def check_group(request: Mapping[str, Any], *, offline: bool) -> None:
    """What several disks can't have; raises `click.UsageError`."""
    alone = {**{name: request.get(name) for name in _alone()}, "offline": offline}
    for name, asked in alone.items():
        if asked:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} is for one disk, not for several")


def of_all(request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request is asked of all disks alike."""
    apart = {"disk", "policy", *_alone()}
    return {name: value for name, value in request.items() if name not in apart}


def _alone() -> list[str]:
    """What is asked of one disk only."""
    from qmpcommit.commit.request import CommitOptions, GroupOptions

    shared = {"policy", *GroupOptions.__annotations__}
    return [name for name in CommitOptions.__annotations__ if name not in shared]


def policies_of(
    policy: AnyPolicy, named: Named
) -> tuple[AnyPolicy | None, Sequence[AnyPolicy | None]]:
    """The policy of all, or each disk's own: a `Recycle` needs an overlay of its own for each.

    The overlay that was given is a folder, or a pattern with {disk}, {number} or {time} in it.
    Raises `click.UsageError` where two disks would get the same file.
    """
    if policy.kind != "recycle":
        return policy, [None] * len(named)
    given = policy.overlay
    stems = [re.sub(r"[^A-Za-z0-9._-]+", "_", disk).strip("_.") or "disk" for _, disk in named]
    if os.path.isdir(given):
        apart = "{disk}" if len(set(stems)) == len(stems) else "{disk}-{number}"
        given = os.path.join(given, f"{apart}-{{time}}.qcow2")
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    files = []
    for number, stem in enumerate(stems, 1):
        fields = {"{disk}": stem, "{number}": str(number), "{time}": time}
        file = given
        for field, value in fields.items():
            file = file.replace(field, value)
        files.append(file)
    if len(set(files)) < len(files):
        raise click.UsageError(
            "Each disk needs a fresh overlay of its own: give --recycle a folder that exists, or"
            " a pattern with {disk} or {number} in it"
        )
    return None, [replace(policy, overlay=file) for file in files]


async def plan_group(running: Run, named: Named, request: Mapping[str, Any]) -> Answer:
    """``--dry-run``: each disk's plan and findings; status 1 where a check refuses."""
    from qmpcommit.cli.commit import plan_request, refused
    from qmpcommit.cli.show import plan_text

    plans = []
    shared, own = policies_of(request["policy"], named)
    async with AsyncExitStack() as stack:
        vms = {qmp: await stack.enter_async_context(running.vm(qmp)) for qmp in dict(named)}
        for (qmp, disk), policy in zip(named, own, strict=True):
            asked = plan_request({**request, "disk": disk, "policy": policy or shared})
            plans.append(await vms[qmp].plan(**asked))
    places = [(qmp, plan.disk.root) for (qmp, _), plan in zip(named, plans, strict=True)]
    for place in places:
        if places.count(place) > 1:
            raise InvalidRequest(f"a disk of {place[0]} is named twice; name it once")
    return Answer(
        {"plans": [plan.model_dump(mode="json") for plan in plans]},
        "\n".join(plan_text(plan) for plan in plans),
        status=1 if any(refused(plan, request) for plan in plans) else 0,
        quiet=running.options.quiet,
    )


async def _connected(running: Run, named: Named, stack: AsyncExitStack) -> dict[str, Session]:
    vms: dict[str, Session] = {}
    for qmp, _ in named:
        if qmp not in vms:
            vms[qmp] = await stack.enter_async_context(running.connect(qmp))
            await tell_of_held(vms[qmp], qmp, [name for vm, name in named if vm == qmp])
    return vms


async def commit_group(
    running: Run, named: Named, request: Mapping[str, Any], hold_limit: float
) -> Answer:
    """Commit them at one instant; Ctrl-C and the deadline cancel all."""
    from qmpcommit.group.members import GroupMember
    from qmpcommit.group.run import GroupCommit

    options = of_all(request)
    agents = options.pop("agents")
    policy = request["policy"]
    shared, own = policies_of(policy, named)
    async with AsyncExitStack() as stack:
        vms = await _connected(running, named, stack)
        if request["freeze"] is None:  # else they are thawed first
            for qmp, vm in vms.items():
                await tell_of_frozen(vm, qmp)
        group = GroupCommit(
            [
                GroupMember(vms[qmp], disk, each)
                for (qmp, disk), each in zip(named, own, strict=True)
            ],
            policy=shared,
            hold_limit=hold_limit,
            timeout=running.remaining,
            agents={vms[qmp]: socket for qmp, socket in agents.items()},
            **options,
        )
        asking = Asking(group, policy.timeout) if policy.kind == "hold" else None
        async with Bar(running.options, "", ready="of a group").of_all(vms.values()):
            outcome = await _run(running, group, asking)
    return Answer(
        outcome.model_dump(mode="json"),
        group_text(outcome),
        status=3 if asking is not None and asking.closed else status_of(policy, outcome),
        quiet=running.options.quiet,
    )


class Asking:
    """``--hold`` of a group: whoever runs the command decides on its standard input.

    Another client can't, for a single one of its jobs that is decided alone parts the disks.
    An answer that comes before READY counts as soon as all are. `closed` tells that the input was
    closed before anybody had answered.
    """

    def __init__(self, group: GroupCommit, timeout: float | None) -> None:
        self._group, self._timeout = group, timeout
        self._loop = asyncio.get_running_loop()
        self.closed = False
        self._answer = ""
        self._ready = False

    def begin(self) -> None:
        """Listen in a thread of its own: standard input may be anything."""
        threading.Thread(target=self._listen, daemon=True).start()

    def ready(self) -> None:
        """All disks are READY."""
        self._ready = True
        if self._answer:
            self._carry_out()
            return
        limit = "" if self._timeout is None else f"; after {show_seconds(self._timeout)}: keep"
        echo(f"qmpcommit: all are READY: type pivot, keep or abort{limit}", err=True)

    def _listen(self) -> None:
        rest = b""
        with suppress(RuntimeError):  # the loop is closed: it is over
            with suppress(OSError):
                while data := os.read(0, 4096):
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self._loop.call_soon_threadsafe(self._decide, line.strip().decode("latin"))
            if rest.strip():  # the last line needs no newline
                self._loop.call_soon_threadsafe(self._decide, rest.strip().decode("latin"))
            self._loop.call_soon_threadsafe(self._end)

    def _decide(self, word: str) -> None:
        if word not in ("pivot", "keep", "abort"):
            shown = one_line(word if len(word) <= WORD else f"{word[:WORD]}...")
            echo(f"qmpcommit: type pivot, keep or abort, not '{shown}'", err=True)
            return
        self._answer = word
        if self._ready or word == "abort":
            self._carry_out()
        else:
            echo(f"qmpcommit: {word}, as soon as all are READY", err=True)

    def _carry_out(self) -> None:
        calls = {"pivot": self._group.pivot, "keep": self._group.keep, "abort": self._group.abort}
        try:
            calls[self._answer]()
        except (NotReady, JobConflict) as error:
            echo(f"qmpcommit: {error}", err=True)

    def _end(self) -> None:
        if self._answer or self._timeout is not None:
            return
        if self._group.state.stage == "gathering":
            echo("qmpcommit: nobody can decide any more, so all are aborted", err=True)
            self.closed = True
            self._group.abort()


async def _run(running: Run, group: GroupCommit, asking: Asking | None) -> GroupOutcome:
    """The group to its end; it bounds itself in time, so only signals are seen to here."""
    if asking is not None:
        asking.begin()
    working = asyncio.create_task(group.run(asking.ready if asking is not None else None))
    running.on_deadline = lambda: None
    running.on_signal = lambda times: _interrupt(working, times)
    await asyncio.wait({working})
    if working.cancelled():
        sent = _left(group) if group.jobs else "nothing was sent"
        raise Interrupted(f"interrupted; {sent}", outcomes=[end.dump() for end in group.ends])
    return working.result()


def _left(group: GroupCommit) -> str:
    """How a group that was interrupted has ended, by what its disks' jobs were seen to do."""
    done = [end.done() for end in group.ends]
    if not any(each is not False for each in done):
        return CANCELLED
    said = [DECIDED if all(done) else "its disks may not have ended alike: look at each"]
    for end in group.ends:
        if isinstance(end.error, QmpCommitError):
            said.append(str(end.error))
        elif end.outcome is not None and not all(done):
            said.append(outcome_text(end.outcome))
    return ". ".join(said)


def _interrupt(working: asyncio.Task[GroupOutcome], times: int) -> None:
    if times == 1:  # what a second one would leave is a guest whose disks hang
        working.cancel()


def status_of(policy: AnyPolicy, outcome: GroupOutcome) -> int:
    """The exit status of a group that ended so."""
    from qmpcommit.commit.policy import Decision

    if any(each.hook == "failed" for each in outcome.outcomes):
        return 1
    if outcome.decided_by in ("check failed", "hold expired"):
        return 3
    return 3 if isinstance(policy, Decision) and outcome.action != policy.kind else 0


def group_text(outcome: GroupOutcome) -> str:
    """Each disk's own end, and how long they were held for the one instant."""
    several = len({each.vm for each in outcome.outcomes}) > 1
    lines = [
        outcome_text(each, disk=f"{each.disk} of {each.vm}" if several else "")
        for each in outcome.outcomes
    ]
    if outcome.status == "completed" and outcome.held is not None:
        many = len(outcome.outcomes)
        held = show_seconds(outcome.held)
        lines.append(f"One instant for {many} disks; their I/O was held for at most {held}.")
    told = {f"{o.disk} of {o.vm}: {w}" for o in outcome.outcomes for w in o.warnings}
    lines += [f"Warning: {warning}." for warning in outcome.warnings if warning not in told]
    if outcome.quiesced is not None:
        stood = show_seconds(outcome.quiesced)
        lines.append(f"The guests stood still for at most {stood}.")
    return "\n".join(lines)
