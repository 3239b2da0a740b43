"""The API's routes for cycles."""

from __future__ import annotations

from fastapi import FastAPI, Response

from qmpcommit.daemon.api import CommitPath, Key, VMPath, fingerprint
from qmpcommit.daemon.cycle_models import CycleView, RoundRequest, RoundView
from qmpcommit.daemon.cycles import Cycles
from qmpcommit.daemon.openapi import problems


def routes(app: FastAPI, cycles: Cycles) -> None:
    """Add them to the app."""

    @app.get("/v1/cycles", responses=problems(), tags=["cycles"])
    async def list_cycles() -> list[CycleView]:
        """The cycles of the configuration: their next, running and last rounds."""
        return await cycles.views()

    @app.get("/v1/cycles/{round_id}", responses=problems(404, 422), tags=["cycles"])
    async def get_round(round_id: CommitPath) -> RoundView:
        """One round of a cycle."""
        return (await cycles.round(round_id)).view()

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
        made = await cycles.ask(
            vm, asked.disk, idempotency_key, fingerprint(f"cycles of {vm}", asked)
        )
        response.headers["Location"] = f"/v1/cycles/{made.id}"
        return made.view()
