"""Fresh overlays that were made and do not lie, and layers that were left open; pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from qmpcommit.block.chain import Disk
from qmpcommit.block.flush import FLUSH
from qmpcommit.commit.claim import layer_number, owner_in
from qmpcommit.commit.overlay.trial import TRIAL
from qmpcommit.commit.rates import READY
from qmpcommit.commit.stale_layers import users
from qmpcommit.names import JOB_PREFIX, MARKING, WINDOW_MARK, node_stem
from qmpcommit.recovery.findings import Finding, Kind
from qmpcommit.recovery.jobs import DISCARD, RUNNING, SNAPSHOT, disk_of, followed, held
from qmpcommit.recovery.seen import Seen


def unlaid(seen: Seen) -> dict[str, str]:
    """What a killed process has made and not laid, by the stem of its nodes: the file's name."""
    found = {}
    for name, node in seen.graph.nodes.items():
        stem, _, kind = name.rpartition("-")
        if not name.startswith(JOB_PREFIX) or kind not in ("top", "file"):
            continue
        if kind == "file" and f"{stem}-top" in seen.graph.nodes:
            continue
        if "backing" in node.children or users(seen.graph, name):
            continue
        file = seen.graph.file(seen.graph.leaf(name))
        if WINDOW_MARK not in file:
            found[stem] = file
    return found


def job_of(seen: Seen, stem: str) -> str:
    """The job whose fresh overlay's nodes are called so; the stem itself where none is there."""
    return next((job for job in seen.jobs if node_stem(job) == stem), stem)


def disk_over(seen: Seen, layer: str) -> tuple[Disk, int] | None:
    """The disk that has this layer, and how deep."""
    for disk in seen.disks:
        for place, image in enumerate(disk.chain):
            if image.node_name == layer:
                return disk, place
    return None


def recycles(seen: Seen) -> Iterator[Finding]:
    """Overlays that were made: laid where the disk has pivoted, else removed."""
    for stem, file in unlaid(seen).items():
        job_id = job_of(seen, stem)
        where = disk_over(seen, seen.names.get(f"{stem}-top", ""))
        on = where[0] if where else disk_of(seen, job_id)
        discards = DISCARD.fullmatch(f"{stem}-top")
        snapshots = SNAPSHOT.fullmatch(f"{stem}-top")
        if held(seen, on) if on is not None and not discards else followed(seen, job_id):
            continue
        status = str(seen.jobs.get(job_id, {}).get("status") or "")
        name = on.name if on is not None else ""
        left = _was_active(seen, f"{stem}-top")
        if left is not None:
            for node in (f"{stem}-top", f"{stem}-file"):
                if node in seen.graph.nodes:
                    yield _stale(seen, left, node, file)
                    break
            continue
        kind: Kind = "discard" if discards else "recycle"
        what = "a discard" if discards else "a snapshot" if snapshots else "a recycle"
        message = f"{what} was interrupted: its empty overlay {file} is open, and does not lie"
        lays = not discards and not snapshots
        if lays and where is not None and where[1] == 0 and where[0].chain[0].node_name:
            pivoted = f"{message}; {on} has pivoted, and its guest would write to the base"
            yield Finding(
                kind,
                seen.vm,
                f"{stem}-top",
                pivoted,
                "It is laid over the base, before the guest goes on",
                disk=name,
            )
        elif where is not None or discards or status in (*RUNNING, *READY, "pending"):
            yield Finding(
                kind,
                seen.vm,
                f"{stem}-top",
                message,
                "It is closed, and its file deleted, for it is empty",
                disk=name,
            )
        elif f"{stem}-file" in seen.graph.nodes and f"{stem}-top" not in seen.graph.nodes:
            yield Finding(
                kind,
                seen.vm,
                f"{stem}-top",
                message,
                "It is closed, and its file deleted if it is empty",
                disk=name,
            )
        else:
            yield Finding(
                kind,
                seen.vm,
                f"{stem}-top",
                message,
                "Which disk it was made for can't be known: look at 'qmpcommit chain', and close it"
                f" with blockdev-del {stem}-top",
                does=False,
                disk=name,
            )


def _was_active(seen: Seen, layer: str) -> Disk | None:
    """The disk that wrote to this layer when a process claimed it that has died, and does not now.

    It may itself have been a recycle's overlay once, and is no empty one.
    """
    for disk in seen.disks:
        owner = owner_in(seen.graph, disk)
        if owner is not None and owner in seen.dead and owner.layer == layer_number(layer):
            return None if layer in {image.node_name for image in disk.chain} else disk
    return None


def _stale(seen: Seen, disk: Disk, node: str, file: str) -> Finding:
    now = f", and its guest writes to {disk.active.filename} now" if disk.active else ""
    message = f"{file} is stale: {disk} has been committed from it{now}. Node {node} is open"
    return Finding(
        "node",
        seen.vm,
        node,
        message,
        "It is closed; its file stays. Never boot it",
        disk=disk.name,
    )


def laid_discards(seen: Seen) -> dict[str, list[tuple[Disk, bool]]]:
    """Disks whose discard was interrupted, by its stem; and whether they start from the base yet.

    One that does is told from a finished one by its former overlay, which is open still.
    """
    found: dict[str, list[tuple[Disk, bool]]] = {}
    for disk in seen.disks:
        match = DISCARD.fullmatch(disk.chain[0].node_name) if disk.chain else None
        if match is None or len(disk.chain) < 2 or held(seen, disk):
            continue
        fresh, base = disk.chain[0].node_name, seen.names.get(disk.chain[0].node_name)
        layers = [image.node_name for image in disk.chain]
        if base is not None and base in layers[2:3]:
            found.setdefault(match[1], []).append((disk, False))
        elif base == layers[1] and former(seen, disk) is not None:
            found.setdefault(match[1], []).append((disk, True))
        assert fresh == layers[0]
    return found


def former(seen: Seen, disk: Disk) -> str | None:
    """The overlay that one over its base now has taken the place of, if it is open still."""
    fresh, base = disk.chain[0].node_name, disk.chain[1].node_name
    for name, node in seen.graph.nodes.items():
        over = node.children.get("backing") == base and name != fresh
        if over and not users(seen.graph, name):
            return name
    return None


def swapped_discards(seen: Iterable[Seen]) -> frozenset[str]:
    """Those of which a disk starts from its base already, on any VM: all of their overlays lie."""
    return frozenset(
        match[1]
        for vm in seen
        for disk in vm.disks
        if len(disk.chain) > 1
        and (match := DISCARD.fullmatch(disk.chain[0].node_name))
        and vm.names.get(disk.chain[0].node_name) == disk.chain[1].node_name
    )


def discards(seen: Seen, swapped: Collection[str]) -> Iterator[Finding]:
    """Discards whose empty overlays lie, and that are not over; `swapped` have to be finished."""
    for stem, disks in laid_discards(seen).items():
        names = " and ".join(str(disk) for disk, _ in disks)
        message = f"a discard of {names} was interrupted, and the guest stands still for it"
        does = (
            "It is brought to its end, for it had begun to: the overlay is empty"
            if stem in swapped
            else "It is undone: the former overlay is active again, and the guest goes on with it"
        )
        first = disks[0][0]
        yield Finding("discard", seen.vm, first.chain[0].node_name, message, does, disk=first.name)


def stale_nodes(seen: Seen, disk: Disk) -> list[str]:
    """Layers over those of a disk that nothing uses: those of a commit that had ended."""
    layers = {image.node_name for image in disk.chain}
    found = []
    for name, node in seen.graph.nodes.items():
        if name in layers or "backing" not in node.children or users(seen.graph, name):
            continue
        if name.startswith(JOB_PREFIX) and WINDOW_MARK in seen.graph.file(seen.graph.leaf(name)):
            continue
        if layers & set(seen.graph.chain(name)):
            found.append(name)
    return sorted(found)


def nodes_left(seen: Seen) -> Iterator[Finding]:
    """Stale ones only where a claim shows that a process of ours has died over that disk."""
    for name in seen.graph.nodes:
        passing = name.startswith((FLUSH, MARKING)) or name == TRIAL
        if passing and not users(seen.graph, name) and not seen.living:
            message = f"node {name} is left of what was looked at, marked or flushed"
            yield Finding("node", seen.vm, name, message, "It is closed")
    for disk in seen.disks:
        owner = owner_in(seen.graph, disk)
        if owner is None or owner not in seen.dead or owner.verb in ("window", "close"):
            continue
        for name in stale_nodes(seen, disk):
            file = seen.graph.file(seen.graph.leaf(name))
            yield _stale(seen, disk, name, file)
