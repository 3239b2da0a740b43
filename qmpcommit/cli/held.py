"""Jobs that a killed group commit left PENDING: each command on that monitor names them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.session import Session


async def tell_of_held(
    vm: Session | Any, qmp: str, disks: Collection[str] = (), *, but: str = ""
) -> list[dict[str, str]]:
    """Warn on standard error; returns them all.

    Not of the job `but`, and not of those on these `disks`: what is in the command's way its error
    tells. What the daemon knows of a VM is the daemon's to resolve.
    """
    from qmpcommit.commit.pending import held_jobs
    from qmpcommit.errors import QmpCommitError
    from qmpcommit.session import Session

    if not isinstance(vm, Session):
        return []
    held = await held_jobs(vm, qmp)
    if held:
        told = {but}
        for name in disks:
            with suppress(QmpCommitError):
                told.update((await vm.disk(name)).jobs)
        warn_of_held(job for job in held if job["id"] not in told)
    return held


def warn_of_held(held: Iterable[dict[str, str]]) -> None:
    """One line each."""
    for job in held:
        echo(f"qmpcommit: job {job['id']} {job['next']}", err=True)
