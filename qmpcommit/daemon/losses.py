"""What a damaged journal has lost: told to operators, and found again in QEMU."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

from fastapi import FastAPI

from qmpcommit.commit.claim import lives, owner_in
from qmpcommit.commit.plan import adopted_plan
from qmpcommit.commit.policy import Hold
from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.openapi import problems
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.rights import sees
from qmpcommit.daemon.salvage import Loss
from qmpcommit.units import counted
from qmpcommit.wire.commit import CommitRequest
from qmpcommit.wire.loss import LossView

if TYPE_CHECKING:
    from qmpcommit.daemon.engine import Engine
    from qmpcommit.daemon.registry import VM
    from qmpcommit.session import Session


def told_of(loss: Loss) -> str:
    """A loss in one sentence, for operators."""
    missing = f"{counted(len(loss.promises), 'promise')} may be lost in part or whole"
    if not loss.all_named:
        missing += ", and others that nobody can name"
    return (
        f"a damaged journal was set aside as {loss.kept}: {loss.why}; {missing}:"
        " GET /v1/losses names them"
    )


def routes(app: FastAPI, journal: Journal) -> None:
    """Add them to the app."""

    @app.get("/v1/losses", responses=problems(), tags=["watching"])
    async def list_losses() -> list[LossView]:
        """Journals that were set aside, newest first, and the promises that may be missing."""
        rows = await journal.read("SELECT * FROM losses ORDER BY id DESC LIMIT 100")
        found = []
        for row in rows:
            promises = [each for each in json.loads(row["promises"]) if sees(each["vm"])]
            found.append(LossView.model_validate({**row, "promises": promises}))
        return found


async def unnamed(journal: Journal) -> bool:
    """Whether promises were lost that nobody can name."""
    return bool(await journal.read("SELECT id FROM losses WHERE NOT all_named LIMIT 1"))


async def left_by(engine: Engine, vm: VM, session: Session, jobs: list[str]) -> list[Promise]:
    """Promises for commits in QEMU that have our names and no owner: each holds, to be decided.

    One whose process is there still, or may be, is left to it.
    """
    found = []
    graph = await session.graph()
    for job_id in jobs:
        disk = adopted_plan(vm.name, graph, job_id, Hold()).disk
        owner = owner_in(graph, disk)
        if owner is not None and lives(owner) is not False:
            continue
        promise = Promise(
            uuid.uuid4().hex, vm.name, CommitRequest(disk=disk.name, policy=Hold()), job_id,
            journal=engine.journal, metrics=engine.metrics,
        )  # fmt: skip
        promise.state, promise.noted = "running", {"lost": "gone"}
        found.append(promise)
    return found
