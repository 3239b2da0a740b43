"""The roll: which promises there are, in a second file beside the journal.

What the journal alone can't tell is what it has lost: a log that is gone, or cut off by a damaged
byte, leaves a database that is older and sound. Each transaction appends one line, after it is
durable in the journal: its number, and the promises that it made, touched or ended. A line that
makes a promise is synced before anybody is told of it; the others are when there is time. What was
promised may be begun meanwhile, for that it is in the journal. So the
roll never knows of more than the journal has got, unless the journal has lost it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from qmpcommit.daemon.schema import Entry, Touched

MOST = 1 << 20
"""Bytes that the roll may have above those of its first line before it is written anew."""


class Called(NamedTuple):
    """What a roll tells: of which journal, up to which transaction, which promises are open.

    `whole` is False where a line of it can't be read.
    """

    identity: str
    seq: int
    open: dict[str, Entry]
    whole: bool


def path_of(journal: Path) -> Path:
    """Where the roll of this journal is."""
    return journal.with_suffix(".roll")


def call(path: Path) -> Called | None:
    """Read a roll; None where there is none, or nothing of it can be read."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    identity, seq, found, whole = "", -1, dict[str, Entry](), True
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            told = _read(line)
            if "identity" in told:
                identity, found = told["identity"], {}
            seq = max(seq, told["seq"])
            for name, (at, facts) in told.get("open", {}).items():
                found[name] = Entry(at, facts)
            for name, facts in told.get("new", {}).items():
                found[name] = Entry(told["seq"], facts)
            for name in told.get("on", ()):
                if name in found:
                    found[name] = found[name]._replace(seq=told["seq"])
            for name in told.get("over", ()):
                found.pop(name, None)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = whole and number == len(lines) - 1  # the last one may be half written
    return Called(identity, seq, found, whole) if seq >= 0 else None


def _read(line: bytes) -> dict[str, Any]:
    told, _, text = line.partition(b" ")
    if told != _sum(text):
        raise ValueError("damaged")
    read: dict[str, Any] = json.loads(text)
    return read


def _sum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


class Roll:
    """The roll that is written; a fault of its file never stops the journal."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self.unsynced = False
        self._open: dict[str, Entry] = {}
        self._file = -1
        self._room = 0

    def begin(self, seq: int, found: Iterable[tuple[str, Entry]]) -> None:
        """Write it anew with what is open; raises OSError."""
        self._open = dict(found)
        self._renew(seq)

    def add(self, seq: int, touched: Iterable[Touched]) -> bool:
        """A transaction is durable, which has touched these; whether it has to be synced now.

        Nobody may be told before of what was promised.
        """
        new: dict[str, Any] = {}
        on, over = [], []
        for name, facts in touched:
            if facts is None:
                if self._open.pop(name, None) is not None:
                    over.append(name)
            elif name in self._open and self._open[name].facts == facts:
                self._open[name] = Entry(seq, self._open[name].facts)
                on.append(name)
            else:
                self._open[name] = Entry(seq, facts)
                new[name] = facts
        said: dict[str, Any] = {"new": new, "on": on, "over": over}
        line = {"seq": seq, **{name: each for name, each in said.items() if each}}
        text = _line(line)
        try:
            if self._file < 0 or self._room < len(text):
                self._renew(seq)
                return False
            done = os.write(self._file, text)
            self._room -= done
            if done < len(text):
                raise OSError("short write")
            self.unsynced = True
        except OSError:  # no room: what is there tells of too little, which raises no alarm
            self.close()
            return False
        return bool(new)

    def sync(self) -> None:
        """Have it on the disk."""
        if self.unsynced and self._file >= 0:
            with suppress(OSError):
                os.fdatasync(self._file)
        self.unsynced = False

    def close(self) -> None:
        """Safe to repeat."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def _renew(self, seq: int) -> None:
        """One line with all that is open takes the place of all lines."""
        self.close()
        text = _line({"identity": self.identity, "seq": seq, "open": self._open})
        beside = self.path.with_name(f"{self.path.name}.new")
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            if os.write(file, text) < len(text):
                raise OSError(f"no room for {beside}")
            os.fdatasync(file)
            os.rename(beside, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            os.close(file)
            with suppress(OSError):
                os.unlink(beside)
            raise
        self._file, self._room, self.unsynced = file, MOST + len(text), False


def _line(told: dict[str, Any]) -> bytes:
    text = json.dumps(told, separators=(",", ":")).encode()
    return b"%s %s\n" % (_sum(text), text)
