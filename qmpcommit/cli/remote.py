"""``--daemon``: the same commands, done by the daemon, and followed from here."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast

from qmpcommit.cli.bar import Bar
from qmpcommit.cli.commit import committed, keys_of, tell_of_stall
from qmpcommit.cli.decide import decided, waited
from qmpcommit.cli.following import Following, take_up
from qmpcommit.cli.options import Answer, Interrupted, Options
from qmpcommit.cli.running import Run
from qmpcommit.client.host import Client
from qmpcommit.client.job import RemoteJob
from qmpcommit.client.vm import RemoteVM
from qmpcommit.commit.job import GRACE
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.errors import (
    DaemonLost,
    InvalidRequest,
    JobNotFound,
    QmpCommitError,
)
from qmpcommit.tasks import stop


@asynccontextmanager
async def reach(options: Options, name: str) -> AsyncIterator[RemoteVM]:
    """The VM that the daemon calls so."""
    async with connect(options) as host:
        yield host.vm(name)


def connect(options: Options) -> Client:
    """The daemon's client, which connects when it is entered."""
    assert options.daemon is not None
    return Client(options.daemon, token=_token())


def _token() -> str | None:
    path = os.environ.get("QMPCOMMIT_TOKEN_FILE")
    if not path:
        return None
    try:
        return Path(path).read_text("ascii").strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no ASCII text"
        raise InvalidRequest(f"the token file {path} can't be read: {why}") from None


async def commit(
    running: Run, name: str, request: dict[str, Any], *, detach: bool = False
) -> Answer:
    """``qmpcommit --daemon commit``."""
    bar = Bar(running.options, name)
    async with reach(running.options, name) as vm:
        foreground = RemoteForeground(running, vm)
        job = await foreground.begin(request)
        if detach:
            return _left(running, name, job)
        async with bar.of(job, job.disk, keys_of(running.options, request["policy"], job)):
            outcome = await foreground.finish(job)
    return committed(running, request["policy"], outcome)


def _left(running: Run, name: str, job: RemoteJob) -> Answer:
    """What is said of a commit that is left with the daemon, which does all that was asked."""
    on = f"{running.options.program} wait {shlex.quote(name)} {job.id}"
    data = {"vm": job.vm, "disk": job.disk, "job_id": job.job_id, "id": job.id, "next": on}
    return Answer(
        {**data, "phase": job.phase},
        f"commit {job.id} of {job.disk} is with the daemon, which does all that was asked of it."
        f" '{on}' waits for its end",
        quiet=running.options.quiet,
    )


async def decide(
    running: Run,
    choice: str,
    name: str,
    job_id: str,
    *,
    asked: dict[str, Any] | None = None,
    waits: bool = False,
) -> Answer:
    """``qmpcommit --daemon pivot|keep|abort``: a commit of the daemon's, or one to be adopted.

    `asked` is what goes around the pivot of one to be adopted; it is refused for the daemon's.
    """
    kind = cast(Literal["pivot", "keep", "abort"], choice)
    async with reach(running.options, name) as vm:
        foreground = RemoteForeground(running, vm, adopted=True)
        try:
            job = await vm.job(job_id)
        except JobNotFound:
            job = await vm.adopt(job_id, kind, wait=waits, **(asked or {}))
            outcome = await foreground.finish(job)
        else:
            if asked:
                raise InvalidRequest(
                    "--stale, --on-pivot and --no-bitmaps are asked for with the"
                    " daemon's commit itself, and done by it. Nothing was decided",
                    vm=name,
                    job_id=job_id,
                )
            if waits:
                await job.ready()
            outcome = await foreground.finish(job, choice)
    return decided(running, choice, outcome)


async def wait(running: Run, name: str, job_id: str, until: str) -> Answer:
    """``qmpcommit --daemon wait``."""
    async with reach(running.options, name) as vm:
        foreground = RemoteForeground(running, vm, adopted=True)
        try:
            job = await vm.job(job_id)
        except JobNotFound:
            if any(each.get("device") == job_id for each in await vm.jobs()):
                raise _not_the_daemons(running, name, job_id) from None
            raise
        if until == "ready":
            await job.ready()
            if not job.done:
                return left_at_ready(running, name, job)
        outcome = await foreground.finish(job)
    return waited(running, outcome)


def _not_the_daemons(running: Run, name: str, job_id: str) -> InvalidRequest:
    """Why nobody waits here for a job that others have begun and others will decide."""
    on = f"{running.options.program} wait {shlex.quote(name)} {shlex.quote(job_id)} --then pivot"
    return InvalidRequest(
        f"job {job_id} of {name} is not the daemon's, which answers for the end of commits of its"
        f" own alone, and takes one over only with the word how it is to end: '{on}' (or --then"
        " keep). To wait and decide nothing, name the VM's monitor instead: 'qmpcommit wait QMP"
        f" {shlex.quote(job_id)}'. Nothing was done",
        vm=name,
        job_id=job_id,
    )


def left_at_ready(running: Run, name: str, job: RemoteJob) -> Answer:
    """What is said of a commit that is READY, and left so."""
    on = take_up(running.options, name, job.id)
    data = {"vm": job.vm, "disk": job.disk, "job_id": job.job_id, "id": job.id, "next": on}
    return Answer(
        {**data, "phase": job.phase},
        f"commit {job.id} of {job.disk} is READY, and stays so until it is decided: '{on}'",
        quiet=running.options.quiet,
    )


class RemoteForeground(Following):
    """Follows one commit of the daemon.

    A first Ctrl-C has the daemon abort the commit, or waits for its end where that was decided
    here; a second one leaves it with the daemon.
    """

    def __init__(self, run: Run, vm: RemoteVM, *, adopted: bool = False) -> None:
        super().__init__(run, vm.name, adopted=adopted)
        self._vm = vm
        self._following: RemoteJob | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._unheard = False

    def _signal(self, times: int) -> None:
        if self._following is None:
            if self._adopted or times > 1:
                self._run.cancel()
            return  # else it is aborted when it is known which
        if times == 1:
            if not self._adopted:
                self._beside(self._abort(self._following))
            if sys.stderr.isatty() and not self._run.options.quiet:
                doing = "ending" if self._adopted else "cancelling"
                sys.stderr.write(f"\r{doing} the job; Ctrl-C again leaves it to the daemon\n")
        elif times > 1:
            self._leave(self._following, "interrupted")

    def _deadline(self) -> None:
        if self._following is None:
            self._run.cancel()
        elif self._adopted:
            self._leave(self._following, "deadline")
        else:
            self._beside(self._too_late(self._following))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abort(self, job: RemoteJob) -> None:
        with suppress(QmpCommitError):  # it was decided, or has ended: the waiting tells
            await self._decide(job, "abort")

    async def _too_late(self, job: RemoteJob) -> None:
        """The daemon has the same deadline; where it does not keep it, we leave."""
        await asyncio.sleep(GRACE)
        self._leave(job, "deadline")

    async def begin(self, request: dict[str, Any]) -> RemoteJob:
        """Have a commit promised; raises what `RemoteVM.commit` raises, and `Interrupted`."""
        try:
            job = await self._vm.commit(**request, timeout=self._run.remaining)
        except asyncio.CancelledError as cancelled:
            why = "nothing is left of it"
            if isinstance(cancelled.__cause__, QmpCommitError):
                why = str(cancelled.__cause__)
            if self._run.timed_out:
                raise self._run.too_late(f"the daemon did not promise it ({why})") from None
            raise Interrupted(f"interrupted before the daemon had promised it; {why}") from None
        self._following = job
        if self._run.signals:
            self._beside(self._abort(job))
        if request.get("on_error") in ("stop", "enospc") and not self._silent:
            self._beside(self._tell_of_stalls(job))
        return job

    @property
    def _silent(self) -> bool:
        return self._run.options.quiet or self._run.options.as_json

    async def _tell_of_stalls(self, job: RemoteJob) -> None:
        with suppress(QmpCommitError):
            async with self._vm.client.events(commit=job.id) as events:
                async for event in events:
                    if "stalled" in event.data:
                        tell_of_stall(str(event.data["stalled"]))

    async def finish(self, job: RemoteJob, choice: str | None = None) -> CommitOutcome:
        """Decide, where there is a choice, and wait for the outcome.

        Raises what `RemoteJob.decide` and `RemoteJob.wait` raise, and `Interrupted`.
        """
        self._following = job
        try:
            if choice is not None:
                await self._decide(job, choice)
            return await self._end(job, job.disk)
        except DaemonLost as error:
            raise DaemonLost(
                f"{error}. Take it up again with '{self._take_up(job.id)}'", **error.facts
            ) from None
        finally:
            for task in list(self._tasks):
                await stop(task)

    async def _decide(self, job: RemoteJob, choice: str) -> None:
        self._unheard = True
        try:
            await job.decide(cast(Literal["pivot", "keep", "abort"], choice))
        except DaemonLost:
            if self._left is None:
                raise
        else:
            self._unheard = False

    def _take_up(self, commit_id: str) -> str:
        return take_up(self._run.options, self._vm.name, commit_id)

    def _goes_on(self, job_id: str) -> str:
        doing, unheard = "which goes on with it", ""
        if self._run.signals and not self._adopted:
            doing = "which was told to abort it"
        if self._unheard:
            unheard = " It has not answered yet to what was decided, and perhaps does it."
        name = shlex.quote(self._vm.name)
        return (
            f"Commit {job_id} is left with the daemon, {doing}.{unheard} Take it up"
            f" again with '{self._take_up(job_id)}', and see '{self._run.options.program} jobs"
            f" {name}'"
        )
