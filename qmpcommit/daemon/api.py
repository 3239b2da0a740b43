"""The HTTP API: FastAPI over the engine. Errors are RFC 9457 problem documents."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
import traceback
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

import qmpcommit
from qmpcommit.block.chain import Disk, read_disks
from qmpcommit.commit.owners import owners_of
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.recycle import interrupted_recycles
from qmpcommit.daemon import pages
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.feed import EventKind, Feed
from qmpcommit.daemon.journal import JournalError
from qmpcommit.daemon.losses import told_of
from qmpcommit.daemon.openapi import PROBLEM_TYPE, TITLES, document, problems
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.rights import has_everywhere, require, sees, sees_all
from qmpcommit.errors import (
    ChainError,
    CommandRefused,
    CommitFailed,
    CommitNotFound,
    ConnectError,
    DeadlineExceeded,
    DiskNotFound,
    InvalidRequest,
    JobConflict,
    JobNotFound,
    KeyReused,
    MonitorLost,
    NoSpace,
    NotReady,
    PolicyRequired,
    ProtocolViolation,
    QmpCommitError,
    QueueFull,
    QuiesceFailed,
    VMGone,
    VMNotFound,
    VMStateError,
    WindowError,
    WindowNotFound,
)
from qmpcommit.log import Log
from qmpcommit.names import node_stem
from qmpcommit.wire.commit import (
    CommitRequest,
    CommitState,
    CommitView,
    Decision,
    JobView,
    NewVM,
    Progress,
    VMState,
    VMView,
)
from qmpcommit.wire.values import moment

_STATUS: tuple[tuple[type[QmpCommitError], int, str], ...] = (
    (VMNotFound, 404, "No such VM"),
    (CommitNotFound, 404, "No such commit"),
    (WindowNotFound, 404, "No such window"),
    (DiskNotFound, 404, "No such disk"),
    (JobNotFound, 404, "No such job"),
    (PolicyRequired, 422, "A policy is required"),
    (KeyReused, 422, "The key was used before"),
    (InvalidRequest, 422, "Invalid request"),
    (NotReady, 409, "Not ready"),
    (JobConflict, 409, "Conflict"),
    (ChainError, 409, "The chain does not allow it"),
    (VMStateError, 409, "The VM's state does not allow it"),
    (NoSpace, 507, "No space"),
    (QueueFull, 503, "The queue is full"),
    (JournalError, 503, "The journal has no room"),
    (ConnectError, 503, "The VM is away"),
    (MonitorLost, 503, "The VM is away"),
    (VMGone, 503, "The VM is gone"),
    (CommandRefused, 502, "QEMU refused"),
    (ProtocolViolation, 502, "Not what QEMU answers"),
    (DeadlineExceeded, 504, "QEMU does not answer"),
    (QuiesceFailed, 409, "The guest can't be quiesced"),
    (WindowError, 409, "The window can't be opened"),
    (CommitFailed, 409, "It can't be done"),
)
RETRY_AFTER = 2
"""Seconds after which what is not available may be asked for again."""

VMPath = Annotated[str, Path(max_length=64, examples=["web1"])]
VMNames = tuple[Annotated[str, Field(max_length=64)], ...]
CommitPath = Annotated[str, Path(max_length=64, pattern="^[0-9a-f]+$")]
Key = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="Repeating a request with it has no effect"),
]


class ProblemResponse(JSONResponse):
    """A problem document."""

    media_type = PROBLEM_TYPE


def _problem(status: int, kind: str, title: str, detail: str, **more: Any) -> ProblemResponse:
    body = {"type": f"urn:qmpcommit:{kind}", "title": title, "status": status, "detail": detail}
    headers = {"Retry-After": str(RETRY_AFTER)} if status == 503 else None
    return ProblemResponse({**body, **more}, status_code=status, headers=headers)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QmpCommitError)
    status, title = 500, "Failed"
    for kind, code, text in _STATUS:
        if isinstance(error, kind):
            status, title = code, text
            break
    if status == 503 and request.app.state.engine.stopping:
        return _problem(503, "http:503", "Stopping", "the daemon is stopping; ask the next one")
    facts = json.loads(json.dumps(error.to_dict(), default=str))
    return _problem(status, type(error).__name__, title, str(error), error=facts)


_NOT_FOUND: dict[str, type[QmpCommitError]] = {"vm": VMNotFound, "window_id": WindowNotFound}


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    for name, value in request.path_params.items():
        if any(each["loc"] == ("path", name) for each in error.errors()):
            kind = _NOT_FOUND.get(name, CommitNotFound)
            return await _on_error(request, kind(f"there is nothing called '{value:.80}'"))
    wrong = [
        {"where": ".".join(str(part) for part in each["loc"]), "what": each["msg"]}
        for each in error.errors()[:20]
    ]
    malformed = any(each["type"] == "json_invalid" for each in error.errors())
    detail = "; ".join(f"{each['where']}: {each['what']}" for each in wrong)
    status = 400 if malformed else 422
    sent_as = request.headers.get("content-type", "")
    if "json" not in sent_as and any(each["loc"] == ("body",) for each in error.errors()):
        detail = f"send it with Content-Type: application/json, and not '{sent_as:.80}'; {detail}"
    return _problem(status, "InvalidRequest", TITLES[status], detail[:2000], errors=wrong)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = TITLES.get(error.status_code, "Not possible")
    answer = _problem(error.status_code, f"http:{error.status_code}", title, str(error.detail))
    answer.headers.update(error.headers or {})
    if error.status_code == 405:  # each route knows but its own method
        found = {
            name
            for route in request.app.routes
            if route.matches(request.scope)[0] is not Match.NONE
            for name in getattr(route, "methods", None) or ()
        }
        allowed = ", ".join(sorted(found | {"OPTIONS"} | ({"HEAD"} if "GET" in found else set())))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": allowed})
        answer.headers["Allow"] = allowed
    return answer


async def _on_bug(request: Request, error: Exception) -> Response:
    where = "".join(traceback.format_exception(error))
    path = request.url.path
    Log().warning("bug", error=repr(error), method=request.method, path=path, where=where)
    return _problem(
        500, "http:500", TITLES[500], "an error of the daemon's own; its log tells more"
    )


def _facts_of_vm(vm: VM) -> dict[str, Any]:
    return {
        "name": vm.name, "qmp": vm.qmp, "connect": vm.connect, "origin": vm.origin,
        "state": vm.state,
        "pid": vm.session.peer_pid if vm.session is not None and vm.state == "connected" else None,
        "error": str(vm.error) if vm.error is not None else None,
    }  # fmt: skip


def view_vm(vm: VM) -> VMView:
    """A VM as the API shows it."""
    return VMView(**_facts_of_vm(vm))


def facts_of(promise: Promise, position: int | None) -> dict[str, Any]:
    """What the API shows of a commit as it is now, for `CommitView`."""
    return {
        "id": promise.id,
        "vm": promise.vm,
        "disk": promise.disk,
        "job_id": promise.job_id,
        "group": promise.group or None,
        "state": promise.state,
        "phase": promise.phase,
        "priority": promise.priority,
        "created": promise.created,
        "position": position if promise.state == "queued" else None,
        "storage": promise.storage,
        "bandwidth": promise.rate or promise.request.bandwidth,
        "ready": promise.ready,
        "ended": promise.ended,
        "decision": promise.decision,
        "asked_by": promise.noted.get("asked"),
        "decided_by": promise.noted.get("decided"),
        "request": promise.request,
        "outcome": promise.outcome,
        "error": promise.error,
    }


def view_commit(engine: Engine, promise: Promise, progress: Progress | None = None) -> CommitView:
    """A commit as the API shows it."""
    facts = facts_of(promise, engine.position(promise))
    return CommitView.model_validate({**facts, "progress": progress})


def _of_row(engine: Engine, row: dict[str, Any]) -> CommitView:
    """A commit that has ended, from its row; raises ValueError."""
    promise = Promise.load(row, engine.journal, engine.metrics)
    return CommitView.model_validate(facts_of(promise, None))


async def authorize(request: Request) -> None:
    """Refuse what who asks has no right to, by the VMs that the path is about."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        role = "read"
    else:
        role = "admin" if re.fullmatch("/v1/vms(/[^/]+)?", request.url.path) else "operate"
    if has_everywhere(role):
        return
    for name, value in request.path_params.items():
        if name == "vm":
            require(role, [value])
        elif name in request.app.state.vms_of:
            require(role, await request.app.state.vms_of[name](value))


def create_app(engine: Engine) -> FastAPI:  # noqa: PLR0915  (one table of routes)
    """The API over an engine."""
    app = FastAPI(
        title="qmpcommitd",
        version=qmpcommit.__version__,
        description="Live block commit over QMP, both phases of it, for the VMs of one host.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        license_info={"name": "MIT", "identifier": "MIT"},
        servers=[{"url": "/", "description": "Over its Unix socket, or the port of listen.tcp"}],
        separate_input_output_schemas=False,
        dependencies=[Depends(authorize)],
        generate_unique_id_function=lambda route: route.name,
    )
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.state.engine = engine

    async def vms_of_commit(commit_id: str) -> list[str]:
        vm = (await engine.commit(commit_id)).vm
        if not sees([vm]):
            raise engine.unknown(commit_id)
        return [vm]

    app.state.vms_of = {"commit_id": vms_of_commit}
    app.add_exception_handler(Exception, _on_bug)
    app.add_exception_handler(QmpCommitError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)

    @app.get("/v1/vms", responses={**problems(422), 200: {"model": list[VMView]}}, tags=["vms"])
    async def list_vms(
        request: Request,
        *,
        state: VMState | None = None,
        fields: pages.Fields = None,
        limit: Annotated[int | None, Query(ge=1, le=pages.MOST)] = None,
        after: pages.After = None,
    ) -> Response:
        """All VMs, by name; so many of them, behind one, where it is asked for."""
        chosen = pages.members(fields, VMView)
        found = sorted(
            name
            for name, vm in engine.registry.vms.items()
            if (after is None or name > after) and state in (None, vm.state) and sees(name)
        )
        page = found[:limit]
        parts = [partial(VMView, **_facts_of_vm(engine.registry.vms[name])) for name in page]
        more = len(page) < len(found)
        return await pages.answer(request, parts, chosen, page[-1] if more else None)

    @app.post("/v1/vms", status_code=201, responses=problems(409, 422, body=True), tags=["vms"])
    async def add_vm(new: NewVM) -> VMView:
        """Make a VM known; it stays known across restarts."""
        require("admin", [new.name])
        engine.places.check("monitors", new.qmp)
        return view_vm(await engine.add_vm(new.name, new.qmp, new.connect))

    @app.get("/v1/vms/{vm}", responses=problems(404, 422), tags=["vms"])
    async def get_vm(vm: VMPath) -> VMView:
        """One VM."""
        return view_vm(engine.vm(vm))

    @app.delete("/v1/vms/{vm}", status_code=204, responses=problems(404, 409, 422), tags=["vms"])
    async def remove_vm(vm: VMPath) -> None:
        """Forget a VM that was added; it must have no commits."""
        await engine.remove_vm(vm)

    @app.get(
        "/v1/vms/{vm}/disks",
        responses={**problems(404, 422, 502, 504), 200: {"model": list[Disk]}},
        tags=["vms"],
    )
    async def list_disks(vm: VMPath) -> JSONResponse:
        """The disks of a VM with their backing chains, active layer first."""
        async with engine.registry.use(engine.vm(vm), wait=1.0) as session:
            disks = await session.disks()
        return JSONResponse([disk.model_dump(mode="json") for disk in disks])

    @app.get("/v1/vms/{vm}/jobs", responses=problems(404, 422, 502, 504), tags=["vms"])
    async def list_jobs(vm: VMPath) -> list[JobView]:
        """The block jobs of a VM as QEMU lists them, with the commit that owns each."""
        async with engine.registry.use(engine.vm(vm), wait=1.0) as session:
            jobs = await session.execute("query-block-jobs")
        owners = {promise.job_id: promise.id for promise in engine.live.values()}
        with session.sensible("query-block-jobs"):
            return [
                JobView.model_validate({**job, "commit": owners.get(job["device"])}) for job in jobs
            ]

    @app.get("/v1/vms/{vm}/recycles", responses=problems(404, 502), tags=["vms"])
    async def list_recycles(vm: VMPath) -> list[dict[str, str]]:
        """Fresh overlays that an interrupted recycle of somebody else left open, and what to do."""
        async with engine.registry.use(engine.vm(vm), wait=1.0) as session:
            found = interrupted_recycles(await session.graph(), str(session.address or "QMP"))
        owned = {f"{node_stem(p.job_id)}-top" for p in engine.live.values() if p.vm == vm}
        return [each for each in found if each["node"] not in owned]

    @app.get("/v1/vms/{vm}/owners", responses=problems(404, 422, 502, 504), tags=["vms"])
    async def list_owners(vm: VMPath) -> list[dict[str, Any]]:
        """Disks that somebody works on, this daemon or another process, and who that is."""
        async with engine.registry.use(engine.vm(vm), wait=1.0) as session:
            graph = await session.graph()
        return owners_of(read_disks(graph), graph)

    @app.post(
        "/v1/vms/{vm}/commits",
        status_code=202,
        responses=problems(404, 409, 422, 502, 504, 507, body=True),
        tags=["commits"],
    )
    async def commit(
        vm: VMPath, asked: CommitRequest, response: Response, idempotency_key: Key = None
    ) -> CommitView:
        """Promise a commit. What was answered with 202 is kept, whatever happens to the daemon."""
        promise, again = await engine.take(vm, asked, idempotency_key, fingerprint(vm, asked))
        response.headers["Location"] = f"/v1/commits/{promise.id}"
        if again:
            response.headers["Idempotent-Replay"] = "true"
        return view_commit(engine, promise)

    @app.post(
        "/v1/vms/{vm}/plans",
        responses={**problems(404, 409, 422, 502, 504, 507, body=True), 200: {"model": Plan}},
        tags=["commits"],
    )
    async def plan(vm: VMPath, asked: CommitRequest) -> JSONResponse:
        """What a commit would send, and what its checks find; nothing is sent or promised."""
        made = await engine.plan(engine.vm(vm), asked, check=True)
        return JSONResponse(made.model_dump(mode="json"))

    @app.get(
        "/v1/commits",
        responses={**problems(404, 422), 200: {"model": list[CommitView]}},
        tags=["commits"],
    )
    async def list_commits(page: pages.Asked, state: CommitState | None = None) -> Response:
        """Commits, the newest first: those under way and those that have ended."""
        wanted = [("vm = ?", page.vm), ("disk = ?", page.disk), ("state = ?", state)]
        rows = await page.newest(engine.journal, "commits", CommitView, wanted)
        live = [engine.live[row["id"]] for row in rows if row["id"] in engine.live]
        queued = any(promise.state == "queued" for promise in live)
        waiting = engine.scheduler.waiting if queued else []
        places = {known_as: place for place, known_as in enumerate(waiting, 1)}
        known = {promise.id: facts_of(promise, places.get(promise.id)) for promise in live}
        parts: list[pages.Part] = [
            partial(CommitView.model_validate, known[row["id"]])
            if row["id"] in known
            else partial(_of_row, engine, row)
            for row in rows
        ]
        return await page.answer(parts)

    @app.get("/v1/commits/{commit_id}", responses=problems(404, 422), tags=["commits"])
    async def get_commit(
        commit_id: CommitPath,
        wait: Annotated[float, Query(ge=0, le=25, description="Seconds to wait for its end")] = 0,
        phase: Annotated[
            str | None, Query(max_length=32, description="Wait only until it leaves this phase")
        ] = None,
    ) -> CommitView:
        """One commit, with its progress while it runs, and its outcome or error in the end."""
        promise = await engine.commit(commit_id)
        if wait and not promise.over.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await _until(engine, promise, phase)
        return view_commit(engine, promise, await _progress(promise))

    @app.delete(
        "/v1/commits/{commit_id}",
        status_code=202,
        responses=problems(404, 409, 422),
        tags=["commits"],
    )
    async def cancel_commit(commit_id: CommitPath) -> CommitView:
        """Cancel a commit: one that waits is never begun, one that runs is aborted."""
        return view_commit(engine, await engine.decide(commit_id, "abort"))

    @app.post(
        "/v1/commits/{commit_id}/decision",
        status_code=202,
        responses=problems(404, 409, 422, body=True),
        tags=["commits"],
    )
    async def decide(commit_id: CommitPath, decision: Decision) -> CommitView:
        """Decide the second phase; 409 when the commit is not READY, and it goes on unharmed."""
        return view_commit(engine, await engine.decide(commit_id, decision.action))

    @app.get(
        "/v1/events",
        responses={
            **problems(422),
            200: {"content": {"text/event-stream": {}}, "description": "Server-sent events"},
        },
        response_class=StreamingResponse,
        tags=["events"],
    )
    async def follow(
        last_event_id: Annotated[int | None, Header(ge=0, le=2**62)] = None,
        after: Annotated[int | None, Query(ge=0, le=2**62)] = None,
        vm: Annotated[VMNames, Query(max_length=64, description="Of these VMs only")] = (),
        commit: Annotated[str | None, Query(max_length=64)] = None,
        kind: Annotated[
            tuple[EventKind, ...], Query(max_length=16, description="Of these kinds only")
        ] = (),
    ) -> StreamingResponse:
        """Every change of state, as it becomes durable; resumable with ``Last-Event-ID``.

        The first event is of the kind ``following``: its ``after`` is the id from which the
        stream goes on.
        """
        if len(engine.followers) >= engine.config.limits.followers:
            raise QueueFull("too many follow the events already")
        begin = last_event_id if last_event_id is not None else after
        feed = Feed(engine, begin, vm, commit, kind)
        return StreamingResponse(
            aiter(feed), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    @app.get("/metrics", responses=problems(), response_class=PlainTextResponse, tags=["watching"])
    async def metrics() -> Response:
        """Metrics in Prometheus' text format, of all VMs."""
        if not sees_all():
            raise HTTPException(403, "the metrics are of all VMs, and you may not see all")
        engine.gauge()
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/healthz", responses=problems(), tags=["watching"])
    async def healthz() -> dict[str, Any]:
        """Whether the daemon is alive."""
        now = time.time()
        return {
            "status": "ok", "version": qmpcommit.__version__, "time": now, "time_at": moment(now),
        }  # fmt: skip

    @app.get("/readyz", responses=problems(), tags=["watching"])
    async def readyz() -> Response:
        """Whether the daemon takes commits."""
        reasons = engine.unready()
        if reasons:
            return _problem(503, "NotReadyToServe", "Not available", "; ".join(reasons))
        warnings = [] if engine.journal.loss is None else [told_of(engine.journal.loss)]
        return JSONResponse({"status": "ready", "warnings": warnings})

    return app


def fingerprint(place: str, asked: BaseModel) -> str:
    """What tells two requests apart that have one ``Idempotency-Key``."""
    text = json.dumps([place, asked.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


async def _until(engine: Engine, promise: Promise, phase: str | None) -> None:
    """Wait for its end, or until it has left this phase."""
    if phase is None:
        await promise.over.wait()
        return
    with engine.news_of(promise.id) as news:
        while promise.phase == phase and not promise.over.is_set():
            news.clear()
            await news.wait()


async def _progress(promise: Promise) -> Progress | None:
    job = promise.job
    if job is None or not job.state.running:
        return None
    with suppress(TimeoutError):  # a monitor that hangs
        async with asyncio.timeout(2.0):
            async for seen in job.progress():
                return Progress.model_validate(
                    {name: value for name, value in seen.model_dump().items() if name != "phase"}
                )
    return None
