"""What a death has left on a VM, as ``chain`` and ``jobs`` tell of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.session import Session

_TOLD_BESIDE = ("pending", "ready", "copying", "frozen", "window", "claim")
"""What these commands tell by itself, or what needs a word first."""


async def tell_of_left(vm: Session, qmp: str) -> list[dict[str, Any]]:
    """One line on standard error; the member ``left`` of the JSON, with all that is found."""
    from qmpcommit.commit.pending import recovers

    found = (await vm.recover(look_only=True)).findings
    other = [each for each in found if each.does and each.kind not in _TOLD_BESIDE]
    if other:
        what = "; ".join(each.message for each in other)
        echo(f"qmpcommit: {what}. {recovers(qmp)} puts that right", err=True)
    return [each.model_dump(mode="json") for each in found]
