"""A commit's state, as it is written down and read again."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.block.identity import FileId
from qmpcommit.commit.checks.finding import Finding
from qmpcommit.commit.facts import Choice, Ended
from qmpcommit.commit.ledger import (
    add_note,
    dump_state,
    expect_kind,
    files_of,
    load_state,
    plan_of,
    read_ledger,
    resumed_of,
    time_left,
)
from qmpcommit.commit.phases import Order, Phase, State, Verdict
from qmpcommit.commit.plan import Plan
from tests.unit.scenes import known

STATES = [
    State(two_phase=True),
    State(two_phase=False, phase=Phase.COPYING, began=True, done=5, total=10),
    State(two_phase=True, phase=Phase.DECIDED,
          order=Order(Choice.ABORT, former=Choice.PIVOT, former_by="caller")),
    State(two_phase=True, phase=Phase.CONFIRMED, order=Order(Choice.RECYCLE, "policy"),
          end=Ended(False, "no room", 5, 10), verdict=Verdict.PIVOTED, error="no room",
          trail=("one", "two")),
]  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_what_was_written_down_is_read_again(state: State) -> None:
    assert load_state(json.loads(json.dumps(dump_state(state)))) == state


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "floating"},
        {"decision": "both"},
        {"verdict": "perhaps"},
        {"end": {"cancelled": False, "colour": "red"}},
        {"colour": "red"},
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        load_state({**dump_state(STATES[-1]), **change})


BEFORE = Path(__file__).parent.parent / "fixtures" / "commit_ledger.json"
"""A `FileLedger` of version 1 whose state was one flat tuple; nothing in it is as it began."""


async def test_what_the_version_before_noted_is_gone_on_with_and_the_other_way_round() -> None:
    noted = await qc.FileLedger(BEFORE).noted()
    resumed = resumed_of(noted, same_vm=True)
    assert resumed.state == known(
        phase=Phase.DECIDED, linked=False, began=True, status="standby", auto_finalize=False,
        decision=Choice.ABORT, by="deadline", tries=2, in_flight=True, accepted=True,
        refusal="it is paused", resumed=True, doubt=True, other_vm=True,
        end=Ended(False, "no room", 5, 10), listed=True, done=5, total=10,
        verdict=Verdict.PIVOTED, error="no room", trail=("one", "two"), prepares=True,
        preparing=True, prepared=True, stalls=True, stalled=True, frozen=True, overlaid=True,
        taken_up=True, undoes=True, meets=True, refusals=1, former=Choice.RECYCLE,
        former_by="policy", unsent=True, unchecked=True, stale=True, spares=True,
    )  # fmt: skip
    assert resumed.recycle == qc.Recycle("/fresh")
    state: dict[str, Any] = noted["state"]
    assert json.loads(json.dumps(dump_state(resumed.state))) == state
    assert load_state({"two_phase": True, "phase": "ready"}) == known(phase=Phase.READY)


# -- what is noted, and what is gone on with -------------------------------------------------------

IMAGE = qc.Image("node", "/file", "qcow2")
PLAN = Plan(
    "vm", qc.Disk("vda", (IMAGE, IMAGE)), IMAGE, IMAGE, "job", True,
    qc.Pivot(), findings=[Finding("free-space", "note", "not checked")],
)  # fmt: skip


def begun(plan: Plan = PLAN, **facts: Any) -> dict[str, Any]:
    """What was noted of a commit that is about to be sent, as JSON gives it back."""
    more = {"plan": plan, "files": {"node": FileId(1, 2), "other": None}, "times": {}, **facts}
    noted: dict[str, Any] = json.loads(json.dumps(add_note({}, "block-commit", STATES[0], **more)))
    return noted


def test_a_plan_is_noted_with_its_policy_and_found_again() -> None:
    noted = begun(hooked=True)
    assert plan_of(noted, None) == PLAN
    assert plan_of(noted, qc.Keep()).policy == qc.Keep()
    assert files_of(noted) == {"node": FileId(1, 2), "other": None}
    assert noted["hooked"] is True
    assert time_left(noted) is None
    assert noted == {**noted, "step": "block-commit"}


async def _policy(ready: qc.Ready) -> qc.Pivot:
    return qc.Pivot()


def test_a_callable_is_not_noted() -> None:
    plan = replace(PLAN, policy=_policy)
    assert plan_of(begun(plan), None).policy is None
    assert plan_of(begun(plan), _policy).policy is _policy


def test_what_is_left_of_a_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock was set: it is never longer than it was, nor below nothing."""
    clock = [1000.0]
    monkeypatch.setattr("qmpcommit.commit.ledger.time.time", lambda: clock[0])
    hold = qc.Hold(timeout=10, otherwise=qc.Abort())
    noted = {**begun(replace(PLAN, policy=hold), timeout=30.0), "ready": 1000.0}
    for now, left, of_hold in ((1004.0, 26.0, 6.0), (900.0, 30.0, 10.0), (2000.0, 0.0, 0.0)):
        clock[0] = now
        assert time_left(noted) == left
        assert plan_of(noted, None).policy == qc.Hold(timeout=of_hold, otherwise=qc.Abort())
    forever = begun(replace(PLAN, policy=qc.Hold()))
    assert plan_of({**forever, "ready": 1.0}, None).policy == qc.Hold()


def test_the_steps_add_up() -> None:
    recycle = qc.Recycle("/new")
    noted = begun()
    noted = add_note(noted, "freeze", STATES[2], times={}, overlay="/new", recycle=recycle)
    noted = add_note(noted, "stop")
    noted = add_note(noted, "throttle", repair={"execute": "x"})
    resumed = resumed_of(noted, same_vm=True)
    assert (resumed.recycle, resumed.stopped, resumed.state) == (recycle, True, STATES[2])
    assert resumed_of(noted, same_vm=True, alone=False).stopped is False
    assert noted["repair"] == {"execute": "x"}
    noted = add_note(add_note(noted, "cont"), "unthrottle")
    assert "repair" not in noted
    assert resumed_of(noted, same_vm=False).stopped is False


async def test_a_file_is_replaced_as_a_whole_and_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "ledger"
    file.write_text('{"qmpcommit": 1, "commit": {"over": true, "step": "job-dismiss"}}')
    file.chmod(0o644)
    facts: dict[str, Any] = {"plan": PLAN, "files": {}, "times": {}}
    other = {**facts, "plan": replace(PLAN, job_id="other")}
    written = qc.FileLedger(file)
    await written.note("block-commit", STATES[0], **facts)
    assert file.stat().st_mode & 0o777 == 0o600
    await written.note("job-complete", STATES[2], times={})
    assert (await qc.FileLedger(file).noted())["step"] == "job-complete"
    with pytest.raises(qc.JobConflict, match="has not ended"):
        await qc.FileLedger(file).note("block-commit", STATES[0], **other)
    written.moved(STATES[0]._replace(phase=Phase.FINISHED))
    await qc.FileLedger(file).note("block-commit", STATES[0], **other)
    assert [each.name for each in tmp_path.iterdir()] == ["ledger"]


async def test_an_older_note_that_is_late_replaces_no_newer_one(tmp_path: Path) -> None:
    written = qc.FileLedger(tmp_path / "ledger")
    written._write((2, "new"))
    written._write((1, "old"))
    assert (tmp_path / "ledger").read_text() == "new"


async def test_a_note_that_can_not_be_written_leaves_the_former(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    written = qc.FileLedger(folder / "ledger")
    with pytest.raises(FileNotFoundError):
        await written.note("block-commit", STATES[0], plan=PLAN, files={}, times={})
    written.moved(STATES[0]._replace(phase=Phase.FINISHED))  # it is only told
    assert await written.noted() == {}
    folder.mkdir()
    (folder / "ledger").mkdir()
    with pytest.raises(OSError, match="directory"):
        written._write((9, "text"))
    assert [each.name for each in folder.iterdir()] == ["ledger"]


async def test_what_is_no_commit_is_not_noted(tmp_path: Path) -> None:
    with pytest.raises(qc.InvalidRequest, match="can't note create: it is for one commit"):
        await qc.FileLedger(tmp_path / "ledger").note("create", window=None)
    assert not list(tmp_path.iterdir())


# -- what is no commit -----------------------------------------------------------------------------


async def test_a_file_holds_one_of_any_kind(tmp_path: Path) -> None:
    file = tmp_path / "ledger"
    ledger = qc.FileLedger(file)
    group: dict[str, Any] = {"kind": "group", "known_as": "0a"}
    await ledger.note("begin", **group, value={"a": 1})
    await ledger.note("finalize", **group, value={"b": [2]})
    told = {"b": [2], "step": "finalize", "over": False}
    assert json.loads(file.read_text()) == {"qmpcommit": 1, "group": {"known_as": "0a", **told}}
    assert await qc.FileLedger(file).noted() == {**group, **told}
    window: dict[str, Any] = {"kind": "window", "known_as": "0a", "value": {}}
    commit: dict[str, Any] = {"plan": PLAN, "files": {}, "times": {}}
    for again in (qc.FileLedger(file), ledger):
        with pytest.raises(qc.JobConflict, match="holds a group that has not ended, of id 0a"):
            await again.note("begin", **window)
        with pytest.raises(qc.JobConflict, match="holds a group that has not ended, of id 0a"):
            await again.note("block-commit", STATES[0], **commit)
    await ledger.note("end", **group, value={}, over=True)
    await qc.FileLedger(file).note("begin", **window)
    assert json.loads(file.read_text()).keys() == {"qmpcommit", "window"}
    await qc.FileLedger(file).note("end", **window, over=True)
    await qc.FileLedger(file).note("block-commit", STATES[0], **commit)
    assert json.loads(file.read_text()).keys() == {"qmpcommit", "commit"}
    with pytest.raises(qc.JobConflict, match="holds a commit that has not ended, with job job"):
        await qc.FileLedger(file).note("begin", **window)


@pytest.mark.parametrize(
    "text",
    ['{"qmpcommit": 1, "flock": {}}', '{"qmpcommit": 1, "group": {}, "commit": {}}',
     '{"qmpcommit": 1}', '{"qmpcommit": 1, "group": 3}'],
)  # fmt: skip
async def test_a_file_of_an_unknown_kind_is_refused_and_left(text: str, tmp_path: Path) -> None:
    file = tmp_path / "ledger"
    file.write_text(text)
    for call in (
        read_ledger(qc.FileLedger(file)),
        qc.FileLedger(file).note("begin", kind="group", known_as="0a", value={}),
    ):
        with pytest.raises(qc.InvalidRequest, match="is no ledger of this version"):
            await call
    assert file.read_text() == text


class Row:
    """A ledger of a program's own, which holds what is given."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        """As is documented."""
        self.value = qc.add_note(self.value, step, state, **facts)

    async def noted(self) -> dict[str, Any]:
        """All of it."""
        return self.value


async def test_what_another_kind_holds_is_not_taken_for_it() -> None:
    row = Row({})
    assert await read_ledger(row) == {}
    await row.note("begin", kind="cycle", known_as="0b", value={"a": 1})
    noted = await read_ledger(row)
    assert noted == {"kind": "cycle", "known_as": "0b", "a": 1, "step": "begin", "over": False}
    expect_kind(noted, "cycle")
    with pytest.raises(qc.InvalidRequest, match=r"holds a cycle, not a commit: .* by qc\.resume"):
        expect_kind(noted, "commit")
    with pytest.raises(qc.InvalidRequest, match=r"a commit, not a group: .* by Session\.resume"):
        expect_kind(begun(), "group")
    with pytest.raises(qc.InvalidRequest, match="holds a 'flock', which this version"):
        await read_ledger(Row({"kind": "flock"}))


async def test_notes_that_come_at_once_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The members of a group that is held don't wait for one file after another."""
    ledger = qc.FileLedger(tmp_path / "ledger")
    renames: list[Any] = []
    rename = os.rename

    def counted(old: Any, new: Any) -> None:
        renames.append(new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", counted)
    await ledger.note("begin", kind="group", known_as="0a", value={})
    with ledger._writing:  # one is under way
        notes = [
            asyncio.create_task(ledger.note("n", kind="group", known_as="0a", value={"n": n}))
            for n in range(50)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*notes)
    assert (await qc.FileLedger(ledger.path).noted())["n"] == 49
    assert len(renames) == 2
    ledger._write(ledger._next(), durable=False)
    ledger._write(ledger._newest)  # what is not durable yet is written once more
    assert len(renames) == 4
