"""What a commit would destroy beside the overlay: internal snapshots, and what only QEMU has."""

from __future__ import annotations

from collections.abc import Iterator

from qmpcommit.block.chain import is_temporary
from qmpcommit.commit.checks.finding import Case, Finding, refused

SNAPSHOTS, TEMPORARY = "internal-snapshots", "temporary-overlay"


def internal_snapshots(case: Case) -> Iterator[Finding]:
    """Internal snapshots of the layers that are committed.

    What they show lies partly below them, in what the commit changes. QEMU keeps those of the
    base itself right.
    """
    for image in case.layers:
        names = _names(case, image.node_name)
        if names:
            yield refused(
                SNAPSHOTS,
                f"{image.filename} holds internal snapshots ({names}), which a commit spoils: they"
                " would show the base as it is afterwards, or go with the file. Copy what they"
                f" show (qemu-img convert -l NAME {image.filename} COPY, while the VM is off), or"
                " delete them (delvm, qemu-img snapshot -d). Whatever is overridden, no"
                " deletion takes such a file",
            )
    names = _names(case, case.plan.base.node_name)
    if names:
        yield Finding(
            SNAPSHOTS, "note",
            f"the base {case.plan.base.filename} holds internal snapshots ({names}), which stay"
            " and show what they showed",
        )  # fmt: skip


def _names(case: Case, node: str) -> str:
    info = case.graph.nodes[node].raw.get("image") or {}
    return ", ".join(str(each.get("name")) for each in info.get("snapshots") or ())


def temporary_overlay(case: Case) -> Iterator[Finding]:
    """An overlay of QEMU's own ``snapshot=on``, whose data are in a file without a name."""
    layers = {image.node_name: image for image in (*case.layers, *case.plan.disk.chain)}
    for image in filter(is_temporary, layers.values()):
        harm = "What is merged below it changes files for good"
        if image in case.layers:
            harm = "While it is committed, and after an abort or a keep, the base is whole under it"
            harm = f"{harm} only"
        yield refused(
            TEMPORARY,
            f"{image.filename} is a temporary file of QEMU's own (snapshot=on), which is gone with"
            f" QEMU. {harm}, and whoever started the VM so wanted all files left as they are. Start"
            " the VM over an overlay with a name instead",
        )
