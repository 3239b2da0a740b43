"""A fault at every message of a commit, on real QEMUs: it ends, and what it says is true.

A rehearsal counts the messages between session and monitor; then, for each message and each fault
that can happen to it, the commit runs once with that one fault. Whatever it says at the end is
compared with what QEMU says over another monitor, and with the disks, byte for byte.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.faults import FAULTS, Boundary, Fault, Struck, matrix
from tests.ground.images import MIB, Chain, Picture, Write, create, read, write
from tests.ground.machines import Machine, machine, storage_daemon
from tests.ground.nbd import Nbd
from tests.ground.places import some
from tests.ground.proxy import proxy
from tests.ground.sessions import runs

AT_ONCE = 6
LIMIT = 60.0
"""Seconds by which each commit has ended; a generous multiple of what any of them needs."""

SIZE = 4 * MIB
AREA = range(2 * MIB, 2 * MIB + 16 * 4096)
"""Where the guest writes while the commit runs."""


class Guest:
    """Writes and flushes one block after another; knows which were acknowledged."""

    def __init__(self, nbd: Nbd, picture: Picture) -> None:
        self.picture = picture
        self.unsure: tuple[int, bytes] | None = None
        self._nbd = nbd
        self._count = 0
        self._stop = False
        self._wrote = asyncio.Event()
        self._task = asyncio.create_task(self._write())

    async def goes_on(self) -> None:
        """It can write."""
        for _ in range(2):
            self._wrote.clear()
            await self._wrote.wait()

    async def end(self) -> None:
        """It writes no more."""
        self._stop = True
        await self._task
        await self._nbd.close()

    async def _write(self) -> None:
        with suppress(ConnectionError):
            while not self._stop:
                self._count += 1
                offset = AREA.start + self._count % 16 * 4096
                data = self._count.to_bytes(8, "big") * 512
                self.unsure = (offset, data)
                await self._nbd.write(offset, data)
                await self._nbd.flush()
                self.picture.write(offset, data)
                self.unsure = None
                self._wrote.set()
                await asyncio.sleep(0.002)  # a guest that leaves time to others

    def pictures(self) -> list[bytes]:
        """What the disk may show: a write that was not acknowledged may be there or not."""
        found = [bytes(self.picture.data)]
        if self.unsure is not None:
            with_it = self.picture.copy()
            with_it.write(*self.unsure)
            found.append(bytes(with_it.data))
        return found


ALL = tuple(fault.name for fault in FAULTS)
SOME = ("cut before", "drop", "refuse", "kill", "stop")


@dataclass
class Scene:
    """What is committed, on what."""

    name: str
    policy: Any
    options: dict[str, Any] = field(default_factory=dict)
    disk: str = "top"
    layers: int = 2
    guest: bool = True
    bitmap: bool = False
    faults: tuple[str, ...] = SOME

    @asynccontextmanager
    async def qemu(self, folder: Path, chain: Chain) -> AsyncIterator[Machine]:
        """The QEMU that it runs on."""
        if self.guest:
            async with storage_daemon(folder, chain) as made:
                yield made
        else:
            async with machine(folder, chain, running=True) as made:
                yield made


SCENES = (
    Scene("pivot and delete", qc.Pivot(), {"delete": True}, faults=ALL),
    Scene("keep", qc.Keep(), faults=ALL),
    Scene("pivot with a bitmap", qc.Pivot(), bitmap=True),
    Scene("abort", qc.Abort()),
    Scene("a hold that runs out", qc.Hold(timeout=0.05, otherwise=qc.Pivot())),
    Scene("a check that fails", qc.Check(command=["false"], passed=qc.Pivot(), failed=qc.Keep())),
    Scene("an intermediate layer", None, {"top": "mid", "delete": True}, layers=3),
    Scene("recycle", qc.Recycle("fresh.qcow2"), disk="vda", guest=False),
)


LAYERS = (
    ("base.qcow2", (Write(0, MIB, 0x11),)),
    ("mid.qcow2", (Write(MIB // 4, MIB // 2, 0x33), Write(MIB, 65536, 0x34))),
    ("top.qcow2", (Write(MIB // 2, MIB, 0x22), Write(3 * MIB, 65536, 0x23))),
)


def template(folder: Path, layers: int) -> Chain:
    """A chain whose names are relative, so that it can be copied."""
    made = LAYERS if layers == 3 else (LAYERS[0], LAYERS[2])
    picture = Picture(SIZE)
    chain = Chain([folder / name for name, _ in made], [])
    below: str | None = None
    for path, (name, writes) in zip(chain.files, made, strict=True):
        create(path, SIZE, backing=below)
        write(path, writes)
        below = name
        for each in writes:
            picture.fill(each.offset, each.length, each.pattern)
        chain.pictures.append(picture.copy())
    return chain


@dataclass
class Run:
    """One commit with one fault (or none), and what came of it."""

    scene: Scene
    folder: Path
    chain: Chain
    boundary: Boundary | None = None
    fault: Fault | None = None
    outcome: qc.CommitOutcome | None = None
    error: qc.QmpCommitError | None = None
    struck: bool = False
    killed: bool = False
    in_time: bool = False
    hangs: bool = False
    seen: list[Boundary] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    active: str = ""
    chain_in_use: list[str] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)
    bitmaps: set[str] = field(default_factory=set)
    paused: bool = False
    guest: Guest | None = None
    found: list[str] = field(default_factory=list)

    def forget(self) -> None:
        """Let go of the disks' bytes: there are a thousand runs."""
        self.chain.pictures.clear()
        self.guest = None

    @property
    def end(self) -> str:
        """In one word."""
        if self.outcome is not None:
            return self.outcome.action
        return type(self.error).__name__

    async def run(self, processes: dict[str, int]) -> None:
        """Commit, and read QEMU back."""
        scene, chain = self.scene, self.chain
        async with scene.qemu(self.folder, chain) as qemu, proxy(self.folder, qemu.qmp) as between:
            processes[between.path] = qemu.pid
            if scene.bitmap:
                await qemu.execute("block-dirty-bitmap-add", node="top", name="b", persistent=True)
            if scene.guest:
                self.guest = Guest(await Nbd.connect(qemu.nbd, "top"), chain.pictures[-1])
                await self.guest.goes_on()
            struck = Struck(between, qemu, self.boundary, self.fault)
            over = False
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LIMIT):
                        await self._commit(struck)
                        self.in_time = True
                over = True
            finally:
                self.struck, self.killed, self.seen = struck.struck, struck.killed, struck.seen
                await struck.end()
                if self.guest is not None and (self.killed or not over):
                    await self.guest.end()
            if not self.killed:
                try:
                    await self._read_back(qemu)
                except TimeoutError:
                    self.hangs = True
                    qemu.kill()
                    if self.guest is not None:
                        await self.guest.end()

    async def _commit(self, struck: Struck) -> None:
        session = qc.Session.connect(
            struck.between.path, timeout=LIMIT / 3, command_timeout=1, patience=LIMIT / 2
        )
        async with session as vm:
            vm.timeout = 1  # before that nothing is struck: a busy machine only takes its time
            struck.begin()
            try:
                job = await vm.commit(
                    self.scene.disk, policy=self.scene.policy, **self.scene.options
                )
                self.outcome = await job.wait()
            except qc.QmpCommitError as error:
                self.error = error

    async def _read_back(self, qemu: Machine) -> None:
        """What QEMU says to somebody else."""
        async with asyncio.timeout(LIMIT / 3), qc.Session.connect(qemu.qmp2) as vm:
            self.jobs = await vm.execute("query-jobs")
            disk = await vm.disk(self.scene.disk if not self.scene.guest else "export0")
            assert disk.active is not None
            self.active = disk.active.node_name
            self.chain_in_use = [image.node_name for image in disk.chain]
            self.bitmaps = set(disk.active.bitmaps)
            self.nodes = set((await vm.graph()).nodes)
            if self.guest is not None:
                await self.guest.goes_on()
                await self.guest.end()
            else:
                self.paused = not await runs(vm)
        await qemu.quit()

    # -- the verdict ------------------------------------------------------------------------------

    def shows(self, path: Path, layer: int = -1, *, apart_from_the_guest: bool = False) -> bool:
        """Whether an image shows what it must."""
        try:
            found = read(path)
        except AssertionError:  # it is not there, or was never finished
            return False
        wanted = [bytes(self.chain.pictures[layer].data)]
        if layer == -1 and self.guest is not None:
            wanted = self.guest.pictures()
        if apart_from_the_guest:
            hole = bytes(len(AREA))
            found = found[: AREA.start] + hole + found[AREA.stop :]
            wanted = [each[: AREA.start] + hole + each[AREA.stop :] for each in wanted]
        return found in wanted

    def problems(self) -> list[str]:
        """What is not as it must be."""
        if not self.in_time:
            return [f"it did not end within {LIMIT:g} s"]
        if self.hangs:
            return [f"QEMU hangs, or its guest's writes; its jobs: {self.jobs}"]
        if self.killed:
            return list(self._after_a_kill())
        return [*self._in_qemu(), *self._as_told()]

    def _in_qemu(self) -> Any:
        if self.jobs:
            yield f"jobs are left in QEMU: {self.jobs}"
        if self.paused:
            yield "the guest is left paused"
        base, top = self.chain.base, self.chain.top
        fresh = self.folder / "fresh.qcow2"
        image = {"base": base, "top": top}.get(self.active, fresh)
        if image != fresh and fresh.exists():
            yield f"{fresh.name} is left and used by nobody"
        left = {node for node in self.nodes if node.startswith("qmpcommit-")}
        if image != fresh and left:
            yield f"nodes are left: {left}"
        if not self.shows(image):
            yield f"the active layer {image.name} does not show what the guest wrote"

    @property
    def committed(self) -> Path:
        """The overlay whose data goes into the base."""
        return self.chain.files[1]

    def _as_told(self) -> Any:
        base, top = self.chain.base, self.chain.top
        match self.end:
            case "pivot" | "recycle":
                if (self.active == "base") is not (self.end == "pivot") or self.active == "top":
                    yield f"told {self.end}, but the active layer is {self.active}"
                if not self.shows(base):
                    yield "told that it pivoted, but the base does not hold everything"
                if self.scene.bitmap and "b" not in self.bitmaps and not self.outcome_warns():
                    yield f"the bitmap is not in the base: {self.bitmaps}"
            case "keep":
                if self.active != "top":
                    yield f"told keep, but the active layer is {self.active}"
                if not self.shows(base, apart_from_the_guest=True):
                    yield "told keep, but the base does not hold what the overlay held"
            case "abort":
                if self.scene.policy != qc.Abort():
                    yield "nobody has asked for an abort"
                if self.active != "top":
                    yield f"told abort, but the active layer is {self.active}"
            case "none":
                if self.chain_in_use != ["top", "base"]:
                    yield f"told that it is committed, but the chain is {self.chain_in_use}"
                if not self.shows(base, 1):
                    yield "told that it is committed, but the base does not hold it"
            case _ if "has pivoted" in str(self.error):
                if self.active != "base":
                    yield f"told {self.error}, but the active layer is {self.active}"
            case _:
                if self.active != "top":
                    yield f"told {self.error}, but the active layer is {self.active}"
                if not top.exists():
                    yield "the overlay is gone"
        if self.outcome is not None:
            stale = self.committed
            if (str(stale) in self.outcome.deleted) is stale.exists():
                yield f"deleted: {self.outcome.deleted}, but the overlay exists: {stale.exists()}"
            if (str(stale) in self.outcome.invalidated) is (self.end in ("keep", "abort")):
                yield f"told {self.end}, and named as stale: {self.outcome.invalidated}"

    def outcome_warns(self) -> bool:
        """Whether the outcome says something."""
        return bool(self.outcome and self.outcome.warnings)

    def _after_a_kill(self) -> Any:
        """The image that it says is to be booted holds everything."""
        in_base, in_top = self.shows(self.chain.base), self.shows(self.chain.top)
        overlay = self.folder / "fresh.qcow2"
        fresh = self.shows(overlay)
        pivoted = self.error.pivoted if isinstance(self.error, qc.VMGone) else False
        if isinstance(self.error, qc.VMGone) and overlay.exists():
            if self.error.overlay != overlay.name or pivoted is not True:
                yield f"{overlay.name} is left: {self.error}"
            if not fresh:
                yield f"{overlay.name} is to be booted, and is not whole"
        if self.outcome is not None:
            pivoted = self.outcome.action in ("pivot", "recycle")
        match pivoted:
            case True if not in_base and not fresh:
                yield f"told that the base is to be booted, but it is not whole ({self.error})"
            case False if not in_top:
                yield f"told that the overlay is to be booted, but it is not whole ({self.error})"
            case None if not (in_base or in_top):
                yield f"neither is whole ({self.error})"


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """By a proxy's path, the process behind it, as a session would see it without the proxy."""
    found: dict[str, int] = {}

    def peer_pid(sock: socket.socket) -> int | None:
        return found.get(sock.getpeername())

    monkeypatch.setattr("qmpcommit.qmp.monitor.peer_pid", peer_pid)
    monkeypatch.setattr("qmpcommit.commit.driver.HEARTBEAT", 0.5)
    return found


def refused_in_pending(steps: list[Boundary]) -> list[tuple[Boundary, Fault]]:
    """These are always tried: who waits for an answer then may hold the disk."""
    pending = Boundary(False, "BLOCK_JOB_PENDING", 1)
    if pending not in steps:
        return []
    return [case for case in matrix(steps[steps.index(pending) :]) if case[1].name == "refuse"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
async def test_a_fault_at_every_message(
    scene: Scene, folder: Path, processes: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = template(folder, scene.layers)
    room = asyncio.Semaphore(AT_ONCE)
    numbers = iter(range(10**6))

    async def one(boundary: Boundary | None = None, fault: Fault | None = None) -> Run:
        place = folder / str(next(numbers))
        async with room:
            for _ in range(5):  # an event may come once more, or once less
                place.mkdir()
                files = [Path(shutil.copy(path, place)) for path in made.files]
                chain = Chain(files, [each.copy() for each in made.pictures])
                run = Run(scene, place, chain, boundary, fault)
                await run.run(processes)
                run.found = await asyncio.to_thread(run.problems)
                run.forget()
                shutil.rmtree(place)
                if run.struck or boundary is None:
                    break
        return run

    rehearsal = await one()
    assert rehearsal.outcome is not None, rehearsal.error
    assert rehearsal.found == []
    steps = rehearsal.seen
    if scene.faults != ALL:  # what is asked before it begins is the same for all
        steps = steps[steps.index(Boundary(True, "block-commit", 1)) :]
    cases = [case for case in matrix(steps) if case[1].name in scene.faults]
    cases = list(dict.fromkeys([*some(cases), *refused_in_pending(steps)]))
    runs = await asyncio.gather(*(one(*case) for case in cases))
    held = [run for run in runs if run.struck and not run.found]
    ends = Counter((str(run.fault), run.end) for run in runs)
    with capsys.disabled():
        print(f"\n{scene.name}: {len(steps)} steps x faults: {len(runs)} run, {len(held)} held")
        for (fault, end), count in sorted(ends.items()):
            print(f"    {fault}: {count} {end}")
    broken = [
        f"{run.fault} at {run.boundary}: {run.end}: {run.found or 'was not reached'}"
        for run in runs
        if run not in held
    ]
    assert not broken, "\n".join(broken)
