"""``qmpcommit commit``: from the command line to an outcome and its exit status."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli import detaching
from qmpcommit.cli.completing import complete_disk, complete_monitor
from qmpcommit.cli.disks import disk_pairs
from qmpcommit.cli.freezing import freezing, sockets_of
from qmpcommit.cli.options import (
    Answer,
    Options,
    asked_of_overlay,
    common,
    here,
    overlay_asked,
    progress_option,
    shell,
    stale_of,
    stale_options,
)
from qmpcommit.cli.sections import Command
from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.cli.asking import Keys
    from qmpcommit.cli.running import Run
    from qmpcommit.client.job import RemoteJob
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.commit.pace import Converge
    from qmpcommit.commit.plan import Plan
    from qmpcommit.commit.policy import AnyPolicy
    from qmpcommit.commit.request import Stale
    from qmpcommit.commit.stale_layers import OnPivot, Stall
    from qmpcommit.session import Session

HOOK_TIMEOUT = 60.0
STALL_PAUSE = 2.0
"""Seconds."""

_DECISIONS = ("pivot", "keep_overlay", "abort", "hold", "check", "recycle", "policy")
_FOREVER = "forever"
_TIME = re.compile(r"\d[\d.]*[a-z]*", re.IGNORECASE | re.ASCII)


class CommitCommand(Command):
    """Gives ``--hold`` its optional value only where the next word is a time.

    So ``--hold QMP DISK`` holds for ever, and ``--hold 30 QMP DISK`` for 30 seconds.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join ``--hold`` with its value."""
        words = args[: args.index("--")] if "--" in args else args
        joined: list[str] = []
        for place, word in enumerate(words):
            if place and words[place - 1] == "--hold" and _TIME.fullmatch(word):
                joined[-1] = f"--hold={word}"
            else:
                joined.append(f"--hold={_FOREVER}" if word == "--hold" else word)
        return super().parse_args(ctx, joined + args[len(words) :])


@click.command(cls=CommitCommand)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("disk", shell_complete=complete_disk, required=False)
@click.argument("more", metavar="[DISK]...", nargs=-1)
@click.option(
    "--and",
    "others",
    nargs=2,
    multiple=True,
    metavar="QMP DISK",
    help="A disk of another VM, committed at the same instant. Can be given several times.",
)
@click.option(
    "--hold-limit",
    metavar="S",
    help="With several disks: cancel all if they are held for longer than this (2 s).",
)
@freezing
@click.option("--pivot", is_flag=True, help="At READY, make the base the active image.")
@click.option("--keep-overlay", is_flag=True, help="At READY, go on with the overlay.")
@click.option("--abort", is_flag=True, help="At READY, cancel by force (a rehearsal).")
@click.option(
    "--hold",
    metavar="[SECONDS]",
    help="Stay READY until 'qmpcommit pivot', 'keep' or 'abort' decides (from a second"
    " monitor); after SECONDS, keep the overlay.",
)
@click.option(
    "--check",
    metavar="CMD",
    help="At READY, run CMD by /bin/sh -c: pivot if it succeeds, keep the overlay if not.",
)
@click.option(
    "--recycle",
    metavar="FILE",
    help="At READY, pivot and lay a fresh empty overlay FILE over the base before the guest can"
    " write to it.",
)
@overlay_asked
@click.option("--policy", metavar="JSON", help='Any policy, as in {"kind": "pivot"}.')
@click.option("--only-if", metavar="CMD", help="Commit only if CMD succeeds, asked before.")
@click.option("--base", metavar="B", help="The layer to commit into; by default the bottom.")
@click.option("--top", metavar="T", help="The layer to commit; by default the active one.")
@click.option("--shallow", is_flag=True, help="Commit into top's own backing file.")
@click.option("--bandwidth", metavar="RATE", help="Bytes per second at most, as in 50MiB.")
@stale_options
@click.option(
    "--on-pivot",
    metavar="CMD",
    help="Run CMD by /bin/sh -c between the pivot and the deletion, to persist the VM's new disk"
    " path (QMPCOMMIT_ACTIVE); if it fails nothing is deleted.",
)
@click.option(
    "--on-error",
    type=click.Choice(["report", "stop", "ignore", "enospc"]),
    help="On a storage error fail (report, the default), wait for room (stop, or enospc for a"
    " full base alone), or try again (ignore).",
)
@click.option(
    "--converge",
    metavar="SECONDS",
    help="If the guest writes faster than the storage copies, hold its writes back step by step"
    " so that READY is reached in about SECONDS, and pause it for at most half a second for the"
    " last flush; the disk's limits are put back.",
)
@click.option("--no-bitmaps", is_flag=True, help="Don't carry dirty bitmaps into the base.")
@click.option(
    "--keep-relative",
    is_flag=True,
    help="Write the base's name relatively, also where it was absolute, into an overlay's header.",
)
@click.option(
    "--backing-mask-protocol",
    is_flag=True,
    help="Where QEMU would write a protocol as the backing format, write raw (QEMU 9.0).",
)
@click.option("--filter-node-name", metavar="NODE", help="The node-name of the job's own filter.")
@click.option(
    "--override",
    metavar="CHECK",
    multiple=True,
    help="Go on although this check refuses; --dry-run names them. Can be given several times."
    " With 'claim', take the disk over from whoever holds it.",
)
@click.option(
    "--offline",
    is_flag=True,
    help="The VM is off: give its IMAGE in the place of QMP and DISK, and a private"
    " qemu-storage-daemon does the work.",
)
@click.option(
    "--detach",
    is_flag=True,
    help="Start it and leave it: print its job id and how to go on. Nobody decides at READY before"
    " 'qmpcommit wait QMP JOB --then pivot' (or pivot, keep, abort) does.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be checked and sent; send nothing.")
@progress_option
@common
def commit(
    qmp: str,
    disk: str | None,
    more: tuple[str, ...],
    *,
    others: tuple[tuple[str, str], ...],
    hold_limit: str | None,
    overlay_options: str | None,
    overlay_secret: str | None,
    freeze: Any,
    agents: tuple[str, ...],
    only_if: str | None,
    on_pivot: str | None,
    converge: str | None,
    no_bitmaps: bool,
    dry_run: bool,
    detach: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
    timeout: str | None,
    **given: Any,
) -> Answer:
    """Commit a disk's overlay into its backing file while the guest runs.

    What to do when the copy is READY has to be said, for there is no default: give exactly one
    of --pivot, --keep-overlay, --abort, --hold, --check, --recycle and --policy. (On a terminal
    it is asked else; a --top below the active layer has one phase only and needs none.) At READY
    the base already holds the overlay's data, whatever is decided; a test of whether it should
    be committed at all is --only-if.

    --base and --top take a node-name, a file, or a layer's number (0 is the active layer). CMD
    learns the commit from QMPCOMMIT_VM, _DISK, _JOB, _BASE, _TOP, _BASE_NODE and _TOP_NODE.

    Several DISKs (and those of other VMs, with --and) are committed at one instant: all jobs
    run to READY, the disks' I/O is held for some milliseconds, and all pivot (or keep), or none
    does. A --check is asked once then, and its variables have a line for each disk. --recycle
    takes a folder, or a pattern with {disk}, {number} or {time} in it; a --hold is decided on
    standard input, by 'pivot', 'keep' or 'abort'. --freeze has the guests stand still from when
    all are READY until their disks have ended. Instead of QMP and its DISKs each disk may be
    given as QMP:DISK, as in: commit /run/a.sock:vda /run/b.sock:vda --pivot
    """
    options = Options.of(as_json, quiet, verbose, timeout)
    if not offline and (pairs := disk_pairs([qmp, disk, *more], options.daemon is not None)):
        (qmp, disk), more, others = pairs[0], (), (*pairs[1:], *others)
    if given["shallow"] and given["base"] is not None:
        raise click.UsageError("Give --shallow or --base, not both")
    if offline and disk is not None:
        raise click.UsageError("With --offline give the IMAGE alone, without a DISK")
    if disk is None and not offline:
        raise click.UsageError("Missing argument 'DISK'")
    stale = stale_of(given)
    if given["bandwidth"] is not None:
        from qmpcommit.units import parse_size

        parse_size(given["bandwidth"], "bandwidth")
    hook = None if on_pivot is None else shell(on_pivot, "--on-pivot")
    named = [(qmp, name) for name in ("disk" if offline else disk or "", *more)] + list(others)
    policy = _policy(
        {name: given.pop(name) for name in _DECISIONS},
        needed=(given["top"] is None or given["top"].strip() == "0") and not detach,
        overlay=asked_of_overlay(overlay_options, overlay_secret),
        ask=None if dry_run else lambda: _ask(options, named, given, offline=offline),
    )
    _refuse_unheard(policy, stale, hook, given["override"])
    request = {
        **given,  # the others are asked as they were given
        "disk": "disk" if offline else disk,
        "policy": policy,
        "only_if": None if only_if is None else shell(only_if, "--only-if"),
        "stale": stale,
        "converge": None if converge is None else _converge(converge),
        "carry_bitmaps": not no_bitmaps,
        "on_pivot": None if hook is None else persisting(hook),
        "on_stall": partial(_wait_for_room, quiet or as_json),
    }
    from qmpcommit.cli.running import run

    detaching.check(detach, request, options.daemon, several=bool(more or others), offline=offline)
    if more or others:
        from qmpcommit.cli import group
        from qmpcommit.group.run import HOLD_LIMIT
        from qmpcommit.units import parse_seconds

        group.check_group(request, offline=offline)
        assert policy is not None
        group.policies_of(policy, named)
        sockets = sockets_of(freeze, [name for name, _ in named], agents)
        limit = HOLD_LIMIT if hold_limit is None else parse_seconds(hold_limit, "hold limit")
        if dry_run:
            return run(options, lambda running: group.plan_group(running, named, request))
        request |= {"freeze": freeze, "agents": sockets}
        if options.daemon is not None:
            from qmpcommit.cli import remote_group

            remote_group.check(policy)
            request["on_pivot"] = hook
            del request["on_stall"]
            return run(options, lambda running: remote_group.commit(running, named, request, limit))
        return run(options, lambda running: group.commit_group(running, named, request, limit))
    for option, value in (("hold-limit", hold_limit), ("freeze", freeze), ("agent", agents)):
        if value:
            raise click.UsageError(f"--{option} is for several disks")
    if options.daemon is not None and offline:
        raise click.UsageError("--offline needs no daemon; leave --daemon out")
    if options.daemon is not None and not dry_run:
        from qmpcommit.cli import remote

        request["on_pivot"] = hook
        del request["on_stall"]
        return run(options, lambda running: remote.commit(running, qmp, request, detach=detach))
    if dry_run:
        return run(options, lambda running: _plan(running, qmp, request, offline))
    send = detaching.detach if detach else partial(_commit, offline=offline)
    return run(options, lambda running: send(running, qmp, request))


def _converge(text: str) -> Converge:
    from qmpcommit.commit.pace import Converge
    from qmpcommit.units import parse_seconds

    return Converge(deadline=parse_seconds(text, "time to converge"), pause=0.5)


def _policy(
    decisions: dict[str, Any],
    *,
    needed: bool,
    overlay: dict[str, Any],
    ask: Callable[[], AnyPolicy | None] | None,
) -> AnyPolicy | None:
    """The one policy that was given; raises `PolicyRequired` or `InvalidRequest`."""
    given = {name: value for name, value in decisions.items() if value not in (None, False)}
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"Give one policy, not {names}")
    if overlay and "recycle" not in given:
        raise click.UsageError(
            "--overlay-options and --overlay-secret are for the overlay of --recycle; a --policy"
            " has them within"
        )
    if not given and not needed:
        return None
    if not given:
        from qmpcommit.errors import PolicyRequired

        said = ask() if ask is not None else None
        if said is not None:
            return said

        raise PolicyRequired(
            "nothing says what to do when the copy is READY: give --pivot to make the base the"
            " active image, --keep-overlay to go on with the overlay, or --recycle, --abort,"
            " --hold, --check or --policy. Nothing was sent"
        )
    from qmpcommit.commit import policy as policies
    from qmpcommit.commit.policy import AnyPolicy, parse_policy
    from qmpcommit.units import parse_seconds

    for name, value in given.items():
        match name:
            case "pivot":
                return policies.Pivot()
            case "keep_overlay":
                return policies.Keep()
            case "abort":
                return policies.Abort()
            case "hold":
                forever = value == _FOREVER
                return policies.Hold(timeout=None if forever else parse_seconds(value, "hold time"))
            case "check":
                return policies.Check(command=shell(value, "--check"))
            case "recycle":
                return policies.Recycle(here(value) or "", **overlay)
    policy = parse_policy(given.get("policy"))
    assert isinstance(policy, AnyPolicy)  # a text is no callable
    return policy


def _refuse_unheard(
    policy: AnyPolicy | None, stale: Stale, hook: list[str] | None, override: tuple[str, ...]
) -> None:
    """What would have no effect is refused before anybody is connected to."""
    if stale != "leave" or hook is not None:
        from qmpcommit.commit.objections import refuse_idle

        refuse_idle(policy, stale=stale, on_pivot=hook)
    if override:
        from qmpcommit.commit.checks import check_override

        check_override(override)


def persisting(hook: list[str]) -> OnPivot:
    """An `OnPivot` that runs this command."""
    from qmpcommit.commit.hook import PivotCommand

    return PivotCommand(hook, HOOK_TIMEOUT)


def tell_of_stall(file: str) -> None:
    """The job waits for its storage."""
    echo(
        f"qmpcommit: the storage under {file} failed or is full, and the job waits; trying again"
        f" in {STALL_PAUSE:g} s",
        err=True,
    )


async def _wait_for_room(silent: bool, stall: Stall) -> None:
    """With ``--on-error stop``: say what is wrong, and try again in a while."""
    import asyncio

    if not silent:
        tell_of_stall(stall.base.filename)
    await asyncio.sleep(STALL_PAUSE)


def _offline(qmp: str) -> AbstractAsyncContextManager[Session]:
    """A session over a private storage daemon that opens the image."""
    from qmpcommit.offline_session import offline as open_offline

    return open_offline(qmp)


async def _plan(running: Run, qmp: str, request: dict[str, Any], offline: bool) -> Answer:
    """``--dry-run``: the plan and its findings; status 1 where a check refuses."""
    from qmpcommit.cli.held import tell_of_held
    from qmpcommit.cli.show import plan_text

    async with _offline(qmp) if offline else running.vm(qmp) as vm:
        await tell_of_held(vm, qmp)
        plan = await vm.plan(**plan_request(request))
    return Answer(
        plan.model_dump(mode="json"),
        plan_text(plan),
        status=1 if refused(plan, request) else 0,
        quiet=running.options.quiet,
    )


def plan_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a commit's request a plan takes."""
    from qmpcommit.commit.request import CommitOptions

    names = {"disk", *CommitOptions.__annotations__}
    return {name: value for name, value in request.items() if name in names}


def refused(plan: Plan, request: Mapping[str, Any]) -> bool:
    """Whether a check refuses that was not overridden."""
    overridden = request["override"]
    return any(f.level == "refuse" and f.name not in overridden for f in plan.findings)


async def _commit(running: Run, qmp: str, request: dict[str, Any], *, offline: bool) -> Answer:
    from qmpcommit.cli.bar import Bar
    from qmpcommit.cli.following import Foreground
    from qmpcommit.cli.held import tell_of_held

    bar = Bar(running.options, qmp)
    policy = request["policy"]
    async with _offline(qmp) if offline else running.connect(qmp) as vm:
        await tell_of_held(vm, qmp, [request["disk"]])
        foreground = Foreground(running, vm, qmp)
        job = await foreground.start(**request, timeout=running.remaining)
        job.timeout = running.options.timeout  # as it was asked for: an error names it
        async with bar.of(job, str(job.plan.disk), keys_of(running.options, policy, job)):
            outcome = await foreground.end(job)
    return committed(running, policy, outcome)


def keys_of(options: Options, policy: AnyPolicy | None, job: CommitJob | RemoteJob) -> Keys | None:
    """What decides at READY from this terminal, where that was left to somebody."""
    if policy is None or not policy.held:
        return None
    from qmpcommit.cli.asking import Keys, files_of, may_ask

    if not may_ask(options):
        return None
    plan: Plan | None = getattr(job, "plan", None)
    return Keys(job, files_of(plan) if plan is not None else ())


def _ask(
    options: Options, named: list[tuple[str, str]], given: Mapping[str, Any], *, offline: bool
) -> AnyPolicy | None:
    """Ask on a terminal what nobody has said; None where there is none, or no answer."""
    from qmpcommit.cli import signals
    from qmpcommit.cli.asking import ask_policy, may_ask, tell_of_change

    if not may_ask(options):
        return None
    from qmpcommit.cli.running import run
    from qmpcommit.commit.policy import Hold

    chosen: list[AnyPolicy | None] = []
    layers = {name: given[name] for name in ("base", "top", "shallow")}

    async def look(running: Run) -> list[Plan]:
        plans = []
        for qmp, disk in named:
            async with _offline(qmp) if offline else running.vm(qmp) as vm:
                plans.append(await vm.plan(disk=disk, policy=Hold(), **layers))
        return plans

    async def work(running: Run) -> Answer:
        plans = await look(running)
        while (policy := await ask_policy(plans)) is not None:
            asked, plans = plans, await look(running)
            if not tell_of_change(asked, plans):
                break
        chosen.append(policy)
        return Answer({}, "", quiet=True)

    run(options, work)
    signals.go_on()
    return chosen[0]


def committed(running: Run, policy: AnyPolicy | None, outcome: CommitOutcome) -> Answer:
    """What is said of the end."""
    from qmpcommit.cli.show import outcome_text

    return Answer(
        outcome.model_dump(mode="json"),
        outcome_text(outcome),
        status=exit_status(policy, outcome),
        quiet=running.options.quiet,
    )


def exit_status(policy: AnyPolicy | None, outcome: CommitOutcome) -> int:
    """0 for what was asked, 3 for what was decided otherwise, 1 where the hook failed."""
    from qmpcommit.commit.policy import Decision

    if outcome.hook == "failed":
        return 1
    if outcome.action == "none":
        return 0
    if policy is None:  # an intermediate layer, which was to be merged
        return 3
    if outcome.decided_by in ("check failed", "hold expired"):
        return 3
    if isinstance(policy, Decision):
        return 0 if outcome.action == policy.kind else 3
    return 3 if policy.kind == "check" and outcome.decided_by == "another client" else 0
