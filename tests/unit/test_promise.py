"""What a promise has noted when steps and what nobody waits for are written at the same time."""

from __future__ import annotations

import json
from pathlib import Path

from qmpcommit.commit import phases
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
