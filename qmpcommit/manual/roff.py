"""The manual as man pages: ``qmpcommit(1)``, and ``qmpcommit-TOPIC(7)`` for each topic."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qmpcommit import __version__
from qmpcommit.manual import TOPICS, page, title


def man_pages(commands: dict[str, str], statuses: str) -> dict[str, str]:
    """All of them by their files' names; `commands` has each command's line."""
    pages = {f"qmpcommit-{topic}.7": _topic(topic) for topic in TOPICS}
    lines = [_head("QMPCOMMIT", 1, "live block commit for QEMU, both phases of it", "qmpcommit")]
    lines += [".SH SYNOPSIS", r"\fBqmpcommit\fR [OPTIONS] COMMAND [ARGS]...", ".SH COMMANDS"]
    for name, said in commands.items():
        lines += [".TP", rf"\fB{name}\fR", _inline(said)]
    lines += [
        ".PP",
        "Each has its options and examples: \\fBqmpcommit\\fR COMMAND \\fB\\-\\-help\\fR.",
    ]
    lines += [".SH EXIT STATUS", ".nf", *map(_plain, statuses.splitlines()[1:]), ".fi"]
    lines += [".SH SEE ALSO", ", ".join(rf"\fBqmpcommit\-{topic}\fR(7)" for topic in TOPICS)]
    return {"qmpcommit.1": "\n".join(lines) + "\n", **pages}


def _head(name: str, section: int, said: str, called: str) -> str:
    made = f'.TH {name} {section} "" "qmpcommit {__version__}" "qmpcommit"'
    return f"'\\\" t\n{made}\n.ad l\n.SH NAME\n{_plain(called)} \\- {_inline(said)}"


def _topic(topic: str) -> str:
    _, _, text = page(topic).partition("\n")
    text = re.sub(r"<!--.*?-->\n?", "", text)
    lines = [_head(f"QMPCOMMIT-{topic.upper()}", 7, title(topic), f"qmpcommit-{topic}")]
    lines.append(".SH DESCRIPTION")
    return "\n".join([*lines, *_blocks(text)]) + "\n"


def _blocks(text: str) -> Iterator[str]:
    for block in re.split(r"(^```.*?^```$)|\n{2,}", text, flags=re.MULTILINE | re.DOTALL):
        lines = (block or "").strip("\n").splitlines()
        if not lines:
            continue
        if lines[0].startswith("```"):
            yield from (".PP", ".RS 2", ".nf", *map(_plain, lines[1:-1]), ".fi", ".RE")
        elif lines[0].startswith("## "):
            yield f".SH {_inline(lines[0][3:]).upper()}"
            yield from _paragraph(lines[1:])
        elif lines[0].startswith("|"):
            yield from _table(lines)
        else:
            yield from _paragraph(lines)


def _paragraph(lines: list[str]) -> Iterator[str]:
    items = re.split(r"^\* ", "\n".join(lines), flags=re.MULTILINE)
    if items[0].strip():
        yield from (".PP", _inline(items[0].strip()))
    for item in items[1:]:
        yield from (r".IP \(bu 2", _inline(item.strip()))


def _table(lines: list[str]) -> Iterator[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in rows if not all(re.fullmatch("-+", cell) for cell in row)]
    yield from (".TS", "tab(\t);", " ".join(["lx"] * len(rows[0])) + ".")
    for row in rows:
        yield "\t".join(f"T{{\n{_inline(cell)}\nT}}" for cell in row)
    yield ".TE"


def _inline(text: str) -> str:
    """A text with its marks as fonts, a line's first dot safe."""
    text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", " ".join(text.split()))
    text = re.sub(r"`([^`]+)`", lambda found: f"\0{_marked(found[1])}\1", text)
    text = re.sub(r"\*\*(.+?)\*\*", "\0\\1\1", text)
    text = re.sub(r"(?<!\w)\*(\w[^*]*)\*(?!\w)", "\2\\1\1", text)
    text = _plain(text.replace("\3", "*"))
    return text.replace("\0", r"\fB").replace("\1", r"\fR").replace("\2", r"\fI")


def _marked(code: str) -> str:
    return code.replace("*", "\3")


def _plain(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text
