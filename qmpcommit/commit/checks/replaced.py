"""Whether the layers' names still lead to the files that QEMU has open."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator

from qmpcommit.block.chain import Disk, Image, is_temporary
from qmpcommit.block.graph import BlockGraph, is_plain
from qmpcommit.block.identity import HOST_FILES, FileId, Named, OpenFiles, file_id, storage
from qmpcommit.commit.checks.finding import Case, Finding, refused, unchecked
from qmpcommit.commit.plan import Plan
from qmpcommit.errors import ChainError

NAME = "replaced-file"

_OUT = (
    "put that file back under its name (where it was only moved, move it back), or copy the disk as"
    " the guest sees it into a new file (blockdev-mirror) and go on with that"
)


def replaced_file(case: Case) -> Iterator[Finding]:
    """A layer that stays, whose file was replaced or removed while QEMU has it open.

    What is committed would be in a file that nobody finds when QEMU has ended. A base that QEMU
    has to open anew for writing is opened by its name: it would write into the other file.
    """
    base, leaves = case.plan.base, {image.node_name for image in case.layers}
    chain = case.plan.disk.chain
    if base.node_name not in [image.node_name for image in chain]:
        chain = (*case.layers, base)
    seen: dict[FileId, str] = {}
    unknown = ""
    for image in chain:
        if is_temporary(image) and image.node_name not in leaves:
            continue  # it never had a name, and "temporary-overlay" tells of it
        for name, told in _named(case, image):
            if told.verdict == "unknown":
                unknown = unknown or told.reason
            elif told.verdict == "same":
                file = file_id(told.here) if told.here else None
                if file is not None and seen.setdefault(file, image.node_name) != image.node_name:
                    yield refused(
                        NAME,
                        f"{name} is the same file as another layer of {case.plan.disk} now, and"
                        " QEMU has two different ones open: put the layers' own files back",
                    )
            elif image.node_name in leaves:
                yield Finding(NAME, "note", f"{told.reason}; nothing of that name is deleted")
            elif missing := _missing_folders(case.graph, case.opened, name):
                if image.node_name == base.node_name and image.read_only:
                    yield _unreachable(image, name, missing)
            else:
                yield _refused(case, image, told)
    if unknown:
        yield unchecked(NAME, unknown)


def replaced_since(plan: Plan, graph: BlockGraph, opened: OpenFiles) -> str | None:
    """What speaks against the plan by now that its own findings don't have; None for nothing."""
    known = {each.message for each in plan.findings}
    for finding in replaced_file(Case(graph, plan, None, graph.cwd, opened=opened)):
        if finding.level == "refuse" and finding.message not in known:
            return finding.message
    return None


def base_files(plan: Plan, graph: BlockGraph, opened: OpenFiles) -> dict[str, FileId]:
    """The base's files by the names that lead to them now; none where that can't be seen."""
    found: dict[str, FileId] = {}
    for node in storage(graph, plan.base.node_name):
        name = str(node.raw.get("file") or "")
        told = opened.named(name) if node.driver in HOST_FILES and is_plain(name) else None
        file = file_id(told.here) if told is not None and told.here else None
        if told is not None and told.verdict == "same" and file is not None:
            found[told.here] = file
    return found


def nameless(graph: BlockGraph, opened: OpenFiles, layer: str) -> str:
    """Why a layer's file is certainly not found by its name any more; "" where it may be."""
    for node in storage(graph, layer) if layer in graph.nodes else ():
        name = str(node.raw.get("file") or "")
        if node.driver in HOST_FILES and is_plain(name):
            told = opened.named(name)
            if told.verdict in ("other", "gone"):
                return told.reason
    return ""


def check_named(vm: str, graph: BlockGraph, opened: OpenFiles, disk: Disk, above: int) -> None:
    """Raise `ChainError` where a layer from the place `above` on was replaced or removed."""
    for image in disk.chain[above:]:
        for node in storage(graph, image.node_name):
            name = str(node.raw.get("file") or "")
            if node.driver in HOST_FILES and is_plain(name):
                told = opened.named(name)
                if told.verdict in ("other", "gone") and not _missing_folders(graph, opened, name):
                    raise ChainError(
                        f"the layer {image.filename} of {disk} of {vm} was replaced or removed"
                        f" while QEMU has it open: {told.reason}. To be safe {_OUT}. Nothing was"
                        " changed",
                        vm=vm,
                        disk=disk.name,
                    )


def _named(case: Case, image: Image) -> Iterator[tuple[str, Named]]:
    for node in storage(case.graph, image.node_name):
        name = str(node.raw.get("file") or "")
        if node.driver in HOST_FILES and is_plain(name):
            yield name, case.opened.named(name)


def _missing_folders(graph: BlockGraph, opened: OpenFiles, name: str) -> list[str]:
    """The folders that are gone from the name of a file that is there; else none.

    QEMU put the names of a chain together from those in its headers (``/a/../b/x``), so that one
    may lead through the folders of layers that were merged away.
    """
    name = os.path.join(graph.cwd or "/", name)
    if opened.named(os.path.normpath(name)).verdict != "same":
        return []
    parts = name.split("/")
    folders = [os.path.normpath("/".join(parts[:end])) for end in range(2, len(parts))]
    return [each for each in dict.fromkeys(folders) if not os.path.lexists(each)]


def _unreachable(image: Image, name: str, missing: list[str]) -> Finding:
    return Finding(
        NAME, "refuse",
        f"QEMU has the base {os.path.normpath(name)} ({image.node_name}) open by the name '{name}',"
        " and opens it anew by that to write to it, but it leads through folders that are gone:"
        f" make them again ('{shlex.join(['mkdir', *missing])}'; they may be empty)",
        final=True,
    )  # fmt: skip


def _refused(case: Case, image: Image, told: Named) -> Finding:
    what = "the base" if image.node_name == case.plan.base.node_name else "the layer"
    node = case.graph.leaf(image.node_name)
    if what == "the base" and node.raw.get("ro") and image.read_only:
        return Finding(
            NAME, "refuse",
            f"{what} {image.filename} was replaced or removed while QEMU has it open:"
            f" {told.reason}. QEMU opens it anew by its name to write to it, and would write into"
            f" what has that name now; this can't be overridden: {_OUT}",
            final=True,
        )  # fmt: skip
    return refused(
        NAME,
        f"{what} {image.filename} was replaced or removed while QEMU has it open: {told.reason}."
        " What is written to it is lost when QEMU ends, or is where the VM does not look at its"
        f" next start: {_OUT}",
    )
