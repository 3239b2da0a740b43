"""What a monitor may say: bounds by the kind of message, and how what is large is read.

A monitor that breaks a bound is no QEMU's, or one that harms all other VMs of its reader: the
connection is given up with a `Breach`. Nothing of what was said is repeated by one.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from qemu.qmp.error import ProtocolError
from qemu.qmp.message import Message

from qmpcommit.units import show_size

MESSAGE = 64 * 1024
"""Bytes of a greeting, an event or an error; QEMU's have some hundred."""

REPLY = 1 << 20
"""Bytes of what a command is answered that asks for no list without an end."""

QUERY = 16 << 20
"""Bytes of what a query is answered; 200 layers with bitmaps are a few MB."""

REPLIES = {
    "query-block-jobs": REPLY,
    "query-jobs": REPLY,
    "query-qmp-schema": 4 << 20,  # 0.25 MB
    "query-status": MESSAGE,
    "query-version": MESSAGE,
}
"""Bytes of what these queries may be answered."""

VALUES = 1_000_000
"""Values of one message: a byte of JSON can become a hundred of memory."""

DENSE = (10_000, 6)
"""Values that any message may have, and the bytes that each takes on average where they are more.

QEMU, which names nearly all of them, takes twelve and more; two would cost as much to read as six
times their number.
"""

CHUNK = MESSAGE

TURN = 16
"""Messages of one monitor after which all else has its turn, although more of its have come."""

FLOOD = 4000
"""Messages in one second after which a monitor is read no faster than a turn in `SLOWLY` seconds.

QEMU's own come to some hundred where fifty jobs end at once.
"""

SLOWLY = 0.005

WEIGHT = 512
"""Bytes of what nobody has asked for that count as one message more."""

_DEEP = 3
"""Levels whose parts are read one by one: a message, what it returns, and the entries of that."""

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class Breach(ProtocolError):
    """What a monitor said is more than QEMU says, or no message."""


def bound_of(command: object) -> int:
    """The bytes that a command may be answered."""
    name = str(command)
    return REPLIES.get(name, QUERY if name.startswith(("query-", "x-")) else REPLY)


class Lines:
    """The lines of a stream, none longer than `bound()` bytes and what was read with them."""

    def __init__(self, reader: asyncio.StreamReader, bound: Callable[[], int]) -> None:
        self._reader, self._bound = reader, bound
        self._waiting = bytearray()
        self._turn, self._taken = 0, 0
        self._since = 0.0

    def unasked(self, size: int) -> None:
        """The last one was an event of so many bytes: what is large counts as many."""
        self._turn += size // WEIGHT

    async def _let_others(self) -> None:
        """What has come is taken without waiting, and so a flood would be all that is done."""
        self._turn += 1
        if self._turn < TURN:
            return
        turn, self._turn = self._turn, 0
        now = asyncio.get_running_loop().time()
        if now - self._since > 1.0:
            self._since, self._taken = now, 0
        self._taken += turn
        await asyncio.sleep(SLOWLY * turn / TURN if self._taken > FLOOD else 0)

    async def next(self) -> bytes | bytearray:
        """The next one; what comes before the end without a newline is one too.

        Raises EOFError, OSError, or `Breach` as soon as it is too long, or has too many values.
        """
        await self._let_others()
        seen = values = 0
        while (end := self._waiting.find(b"\n", seen)) < 0:
            values += self._values(seen, len(self._waiting))
            seen = len(self._waiting)
            check_size(seen, self._bound())
            _check_values(values, seen)
            data = await self._reader.read(CHUNK)
            if not data:
                if not self._waiting:
                    raise EOFError
                end = seen - 1
                break
            self._waiting += data
        _check_values(values + self._values(seen, end), end)
        if end + 1 == len(self._waiting):  # the rule; and what is large is not copied
            line, self._waiting = self._waiting, bytearray()
            return line
        line = self._waiting[: end + 1]
        del self._waiting[: end + 1]
        return line

    def _values(self, start: int, end: int) -> int:
        """About how many begin there; names are none, but a comma in a text counts as one."""
        return sum(self._waiting.count(each, start, end) for each in (b",", b"[", b"{"))


def check_size(size: int, bound: int) -> None:
    """Raise `Breach` for a message, or the beginning of one, that is too long."""
    if size > bound:
        raise Breach(f"it sends a message longer than {show_size(bound)}, which QEMU does not")


def _check_values(values: int, size: int) -> None:
    """Raise `Breach` for a message, or the beginning of one, of so many."""
    any_size, each = DENSE
    bound = min(VALUES, max(any_size, size // each))
    if values > bound:
        raise Breach(
            f"it sends a message of {show_size(size)} with more than {bound} values, which QEMU"
            " does not"
        )


async def read_message(line: bytes | bytearray) -> Message:
    """The message of a line; a large one is read beside the loop. Raises `Breach`."""
    try:
        if len(line) <= MESSAGE:
            return Message(bytes(line), eager=True)
        found = await asyncio.to_thread(_in_parts, line)
    except (ProtocolError, ValueError, RecursionError):
        raise Breach("it sends something that is no QMP message") from None
    if not isinstance(found, dict):
        raise Breach("it sends something that is no QMP message")
    return Message(found, eager=False)


def _in_parts(line: bytes | bytearray) -> Any:
    return parse_in_parts(line.decode())


def parse_in_parts(text: str) -> Any:
    """JSON, as `json.loads` has it (raises ValueError).

    Python's own reader stops all threads until it has read all; here others have their turn
    between two parts.
    """
    found, end = _value(text, _skip(text, 0), _DEEP)
    if _skip(text, end) != len(text):
        raise ValueError("there is more behind it")
    return found


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _value(text: str, at: int, deep: int) -> tuple[Any, int]:
    opening = text[at : at + 1]
    if not deep or opening not in ("[", "{"):
        return _DECODER.raw_decode(text, at)
    entries: list[Any] = []
    members: dict[str, Any] = {}
    closing = "]" if opening == "[" else "}"
    at = _skip(text, at + 1)
    if text[at : at + 1] == closing:
        return (entries if opening == "[" else members), at + 1
    while True:
        if opening == "{":
            name, at = _DECODER.raw_decode(text, at)
            at = _skip(text, at)
            if not isinstance(name, str) or text[at : at + 1] != ":":
                raise ValueError("a member has no name")
            members[name], at = _value(text, _skip(text, at + 1), deep - 1)
        else:
            entry, at = _value(text, at, deep - 1)
            entries.append(entry)
        at = _skip(text, at)
        after = text[at : at + 1]
        if after == closing:
            return (entries if opening == "[" else members), at + 1
        if after != ",":
            raise ValueError("entries are parted by commas")
        at = _skip(text, at + 1)
