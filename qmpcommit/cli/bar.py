"""The live bar of a commit: on a terminal's standard error, and nowhere else."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from qmpcommit.cli.following import take_up
from qmpcommit.cli.show import show_seconds
from qmpcommit.units import show_size

if TYPE_CHECKING:
    from qmpcommit.cli.options import Options
    from qmpcommit.client.job import RemoteJob
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.outcome import JobProgress

EVERY = 0.5
"""Seconds between two looks; the first comes that late too, so a short job is not asked at all."""


class Bar:
    """Draws a job's progress where somebody can see it; rich is imported when this is made."""

    def __init__(self, options: Options, qmp: str) -> None:
        self._options, self._qmp = options, qmp
        self._drawn: Any = None
        if options.quiet or sys.stderr is None or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        facts = Column(overflow="fold")  # what is to be typed is cut on no terminal
        self._drawn = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}", markup=False, table_column=facts),
            console=Console(stderr=True),
            auto_refresh=False,  # no thread: it is drawn when there is news
            transient=True,
        )

    @asynccontextmanager
    async def of(self, job: CommitJob | RemoteJob, title: str) -> AsyncIterator[None]:
        """Draw while in the block, with the disk as the title."""
        if self._drawn is None:
            yield
            return
        drawing = asyncio.create_task(self._draw(job, title))
        try:
            yield
        finally:
            drawing.cancel()
            await asyncio.wait({drawing})
            if not drawing.cancelled():
                drawing.exception()  # a bar that can't be drawn is no reason to fail
            self._drawn.stop()

    async def _draw(self, job: CommitJob | RemoteJob, title: str) -> None:
        await asyncio.sleep(EVERY)
        drawn = self._drawn
        drawn.start()
        task = drawn.add_task(title, total=None, facts="")
        async for now in job.progress(EVERY):
            # QEMU's total grows while the guest writes, so it is the bytes left that tell.
            drawn.update(
                task,
                completed=now.current,
                total=max(now.total, 1),
                facts=self._facts(job, now),
                refresh=True,
            )

    def _facts(self, job: CommitJob | RemoteJob, now: JobProgress) -> str:
        left = max(0, now.total - now.current)
        if now.phase == "ready":
            return f"READY ({take_up(self._options, self._qmp, job.id)})"
        if now.phase == "queued":
            return "queued"
        facts = f"{show_size(now.current)} of {show_size(now.total)}"
        if now.phase == "copying" and now.bandwidth > 0:
            facts += f", {show_size(now.bandwidth)}/s, {show_seconds(left / now.bandwidth)} to go"
        elif now.status in ("paused", "standby"):
            facts += ", paused"
        elif now.phase == "decided":
            facts += ", ending"
        return facts
