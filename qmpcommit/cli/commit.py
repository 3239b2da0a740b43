"""``qmpcommit commit``: from the command line to an outcome and its exit status."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer, Options, common

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.commit.policy import AnyPolicy

_FOREVER = "forever"
_TIME = re.compile(r"\d[\d.]*[a-z]*", re.IGNORECASE | re.ASCII)


class CommitCommand(click.Command):
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
@click.argument("qmp")
@click.argument("disk")
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
@click.option("--policy", metavar="JSON", help='Any policy, as in {"kind": "pivot"}.')
@click.option("--only-if", metavar="CMD", help="Commit only if CMD succeeds, asked before.")
@click.option("--base", metavar="B", help="The layer to commit into; by default the bottom.")
@click.option("--top", metavar="T", help="The layer to commit; by default the active one.")
@click.option("--shallow", is_flag=True, help="Commit into top's own backing file.")
@click.option("--bandwidth", metavar="RATE", help="Bytes per second at most, as in 50MiB.")
@common
def commit(
    qmp: str,
    disk: str,
    *,
    only_if: str | None,
    base: str | None,
    top: str | None,
    shallow: bool,
    bandwidth: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    timeout: str | None,
    **decisions: Any,
) -> Answer:
    """Commit a disk's overlay into its backing file while the guest runs.

    What to do when the copy is READY has to be said, for there is no default: give exactly one
    of --pivot, --keep-overlay, --abort, --hold, --check and --policy. (A --top below the active
    layer has one phase only and needs none.) At READY the base already holds the overlay's
    data, whatever is decided; a test of whether it should be committed at all is --only-if.

    --base and --top take a node-name, a file, or a layer's number (0 is the active layer). CMD
    learns the commit from QMPCOMMIT_VM, _DISK, _JOB, _BASE, _TOP, _BASE_NODE and _TOP_NODE.
    """
    options = Options.of(as_json, quiet, verbose, timeout)
    if shallow and base is not None:
        raise click.UsageError("Give --shallow or --base, not both")
    if bandwidth is not None:
        from qmpcommit.units import parse_size

        parse_size(bandwidth, "bandwidth")
    policy = _policy(decisions, needed=top is None or top.strip() == "0")
    request = {
        "disk": disk,
        "policy": policy,
        "base": base,
        "top": top,
        "shallow": shallow,
        "bandwidth": bandwidth,
        "only_if": None if only_if is None else ["/bin/sh", "-c", only_if],
    }
    from qmpcommit.cli.running import run

    return run(options, lambda running: _commit(running, qmp, request))


def _policy(decisions: dict[str, Any], *, needed: bool) -> AnyPolicy | None:
    """The one policy that was given; raises `PolicyRequired` or `InvalidRequest`."""
    given = {name: value for name, value in decisions.items() if value not in (None, False)}
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"Give one policy, not {names}")
    if not given and not needed:
        return None
    from qmpcommit.commit.policy import Abort, AnyPolicy, Check, Hold, Keep, Pivot, parse_policy
    from qmpcommit.units import parse_seconds

    for name, value in given.items():
        match name:
            case "pivot":
                return Pivot()
            case "keep_overlay":
                return Keep()
            case "abort":
                return Abort()
            case "hold":
                forever = value == _FOREVER
                return Hold(timeout=None if forever else parse_seconds(value, "hold time"))
            case "check":
                return Check(command=["/bin/sh", "-c", value])
    policy = parse_policy(given.get("policy"))
    assert isinstance(policy, AnyPolicy)  # a text is no callable
    return policy


async def _commit(running: Run, qmp: str, request: dict[str, Any]) -> Answer:
    from qmpcommit.cli.bar import Bar
    from qmpcommit.cli.following import Foreground
    from qmpcommit.cli.show import outcome_text

    bar = Bar(running.options, qmp)
    async with running.connect(qmp) as vm:
        foreground = Foreground(running, vm, qmp)
        job = await foreground.start(**request, timeout=running.remaining)
        async with bar.of(job):
            outcome = await foreground.end(job)
    return Answer(
        outcome.model_dump(mode="json"),
        outcome_text(outcome),
        status=exit_status(request["policy"], outcome),
        quiet=running.options.quiet,
    )


def exit_status(policy: AnyPolicy | None, outcome: CommitOutcome) -> int:
    """0 for what was asked, 3 for what was decided otherwise."""
    if outcome.action == "none" or policy is None:
        return 0
    if outcome.decided_by in ("check failed", "hold expired"):
        return 3
    if policy.kind in ("pivot", "keep", "abort"):
        return 0 if outcome.action == policy.kind else 3
    return 3 if policy.kind == "check" and outcome.decided_by == "another client" else 0
