"""What can't be asked: a decision that nobody will be asked for, an option that has no effect.

Carried out in silence, such a request would do something else than was meant: a rehearsal
(`Abort`) of an intermediate layer would merge it. So it is refused before anything is sent.
"""

from __future__ import annotations

from typing import Any

from qmpcommit.block.chain import Disk, Image
from qmpcommit.commit.policy import AnyPolicy, PolicyCall, ends_of
from qmpcommit.commit.request import Stale
from qmpcommit.errors import InvalidRequest


def refuse_decision(
    policy: AnyPolicy | PolicyCall | None, vm: str, disk: Disk, top: Image, base: Image
) -> None:
    """Refuse a decision about an intermediate layer, whose commit is one phase.

    It ends by itself, with `top` merged into `base`; a `Pivot` says nothing else. Raises
    `InvalidRequest`.
    """
    if policy is None or getattr(policy, "leaves", None) == "base":
        return
    asked = getattr(policy, "kind", "a policy of your own")
    raise InvalidRequest(
        f"{top} is not the active layer of {disk}: its commit is one phase, which ends by itself"
        f" with the layer merged into {base.filename}. There is no READY, so nothing could be"
        f" decided, and {asked} can't be carried out. Leave the policy out to merge it, or commit"
        " the active layer. Nothing was sent",
        vm=vm,
        disk=disk.name,
    )


def refuse_converge(vm: str, disk: Disk, top: Image) -> None:
    """Refuse to hold a guest back that does not write to what is committed."""
    raise InvalidRequest(
        f"{top} is not the active layer of {disk}: the guest does not write to it, so nothing it"
        " does keeps the job from its end, and converge can't help. Leave it out."
        " Nothing was sent",
        vm=vm,
        disk=disk.name,
    )


def refuse_idle(policy: Any, *, stale: Stale = "leave", on_pivot: object = None) -> None:
    """Refuse what is done after a pivot where the policy never comes to one.

    Nothing is stale after a keep or an abort, so there is nothing to delete, to rename or to
    persist. Raises `InvalidRequest`.
    """
    if may_pivot(policy) or (stale == "leave" and on_pivot is None):
        return
    what = stale if stale != "leave" else "persist (on_pivot)"
    raise InvalidRequest(
        f"nothing is stale after {_ends(policy)}, which leaves the overlay the active image, so"
        f" there is nothing to {what}: leave that out, or pivot. Nothing was sent"
    )


def may_pivot(policy: Any) -> bool:
    """Whether the policy can come to a pivot; None is an intermediate layer's, which merges."""
    if getattr(policy, "held", False):
        return True  # its caller may say anything
    ends = ends_of(policy)
    return not ends or not all(end.leaves == "overlay" for end in ends)


def _ends(policy: Any) -> str:
    said = ("an abort" if end.kind == "abort" else "a keep" for end in ends_of(policy))
    return " or ".join(dict.fromkeys(said))
