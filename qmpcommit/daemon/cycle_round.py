"""One round of a cycle: its row in the journal, with what is noted of each of its disks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from qmpcommit.cycles.book import Parts
from qmpcommit.cycles.discarding import Discarding
from qmpcommit.daemon.journal import Journal
from qmpcommit.daemon.undertaking import Undertaking
from qmpcommit.wire.cycle import Cycle, RoundView


class Round(Undertaking[Cycle], Parts):
    """One round of one cycle; `exchanging` are the VMs in whose QEMUs it is at work.

    `parts` is what is noted of each disk, in the order of the configuration.
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
        if "parts" in made.noted:
            made.noted = {**made.noted, "parts": [made._as_now(each) for each in made.parts]}
        return made

    def _as_now(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """A part that a former version may have noted."""
        asked, encrypted = self.request, part.get("encrypted", True)
        former = {
            "options": asked.overlay_options, "secret": asked.overlay_secret if encrypted else None,
            "identity": "", "file": None, "unseen": False,
        }  # fmt: skip
        return {**former, **part}

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
    def value(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What its row holds."""
        return self.noted

    async def note(
        self, step: str, *, held: bool = False, anyway: bool = False, **facts: Any
    ) -> None:
        """As `Undertaking.note`: whatever is held meanwhile, its row is waited for."""
        await Undertaking.note(self, step, **facts)

    @property
    def discarding(self) -> Discarding:
        """What is done where its changes are thrown away."""
        return Discarding(self, self.request.guest, "round")

    @contextmanager
    def at_work(self, vms: Iterable[str]) -> Iterator[None]:
        """They are `exchanging` for the length of the body."""
        self.exchanging |= {*vms}
        try:
            yield
        finally:
            self.exchanging -= {*vms}

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
