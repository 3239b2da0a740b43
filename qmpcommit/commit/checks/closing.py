"""What the end of a window will be refused for, looked at before it opens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from qmpcommit.block.graph import BlockGraph
from qmpcommit.commit.checks.finding import Case, Finding
from qmpcommit.commit.checks.layers import corrupt
from qmpcommit.commit.checks.read_only import read_only_base
from qmpcommit.commit.checks.sharing import base_shared
from qmpcommit.commit.plan import Plan


def closing_objections(
    graph: BlockGraph, plan: Plan, *, pid: int | None, cwd: str | None
) -> Iterator[str]:
    """Why an overlay over `plan.base`, the active layer, could not be merged back into it.

    The disk's own users write to the overlay by then. Looks at files.
    """
    active = plan.base.node_name
    without = graph._replace(
        devices=tuple(
            each
            for each in graph.devices
            if graph.below_filters((each.get("inserted") or {}).get("node-name")) != active
        ),
        exports=tuple(
            each for each in graph.exports if graph.below_filters(each.get("node-name")) != active
        ),
    )
    case = Case(without, plan, pid, cwd)
    for check in (corrupt, read_only_base, base_shared):
        found: list[Finding] = []
        with suppress(OSError):  # what can't be looked at speaks against nothing
            found = list(check(case))
        for finding in found:
            if finding.level == "refuse":
                yield f"[{finding.name}] {finding.message.partition(' (override ')[0]}"
