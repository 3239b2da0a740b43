"""The plain model: what each image of a chain must contain, cluster by cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CLUSTER = 65536
Values = frozenset[int]
"""The bytes that a cluster may be full of; several where an aborted commit may have copied it.

It may then have some of each: a guest that writes while a job reads gives it the old and the new,
and the job that would read it again has ended.
"""

ZERO: Values = frozenset({0})

NOT_THERE = -1
"""Among a layer's own values: the cluster is perhaps not in it, and shows what is below."""


@dataclass
class Layer:
    """One image: `own` are the clusters that it has itself, `clusters` its size.

    It may have `perhaps` as many: QEMU lengthens the base of a commit as it begins, and one that
    was aborted may have begun or not.
    """

    path: Path
    clusters: int
    own: dict[int, Values] = field(default_factory=dict)
    perhaps: int = 0

    @property
    def node(self) -> str:
        """The node-name that it is opened as."""
        return self.path.stem

    @property
    def most(self) -> int:
        """The largest size that it may have."""
        return max(self.clusters, self.perhaps)


class Layers:
    """A chain, bottom first; the last one is the active layer."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.chain = list(layers)

    @property
    def active(self) -> Layer:
        """What the guest writes to."""
        return self.chain[-1]

    def shown(self, place: int, cluster: int) -> Values:
        """What an image shows at a cluster, with all that is below it."""
        found: set[int] = set()
        for layer in reversed(self.chain[: place + 1]):
            own = layer.own.get(cluster, frozenset({NOT_THERE}))
            found |= own - {NOT_THERE}
            if NOT_THERE not in own:
                return frozenset(found)
            if cluster >= layer.most:
                break
            if cluster >= layer.clusters:
                found |= ZERO
        return frozenset(found | ZERO)

    def copied(self, base: int, top: int, cluster: int) -> Values:
        """What a base has of a cluster of its own once (base, top], as it is now, is in it."""
        length = self.chain[top].clusters
        owns = [self._owned(layer, cluster, length) for layer in self.chain[base + 1 : top + 1]]
        found = self.shown(top, cluster) if any(owns) else frozenset()
        if not any(own is not None and NOT_THERE not in own for own in owns):
            found |= self.chain[base].own.get(cluster, frozenset({NOT_THERE}))
        return found

    def _owned(self, layer: Layer, cluster: int, length: int) -> Values | None:
        """What a layer has of a cluster of its own for a copy of that length: zeroes beyond it."""
        if not layer.clusters <= cluster < length:
            return layer.own.get(cluster)
        if cluster >= layer.most:
            return ZERO
        return layer.own.get(cluster, frozenset({NOT_THERE})) | ZERO

    def grow(self, place: int, clusters: int) -> None:
        """A layer gets longer: QEMU zeroes what is new where what is below would show there."""
        layer = self.chain[place]
        if place and self.chain[place - 1].most > layer.clusters:
            surely = self.chain[place - 1].clusters > layer.clusters
            for cluster in range(layer.clusters, clusters):
                new = surely and cluster >= layer.most
                layer.own.setdefault(cluster, ZERO if new else ZERO | {NOT_THERE})
        layer.clusters = max(layer.clusters, clusters)

    def write(self, cluster: int, value: int) -> None:
        """The guest has written."""
        self.active.own[cluster] = frozenset({value})

    def committed(self, base: int, top: int, seen: Mapping[int, set[int]]) -> None:
        """All of (base, top] is in the base now, but for what was overwritten, as `seen`, since."""
        for cluster in self._between(base, top):
            self.chain[base].own[cluster] = self.copied(base, top, cluster) | seen.get(
                cluster, set()
            )
        self.grow(base, self.chain[top].clusters)

    def perhaps(self, base: int, top: int, seen: Mapping[int, set[int]]) -> None:
        """Some of (base, top] is in the base, as it was at any time; `seen` is what was written."""
        for cluster in self._between(base, top):
            own = self.chain[base].own.get(cluster, frozenset({NOT_THERE}))
            values = own | self.shown(top, cluster) | seen.get(cluster, set())
            self.chain[base].own[cluster] = values
        layer, length = self.chain[base], self.chain[top].clusters
        if base and self.chain[base - 1].most > layer.clusters:
            for cluster in range(layer.clusters, length):
                own = layer.own.get(cluster, frozenset({NOT_THERE}))
                layer.own[cluster] = own | ZERO
        layer.perhaps = max(layer.perhaps, length)

    def merged(self, base: int, top: int) -> None:
        """The layers above the base, up to top, are not in the chain any more."""
        del self.chain[base + 1 : top + 1]

    def _between(self, base: int, top: int) -> set[int]:
        """What is copied: also the zeroes that a layer shorter than top has beyond its end."""
        found: set[int] = set()
        for layer in self.chain[base + 1 : top + 1]:
            found.update(layer.own, range(layer.clusters, self.chain[top].clusters))
        return found

    def wrong(self, place: int, data: bytes) -> str | None:
        """Where an image's bytes are not what they must be; None where all are."""
        layer = self.chain[place]
        if not layer.clusters * CLUSTER <= len(data) <= self.active.clusters * CLUSTER:
            return f"{layer.path.name} has {len(data)} bytes, not {layer.clusters * CLUSTER}"
        for cluster in range(len(data) // CLUSTER):
            found = data[cluster * CLUSTER : (cluster + 1) * CLUSTER]
            allowed = self.shown(place, cluster)
            has = {found[0]} if found.count(found[0]) == CLUSTER else set(found)
            if not has <= allowed:
                return (
                    f"cluster {cluster} of {layer.path.name} has {sorted(has)}, not"
                    f" {sorted(allowed)}"
                )
        return None
