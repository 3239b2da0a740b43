"""What is wrong with VMs, and what a person types: a verdict each, and nothing is changed.

A death's leavings are what `recover` finds; names on disk, sharing and room are what a commit
looks at before it begins.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from qmpcommit.block.chain import Disk
from qmpcommit.block.command_line import read_command_line
from qmpcommit.commit.checks import check_commit
from qmpcommit.commit.headers import wrong_headers
from qmpcommit.commit.pending import place_of
from qmpcommit.commit.plan import plan_commit
from qmpcommit.commit.policy import Pivot
from qmpcommit.commit.request import Request
from qmpcommit.commit.vm import VM
from qmpcommit.errors import CommandRefused, QmpCommitError
from qmpcommit.guest.marks import marks_among
from qmpcommit.names import JOB_PREFIX
from qmpcommit.qmp.process import command_words
from qmpcommit.recovery.findings import Finding
from qmpcommit.recovery.host import name_of, stopped
from qmpcommit.recovery.jobs import detached
from qmpcommit.recovery.lookup import look_up
from qmpcommit.recovery.monitors import WITHIN, Place, ask
from qmpcommit.recovery.seen import Seen, see
from qmpcommit.values import Record, record

Level = Literal["wrong", "note"]

CHECKS: dict[str, Level] = {
    "free-space": "wrong",
    "corrupt": "wrong",
    "stale": "wrong",
    "replaced-file": "wrong",
    "base-shared": "note",
}
"""What speaks against a full commit that the VM's owner should know before one is asked for.

A shared base is what clones of a template have for all their lives: it is no fault by itself.
"""

GONE = (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)
"""What says that no VM is there, and not that it can't be asked."""


@record
class Symptom(Record):
    """One thing that somebody should look at: a "wrong" one makes the VM's verdict.

    `kind` is that of `recover`'s finding, a check's name, "monitor", "stopped", "header", "bitmap",
    "overlay", "no-reboot" or "trap". `message` says what it is, `next` what is to be done, and
    `command` what is typed for that, "" where nothing is.
    """

    kind: str
    level: Level
    message: str
    next: str = ""
    command: str = ""
    disk: str = ""


@record
class Verdict(Record):
    """What is to be said of one VM; `there` is whether anything listens at its monitor."""

    address: str
    name: str = ""
    well: bool = True
    there: bool = True
    symptoms: tuple[Symptom, ...] = ()


class _Looked(NamedTuple):
    """What one VM showed; its own symptoms are there, those of a death are not."""

    verdict: Verdict
    seen: Seen | None = None


async def examine(places: Sequence[Place], *, within: float = WITHIN) -> list[Verdict]:
    """All VMs, asked at the same time; `within` bounds each, in seconds.

    What a group of several of them has left is judged over all that answer.
    """
    looked = await asyncio.gather(*(_look(place, within) for place in places))
    seen = [each.seen for each in looked if each.seen is not None]
    found = look_up(seen)
    return [_verdict(each, found, seen) for each in looked]


async def _look(place: Place, within: float) -> _Looked:
    try:
        address, (verdict, seen) = await ask(place, _examine, within=within)
    except QmpCommitError as error:
        there = not isinstance(error.__cause__, GONE)
        symptom = Symptom("monitor", "wrong", error.message)
        return _Looked(Verdict(place.addresses[0], there=there, symptoms=(symptom,)))
    return _Looked(replace(verdict, address=address), seen)


def _verdict(looked: _Looked, found: Sequence[Finding], seen: Sequence[Seen]) -> Verdict:
    symptoms = list(looked.verdict.symptoms)
    if looked.seen is not None:
        mine = [each for each in found if each.vm == looked.seen.vm]
        symptoms = [*(_of_death(each, looked.seen, seen) for each in mine), *symptoms]
    well = all(each.level != "wrong" for each in symptoms)
    return replace(looked.verdict, well=well, symptoms=tuple(symptoms))


def _of_death(finding: Finding, at: Seen, seen: Sequence[Seen]) -> Symptom:
    """What `recover` would say, and how it is called for that."""
    place = place_of(finding.what)
    group = [
        vm.address
        for vm in seen
        if place is not None
        and any((other := place_of(job)) and other.group == place.group for job in vm.jobs)
    ]
    words = shlex.join(["qmpcommit", "recover", *(group or [at.address])])
    if finding.kind in ("ready", "copying"):
        words += " --decide DECISION"  # no words that a shell would take for commands
    elif any(mark.how == "agent" for mark in marks_among([finding.what])):
        words += " --agent SOCKET"
    elif not finding.does:
        words = ""
    level: Level = "wrong"
    if finding.kind in ("ready", "copying", "claim") and not finding.does:
        disk = next((each for each in at.disks if each.name == finding.disk), None)
        level = "note" if detached(at, disk) else "wrong"
    if level == "note" and finding.kind != "claim":
        words = shlex.join(["qmpcommit", "wait", at.address, finding.what])
        return Symptom(finding.kind, level, finding.message, "Take it up", words, finding.disk)
    return Symptom(finding.kind, level, finding.message, finding.next, words, finding.disk)


async def _examine(vm: VM) -> tuple[Verdict, Seen]:
    seen = await see(vm)
    symptoms = [Symptom("stopped", "wrong", text) for text in stopped(seen)]
    for disk in seen.disks:
        if len(disk.chain) > 1:
            symptoms += await _headers(vm, disk)
            symptoms += await asyncio.to_thread(_commit, vm, seen, disk)
            symptoms += _bitmaps(disk)
        symptoms += _options(disk)
    symptoms += await asyncio.to_thread(_started_with, vm.peer_pid)
    symptoms += await _traps(vm, seen)
    return Verdict(str(vm.address), name=await name_of(vm), symptoms=tuple(symptoms)), seen


async def _headers(vm: VM, disk: Disk) -> list[Symptom]:
    """Names on disk with which the next start would open another disk, or none."""
    wrong = await wrong_headers(vm, vm.cwd, disk.chain[0].node_name, rewritten=False)
    todo = "Mend it while the VM is off"
    return [Symptom("header", "wrong", w.message, todo, w.command, disk.name) for w in wrong]


def _commit(vm: VM, seen: Seen, disk: Disk) -> list[Symptom]:
    """What a commit of the whole chain would be refused for; looks at files."""
    try:
        plan = plan_commit(vm.name, disk, Request(disk.name, policy=Pivot()), vm.cwd)
    except QmpCommitError:
        return []  # it has a job, which is told by itself
    dry = shlex.join(["qmpcommit", "commit", seen.address, disk.name, "--pivot", "--dry-run"])
    todo = "All that a commit would be refused for"
    return [
        Symptom(each.name, CHECKS[each.name], f"{disk}: {each.message}", todo, dry, disk.name)
        for each in check_commit(seen.graph, plan, pid=vm.peer_pid, cwd=vm.cwd)
        if each.level == "refuse" and each.name in CHECKS
    ]


def _bitmaps(disk: Disk) -> list[Symptom]:
    """Bitmaps that do not see what the guest writes: an overlay was laid over their layer."""
    active = disk.chain[0]
    todo = "Make a full backup, or commit what lies over it: its bitmaps are carried along"
    return [
        Symptom(
            "bitmap",
            "note",
            f"{disk}: bitmap {name} is on {image.filename}, and not on {active.filename}, which the"
            " guest writes to: what it writes is not marked, and an incremental backup misses it",
            todo,
            disk=disk.name,
        )
        for image in disk.chain[1:]
        for name in image.bitmaps
        if name not in active.bitmaps
    ]


def _options(disk: Disk) -> list[Symptom]:
    """What a fresh overlay may have lost, for QEMU tells of no layer with what it was opened."""
    active = disk.chain[0] if disk.chain else None
    if active is None or not active.node_name.startswith(JOB_PREFIX):
        return []
    text = (
        f"{disk}: {active.filename} was laid while the VM ran: whether it has the discard, aio and"
        " locking that its disk is started with, QEMU does not tell"
    )
    todo = "Give them with the next overlay, if it has others than QEMU's defaults"
    return [Symptom("overlay", "note", text, todo, "qmpcommit help commit", disk.name)]


def _started_with(pid: int | None) -> list[Symptom]:
    """What QEMU's command line says that its owner should know."""
    words = (command_words(pid) or []) if pid is not None else []
    found = []
    if {b"-no-reboot", b"--no-reboot"}.intersection(words) or b"reboot=shutdown" in words:
        text = "it was started with -no-reboot: QEMU ends where a cycle or discard resets the guest"
        stop = "Have the guest left stopped there"
        found.append(Symptom("no-reboot", "note", text, stop, "qmpcommit help cycle"))
    line = read_command_line(pid) if pid is not None else None
    over_tcp = any(word.startswith(b"tcp:") or b"host=" in word for word in words)
    if line is not None and len(line.monitors) == 1 and not over_tcp:
        text = "it has one monitor: while somebody holds that, nobody else can look or decide"
        more = "Start it with two the next time (-qmp twice)"
        found.append(Symptom("monitor", "note", text, more))
    return found


async def _traps(vm: VM, seen: Seen) -> list[Symptom]:
    """What this QEMU's version is known to do to a VM that is built so."""
    version = (await vm.query_version()).qemu
    found = []
    if version.major < 6 and await _some(vm, "query-iothreads"):
        found.append(f"QEMU {version} with an iothread may abort in a recycle, and the guest ends")
    if 6 <= version.major < 8 and any(disk.exports for disk in seen.disks):
        found.append(
            f"in QEMU {version} a client that connects to an export while a job is PENDING can"
            " write past it: connect none while a group is committed"
        )
    help_ = "qmpcommit help qemu"
    return [Symptom("trap", "note", text, "More of that", help_) for text in found]


async def _some(vm: VM, query: str) -> bool:
    answer: Any = []
    with suppress(CommandRefused):
        answer = await vm.execute(query)
    return bool(answer)
