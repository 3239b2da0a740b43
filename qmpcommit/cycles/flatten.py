"""Bringing a long chain down to few layers, a step at a time, from the bottom up.

Each step commits one layer into the one below it: an intermediate layer in one phase, the active
layer (only where one layer is to be left) with a pivot. Between two steps the chain is valid and
complete, so it may be stopped after any of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpcommit.commit.checks import check_override
from qmpcommit.commit.claim import take
from qmpcommit.commit.job import see_through
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.policy import Pivot
from qmpcommit.errors import InvalidRequest
from qmpcommit.tasks import Awaited

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM


class Step(NamedTuple):
    """One commit: the places in the chain (0 = active layer) of its top and its base."""

    top: int
    base: int

    @property
    def policy(self) -> Pivot | None:
        """A pivot where the active layer is what is committed; else none is asked for."""
        return Pivot() if self.top == 0 else None


def next_step(layers: int, keep: int) -> Step | None:
    """What brings a chain of so many layers nearer to `keep` of them; None where it is there."""
    return Step(layers - 2, layers - 1) if layers > max(keep, 1) else None


class Flattening(Awaited[list[CommitOutcome]], AsyncIterator[CommitOutcome]):
    """The commits that bring a chain down: iterate over their outcomes, or await all of them.

    A task may await them, too.

    Raises what `flatten` says.
    """

    def __init__(self, steps: AsyncGenerator[CommitOutcome, None]) -> None:
        super().__init__(self._all)
        self._steps = steps

    def __aiter__(self) -> AsyncGenerator[CommitOutcome, None]:
        return self._steps

    async def __anext__(self) -> CommitOutcome:
        return await anext(self._steps)

    async def _all(self) -> list[CommitOutcome]:
        return [outcome async for outcome in self._steps]

    async def aclose(self) -> None:
        """Let go of it before its end."""
        await self._steps.aclose()


def flatten(
    vm: VM,
    disk: str,
    *,
    keep: int,
    delete: bool = False,
    bandwidth: int | str | None = None,
    keep_relative: bool = False,
    override: Collection[str] = (),
) -> Flattening:
    """The outcomes of the commits that bring the chain down to `keep` layers, as they end.

    The disk is claimed from the first to the last.
    Relative backing names stay relative; with `keep_relative` absolute ones become so too.
    It stops after a step that another client aborted, whose outcome says so. A cancellation
    cancels the commit that is under way. Raises `InvalidRequest` for a `keep` below
    1, and what `Session.commit` and `CommitJob.wait` raise; what was merged before stays merged,
    and the chain is valid.
    """
    options = {"delete": delete, "bandwidth": bandwidth, "override": override}
    return Flattening(_flatten(vm, disk, keep, options, keep_relative=keep_relative))


async def _flatten(
    vm: VM, disk: str, keep: int, options: dict[str, Any], *, keep_relative: bool
) -> AsyncGenerator[CommitOutcome, None]:
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise InvalidRequest(f"a chain is brought down to 1 layer or more, not to {keep!r}")
    check_override(options["override"])
    found = await vm.disk(disk)
    async with await take(vm, found, "flat", override=options["override"]) as claim:
        while True:
            chain = (await vm.disk(disk)).chain  # others may have changed it since the last step
            step = next_step(len(chain), keep)
            if step is None:
                return
            job = await vm.commit(
                disk,
                top=chain[step.top],
                base=chain[step.base],
                policy=step.policy,
                keep_relative=keep_relative and step.top > 0,
                claim=claim,
                **options,
            )
            outcome = await see_through(job)
            yield outcome
            if outcome.action == "abort":  # by another client: the layer is still there
                return
            if step.top == 0:  # nothing is left to be merged, nor perhaps the name of the disk
                return
