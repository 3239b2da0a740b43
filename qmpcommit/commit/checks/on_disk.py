"""What the files say of the chain, which is what the next start of the VM goes by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from qmpcommit.block.backing_name import View, leads_to, written_below
from qmpcommit.commit.checks.finding import Case, Finding, refused, unchecked


def on_disk_backing(case: Case) -> Iterator[Finding]:
    """What the files say of the chain, which is what the next start of the VM goes by."""
    chain = case.plan.disk.chain
    names = [image.node_name for image in chain]
    if case.plan.base.node_name not in names:
        yield unchecked("on-disk-backing", "the base is not in the disk's chain")
        return
    view = View.of(case.pid, case.cwd, case.opened.of_process(case.pid))
    last = names.index(case.plan.base.node_name)
    for overlay, below in pairwise(chain[: last + 1]):
        if overlay.node_name not in case.graph.nodes or below.node_name not in case.graph.nodes:
            continue
        for written in written_below(case.graph, overlay.node_name, view):
            if not written.text:
                yield Finding(
                    "on-disk-backing", "note",
                    f"{overlay.filename} names no backing file itself ({written.source}), while"
                    f" QEMU has {below.filename} under it: a start of the VM must give the whole"
                    " chain",
                )  # fmt: skip
                break
            said = f"{overlay.filename} names '{written.text}' as its backing file"
            verdict = leads_to(case.graph, overlay.node_name, below.node_name, written, view)
            if verdict == "other":
                yield refused(
                    "on-disk-backing",
                    f"{said} ({written.source}), but QEMU has {below.filename} under it: started"
                    " from its files, the VM would have another disk, or none. qemu-img rebase -u"
                    " repairs the name while the VM is off",
                )
                break
            if verdict == "part":
                yield Finding(
                    "on-disk-backing", "note",
                    f"{said} ({written.source}), but QEMU has another part of that file, or in"
                    " another format: a start of the VM must give the whole chain",
                )  # fmt: skip
                break
            if verdict == "unknown":
                yield unchecked(
                    "on-disk-backing",
                    f"{said} ({written.source}), which can't be compared from here with"
                    f" {below.filename}, which QEMU has under it",
                )
                break
