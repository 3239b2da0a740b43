"""A storage daemon, a guest that writes over NBD, and the commits that are made under it."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import qmpcommit as qc
from tests.ground.images import Chain, create, read, run
from tests.ground.machines import Machine, storage_daemon
from tests.ground.nbd import Nbd
from tests.ground.qemu import QEMU
from tests.model.layers import CLUSTER, Layer, Layers

CLUSTERS = 384
"""Clusters of the disk: 24 MiB, since a speed limit is felt beyond 16 MiB."""

DEPTH = 5
PATIENCE = 60
EXPECTED = "valid only under|the job was paused|found before it began, size"
"""What an outcome may warn of here."""

SLOW = CLUSTER
"""Bytes per second that keep a large commit from its end."""

End = Literal["pivot", "keep", "abort"]


@dataclass
class InFlight:
    """A commit that has begun; `seen` is what the guest has written meanwhile."""

    job: Any
    base: int
    top: int
    seen: dict[int, set[int]] = field(default_factory=dict)
    decided: bool = False
    """By a decision of ours, after which the guest wrote nothing."""


class World:
    """One example. Each operation that makes no sense at the moment does nothing.

    `faulty` has the base's disk refuse one write.
    """

    def __init__(self, *, layers: int = 2, faulty: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qc-", dir="/dev/shm"))
        self.recipe: list[str] = [f"World(layers={layers}, faulty={faulty})"]
        self.done: Counter[str] = Counter()
        self.faulty = self.broken = faulty
        self._numbers = iter(range(10**6))
        self._value = 0
        self.layers = Layers([self._image(None) for _ in range(1)])
        for _ in range(layers - 1):
            self.layers.chain.append(self._image(self.layers.active))
        self.flight: InFlight | None = None
        self._stack = AsyncExitStack()
        self.daemon: Machine
        self.guest: Nbd
        self.vm: qc.Session

    def _image(self, below: Layer | None) -> Layer:
        path = self.folder / f"l{next(self._numbers)}.qcow2"
        clusters = below.clusters if below is not None else CLUSTERS
        backing = below.path if below is not None else None
        create(path, clusters * CLUSTER, backing=backing, unopened=backing is not None)
        return Layer(path, clusters)

    async def __aenter__(self) -> World:
        await self._start()
        below: Layer | None = None
        for layer in self.layers.chain:
            file: dict[str, Any] = {"driver": "file", "filename": str(layer.path)}
            if self.faulty and below is None:
                fault = {"event": "write_aio", "errno": 28, "once": True}
                file = {"driver": "blkdebug", "image": file, "inject-error": [fault]}
            node = {"driver": "qcow2", "node-name": layer.node, "file": file}
            backing = {"backing": below.node} if below is not None else {}
            await self.vm.execute("blockdev-add", {**node, **backing})
            below = layer
        address = {"type": "unix", "data": {"path": self.daemon.nbd}}
        await self.vm.execute("nbd-server-start", {"addr": address})
        await self._export()
        return self

    async def _start(self) -> None:
        """QEMU 7.2 dies now and then of a client that connects in the instant it listens."""
        for _ in range(5):
            nothing = storage_daemon(self.folder, Chain([], []), export=False)
            self.daemon = await self._stack.enter_async_context(nothing)
            with suppress(qc.MonitorLost, qc.ConnectError, qc.VMGone):
                return await self._connect()
            await self._stack.aclose()
        raise AssertionError("the storage daemon lets nobody connect")

    async def _export(self) -> None:
        export = {"type": "nbd", "id": "export0", "name": "disk", "writable": True}
        node = {"node-name": self.layers.active.node}
        await self.vm.execute("block-export-add", {**export, **node})
        self.guest = await Nbd.connect(self.daemon.nbd, "disk")

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                await self.end()
        except BaseException:
            self.print()
            raise
        else:
            if error is not None:
                self.print()
        finally:
            await self.guest.close()
            await self.vm.release()
            await self._stack.aclose()
            shutil.rmtree(self.folder)

    def print(self) -> None:
        """What was done, for whoever wants to do it again."""
        print("the recipe:", *self.recipe, sep="\n    ", file=sys.stderr)

    async def _connect(self) -> None:
        self.vm = await qc.Session.connect(self.daemon.qmp).__aenter__()

    def _note(self, text: str) -> None:
        self.recipe.append(text)
        self.done[text.partition("(")[0]] += 1

    # -- the guest --------------------------------------------------------------------------------

    async def write(self, first: int, count: int) -> None:
        """The guest writes some clusters, and the writes are acknowledged."""
        clusters = self.layers.active.clusters
        first %= clusters
        count = min(count, clusters - first)
        self._value = self._value % 255 + 1
        self._note(f"write({first}, {count})  # {self._value}")
        for cluster in range(first, first + count):  # in flight it may be there already
            self._seen(cluster, self._value)
        data = bytes([self._value]) * (count * CLUSTER)
        try:
            await self.guest.write(first * CLUSTER, data)
        except OSError:
            assert self.faulty
            self.faulty = False
            await self.guest.write(first * CLUSTER, data)
        for cluster in range(first, first + count):
            self.layers.write(cluster, self._value)

    def _seen(self, cluster: int, value: int) -> None:
        if self.flight is not None:
            before = self.layers.copied(self.flight.base, self.flight.top, cluster)
            self.flight.seen.setdefault(cluster, set()).update(before, {value})

    async def resize(self, more: int) -> None:
        """The disk grows, where nothing is going on; no export allows that under itself."""
        if self.flight is not None:
            return
        self._note(f"resize({more})")
        active = self.layers.active
        size = (active.clusters + more) * CLUSTER
        await self.guest.flush()
        await self.guest.close()
        await self.vm.execute("block-export-del", {"id": "export0", "mode": "hard"})
        while await self.vm.execute("query-block-exports"):
            pass
        await self.vm.execute("block_resize", {"node-name": active.node, "size": size})
        self.layers.grow(len(self.layers.chain) - 1, active.clusters + more)
        await self._export()

    async def snapshot(self) -> None:
        """A new overlay over the active layer, as a user would lay it."""
        if self.flight is not None or len(self.layers.chain) >= DEPTH:
            return
        below = self.layers.active
        over = self._image(below)
        self._note(f"snapshot()  # {over.node}")
        file = {"driver": "file", "filename": str(over.path)}
        node = {"driver": "qcow2", "node-name": over.node, "file": file, "backing": None}
        await self.vm.execute("blockdev-add", node)
        await self.vm.execute("blockdev-snapshot", {"node": below.node, "overlay": over.node})
        self.layers.chain.append(over)

    # -- commits ----------------------------------------------------------------------------------

    def _pick(self, base: int, top: int) -> tuple[int, int]:
        """Two places in the chain, bottom first."""
        depth = len(self.layers.chain)
        top = depth - 1 - top % (depth - 1)
        return base % top, top

    async def commit(
        self, policy: str, base: int, top: int, *, slow: bool = False, writes: int = 0,
        delete: bool = True,
    ) -> None:  # fmt: skip
        """A commit; with policy "hold" it stays, else the guest writes meanwhile, to its end."""
        depth = len(self.layers.chain)
        if depth < 2:
            return
        base, top = self._pick(base, top)
        if top < depth - 1 and policy != "check":
            policy = "pivot"  # an intermediate layer asks none
        self._note(f"commit({policy!r}, {base}, {top}, slow={slow}, writes={writes})")
        try:
            job = await self.vm.commit(
                self.layers.active.node, policy=_policy(policy), base=depth - 1 - base,
                top=depth - 1 - top, bandwidth=SLOW if slow else None,
                delete=delete and policy not in ("keep", "abort"),
                override=["on-disk-backing"] if self.broken else [],
            )  # fmt: skip
        except qc.JobConflict:
            assert self.flight is not None
            return
        except qc.CommitFailed as error:
            await self.settle()  # what was before it, where that had ended
            self._failed(error)
            self.layers.perhaps(base, top, {})
            return
        if self.flight is not None:
            async with asyncio.timeout(PATIENCE / 2):  # it has ended, or there are two on one disk
                await self.settle()
        self.flight = InFlight(job, base, top)
        if policy == "hold":
            with suppress(qc.QmpCommitError):
                if not slow:
                    await job.ready()
            return
        for number in range(writes):
            await self.write(7 * number, 3)
        if slow:
            with suppress(qc.CommandRefused, qc.JobNotFound):  # it has ended, or is about to
                await job.set_bandwidth(0)
        await self.settle()

    async def recycle(self) -> None:
        """Nobody could hold the export's clients back, so it is refused, and nothing happens."""
        if self.flight is not None or len(self.layers.chain) < 2:
            return
        self._note("recycle()")
        try:
            policy = qc.Recycle(str(self.folder / "fresh.qcow2"))
            await self.vm.commit(self.layers.active.node, policy=policy)
        except qc.ChainError as error:
            assert "exported" in error.message
        else:
            raise AssertionError("it was recycled under its clients")

    def _failed(self, error: qc.QmpCommitError) -> None:
        assert self.faulty, f"it failed: {error}"
        self.faulty = False

    async def settle(self) -> None:
        """Wait for the end of what is under way."""
        flight = self.flight
        if flight is None:
            return
        try:
            outcome = await flight.job.wait()
        except qc.CommitFailed as error:
            self._failed(error)
            self._ended("abort")
        else:
            unexpected = [text for text in outcome.warnings if not re.search(EXPECTED, text)]
            assert not unexpected, unexpected
            self._ended(outcome.action)

    def _ended(self, action: str) -> None:
        flight, self.flight = self.flight, None
        assert flight is not None
        intermediate = flight.top < len(self.layers.chain) - 1
        self.done[f"ended in {'merge' if intermediate and action == 'none' else action}"] += 1
        if action in ("pivot", "none"):
            self.layers.committed(flight.base, flight.top, {})
            stale = self.layers.chain[flight.base + 1 : flight.top + 1]
            self.layers.merged(flight.base, flight.top)
            for layer in stale:
                layer.path.unlink(missing_ok=True)
        elif action == "keep":
            self.layers.committed(flight.base, flight.top, {} if flight.decided else flight.seen)
        else:
            self.layers.perhaps(flight.base, flight.top, flight.seen)

    async def decide(self, end: End) -> None:
        """The second phase, or a cancellation in the first, of what is held."""
        flight = self.flight
        if flight is None:
            return
        self._note(f"decide({end!r})")
        job = flight.job
        orders: dict[str, Callable[[], object]] = {
            "pivot": job.pivot, "keep": job.keep, "abort": job.abort,
        }  # fmt: skip
        try:
            orders[end]()
            flight.decided = True
        except qc.NotReady:
            assert end != "abort"
            assert not job.done
            return
        except qc.JobConflict:
            pass  # it has ended by itself
        await self.settle()

    async def pause(self) -> None:
        """Somebody pauses the job; whoever decides it goes on with it."""
        await self._order("pause", "job-pause")

    async def resume(self) -> None:
        """Somebody lets the job go on."""
        await self._order("resume", "job-resume")

    async def _order(self, what: str, command: str) -> None:
        if self.flight is None:
            return
        self._note(f"{what}()")
        with suppress(qc.CommandRefused):  # it is paused already, is not, or has ended
            await self.vm.execute(command, {"id": self.flight.job.id})

    async def lose_link(self) -> None:
        """The connection breaks; the session finds its way back by itself."""
        self._note("lose_link()")
        self.vm.drop()
        with suppress(qc.MonitorLost):  # whoever is first is told; the next command reconnects
            await self.vm.execute("query-jobs")

    async def die(self, end: End, after: int) -> None:
        """Our side dies some steps after a decision; another one takes up what it has left."""
        flight = self.flight
        self._note(f"die({end!r}, {after})")
        if flight is not None:
            flight.decided = True
            with suppress(qc.QmpCommitError):
                {"pivot": flight.job.pivot, "keep": flight.job.keep, "abort": flight.job.abort}[
                    end
                ]()
        await self._hang_up(after)
        if flight is not None:
            await self._take_up(flight.job.id, end)

    async def die_committing(self, policy: str, base: int, top: int, after: int) -> None:
        """Our side dies some steps after it was asked for a commit."""
        depth = len(self.layers.chain)
        if self.flight is not None or depth < 2:
            return
        base, top = self._pick(base, top)
        end: End = "keep" if policy == "keep" and top == depth - 1 else "pivot"
        self._note(f"die_committing({end!r}, {base}, {top}, {after})")
        job_id = f"qmpcommit-{next(self._numbers)}"
        committing = asyncio.create_task(self._commit_whole(job_id, end, base, top))
        await self._hang_up(after)
        await asyncio.wait({committing})
        if not committing.cancelled() and committing.exception() is not None:
            assert isinstance(committing.exception(), qc.QmpCommitError), repr(
                committing.exception()
            )
        self.flight = InFlight(None, base, top, decided=True)
        await self._take_up(job_id, end)

    async def _commit_whole(self, job_id: str, end: End, base: int, top: int) -> None:
        depth = len(self.layers.chain)
        job = await self.vm.commit(
            self.layers.active.node, policy=_policy(end), base=depth - 1 - base,
            top=depth - 1 - top, job_id=job_id,
            override=["on-disk-backing"] if self.broken else [],
        )  # fmt: skip
        await job.wait()

    async def _hang_up(self, after: int) -> None:
        for _ in range(after):
            await asyncio.sleep(0)
        self.vm.drop()
        await self.vm.release()
        await self._connect()

    async def _take_up(self, job_id: str, end: End) -> None:
        flight = self.flight
        assert flight is not None
        outcome: qc.CommitOutcome | None = None
        try:
            adopted = await self.vm.adopt(job_id, policy=_policy(end))
            with suppress(qc.CommandRefused, qc.JobNotFound):  # a paused one would take its time
                await adopted.set_bandwidth(0)
                await self.vm.execute("job-resume", {"id": adopted.id})
            outcome = await adopted.wait()
        except qc.JobNotFound:
            pass  # it never began, or has ended and was dismissed
        except qc.CommitFailed as error:
            if "how can't be seen" not in error.message:  # it had ended when it was taken up
                self._failed(error)
        await self._look(flight, outcome)

    async def _look(self, flight: InFlight, outcome: qc.CommitOutcome | None) -> None:
        """What has become of it, as QEMU's graph shows it; and what a user has to clear away."""
        graph = await self.vm.graph()
        (disk,) = [disk for disk in await self.vm.disks() if disk.active is not None][:1]
        nodes = [image.node_name for image in disk.chain]
        stale = self.layers.chain[flight.base + 1 : flight.top + 1]
        if not {layer.node for layer in stale} & set(nodes):
            action = "none" if flight.top < len(self.layers.chain) - 1 else "pivot"
        elif outcome is not None and outcome.action == "keep":
            action = "keep"
        else:
            action = "abort"
        left = [layer.node for layer in reversed(stale) if layer.node in graph.nodes]
        self._ended(action)
        if action in ("none", "pivot"):
            for node in left:
                with suppress(qc.CommandRefused):
                    await self.vm.execute("blockdev-del", {"node-name": node})

    # -- the end ----------------------------------------------------------------------------------

    async def end(self) -> None:
        """End what is under way, then compare every image with what it must contain."""
        async with asyncio.timeout(PATIENCE):
            if self.flight is not None:
                await self.decide("abort")
            assert self.flight is None
            assert await self.vm.execute("query-jobs") == []
            (disk,) = await self.vm.disks()
            shown = [Path(image.filename) for image in reversed(disk.chain)]
            assert shown == [layer.path for layer in self.layers.chain]
            await self.guest.flush()
            await self.daemon.quit()
        for place, layer in enumerate(self.layers.chain):
            if place:  # QEMU writes names for what lies over blkdebug that it can't read itself
                below = self.layers.chain[place - 1].path
                run(QEMU.img, "rebase", "-u", "-b", below, "-F", "qcow2", layer.path)
            data = await asyncio.to_thread(read, layer.path)
            wrong = self.layers.wrong(place, data)
            assert wrong is None, wrong


def _policy(name: str) -> Any:
    match name:
        case "hold":
            return qc.Hold()
        case "check passes":
            return qc.Check(command=["true"])
        case "check fails":
            return qc.Check(command=["false"], failed=qc.Keep())
        case "call":
            return _call
        case _:
            return {"pivot": qc.Pivot(), "keep": qc.Keep(), "abort": qc.Abort()}[name]


async def _call(ready: qc.Ready) -> qc.Pivot | qc.Keep:
    return qc.Keep()
