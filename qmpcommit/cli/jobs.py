"""``qmpcommit jobs``: what runs, and what to do about it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.columns import check_format, format_option, shown
from qmpcommit.cli.completing import complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command
from qmpcommit.cli.watching import check_watch, watch_option

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qmpcommit.block.graph import BlockGraph
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.rates import Rates


HEADS = {
    "disk": "DISK",
    "type": "TYPE",
    "phase": "PHASE",
    "percent": "%",
    "done": "DONE",
    "total": "TOTAL",
    "left": "LEFT",
    "rate": "RATE",
    "limit": "LIMIT",
    "eta": "ETA",
    "ready": "READY FOR",
    "job": "JOB",
}
USUAL = ("disk", "type", "phase", "percent", "left", "rate", "eta", "ready", "job")

APART = 0.25
"""Seconds between two looks at a job that copies, which tell its rate."""


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@watch_option
@format_option(HEADS)
@common
def jobs(qmp: str, *, watch: bool, columns: list[str] | None, **given: Any) -> Answer:
    """The block jobs of a VM: disk, phase, how far, how fast, how long yet, and what to do next.

    ETA is how long it copies yet at its rate and under its limit, and READY FOR since when it
    waits for a decision: with <= at most, with >= at least, for QEMU itself does not tell.
    """
    options = Options.of(**given)
    check_format(columns, json=options.as_json)
    check_watch(watch, options.as_json)
    from qmpcommit.cli.running import run

    return run(options, lambda running: _jobs(running, qmp, columns, watch))


async def _jobs(running: Run, qmp: str, columns: list[str] | None, watch: bool) -> Answer:
    import asyncio

    from qmpcommit.cli.tables import draw
    from qmpcommit.cli.watching import watched
    from qmpcommit.commit.rates import Rates

    rates = Rates()
    async with running.vm(qmp) as vm:
        first: dict[str, Any] | None = None

        async def look() -> Answer:
            nonlocal first
            if first is None:
                data = first = await _look(running, vm, qmp, rates)
            else:
                data = {**first, "jobs": (await _entries(running, vm, qmp, rates))[0]}
            found = data["jobs"]
            also = [recycle["next"] for recycle in data["interrupted_recycles"]]

            def text(width: int | None) -> str:
                return "\n".join([*_lines(found, width, columns), *also])

            quiet = running.options.quiet
            return Answer(data, text(None), quiet=quiet, draw=lambda: draw(text))

        if watch:
            return await watched(running, look)
        answer = await look()
        if any(job["status"] == "running" for job in answer.data["jobs"]):
            await asyncio.sleep(APART)
            answer = await look()
    return answer


async def _look(running: Run, vm: Any, qmp: str, rates: Rates) -> dict[str, Any]:
    """All that there is to be told; warnings are written to standard error."""
    from qmpcommit.block.chain import read_disks
    from qmpcommit.cli.left import tell_of_left
    from qmpcommit.cli.open_windows import tell_of_windows
    from qmpcommit.cli.owners import tell, tell_of_owners
    from qmpcommit.commit.recycle import interrupted_recycles
    from qmpcommit.session import Session

    found, graph = await _entries(running, vm, qmp, rates)
    if isinstance(vm, Session):
        assert graph is not None
        disks, recycles = read_disks(graph), interrupted_recycles(graph, qmp)
        windows = tell_of_windows(disks, qmp, cwd=vm.cwd, graph=graph)
        windows["held"] = tell_of_owners(disks, graph)
        windows["left"] = await tell_of_left(vm, qmp)
    else:
        disks, recycles = await vm.disks(), await vm.recycles()
        windows = tell_of_windows(disks, (await vm.info()).qmp)
        windows["held"] = tell(await vm.owners())
    return {"vm": vm.name, "jobs": found, "interrupted_recycles": recycles, **windows}


async def _entries(
    running: Run, vm: Any, qmp: str, rates: Rates
) -> tuple[list[dict[str, Any]], BlockGraph | None]:
    """The jobs as they are now, and the block graph where QEMU itself was asked for it."""
    import asyncio
    import time

    from qmpcommit.block.chain import read_disks
    from qmpcommit.commit.claim import owner_in
    from qmpcommit.session import Session

    graph, ready, begun = None, {}, {}
    if isinstance(vm, Session):
        entries, graph = await vm.execute("query-block-jobs"), await vm.graph()
        disks = read_disks(graph)
        for disk in disks:
            owner = owner_in(graph, disk)
            if owner is not None and owner.since:
                begun.update(dict.fromkeys(disk.jobs, max(0.0, time.time() - owner.since)))
    else:
        entries, disks = await vm.jobs(), await vm.disks()
        qmp = (await vm.info()).qmp
        if any(entry["commit"] is not None for entry in entries):
            for each in await vm.client.commits(vm=vm.name, state="running", limit=1000):
                if each.view.ready is not None:
                    ready[each.job_id] = max(0.0, time.time() - each.view.ready)
    on = {job: disk.name for disk in disks for job in disk.jobs}
    at = asyncio.get_running_loop().time()
    found = []
    for entry in entries:
        name = str(entry["device"])
        pace = rates.look(
            name, at, status=str(entry["status"]), current=entry["offset"], total=entry["len"],
            speed=entry["speed"], ready_for=ready.get(name), begun_for=begun.get(name),
        )  # fmt: skip
        found.append({**_job(entry, on.get(name), qmp), **pace.model_dump()})
    rates.forget({str(entry["device"]) for entry in entries})
    if running.options.daemon is not None:
        for told, entry in zip(found, entries, strict=True):
            if entry["commit"] is not None and told["next"] is not None:
                told["next"] = _next_of_ours(told, running.options, vm.name)
    return found, graph


def _job(entry: dict[str, Any], disk: str | None, qmp: str) -> dict[str, Any]:
    from qmpcommit.commit.rates import percent
    from qmpcommit.names import JOB_PREFIX

    name = str(entry["device"])
    return {
        "id": name,
        "type": entry["type"],
        "status": entry["status"],
        "ready": bool(entry["ready"]),
        "current": entry["offset"],
        "total": entry["len"],
        "percent": percent(entry["offset"], entry["len"], str(entry["status"])),
        "speed": entry["speed"],
        "io_status": entry["io-status"],
        "disk": disk,
        "ours": name.startswith(JOB_PREFIX),
        "error": entry.get("error"),
        "next": _next(entry, name, qmp),
    }


def _lines(
    found: Sequence[Mapping[str, Any]], width: int | None, columns: Sequence[str] | None
) -> Iterator[str]:
    if not found:
        yield "no block jobs"
        return
    rows = [(cells_of(job), _remarks(job)) for job in found]
    yield from shown(HEADS, rows, width, columns=columns, usual=USUAL)


def cells_of(job: Mapping[str, Any]) -> dict[str, str]:
    """One job's row, by its columns."""
    from qmpcommit.cli.show import phase_text, ready_text, show_seconds
    from qmpcommit.units import show_size

    eta, rate, ready = job["eta"], job["rate"], job["ready_for"]
    copies = not job["ready"] and rate is not None
    return {
        "disk": job["disk"] or "",
        "type": job["type"],
        "phase": phase_text(job["status"]),
        "percent": "" if job["percent"] is None else f"{job['percent']:g}",
        "done": show_size(job["current"]),
        "total": show_size(job["total"]),
        "left": show_size(max(0, job["total"] - job["current"])),
        "rate": f"{show_size(rate)}/s" if copies else "",
        "limit": f"{show_size(job['speed'])}/s" if job["speed"] else "",
        "eta": show_seconds(eta) if eta is not None and not job["ready"] else "",
        "ready": "" if ready is None else ready_text(ready, job["ready_bound"]),
        "job": job["id"],
    }


def _remarks(job: Mapping[str, Any]) -> list[str]:
    lines = [f"error: {job['error']}"] if job["error"] else []
    return [*lines, job["next"]] if job["next"] else lines


def _next(entry: dict[str, Any], name: str, qmp: str) -> str | None:
    """What a person should do about a job that goes no further by itself."""
    from qmpcommit.commit.pending import what_to_do
    from qmpcommit.commit.rates import READY

    if entry["io-status"] == "nospace":
        return "stopped: no space left under the base; make room, then resume it (job-resume)"
    if entry["io-status"] == "failed":
        return "stopped by an I/O error; repair the storage, then resume it (job-resume)"
    if entry["type"] != "commit":
        return None
    if entry["status"] in READY:
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
    from qmpcommit.commit.rates import READY

    if job["status"] in READY:
        return f"READY: decide with '{take_up(options, vm, job['id'])}'"
    return str(job["next"]) if job["io_status"] != "ok" else None
