"""Lists of the API in pages: which rows, which members of each, and where the next page begins.

What a list shows is made by threads of its own: a thousand rows cost the loop next to nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel

from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.rights import sees, sees_all
from qmpcommit.errors import CommitNotFound, InvalidRequest, QmpCommitError

MOST = 1000
"""Rows of one page."""

# Of their own: the loop's threads may all wait for a file on a storage that hangs.
_THREADS = ThreadPoolExecutor(2, "lists")

After = Annotated[
    str | None,
    Query(
        max_length=64,
        pattern="^[0-9A-Za-z._-]+$",
        description="Go on behind this one: the last of the page before, as its Link tells",
    ),
]
Fields = Annotated[
    str | None,
    Query(
        max_length=1024,
        description="Members of each, with commas between; all of them where it is not given",
    ),
]

Wanted = Sequence[tuple[str, Any]]
"""Conditions in SQL, each with its value; one whose value is None is none."""

Part = Callable[[], BaseModel]
"""Makes one of a list; raises ValueError for what another version has written."""


@dataclass
class Page:
    """What is asked of a list, and what it is answered: `vm` and `disk` choose rows."""

    request: Request
    vm: str | None
    disk: str | None
    fields: str | None
    limit: int
    after: str | None
    _chosen: set[str] | None = None
    _next_after: str | None = None

    async def newest(
        self,
        journal: Journal,
        table: str,
        of: type[BaseModel],
        wanted: Wanted,
        *,
        missing: type[QmpCommitError] = CommitNotFound,
    ) -> list[dict[str, Any]]:
        """The newest rows first, of the VMs that who asks may see; `of` is what they are shown as.

        Raises `InvalidRequest` for a member that there is not, `missing` where `after` is known no
        more.
        """
        self._chosen = members(self.fields, of)
        wanted = [each for each in wanted if each[1] is not None]
        known: list[tuple[str, object]] = [("id = ?", self.after)]
        if not sees_all():
            named = await journal.read(f"SELECT DISTINCT vm FROM {table}")
            seen = [each["vm"] for each in named if sees(each["vm"])]
            visible = ("vm IN (SELECT value FROM json_each(?))", json.dumps(seen))
            wanted.append(visible)
            known.append(visible)  # an id that may not be seen does not tell even that it is one
        if self.after is not None:
            behind = f"(created, rowid) < (SELECT created, rowid FROM {table} WHERE id = ?)"
            wanted.append((behind, self.after))
        where = " AND ".join(f"({sql})" for sql, _ in wanted) or "true"
        rows = await journal.read(
            f"SELECT * FROM {table} WHERE {where} ORDER BY created DESC, rowid DESC LIMIT ?",
            *(value for _, value in wanted), self.limit + 1,
        )  # fmt: skip
        there = f"SELECT 1 FROM {table} WHERE {' AND '.join(sql for sql, _ in known)}"
        if self.after is not None and not await journal.read(there, *(value for _, value in known)):
            raise missing(
                f"after: nothing is called '{self.after}' any more; begin with the first page again"
            )
        if len(rows) > self.limit:
            rows = rows[: self.limit]
            self._next_after = rows[-1]["id"]
        return rows

    async def answer(self, parts: Iterable[Part], *, looks: bool = False) -> Response:
        """What `answer` makes of these."""
        return await answer(self.request, parts, self._chosen, self._next_after, looks=looks)


def _page(
    request: Request,
    *,
    vm: Annotated[str | None, Query(max_length=64)] = None,
    disk: Annotated[str | None, Query(max_length=4096, description="As it was asked for")] = None,
    fields: Fields = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 100,
    after: After = None,
) -> Page:
    return Page(request, vm, disk, fields, limit, after)


Asked = Annotated[Page, Depends(_page)]
"""The parameters that each list of what is done has."""


def members(fields: str | None, of: type[BaseModel]) -> set[str] | None:
    """Those that are asked for, None for all; raises `InvalidRequest` for one that there is not."""
    if fields is None:
        return None
    names = fields.split(",")
    for name in names:
        if name not in of.model_fields:
            known = ", ".join(of.model_fields)
            raise InvalidRequest(f"fields: there is no '{name:.80}', but {known}")
    return set(names)


async def answer(
    request: Request,
    parts: Iterable[Part],
    chosen: set[str] | None,
    next_after: str | None = None,
    *,
    looks: bool = False,
) -> Response:
    """A page; `next_after` is the last one in it where there are more.

    `looks` tells that files are looked at, for which the loop's threads are.
    """
    threads = None if looks else _THREADS
    loop = asyncio.get_running_loop()
    body = await loop.run_in_executor(threads, partial(_json, [*parts], chosen))
    headers = {}
    if next_after is not None:
        asked = [each for each in request.query_params.multi_items() if each[0] != "after"]
        query = urlencode([*asked, ("after", next_after)])
        headers["Link"] = f'<{request.url.path}?{query}>; rel="next"'
    return Response(body, media_type="application/json", headers=headers)


def _json(parts: Sequence[Part], chosen: set[str] | None) -> bytes:
    made = []
    for part in parts:
        with suppress(ValueError):  # written by another version
            made.append(part().model_dump_json(include=chosen))
    return f"[{','.join(made)}]".encode()
