"""One round of a cycle: its row in the journal, with what is noted of each of its disks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.undertaking import Undertaking
from qmpcommit.wire.cycle import Cycle, RoundView

Decided = Literal["exchange", "back"]
"""Which way a discard goes: all disks are exchanged, or all are put back."""


class Round(Undertaking[Cycle]):
    """One round of one cycle; `exchanging` are the VMs in whose QEMUs it is at work.

    `parts` is what is noted of each disk, in the order of the configuration: where its next
    overlay is and, of a discard, what is exchanged in which QEMU and how far that is.
    """

    kind = "cycle"
    asks = Cycle

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.exchanging: set[str] = set()

    @classmethod
    def load(cls, row: Mapping[str, Any], journal: Journal) -> Self:
        """One as the journal has it; raises ValueError where it can't be understood."""
        made = super().load(row, journal)
        if "overlay" in made.noted:  # from when a round was for one disk
            laid = made.noted.get("step") not in (None, "", "stop")
            part = {**made.noted, "vm": made.vm, "disk": made.disk}
            made.noted = {**made.noted, "parts": [part], "decided": "exchange" if laid else None}
        return made

    @property
    def disk(self) -> str:
        """Its first disk, as the configuration calls it."""
        return self.request.disk

    @property
    def place(self) -> tuple[str, str]:
        """Its first disk with its VM: what a round is known by."""
        return self.vm, self.disk

    @property
    def vms(self) -> list[str]:
        """The VMs that it is for."""
        return list(dict.fromkeys(vm for vm, _ in self.request.disks))

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What is noted of its disks; empty until its command has answered."""
        return list(self.noted.get("parts") or [])

    @property
    def decided(self) -> Decided | None:
        """What was decided of a discard that has begun."""
        return self.noted.get("decided")

    async def note_of(self, number: int, step: str, **facts: Any) -> None:
        """`note` of one of its parts."""
        parts = self.parts
        parts[number] = {**parts[number], **facts, "step": step}
        await self.note(step, parts=parts)

    def view(self) -> RoundView:
        """As the API shows it."""
        told = self.outcome or {}
        commits = told.get("commits") or [told.get("commit")]
        disks = [
            {"vm": vm, "disk": disk, "overlay": part.get("overlay"), "commit": commit}
            for (vm, disk), part, commit in zip(
                self.request.disks,
                self.parts or [{}] * len(self.request.disks),
                commits if len(commits) > 1 else commits * len(self.request.disks),
                strict=True,
            )
        ]
        return RoundView.model_validate(
            {
                **disks[0],
                "id": self.id,
                "state": self.state,
                "created": self.created,
                "ended": self.ended,
                "disks": disks,
                "group": told.get("group"),
                "result": told.get("result"),
                "warnings": told.get("warnings") or [],
                "asked_by": self.noted.get("asked"),
                "error": self.error,
            }
        )
