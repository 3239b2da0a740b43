"""How a window's COMMAND is told which files stand still: by {DISK}, and by variables.

A file's name is text that somebody else chose. As an argument, or in a variable, it is only a
name; inside a program's text, which a shell takes apart, it would be a part of the program. So a
name with other characters than letters, digits and ``@_+=:,./-`` is put nowhere where it may be
taken apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from qmpcommit.errors import InvalidRequest

_HARMLESS = re.compile(r"[A-Za-z0-9/][A-Za-z0-9@_+=:,./-]*")
_AROUND = re.compile(r"[A-Za-z0-9@_+=:,./-]*")
_RUNS_TEXT = re.compile(
    r"((ba|da|z|k|mk|pdk|a|fi|c|tc|r|ya)?sh|busybox|toybox|python[\d.]*|pypy[\d.]*|perl[\d.]*"
    r"|ruby[\d.]*|node|nodejs|php[\d.]*|lua[\d.]*|tclsh|expect|pwsh|make|find|flock|script|env)"
)
"""Programs that run the text after such an option as ``-c`` or ``-e``."""

_TAKES_APART = frozenset(
    ("ssh", "rsh", "autossh", "mosh", "watch", "su", "runuser", "sg", "parallel", "eval", "xterm",
     "awk", "gawk", "mawk", "sed", "osascript", "bc", "sqlite3")
)  # fmt: skip
"""Programs that hand all their arguments to a shell, or run one of them, whatever its place."""

_NAME = re.compile(r"(?<!\$)\{((?:\d+\.)?[A-Za-z][\w-]*)\}")
"""What may be meant as a disk; ``${NAME}`` is a shell's."""

_OPTION = re.compile(r"-[A-Za-z]*[cCeErSp]|--(command|eval|execute|exec|run|split-string|print)")


def variables(files: Mapping[str, str]) -> dict[str, str]:
    """``QMPCOMMIT_FILE_vda`` and the like, and all of them, a line each, in ``QMPCOMMIT_FILES``.

    In a variable's name every character that it can't have is an underscore; disks that would
    have one variable together have none.
    """
    named: dict[str, list[str]] = {}
    for disk, filename in files.items():
        named.setdefault("QMPCOMMIT_FILE_" + re.sub(r"\W", "_", disk, flags=re.A), []).append(
            filename
        )
    found = {name: each[0] for name, each in named.items() if len(set(each)) == 1}
    return {**found, "QMPCOMMIT_FILES": "\n".join(dict.fromkeys(files.values()))}


def used(command: Sequence[str], disks: Sequence[str]) -> set[str]:
    """The disks whose files the command asks for by {DISK}."""
    pattern = _placeholder(disks)
    return {disk for word in command for disk in pattern.findall(word)}


def check_known(command: Sequence[str], disks: Sequence[str]) -> None:
    """Refuse {vdb}, and the like, of a disk that is not in the window; raises `InvalidRequest`.

    Only what looks like a disk: other braces are the command's own.
    """
    stems = {_stem(disk) for disk in disks} | {"vd", "sd", "hd"}
    for word in command:
        for name in _NAME.findall(word):
            if name not in disks and _stem(name) in stems:
                raise InvalidRequest(
                    f"{{{name}}} stands in '{word}', and {name} is no disk of this window"
                    f" ({', '.join(disks)}). Name it before '--' too. Nothing was sent"
                )


def _stem(disk: str) -> str:
    return re.sub(r"^\d+\.|[a-z]$|\d+$", "", disk)


def filled(command: Sequence[str], files: Mapping[str, str]) -> list[str]:
    """The command with a file for each {DISK}.

    Raises `InvalidRequest` where a file's name could be taken for a part of a program.
    """
    pattern = _placeholder(files)

    def put(place: int, word: str) -> str:
        for disk in pattern.findall(word):
            if not _HARMLESS.fullmatch(files[disk]) and _is_taken_apart(command, place, pattern):
                raise InvalidRequest(_refusal(command[0], word, disk, files[disk]))
        return pattern.sub(lambda found: files[found[1]], word)

    return [put(place, word) for place, word in enumerate(command)]


def _placeholder(disks: Sequence[str] | Mapping[str, str]) -> re.Pattern[str]:
    return re.compile(r"\{(" + "|".join(map(re.escape, disks)) + r")\}")


def _is_taken_apart(command: Sequence[str], place: int, pattern: re.Pattern[str]) -> bool:
    """Whether this word may be a program's text, or be joined to one."""
    if not _AROUND.fullmatch(pattern.sub("", command[place])):
        return True
    before = [os.path.basename(word) for word in command[:place]]
    if place == 0 or _TAKES_APART.intersection(before):
        return True
    runs = any(_RUNS_TEXT.fullmatch(word) for word in before)
    first = pattern.split(command[place])[0].removesuffix("=")  # as in perl -e{vda}
    return runs and any(_OPTION.fullmatch(word) for word in (command[place - 1], first))


def _refusal(program: str, word: str, disk: str, filename: str) -> str:
    variable = next(iter(variables({disk: filename})))
    return (
        f"{{{disk}}} stands in '{word}', which {program} or what it runs may take apart, and the"
        f" file is called {filename!r}: a part of its name could be run as a command. Hand it over"
        f""" as an argument (sh -c 'cp "$1" /backup/' sh {{{disk}}}) or as a variable"""
        f""" (sh -c 'cp "${variable}" /backup/'). The command was not run"""
    )
