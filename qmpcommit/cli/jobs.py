"""``qmpcommit jobs``: what runs, and what to do about it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.completing import complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@common
def jobs(qmp: str, **given: Any) -> Answer:
    """The block jobs of a VM: phase, progress, disk, and what to do next."""
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    return run(options, lambda running: _jobs(running, qmp))


async def _jobs(running: Run, qmp: str) -> Answer:
    from qmpcommit.block.chain import read_disks
    from qmpcommit.cli.left import tell_of_left
    from qmpcommit.cli.open_windows import tell_of_windows
    from qmpcommit.cli.owners import tell, tell_of_owners
    from qmpcommit.cli.show import jobs_text
    from qmpcommit.commit.recycle import interrupted_recycles
    from qmpcommit.session import Session

    async with running.vm(qmp) as vm:
        if isinstance(vm, Session):
            entries = await vm.execute("query-block-jobs")
            graph = await vm.graph()
            disks, recycles = read_disks(graph), interrupted_recycles(graph, qmp)
            windows = tell_of_windows(disks, qmp, cwd=vm.cwd, graph=graph)
            windows["held"] = tell_of_owners(disks, graph)
            windows["left"] = await tell_of_left(vm, qmp)
        else:
            entries, disks, recycles = await vm.jobs(), await vm.disks(), await vm.recycles()
            qmp = (await vm.info()).qmp
            windows = tell_of_windows(disks, qmp)
            windows["held"] = tell(await vm.owners())
    on = {job: disk.name for disk in disks for job in disk.jobs}
    found = [_job(entry, on.get(str(entry["device"])), qmp) for entry in entries]
    if running.options.daemon is not None:
        for each, entry in zip(found, entries, strict=True):
            if entry["commit"] is not None and each["next"] is not None:
                each["next"] = _next_of_ours(each, running.options, vm.name)
    data = {"vm": vm.name, "jobs": found, "interrupted_recycles": recycles, **windows}
    text = "\n".join([jobs_text(found), *(recycle["next"] for recycle in recycles)])  # type: ignore[arg-type]
    return Answer(data, text, quiet=running.options.quiet)


def _job(entry: dict[str, Any], disk: str | None, qmp: str) -> dict[str, Any]:
    from qmpcommit.names import JOB_PREFIX

    name = str(entry["device"])
    return {
        "id": name,
        "type": entry["type"],
        "status": entry["status"],
        "ready": bool(entry["ready"]),
        "current": entry["offset"],
        "total": entry["len"],
        "speed": entry["speed"],
        "io_status": entry["io-status"],
        "disk": disk,
        "ours": name.startswith(JOB_PREFIX),
        "error": entry.get("error"),
        "next": _next(entry, name, qmp),
    }


def _next(entry: dict[str, Any], name: str, qmp: str) -> str | None:
    """What a person should do about a job that goes no further by itself."""
    from qmpcommit.commit.pending import what_to_do

    if entry["io-status"] == "nospace":
        return "stopped: no space left under the base; make room, then resume it (job-resume)"
    if entry["io-status"] == "failed":
        return "stopped by an I/O error; repair the storage, then resume it (job-resume)"
    if entry["type"] != "commit":
        return None
    if entry["status"] in ("ready", "standby"):
        return f"READY: decide with 'qmpcommit pivot|keep|abort {shlex.quote(qmp)} {name}'"
    if entry["status"] == "pending":
        return what_to_do(name, qmp)
    if entry["status"] == "concluded":
        return (
            f"has ended: 'qmpcommit chain {shlex.quote(qmp)}' shows what its disk uses;"
            f" {_clears(name, qmp)} clears it away"
        )
    return None


def _clears(name: str, qmp: str) -> str:
    from qmpcommit.commit.pending import recovers
    from qmpcommit.names import JOB_PREFIX

    ours = name.startswith(JOB_PREFIX)
    return recovers(qmp) if ours else f"'qmpcommit abort {shlex.quote(qmp)} {name}'"


def _next_of_ours(job: dict[str, Any], options: Options, vm: str) -> str | None:
    """The same for a commit of the daemon, which resolves by itself what nobody has to decide."""
    from qmpcommit.cli.following import take_up

    if job["status"] in ("ready", "standby"):
        return f"READY: decide with '{take_up(options, vm, job['id'])}'"
    return str(job["next"]) if job["io_status"] != "ok" else None
