"""Whether a filter over the base, such as a throttle, outlives the commit."""

from __future__ import annotations

from collections.abc import Iterator

from qmpcommit.commit.checks.finding import Case, Finding, refused


def lost_filter(case: Case) -> Iterator[Finding]:
    """A filter over the base that would be gone, with the limits that it sets.

    A pivot goes through a throttle or a copy-on-read. Where the header of a layer above is
    rewritten QEMU would write the filter for a format, and the disk would not open any more.
    """
    base, above = case.plan.base.node_name, case.layers[-1].node_name
    if above not in case.graph.nodes or "base-node" not in case.plan.arguments:
        return
    filters = case.graph.filters(case.graph.nodes[above].children.get("backing"))
    if not filters or case.plan.arguments["base-node"] == filters[0]:
        return
    drivers = [case.graph.nodes[name].driver for name in filters]
    which = ", ".join(f"{d} '{name}'" for d, name in zip(drivers, filters, strict=True))
    lost = "it would be gone from the disk"
    if "throttle" in drivers:
        lost = (
            "its limits would be gone from the disk. Put them on the disk itself"
            " (block_set_io_throttle) before or after it"
        )
    yield refused(
        "lost-filter",
        f"over the base {case.plan.base.filename} ({base}) is a filter, {which}, which this commit"
        f" can't keep: {lost}",
    )
