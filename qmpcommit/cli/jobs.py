"""``qmpcommit jobs``: what runs, and what to do about it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer, Options, common

if TYPE_CHECKING:
    from qmpcommit.block.graph import BlockGraph
    from qmpcommit.cli.running import Run


@click.command()
@click.argument("qmp")
@common
def jobs(qmp: str, **given: Any) -> Answer:
    """The block jobs of a VM: phase, progress, disk, and what to do next."""
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    return run(options, lambda running: _jobs(running, qmp))


async def _jobs(running: Run, qmp: str) -> Answer:
    from qmpcommit.block.chain import read_disks
    from qmpcommit.cli.show import jobs_text

    async with running.connect(qmp) as vm:
        entries = await vm.execute("query-block-jobs")
        graph = await vm.graph()
    disks = read_disks(graph)
    on = {job: disk.name for disk in disks for job in disk.jobs}
    found = [_job(entry, on.get(str(entry["device"])), qmp) for entry in entries]
    recycles = _interrupted_recycles(graph)
    data = {"vm": vm.name, "jobs": found, "interrupted_recycles": recycles}
    text = "\n".join([jobs_text(found), *(recycle["next"] for recycle in recycles)])  # type: ignore[arg-type]
    return Answer(data, text, quiet=running.options.quiet)


def _interrupted_recycles(graph: BlockGraph) -> list[dict[str, str]]:
    """Fresh overlays of ours that were opened and never laid: whoever did it was killed."""
    from qmpcommit.commit.plan import JOB_PREFIX

    found = []
    for name in graph.nodes:
        ours = name.startswith(JOB_PREFIX) and name.endswith("-top")
        if ours and "backing" not in graph.nodes[name].children and not graph.parents.get(name):
            file = graph.leaf(name).raw.get("file")
            text = (
                f"An interrupted recycle left the empty overlay {file} open as node {name}, and"
                " perhaps the guest paused: end its job (abort, or pivot), let the guest go on"
                f" with 'cont', and close the overlay with 'blockdev-del {name}'"
            )
            found.append({"node": name, "overlay": str(file), "next": text})
    return found


def _job(entry: dict[str, Any], disk: str | None, qmp: str) -> dict[str, Any]:
    from qmpcommit.commit.plan import JOB_PREFIX

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
            f" 'qmpcommit abort {shlex.quote(qmp)} {name}' clears it away"
        )
    return None
