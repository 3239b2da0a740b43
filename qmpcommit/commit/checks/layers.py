"""What the layers are: corrupt ones, and encrypted beside plain ones."""

from __future__ import annotations

from collections.abc import Iterator

from qmpcommit.block.graph import BlockGraph, Raw
from qmpcommit.commit.checks.finding import Case, Finding, image_data, refused


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
