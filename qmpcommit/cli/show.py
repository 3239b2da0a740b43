"""Texts for people: outcomes, disks and jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from qmpcommit.cli.telling import one_line
from qmpcommit.units import counted, show_size

if TYPE_CHECKING:
    from datetime import datetime

    from qmpcommit.block.chain import Disk, Image
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.commit.plan import Plan


def outcome_text(outcome: CommitOutcome, *, disk: str = "") -> str:
    """What happened, which image is active now, what is invalid, how much and how long.

    `disk` is what it is called, where its own name does not tell its VM.
    """
    active: object = outcome.active or outcome.top
    who = {"guest": "The guest", "export": "The export"}.get(outcome.used_by)
    base, top = outcome.base.filename, outcome.top.filename
    if not outcome.top.node_name:  # the job had ended when it was taken up
        base, top = base if outcome.base.node_name else "its base", "its overlay"
        active = outcome.active or "the image that 'qmpcommit chain' shows"
    now, goes_on = f"{who} now writes to", f"{who} goes on writing to"
    if who is None:
        nobody = "No device or export uses the disk. " if outcome.used_by == "nothing" else ""
        now, goes_on = f"{nobody}Its image is now", f"{nobody}Its image is still"
    happened = {
        "pivot": f"pivoted. {now} {active}.",
        "recycle": f"recycled. {now} the fresh overlay {active}; {base} holds"
        " everything up to the decision.",
        "keep": f"kept. {goes_on} {active}; {base} holds everything up to the decision.",
        "abort": f"aborted. {goes_on} {active}, which is whole.",
        "none": f"merged {top} into {base}. {goes_on} {active}.",
    }.get(outcome.action, f"{outcome.action}.")
    lines = [f"{disk or outcome.disk}: {happened}"]
    if outcome.invalidated:
        files = ", ".join(outcome.invalidated)
        lines.append(f"  Invalid from now on, never boot it again: {files}.")
    if outcome.deleted:
        lines.append(f"  Deleted: {', '.join(outcome.deleted)}.")
    if outcome.renamed:
        lines.append(f"  Renamed to: {', '.join(outcome.renamed)}.")
    if outcome.guest_paused is not None:
        lines.append(f"  The guest was paused for {show_seconds(outcome.guest_paused)}.")
    lines.append(f"  {show_size(outcome.bytes_committed)} committed{_times(outcome)}.")
    if outcome.decided_by not in ("", "policy", "caller"):
        lines.append(f"  Decided by: {outcome.decided_by}.")
    lines += [f"  Warning: {warning}." for warning in outcome.warnings]
    return "\n".join(map(one_line, lines))


def flattened_text(outcomes: Sequence[CommitOutcome], chain: Sequence[Image]) -> str:
    """What a flatten has merged, which files are stale, and which image is active if that changed.

    `chain` is the disk's now, the active layer first.
    """
    merged = sum(outcome.action != "abort" for outcome in outcomes)
    names = " -> ".join(image.filename for image in reversed(chain))
    lines = [f"{counted(merged, 'layer')} merged: {names}"]
    if any(outcome.action == "pivot" for outcome in outcomes):
        lines.append(f"  The disk's active image is {chain[0].filename} now.")
    gone = [file for outcome in outcomes for file in outcome.deleted]
    stale = [f for outcome in outcomes for f in outcome.invalidated if f not in gone]
    if stale:
        lines.append(f"  Invalid from now on, never boot it again: {', '.join(stale)}.")
    if gone:
        lines.append(f"  Deleted: {', '.join(gone)}.")
    return "\n".join(lines)


def remarks(outcomes: Iterable[CommitOutcome]) -> list[str]:
    """What should be known of commits that are only a part of something else, a line each."""
    return [f"  Warning: {each.disk}: {text}." for each in outcomes for text in each.warnings]


def plan_text(plan: Plan) -> str:
    """What a commit would send, and what its checks found."""
    import json

    how = "two phases, a decision at READY" if plan.two_phase else "one phase, no decision"
    lines = [f"{plan.disk}: {plan.top} would be committed into {plan.base} ({how})."]
    for image in plan.between:
        lines.append(f"  With it: {image}.")
    if plan.two_phase:
        policy = getattr(plan.policy, "model_dump_json", lambda: repr(plan.policy))()
        lines.append(f"  At READY: {policy}.")
    lines.append(f"  A pivot would make stale: {', '.join(plan.invalidated)}.")
    lines.append(f"  block-commit {json.dumps(plan.arguments)}")
    for finding in plan.findings:
        lines.append(f"  [{finding.level}] {finding.name}: {finding.message}")
    return "\n".join(map(one_line, [*lines, "Nothing was sent."]))


def _times(outcome: CommitOutcome) -> str:
    times = outcome.timings
    parts = []
    for name, since, until in (
        ("READY after", times.started, times.ready),
        ("decided after", times.ready, times.decided),
    ):
        if since is not None and until is not None:
            parts.append(f"{name} {_seconds(since, until)}")
    if times.started is None or times.ended is None:
        return f" ({', '.join(parts)})" if parts else ""
    more = f" ({', '.join(parts)})" if parts else ""
    return f" in {_seconds(times.started, times.ended)}{more}"


def _seconds(since: datetime, until: datetime) -> str:
    return show_seconds((until - since).total_seconds())


def show_seconds(seconds: float) -> str:
    """A time for people: ``12 ms``, ``3.2 s``, ``5:04 min``, ``2:05 h``."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


def disk_title(disk: Disk) -> str:
    """One disk's own line: its names, and what runs on it."""
    names = [
        f"{kind} {value}"
        for kind, value in (
            ("drive", disk.device),
            ("device", disk.qdev),
            ("export", ", ".join(disk.exports)),
        )
        if value and value != disk.name
    ]
    about = names + [f"filter {name}" for name in disk.filters] + [f"job {j}" for j in disk.jobs]
    return ", ".join(about)


def image_facts(image: Image, place: int, last: bool) -> str:
    """What is told of a layer beside its file: driver, sizes, node-name, what a commit copies."""
    facts = [image.driver, f"node {image.node_name}"]
    facts.append(f"{show_size(image.virtual_size)}, {show_size(image.allocated_size)} on the host")
    if image.read_only:
        facts.append("read-only")
    facts.append("active" if place == 0 else f"layer {place}")
    if not last:
        facts.append(f"a commit copies at most {show_size(image.allocated_size)}")
    if image.bitmaps:
        facts.append(f"bitmaps {' '.join(image.bitmaps)}")
    facts += ["STALE"] if image.stale else []
    facts += [f"WARNING: {warning}" for warning in image.warnings]
    return ", ".join(facts)


def disks_text(
    disks: list[Disk], width: int | None = None, columns: Sequence[str] | None = None
) -> str:
    """The disks as tables, a row a layer, its file drawn under the one that backs on it.

    In `width` columns lines are wrapped, and nothing is cut. With `columns` all are one table of
    these.
    """
    if not disks:
        return "no disks"
    if columns is not None:
        from qmpcommit.cli.columns import LAYER_HEADS, shown

        rows = [
            (_layer_cells(disk, image, place), ())
            for disk in disks
            for place, image in enumerate(disk.chain)
        ]
        return "\n".join(shown(LAYER_HEADS, rows, width, columns=columns, usual=()))
    return "\n".join(line for disk in disks for line in _disk_lines(disk, width))


def _disk_lines(disk: Disk, width: int | None) -> Iterator[str]:
    from qmpcommit.cli.columns import LAYER_HEADS, LAYER_USUAL, shown
    from qmpcommit.cli.tables import wrapped

    about = disk_title(disk)
    yield from wrapped(f"{disk.name}" + (f"  ({about})" if about else ""), width, 2)
    if not disk.chain:
        yield "  empty"
        return
    rows = []
    for place, image in enumerate(disk.chain):
        cells = _layer_cells(disk, image, place)
        if place:
            cells["file"] = f"{'    ' * (place - 1)}└── {image.filename}"
        rows.append((cells, _remarks_of(image, place, image is disk.chain[-1])))
    yield from shown(LAYER_HEADS, rows, width, columns=None, usual=LAYER_USUAL)


def _layer_cells(disk: Disk, image: Image, place: int) -> dict[str, str]:
    return {
        "layer": str(place),
        "format": image.driver,
        "node": image.node_name,
        "size": show_size(image.virtual_size),
        "host": show_size(image.allocated_size),
        "file": image.filename,
        "disk": disk.name,
        "bitmaps": " ".join(image.bitmaps),
    }


def _remarks_of(image: Image, place: int, last: bool) -> list[str]:
    """What stands under a layer's row."""
    state = ["active"] if place == 0 else []
    if image.read_only:
        state.append("read-only")
    if not last:
        state.append(f"a commit copies at most {show_size(image.allocated_size)}")
    lines = [", ".join(state)] if state else []
    if image.bitmaps:
        lines.append(f"bitmaps {' '.join(image.bitmaps)}")
    lines += ["STALE: an earlier commit has made it invalid"] if image.stale else []
    return [*lines, *(f"WARNING: {warning}" for warning in image.warnings)]


def disks_dot(vm: str, disks: list[Disk]) -> str:
    """The chains as a Graphviz digraph, an edge from each layer to the one that it backs on."""

    def quote(*lines: str) -> str:
        text = "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
        return f'"{text}"'

    lines = [f"digraph {quote(vm)} {{", "  rankdir=BT; node [shape=box];"]
    for disk in disks:
        above = f"disk {disk.name}"
        label = quote(disk.name, *(f"job {job}" for job in disk.jobs))
        lines.append(f"  {quote(above)} [shape=ellipse, label={label}];")
        for place, image in enumerate(disk.chain):
            facts = image_facts(image, place, image is disk.chain[-1])
            lines.append(f"  {quote(image.node_name)} [label={quote(image.filename, facts)}];")
            lines.append(f"  {quote(above)} -> {quote(image.node_name)};")
            above = image.node_name
    return "\n".join([*lines, "}"])


def ready_text(seconds: float, bound: str) -> str:
    """For how long a job is READY, as well as that is known."""
    return f"{({'at most': '<= ', 'at least': '>= '}).get(bound, '')}{show_seconds(seconds)}"


def phase_text(status: str) -> str:
    """What a job is at, for people, from QEMU's own word."""
    words = {"running": "copying", "ready": "READY", "standby": "READY, paused"}
    return words.get(status, status)
