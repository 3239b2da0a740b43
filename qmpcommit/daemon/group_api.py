"""The API's routes for groups: disks that are committed at one instant."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import FastAPI, Path, Query, Response

from qmpcommit.daemon import pages
from qmpcommit.daemon.api import Key, fingerprint
from qmpcommit.daemon.groups import Groups
from qmpcommit.daemon.kinds import for_a_while
from qmpcommit.daemon.openapi import problems
from qmpcommit.daemon.promised_group import Group
from qmpcommit.daemon.rights import require, sees
from qmpcommit.wire.commit import CommitState, Decision
from qmpcommit.wire.group import GroupRequest, GroupView

GroupPath = Annotated[str, Path(max_length=64, pattern="^[0-9a-f]+$")]


def routes(app: FastAPI, groups: Groups) -> None:
    """Add them to the app."""

    async def vms_of(group_id: str) -> list[str]:
        vms = [member.vm for member in (await groups.find(group_id)).members]
        if not sees(vms):
            raise groups.unknown(group_id)
        return vms

    app.state.vms_of["group_id"] = vms_of
    places = app.state.engine.places

    def view(group: Group) -> GroupView:
        return GroupView.model_validate(groups.facts_of(group))

    @app.post(
        "/v1/groups",
        status_code=202,
        responses=problems(404, 409, 422, 502, 504, 507, body=True),
        tags=["groups"],
    )
    async def commit_group(
        asked: GroupRequest, response: Response, idempotency_key: Key = None
    ) -> GroupView:
        """Promise to commit disks at one instant: all of them or none, whatever happens."""
        vms = [member.vm for member in asked.members]
        require("operate", vms)
        places.check("agents", *asked.sockets(vms).values())
        group, again = await groups.take(asked, idempotency_key, fingerprint("groups", asked))
        response.headers["Location"] = f"/v1/groups/{group.id}"
        if again:
            response.headers["Idempotent-Replay"] = "true"
        return view(group)

    @app.get(
        "/v1/groups",
        responses={**problems(404, 422), 200: {"model": list[GroupView]}},
        tags=["groups"],
    )
    async def list_groups(page: pages.Asked, state: CommitState | None = None) -> Response:
        """Groups, the newest first: those under way and those that have ended."""
        wanted = [*groups.rows_of(page.vm, page.disk), ("state = ?", state)]
        rows = await page.newest(app.state.engine.journal, "undertakings", GroupView, wanted)
        live = {row["id"]: groups.live[row["id"]] for row in rows if row["id"] in groups.live}
        known = {name: groups.facts_of(group) for name, group in live.items()}
        commits = await groups.members_of([row["id"] for row in rows if row["id"] not in live])
        parts: list[pages.Part] = [
            partial(GroupView.model_validate, known[row["id"]])
            if row["id"] in known
            else partial(groups.view_of, row, commits.get(row["id"], []))
            for row in rows
        ]
        return await page.answer(parts)

    @app.get("/v1/groups/{group_id}", responses=problems(404, 422), tags=["groups"])
    async def get_group(
        group_id: GroupPath,
        wait: Annotated[float, Query(ge=0, le=25, description="Seconds to wait for its end")] = 0,
    ) -> GroupView:
        """One group, and its outcome or error in the end."""
        group = await groups.find(group_id)
        if wait:
            await for_a_while(group.over.wait(), wait)
        return view(group)

    @app.delete(
        "/v1/groups/{group_id}", status_code=202, responses=problems(404, 409, 422), tags=["groups"]
    )
    async def cancel_group(group_id: GroupPath) -> GroupView:
        """Cancel all of a group; 409 when it is being finalized already."""
        return view(await groups.decide(group_id, "abort"))

    @app.post(
        "/v1/groups/{group_id}/decision",
        status_code=202,
        responses=problems(404, 409, 422, body=True),
        tags=["groups"],
    )
    async def decide_group(group_id: GroupPath, decision: Decision) -> GroupView:
        """Decide for all; 409 when not all are READY, and the group goes on unharmed."""
        return view(await groups.decide(group_id, decision.action))
