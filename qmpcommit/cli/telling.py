"""Text for people, in which no name can give the terminal an order.

Names of files, nodes and VMs come from QEMU and the file system, and may hold any character.
"""

from __future__ import annotations

import click

_CONTROLS = {
    number: f"\\x{number:02x}"
    for number in (*range(0x20), *range(0x7F, 0xA0))
    if chr(number) not in "\t\n"
}
_IN_LINE = {**_CONTROLS, 0x09: "\\t", 0x0A: "\\n"}

AFRESH = "\r\x1b[K"
"""The one order of our own that a told text may begin with: the line is written anew."""


def visible(text: str) -> str:
    """The text with its control characters as Python writes them; its lines stay."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """The same of what has to be one line: a name's newline must not begin another."""
    return text.translate(_IN_LINE)


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """As ``click.echo``, with control characters made visible."""
    afresh = AFRESH if text.startswith(AFRESH) else ""
    click.echo(afresh + visible(text.removeprefix(AFRESH)), err=err, nl=nl)
