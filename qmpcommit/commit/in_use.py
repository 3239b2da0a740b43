"""Whether what was planned is what the disk uses: before a commit is sent, and once its job runs.

Between a plan and its ``block-commit`` others may have pivoted the disk. QEMU takes the stale
overlay's nodes all the same, as long as they are open, and copies old data over the live base.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable

from qmpcommit.block.bitmaps import lethal_bitmaps
from qmpcommit.block.chain import Disk, Image, find_again, read_disks
from qmpcommit.block.graph import BlockGraph, read_graph
from qmpcommit.block.identity import FileId, OpenFiles, file_id
from qmpcommit.commit import facts
from qmpcommit.commit.checks.replaced import NAME, base_files, replaced_since
from qmpcommit.commit.facts import Use
from qmpcommit.commit.migration import look_at_owner
from qmpcommit.commit.plan import Plan
from qmpcommit.errors import ChainError, JobConflict, QmpCommitError, VMStateError
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.tasks import all_of

FRESH = 1.0
"""Seconds for which a look at the VM's migration is good: no reaction to READY waits for it."""


def check_idle(vm: str, disk: Disk) -> None:
    """Raise `JobConflict` where a disk has a block job."""
    if disk.jobs:
        raise JobConflict(
            f"{disk} of {vm} has a block job ({', '.join(disk.jobs)}); wait for its end."
            " Nothing was changed",
            vm=vm,
            disk=disk.name,
        )


def changed_since(plan: Plan, graph: BlockGraph) -> QmpCommitError | None:
    """Why the plan does not fit the disk any more; None where it does."""
    where = {"vm": plan.vm, "disk": plan.disk.name, "job_id": plan.job_id}
    disks = read_disks(graph)
    planned, now = plan.disk, find_again(disks, plan.disk)
    if now is None and not _has_user(planned):  # a node that is only open, in a storage daemon
        now = next((disk for disk in disks if disk.root == planned.root), None)
    if now is None:
        return ChainError(
            f"{planned} of {plan.vm} is gone: no device or export uses it any more, as one did when"
            " its commit was planned. Nothing was sent",
            **where,
        )
    if now.jobs:
        return JobConflict(
            f"{planned} of {plan.vm} has a block job by now ({', '.join(now.jobs)}), which began"
            " after its commit was planned. Wait for its end. Nothing was sent",
            **where,
        )
    if _as_planned(plan, now):
        return None
    return ChainError(
        f"{planned} of {plan.vm} is not as it was when its commit was planned: its chain was"
        f" {_drawn(planned)}, and is {_drawn(now)} by now. Somebody else has changed it meanwhile."
        " Nothing was sent; look at it, and commit anew",
        **where,
    )


def check_unchanged(asked: Iterable[Plan], now: Iterable[Plan]) -> None:
    """Raise `ChainError` where a disk's layers are not those any more that were asked about."""
    for plan, then in zip(asked, now, strict=True):
        if not _as_planned(plan, then.disk):
            raise ChainError(
                f"{plan.disk} of {plan.vm} is not as it was when it was asked whether to keep its"
                f" changes: its chain was {_drawn(plan.disk)}, and is {_drawn(then.disk)} by now."
                " Somebody else has changed it meanwhile. Nothing was changed; look at it, and ask"
                " anew",
                vm=plan.vm,
                disk=plan.disk.name,
            )


def use_of(plan: Plan, graph: BlockGraph) -> tuple[Use, str]:
    """What the disk uses of the layers that the plan's job copies, and what else, in words."""
    if not plan.top.node_name:
        return Use.UNKNOWN, ""  # adopted when it had ended
    users = [disk for disk in read_disks(graph) if _has_user(disk)]
    if any(plan.top.node_name in _names(disk.chain) for disk in users):
        return Use.USED, ""
    below = _names((*plan.between, plan.base))
    others = [disk for disk in users if below & _names(disk.chain)]
    if not others and not _has_user(plan.disk):
        return Use.USED, ""  # by nobody: whoever is to use it has it as it will be
    if plan.job_id not in graph.jobs:
        return Use.UNKNOWN, ""  # it holds nothing any more: this may be its own pivot
    if not others:  # pivoted away before that, perhaps
        return Use.STALE, f"nothing uses {plan.top} any more"
    use = " and ".join(f"{disk} uses {disk.chain[0]}" for disk in others)
    return Use.STALE, f"{use} by now, and nothing uses {plan.top}"


def user_of(plan: Plan, devices: Iterable[object]) -> str | None:
    """The node that the disk's device has (``query-block``); None where no device has it."""
    for device in devices:
        if not isinstance(device, dict):
            raise TypeError(f"no device: {device!r:.200}")
        mine = (str(device.get("qdev") or ""), str(device.get("device") or ""))
        if any(mine) and mine == (plan.disk.qdev, plan.disk.device):
            return (device.get("inserted") or {}).get("node-name")
    return None


def _as_planned(plan: Plan, now: Disk) -> bool:
    return now.root == plan.disk.root and _layers(now, plan) == _layers(plan.disk, plan)


def _has_user(disk: Disk) -> bool:
    return bool(disk.qdev or disk.device or disk.exports)


def _layers(disk: Disk, plan: Plan) -> list[tuple[str, str]]:
    """The layers from the active one down to the plan's base: node-names with their files."""
    layers = []
    for image in disk.chain:
        layers.append((image.node_name, image.filename))
        if image.node_name == plan.base.node_name:
            break
    return layers


def _names(images: Iterable[Image]) -> set[str]:
    return {image.node_name for image in images}


def _drawn(disk: Disk) -> str:
    return " over ".join(str(image) for image in disk.chain) or "without a medium"


class PlanCheck:
    """Looks at the disk and its VM for one commit, at the moments that the machine names.

    `objection` is the error that kept it from being sent.
    """

    objection: QmpCommitError | None = None

    def __init__(self, monitor: Monitor, plan: Plan, *, in_migration: bool = False) -> None:
        self._monitor, self._plan, self._in_migration = monitor, plan, in_migration
        self._node: str | None = None
        self._looked_at = -math.inf
        self._base: dict[str, FileId] = {}

    async def look(self) -> facts.Looked:
        """Right before ``block-commit``; raises what `Monitor.execute` raises."""
        try:
            _, graph = await all_of(self._look_at_owner(), read_graph(self._monitor))
        except VMStateError as error:
            self.objection = error
        else:
            with self._monitor.sensible("the queries of its block graph"):
                self.objection = changed_since(self._plan, graph)
                self._node = user_of(self._plan, graph.devices)
            if self.objection is None:
                self.objection = await asyncio.to_thread(self._look_at_files, graph)
        return facts.Looked(self.objection.message if self.objection is not None else None)

    def _look_at_files(self, graph: BlockGraph) -> ChainError | None:
        """Whether the layers' names lead to the files that they led to when they were checked."""
        plan = self._plan
        opened = OpenFiles.of(graph, self._monitor.peer_pid, cwd=graph.cwd)
        self._base = base_files(plan, graph, opened)
        why = replaced_since(plan, graph, opened)
        where = {"vm": plan.vm, "disk": plan.disk.name, "job_id": plan.job_id}
        return None if why is None else ChainError(f"[{NAME}] {why}. Nothing was sent", **where)

    @property
    def lost_base(self) -> str:
        """Where the base's name no longer leads to the file that it led to: in words, else ""."""
        lost = [name for name, file in self._base.items() if file_id(name) != file]
        if not lost:
            return ""
        return (
            f"{' and '.join(lost)} was replaced or removed while QEMU has it open: what was"
            " committed is in a file that has no name, or another one, and is lost when QEMU ends"
        )

    async def check(self) -> facts.Checked:
        """When the job is there; raises what `Monitor.execute` raises.

        QEMU has looked itself that the layers are in the chain under the node that was the
        device's: so it is enough if that is the device's still.
        """
        if self._node is not None:
            devices, _ = await asyncio.gather(
                self._monitor.execute("query-block"), self._look_whether_moved()
            )
            with self._monitor.sensible("query-block"):
                now = user_of(self._plan, devices)
            if now in (self._node, self._plan.arguments.get("filter-node-name")):
                return facts.Checked(Use.USED)
        graph = await read_graph(self._monitor)
        with self._monitor.sensible("the queries of its block graph"):
            return facts.Checked(*use_of(self._plan, graph))

    async def no_pivot(self) -> str | None:
        """Why the disk must not be pivoted now; asked only where that may have changed.

        Raises what `Monitor.execute` raises.
        """
        if time.monotonic() - self._looked_at > FRESH:
            try:
                await self._look_at_owner()
            except VMStateError as error:
                return error.message.removesuffix(". Nothing was sent")
            why = await lethal_bitmaps(self._monitor, self._plan.closed_by_qemu)
            if why:
                return why
        return self.lost_base or None

    async def _look_whether_moved(self) -> None:
        """A migration may have begun between the look and the job."""
        try:
            await self._look_at_owner()
        except VMStateError:
            self._looked_at = -math.inf  # so that no pivot comes before it is looked at again

    async def _look_at_owner(self) -> None:
        if not self._in_migration:
            await look_at_owner(self._monitor)
        self._looked_at = time.monotonic()
