"""The API's routes for cycles."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query, Response

from qmpcommit.daemon.api import CommitPath, Key, VMPath, fingerprint
from qmpcommit.daemon.cycles import Cycles
from qmpcommit.daemon.kinds import for_a_while
from qmpcommit.daemon.openapi import problems
from qmpcommit.daemon.rights import require, sees
from qmpcommit.wire.cycle import CycleView, RoundRequest, RoundView


def routes(app: FastAPI, cycles: Cycles) -> None:
    """Add them to the app."""

    async def vms_of(round_id: str) -> list[str]:
        vms = (await cycles.find(round_id)).vms
        if not sees(vms):
            raise cycles.unknown(round_id)
        return vms

    app.state.vms_of["round_id"] = vms_of

    @app.get("/v1/cycles", responses=problems(), tags=["cycles"])
    async def list_cycles() -> list[CycleView]:
        """The cycles of the configuration: their next, running and last rounds."""
        return [each for each in await cycles.views() if sees(vm for vm, _ in each.cycle.disks)]

    @app.get("/v1/cycles/{round_id}", responses=problems(404, 422), tags=["cycles"])
    async def get_round(
        round_id: CommitPath,
        wait: Annotated[float, Query(ge=0, le=25, description="Seconds to wait for its end")] = 0,
    ) -> RoundView:
        """One round of a cycle, and its result or error in the end."""
        found = await cycles.find(round_id)
        if wait:
            await for_a_while(found.over.wait(), wait)
        return found.view()

    @app.post(
        "/v1/vms/{vm}/cycles",
        status_code=202,
        responses=problems(404, 409, 422, body=True),
        tags=["cycles"],
    )
    async def run_round(
        vm: VMPath, asked: RoundRequest, response: Response, idempotency_key: Key = None
    ) -> RoundView:
        """Run one round of a cycle now; 409 while one is under way."""
        require("operate", cycles.vms_of(vm, asked.disk))
        made = await cycles.ask(
            vm, asked.disk, idempotency_key, fingerprint(f"cycles of {vm}", asked)
        )
        response.headers["Location"] = f"/v1/cycles/{made.id}"
        return made.view()
