"""What is told of who holds a disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qmpcommit.block.graph import CLAIMER
from qmpcommit.commit.claim import Owner, here, node_of, number_of
from qmpcommit.commit.owners import owners_of
from tests.unit.test_checks import made

GRAPH, PLAN = made()


def names(node: Mapping[str, Any]) -> Iterator[str]:
    yield node["node-name"]
    if "file" in node:
        yield from names(node["file"])


def test_who_has_forgotten_a_disk_is_told_of_as_ended() -> None:
    number, now = number_of(PLAN.disk), here()
    node = f"{CLAIMER}{number}naaaaaaaa.flat"
    owner = Owner(number, node, "aaaaaaaa", "flat", now.pid, now.began, now.place, 1_000_000_000)
    graph = GRAPH._replace(claims=frozenset(names(node_of(owner))))
    (found,) = owners_of([PLAN.disk], graph)
    assert (found["work"], found["pid"], found["since"]) == ("a flatten", now.pid, 1_000_000_000)
    assert found["alive"] is False
    assert "which has ended" in found["message"]
    assert owners_of([PLAN.disk], GRAPH) == []
