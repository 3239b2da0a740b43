"""Who works on a disk: a node in QEMU with an agreed name, which only one can add.

A claim is four nodes in each other, added by one command: the innermost, a ``null-co``, has a name
that follows from the disk, so that a second one is refused; those around it have names that tell
who holds the disk, for what, and since when. It costs nothing and ends with QEMU. The outermost
name differs each time, and is what is deleted: nobody deletes another one's claim by mistake.
Where a disk's users change meanwhile (it is unplugged, or exported anew) it has another name, and
is known by the layer that was active when it was claimed.

Whoever works on a disk claims it first and passes the claim down to what it has done for it. A
claim whose process is seen to have ended is anybody's; whether it has can be told only from the
same host and PID namespace.

Rests on ``blockdev-add``, ``blockdev-del`` and ``query-named-block-nodes``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from time import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qmpcommit.block.chain import read_disks
from qmpcommit.block.graph import CLAIMED, CLAIMER, read_graph
from qmpcommit.commit.checks import CLAIM
from qmpcommit.errors import (
    CommandRefused,
    DeadlineExceeded,
    JobConflict,
    MonitorLost,
    QmpCommitError,
)
from qmpcommit.qmp.process import began as process_began
from qmpcommit.qmp.process import command_words
from qmpcommit.tasks import all_of, to_the_end
from qmpcommit.values import Record, record

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from qmpcommit.block.chain import Disk
    from qmpcommit.block.graph import BlockGraph
    from qmpcommit.commit.job import CommitJob
    from qmpcommit.commit.plan import Plan
    from qmpcommit.commit.vm import VM

Verb = Literal["commit", "group", "window", "close", "flat", "cycle", "disc", "snap", "detach"]

WORK: Mapping[str, str] = {
    "commit": "a commit",
    "group": "a group commit",
    "window": "a snapshot window",
    "close": "the closing of a window",
    "flat": "a flatten",
    "cycle": "a round of a cycle",
    "disc": "a discard",
    "snap": "a snapshot",
    "detach": "a detached commit",
}
"""What a disk is claimed for, in words."""

TRIES = 5
"""How often a claim is tried that others take and give up meanwhile."""

RELEASE = 2.0
"""Seconds that QEMU gets to take the release of a claim; it is no reason to wait for longer."""

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_NUMBER = r"([0-9a-z]{1,13})"
_WHAT = re.compile(rf"{CLAIMER}([0-9a-f]{{10}})n([0-9a-f]{{8}})\.([a-z]{{1,6}})")
_WHO = re.compile(rf"{CLAIMER}([0-9a-f]{{10}})p{_NUMBER}\.{_NUMBER}")
_WHERE = re.compile(rf"{CLAIMER}([0-9a-f]{{10}})w([0-9a-f]{{6}})\.{_NUMBER}")
_FOR = re.compile(rf"{CLAIMER}([0-9a-f]{{10}})f([0-9a-f]{{8}})")
_LAYER = re.compile(rf"{CLAIMER}([0-9a-f]{{10}})b([0-9a-f]{{10}})")
_JOB = re.compile(rf"{CLAIMER}([0-9a-f]{{10}})j([0-9a-f]{{10}})")
_SPAN = re.compile(rf"{CLAIMER}([0-9a-f]{{10}})c([0-9a-f]{{7}})([0-9a-f]{{7}})")
_AGREED = re.compile(rf"{CLAIMED}([0-9a-f]{{10}})")

_held: set[str] = set()
"""The nonces of the claims that this process holds."""

_left: set[str] = set()
"""Those of the claims that it has let go, and that may be in QEMU still."""


class Here(NamedTuple):
    """This process: its id, when it began (clock ticks since boot), and where those count.

    `place` stands for the host since its boot and the PID namespace; "" where that can't be told.
    """

    pid: int
    began: int
    place: str


@record
class Owner(Record):
    """Who holds a disk: `verb` is what for, `since` since when (seconds since 1970).

    `disk` stands for the disk, `node` is what `blockdev-del` closes, `nonce` differs each time,
    `tag` tells of what it is a part (a window, or a group that is all on this VM), `layer` stands
    for what was the active one. `job` stands for a commit's job, `top` and `base` for what it
    commits. Unknown is 0 or "".
    """

    disk: str
    node: str = ""
    nonce: str = ""
    verb: str = ""
    pid: int = 0
    began: int = 0
    place: str = ""
    since: int = 0
    tag: str = ""
    layer: str = ""
    job: str = ""
    top: str = ""
    base: str = ""


# -- names: pure ----------------------------------------------------------------------------------


def number_of(disk: Disk) -> str:
    """What stands for a disk in its claim's name, while its overlays come and go.

    That is its device's, its drive's or its export's name. One that nothing uses has only its
    active layer's node: it may share all below with others.
    """
    return numbers_of(disk)[0]


def layers_of(disk: Disk) -> list[str]:
    """What stands for a disk's layers, the active one first."""
    return [layer_number(image.node_name) for image in disk.chain]


def layer_number(node: str) -> str:
    """What stands for the layer of that node-name."""
    return _number(f"layer {node}")


def job_number(job_id: str) -> str:
    """What stands for a job."""
    return _number(f"job {job_id}")


def numbers_of(disk: Disk) -> list[str]:
    """By what this disk may have been claimed, while it has these users."""
    names = [f"device {disk.qdev or disk.device}"] if disk.qdev or disk.device else []
    names += [f"export {each}" for each in sorted(disk.exports)]
    active = disk.chain[0].node_name if disk.chain else disk.name
    return [_number(name) for name in names or [f"node {active}"]]


def _number(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:10]


def node_of(owner: Owner) -> dict[str, Any]:
    """The arguments of the ``blockdev-add`` that claims the disk for this owner."""
    disk = f"{CLAIMER}{owner.disk}"
    names = [
        f"{disk}w{owner.place or '000000'}.{_short(owner.since)}",
        f"{disk}p{_short(owner.pid)}.{_short(owner.began)}",
        owner.node,
    ]
    if owner.tag:
        names.insert(0, f"{disk}f{owner.tag}")
    if owner.layer:
        names.insert(0, f"{disk}b{owner.layer}")
    if owner.job:
        names[:0] = [f"{disk}j{owner.job}", f"{disk}c{owner.top}{owner.base}"]
    node: dict[str, Any] = {
        "driver": "null-co",
        "node-name": f"{CLAIMED}{owner.disk}",
        "size": 0,
        "read-only": True,
    }
    for name in names:
        node = {"driver": "raw", "node-name": name, "read-only": True, "file": node}
    return node


def owners_among(names: Iterable[str]) -> dict[str, Owner]:
    """Who holds which disk, by what stands for it; `names` are those of QEMU's nodes."""
    found: dict[str, dict[str, Any]] = {}
    known: dict[str, dict[str, Any]] = {}
    for name in names:
        if match := _AGREED.fullmatch(name):
            found[match[1]] = {"disk": match[1]}
        elif match := _WHAT.fullmatch(name):
            what = {"node": name, "nonce": match[2], "verb": match[3]}
            known.setdefault(match[1], {}).update(what)
        elif match := _WHO.fullmatch(name):
            who = {"pid": int(match[2], 36), "began": int(match[3], 36)}
            known.setdefault(match[1], {}).update(who)
        elif match := _WHERE.fullmatch(name):
            place = "" if match[2] == "000000" else match[2]
            known.setdefault(match[1], {}).update(place=place, since=int(match[3], 36))
        elif match := _FOR.fullmatch(name):
            known.setdefault(match[1], {})["tag"] = match[2]
        elif match := _LAYER.fullmatch(name):
            known.setdefault(match[1], {})["layer"] = match[2]
        elif match := _JOB.fullmatch(name):
            known.setdefault(match[1], {})["job"] = match[2]
        elif match := _SPAN.fullmatch(name):
            known.setdefault(match[1], {}).update(top=match[2], base=match[3])
    return {disk: Owner(**facts, **known.get(disk, {})) for disk, facts in found.items()}


def _short(number: int) -> str:
    """A number to the base of 36, for a node-name has 31 characters at most."""
    text = ""
    while number or not text:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
    return text


# -- processes ------------------------------------------------------------------------------------


def here() -> Here:
    """This process, as its claims tell of it."""
    return _here(os.getpid())


@lru_cache(maxsize=1)
def _here(pid: int) -> Here:
    began = None
    try:
        began = process_began("self")
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            where = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
        known = os.readlink("/proc/self") == str(pid)  # else /proc is another namespace's
    except OSError:
        known = False
    place = hashlib.sha256(where.encode()).hexdigest()[:6] if known else ""
    return Here(pid, began or 0, place if began else "")


def lives(owner: Owner) -> bool | None:
    """Whether whoever holds a disk is there still; None where that can't be known from here."""
    now = here()
    if owner.pid == now.pid and owner.nonce in _held | _left:
        return owner.nonce in _held
    if not now.place or owner.place != now.place or not owner.pid:
        return None
    if (owner.pid, owner.began) == (now.pid, now.began):
        return False  # whoever of this process had it has forgotten it
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    try:
        if not os.path.exists(f"/proc/{owner.pid}"):
            return None  # it is hidden from us, or has ended just now
        return process_began(owner.pid) == owner.began
    except PermissionError:
        return None


def told(owner: Owner) -> str:
    """An owner in words: for what it holds the disk, which process it is, and since when."""
    work = WORK.get(owner.verb, "another program's work")
    who = f"process {owner.pid}" if owner.pid else "a process that is not told"
    if lives(owner) is None:
        who += " of another host or container"
    elif (owner.pid, owner.began) == here()[:2]:
        who = f"this very process ({owner.pid})"
    elif program := _program(owner.pid):
        who = f"{program} ({who})"
    since = ""
    if owner.since:
        at = datetime.fromtimestamp(owner.since, UTC)
        since = f", since {at:%Y-%m-%d %H:%M:%S} UTC"
    return f"{work} of {who}{since}"


def _program(pid: int) -> str:
    """What a process is called: a script's name where an interpreter runs one."""
    words = [word.decode(errors="replace") for word in command_words(pid) or () if word]
    if words and os.path.basename(words[0]).startswith("python"):
        words = [word for word in words[1:] if not word.startswith("-")] or words
    return os.path.basename(words[0]) if words else ""


# -- conflicts ------------------------------------------------------------------------------------


def conflict(vm: VM, disk: Disk, owner: Owner, state: str = "Nothing was sent") -> JobConflict:
    """The error of whoever comes second; it names the first."""
    alive = lives(owner)
    hint = None
    text = f"{disk} of {vm.name} is held by {told(owner)}"
    if disk.jobs:
        text += f"; it has a block job already: {', '.join(disk.jobs)}"
    if alive is None:
        text += (
            ". Whether that process lives can't be seen from here. Wait for its end; or, if it is"
            f" gone for certain, take the disk over from it: override {CLAIM}"
        )
        hint = f"--override {CLAIM} does that"
    else:
        text += ". Wait for its end, or end that program"
    return JobConflict(
        f"{text}. {state}",
        hint=hint,
        vm=vm.name,
        disk=disk.name,
        job_id=disk.jobs[0] if disk.jobs else None,
        owner={**owner.model_dump(), "work": WORK.get(owner.verb, owner.verb), "alive": alive},
    )


def owner_in(graph: BlockGraph, disk: Disk) -> Owner | None:
    """Who holds this disk, as a graph that was read shows it.

    A claim whose disk has other users by now is known by the layer that it was made over.
    """
    if not graph.claims:
        return None
    owners = owners_among(graph.claims)
    for number in numbers_of(disk):
        if number in owners:
            return owners[number]
    there = {
        (number, layer)
        for each in read_disks(graph)
        for number in numbers_of(each)
        for layer in layers_of(each)
    }
    mine = layers_of(disk)
    lost = (owner for owner in owners.values() if (owner.disk, owner.layer) not in there)
    return next((owner for owner in lost if owner.layer in mine), None)


def check_free(
    vm: VM,
    graph: BlockGraph,
    disk: Disk,
    *,
    claim: Claim | None = None,
    override: Collection[str] = (),
) -> None:
    """Raise `JobConflict` where somebody else who lives, or may live, holds this disk.

    `claim` is that of whoever asks.
    """
    if not graph.claims or vm.private or CLAIM in override:
        return
    owner = owner_in(graph, disk)
    if owner is None or lives(owner) is False:
        return
    if claim is not None and (not claim.held or claim.owner.nonce == owner.nonce):
        return
    raise conflict(vm, disk, owner)


# -- claims ---------------------------------------------------------------------------------------


class Claim:
    """A disk that is held, until `release` or the end of an ``async with``.

    `held` is False where it could not be claimed and that is no obstacle: a QEMU without the
    driver for it, one that nobody else can reach, or a recovery that must not wait for others.
    """

    def __init__(self, vm: VM, owner: Owner, *, held: bool) -> None:
        self.vm, self.owner, self.held = vm, owner, held
        if held:
            vm.claims.add(self)

    async def release(self, vm: VM | None = None) -> None:
        """Let the disk go; safe to repeat, bounded in time, never raises.

        That is done over `vm`, where it is another session with the same QEMU by now. Where the
        monitor is away, it is done as soon as that session claims anything again.
        """
        if self._over():
            await to_the_end(_let_go(vm or self.vm, self.owner))

    def abandon(self) -> None:
        """Let it go without a word to QEMU: this process takes over what it finds there."""
        if self._over():
            _left.add(self.owner.nonce)

    def _over(self) -> bool:
        held, self.held = self.held, False
        _held.discard(self.owner.nonce)
        self.vm.claims.discard(self)
        return held

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.release()


async def release_all(claims: Iterable[Claim], vm: VM | None = None) -> None:
    """`Claim.release` them at once: a cancellation, or a QEMU that hangs, keeps none of them."""
    await to_the_end(all_of(*(claim.release(vm) for claim in claims)))


async def take(
    vm: VM,
    disk: Disk,
    verb: Verb,
    *,
    tag: str = "",
    override: Collection[str] = (),
    state: str = "Nothing was sent",
    looked: bool = False,
    plan: Plan | None = None,
) -> Claim:
    """Claim a disk, or raise `JobConflict` that names who holds it.

    A claim whose owner is seen to have ended is taken over, and so is any with "claim" in
    `override`. `tag` (eight hexadecimal digits) tells of what it is a part, `looked` that
    `check_free` has just been asked; of a commit's `plan` it tells, for whoever finds its job ended
    without its owner. If its reply is lost QEMU is asked; if this is cancelled
    nothing stays claimed. Raises what `Monitor.execute` raises.
    """
    now = here()
    nonce = os.urandom(4).hex()
    number = number_of(disk)
    node = f"{CLAIMER}{number}n{nonce}.{verb}"
    owner = Owner(
        number,
        node,
        nonce,
        verb,
        *now,
        since=int(time()),
        tag=tag,
        layer=next(iter(layers_of(disk)), ""),
    )
    if plan is not None:
        top, base = (layer_number(image.node_name)[:7] for image in (plan.top, plan.base))
        owner = replace(owner, job=job_number(plan.job_id), top=top, base=base)
    if vm.private:
        return Claim(vm, owner, held=False)
    await clear_left(vm)
    if not looked or CLAIM in override:
        await _clear_other(vm, disk, override, state)
    _held.add(nonce)
    held = False
    try:
        held = await _add(vm, disk, owner, override, state)
        return Claim(vm, owner, held=held)
    except JobConflict:
        raise
    except BaseException:  # it may be there for all that is known
        await to_the_end(_let_go(vm, owner))
        raise
    finally:
        if not held:
            _held.discard(nonce)


async def take_if_free(
    vm: VM, disk: Disk, verb: Verb, *, tag: str = "", plan: Plan | None = None
) -> Claim:
    """As `take`, for a recovery: where somebody else holds the disk by now, it goes on without."""
    try:
        return await take(vm, disk, verb, tag=tag, plan=plan)
    except JobConflict as error:
        vm.log.warning("disk_is_held", disk=disk.name, why=error.message)
        owner = Owner(number_of(disk), verb=verb, tag=tag)
        return Claim(vm, owner, held=False)


async def take_for(
    vm: VM,
    job: CommitJob,
    verb: Verb = "commit",
    *,
    override: Collection[str] = (),
    tag: str = "",
) -> None:
    """Claim a prepared job's disk, if that was not done; raises what `take` raises.

    It is let go when the job is no longer followed: one that is left to itself keeps others off by
    being there. Who does not start the job has to `let_go` its disk.
    """
    if job.claim is None:
        plan = job.plan
        if vm.detaches and verb == "commit":
            verb = "detach"
        job.inherit(
            await take(vm, plan.disk, verb, tag=tag, override=override, looked=True, plan=plan)
        )


async def take_again(vm: VM, job: CommitJob) -> None:
    """Claim the disk of a job anew that is taken up and followed, if nobody else has it by now."""
    with suppress(QmpCommitError):  # the monitor is away: the job keeps others off
        job.inherit(await take_if_free(vm, job.plan.disk, "commit", plan=job.plan))


async def let_go(*jobs: CommitJob) -> None:
    """Let the disks of jobs go that were not started, where they are held for these alone."""
    for job in jobs:
        if job.own_claim is not None:
            await job.own_claim.release()


async def _clear_other(vm: VM, disk: Disk, override: Collection[str], state: str) -> None:
    """Take over what was claimed while the disk had other users; raises `JobConflict`."""
    there = owner_in(await read_graph(vm), disk)
    if there is None or there.disk == number_of(disk):  # that one is met by who adds the same
        return
    if lives(there) is not False and CLAIM not in override:
        raise conflict(vm, disk, there, state)
    vm.log.warning("claim_taken_over", disk=disk.name, owner=told(there))
    await _delete(vm, there)


async def _add(vm: VM, disk: Disk, owner: Owner, override: Collection[str], state: str) -> bool:
    """Whether it is claimed now; False where this QEMU can't hold a claim."""
    there: Owner | None = None
    met = 0
    for _ in range(TRIES):
        refused: CommandRefused | None = None
        try:
            await vm.execute("blockdev-add", node_of(owner))
            return True
        except CommandRefused as error:
            refused = error
            met += 1
        except DeadlineExceeded:
            vm.drop()  # what it still runs of this connection, it has run when the next one answers
        except MonitorLost:
            pass
        there = await _asked(vm, owner.disk)
        if there is None and refused is not None and met > 1:  # else one may have gone just now
            vm.log.warning("disk_not_claimed", disk=disk.name, error=refused.desc)
            return False
        if there is None:
            continue
        if there.nonce == owner.nonce:
            return True
        if lives(there) is not False and CLAIM not in override:
            break
        vm.log.warning("claim_taken_over", disk=disk.name, owner=told(there))
        await _delete(vm, there)
    if there is None:
        raise MonitorLost(
            f"the monitor of {vm.name} was lost {TRIES} times while {disk} was claimed. {state}",
            vm=vm.name,
            disk=disk.name,
        )
    raise conflict(vm, disk, there, state)


async def _asked(vm: VM, disk: str) -> Owner | None:
    """Who holds it, over a new connection where the one that was broken is not known to be yet."""
    try:
        found = await owners_of(vm)
    except MonitorLost:
        found = await owners_of(vm)
    return next((owner for owner in found if owner.disk == disk), None)


async def owners_of(vm: VM) -> list[Owner]:
    """Who holds which disk of this VM now."""
    nodes = await vm.execute("query-named-block-nodes", {"flat": True})
    return list(owners_among(str(node.get("node-name") or "") for node in nodes).values())


async def clear_dead(vm: VM, owners: Iterable[Owner]) -> None:
    """Close what those of these owners have left that are seen to have ended."""
    for owner in owners:
        if lives(owner) is False:
            with suppress(QmpCommitError):
                await _delete(vm, owner)


async def clear_dead_of(vms: Iterable[VM], *verbs: Verb) -> None:
    """Close what processes that are seen to have ended have left so on these VMs."""
    for vm in dict.fromkeys(vms):
        await clear_dead(vm, [owner for owner in await owners_of(vm) if owner.verb in verbs])


async def _delete(vm: VM, owner: Owner) -> None:
    """Close that very claim; it may be gone already, and its disk be another one's by now."""
    with suppress(CommandRefused):
        await vm.execute("blockdev-del", {"node-name": owner.node})


async def _let_go(vm: VM, owner: Owner) -> None:
    if vm.connected:
        with suppress(QmpCommitError, TimeoutError):
            async with asyncio.timeout(RELEASE):
                await _delete(vm, owner)
                return
    _left.add(owner.nonce)
    vm.left_claims.append(owner)


async def clear_left(vm: VM) -> None:
    """Close what could not be closed when it was let go."""
    while vm.left_claims:
        owner = vm.left_claims.pop(0)  # another take may be at it as well
        try:
            await _delete(vm, owner)
        except BaseException:
            vm.left_claims.append(owner)
            raise
        _left.discard(owner.nonce)
