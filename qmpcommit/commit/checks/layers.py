"""What the layers are: corrupt ones, stale ones, and encrypted beside plain ones."""

from __future__ import annotations

from collections.abc import Iterator

from qmpcommit.block.chain import Image
from qmpcommit.block.graph import BlockGraph, Raw
from qmpcommit.commit.checks.finding import Case, Finding, image_data, refused
from qmpcommit.names import STALE_MARK


def corrupt(case: Case) -> Iterator[Finding]:
    """Data that QEMU itself does not trust."""
    layers = (*case.layers, case.plan.base)
    found = [i for i in layers if image_data(case.graph, i.node_name).get("corrupt")]
    if found:
        yield refused(
            "corrupt",
            f"marked corrupt: {', '.join(image.filename for image in found)}; its data can't be"
            " trusted, and QEMU does not write to it: shut the VM down and run qemu-img check"
            " (-r repairs) on it",
        )


def stale(case: Case) -> Iterator[Finding]:
    """Layers that an earlier pivot or merge has made invalid: they show an old disk."""
    for image in dict.fromkeys((*case.plan.disk.chain, *case.layers, case.plan.base)):
        if image.stale:
            yield refused("stale", stale_text(image))


def stale_text(image: Image) -> str:
    """What is to be known of a layer that is stale, and what can be done."""
    how, out = "its name says so", "give it another name"
    if image.stale == "header":
        how = f"its header says so (bitmap {STALE_MARK})"
        out = f"take the mark away while the VM is off (qemu-img bitmap --remove FILE {STALE_MARK})"
    return (
        f"{image.filename} is stale ({how}): an earlier commit has merged it into the layer below,"
        " which has changed since, so that it shows an old disk, and what is committed from it or"
        " into it mixes old data with new. Start the VM from the layer below it. If it was emptied"
        f" since, {out}"
    )


def encrypted(case: Case) -> Iterator[Finding]:
    """Plain text must not end up in a base that is not encrypted, nor the other way round."""
    base = case.plan.base
    keys = {image.node_name: _key(case.graph, image.node_name) for image in (*case.layers, base)}
    if not any(keys.values()):
        return
    told = ", ".join(
        f"{image.filename}: {keys[image.node_name] or 'not encrypted'}"
        for image in (*case.layers, base)
    )
    if len({bool(key) for key in keys.values()}) > 1:
        yield refused(
            "encrypted",
            "encrypted and plain layers would be merged, and the base holds the data in its own"
            f" way afterwards ({told})",
        )
        return
    yield Finding(
        "encrypted", "note",
        f"the data are decrypted and encrypted again with the base's own key ({told})",
    )  # fmt: skip


def _key(graph: BlockGraph, name: str) -> str:
    """How a layer is encrypted; "" for not at all."""
    node = graph.nodes[name]
    info: Raw = node.raw.get("image") or {}
    if not (info.get("encrypted") or node.raw.get("encrypted") or node.driver == "luks"):
        return ""
    own = image_data(graph, name).get("encrypt") or image_data(graph, name)
    return str(own.get("format") or ("luks" if node.driver == "luks" else "encrypted"))
