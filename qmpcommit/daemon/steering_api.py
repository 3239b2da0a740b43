"""The API's routes for what is done at once: a job that is steered, overlays that are laid."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from qmpcommit.commit.steering import JobNow
from qmpcommit.daemon.adopting import JobPath
from qmpcommit.daemon.api import VMPath
from qmpcommit.daemon.openapi import problems
from qmpcommit.tasks import to_the_end
from qmpcommit.window.overlays import Snapshot
from qmpcommit.wire.steering import OverlaysRequest, Steering

if TYPE_CHECKING:
    from qmpcommit.daemon.engine import Engine
    from qmpcommit.session import Session


def routes(app: FastAPI, engine: Engine) -> None:
    """Add them to the app."""

    @app.post(
        "/v1/vms/{vm}/jobs/{job}/steering",
        responses={**problems(404, 409, 422, 502, 504, body=True), 200: {"model": JobNow}},
        tags=["vms"],
    )
    async def steer(vm: VMPath, job: JobPath, asked: Steering) -> JSONResponse:
        """Pause a block job, have it go on, or change its speed; safe to repeat.

        Whoever began it. The speed of a commit of the daemon's own is set anew where it shares its
        storage's bandwidth with others that begin or end.
        """
        async with engine.registry.use(engine.vm(vm), wait=1.0) as session:
            now = await to_the_end(_steered(session, job, asked))
        return JSONResponse(now.model_dump(mode="json"))

    @app.post(
        "/v1/vms/{vm}/overlays",
        status_code=201,
        responses={
            **problems(404, 409, 422, 502, 504, 507, body=True),
            201: {"model": Snapshot},
        },
        tags=["vms"],
    )
    async def lay(vm: VMPath, asked: OverlaysRequest) -> JSONResponse:
        """Lay fresh overlays over disks, which stay: all at one instant, or none.

        Not safe to repeat after a lost answer: look at the chains before.
        """
        places, known = engine.places, engine.vm(vm)
        if asked.agent is not None:
            places.check("agents", asked.agent)
        folder = asked.overlay
        if folder is not None and not await asyncio.to_thread(os.path.isdir, folder):
            folder = os.path.dirname(folder)
        await places.check_overlay_dir(engine.registry, [vm], folder)
        async with engine.registry.use(known, wait=1.0) as session:
            laid = await to_the_end(
                session.overlay(
                    asked.disks,
                    overlay=asked.overlay,
                    overlay_options=asked.overlay_options,
                    overlay_secret=asked.overlay_secret,
                    freeze=asked.freeze,
                    agents=asked.agent,
                )
            )
        return JSONResponse(laid.model_dump(mode="json"), status_code=201)


async def _steered(session: Session, job: str, asked: Steering) -> JobNow:
    if asked.action == "speed":
        return await session.set_bandwidth(job, asked.bandwidth or 0)
    return await (session.pause_job if asked.action == "pause" else session.resume_job)(job)
