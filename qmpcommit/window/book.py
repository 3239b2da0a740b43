"""What is noted of a window in a `Ledger`, and how another process closes it from there.

A window is over one VM or several; of each there is a part: what `recover_window` has to know, the
last step, and in the end what the commits came to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qmpcommit.callback import Notes, Noting
from qmpcommit.commit.claim import clear_dead_of
from qmpcommit.commit.ledger import Noted, read_ledger
from qmpcommit.commit.outcome import CommitOutcome
from qmpcommit.errors import InvalidRequest, WindowError
from qmpcommit.qmp.process import is_same, process_identity
from qmpcommit.tasks import all_ended
from qmpcommit.values import Record
from qmpcommit.window.records import Frozen, NotedWindow, Window
from qmpcommit.window.remains import window_of

if TYPE_CHECKING:
    from qmpcommit.commit.vm import VM

KIND = "window"

_HELD = ("freeze", "lay", "thaw")
"""Steps after which the guest may stand still."""


class WindowBook:
    """Notes one window: `value` is all that is kept of it, in JSON's own types."""

    def __init__(self, ledger: Any, known_as: str, value: Noted | None = None) -> None:
        self._ledger, self.known_as = ledger, known_as
        self.value: dict[str, Any] = {"bandwidth": None, "parts": {}, **(value or {})}

    async def put(self, key: str, step: str, facts: Mapping[str, Any]) -> None:
        """Have a step of one part written down; raises what the ledger raises."""
        part = {**self.value["parts"].get(key, {}), **_plain(facts), "step": step}
        parts = {**self.value["parts"], key: part}
        value = self.value = {**self.value, "parts": parts}  # others note meanwhile
        over = all(each["step"] == "end" for each in parts.values())
        await self._ledger.note(step, kind=KIND, known_as=self.known_as, value=value, over=over)


class PartNotes:
    """The `Notes` of a window on one VM."""

    def __init__(self, book: WindowBook, key: str, vm: VM) -> None:
        self._book, self._key = book, key
        self._where = {"vm": vm.name, "identity": process_identity(vm.peer_pid)}

    @property
    def begun(self) -> bool:
        """Whether anything of it is noted."""
        return self._key in self._book.value["parts"]

    async def note(self, step: str, **facts: Any) -> None:
        """A step is about to be taken, or the part has ended ("end")."""
        await self._book.put(self._key, step, {**facts, **self._where})


def notes_of(
    ledger: Any, vm: VM, window: str, *, bandwidth: int | str | None = None
) -> Notes | None:
    """Where a window that is opened is noted: a `Ledger` keeps it for `qmpcommit.resume`."""
    if isinstance(ledger, PartNotes) or not callable(getattr(ledger, "noted", None)):
        return ledger  # type: ignore[no-any-return]
    return PartNotes(WindowBook(ledger, window, {"bandwidth": bandwidth}), "1", vm)


async def notes_again(ledger: Any, vm: VM, window: Window | Sequence[Frozen]) -> Notes | None:
    """Where the same is noted when it is closed, which another process may have opened."""
    if isinstance(ledger, PartNotes) or not callable(getattr(ledger, "noted", None)):
        return ledger  # type: ignore[no-any-return]
    disks = list(window.values() if isinstance(window, Window) else window)
    if not disks:
        return None
    name = window_of(disks[0].overlay)
    noted = await read_ledger(ledger)
    if noted.get("kind") == KIND:
        for key, part in noted["parts"].items():
            if part["window"]["name"] == name:
                book = WindowBook(ledger, noted["known_as"], _value(noted))
                return PartNotes(book, key, vm)
    notes = PartNotes(WindowBook(ledger, name), "1", vm)
    below = window.below if isinstance(window, Window) else {}
    known = NotedWindow(name, {each.disk: each for each in disks}, below=below)
    await notes.note("create", window=known)
    return notes


async def end(noting: Noting | None, notes: Notes | None, **how: Any) -> None:
    """Note that it has ended, where somebody keeps that."""
    if noting is not None and isinstance(notes, PartNotes) and notes.begun:
        await noting.note("end", anyway=True, **how)


async def resume_window(ledger: Any, noted: Noted, vms: Sequence[VM]) -> tuple[CommitOutcome, ...]:
    """Close a window whose process died, at whatever step: what the commits came to.

    The guests go on first. Of what was not laid yet nothing is left; an overlay that was merged
    back before has no outcome, unless all were. Raises what `close_window` raises, and what it had
    raised where it was closed before; `InvalidRequest` where a VM is missing.
    """
    try:
        book = WindowBook(ledger, noted["known_as"], _value(noted))
        parts = [(key, _Part(part)) for key, part in book.value["parts"].items()]
    except Exception as error:  # whatever has become of it on its way
        raise InvalidRequest(f"what the ledger holds can't be understood: {error!r}") from error
    from qmpcommit.commit.resuming import vm_of

    named = [(vm_of(vms, part.vm, part.identity), key, part) for key, part in parts]
    closing = (
        part.close(vm, PartNotes(book, key, vm), book.value["bandwidth"]) for vm, key, part in named
    )
    try:
        ends = await close_all(closing)
    finally:
        await clear_dead_of(vms, "window")  # one may have been killed before it had noted anything
    return tuple(outcome for end in ends for outcome in end)


class _Part:
    """One VM's, as it was noted last."""

    def __init__(self, noted: Noted) -> None:
        self.vm, self.identity = str(noted["vm"]), str(noted["identity"])
        self._step, self._noted = str(noted["step"]), noted
        if self._step != "end":
            self._window = NotedWindow.model_validate(noted["window"])

    async def close(
        self, vm: VM, notes: PartNotes, bandwidth: int | str | None
    ) -> list[CommitOutcome]:
        """Close it, or say how it was closed."""
        from qmpcommit.window.run import close_window, recover_window

        if self._step == "end":
            error = self._noted.get("error")
            if error is not None:
                raise WindowError(error["message"], **error["facts"])
            return [CommitOutcome.model_validate(each) for each in self._noted["outcomes"]]
        held = self._step in _HELD and "how" in self._noted  # else it stood still before
        same = is_same(self.identity, process_identity(vm.peer_pid)) is not False
        window = await recover_window(vm, self._window, held=same and held)
        there = list((window or {}).values())
        rest = [each for each in self._window.disks.values() if each not in there]
        try:
            await close_window(vm, rest)  # nothing is left of them, or it is told
        except WindowError:
            if window is not None:
                await close_window(vm, window, bandwidth=bandwidth)
            raise
        return await close_window(vm, window or [], bandwidth=bandwidth, ledger=notes)


def _value(noted: Noted) -> dict[str, Any]:
    return {"bandwidth": noted["bandwidth"], "parts": dict(noted["parts"])}


async def close_all(
    closing: Iterable[Awaitable[list[CommitOutcome]]],
) -> list[list[CommitOutcome]]:
    """Close windows side by side; all that stay are in the one error that is raised."""
    ends = await all_ended(closing, WindowError)
    failed = [end for end in ends if isinstance(end, WindowError)]
    if len(failed) > 1:
        overlays = [overlay for error in failed for overlay in error.overlays or []]
        raise WindowError(". ".join(map(str, failed)), overlays=overlays)
    for error in failed:
        raise error
    return [end for end in ends if not isinstance(end, WindowError)]


def _plain(value: Any) -> Any:
    """In JSON's own types."""
    if isinstance(value, Record):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
