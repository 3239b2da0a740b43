"""The API's routes for the rules of the configuration."""

from __future__ import annotations

from fastapi import FastAPI

from qmpcommit.daemon.openapi import problems
from qmpcommit.daemon.rules import Rules
from qmpcommit.wire.rules import RuleView


def routes(app: FastAPI, rules: Rules) -> None:
    """Add them to the app."""

    @app.get("/v1/rules", responses=problems(), tags=["rules"])
    async def list_rules() -> list[RuleView]:
        """The flatten rules: what each saw last, what came of it, and when it looks again."""
        return [standing.view() for standing in rules.standing]
