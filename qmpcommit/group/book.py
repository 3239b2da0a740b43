"""What is noted of a group in its one ledger, before each step is taken."""

from __future__ import annotations

import asyncio
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qmpcommit.callback import Notes, Noting
from qmpcommit.commit.ledger import Noted, add_note
from qmpcommit.commit.phases import Phase, State
from qmpcommit.commit.policy import AnyPolicy, PolicyCall
from qmpcommit.errors import CommitFailed
from qmpcommit.group.members import GroupMember, requested
from qmpcommit.group.noted import NotedGroup
from qmpcommit.guest.hold import HeldGuest
from qmpcommit.qmp.process import process_identity
from qmpcommit.tasks import stop

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.vm import VM

KIND = "group"
_HOOKS = ("on_pivot", "on_stall", "converge")
"""What is no value, and is to be given again to whoever goes on."""


class Book(ABC):
    """What is kept of a group, in JSON's own types, and where its members' steps are noted."""

    noted: dict[str, Any]

    @property
    @abstractmethod
    def as_noted(self) -> NotedGroup:
        """The group as it is noted."""

    @abstractmethod
    def member(self, number: int) -> Noted:
        """What the ledger of one member's commit holds; nothing where none was begun."""

    @abstractmethod
    def of(self, number: int) -> Ledger:
        """That ledger."""

    @abstractmethod
    async def write(self, step: str) -> None:
        """Have all of it written down."""

    @property
    def frozen(self) -> dict[str, HeldGuest]:
        """The guests that are quiesced, or may be, by their VMs."""
        dumped = self.noted.get("frozen") or {}
        return {key: HeldGuest.load(key, facts) for key, facts in dumped.items()}

    def put_frozen(self, guest: HeldGuest) -> None:
        """A guest is about to be quiesced, or let go on; written with the next note."""
        frozen = {**self.noted.get("frozen", {}), guest.vm: guest.dump()}
        self.noted = {**self.noted, "frozen": frozen}

    def goes_on_again(self, key: str, seconds: float | None = None) -> None:
        """A VM's guest is not quiesced any more, and stood still for so long; likewise."""
        frozen = {vm: facts for vm, facts in self.noted.get("frozen", {}).items() if vm != key}
        stood = {**self.noted.get("quiesced", {}), **({} if seconds is None else {key: seconds})}
        self.noted = {**self.noted, "frozen": frozen, "quiesced": stood}


class GroupBook(Book):
    """Notes one group: `noted` is all that is kept of it, in JSON's own types.

    Beside what `NotedGroup` has there is what was asked, from which it is begun again.
    """

    def __init__(self, ledger: Any, members: Sequence[GroupMember], known_as: str) -> None:
        self._ledger, self._known_as = ledger, known_as
        self._noting = Noting(ledger, members[0].vm.log)
        self._soon: asyncio.Task[None] | None = None
        self.begun = False
        self.keys = keys_of([member.vm for member in members])
        self.noted: dict[str, Any] = NotedGroup(()).dump()

    @property
    def as_noted(self) -> NotedGroup:
        """The group as it is noted."""
        return NotedGroup.load(self.noted)

    @property
    def problems(self) -> list[str]:
        """What was done although it could not be noted."""
        return self._noting.problems

    def goes_on_from(self, noted: Noted, keys: Mapping[VM, str]) -> None:
        """Note what follows what a former process has noted, of VMs that have these keys."""
        self.begun, self.noted, self.keys = True, dict(noted), dict(keys)

    async def begin(self, members: Sequence[GroupMember], asked: Mapping[str, Any]) -> None:
        """What is asked, before anything is sent; raises `CommitFailed`, or `InvalidRequest`."""
        vms = {
            key: {"name": vm.name, "identity": process_identity(vm.peer_pid)}
            for vm, key in self.keys.items()
        }
        each = [{"vm": self.keys[member.vm], "noted": {}} for member in members]
        tries = self.noted["tries"] + 1 if self.begun else 0
        value = {**NotedGroup((), tries=tries).dump(), "members": each, "vms": vms, **asked}
        await self._note("begin", value)
        self.begun = True

    async def finalize(self, by: str) -> None:
        """All disks are held, and all jobs are to be finalized."""
        await self._note("finalize", {**self.noted, "finalize": True, "by": by}, held=True)

    async def again(self) -> None:
        """All jobs are cancelled for want of a decision, and it is to be begun again."""
        await self._note("undo", {**self.noted, "again": True}, held=True, anyway=True)

    async def end(self, **how: Any) -> None:
        """It has ended: its `outcome` or its `error`."""
        if self._soon is not None:
            await stop(self._soon)
        if self.begun and not self.noted["over"]:
            await self._note("end", {**self.noted, "over": True, **how}, held=True, anyway=True)

    async def _note(self, step: str, value: dict[str, Any], **how: bool) -> None:
        before, self.noted = self.noted, value
        try:
            await self._noting.note(step, **self._facts(), **how)
        except CommitFailed:
            self.noted = before
            raise

    def _facts(self) -> dict[str, Any]:
        over = self.noted["over"]
        return {"kind": KIND, "known_as": self._known_as, "value": self.noted, "over": over}

    async def write(self, step: str) -> None:
        """Have all of it written down, for whoever calls by the rule; raises what that raises."""
        written = self._ledger.note(step, **self._facts())
        if inspect.isawaitable(written):
            await written

    # -- the members ------------------------------------------------------------------------------

    def of(self, number: int) -> MemberNotes:
        """What one member's commit notes its steps in."""
        return MemberNotes(self, number)

    def member(self, number: int) -> Noted:
        """What is noted of one."""
        noted: Noted = self.noted["members"][number]["noted"]
        return noted

    def put(self, number: int, noted: Noted) -> None:
        """The same, anew; written with the next note."""
        members = list(self.noted["members"])
        members[number] = {**members[number], "noted": noted}
        self.noted = {**self.noted, "members": members}

    def write_soon(self) -> None:
        """Write it when there is time: what is lost of it does no harm."""
        if self._soon is None or self._soon.done():
            self._soon = asyncio.create_task(
                self._noting.note("ready", anyway=True, **self._facts())
            )

    # -- the guests -------------------------------------------------------------------------------

    def freezes(self) -> dict[VM, Notes]:
        """Where the freezes of the VMs' guests are noted."""
        return {vm: FreezeNotes(self, vm, key) for vm, key in self.keys.items()}


class MemberNotes:
    """One member's `Ledger`, kept with its group's."""

    def __init__(self, book: GroupBook, number: int) -> None:
        self._book, self._number = book, number

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        """A step is about to be taken."""
        self._book.put(
            self._number, add_note(self._book.member(self._number), step, state, **facts)
        )
        await self._book.write(step)

    def moved(self, state: State) -> None:
        """When READY was reached counts for a hold that has a limit."""
        noted = self._book.member(self._number)
        if state.phase is Phase.READY and "state" in noted and "ready" not in noted:
            self._book.put(self._number, {**noted, "ready": time.time()})
            self._book.write_soon()


class FreezeNotes:
    """What is noted of the freeze of one VM's guest, with its group; a `Notes` of `quiesced`."""

    def __init__(self, book: Book, vm: VM, key: str) -> None:
        self._book, self._vm, self._key = book, vm, key

    async def note(self, step: str, **facts: Any) -> None:
        """``freeze`` or ``thaw`` is about to be sent."""
        before = self._book.frozen.get(self._key)
        since = time.time() if before is None or step == "freeze" else before.since
        identity = process_identity(self._vm.peer_pid)
        self._book.put_frozen(HeldGuest(self._key, facts["how"], facts["agent"], identity, since))
        await self._book.write(step)


def keys_of(vms: Sequence[VM]) -> dict[VM, str]:
    """What the VMs are called in the notes: by their names, which need not be unique."""
    keys: dict[VM, str] = {}
    for vm in vms:
        if vm not in keys:
            alike = sum(other.name == vm.name for other in keys)
            keys[vm] = f"{vm.name}#{alike + 1}" if alike else vm.name
    return keys


def policy_noted(policy: AnyPolicy | PolicyCall | None) -> dict[str, Any] | None:
    """A policy in JSON's own types; None for a callable, which is to be given again."""
    return policy.model_dump(mode="json") if isinstance(policy, AnyPolicy) else None


def options_noted(member: GroupMember, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of one disk, in JSON's own types; raises `InvalidRequest`."""
    asked = {**options, **member.options}
    values = {name: value for name, value in asked.items() if name not in (*_HOOKS, "ledger")}
    values.pop("claim", None)  # of a round; who goes on claims the disk anew
    return requested(member.disk, **values).body()
