"""Which bitmaps are carried, and what is told of those that can't be."""

from __future__ import annotations

from typing import Any

from qmpcommit.block.bitmaps import bitmaps_of, carrying_actions, plan_carrying
from qmpcommit.block.graph import BlockGraph, build_graph


def bitmap(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "count": 65536, "granularity": 65536, "recording": True,
            "busy": False, "persistent": True, **more}  # fmt: skip


def graph(drv: str = "qcow2", compat: str = "1.1", **nodes: list[dict[str, Any]]) -> BlockGraph:
    image = {"format-specific": {"type": drv, "data": {"compat": compat}}}
    raw = [
        {"node-name": name, "drv": drv if name == "base" else "qcow2", "file": f"/{name}",
         "image": image, "dirty-bitmaps": bitmaps}
        for name, bitmaps in nodes.items()
    ]  # fmt: skip
    return build_graph(raw, [], [], {"nodes": [], "edges": []})


def test_a_bitmap_is_added_to_the_base_and_merged() -> None:
    made = graph(top=[bitmap("a", recording=False)], base=[])
    carrying = plan_carrying(made, ["top"], "base")
    assert (carrying.problems, carrying.busy) == ((), ())
    add, merge = carrying_actions(carrying, [])
    assert add == {
        "type": "block-dirty-bitmap-add",
        "data": {"node": "base", "name": "a", "granularity": 65536, "persistent": True,
                 "disabled": True},
    }  # fmt: skip
    assert merge == {
        "type": "block-dirty-bitmap-merge",
        "data": {"node": "base", "target": "a", "bitmaps": [{"node": "top", "name": "a"}]},
    }


def test_bitmaps_of_several_layers_join_that_of_the_base() -> None:
    made = graph(top=[bitmap("a")], mid=[bitmap("a")], base=[bitmap("a", recording=False)])
    carrying = plan_carrying(made, ["top", "mid"], "base")
    enable, merge = carrying_actions(carrying, bitmaps_of(made, "base"))
    assert [source["node"] for source in merge["data"]["bitmaps"]] == ["top", "mid"]
    assert enable == {
        "type": "block-dirty-bitmap-enable", "data": {"node": "base", "name": "a"}
    }  # fmt: skip


def test_a_bitmap_that_has_come_or_gone_since_is_seen() -> None:
    carrying = plan_carrying(graph(top=[bitmap("a")], base=[]), ["top"], "base")
    now = graph(top=[bitmap("b")], base=[bitmap("b")])
    nodes = {name: node.raw for name, node in now.nodes.items()}
    assert carrying.seen_in(nodes) == plan_carrying(now, ["top"], "base")
    assert carrying.seen_in({"base": nodes["base"]}) is carrying


def test_an_inconsistent_bitmap_is_told_and_left() -> None:
    made = graph(top=[bitmap("a", inconsistent=True), bitmap("b")], base=[])
    carrying = plan_carrying(made, ["top"], "base")
    assert set(carrying.names) == {"b"}
    assert "bitmap 'a' of top is inconsistent" in carrying.problems[0]
    made = graph(top=[bitmap("a")], base=[bitmap("a", inconsistent=True)])
    carrying = plan_carrying(made, ["top"], "base")
    assert not carrying.names
    assert "nothing can join it" in carrying.problems[0]


def test_busy_bitmaps_are_told_apart() -> None:
    made = graph(top=[bitmap("a", busy=True)], base=[bitmap("a", busy=True)])
    carrying = plan_carrying(made, ["top"], "base")
    assert carrying.busy == ("bitmap 'a' of top", "bitmap 'a' of base")


def test_several_granularities_are_told() -> None:
    made = graph(top=[bitmap("a")], base=[bitmap("a", granularity=4096)])
    assert "4096, 65536" in plan_carrying(made, ["top"], "base").problems[0]


def test_a_base_that_stores_no_bitmaps_keeps_them_in_memory() -> None:
    for made in (graph("raw", top=[bitmap("a")], base=[]),
                 graph("qcow2", "0.10", top=[bitmap("a")], base=[])):  # fmt: skip
        carrying = plan_carrying(made, ["top"], "base")
        assert "in memory" in carrying.problems[0]
        assert carrying_actions(carrying, [])[0]["data"]["persistent"] is False


def test_nothing_to_carry() -> None:
    made = graph(top=[], base=[bitmap("a")])
    carrying = plan_carrying(made, ["top"], "base")
    assert not carrying.names
    assert carrying_actions(carrying, bitmaps_of(made, "base")) == []
