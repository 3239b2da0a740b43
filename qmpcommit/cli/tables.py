"""Tables and paragraphs that fit a terminal: wrapped, and never cut."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence

from qmpcommit.cli.telling import one_line, visible

_ALARMS = re.compile(r"\bWARNING: |\bWarning: |\bNOT DONE: ")


def wrapped(text: str, width: int | None, indent: int) -> Iterator[str]:
    """One line in so many columns, its further lines indented; None has no bound."""
    text = one_line(text)
    if width is None or len(text) <= width:
        yield text
        return
    further = " " * indent
    yield from textwrap.wrap(text, width, subsequent_indent=further, break_on_hyphens=False)


def table(
    heads: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[str]]], width: int | None
) -> Iterator[str]:
    """Rows of cells under their heads, with remarks below each.

    Where they don't fit the last cells have lines of their own, which the terminal breaks: so a
    file's name can be copied.
    """
    lines = [heads, *([one_line(cell) for cell in cells] for cells, _ in rows)]
    sizes = [max(len(cells[place]) for cells in lines) for place in range(len(heads) - 1)]
    longest = 2 + sum(sizes) + 2 * len(sizes) + max(len(cells[-1]) for cells in lines)
    apart = width is not None and longest > width
    for number, cells in enumerate(lines):
        row = "  ".join(f"{cell:{size}}" for cell, size in zip(cells, sizes, strict=False))
        if apart:
            yield from wrapped(f"  {row}".rstrip(), width, 4)
            yield f"    {cells[-1]}"
        else:
            yield f"  {row}  {cells[-1]}"
        for remark in rows[number - 1][1] if number else ():
            yield from wrapped(f"    {remark}", width, 6)


def coloured(text: str) -> str:
    """What a terminal shows of a text: what is wrong stands out, unless ``NO_COLOR`` is set."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb"):
        return text
    return _ALARMS.sub(lambda found: f"\x1b[1;33m{found[0]}\x1b[0m", text)


def draw(text: Callable[[int], str]) -> None:
    """Write a text to the terminal, made for its columns."""
    columns = max(20, shutil.get_terminal_size().columns)
    sys.stdout.write(f"{coloured(visible(text(columns)))}\n")
    sys.stdout.flush()
