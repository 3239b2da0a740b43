"""Puts right what was found, one thing after another, and looks again after each.

So that each step rests on what QEMU shows then; whoever is killed meanwhile leaves what the next
one finds. Nothing is dismissed or closed that tells how something else has to end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qmpcommit.block.bitmaps import carry
from qmpcommit.block.chain import read_image
from qmpcommit.block.throttle import put_back as put_limits_back
from qmpcommit.commit import rates
from qmpcommit.commit.checks import CLAIM
from qmpcommit.commit.claim import clear_dead, number_of, owners_of
from qmpcommit.commit.overlay.creation_job import forget
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.commit.pending import place_of
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import Pivot, parse_policy
from qmpcommit.commit.stale_layers import close_layers, close_nodes
from qmpcommit.commit.takeover import bitmaps_to_carry
from qmpcommit.cycles.exchange import Exchange, complete, put_back
from qmpcommit.errors import CommandRefused, CommitFailed, InvalidRequest, QmpCommitError
from qmpcommit.guest.marks import mark_of_discard, marks_among
from qmpcommit.guest.run_state import thaw
from qmpcommit.guest.sockets import Sockets
from qmpcommit.recovery import jobs, lookup, overlays
from qmpcommit.recovery.findings import Decide, Finding, Kind, Recovered
from qmpcommit.recovery.seen import Seen, see
from qmpcommit.tasks import to_the_end
from qmpcommit.units import counted
from qmpcommit.window.run import close_windows

if TYPE_CHECKING:
    from qmpcommit.block.bitmaps import Carrying
    from qmpcommit.block.chain import Disk, Image
    from qmpcommit.commit.vm import VM

GRACE = 0.5
"""Seconds after which what is there still is nobody's who is about to end it."""

LOOKS = 4
"""How often what changes by itself is looked at once more, at most."""

PAUSE = 0.02
ENDING = 30.0
"""Seconds that QEMU gets to end jobs that were told to."""

OVERLAYS: Collection[Kind] = ("creation", "recycle", "discard", "frozen")

READY = 2.0
"""Seconds for which a group's disks may be held."""


async def recover(
    vms: Iterable[VM | str | os.PathLike[str]],
    *,
    agents: Sockets[Any] | None = None,
    decide: Decide | None = None,
    look_only: bool = False,
    folders: Collection[str | os.PathLike[str]] = (),
    override: Collection[str] = (),
) -> Recovered:
    """Put right what a death has left on these VMs: of the library, a command or a daemon.

    `vms` are sessions, or monitors' addresses, which are connected for it. A group that is over
    several of them is resolved as one: name all. A job in READY is told, and ended only as
    `decide` says ("pivot", "keep" or "abort"). A guest that was frozen through its agent goes on
    by its socket in `agents`, by the VMs as named. With `look_only` nothing is changed. Empty files
    of ours are looked for beside the disks' files and in `folders`. Nothing is touched of whoever
    lives, or of whom it can't be seen whether they live, unless "claim" is in `override`. A window
    whose file another process still reads stays open, unless "reader" is.

    Each finding says what it is, what was done and how that ended; what could not be done it says,
    and goes on. Raises what `Monitor.execute` raises where a VM is away. If it is cancelled, the
    step that is under way ends first.
    """
    if decide not in (None, "pivot", "keep", "abort"):
        raise InvalidRequest(f"a job is decided by 'pivot', 'keep' or 'abort', not {decide!r}")
    async with AsyncExitStack() as stack:
        there = await opened(stack, vms)
        named = {vm: (agents or {}).get(each) for vm, each in there.items()}
        if not named:
            raise InvalidRequest("name the VMs that are to be recovered, at least one")
        places = [os.fspath(each) for each in folders]
        work = Recovery(named, decide, places, override=override)
        return await (work.look() if look_only else work.run())


async def opened(
    stack: AsyncExitStack, vms: VM | str | os.PathLike[str] | Iterable[VM | str | os.PathLike[str]]
) -> dict[VM, VM | str | os.PathLike[str]]:
    """Sessions with these VMs, each with how it was named; what is an address is connected."""
    from qmpcommit.commit.vm import VM

    named: dict[VM, VM | str | os.PathLike[str]] = {}
    for each in [vms] if isinstance(vms, (str, os.PathLike, VM)) else vms:
        vm = each
        if not isinstance(vm, VM):
            vm = await stack.enter_async_context(VM.connect(vm))
        named[vm] = each
    return named


async def clear_overlays(vm: VM, agent: str | os.PathLike[str] | None) -> list[Finding]:
    """Only what recycles and discards have left, and guests that stand still: what was done."""
    work = Recovery({vm: agent}, None, (), override=(), only=OVERLAYS)
    return [each for each in (await work.run()).findings if each.done]


class Recovery:
    """The VMs, each with the socket of its agent, and how they are put right.

    With `only` some kinds of what is found.
    """

    def __init__(
        self,
        vms: Mapping[VM, str | os.PathLike[str] | None],
        decide: Decide | None,
        folders: Collection[str],
        *,
        override: Collection[str],
        only: Collection[Kind] = lookup.ORDER,
    ) -> None:
        self._only = only
        self._vms, self._decide, self._folders = vms, decide, folders
        self._override = override
        self._seen: dict[VM, Seen] = {}

    async def look(self) -> Recovered:
        """What there is to be done, with nothing changed."""
        return Recovered(tuple(await self._look()))

    async def run(self) -> Recovered:
        """Do all that can be done."""
        ended: dict[tuple[Kind, str, str], Finding] = {}
        found = await self._look_twice()
        while True:
            todo = [each for each in found if _key(each) not in ended]
            finding = next((each for each in todo if each.does), None)
            if finding is None:
                told = {_key(each): each for each in todo}
                return Recovered(tuple((ended | told).values()))
            for each in await to_the_end(self._do(finding, found)):
                ended[_key(each)] = each
            found = await self._look()

    async def _look_twice(self) -> list[Finding]:
        """What stays: what comes or goes between two looks is somebody's who lives.

        A job that was left alone goes on by itself, as from copying to READY, and then stays.
        """
        stays = seen = await self._look()
        for _ in range(LOOKS):
            if not seen:
                break
            keys, kinds = set(map(_key, seen)), {(f.vm, f.what): f.kind for f in seen}
            await asyncio.sleep(GRACE)
            seen = await self._look()
            stays = [each for each in seen if _key(each) in keys]
            if all(kinds.get((f.vm, f.what), f.kind) == f.kind for f in seen):
                break
        return stays

    async def _look(self) -> list[Finding]:
        looks = [see(vm, folders=self._folders, override=self._override) for vm in self._vms]
        self._seen = dict(zip(self._vms, await asyncio.gather(*looks), strict=True))
        found = lookup.look_up(self._seen.values(), self._decide)
        return [each for each in found if each.kind in self._only]

    async def _do(self, finding: Finding, found: list[Finding]) -> list[Finding]:
        """One finding, and what goes with it; a failure is its result."""
        vm = self._vm(finding)
        alike = [finding]
        steps: Mapping[Kind, Callable[[], Awaitable[str]]] = {
            "creation": lambda: self._dismiss_creation(vm, finding),
            "pending": lambda: self._end_pending(alike),
            "recycle": lambda: self._overlay(vm, finding),
            "discard": lambda: self._discard(vm, finding),
            "frozen": lambda: self._goes_on(vm, finding),
            "ready": lambda: self._end_jobs(alike),
            "copying": lambda: self._end_jobs(alike),
            "concluded": lambda: self._dismiss(vm, finding),
            "node": lambda: self._close(vm, finding),
            "window": lambda: self._windows(vm, [each.what for each in alike]),
            "throttle": lambda: self._unthrottle(vm, finding),
            "file": lambda: self._unlink(finding),
            "claim": lambda: self._unclaim(vm, finding),
        }
        if finding.kind in ("pending", "ready", "copying"):
            kinds: tuple[Kind, ...] = ("ready", "copying")
            if finding.kind == "pending":
                kinds = ("pending",)
            alike = self._of_its_group(finding, found, kinds)
        elif finding.kind == "window":
            alike = [e for e in found if e.kind == "window" and e.vm == finding.vm and e.does]
        vm.log.info("recovers", kind=finding.kind, what=finding.what)
        try:
            result = await steps[finding.kind]()
        except QmpCommitError as error:
            if not vm.connected:
                raise
            return [replace(each, result=str(error)) for each in alike]
        return [replace(each, done=True, result=result) for each in alike]

    def _of_its_group(
        self, finding: Finding, found: list[Finding], kinds: Collection[Kind]
    ) -> list[Finding]:
        place = place_of(finding.what)
        if place is None:
            return [finding]
        return [
            each
            for each in found
            if each.kind in kinds
            and (other := place_of(each.what)) is not None
            and other.group == place.group
        ]

    def _vm(self, finding: Finding) -> VM:
        return next(vm for vm, seen in self._seen.items() if seen.vm == finding.vm)

    # -- jobs -------------------------------------------------------------------------------------

    async def _dismiss_creation(self, vm: VM, finding: Finding) -> str:
        await forget(vm, finding.what, "the fresh overlay")
        return "it was dismissed"

    async def _end_pending(self, alike: list[Finding]) -> str:
        """All of a group as one: none is dismissed before the last has ended."""
        groups = jobs.Groups(self._seen.values())
        order = jobs.pending_order(alike[0].what, groups, self._decide)
        assert order is not None
        told = ""
        if order == "job-finalize" and self._decide == "pivot":
            told = await self._carry(alike, await self._to_carry(alike))
        await self._order(alike, order)
        await self._until(alike, ("concluded",))
        return f"it was finalized{told}" if order == "job-finalize" else "its decision was undone"

    async def _to_carry(self, alike: list[Finding]) -> list[Carrying | None]:
        """The dirty bitmaps of the layers that a pivot closes; raises `JobConflict` as `adopt`."""
        return [await bitmaps_to_carry(self._vm(each), each.what) for each in alike]

    async def _carry(self, alike: list[Finding], carrying: list[Carrying | None]) -> str:
        """Carry them into the bases, while all disks are held; what could not be, in words."""
        problems = []
        for each, bitmaps in zip(alike, carrying, strict=True):
            if bitmaps is not None and bitmaps.names:
                try:
                    await carry(self._vm(each), bitmaps)
                except CommandRefused as error:  # it has been decided for all of them
                    names = ", ".join(bitmaps.names)
                    problems.append(f"dirty bitmaps {names} were not carried ({error.desc})")
        return "".join(f"; {problem}" for problem in problems)

    async def _order(self, alike: list[Finding], order: str, **more: Any) -> None:
        member = "device" if order == "block-job-cancel" else "id"
        for each in alike:
            try:
                await self._vm(each).execute(order, {member: each.what, **more})
            except CommandRefused as error:  # it may have passed that already
                self._vm(each).log.info("refused", command=order, desc=error.desc)

    async def _until(
        self, alike: list[Finding], statuses: Collection[str], seconds: float = ENDING
    ) -> None:
        """Wait until all of them are in one of these states; raises `CommitFailed`."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while True:
            waits = []
            for each in alike:
                listed = await self._vm(each).execute("query-jobs")
                job = next((job for job in listed if job.get("id") == each.what), None)
                status = "concluded" if job is None else str(job.get("status"))
                if status not in statuses:
                    if status == "concluded":
                        raise CommitFailed(f"job {each.what} has ended before the others")
                    waits.append(f"{each.what} is '{status}'")
            if not waits:
                return
            if clock() > end:
                raise CommitFailed(f"after {seconds:g} s {' and '.join(waits)}")
            await asyncio.sleep(PAUSE)

    async def _end_jobs(self, alike: list[Finding]) -> str:
        """Decide what nobody decided, as the caller says."""
        decide = self._decide
        assert decide is not None
        if decide == "abort" or jobs.Groups(self._seen.values()).never_whole(alike[0].what):
            await self._order(alike, "job-cancel")
            await self._until(alike, ("concluded",))
            return "it was cancelled; the overlay stays active"
        if place_of(alike[0].what) is None:
            (finding,) = alike
            job = await self._vm(finding).adopt(finding.what, policy=parse_policy({"kind": decide}))
            outcome = await job.wait()
            active = outcome.active.filename if outcome.active is not None else "nothing"
            return f"it ended by '{outcome.action}'; {finding.disk} writes to {active}"
        await self._until(alike, (*rates.READY, "pending"), seconds=float("inf"))
        carrying = await self._to_carry(alike) if decide == "pivot" else []
        if decide == "pivot":
            await self._order(alike, "job-complete")
        else:
            await self._order(alike, "block-job-cancel", force=False)
        try:
            await self._until(alike, ("pending",), READY)
            told = await self._carry(alike, carrying) if carrying else ""
        except CommitFailed:
            await self._order(alike, "job-cancel")
            await self._until(alike, ("concluded",))
            raise
        await self._order(alike, "job-finalize")
        await self._until(alike, ("concluded",))
        return f"all of its group ended by '{decide}'{told}"

    async def _dismiss(self, vm: VM, finding: Finding) -> str:
        with suppress(CommandRefused):  # somebody was first
            await vm.execute("job-dismiss", {"id": finding.what})
        return "it was dismissed"

    # -- fresh overlays ---------------------------------------------------------------------------

    async def _overlay(self, vm: VM, finding: Finding) -> str:
        """Lay what was made over the base, or remove it."""
        seen, stem = self._seen[vm], finding.what.removesuffix("-top")
        file = overlays.unlaid(seen)[stem]
        base = seen.names.get(finding.what, "")
        where = overlays.disk_over(seen, base)
        disk = where[0] if where else jobs.disk_of(seen, overlays.job_of(seen, stem))
        lays = finding.kind == "recycle" and not jobs.SNAPSHOT.fullmatch(finding.what)
        if where is not None and where[1] == 0 and lays:
            return await self._lay(vm, stem, file, where[0])
        top = disk.chain[0] if disk is not None else None
        path = os.path.join(vm.cwd or os.getcwd(), file)
        mine = seen.disks if disk is None else (disk,)
        layers: list[Image | None] = [*(image for each in mine for image in each.chain), None]
        for layer in sorted(layers, key=lambda each: each is None or each.node_name != base):
            plan = _plan(vm, disk, top, layer, overlays.job_of(seen, stem))
            fresh = FreshOverlay(vm, plan, file, vm.cwd)
            fresh.restore(stopped=False)
            await fresh.unlink()
            if await asyncio.to_thread(os.path.lexists, path) and layer is not None:
                continue
            await fresh.undo()
            if not await asyncio.to_thread(os.path.lexists, path):
                return "it was closed, and its file deleted"
        return f"it was closed; {file} stays, for it is not seen to be empty and of this disk"

    async def _lay(self, vm: VM, stem: str, file: str, disk: Disk) -> str:
        seen = self._seen[vm]
        layers = {image.node_name for image in disk.chain}
        chains = [seen.graph.chain(name) for name in overlays.stale_nodes(seen, disk)]
        names = dict.fromkeys(name for chain in chains for name in chain if name not in layers)
        stale = [read_image(seen.graph, name) for name in names]
        top = stale[0] if stale else disk.chain[0]
        plan = _plan(vm, disk, top, disk.chain[0], overlays.job_of(seen, stem))
        plan = replace(plan, between=tuple(stale[1:]))
        fresh = FreshOverlay(vm, plan, file, vm.cwd)
        fresh.restore(stopped=False)
        await fresh.lay()
        warnings = await close_layers(vm, stale) if stale else []
        return "; ".join([f"{disk} writes to {file}", *warnings])

    async def _discard(self, vm: VM, finding: Finding) -> str:
        seen = self._seen[vm]
        if finding.what.removesuffix("-top") in overlays.unlaid(seen):
            return await self._overlay(vm, finding)
        disks = next(
            each
            for each in overlays.laid_discards(seen).values()
            if each[0][0].chain[0].node_name == finding.what
        )
        mine = {mark_of_discard(number_of(disk)) for disk, _ in disks}
        mark = next((m for m in marks_among(seen.graph.nodes) if m.owner in mine), None)
        exchanges = []
        for disk, swapped in disks:
            fresh, below = disk.chain[0], disk.chain[1]
            if swapped:
                name = overlays.former(seen, disk)
                assert name is not None
                top, base = read_image(seen.graph, name), below
            else:
                top, base = below, disk.chain[2]
            job_id = fresh.node_name.removesuffix("-top")
            plan = _plan(vm, disk, top, base, job_id)
            noted = {"step": "lay", "running": mark is not None}
            exchanges.append(
                Exchange(
                    vm, plan, fresh.filename, guest="reset" if mark and mark.resets else "stop",
                    note=_no_note, noted=noted,
                )
            )  # fmt: skip
        stem = jobs.DISCARD.fullmatch(finding.what)
        if stem is not None and stem[1] in overlays.swapped_discards(self._seen.values()):
            await complete(exchanges)
            warnings = [text for each in exchanges for text in each.warnings]
            return "; ".join(["it was brought to its end", *warnings])
        stuck = await put_back(exchanges)
        if stuck:
            raise CommitFailed("; ".join(each.text for each in stuck))
        return "it was undone"

    # -- guests -----------------------------------------------------------------------------------

    async def _goes_on(self, vm: VM, finding: Finding) -> str:
        (mark,) = marks_among([finding.what])
        if mark.how == "agent" and self._vms[vm] is None:
            text = "it was frozen through its agent: name that agent's socket"
            raise InvalidRequest(text, hint="--agent SOCKET names it")
        still = self._seen[vm].status in ("paused", "prelaunch")
        discarded = lookup.discarded(self._seen[vm], mark)
        result = "it goes on"
        if mark.how == "pause" and discarded and still and not mark.resets:
            result = "it stays stopped, as was asked"
        elif mark.how == "agent" or still:
            if discarded and mark.resets:
                await vm.execute("system_reset")
                result = "it was reset, and goes on"
            await thaw(vm, mark.how, self._vms[vm], ran=True)
        await vm.execute("blockdev-del", {"node-name": mark.node})
        return result

    # -- what is open -----------------------------------------------------------------------------

    async def _close(self, vm: VM, finding: Finding) -> str:
        warnings = await close_nodes(vm, [finding.what])
        if warnings:
            raise CommitFailed("; ".join(warnings))
        if finding.disk:  # which has been committed from it
            return "it was closed; its file is stale: never boot it"
        return "it was closed"

    async def _windows(self, vm: VM, overlays: Collection[str]) -> str:
        closed = 0
        for folder in self._folders or (None,):
            closed += len(
                await close_windows(
                    vm, agent=self._vms[vm], overlay_dir=folder, override=self._override,
                    only=overlays,
                )
            )  # fmt: skip
        return f"closed: {counted(closed, 'overlay')} merged back"

    async def _unthrottle(self, vm: VM, finding: Finding) -> str:
        noted = next(each for each in self._seen[vm].limits if each.message == finding.what)
        return await put_limits_back(vm, noted)

    async def _unlink(self, finding: Finding) -> str:
        def unlink() -> None:
            if os.path.getsize(finding.what) == 0:
                os.unlink(finding.what)

        try:
            await asyncio.to_thread(unlink)
        except OSError as error:
            raise CommitFailed(f"{finding.what} stays: {error.strerror}") from error
        return "it was deleted"

    async def _unclaim(self, vm: VM, finding: Finding) -> str:
        owners = [owner for owner in await owners_of(vm) if owner.node == finding.what]
        if CLAIM in self._override:
            for owner in owners:
                with suppress(CommandRefused):
                    await vm.execute("blockdev-del", {"node-name": owner.node})
        else:
            await clear_dead(vm, owners)
        return "it was let go"


async def _no_note(step: str, **facts: Any) -> None:
    """What QEMU shows tells how far it was."""


def _key(finding: Finding) -> tuple[Kind, str, str]:
    return finding.kind, finding.vm, finding.what


def _plan(vm: VM, disk: Disk | None, top: Image | None, base: Image | None, job_id: str) -> Plan:
    """What the fresh overlay of a killed process followed, as far as it is known."""
    from qmpcommit.block.chain import Disk, Image

    nothing = Image("", "", "")
    return Plan(
        vm=vm.name,
        disk=disk or Disk(name="?"),
        top=top or nothing,
        base=base or nothing,
        job_id=job_id,
        two_phase=True,
        policy=Pivot(),
    )
