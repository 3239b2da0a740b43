"""The manual: a page of markdown for each topic, which comes with the program."""

from __future__ import annotations

import os

TOPICS = (
    "concepts",
    "commit",
    "window",
    "cycle",
    "flatten",
    "group",
    "virsh",
    "vms",
    "trouble",
    "recovery",
    "embedding",
    "daemon",
    "page",
    "security",
    "metrics",
    "status",
    "qemu",
    "tests",
    "speed",
    "changes",
)
"""In the order in which one would read them."""


def page(topic: str) -> str:
    """The markdown of one of `TOPICS`, also where the program is a zip file."""
    assert __spec__ is not None
    path = os.path.join(os.path.dirname(__file__), f"{topic}.md")
    read: bytes = __spec__.loader.get_data(path)  # type: ignore[union-attr]
    return read.decode()


def title(topic: str) -> str:
    """Its heading, without the topic's own name before a colon."""
    heading = page(topic).partition("\n")[0].removeprefix("# ")
    before, colon, rest = heading.partition(": ")
    return rest if colon and before.lower() == topic else heading
