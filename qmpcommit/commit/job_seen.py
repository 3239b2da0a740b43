"""From what QEMU answers when asked to the facts about one job, and where its disk stands."""

from __future__ import annotations

import asyncio
from typing import Any

from qmpcommit.block.chain import Disk, find_again, read_disks
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.commit.facts import Answered, GraphRead, JobSeen, Where
from qmpcommit.commit.outcome import UsedBy
from qmpcommit.commit.plan import Plan
from qmpcommit.qmp.monitor import Monitor

OWNERS = 3.0
"""Seconds that the owner of a job gets to finalize it, while its disk is held in PENDING."""


FRESH = 1.0
"""Seconds for which the block graph that showed a job's end is one of now."""


class Seeing:
    """Asks for one job; `disk` is its disk when the end was read back, `used_by` who used it then.

    `auto_finalize` tells that QEMU ends it by itself when it is PENDING, `followed` that its owner
    does.
    """

    def __init__(
        self, monitor: Monitor, plan: Plan, *, auto_finalize: bool, followed: bool
    ) -> None:
        self.disk: Disk | None = None
        self.used_by: UsedBy = ""
        self._monitor, self._plan = monitor, plan
        self._auto_finalize, self._followed = auto_finalize, followed
        self._pending_since: float | None = None
        self._read: tuple[BlockGraph, float] | None = None  # what showed its end, and when

    async def job(self) -> JobSeen | None:
        """The job as QEMU lists it now (``query-jobs``), and whether storage makes it wait."""
        id_, done, total, query = "id", "current-progress", "total-progress", "query-jobs"
        if self._plan.stalls:
            id_, done, total, query = "device", "offset", "len", "query-block-jobs"
        with self._monitor.sensible(query):
            jobs: list[dict[str, Any]] = await self._monitor.execute(query)
            for job in jobs:
                if job.get(id_) != self._plan.job_id:
                    continue
                return JobSeen(
                    status=str(job.get("status")),
                    done=int(job.get(done, 0)),
                    total=int(job.get(total, 0)),
                    error=job.get("error"),
                    auto_finalize=self._is_finalized_by_others(str(job.get("status"))),
                    io_status=str(job.get("io-status", "ok")),
                )
        return None

    def _is_finalized_by_others(self, status: str) -> bool:
        """Whether a PENDING job goes on without us: QEMU ends it, or its owner, who may hang."""
        if not self._followed:
            return self._auto_finalize
        now = asyncio.get_running_loop().time()
        if status != "pending" or self._pending_since is None:
            self._pending_since = now if status == "pending" else None
            return True
        return now - self._pending_since < OWNERS

    async def answer(self) -> Answered:
        """The same as a fact."""
        return Answered(await self.job())

    async def read_back(self) -> GraphRead:
        """Where its disk stands now, after its end (``query-named-block-nodes`` and others)."""
        read_at = asyncio.get_running_loop().time()
        graph = await read_graph(self._monitor)
        self._read = graph, read_at
        with self._monitor.sensible("the queries of its block graph"):
            disks = read_disks(graph)
        self.disk = now = find_again(disks, self._plan.disk)
        self.used_by = _user_of(now, private=getattr(self._monitor, "private", False))
        # Another client's job may have a filter as its base: the layer is what is below it.
        base = self._plan.base.node_name
        return GraphRead(self._locate(graph.below_filters(base) or base))

    @property
    def graph_of_now(self) -> BlockGraph | None:
        """The block graph that showed the end, while nobody has had the time to change it."""
        graph, at = self._read or (None, 0.0)
        return graph if asyncio.get_running_loop().time() - at < FRESH else None

    def _locate(self, base: str) -> Where:
        """Where the disk stands now, compared with the plan."""
        now, top = self.disk, self._plan.top.node_name
        if now is None or now.active is None or not base:
            idle = _user_of(self._plan.disk, private=False) == "nothing"
            return Where.IDLE if idle else Where.UNUSED
        layers = [image.node_name for image in now.chain]
        if top in layers:  # others may have laid an overlay over it since
            return Where.TOP
        if base not in layers:
            return Where.OTHER
        return Where.BASE if self._plan.two_phase else Where.MERGED


def _user_of(disk: Disk | None, *, private: bool) -> UsedBy:
    """Who uses a disk, as the block graph shows it; what is `private` nobody else can reach."""
    if disk is not None and disk.qdev:
        return "guest"
    return "export" if disk is not None and disk.exports and not private else "nothing"
