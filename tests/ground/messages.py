"""QMP messages from a stream; clients need not end them with a newline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[tuple[dict[str, Any], bytes]]:
    """Each message, and the bytes that it came in, until the end of the stream.

    Raises `ValueError` for JSON that is no object.
    """
    decoder = json.JSONDecoder()
    waiting = ""
    while data := await reader.read(1 << 20):
        waiting += data.decode("utf-8", "surrogateescape")
        while waiting := waiting.lstrip():
            try:
                message, end = decoder.raw_decode(waiting)
            except ValueError:
                break
            if not isinstance(message, dict):
                raise ValueError(f"no QMP message: {waiting[:end]}")
            yield message, waiting[:end].encode("utf-8", "surrogateescape") + b"\r\n"
            waiting = waiting[end:]
