"""What Python and asyncio say of a process of ours that forgot something."""

from __future__ import annotations

import re

WATCHED = {"PYTHONWARNINGS": "always"}
"""Environment in which a process tells of all: of what was not closed, too."""

_FORGOTTEN = re.compile(
    r"^.*(?:\w+Warning: |was never awaited|Task was destroyed|never retrieved"
    r"|Exception ignored).*$",
    re.MULTILINE,
)


def complaints(said: str) -> list[str]:
    """The lines of standard error, or a log, that tell of a mistake of the program."""
    return _FORGOTTEN.findall(said)
