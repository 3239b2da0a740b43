"""A node in QEMU tells that a guest is quiesced, and for what, so that the next process finds it.

A process that is killed while it has a guest quiesced can't thaw it, and leaves this mark. Its
name begins with ``qmpcommit-w`` for a snapshot window and ``qmpcommit-g`` for a group commit, then
come eight digits of that window or group, and how the guest was quiesced. That of a recycle
(``qmpcommit-r``), of a discard (``qmpcommit-d``) and of a commit's last flush (``qmpcommit-f``) has
digits of the disk's; "reset" says that a guest is to be reset when its overlay was thrown away.
They tell that it ran before.

Rests on ``blockdev-add``, ``blockdev-del`` and ``query-named-block-nodes``.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpcommit.errors import CommandRefused, QmpCommitError, QuiesceFailed
from qmpcommit.guest.run_state import LIMIT, How, thaw
from qmpcommit.guest.sockets import Sockets
from qmpcommit.names import JOB_PREFIX, WINDOW_MARK

if TYPE_CHECKING:
    from qmpcommit.qmp.monitor import Monitor

_NAME = re.compile(rf"{JOB_PREFIX}([wsgrdf][0-9a-f]{{8}})-(paused|frozen|reset)")
_FOR = {
    "w": "a window",
    "s": "a snapshot",
    "g": "a group commit or cycle",
    "r": "a recycle",
    "d": "a discard",
    "f": "a commit's last flush",
}
_WITH_DISKS = ("r", "d")
"""Whose guest must not go on before its disk is whole again: whoever sees to that lets it go on."""

GRACE = LIMIT + 1.0
"""Seconds after which a mark is nobody's any more: no freeze lasts for so long."""

PAUSE = 0.25
"""Seconds between two looks whether a mark has gone."""


class Mark(NamedTuple):
    """A mark that is there: its `node`, for whose sake (`owner`), and `how` it is quiesced."""

    node: str
    owner: str
    how: How
    resets: bool = False

    @property
    def message(self) -> str:
        """What a person should know of it."""
        done = "paused" if self.how == "pause" else "frozen through its agent"
        return f"the guest was {done} for {_FOR[self.owner[0]]}, and perhaps still is"

    @property
    def with_disks(self) -> bool:
        """Whether the guest may have lost its overlay meanwhile, and would write to the base."""
        return self.owner.startswith(_WITH_DISKS)


def mark_of_window(window: str) -> str:
    """The owner that the marks of a window of that name have."""
    return f"w{window[-8:]}"


def mark_of_snapshot(number: str) -> str:
    """The owner that the marks of a snapshot's overlays have; `number` are its eight digits."""
    return f"s{number}"


def mark_of_group(group: str) -> str:
    """The owner that the marks of a group commit with that id have."""
    return f"g{group}"


def mark_of_recycle(disk: str) -> str:
    """The owner that the mark of a recycle has; `disk` are the digits that stand for its disk."""
    return f"r{disk[:8]}"


def mark_of_discard(disk: str) -> str:
    """The same of a discard."""
    return f"d{disk[:8]}"


def mark_of_flush(disk: str) -> str:
    """The same of a commit whose guest is paused for the last flush."""
    return f"f{disk[:8]}"


def what_to_do(mark: Mark, qmp: str) -> str:
    """What a person should do about a mark whose owner is gone."""
    socket = " (it needs --agent SOCKET)" if mark.how == "agent" else ""
    return f"'qmpcommit recover {shlex.quote(qmp)}' lets the guest go on{socket}"


async def set_mark(vm: Monitor, owner: str, how: How, *, resets: bool = False) -> bool:
    """Set the mark; whether QEMU did. What this raises leaves it open whether it is there."""
    node = {"driver": "null-co", "node-name": _name(owner, how, resets), "read-only": True}
    try:
        await vm.execute("blockdev-add", node)
    except CommandRefused as error:  # a QEMU built without that driver
        vm.log.warning("freeze_not_marked", error=error.desc)
        return False
    return True


async def unmark(vm: Monitor, owner: str, how: How, *, resets: bool = False) -> None:
    """Remove the mark, if it is there: the guest goes on."""
    with suppress(QmpCommitError):
        await vm.execute("blockdev-del", {"node-name": _name(owner, how, resets)})


def _name(owner: str, how: How, resets: bool = False) -> str:
    done = "reset" if resets else "paused" if how == "pause" else "frozen"
    return f"{JOB_PREFIX}{owner}-{done}"


def marks_among(nodes: Iterable[str]) -> list[Mark]:
    """The marks among these node-names."""
    found = [(node, _NAME.fullmatch(node)) for node in nodes]
    return [
        Mark(node, match[1], "agent" if match[2] == "frozen" else "pause", match[2] == "reset")
        for node, match in found
        if match is not None
    ]


async def marks(vm: Monitor) -> list[Mark]:
    """The marks in this QEMU, of those too that are at it just now."""
    return _seen(await vm.execute("query-named-block-nodes", {"flat": True}))[0]


def _seen(nodes: Iterable[Mapping[str, Any]]) -> tuple[list[Mark], bool]:
    """The marks, and whether there is a recycle's fresh overlay that does not lie yet."""
    there = {str(node.get("node-name") or ""): node for node in nodes}
    unlaid = any(
        name.startswith(JOB_PREFIX)
        and name.endswith("-top")
        and not node.get("backing_file_depth")
        and WINDOW_MARK not in str(node.get("file"))
        for name, node in there.items()
    )
    return marks_among(there), unlaid


async def thaw_marked(
    vm: Monitor,
    agent: str | os.PathLike[str] | None = None,
    *,
    owner: str | None = None,
    but: Collection[str] = (),
) -> list[Mark]:
    """Let a guest go on that was quiesced by somebody who was killed: for `owner`, or at all.

    Not where that was for one of the owners `but`.

    Returns the marks of what could not be done: one frozen through its agent needs the agent's
    socket, and a guest whose recycle was killed needs its disk first. Raises what `thaw` raises.
    """
    left = []
    found, unlaid = _seen(await vm.execute("query-named-block-nodes", {"flat": True}))
    for mark in found:
        if owner not in (None, mark.owner) or mark.owner in but:
            continue
        in_need = mark.with_disks or (unlaid and mark.how == "pause" and mark.owner[0] == "g")
        if in_need or (mark.how == "agent" and agent is None):
            left.append(mark)
            continue
        await thaw(vm, mark.how, agent, ran=True)  # else it had not been marked
        await vm.execute("blockdev-del", {"node-name": mark.node})
    return left


async def thaw_abandoned(vm: Monitor, agent: str | os.PathLike[str] | None = None) -> None:
    """Before a freeze: let a guest go on that a killed process has left quiesced.

    One that somebody has quiesced just now is waited for, for no freeze lasts longer than
    `GRACE` seconds. Raises `QuiesceFailed` where the agent's socket is needed or does not help.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + GRACE
    left = set(await marks(vm))
    while left and clock() < end:
        await asyncio.sleep(PAUSE)
        left &= set(await marks(vm))
    if not left:
        return
    vm.log.warning("freeze_was_abandoned", marks=[mark.node for mark in left])
    stuck = [mark for owner in {mark.owner for mark in left}
             for mark in await thaw_marked(vm, agent, owner=owner)]  # fmt: skip
    for mark in stuck:
        raise QuiesceFailed(
            f"{vm.name}: {mark.message}, so that its writes hang. If whoever did it is gone, what"
            " is left of it has to be recovered first. Nothing was sent",
            hint=what_to_do(mark, str(vm.address or "QMP")),
            vm=vm.name,
            how=mark.how,
            frozen=True,
        )


async def thaw_all_abandoned(vms: Collection[Monitor], agents: Sockets[Any]) -> None:
    """`thaw_abandoned` for all of these, at the same time."""
    await asyncio.gather(*(thaw_abandoned(vm, agents.get(vm)) for vm in vms))
