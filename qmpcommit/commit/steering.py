"""A block job that runs is made faster or slower, stands still, and goes on; whoever began it.

Rests on ``query-block-jobs``, ``block-job-set-speed``, ``job-pause`` and ``job-resume``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from qmpcommit.block.chain import read_disks
from qmpcommit.block.graph import read_graph
from qmpcommit.errors import CommandRefused, JobConflict, JobNotFound, QmpCommitError
from qmpcommit.names import JOB_PREFIX
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from qmpcommit.qmp.monitor import Monitor

_DONE = {"pause": "paused", "resume": "resumed"}
_GOING = ("running", "ready", "paused", "standby")


@record
class JobNow(Record):
    """A block job as ``query-block-jobs`` shows it, after what was asked of it.

    `current` and `total` are bytes, `speed` bytes per second (0: no limit). `changed` is False
    where the job was so already. A `status` of "null" is a job that ended right then.
    """

    vm: str
    job_id: str
    type: str
    status: str
    paused: bool
    ready: bool
    speed: int
    current: int
    total: int
    io_status: str
    changed: bool = True


async def block_job(monitor: Monitor, job_id: str) -> Mapping[str, Any]:
    """The job of that id (``query-block-jobs``); raises `JobNotFound` with those that are."""
    jobs = {str(job["device"]): job for job in await monitor.execute("query-block-jobs")}
    found: Mapping[str, Any] | None = jobs.get(job_id)
    if found is None:
        raise JobNotFound(
            f"QEMU of {monitor.name} has no block job '{job_id}'"
            f" (its block jobs: {', '.join(jobs) or 'none'}){await _of_disk(monitor, job_id)}",
            vm=monitor.name,
            job_id=job_id,
        )
    return found


async def _of_disk(monitor: Monitor, name: str) -> str:
    """Which job was meant by one who gave a disk's name; "" where it is none."""
    if name.startswith(JOB_PREFIX):
        return ""
    with suppress(QmpCommitError):  # what was asked wrongly is the news
        for disk in read_disks(await read_graph(monitor)):
            if name in (disk.name, disk.qdev, disk.device):
                return f". {name} is a disk; its job: {', '.join(disk.jobs) or 'none'}"
    return ""


async def set_speed(monitor: Monitor, job_id: str, bandwidth: int | str) -> JobNow:
    """See `VM.set_bandwidth`."""
    from qmpcommit.commit.converge import set_bandwidth

    before = await block_job(monitor, job_id)
    try:
        await set_bandwidth(monitor, job_id, bandwidth)
    except CommandRefused as error:
        raise _conflict(monitor, before, "its speed was not changed", error) from error
    now = await _after(monitor, before)
    return _now(monitor, now, changed=now["speed"] != before["speed"])


async def pause_or_resume(
    monitor: Monitor, job_id: str, verb: Literal["pause", "resume"]
) -> JobNow:
    """See `VM.pause_job` and `VM.resume_job`."""
    before = await block_job(monitor, job_id)
    refused: CommandRefused | None = None
    try:
        await monitor.execute(f"job-{verb}", {"id": job_id})
    except CommandRefused as error:
        refused = error
    if refused is None:
        return _now(monitor, await _after(monitor, before))
    now = await block_job(monitor, job_id)
    already = bool(now["paused"]) is (verb == "pause") and now["status"] in _GOING
    if not already:
        raise _conflict(monitor, now, f"it was not {_DONE[verb]}", refused) from refused
    return _now(monitor, now, changed=False)


async def _after(monitor: Monitor, before: Mapping[str, Any]) -> Mapping[str, Any]:
    """The job after a command that QEMU has taken; it may have ended by then."""
    try:
        return await block_job(monitor, str(before["device"]))
    except JobNotFound:
        return {**before, "status": "null", "paused": False}


def _now(monitor: Monitor, job: Mapping[str, Any], *, changed: bool = True) -> JobNow:
    return JobNow(
        vm=monitor.name,
        job_id=str(job["device"]),
        type=str(job["type"]),
        status=str(job["status"]),
        paused=bool(job["paused"]),
        ready=bool(job["ready"]),
        speed=int(job["speed"]),
        current=int(job["offset"]),
        total=int(job["len"]),
        io_status=str(job["io-status"]),
        changed=changed,
    )


def _conflict(
    monitor: Monitor, job: Mapping[str, Any], what: str, error: CommandRefused
) -> JobConflict:
    return JobConflict(
        f"job '{job['device']}' of {monitor.name} is '{job['status']}', and {what}: QEMU says"
        f" '{error.desc}'. The job is as it was",
        vm=monitor.name,
        job_id=str(job["device"]),
        status=str(job["status"]),
    )
