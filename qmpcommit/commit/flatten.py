"""Bringing a long chain down to few layers, a step at a time, from the bottom up.

Each step commits one layer into the one below it: an intermediate layer in one phase, the active
layer (only where one layer is to be left) with a pivot. Between two steps the chain is valid and
complete, so it may be stopped after any of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.policy import Pivot
from qmpcommit.errors import InvalidRequest

if TYPE_CHECKING:
    from qmpcommit.session import Session


async def flatten(
    vm: Session,
    disk: str,
    *,
    keep: int,
    delete: bool = False,
    bandwidth: int | str | None = None,
) -> AsyncIterator[CommitOutcome]:
    """The outcomes of the commits that bring the chain down to `keep` layers, as they end.

    Raises `InvalidRequest` for a `keep` below 1, and what `Session.commit` and `CommitJob.wait`
    raise; what was merged before stays merged, and the chain is valid.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise InvalidRequest(f"a chain is brought down to 1 layer or more, not to {keep!r}")
    for layers in range(len((await vm.disk(disk)).chain), keep, -1):
        job = await vm.commit(
            disk,
            top=layers - 2,
            base=layers - 1,
            policy=Pivot() if layers == 2 else None,
            delete=delete,
            bandwidth=bandwidth,
        )
        yield await job.wait()
