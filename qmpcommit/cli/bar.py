"""Progress on standard error: a live bar on a terminal, lines where they are asked for."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from qmpcommit.cli.following import take_up
from qmpcommit.cli.show import show_seconds
from qmpcommit.cli.telling import echo, one_line
from qmpcommit.units import show_size

if TYPE_CHECKING:
    from qmpcommit.cli.asking import Keys
    from qmpcommit.cli.options import Options
    from qmpcommit.client.job import RemoteJob
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.outcome import JobProgress
    from qmpcommit.session import Session

    Job = CommitJob | RemoteJob

EVERY = 0.5
"""Seconds between two looks; the first comes that late too, so a short job is not asked at all."""

LINES = 5.0
"""Seconds between two lines about a job that goes on as it did."""

_AS_QEMU = {"copying": "running", "ready": "ready"}
"""What QEMU calls a phase, of which a daemon tells its own word."""


class Bar:
    """Draws jobs' progress where somebody can see it; rich is imported when this is made.

    `ready` is what stands beside a job that waits for its decision; by default how it is taken up.
    """

    def __init__(self, options: Options, qmp: str, *, ready: str | None = None) -> None:
        from qmpcommit.commit.rates import Rates

        self._options, self._qmp, self._ready = options, qmp, ready
        self._how = how(options)
        self._hints: dict[str, str] = {}
        self._rates = Rates()
        self._drawn: Any = None
        if self._how != "bar":
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
    async def of(self, job: Job, title: str, keys: Keys | None = None) -> AsyncIterator[None]:
        """Draw while in the block, with the disk as the title; `keys` decide at READY."""
        if self._how == "none":
            yield
            return
        drawing = asyncio.create_task(self._draw(job, title, keys))
        try:
            yield
        finally:
            try:
                await self._end([drawing])
            finally:
                if keys is not None:
                    await keys.end()

    @asynccontextmanager
    async def of_all(self, vms: Collection[Session]) -> AsyncIterator[None]:
        """The same of whatever commits run on these VMs while in the block."""
        if self._how == "none":
            yield
            return
        drawing: dict[Job, asyncio.Task[None]] = {}
        looking = asyncio.create_task(self._look(vms, drawing))
        try:
            yield
        finally:
            await self._end([looking])
            await self._end(drawing.values())

    @asynccontextmanager
    async def of_found(
        self, find: Callable[[], Awaitable[Iterable[tuple[Job, str]]]]
    ) -> AsyncIterator[None]:
        """The same of jobs, with their titles, that are looked for when something is drawn."""
        if self._how == "none":
            yield
            return
        drawing: list[asyncio.Task[None]] = []

        async def look() -> None:
            await asyncio.sleep(EVERY)
            for job, title in await find():
                drawing.append(asyncio.create_task(self._draw(job, title)))

        looking = asyncio.create_task(look())
        try:
            yield
        finally:
            await self._end([looking])
            await self._end(drawing)

    async def _look(self, vms: Collection[Session], drawing: dict[Job, asyncio.Task[None]]) -> None:
        while True:
            for vm in vms:
                for job in vm.jobs:
                    if job not in drawing:
                        disk = job.plan.disk.name
                        title = disk if len(vms) == 1 else f"{vm.name} {disk}"
                        drawing[job] = asyncio.create_task(self._draw(job, title))
            await asyncio.sleep(EVERY)

    async def _end(self, tasks: Collection[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # a bar that can't be drawn is no reason to fail
        if self._drawn is not None:
            self._drawn.stop()

    async def _draw(self, job: Job, title: str, keys: Keys | None = None) -> None:
        await asyncio.sleep(EVERY)
        clock = asyncio.get_running_loop().time
        said: tuple[str, float] = "", 0.0
        task: Any = None
        async for now in job.progress(EVERY):
            if now.phase == "ready" and self._ready is None and job.id not in self._hints:
                self._hints[job.id] = await asyncio.to_thread(self._hint, job)
            facts = told = self._facts(job, now, clock())
            asks = keys is not None and now.phase == "ready"
            if keys is not None and asks:
                facts += f": {keys.text}"
            if self._drawn is None:
                if now.phase != said[0] or clock() - said[1] >= LINES:
                    said = now.phase, clock()
                    echo(f"qmpcommit: {title}: {facts}", err=True)
                continue
            if task is None:
                self._drawn.start()
                task = self._drawn.add_task(one_line(title), total=None, facts="")
            if keys is not None and asks:
                keys.begin(partial(self._ask, task, told, keys))
            # QEMU's total grows while the guest writes, so it is the bytes left that tell.
            self._drawn.update(
                task,
                completed=now.current,
                total=max(now.total, 1),
                facts=one_line(facts),
                refresh=True,
            )
        if task is not None:
            self._drawn.remove_task(task)

    def _ask(self, task: Any, told: str, keys: Keys) -> None:
        self._drawn.update(task, facts=one_line(f"{told}: {keys.text}"), refresh=True)

    def _hint(self, job: Job) -> str:
        """How the job is taken up meanwhile: over a monitor that is not the one held here.

        Looks at the host's processes.
        """
        if self._options.daemon is not None:
            return take_up(self._options, self._qmp, job.id)
        from qmpcommit.recovery.monitors import others_of

        return take_up(self._options, (others_of(self._qmp) or [self._qmp])[0], job.id)

    def _facts(self, job: Job, now: JobProgress, at: float) -> str:
        from qmpcommit.commit.rates import percent

        status = now.status or _AS_QEMU.get(now.phase, now.phase)
        pace = self._rates.look(
            job.id, at, status=status, current=now.current, total=now.total, speed=_limit(job)
        )
        if now.phase == "ready":
            age = f" for {show_seconds(pace.ready_for)}" if pace.ready_for else ""
            return f"READY ({self._ready or self._hints.get(job.id)}){age}"
        if now.phase == "queued":
            return "queued"
        done = percent(now.current, now.total, status)
        facts = f"{done:g}%, " if done is not None else ""
        facts += f"{show_size(now.current)} of {show_size(now.total)}"
        if now.phase == "copying" and pace.eta is not None:
            facts += f", {show_size(pace.rate)}/s" if pace.rate else ""
            facts += f", {show_seconds(pace.eta)} to go"
        elif now.status in ("paused", "standby"):
            facts += ", paused"
        elif now.phase == "decided":
            facts += ", ending"
        return facts


def _limit(job: Job) -> int:
    """The rate that it was begun with, at most."""
    plan = getattr(job, "plan", None)
    asked = plan.arguments.get("speed") if plan is not None else job.view.bandwidth  # type: ignore[union-attr]
    return int(asked or 0)


def how(options: Options) -> str:
    """Whether progress is a "bar", "plain" lines or "none"; no bar is where no terminal is."""
    if options.quiet or sys.stderr is None:
        return "none"
    drawn = sys.stderr.isatty()
    asked = options.progress or ("bar" if drawn else "none")
    return "plain" if asked == "bar" and not drawn else asked
