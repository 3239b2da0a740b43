"""``qmpcommit commit --detach``: a commit that is started, and left in QEMU for a later command."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer
from qmpcommit.errors import InvalidRequest

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.session import Session

_NEEDS_US = (
    ("delete (--delete)", lambda asked: asked["stale"] == "delete"),
    ("rename (--rename)", lambda asked: asked["stale"] == "rename"),
    ("on_pivot (--on-pivot)", lambda asked: asked["on_pivot"] is not None),
)
"""What is done after the pivot, and so by whoever pivots."""


def check(
    detach: bool, request: dict[str, Any], daemon: str | None, *, several: bool, offline: bool
) -> None:
    """Refuse what nobody would be there to do; raises `InvalidRequest` or `click.UsageError`.

    The daemon is there, and does it all.
    """
    if not detach:
        return
    if several:
        raise click.UsageError("--detach is for one disk: those of a group are ended together")
    if offline:
        raise click.UsageError("--detach has nothing to leave with --offline: its QEMU ends too")
    if daemon is not None:
        return
    policy = request["policy"]
    kind = getattr(policy, "kind", "hold")
    if kind not in ("hold", "pivot", "keep") or getattr(policy, "timeout", None) is not None:
        raise InvalidRequest(
            f"with --detach nobody is there at READY, so {_spelt(policy)} can't be carried out:"
            " leave it out, and decide later with 'qmpcommit wait QMP JOB --then pivot', or with"
            " 'pivot', 'keep' or 'abort'. Nothing was sent"
        )
    for name, is_asked in _NEEDS_US:
        if is_asked(request):
            raise InvalidRequest(
                f"with --detach nobody is there to {name} after the pivot: leave it out, and give"
                " it to the 'qmpcommit wait QMP JOB --then pivot' or 'qmpcommit pivot QMP JOB' that"
                " pivots. Nothing was sent"
            )
    if request["converge"] is not None:
        raise InvalidRequest(
            "with --detach nobody is there to hold the guest back (--converge), and to put its"
            " limits back: leave one of them out. Nothing was sent"
        )
    if request["on_error"] in ("stop", "enospc"):
        raise InvalidRequest(
            f"with --detach nobody is there to resume a job that stops for want of room (--on-error"
            f" {request['on_error']}): leave one of them out. Nothing was sent"
        )


def _spelt(policy: Any) -> str:
    return "a --hold with a time" if policy.kind == "hold" else f"--{policy.kind}"


async def detach(running: Run, qmp: str, request: dict[str, Any]) -> Answer:
    """Start it and leave it, its disk claimed for whoever takes it up."""
    from qmpcommit.cli.following import Foreground
    from qmpcommit.cli.held import tell_of_held
    from qmpcommit.commit.policy import Hold

    then = getattr(request["policy"], "kind", "hold")
    async with running.connect(qmp) as vm:
        await tell_of_held(vm, qmp, [request["disk"]])
        if request["top"] is not None:
            await _refuse_intermediate(vm, request)
        vm.detaches = True
        job = await Foreground(running, vm, qmp).start(**{**request, "policy": Hold()})
        await job.detach(claimed=True)
    return _left(running, qmp, job, "keep" if then == "keep" else "pivot")


async def _refuse_intermediate(vm: Session, request: dict[str, Any]) -> None:
    from qmpcommit.commit.policy import Pivot

    layers = {name: request[name] for name in ("top", "base", "shallow")}
    plan = await vm.plan(request["disk"], policy=Pivot(), check=False, **layers)
    if not plan.two_phase:
        raise InvalidRequest(
            f"{plan.top} is not the active layer of {plan.disk}: its commit is one phase, and"
            " somebody has to be there at its end, when the header above it is rewritten. Leave"
            " --detach out. Nothing was sent"
        )


def _left(running: Run, qmp: str, job: CommitJob, then: str) -> Answer:
    plan, program = job.plan, running.options.program
    waits = f"{program} wait {shlex.quote(qmp)} {job.id} --then {then}"
    return Answer(
        {
            "vm": plan.vm,
            "disk": plan.disk.name,
            "job_id": job.id,
            "base": plan.base.model_dump(mode="json"),
            "top": plan.top.model_dump(mode="json"),
            "phase": job.phase.value,
            "next": waits,
        },
        f"job {job.id} on {plan.disk.name} is started, and left in QEMU. Nobody decides when it is"
        f" READY until you do:\n  {waits}\n"
        f"  {program} pivot|keep|abort {shlex.quote(qmp)} {job.id}\n"
        f"Until it has ended well, {plan.base.filename} is valid only under {plan.top.filename}.",
        quiet=running.options.quiet,
    )
