"""The overlays above the merged layers, opened for writing before QEMU has to.

At the end of an intermediate commit QEMU reopens a read-only overlay above for writing, changes
the backing name in its header, and crashes if it can't. The monitor's ``qemu-io`` makes the very
same reopening when it is asked, and tells when it fails: by the file's name, with QEMU's own
rights, locks and options. What it has opened stays open until the job has ended, so that nothing
can come in between. A storage daemon has no such command; there the files have to tell.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from qmpcommit.block.graph import FDSET, BlockGraph, Node, read_graph
from qmpcommit.block.identity import OpenFiles
from qmpcommit.commit.checks.finding import Case, Finding
from qmpcommit.commit.checks.header_above import NAME, header_above, overlays_above
from qmpcommit.errors import ChainError, CommandRefused, QmpCommitError
from qmpcommit.tasks import to_the_end

if TYPE_CHECKING:
    from collections.abc import Collection

    from qmpcommit.commit.plan import Plan
    from qmpcommit.qmp.monitor import Monitor


class OverlaysAbove:
    """Those of one intermediate commit; `opened` are the nodes that were opened for writing."""

    def __init__(
        self, monitor: Monitor, plan: Plan, cwd: str | None, *, rehearsal: bool = False
    ) -> None:
        self._monitor, self._plan, self._cwd, self._rehearsal = monitor, plan, cwd, rehearsal
        self._log = monitor.log.bind(disk=plan.disk.name, job=plan.job_id)
        self.opened: list[str] = []
        self._graph: BlockGraph | None = None

    async def open(self, graph: BlockGraph | None = None) -> str | None:
        """Open them for writing (``qemu-io NODE "reopen -w"``); why it can't be done, or None.

        Where one can't be opened, all are as they were. Raises what `Monitor.execute` raises.
        """
        self._graph = graph = graph or await read_graph(self._monitor)
        found = await asyncio.to_thread(self._look, graph)
        for finding in found:
            if finding.level == "refuse" and finding.final:
                return finding.message
        read_only = [
            node
            for node, _ in overlays_above(graph, self._plan.top.node_name)
            if node.raw.get("ro") and node.name not in self.opened and not self._spared(graph, node)
        ]
        for node in read_only:
            self.opened.append(node.name)  # it may be done even if its reply is not awaited
            try:
                why = await self._reopen(node.name, "-w")
            except CommandRefused:  # a storage daemon
                self.opened.remove(node.name)
                return self._by_sight(found)
            if why:
                self.opened.remove(node.name)
                await self.close()
                file = graph.file(graph.leaf(node.name))
                return (
                    f"QEMU can't open {file} (node '{node.name}') for writing, whose header it has"
                    f" to change: {why}; it would crash at the job's end, and the guest with it"
                )
        return None

    async def close(self) -> None:
        """Make those that were opened read-only again, as far as QEMU can be asked."""
        for node in self.opened:
            with suppress(QmpCommitError):
                why = await asyncio.to_thread(self._replaced, node)
                why = why or await self._reopen(node, "-r")
                if why:
                    self._log.warning("stays_writable", node=node, why=why)
        self.opened.clear()

    def _replaced(self, node: str) -> str:
        """Why its name must not be opened: QEMU would read another file from then on."""
        if self._graph is None or node not in self._graph.nodes:
            return ""
        opened = OpenFiles.of(self._graph, self._monitor.peer_pid, cwd=self._cwd)
        told = opened.named(str(self._graph.leaf(node).raw.get("file")))
        return told.reason if told.verdict == "other" else ""

    async def _reopen(self, node: str, how: str) -> str:
        """What the monitor says, which is nothing where it was done."""
        line = {"command-line": f'qemu-io {node} "reopen {how}"'}
        said = await self._monitor.execute("human-monitor-command", line)
        return " ".join(str(said).split())

    def _spared(self, graph: BlockGraph, node: Node) -> bool:
        """Whether a rehearsal would spoil it: the lock on a file that was given open stays."""
        return self._rehearsal and str(graph.leaf(node.name).raw.get("file")).startswith(FDSET)

    def _look(self, graph: BlockGraph) -> list[Finding]:
        pid = self._monitor.peer_pid
        opened = OpenFiles.of(graph, pid, cwd=self._cwd)
        return list(header_above(Case(graph, self._plan, pid, self._cwd, opened=opened)))

    def _by_sight(self, found: list[Finding]) -> str | None:
        """What the files tell, unless somebody said that it does not count."""
        overridden = any(f.name == NAME and f.level == "refuse" for f in self._plan.findings)
        told = [f.message for f in found if f.level == "refuse" and not overridden]
        return told[0] if told else None


async def check_writable(
    monitor: Monitor,
    plan: Plan,
    graph: BlockGraph,
    cwd: str | None,
    override: Collection[str] = (),
) -> None:
    """Have QEMU open the overlays above for writing, and close them again.

    Raises `ChainError` where it can't: at the commit's end it would crash. So it does where it
    can't be asked and nothing else tells.
    """
    above = OverlaysAbove(monitor, plan, cwd, rehearsal=True)
    try:
        why = await above.open(graph)
    finally:
        await to_the_end(above.close())
    if why is None and NAME not in override:
        asked = await monitor.features()
        unknown = [f.message for f in plan.findings if f.name == NAME and f.level == "note"]
        if unknown and not asked.has_command("human-monitor-command"):
            why = f"{unknown[0]} (override '{NAME}' to commit anyway)"
    if why is not None:
        raise ChainError(
            f"[{NAME}] {why}. Nothing was changed",
            vm=plan.vm,
            disk=plan.disk.name,
            checks=[NAME],
        )
