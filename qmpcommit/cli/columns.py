"""``--format``: the columns of a table, as a person names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

LAYER_HEADS = {
    "layer": "LAYER",
    "format": "FORMAT",
    "node": "NODE",
    "size": "SIZE",
    "host": "ON HOST",
    "file": "FILE",
    "disk": "DISK",
    "bitmaps": "BITMAPS",
}
"""Of ``chain``'s tables, a row a layer."""

LAYER_USUAL = ("layer", "format", "node", "size", "host", "file")

F = TypeVar("F", bound=Callable[..., Any])

Cells = Mapping[str, str]
"""One row: what stands in each column, by its name."""


def format_option(columns: Mapping[str, str]) -> Callable[[F], F]:
    """Add ``--format``; `columns` are all names, with their heads."""

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        before, comma, last = incomplete.rpartition(",")
        return [
            CompletionItem(f"{before}{comma}{name}") for name in columns if name.startswith(last)
        ]

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
        return None if value is None else _chosen(value, columns)

    return click.option(
        "--format",
        "columns",
        metavar="COLUMN,...",
        callback=read,
        shell_complete=complete,
        help=f"Only these columns, in this order: {', '.join(columns)}.",
    )


def _chosen(text: str, columns: Mapping[str, str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in columns:
            from difflib import get_close_matches

            near = get_close_matches(name, columns)
            meant = f" Did you mean {' or '.join(near)}?" if near else ""
            raise click.BadParameter(
                f"there is no column '{name}'; there are {', '.join(columns)}.{meant}"
            )
    return names


def check_format(columns: Sequence[str] | None, **others: bool) -> None:
    """Raise `click.UsageError` for what does not go with it."""
    for name, given in others.items():
        if given and columns is not None:
            raise click.UsageError(f"Give --format or --{name}, not both")


def shown(
    heads: Mapping[str, str],
    rows: Sequence[tuple[Cells, Sequence[str]]],
    width: int | None,
    *,
    columns: Sequence[str] | None,
    usual: Sequence[str],
) -> Iterator[str]:
    """The table: of all that is `usual`, with remarks, or of the `columns` that were asked for."""
    from qmpcommit.cli.tables import table

    names = columns or usual
    cells = [
        ([row.get(name) or "-" for name in names], [] if columns else remarks)
        for row, remarks in rows
    ]
    yield from table([heads[name] for name in names], cells, width)
