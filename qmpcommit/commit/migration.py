"""Whose a VM's disks are: its own, or those of the host that it migrates to.

While a VM migrates the destination has opened the same files, in the chain that was there when it
was started, and goes on with them: whatever changes the chain here is stale there, or deleted.

Rests on ``query-status`` and ``query-migrate``, which a storage daemon has not.
"""

from __future__ import annotations

from qmpcommit.errors import CommandRefused, VMStateError
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import all_of

OVER = ("", "none", "cancelled", "failed", "completed")
"""In these states of ``query-migrate`` no migration is under way; any other may be one."""

_RUN_STATES = {
    "inmigrate": "it waits for an incoming migration, and the source host still owns its disks",
    "postmigrate": "its migration has finished, and the destination host owns its disks",
    "finish-migrate": "its migration is finishing, and its disks are being handed over",
}
_RESET = "its migration has finished and it was reset since, so that the destination owns its disks"


def check_owner(vm: str, status: str, migration: str = "") -> None:
    """Raise `VMStateError` where a VM's disks are not its own to write, or may soon not be.

    `status` is its run state, `migration` what ``query-migrate`` says.
    """
    why, shown = _RUN_STATES.get(status, ""), status
    if not why and migration not in OVER:
        why = (
            "it is being migrated, and the other host has the same files open: what changes here"
            " would be stale there. Wait for the migration's end, or cancel it (migrate_cancel)"
        )
        shown = migration
    if not why and (status, migration) == ("prelaunch", "completed"):
        why = f"{_RESET}. If it is to run here, let it go on first (cont)"
    if why:
        raise VMStateError(
            f"the disks of {vm} can't be changed in the state '{shown}': {why}. Nothing was sent",
            vm=vm,
            status=status,
            migration=migration or "none",
        )


async def look_at_owner(monitor: Monitor) -> str | None:
    """The VM's run state, or None of a storage daemon; raises as `check_owner`."""
    status: str | None
    status, migration = await all_of(
        _status_in(monitor, "query-status"), _status_in(monitor, "query-migrate")
    )
    if status is not None:
        check_owner(monitor.name, status, migration or "")
    return status


async def objection(monitor: Monitor) -> str:
    """Why nothing may be deleted of what the VM used, in words; "" where it may."""
    try:
        await look_at_owner(monitor)
    except VMStateError as error:
        return error.message.removesuffix(". Nothing was sent")
    return ""


async def _status_in(monitor: Monitor, query: str) -> str | None:
    try:
        with monitor.sensible(query):
            answer = await monitor.execute(query)
            status = str(answer.get("status") or "")
            # ``savevm`` counts as completed too, and so does a migration that came from elsewhere:
            # neither took any time here.
            came = query == "query-migrate" and not answer.get("total-time")
            return "none" if came and status == "completed" else status
    except CommandRefused as error:
        if query == "query-migrate" and error.error_class != "CommandNotFound":
            raise  # what is not known is not taken for "no migration"
        return None
