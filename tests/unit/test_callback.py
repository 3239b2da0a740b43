"""What the program hands in is called by one rule."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qmpcommit import callback
from qmpcommit.callback import Failed, Noting, ask
from qmpcommit.commit.facts import Choice, Command, Duty, Unnoted
from qmpcommit.commit.phases import ORDERS, Phase, step
from qmpcommit.errors import CommitFailed
from qmpcommit.log import Log
from tests.unit.scenes import known


async def test_an_answer_is_passed_on_awaited_or_not() -> None:
    async def answers(number: int, *, more: int) -> int:
        return number + more

    assert await ask(answers, 1, more=2) == 3
    assert await ask(lambda: 5) == 5


@pytest.mark.parametrize(
    "error", [ValueError("x"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()]
)
async def test_whatever_it_ends_with_is_its_failure(error: BaseException) -> None:
    def raises() -> None:
        raise error

    async def awaits() -> None:
        raises()

    for call in (raises, awaits):
        with pytest.raises(Failed) as failed:
            await ask(call)
        assert failed.value.cause is error
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_of_ours_reaches_it_and_goes_on() -> None:
    seen: list[str] = []

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise ValueError from None  # what it makes of that is no news

    asking = asyncio.create_task(ask(hangs))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert seen == ["cancelled"]


async def test_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback, "HEED_HELD", 0.05)
    over = asyncio.Event()

    async def heeds_nothing() -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    with pytest.raises(Failed, match=r"longer than 0\.02 s") as failed:
        await ask(heeds_nothing, limit=0.02)
    assert isinstance(failed.value.cause, TimeoutError)
    over.set()


async def test_one_that_is_done_when_it_is_given_up_is_done() -> None:
    async def just_in_time() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "written"
        return ""

    assert await ask(just_in_time, limit=0.02) == "written"


class Ledger:
    """It fails, or hangs."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    async def note(self, step: str, **facts: Any) -> None:
        if self._error is None:
            await asyncio.Event().wait()
        else:
            raise self._error


async def test_a_step_that_can_not_be_noted_is_refused_or_told_of() -> None:
    error = OSError("full")
    noting = Noting(Ledger(error), Log())
    with pytest.raises(CommitFailed, match="could not note freeze") as failed:
        await noting.note("freeze")
    assert failed.value.__cause__ is error
    await noting.note("thaw", anyway=True)
    await noting.note("thaw", anyway=True)
    (told,) = noting.problems
    assert "could not note thaw" in told
    assert "done all the same" in told
    noting.moved(None)  # it wants to know of nothing


@pytest.mark.parametrize("held", [True, False])
async def test_a_note_that_hangs(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up soon while something is held; and when nobody waits any more."""
    monkeypatch.setattr(callback, "HELD" if held else "LAST", 0.02)
    noting = Noting(Ledger(None), Log())
    writing = asyncio.create_task(noting.note("stop", held=held))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if not held:
        noting.hurry()
    with pytest.raises(CommitFailed, match="took too long"):
        await writing
    if not held:
        with pytest.raises(CommitFailed, match="took too long"):
            await noting.note("stop")


# -- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [Choice.PIVOT, Choice.KEEP])
def test_a_decision_that_was_not_noted_is_no_former_one(choice: Choice) -> None:
    state = known(phase=Phase.DECIDED, began=True, decision=choice, by="policy",
                  tries=1, in_flight=True, status="ready")  # fmt: skip
    state, actions = step(state, Unnoted(ORDERS[choice], "full"))
    assert actions == [Command.ABORT]
    assert (state.order.decision, state.order.former, state.error) == (Choice.ABORT, None, "full")


def test_an_end_that_was_not_noted_is_undone() -> None:
    state = known(phase=Phase.DECIDED, began=True, decision=Choice.PIVOT, tries=1,
                  accepted=True, status="pending", prepares=True, prepared=True,
                  auto_finalize=False)  # fmt: skip
    state, actions = step(state, Unnoted(Command.FINALIZE, "full"))
    assert actions == [Command.ABORT]
    assert (state.order.decision, state.order.former) == (Choice.ABORT, Choice.PIVOT)
    assert step(state, Unnoted(Command.RESUME, "full")) == (state, [])
    ended = state._replace(phase=Phase.ENDED)
    assert step(ended, Unnoted(Command.FINALIZE, "full")) == (ended, [])
    assert Duty.FINISH not in actions
