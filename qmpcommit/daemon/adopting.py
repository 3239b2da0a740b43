"""A commit job that somebody else has begun becomes the daemon's own when it is decided here.

It is a promise like any other from then on: in the journal before anything is sent, with what its
layers and files were, so that the next daemon ends it as this one would have.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Path, Response

from qmpcommit.commit.policy import parse_policy
from qmpcommit.commit.request import what_of_stale
from qmpcommit.commit.takeover import Asked, adopted
from qmpcommit.daemon.api import Key, VMPath, fingerprint, view_commit
from qmpcommit.daemon.asked import check_asked
from qmpcommit.daemon.engine import key_row
from qmpcommit.daemon.openapi import problems
from qmpcommit.daemon.promise import Promise
from qmpcommit.errors import JobConflict, NotReady
from qmpcommit.wire.commit import CommitRequest, CommitView, JobDecision

if TYPE_CHECKING:
    from qmpcommit.daemon.engine import Engine

JobPath = Annotated[str, Path(max_length=256)]

_READY = ("ready", "standby", "pending", "concluded")


def routes(app: FastAPI, engine: Engine) -> None:
    """Add them to the app."""

    @app.post(
        "/v1/vms/{vm}/jobs/{job}/decision",
        status_code=202,
        responses=problems(404, 409, 422, 502, 504, 507, body=True),
        tags=["commits"],
    )
    async def adopt(
        vm: VMPath,
        job: JobPath,
        asked: JobDecision,
        response: Response,
        idempotency_key: Key = None,
    ) -> CommitView:
        """Decide a commit job that is not the daemon's, and make it a commit of its own."""
        place = fingerprint(f"{vm} {job}", asked)
        make = partial(_promise, engine, vm, job, asked, idempotency_key, place)
        promise, again = await engine.once(idempotency_key, place, engine.commit, make)
        response.headers["Location"] = f"/v1/commits/{promise.id}"
        if again:
            response.headers["Idempotent-Replay"] = "true"
        return view_commit(engine, promise)


async def _promise(  # noqa: PLR0917
    engine: Engine, name: str, job_id: str, asked: JobDecision, key: str | None, place: str
) -> Promise:
    """Durable; raises what `Session.adopt` raises, `NotReady`, and what `Engine.take` does."""
    vm = engine.vm(name)
    for known in engine.live.values():
        if (known.vm, known.job_id) == (name, job_id):
            raise JobConflict(
                f"job {job_id} of {name} is commit {known.id} of this daemon: decide that one, by"
                f" /v1/commits/{known.id}/decision",
                vm=name,
                disk=known.disk,
                job_id=job_id,
            )
    request = _request(asked, "?")
    engine.check_room_for([request])
    check_asked([request])
    async with engine.registry.use(vm, wait=1.0) as session:
        jobs = {str(job["device"]): job for job in await session.execute("query-block-jobs")}
        policy = parse_policy({"kind": asked.action})
        wanted = Asked(
            policy,
            stale=what_of_stale(asked.delete, asked.stale),
            carry_bitmaps=asked.carry_bitmaps,
        )
        made = await adopted(session, job_id, wanted)
        if made.own_claim is not None:  # it is taken when the job is
            made.own_claim.abandon()
        _check_ready(asked, jobs.get(job_id, {}), name, job_id)
        plan = made.plan
        engine.places.check_commit(vm, session, plan, _request(asked, plan.disk.name))
        promise = Promise(
            uuid.uuid4().hex, name, _request(asked, plan.disk.name), job_id,
            journal=engine.journal, metrics=engine.metrics,
        )  # fmt: skip
        promise.state, promise.identity = "running", vm.identity
        promise.noted |= {"adopted": True, "identity": vm.identity}
        if plan.base.node_name and not made.state.spares:  # else nothing is known of it
            plan.arguments["auto-finalize"] = bool(jobs[job_id].get("auto-finalize", True))
            promise.plan = plan.model_dump(mode="json")
            promise.noted["files"] = session.files_of(plan)
    await engine.take_up(promise, *key_row(key, place, promise.id))
    engine.orphans.get(name, {}).pop(job_id, None)
    if asked.action == "abort":  # in whatever phase it is
        await engine.carry_out(promise, "abort")
    return promise


def _request(asked: JobDecision, disk: str) -> CommitRequest:
    """As if it had been asked for here."""
    return CommitRequest(
        disk=disk,
        policy=parse_policy({"kind": asked.action}),  # type: ignore[arg-type]
        delete=asked.delete,
        stale=asked.stale,
        on_pivot=asked.on_pivot,
        carry_bitmaps=asked.carry_bitmaps,
        timeout=asked.timeout,
    )


def _check_ready(asked: JobDecision, job: Mapping[str, Any], vm: str, job_id: str) -> None:
    status = str(job.get("status"))
    if asked.action == "abort" or asked.wait or status in _READY:
        return
    raise NotReady(
        f"job {job_id} of {vm} is not READY: it is '{status}'. It goes on, and is not the daemon's;"
        f" {asked.action} again when it is READY, or wait for that (wait, --wait)",
        vm=vm,
        job_id=job_id,
    )
