"""The golden cycle: an overlay's changes go into the base, or are thrown away, and it starts anew.

A test says whether the changes deserve it. If so the overlay is recycled: the base takes its
data, and an empty overlay begins. If not it is discarded: an empty one is laid over the base as
it is, and the guest, whose memory belongs to a disk that is no more, is reset or stopped.

Rests on what a `Recycle` rests on, and on what `exchange` does.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Required,
    TypeAlias,
    TypedDict,
    Unpack,
)

from qmpcommit.block.chain import (
    Disk,
    Image,
    check_nameable,
    find_disk,
    read_disks,
    read_image,
)
from qmpcommit.block.graph import BlockGraph
from qmpcommit.callback import Failed, ask, going_up
from qmpcommit.commit.checks import check_override
from qmpcommit.commit.claim import Claim, Verb, release_all, take
from qmpcommit.commit.in_use import check_idle, check_unchanged
from qmpcommit.commit.job import see_through
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.commit.overlay.like import each_asked, is_encrypted
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.overlay.place import overlay_files
from qmpcommit.commit.pending import tell_of_recycles
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import (
    Pivot,
    Ready,
    check_command,
    is_answer,
    no_answer,
    run_command,
)
from qmpcommit.commit.preconditions import check_follows
from qmpcommit.commit.stale_layers import users
from qmpcommit.cycles.book import RoundBook, part_of, recycle_of
from qmpcommit.cycles.discarding import Discarded, Discarding, discard_of, discarded
from qmpcommit.cycles.exchange import Guest
from qmpcommit.errors import (
    ChainError,
    CommitFailed,
    InvalidRequest,
    VMStateError,
)
from qmpcommit.group.members import GroupMember
from qmpcommit.group.policy import GroupReady, group_ready
from qmpcommit.group.run import GroupCommit
from qmpcommit.guest.hold import check_sockets
from qmpcommit.guest.marks import thaw_all_abandoned
from qmpcommit.guest.run_state import How, runs
from qmpcommit.guest.sockets import Agents, Sockets
from qmpcommit.names import JOB_PREFIX
from qmpcommit.tasks import to_the_end
from qmpcommit.units import parse_seconds
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.vm import VM

Place = tuple["VM", str]
"""A disk of a VM."""

Found = tuple["VM", Disk]

KeepIf: TypeAlias = Sequence[str] | Callable[[Ready], Awaitable[bool] | bool]
"""A command, whose exit status 0 says keep and 1 to 125 discard, or a callable that says it."""

KeepAllIf: TypeAlias = KeepIf | Callable[[GroupReady], Awaitable[bool] | bool]
"""The same for several disks, which are all kept or all discarded."""

TIMEOUT = 3600.0
"""Seconds that a command gets to say it."""

GRACE = 0.5
"""Seconds after which an overlay that is made and not laid was left by somebody who was killed."""


_FRESH = re.compile(rf"{JOB_PREFIX}([cd][0-9a-f]{{8}})(?:-[0-9a-f]{{4}})?-top$")
"""The node-name of a discard's fresh overlay, the daemon's included; a group's share a stem."""


@record
class Round(Record):
    """One round of a cycle: `result` says which of `kept` and `discarded` tells how."""

    result: Literal["kept", "discarded"]
    disk: str
    overlay: str
    kept: CommitOutcome | None = None
    discarded: Discarded | None = None


class DiscardOptions(TypedDict, total=False):
    """Of `discard`: what becomes of the guest, where the next overlay is, whether the old goes.

    With "claim" in `override` the disks are taken over from whoever holds them. `ledger` is told of
    each step before it is taken; ``qc.resume(ledger, vms)`` goes on from there.
    """

    guest: Guest | None
    overlay: str | os.PathLike[str] | None
    overlay_options: Mapping[str, Any] | None
    overlay_secret: str | None
    delete: bool
    ledger: Ledger | None
    override: Collection[str]


class CycleOptions(DiscardOptions, total=False):
    """Of `cycle`; `timeout` is how many seconds `keep_if` has for its answer.

    `freeze` quiesces the guests for the instant of what is kept, as for a `GroupCommit`.
    """

    timeout: float
    freeze: How | None


class SessionCycleOptions(CycleOptions, total=False):
    """What `Session.cycle` takes; `agents` is the guest agent's socket, for a `freeze`."""

    agents: Agents | None


class RoundOptions(CycleOptions, total=False):
    """What `cycle` takes for disks of one or several VMs."""

    keep_if: Required[KeepAllIf]
    agents: Sockets[Any] | None


async def discard(
    disks: Iterable[Place],
    *,
    guest: Guest | None = None,
    overlay: str | os.PathLike[str] | None = None,
    overlay_options: Mapping[str, Any] | None = None,
    overlay_secret: str | None = None,
    delete: bool = False,
    ledger: Ledger | None = None,
    override: Collection[str] = (),
) -> tuple[Discarded, ...]:
    """Throw the active overlays of disks of one or several VMs away: of all of them or of none.

    `disks` are tuples of a session and a disk. See `Session.discard`; no guest goes on before all
    of them are exchanged, and `overlay` is a folder where there are several.
    """
    asks = OverlayOptions.of(overlay_options, overlay_secret)
    disks = tuple(disks)
    async with _claimed(await _find(disks), "disc", override) as claims:
        found = await _find(disks)
        book = _book(ledger, found, "discard", os.urandom(4).hex())
        stem = await _interrupted(found)
        if stem is not None:
            return await _finish(found, stem, guest, delete, claims, asks=asks, book=book)
        plans = await _planned(found)
        guest = await _agreed(found, guest)
        fresh = await asyncio.to_thread(overlay_files, _named(found, plans), overlay)
        asked = await check_followed(found, plans, asks)
        discarding = _discard(
            found, plans, fresh, guest=guest, delete=delete, claims=claims, asked=asked, book=book
        )
        return await to_the_end(discarding)


async def cycle(
    disks: Iterable[Place],
    *,
    keep_if: KeepAllIf,
    guest: Guest | None = None,
    overlay: str | os.PathLike[str] | None = None,
    overlay_options: Mapping[str, Any] | None = None,
    overlay_secret: str | None = None,
    delete: bool = False,
    timeout: float = TIMEOUT,
    freeze: How | None = None,
    agents: Sockets[Any] | None = None,
    ledger: Ledger | None = None,
    override: Collection[str] = (),
) -> tuple[Round, ...]:
    """One round for disks of one or several VMs, which all end the same way.

    `disks` are tuples of a session and a disk. See `Session.cycle`; of several disks `keep_if` is
    asked once: a callable is given a `GroupReady`, a command one line a disk in each of its
    variables. What is kept is kept as a group commit, so that the bases show one instant. With
    `freeze` the guests of all VMs are quiesced for it, by their agents' sockets in `agents` or by
    a pause; a discard needs none, for nothing of the overlay is left. The disks are claimed from
    before it is asked until the end.
    """
    disks = tuple(disks)
    asks = OverlayOptions.of(overlay_options, overlay_secret)
    timeout = parse_seconds(timeout, "timeout")
    check_sockets(freeze, (vm for vm, _ in disks), agents or {})
    if not callable(keep_if):
        keep_if = check_command(keep_if, "keep_if")
    if freeze is not None:
        await thaw_all_abandoned({vm for vm, _ in disks}, agents or {})
    group = os.urandom(4).hex()
    tag = group if len({vm for vm, _ in disks}) == 1 else ""
    async with _claimed(await _find(disks), "cycle", override, tag=tag) as claims:
        found = await _find(disks)
        book = _book(ledger, found, "cycle", group)
        stem = await _interrupted(found)
        if stem is not None:
            finishing = _finish(found, stem, guest, delete, claims, asks=asks, book=book)
            return _discarded(await finishing)
        plans = await _planned(found)
        guest = await _agreed(found, guest)
        await asyncio.to_thread(overlay_files, _named(found, plans), overlay)
        await check_followed(found, plans, asks)
        good = await deserves(plans, keep_if, timeout)
        found = await _find(disks)  # it may have taken its time
        asked_of, plans = plans, _plans(found)
        check_unchanged(asked_of, plans)
        fresh = await asyncio.to_thread(overlay_files, _named(found, plans), overlay)
        asked = await check_followed(found, plans, asks)
        if not good:
            discarding = _discard(
                found, plans, fresh, guest=guest, delete=delete, claims=claims, asked=asked,
                book=book,
            )  # fmt: skip
            return _discarded(await to_the_end(discarding))
        parts = [
            part_of(vm, disk.name, file, asks)
            for (vm, disk), file, asks in zip(found, fresh, asked, strict=True)
        ]
        await book.note("begin", result="kept", parts=parts, delete=delete, freeze=freeze)
        own = [{"claim": claim, "override": override} for claim in claims]
        return await keep(disks, own, agents or {}, book)


async def keep(
    disks: Sequence[Place], own: Sequence[dict[str, Any]], agents: Sockets[Any], book: RoundBook
) -> tuple[Round, ...]:
    """Carry into the bases what a noted round keeps, and note how that ended."""
    recycles = [
        GroupMember(vm, disk, recycle_of(part), options)
        for (vm, disk), part, options in zip(disks, book.parts, own, strict=True)
    ]
    async with book.noting_failure():
        ends = await _keep(recycles, agents, book)
    return await kept(ends, book)


async def kept(ends: Sequence[CommitOutcome], book: RoundBook) -> tuple[Round, ...]:
    """The round, as it is noted as well."""
    rounds = tuple(
        Round("kept", end.disk, part["overlay"], kept=end)
        for end, part in zip(ends, book.parts, strict=True)
    )
    await book.end(outcome=[each.model_dump(mode="json") for each in rounds])
    return rounds


def _book(ledger: Ledger | None, found: Sequence[Found], work: str, known_as: str) -> RoundBook:
    return RoundBook(ledger, found[0][0].log, known_as, {"work": work})


@asynccontextmanager
async def _claimed(
    found: Sequence[Found], verb: Verb, override: Collection[str], *, tag: str = ""
) -> AsyncIterator[list[Claim]]:
    """All of these disks are held, or none; raises `JobConflict`."""
    check_override(override)
    claims: list[Claim] = []
    try:
        for vm, disk in found:
            state = "Nothing was changed"
            claims.append(await take(vm, disk, verb, tag=tag, override=override, state=state))
        yield claims
    finally:
        await release_all(claims)


async def _keep(
    recycles: Sequence[GroupMember], agents: Sockets[Any], book: RoundBook
) -> Sequence[CommitOutcome]:
    delete, freeze = book.value["delete"], book.value["freeze"]
    if len(recycles) > 1 or freeze is not None:
        group = GroupCommit(
            recycles, shallow=True, delete=delete, freeze=freeze, agents=agents,
            known_as=book.known_as, ledger=book.child,
        )  # fmt: skip
        return (await group.run()).outcomes
    ((vm, disk, policy, own),) = recycles
    job = await vm.commit(
        disk, policy=policy, shallow=True, delete=delete, ledger=book.child, **own
    )
    return [await see_through(job)]


async def cycles(
    disks: Iterable[Place], *, every: float, **options: Unpack[RoundOptions]
) -> AsyncIterator[tuple[Round, ...]]:
    """Rounds, one every so many seconds; see `Session.cycles`."""
    disks = tuple(disks)
    every = parse_seconds(every, "every")
    loop = asyncio.get_running_loop()
    while True:
        begun = loop.time()
        made = await cycle(disks, **options)
        # a node-name or file of the former overlay means nothing any more
        disks = tuple((vm, each.overlay) for (vm, _), each in zip(disks, made, strict=True))
        yield made
        await asyncio.sleep(max(0.0, begun + every - loop.time()))


def _discarded(ends: Iterable[Discarded]) -> tuple[Round, ...]:
    return tuple(Round("discarded", end.disk, end.overlay, discarded=end) for end in ends)


# -- what a round needs -------------------------------------------------------------------------


async def _find(disks: Iterable[Place]) -> list[Found]:
    """Look each disk up; raises `InvalidRequest` where one is named twice, as `Session.look`."""
    found: list[Found] = []
    for vm, name in disks:
        _, graph = await vm.look()
        disk = find_disk(read_disks(graph), str(name), vm=vm.name, cwd=vm.cwd)
        if any((vm, disk.root) == (other, known.root) for other, known in found):
            raise InvalidRequest(
                f"{name} is a disk of {vm.name} that was named before; name it once."
                " Nothing was changed"
            )
        found.append((vm, disk))
    if not found:
        raise InvalidRequest("name the disks of the round, at least one")
    return found


async def _planned(found: Sequence[Found]) -> list[Plan]:
    """`_plans`, whose `ChainError` tells where an interrupted recycle may be its cause."""
    try:
        return _plans(found)
    except ChainError as error:
        vm = next((vm for vm, _ in found if vm.name == error.vm), found[0][0])
        raise tell_of_recycles(error, await vm.graph(), str(vm.address or "QMP")) from None


def _plans(found: Sequence[Found], stem: str | None = None) -> list[Plan]:
    stem = stem or f"d{os.urandom(4).hex()}"
    plans = []
    for vm, disk in found:
        check_idle(vm.name, disk)
        job_id = f"{JOB_PREFIX}{stem}-{os.urandom(2).hex()}"
        plans.append(plan_round(vm.name, disk, job_id))
    return plans


def plan_round(vm: str, disk: Disk, job_id: str) -> Plan:
    """What there is to be carried or discarded; raises `ChainError` where that can't be."""
    where = {"vm": vm, "disk": disk.name}
    if len(disk.chain) < 2:
        raise ChainError(
            f"{disk} of {vm} has no overlay: its chain needs a base and an overlay over it."
            " Nothing was changed",
            **where,
        )
    if disk.exports:
        raise ChainError(
            f"{disk} of {vm} is exported ({', '.join(disk.exports)}), and nothing could hold"
            " its clients back while its overlay is exchanged. Nothing was changed",
            **where,
        )
    check_nameable(disk.chain[1], vm, disk.name)
    return Plan(
        vm=vm,
        disk=disk,
        top=disk.chain[0],
        base=disk.chain[1],
        job_id=job_id,
        two_phase=True,
        policy=Pivot(),
    )


async def _agreed(found: Sequence[Found], guest: Guest | None) -> Guest:
    """What becomes of the guests; raises `VMStateError` where one runs and nothing was said."""
    if guest not in ("reset", "stop", None):
        raise InvalidRequest(f"a guest is 'reset' or left to 'stop', not {guest!r}")
    for vm, disk in found:
        if guest is None and await runs(vm):
            raise VMStateError(
                f"the guest of {vm.name} runs on {disk}, and what it has in memory belongs to the"
                " overlay that would be discarded: say whether it is to be reset or to be left"
                " stopped (reset or stop). Nothing was changed",
                vm=vm.name,
                disk=disk.name,
            )
    return guest or "stop"


async def check_followed(
    found: Sequence[Found], plans: Sequence[Plan], asks: OverlayOptions
) -> list[OverlayOptions]:
    """What is asked of each fresh overlay; raises `ChainError` where one can't follow."""
    asked = await _asked(found, plans, asks)
    for (vm, _), plan, own in zip(found, plans, asked, strict=True):
        await check_follows(vm, plan, await vm.graph(), own)
    return asked


async def _asked(
    found: Sequence[Found], plans: Sequence[Plan], asks: OverlayOptions
) -> list[OverlayOptions]:
    graphs = [await vm.graph() for vm, _ in found]
    return each_asked(
        asks,
        [
            is_encrypted(graph, plan.top.node_name) or is_encrypted(graph, plan.base.node_name)
            for graph, plan in zip(graphs, plans, strict=True)
        ],
    )


def _named(found: Sequence[Found], plans: Sequence[Plan]) -> list[tuple[str, str | None, Plan]]:
    """What `overlay_files` takes."""
    return [(vm.name, vm.cwd, plan) for (vm, _), plan in zip(found, plans, strict=True)]


async def deserves(plans: Sequence[Plan], keep_if: KeepAllIf, timeout: float) -> bool:
    """Ask whether the changes are kept; raises `CommitFailed` where there is no answer."""
    each = tuple(Ready(p.vm, p.disk.name, p.job_id, p.base, p.top) for p in plans)
    ready = each[0] if len(each) == 1 else group_ready(each)
    which = " and ".join(f"{p.top.filename} of {p.disk} of {p.vm}" for p in plans)
    where = {"vm": ready.vm, "disk": ready.disk}
    if callable(keep_if):
        unknown: CommitFailed | None = None
        try:
            answer = await ask(keep_if, ready, limit=timeout)
        except Failed as failed:
            unknown = CommitFailed(
                f"whether the overlay {which} is to be kept is not known: keep_if failed"
                f" ({failed}). Nothing was changed",
                **where,
            )
            unknown.__cause__ = failed.cause
        if unknown is not None:
            raise going_up(unknown)
        if not isinstance(answer, bool):  # as of one that forgot to return it, or to await
            raise CommitFailed(
                f"whether the overlay {which} is to be kept is not known: keep_if answered"
                f" {answer!r:.200}; it must answer True or False. Nothing was changed",
                **where,
            )
        return answer
    try:
        status = await run_command(keep_if, ready.environment(), timeout)
    except OSError as error:
        how = f"could not be run: {error.strerror}"
    else:
        if status is not None and is_answer(status):
            return status == 0
        how = f"took longer than {timeout:g} s"
        if status is not None:
            how = f"{no_answer(status)}, which is no answer"
    raise CommitFailed(
        f"whether the overlay {which} is to be kept is not known: {' '.join(keep_if)} {how}."
        " Nothing was changed",
        command=list(keep_if),
        **where,
    )


async def _discard(
    found: Sequence[Found],
    plans: Sequence[Plan],
    fresh: Sequence[str],
    *,
    guest: Guest,
    delete: bool,
    claims: Sequence[Claim],
    asked: Sequence[OverlayOptions],
    book: RoundBook,
    noted: Mapping[int, Mapping[str, Any]] | None = None,
) -> tuple[Discarded, ...]:
    """Exchange them; `noted` tells what was done for some, by their place."""
    vms = [vm for vm, _ in found]
    stopped = {vm for vm, plan in zip(vms, plans, strict=True) if await _clear(vm, plan)}
    parts = [
        {
            **part_of(vm, plan.disk.name, fresh[place], asked[place]),
            **await discard_of(vm, plan, delete=delete),
            **(noted or {}).get(place, {}),
        }
        for place, (vm, plan) in enumerate(zip(vms, plans, strict=True))
    ]
    await book.note("begin", result="discarded", parts=parts, guest=guest, delete=delete)
    async with book.noting_failure():
        exchanges = await Discarding(book, guest).run(vms, claims, stopped)
    return await discarded(exchanges, book)


# -- after a crash --------------------------------------------------------------------------------


async def _interrupted(found: Sequence[Found]) -> str | None:
    """What the names of a killed discard's overlays have in common, where it left any half-way.

    Such a one has laid its empty overlay, and not yet exchanged what is below.
    """
    for vm, disk in found:
        stem = _stem(disk)
        if stem is not None and len(disk.chain) > 2 and await _starts_from_the_base(vm, disk):
            return stem
    return None


def _stem(disk: Disk) -> str | None:
    name = _FRESH.match(disk.chain[0].node_name) if disk.chain else None
    return name[1] if name is not None else None


async def _starts_from_the_base(vm: VM, disk: Disk) -> bool:
    """Whether the active layer names what is below the layer that it lies over."""
    from qmpcommit.block.backing_name import ON_DISK, View, leads_to, written_below

    graph = await vm.graph()
    fresh, base = disk.chain[0].node_name, disk.chain[2].node_name

    def names_it() -> bool:
        view = View.of(vm.peer_pid, vm.cwd)
        written = next(written_below(graph, fresh, view))
        on_disk = written.source == ON_DISK
        return on_disk and leads_to(graph, fresh, base, written, view) == "same"

    return {fresh, base} <= graph.nodes.keys() and await asyncio.to_thread(names_it)


async def _finish(
    found: Sequence[Found],
    stem: str,
    guest: Guest | None,
    delete: bool,
    claims: Sequence[Claim],
    *,
    asks: OverlayOptions,
    book: RoundBook,
) -> tuple[Discarded, ...]:
    """Go on with a discard that was killed: its guests stand still since then.

    Some of its disks may not have been begun, and others be over.
    """
    plans: list[Plan] = []
    fresh: list[str] = []
    noted = {}
    for place, (vm, disk) in enumerate(found):
        if _stem(disk) != stem:
            plans += _plans([(vm, disk)], stem)
            fresh += await asyncio.to_thread(overlay_files, [(vm.name, vm.cwd, plans[-1])], None)
            continue
        laid = len(disk.chain) > 2 and await _starts_from_the_base(vm, disk)
        plans.append(
            Plan(
                vm=vm.name,
                disk=disk,
                top=disk.chain[1] if laid else _former(await vm.graph(), vm, disk),
                base=disk.chain[2 if laid else 1],
                job_id=disk.chain[0].node_name.removesuffix("-top"),
                two_phase=True,
                policy=Pivot(),
            )
        )
        fresh.append(disk.chain[0].filename)
        noted[place] = {"step": "lay", "running": True, "unseen": False}
    asked = await _asked(found, plans, asks)
    exchanging = _discard(
        found,
        plans,
        fresh,
        guest=guest or "stop",
        delete=delete,
        claims=claims,
        asked=asked,
        noted=noted,
        book=book,
    )
    return await to_the_end(exchanging)


async def _clear(vm: VM, plan: Plan) -> bool:
    """Remove what a killed discard has made and not laid; whether there was any.

    If so it had stopped the guest, or was about to.
    """
    left = _not_laid(await vm.graph())
    if left:
        await asyncio.sleep(GRACE)
    graph = await vm.graph()
    left &= _not_laid(graph)
    for name in sorted(left):
        made = replace(plan, job_id=name.removesuffix("-top"))
        fresh = FreshOverlay(vm, made, graph.file(graph.leaf(name)), vm.cwd)
        fresh.restore(stopped=False)
        await fresh.undo()
    return bool(left)


def _not_laid(graph: BlockGraph) -> set[str]:
    return {
        name
        for name, node in graph.nodes.items()
        if _FRESH.match(name) and "backing" not in node.children and not users(graph, name)
    }


def _former(graph: BlockGraph, vm: VM, disk: Disk) -> Image:
    """The overlay that one over its base now has taken the place of; it is not closed yet."""
    fresh, base = disk.chain[:2]
    for name, node in graph.nodes.items():
        over = node.children.get("backing") == base.node_name and name != fresh.node_name
        if over and not users(graph, name):
            return read_image(graph, name)
    raise ChainError(
        f"{disk} of {vm.name} was discarded together with other disks, and that was interrupted: it"
        f" starts from {base.filename} already, but its former overlay is not open any more. Name"
        " the other disks without it",
        vm=vm.name,
        disk=disk.name,
    )
