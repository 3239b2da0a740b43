"""What a pivot changes of how the disk is opened: the base has options of its own."""

from __future__ import annotations

from collections.abc import Iterator

from qmpcommit.block.graph import Node
from qmpcommit.commit.checks.finding import Case, Finding


def runtime(case: Case) -> Iterator[Finding]:
    """Cache mode and detect-zeroes are the node's that the guest uses, not the disk's."""
    plan = case.plan
    if not plan.two_phase or getattr(plan.policy, "leaves", None) in ("overlay", "fresh"):
        return
    names = (plan.top.node_name, plan.base.node_name)
    top, base = (_modes(case.graph.nodes[n], case.graph.leaf(n)) for n in names)
    changes = [
        f"{name} {base[name]} instead of {top[name]}" for name in top if base[name] != top[name]
    ]
    if changes:
        yield Finding(
            "runtime", "note",
            f"after a pivot the guest's disk is opened as {plan.base.filename} is, with"
            f" {', '.join(changes)}: blockdev-reopen can change that",
        )  # fmt: skip


def _modes(node: Node, leaf: Node) -> dict[str, str]:
    cache = leaf.raw.get("cache") or {}
    return {
        "detect-zeroes": str(node.raw.get("detect_zeroes") or "off"),
        "cache.direct": "on" if cache.get("direct") else "off",
        "cache.no-flush": "on" if cache.get("no-flush") else "off",
    }
