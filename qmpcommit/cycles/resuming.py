"""A round, or a discard, whose process died goes on from its ledger: ``qc.resume(ledger, vms)``.

What was to be kept is carried into the bases by the commit, or the group, that was begun for it.
What was to be discarded is, where that was decided when all empty overlays lay; else all is put
back first, the guests go on, and it begins again. So no guest waits for another VM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qmpcommit import errors
from qmpcommit.commit.claim import clear_dead_of
from qmpcommit.commit.job import see_through
from qmpcommit.commit.ledger import COMMIT, Noted
from qmpcommit.commit.resuming import vm_of
from qmpcommit.cycles.book import ChildLedger, RoundBook
from qmpcommit.cycles.discarding import Called, Discarded, Discarding, discarded
from qmpcommit.cycles.run import Round, keep, kept
from qmpcommit.errors import CommitFailed, InvalidRequest, QmpCommitError
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.commit.vm import VM
    from qmpcommit.guest.sockets import Sockets


async def resume_round(
    ledger: Any, noted: Noted, vms: Sequence[VM], agents: Sockets[Any]
) -> tuple[Round, ...] | tuple[Discarded, ...]:
    """Go on with it, to its end; what `cycle` or `discard` had given, and raises what they raise.

    And `VMGone` where a QEMU has ended in which an overlay was being discarded.
    """
    try:
        rounds = _Resumption(ledger, noted, vms, agents)
    except QmpCommitError:
        raise
    except Exception as error:  # whatever has become of it on its way
        raise InvalidRequest(f"what the ledger holds can't be understood: {error!r}") from error
    return await rounds.run()


class _Resumption:
    """One round on its way from its notes to its end."""

    def __init__(self, ledger: Any, noted: Noted, vms: Sequence[VM], agents: Sockets[Any]) -> None:
        self._value, self._agents = dict(noted), agents
        self._vms = [vm_of(vms, part["vm"], part["identity"]) for part in noted["parts"]]
        known = {name: value for name, value in noted.items() if name not in ("kind", "step")}
        self._book = RoundBook(ledger, self._vms[0].log, noted["known_as"], known)

    async def run(self) -> tuple[Round, ...] | tuple[Discarded, ...]:
        """Also where it had ended, the claims of the process that was killed are cleared."""
        ends = await self._run()
        await clear_dead_of(self._vms, "cycle", "disc")
        return ends

    async def _run(self) -> tuple[Round, ...] | tuple[Discarded, ...]:
        if self._value["over"]:
            return self._ended_before()
        if self._value["result"] == "kept":
            return await self._keep()
        ends = await to_the_end(self._discard())
        return ends if self._value["work"] == "discard" else _rounds(ends)

    def _ended_before(self) -> tuple[Round, ...] | tuple[Discarded, ...]:
        error = self._value.get("error")
        if error is not None:
            raise getattr(errors, error["type"], CommitFailed)(error["message"])
        if self._value["result"] == "kept":
            return tuple(Round.model_validate(each) for each in self._value["outcome"])
        ends = tuple(Discarded.model_validate(each) for each in self._value["outcome"])
        return ends if self._value["work"] == "discard" else _rounds(ends)

    # -- what is kept -----------------------------------------------------------------------------

    async def _keep(self) -> tuple[Round, ...]:
        child = self._value["child"]
        if not child:
            parts = zip(self._vms, self._book.parts, strict=True)
            disks = [(vm, part["disk"]) for vm, part in parts]
            return await keep(disks, [{} for _ in disks], self._agents, self._book)
        async with self._book.noting_failure():
            ends = await self._child(child)
        return await kept(ends, self._book)

    async def _child(self, child: Noted) -> Sequence[CommitOutcome]:
        ledger = ChildLedger(self._book)
        if child.get("kind", COMMIT) == COMMIT:
            return [await see_through(await self._vms[0].resume(ledger))]
        from qmpcommit.group.resuming import resume_group

        group = await resume_group(
            ledger, child, list(dict.fromkeys(self._vms)), agents=self._agents,
            policy=None, hooks={},
        )  # fmt: skip
        return group.outcomes

    # -- what is discarded ------------------------------------------------------------------------

    async def _discard(self) -> tuple[Discarded, ...]:
        called: Called = "discard" if self._value["work"] == "discard" else "round"
        discarding = Discarding(self._book, self._value["guest"], called)
        async with self._book.noting_failure():
            await discarding.settle(self._vms)
            exchanges = await discarding.run(self._vms)
        return await discarded(exchanges, self._book)


def _rounds(ends: Sequence[Discarded]) -> tuple[Round, ...]:
    return tuple(Round("discarded", end.disk, end.overlay, discarded=end) for end in ends)
