"""Does what `CommitJob` does, on a simulated QEMU, for the state machine's tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from qmpcommit.commit import phases
from qmpcommit.commit.facts import (
    Accepted,
    Action,
    Answered,
    Checked,
    Choice,
    Command,
    Decided,
    Duty,
    Fact,
    Frozen,
    GraphRead,
    LinkBack,
    LinkDead,
    Looked,
    News,
    Overlaid,
    Prepared,
    Refused,
    Unanswered,
    Where,
)
from qmpcommit.commit.ledger import dump_state, load_state
from tests.unit.simulated import World


class Died(Exception):
    """Our process is killed."""


class Driver:
    """Does what `CommitJob` does, on a simulated QEMU, with faults drawn by hypothesis."""

    def __init__(
        self, world: World, draw: Callable[[int], int], answers: Sequence[Choice], adopted: bool
    ) -> None:
        self.world = world
        self.draw = draw
        self.answers = cycle(answers)
        self.faults = True
        self.consulting = False
        self.stalled = False
        self.met_other = False
        self.noted: dict[str, Any] | None = None
        if adopted:
            self.state, owed = phases.adopt(two_phase=world.two_phase)
        else:
            self.state, owed = phases.begin(
                two_phase=world.two_phase, prepares=world.prepares, stalls=True
            )
        self.carry_out(owed)

    def carry_out(self, owed: list[Action]) -> None:
        try:
            self._carry_out(owed)
        except Died:
            self.rise()

    def note(self) -> None:
        """What is about to be done is written down; we may die before it is done."""
        self.noted = json.loads(json.dumps(dump_state(self.state)))
        if self.faults and self.draw(30) == 1:
            raise Died

    def rise(self) -> None:
        """Another process goes on from what was written down."""
        if self.noted is None:
            return
        world = self.world
        world.told.clear()
        world.link = world.alive and self.draw(4) != 0
        self.consulting = self.stalled = self.met_other = False
        state = load_state(self.noted)
        same = False if world.replaced and self.draw(2) else True if self.draw(2) else None
        self.state, owed = phases.resume(state, same_vm=same, linked=world.link)
        if not world.link and same is not False and not self.state.finished:
            assert owed == [Duty.RELINK], "QEMU is asked, and may be another one"
        self.carry_out(owed)

    def _carry_out(self, owed: list[Action]) -> None:
        for action in owed:
            assert action is Duty.FINISH or not self.met_other, "another QEMU is asked, or ordered"
            if isinstance(action, Command) or action in (Duty.FREEZE, Duty.OVERLAY, Duty.THAW):
                self.note()
            match action:
                case Command():
                    self.send(action)
                case Duty.LOOK:
                    wrong = self.faults and self.draw(30) == 0
                    self.asked(lambda: Looked("it was changed" if wrong else None))  # noqa: B023
                case Duty.CHECK:
                    self.asked(lambda: Checked(self.world.use(), "it uses another"))
                case Duty.ASK:
                    self.asked(lambda: Answered(self.world.query()))
                case Duty.READ_GRAPH:
                    self.asked(lambda: GraphRead(self.world.where()))
                case Duty.CONSULT:
                    assert not self.consulting, "the policy is asked once"
                    self.consulting = True
                case Duty.RELINK:
                    self.relink()
                case Duty.PREPARE:
                    self.asked(self.prepare)
                case Duty.FREEZE:
                    self.asked(self.freeze, Frozen("the monitor was lost"))
                case Duty.OVERLAY:
                    self.asked(self.overlay)
                case Duty.THAW:
                    self.asked(self.thaw)
                case Duty.STALL:
                    self.stalled = True
                case Duty.FINISH:
                    pass

    def send(self, command: Command) -> None:
        world = self.world
        if command is Command.PIVOT and self.faults and self.draw(30) == 1:
            world.told.append(Looked("it migrates by now"))
            return
        if command in (Command.PIVOT, Command.KEEP, Command.FINALIZE):
            assert not self.state.unchecked, "decided before it was checked"
            assert not self.state.stale
        fate = self.draw(12) if self.faults and world.link else 99
        if not world.link or not world.alive or fate == 0:
            self.cut()
            world.told.append(Unanswered(command))  # never reached QEMU
            return
        error = self.order(command, ours=True)
        assert world.starts <= 1, "block-commit was sent twice"
        if fate == 1:
            self.cut()
            world.told.append(Unanswered(command))  # done, but the reply was lost
        elif error is None:
            world.told.append(Accepted(command))
        else:
            world.told.append(Refused(command, error))

    def order(self, command: Command, *, ours: bool) -> str | None:
        """QEMU hears a command from us or another client; whose it takes is remembered."""
        before = self.world.will
        error = self.world.execute(command)
        if self.world.will != before:
            self.world.ours = ours
        return error

    def other(self, command: Command, *statuses: str) -> None:
        """Another client sends a command, where the job is in one of these states."""
        if self.world.alive and self.world.job in statuses:
            self.order(command, ours=False)

    def miss_the_end(self) -> None:
        """The link breaks, the job goes where it is bound, and another client dismisses it."""
        self.cut()
        for _ in range(3):
            self.world.progress()
        self.other(Command.DISMISS, "concluded")

    def kill(self, *, replaced: bool, lost: int) -> None:
        """QEMU is killed, and the last of what it has said, so many facts, is lost on the way."""
        world = self.world
        world.alive = world.link = False
        world.replaced = replaced
        for _ in range(min(lost, len(world.told))):
            world.told.pop()
        world.told.append(News.LINK_LOST)

    def asked(self, answer: Callable[[], Fact], *lost: Fact) -> None:
        if not self.world.link or (self.faults and self.draw(12) == 0):
            if self.draw(2):
                answer()  # done, but the reply was lost
            self.cut()
            self.world.told.extend((News.LINK_LOST, *lost))
        else:
            self.world.told.append(answer())

    def prepare(self) -> Fact:
        if self.faults and self.draw(8) == 0:
            return Prepared("a bitmap is busy")
        self.world.prepared = self.world.job == "pending"
        return Prepared()

    def freeze(self) -> Fact:
        if self.faults and self.draw(8) == 0:
            return Frozen("the file is there already")
        self.world.guest_paused = True
        return Frozen()

    def overlay(self) -> Fact:
        assert self.world.disk is Where.BASE
        assert self.world.guest_paused, "the guest could write to the base"
        if self.faults and self.draw(8) == 0:
            return Overlaid("no")
        self.world.overlaid = True
        return Overlaid()

    def thaw(self) -> Fact:
        self.world.guest_paused = False
        return News.THAWED

    def relieve(self) -> None:
        if self.stalled:
            self.stalled = False
            self.world.told.append(News.RELIEVED)

    def cut(self) -> None:
        if self.world.link:
            self.world.link = False
            if self.draw(2):
                self.world.told.append(News.LINK_LOST)

    def relink(self) -> None:
        if self.world.alive:
            self.world.link = True
            self.world.told.append(LinkBack(True if self.draw(2) else None))
        elif self.world.replaced:
            self.world.told.append(LinkBack(False))
        else:
            self.world.told.append(LinkDead(vm_gone=True))

    def take(self) -> None:
        fact = self.world.told.popleft() if self.world.told else News.TICK
        self.met_other = self.met_other or fact == LinkBack(False)
        before = self.state.phase
        self.state, owed = phases.step(self.state, fact)
        if self.state.phase is not before:
            assert self.state.phase in phases.EDGES[before]
        self.carry_out(owed)

    def decide(self) -> None:
        if self.consulting:
            self.consulting = False
            self.world.told.append(Decided(next(self.answers), "policy"))

    def be_fair(self, pace: int = 1) -> None:
        """One step of a fair world, with which there is a way on from any state.

        Nothing more goes wrong, pauses by drains end, events and replies arrive, and the policy
        answers. QEMU may take more steps meanwhile than we hear of.
        """
        self.faults = False
        self.world.drain(False)
        if self.world.job == "paused":
            self.world.pause(False)  # who pauses a copy resumes it; in READY we do it ourselves
        for _ in range(pace):
            self.world.progress()
        self.decide()
        self.relieve()
        self.take()
