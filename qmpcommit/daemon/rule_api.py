"""The API's routes for the rules of the configuration."""

from __future__ import annotations

from fastapi import FastAPI

from qmpcommit.daemon.openapi import problems
from qmpcommit.daemon.rights import sees
from qmpcommit.daemon.rules import Rules
from qmpcommit.wire.rules import RuleView


def routes(app: FastAPI, rules: Rules) -> None:
    """Add them to the app."""

    @app.get("/v1/rules", responses=problems(), tags=["rules"])
    async def list_rules() -> list[RuleView]:
        """The flatten rules: what each saw last, what came of it, and when it looks again."""
        return [_seen(standing.view()) for standing in rules.standing]


def _seen(view: RuleView) -> RuleView:
    """What of it who asks may see."""
    disks = [disk for disk in view.disks if sees(disk.vm)]
    away = {vm: why for vm, why in view.away.items() if sees(vm)}
    told = view.last_result if len(disks) + len(away) == len(view.disks) + len(view.away) else None
    return view.model_copy(update={"disks": disks, "away": away, "last_result": told})
