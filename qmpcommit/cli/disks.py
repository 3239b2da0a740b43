"""Disks of several VMs on the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import click

_TCP = re.compile(r"tcp:.+:\d+", re.ASCII)


def disk_pairs(words: Sequence[str | None], by_name: bool) -> list[tuple[str, str]]:
    """Disks given as ``QMP:DISK``; none where the first word is a monitor by itself.

    With the daemon (`by_name`) a VM is named. Without, one whose monitor is not there is a pair
    only where it can be nothing else. Raises `click.UsageError` where both are mixed.
    """
    given = [word for word in words if word is not None]
    pairs = [_pair(word, by_name) for word in given]
    if pairs[0] is None and len(given) > 1:
        return []
    if not by_name:
        pairs = [pair or _absent(word) for pair, word in zip(pairs, given, strict=True)]
    if None in pairs[1:]:
        raise click.UsageError(
            f"{given[pairs.index(None)]} is no QMP:DISK, and the words before it are; give all"
            " disks so, or QMP and then its DISKs"
        )
    return [pair for pair in pairs if pair is not None]


def _pair(word: str, by_name: bool) -> tuple[str, str] | None:
    if by_name:
        vm, _, disk = word.partition(":")
        return (vm, disk) if vm and disk else None
    if _is_monitor(word):
        return None
    places = [place for place, letter in enumerate(word) if letter == ":"]
    for place in reversed(places):
        qmp, disk = word[:place], word[place + 1 :]
        if disk and _is_monitor(qmp):
            return qmp, disk
    return None


def _absent(word: str) -> tuple[str, str] | None:
    """A pair whose monitor does not exist, for an error that says so."""
    qmp, _, disk = word.rpartition(":")
    return (qmp, disk) if qmp and disk and not _is_monitor(word) else None


def _is_monitor(word: str) -> bool:
    return _TCP.fullmatch(word) is not None or os.path.exists(word.removeprefix("unix:"))
