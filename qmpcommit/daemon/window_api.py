"""The API's routes for snapshot windows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Annotated

from fastapi import FastAPI, Path, Query, Response

from qmpcommit.daemon import pages
from qmpcommit.daemon.api import Key, VMPath, fingerprint
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.kinds import for_a_while
from qmpcommit.daemon.leased_window import LeasedWindow
from qmpcommit.daemon.openapi import problems
from qmpcommit.daemon.rights import require, sees
from qmpcommit.daemon.windows import Windows
from qmpcommit.errors import WindowNotFound
from qmpcommit.wire.window import (
    Renewal,
    VMWindowRequest,
    WindowRequest,
    WindowState,
    WindowView,
)

WindowPath = Annotated[str, Path(max_length=64, pattern="^[0-9A-Za-z-]+$")]


def routes(  # noqa: PLR0915  (one table of routes)
    app: FastAPI, engine: Engine, windows: Windows
) -> None:
    """Add them to the app."""

    async def vms_of(window_id: str) -> list[str]:
        try:
            vms = (await windows.find(window_id)).vms
        except WindowNotFound:
            orphan = windows.watch.orphan(window_id)
            if orphan is None:
                raise
            vms = [orphan.vm]
        if not sees(vms):
            raise windows.unknown(window_id)
        return vms

    app.state.vms_of["window_id"] = vms_of

    async def check(asked: WindowRequest) -> None:
        vms = [member.vm for member in asked.members]
        require("operate", vms)
        engine.places.check("agents", *asked.agents.values())
        await engine.places.check_overlay_dir(engine.registry, vms, asked.overlay_dir)

    async def opened(
        opening: Awaitable[tuple[LeasedWindow, bool]], response: Response
    ) -> WindowView:
        window, again = await opening
        response.headers["Location"] = f"/v1/windows/{window.id}"
        if again:
            response.headers["Idempotent-Replay"] = "true"
        return await asyncio.to_thread(window.view)

    @app.post(
        "/v1/vms/{vm}/windows",
        status_code=201,
        responses=problems(404, 409, 422, 502, 504, 507, body=True),
        tags=["windows"],
    )
    async def open_window(
        vm: VMPath, asked: VMWindowRequest, response: Response, idempotency_key: Key = None
    ) -> WindowView:
        """Open a window: the disks' files stand still until it is closed, or its lease ends."""
        engine.vm(vm)
        await check(asked.of(vm))
        place = f"windows of {vm}"
        opening = windows.open(asked.of(vm), idempotency_key, fingerprint(place, asked))
        return await opened(opening, response)

    @app.post(
        "/v1/windows",
        status_code=201,
        responses=problems(404, 409, 422, 502, 504, 507, body=True),
        tags=["windows"],
    )
    async def open_group_window(
        asked: WindowRequest, response: Response, idempotency_key: Key = None
    ) -> WindowView:
        """Open a window over disks of several VMs, which all stand still at one instant."""
        await check(asked)
        opening = windows.open(asked, idempotency_key, fingerprint("windows", asked))
        return await opened(opening, response)

    @app.get(
        "/v1/windows",
        responses={**problems(404, 422), 200: {"model": list[WindowView]}},
        tags=["windows"],
    )
    async def list_windows(page: pages.Asked, state: WindowState | None = None) -> Response:
        """Windows, the newest first, ended ones too.

        Before them come those that nobody here opened, of any disk, which `limit` does not count.
        """
        parts: list[pages.Part] = []
        if state in (None, "orphan") and page.after is None:
            await windows.watch.look_again(page.vm)
            parts += [each.view for each in windows.watch.orphans(page.vm) if sees(each.vm)]
        wanted = [*windows.rows_of(page.vm, page.disk), ("state = ?", state)]
        rows = await page.newest(
            engine.journal, "undertakings", WindowView, wanted, missing=WindowNotFound
        )
        for row in rows:
            live = windows.live.get(row["id"])
            parts.append(live.view if live is not None else partial(windows.view_of, row))
        return await page.answer(parts, looks=True)

    @app.get("/v1/windows/{window_id}", responses=problems(404, 422), tags=["windows"])
    async def get_window(
        window_id: WindowPath,
        wait: Annotated[float, Query(ge=0, le=25, description="Seconds to wait for its end")] = 0,
    ) -> WindowView:
        """One window: what stands still, when its lease ends, and how it ended."""
        try:
            window = await windows.find(window_id)
        except WindowNotFound:
            orphan = windows.watch.orphan(window_id)
            if orphan is None:
                raise
            return await asyncio.to_thread(orphan.view)
        if wait:
            await for_a_while(window.over.wait(), wait)
        return await asyncio.to_thread(window.view)

    @app.post(
        "/v1/windows/{window_id}/lease",
        responses=problems(404, 409, 422, body=True),
        tags=["windows"],
    )
    async def renew_lease(window_id: WindowPath, asked: Renewal) -> WindowView:
        """Keep it open for longer: its lease ends so many seconds from now."""
        window = await windows.renew(window_id, asked.seconds)
        return await asyncio.to_thread(window.view)

    @app.delete(
        "/v1/windows/{window_id}",
        status_code=202,
        responses=problems(404, 409, 422),
        tags=["windows"],
    )
    async def close_window(window_id: WindowPath) -> WindowView:
        """Close it: each overlay is committed back, pivoted away from and deleted."""
        return await asyncio.to_thread((await windows.close(window_id)).view)
