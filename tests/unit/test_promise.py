"""What a promise has noted when steps and what nobody waits for are written at the same time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qmpcommit.commit import phases
from qmpcommit.commit.checks import Finding
from qmpcommit.commit.facts import Accepted, Checked, Command, Looked, Use
from qmpcommit.commit.policy import Pivot
from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.metrics import Metrics
from qmpcommit.daemon.promise import Promise
from qmpcommit.wire.commit import CommitRequest
from tests.unit.test_checks import made


async def test_that_a_job_was_checked_does_not_undo_what_is_noted_next(folder: Path) -> None:
    journal = await Journal(folder / "j.db").open()
    request = CommitRequest(disk="vda", policy=Pivot())
    promise = Promise("c1", "web1", request, "j1", journal=journal, metrics=Metrics())
    await journal.write(promise.insertion())
    state, _ = phases.step(phases.begin(two_phase=True)[0], Looked())
    await promise.note("block-commit", state, plan=made()[1], files={}, times={})
    state, _ = phases.step(state, Accepted(Command.START))
    promise.moved(state)
    assert promise.noted["state"]["unchecked"] is True
    promise.moved(phases.step(state, Checked(Use.USED))[0])
    await promise.note("throttle", repair={})  # written before what nobody waits for
    await journal.close()
    journal = await Journal(folder / "j.db").open()
    (row,) = await journal.read("SELECT noted FROM commits")
    noted = json.loads(row["noted"])
    assert (noted["step"], noted["state"]["unchecked"]) == ("throttle", False)
    await journal.close()


async def test_a_plan_that_comes_back_has_its_findings_as_they_were(folder: Path) -> None:
    journal = await Journal(folder / "j.db").open()
    request = CommitRequest(disk="vda", policy=Pivot())
    promise = Promise("c1", "web1", request, "j1", journal=journal, metrics=Metrics())
    await journal.write(promise.insertion())
    found = [Finding("free-space", "note", "not checked")]
    state, _ = phases.step(phases.begin(two_phase=True)[0], Looked())
    plan = replace(made()[1], findings=found)
    await promise.note("block-commit", state, plan=plan, files={}, times={})
    back, _, _ = promise.resumed("")
    assert back.findings == found
    await journal.close()
